"""The reference of preference learning: the model as training began, another model, or numbers computed before."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from swift.core.errors import ConfigError
from swift.core.files import atomic_directory
from swift.core.logging import get_logger
from swift.data.cache import cache_root
from swift.data.load import LoadedData
from swift.data.tokens import TokenDataset
from swift.models.load import check_vocabulary, load_model
from swift.models.locate import pin_model
from swift.parallel.answers import AnswerEngine, other_weights
from swift.parallel.native import NativeEngine
from swift.train.evaluation import validation_loader
from swift.train.precision import param_dtype
from swift.train.prepare import Prepared
from swift.tuners.apply import TunedModel
from swift.tuners.peft_format import adapter_folder, load_adapter

__all__ = ["precompute", "reference_options"]

logger = get_logger(__name__)


def reference_options(prepared: Prepared, tuned: TunedModel) -> dict[str, Any]:
    """What `AnswerEngine` needs to know of the reference.

    To be called before a checkpoint is loaded: ``tuned`` is as the run began, but for full training, which reads the
    checkpoint with the model.
    """
    config = prepared.resolved.config
    rlhf, tuner = config.rlhf, config.tuner
    if rlhf.reference_free or not (rlhf.rlhf_type in ("dpo", "ipo", "kto") or (rlhf.is_policy and rlhf.beta)):
        return {}
    begins_with = [str(adapter_folder(one)) for one in config.model.adapters]
    same = rlhf.ref_model is None and [str(adapter_folder(one)) for one in rlhf.ref_adapters] == begins_with
    moves = config.policy.sync_ref_model
    if rlhf.ref_model is not None or (rlhf.ref_adapters and not same):
        if moves:
            why = "only a copy of the trained weights can follow them"
            raise ConfigError("does not go together with ref_model", where="--sync_ref_model", why=why)
        return {"reference_engine": _reference_engine(prepared)}
    # But for LoftQ, an adapter adds nothing at first: switched off, the model is what it was at the start.
    starts_at_base = tuner.init_weights != "loftq"
    if tuned.kind != "full" and not config.model.adapters and starts_at_base and not moves:
        return {"reference": tuned.adapter_disabled}
    parameters = tuned.named_trainable()
    return {"reference": partial(other_weights, parameters, _start(prepared, tuned, parameters))}


def _start(
    prepared: Prepared, tuned: TunedModel, parameters: dict[str, nn.Parameter]
) -> dict[str, torch.Tensor]:
    """Copies of the trained weights as they were when the run began."""
    source: Any = tuned.model
    if (
        tuned.kind == "full" and prepared.checkpoint is not None
    ):  # the model holds the weights of the checkpoint
        source = _load(prepared, prepared.model_path, param_dtype(prepared.resolved))
    weights = dict(source.named_parameters())
    return {
        name: weights[name].detach().to(parameter.dtype, copy=True) for name, parameter in parameters.items()
    }


def _load(prepared: Prepared, folder: Path, dtype: torch.dtype) -> Any:
    config = prepared.resolved.config
    return load_model(
        folder,
        dtype=dtype,
        device=prepared.device,
        attention=config.model.attn_impl,
        trust_remote_code=config.model.trust_remote_code,
        quantization=config.quantization,
    )


def _reference_engine(prepared: Prepared) -> NativeEngine:
    """An engine of a frozen model of its own."""
    config = prepared.resolved.config
    rlhf = config.rlhf
    if len(rlhf.ref_adapters) > 1:
        raise ConfigError("a reference has one adapter", where="--ref_adapters", fix="name one")
    folder = prepared.model_path
    if rlhf.ref_model is not None:
        folder = pin_model(config.model.model_copy(update={"model": rlhf.ref_model, "model_revision": None}))
    model = _load(prepared, folder, prepared.dtype)
    check_vocabulary(model, prepared.template.tokenizer, folder)
    for adapter in rlhf.ref_adapters:
        load_adapter(model, adapter_folder(adapter), trainable=False)
    model.requires_grad_(False)
    return NativeEngine(
        model,
        [],
        device=prepared.device,
        dtype=prepared.dtype,
        chunk_size=config.training.logits_chunk_size,
    )


def precompute(prepared: Prepared, engine: AnswerEngine, say: Callable[[str], None]) -> None:
    """Compute the reference of all data once, or find it in the cache; then the engine needs no reference."""
    data: LoadedData = prepared.data
    for dataset in (data.train, data.validation):
        if dataset is not None:
            dataset.reference = _cached(prepared, engine, dataset, say)
    engine.reference = engine.reference_engine = None


def _cached(
    prepared: Prepared, engine: AnswerEngine, dataset: TokenDataset, say: Callable[[str], None]
) -> np.ndarray:
    path = cache_root().parent / "reference" / _key(prepared, dataset)
    file = path / "logprobs.npy"
    if prepared.resolved.config.data.load_from_cache_file and file.is_file():
        logger.info("log-probabilities of the reference from the cache: %s", path)
        return np.asarray(np.load(file))
    say(f"computing the reference of {len(dataset)} samples")
    values = _compute(prepared, engine, dataset)
    try:
        with atomic_directory(path) as folder:
            np.save(folder / "logprobs.npy", values)
    except OSError as error:
        say(f"the log-probabilities of the reference are not cached: {error.strerror or error} ({path})")
    return values


def _compute(prepared: Prepared, engine: AnswerEngine, dataset: TokenDataset) -> np.ndarray:
    """[n, sequences of a sample] float64."""
    training = prepared.resolved.config.training
    loader, _ = validation_loader(
        dataset,
        batch_size=training.per_device_train_batch_size,
        pad_token_id=prepared.template.tokenizer.pad_token_id,
        group_by_length=True,
    )
    result: np.ndarray | None = None
    for (batch,) in loader.steps(0, 1):
        sums = engine.reference_sums(batch.to(engine.device)).double().cpu().numpy()
        rows = sums.reshape(len(batch.sample_ids), -1)
        if result is None:
            result = np.zeros((len(dataset), rows.shape[1]))
        result[batch.sample_ids] = rows
    assert result is not None
    return result


def _key(prepared: Prepared, dataset: TokenDataset) -> str:
    """A hash of the tokens in their order and of the files of the reference."""
    config = prepared.resolved.config
    rlhf = config.rlhf
    digest = hashlib.blake2b(digest_size=20)
    for store in dataset.stores:
        digest.update(store.ids.tobytes())
        digest.update(store.learned.tobytes())
    digest.update(dataset.index.tobytes())
    others = [rlhf.ref_model] if rlhf.ref_model else []
    for folder in map(Path, [str(prepared.model_path), *config.model.adapters, *others, *rlhf.ref_adapters]):
        files = sorted(folder.glob("*")) if folder.is_dir() else []
        facts = [
            (str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()
        ]
        digest.update(repr((str(folder), facts)).encode())
    start = (config.tuner.tuner_type, config.tuner.init_weights, config.quantization.model_dump())
    digest.update(repr((rlhf.ld_alpha, str(prepared.dtype), start)).encode())
    return digest.hexdigest()
