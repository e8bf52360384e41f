"""Peak memory of a training run, traced: the real training path on fake tensors, without weights and without a device.

Model, tuner, engine, objective and optimizer are those of a run (`swift.train.assemble`). Two optimizer steps are
made under ``FakeTensorMode``, in which tensors have shapes and storages but no numbers, while `LiveBytes` counts. Deep
models are traced with one layer of every kind, and with one more of each; what each part grows by, phase by phase, is
continued to the real depth. Memory is linear in the depth within a phase.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from swift.config.schema import Resolved
from swift.core.errors import ModelError
from swift.core.logging import quiet_libraries
from swift.data.collate import Batch
from swift.data.groups import sequences_of, task_format
from swift.models.classifier import classifier_of
from swift.models.facts import ModelFacts
from swift.models.load import choose_attention, find_class
from swift.models.quantised import stored_method
from swift.parallel.native import NativeEngine
from swift.train.assemble import make_engine, make_objective, tune_model
from swift.train.callbacks.lisa import LisaCallback
from swift.train.fakes import backbone_and_head, fill_with_fakes, quantise, splits_by_operations
from swift.train.live_bytes import LiveBytes
from swift.train.neftune import add_embedding_noise
from swift.train.precision import param_dtype
from swift.train.tasks import classifier_head
from swift.tuners.apply import TunedModel
from swift.tuners.llamapro import grow_config, new_positions
from swift.tuners.targets import decoder_layers

__all__ = ["Afterwards", "BatchShape", "trace_memory"]

Afterwards = Callable[[NativeEngine, LiveBytes], None]
"""What a run does between steps, which is traced after them."""


@dataclass(frozen=True)
class BatchShape:
    """One micro-batch: rows of so many tokens, how many positions teach something, and sequences in all rows.

    ``prompts``: that the sequences, which are answers, share in one row; 0: they are texts of their own.
    """

    rows: int
    width: int
    num_targets: int
    sequences: int
    prompts: int = 0

    @property
    def answers(self) -> tuple[list[int], list[bool]] | None:
        """Lengths of prompts and of the answers behind each, and whether they continue it; None for texts."""
        if not self.prompts:
            return None
        each, answer = self.sequences // self.prompts, self.num_targets // self.sequences
        prompt = max(1, self.width // self.prompts - each * answer)
        lengths = [prompt, *[answer] * each] * self.prompts
        lengths[-1] += self.width - sum(lengths)
        return lengths, [False, *[True] * each] * self.prompts


def trace_memory(
    resolved: Resolved,
    facts: ModelFacts,
    folder: Path | None,
    shape: BatchShape,
    *,
    device: str,
    dtype: str,
    afterwards: Afterwards | None = None,
) -> dict[str, dict[str, int]]:
    """Phase -> bytes by part at its peak, of one process, without what the process and the allocator need.

    Args:
        resolved: with the options that a plan derives.
        folder: of the model; None: its configuration is that of ``facts``.
        shape: of the largest micro-batch.
        device: kind of device that the run is for.
        dtype: computing precision.
        afterwards: traced after a step; enters phases of its own.

    Raises:
        ConfigError, ModelError: what the run would refuse too, and stored quantised weights, which are not traced.
    """
    quiet_libraries()
    if stored_method(facts.config) is not None:
        raise ModelError(
            "weights that are stored quantised cannot be traced",
            fix="leave out --exact: the formulas know them",
        )
    if resolved.config.training.activation_cpu_offload:
        raise ModelError(
            "a trace does not follow activations into host memory",
            where="--activation_cpu_offload",
            fix="leave out --exact: the formulas know them",
        )
    resolved = copy.deepcopy(resolved)
    resolved.config.training.torch_compile = False  # compiled or not, the same tensors at most
    model_class, config = _class_of(resolved, facts, folder)
    kinds = _kinds(config.get_text_config())
    traced = _picked(kinds, resolved)
    trace = _Trace(resolved, model_class, config, shape, device, getattr(torch, dtype), afterwards)
    try:
        base = _continued(trace, kinds, traced)
    except (RuntimeError, NotImplementedError, AttributeError, TypeError) as error:
        # A library asks fake tensors for what only values can tell.
        raise ModelError(
            "this training cannot be traced",
            why=str(error).split("\n", 1)[0],
            fix="leave out --exact: formulas",
        ) from error
    return {phase: dict(parts) for phase, parts in base.items()}


def _continued(trace: _Trace, kinds: Sequence[str], traced: Sequence[int]) -> dict[str, Counter[str]]:
    """Phase -> bytes by part at its peak, continued from the traced layers to all of them."""
    base = trace.run(traced)
    result = {phase: Counter(parts) for phase, parts in base.items()}
    grown = Counter(kinds) - Counter(kinds[index] for index in traced)
    for kind, more in grown.items():
        extra = next(index for index in traced if kinds[index] == kind)
        deeper = trace.run(sorted([*traced, extra]))
        for phase, parts in base.items():
            for part in set(parts) | set(deeper[phase]):
                result[phase][part] += more * (deeper[phase][part] - parts[part])
    return result


def _class_of(resolved: Resolved, facts: ModelFacts, folder: Path | None) -> tuple[Any, Any]:
    """Class and configuration of the model."""
    section, head = resolved.config.model, classifier_head(resolved)
    if folder is not None:
        model_class, config = find_class(folder, section.trust_remote_code)
    else:
        import transformers

        model_class = getattr(transformers, facts.architecture, None)
        if model_class is None or getattr(model_class, "config_class", None) is None:
            raise ModelError(f"transformers does not know the architecture {facts.architecture!r}")
        config = model_class.config_class.from_dict(facts.config)
    where = folder or Path(section.model or "")
    if head is not None:
        model_class = classifier_of(model_class, config, head, where)
    config._attn_implementation = choose_attention(section.attn_impl, config, where)
    config.use_cache = False
    return model_class, config


def _kinds(config: Any) -> list[str]:
    """For each layer what tells it from others: its entry in every list of the configuration, dense or experts."""
    depth = config.num_hidden_layers
    values = {name: value for name, value in config.to_dict().items() if isinstance(value, list)}
    lists = [value for value in values.values() if len(value) == depth]
    dense, first = values.get("mlp_only_layers", []), getattr(config, "first_k_dense_replace", None) or 0
    step = getattr(config, "decoder_sparse_step", None) or 1
    return [
        str([*(one[index] for one in lists), index in dense or index < first or (index + 1) % step > 0])
        for index in range(depth)
    ]


_BY_LAYER = ("recompute_num_layers", "freeze_parameters_ratio", "freeze_parameters", "trainable_parameters",
             "freeze_parameters_regex", "trainable_parameters_regex", "target_regex", "reft_layers",
             "lisa_activated_layers")  # fmt: skip


def _picked(kinds: Sequence[str], resolved: Resolved) -> list[int]:
    """The layers that are traced: all where options tell them apart by number, else each kind, and two at least."""
    config = resolved.config
    named = [
        getattr(section, name, None) for section in (config.training, config.tuner) for name in _BY_LAYER
    ]
    numbered = any(
        ".layers." in name for name in [*config.tuner.target_modules, *config.tuner.modules_to_save]
    )
    if len(kinds) <= 3 or any(named) or numbered or config.tuner.tuner_type == "llamapro":
        return list(range(len(kinds)))
    first = {kind: index for index, kind in reversed(list(enumerate(kinds)))}
    chosen = sorted(first.values())
    return chosen if len(chosen) > 1 else [0, 1]


def _with_layers(config: Any, picked: Sequence[int]) -> Any:
    """The configuration of a model that has only these layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    depth = text.num_hidden_layers
    dense, first = getattr(text, "mlp_only_layers", None), getattr(text, "first_k_dense_replace", None)
    step = getattr(text, "decoder_sparse_step", None) or 1
    for name, value in text.to_dict().items():
        if isinstance(value, list) and len(value) == depth and name != "mlp_only_layers":
            setattr(text, name, [value[index] for index in picked])
    if dense is not None:
        text.mlp_only_layers = [
            place for place, index in enumerate(picked) if index in dense or (index + 1) % step > 0
        ]
        text.decoder_sparse_step = 1
    if first:
        text.first_k_dense_replace = sum(index < first for index in picked)
    text.num_hidden_layers = len(picked)
    return config


class _Trace:
    """Two steps of training of a model with chosen layers, and the peak of each phase of the second."""

    def __init__(
        self,
        resolved: Resolved,
        model_class: Any,
        config: Any,
        shape: BatchShape,
        device: str,
        dtype: torch.dtype,
        afterwards: Afterwards | None,
    ) -> None:
        self.resolved, self.model_class, self.config = resolved, model_class, config
        self.shape, self.device, self.dtype, self.afterwards = shape, device, dtype, afterwards
        self._splits: bool | None = None

    def run(self, picked: Sequence[int]) -> dict[str, Counter[str]]:
        """Phase -> bytes by part at its peak."""
        config, tuner = _with_layers(self.config, picked), self.resolved.config.tuner
        if tuner.tuner_type == "llamapro":
            new, groups = tuner.llamapro_num_new_blocks, tuner.llamapro_num_groups
            grow_config(config.get_text_config(), len(picked), new_positions(len(picked), new, groups))
        live = LiveBytes(
            vocab=config.get_text_config().vocab_size,
            selected=self.shape.num_targets,
            tokens=self.shape.rows * self.shape.width,
            on_device=self.device != "cpu",
        )
        with torch.device("meta"):
            tuned = self._build(config)
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        fill_with_fakes(tuned.model, mode)
        with mode, live:
            engine = self._engine(tuned)
            _watch(tuned, engine, live)
            self._steps(engine, live)
            if self.afterwards is not None:
                self.afterwards(engine, live)
        return live.peaks

    def _build(self, config: Any) -> TunedModel:
        """Model and tuner on torch's meta device: like fake tensors without a device, and open to every conversion."""
        resolved = self.resolved
        full = resolved.config.tuner.trains_whole_model
        loaded = param_dtype(resolved) if full else self.dtype
        model = self.model_class._from_config(
            config, dtype=loaded, attn_implementation=config._attn_implementation
        )
        if self._splits is None:
            self._splits = splits_by_operations(model.eval())
        if resolved.config.quantization.is_active:
            quantise(model, resolved, self.dtype)
        return tune_model(
            model.eval(),
            resolved,
            device=torch.device("cpu"),
            dtype=self.dtype,
            total_steps=1000,
            base=None,
            restored=True,
        )

    def _engine(self, tuned: TunedModel) -> NativeEngine:
        options: dict[str, Any] = {}
        if self.resolved.config.task.task_type in ("causal_lm", "generative_reranker"):
            options["split"] = lambda model: backbone_and_head(model) if self._splits else None
        engine = make_engine(
            tuned,
            self.resolved,
            device=torch.device("cpu"),
            dtype=self.dtype,
            total_steps=1000,
            tokenizer=_one_token,
            **options,
        )
        if self.resolved.config.training.neftune_noise_alpha:
            add_embedding_noise(engine, self.resolved.config.training.neftune_noise_alpha, 0)
        for group in engine.parameter_sets.values():
            if hasattr(group.optimizer, "fill_qmap"):
                with unset_fake_temporarily():
                    group.optimizer.fill_qmap()
        return engine

    def _steps(self, engine: NativeEngine, live: LiveBytes) -> None:
        """An update that makes the optimizer's state, then a whole step, whose peaks count.

        With accumulation the gradients of earlier micro-batches are there while the next one is computed.
        """
        accumulates = (self.resolved.config.training.gradient_accumulation_steps or 1) > 1
        sets = engine.parameter_sets.values()
        optimizers = [part for group in sets for part in getattr(group.optimizer, "parts", [group.optimizer])]
        for optimizer in optimizers:
            if hasattr(optimizer, "train"):  # schedule-free
                optimizer.train()
        parameters = [parameter for group in sets for parameter in group.parameters.values()]
        self._draw_layers(engine, optimizers[0])
        _give_gradients(parameters, live)
        engine.scaler = None  # of float16: one number, and it wants to see whether gradients are finite
        live.enter("first update", "temporary")
        engine.clip()
        engine.step(0)
        states = [state for optimizer in optimizers for state in optimizer.state.values()]
        live.claim(
            (v for state in states for v in state.values() if isinstance(v, torch.Tensor)), "optimizer"
        )
        if accumulates:
            _give_gradients(parameters, live)
        live.enter("forward", "activations")
        engine.forward_backward([self._batch()], make_objective(self.resolved, validation=False))
        live.enter("update", "temporary")
        engine.clip()
        engine.step(1)

    def _draw_layers(self, engine: NativeEngine, optimizer: Any) -> None:
        """LISA trains some layers at a time; which ones makes no difference here."""
        tuner = self.resolved.config.tuner
        if tuner.lisa_activated_layers:
            activated = tuner.lisa_activated_layers
            LisaCallback(engine.model, optimizer, activated=activated, interval=1, seed=0).draw(0)

    def _batch(self) -> Batch:
        rows, width = self.shape.rows, self.shape.width
        ids = torch.zeros(rows, width, dtype=torch.int64)
        config = self.resolved.config
        group = sequences_of(task_format(config))
        count, samples = self.shape.num_targets, max(1, self.shape.sequences // group)
        in_groups = task_format(config) is not None
        each = count // (samples * group)
        return Batch(
            input_ids=ids,
            position_ids=ids.clone(),
            targets=ids.clone(),
            weights=None,
            document_lengths=[self.shape.answers[0]] if self.shape.answers else self._documents(),
            document_continues=[self.shape.answers[1]] if self.shape.answers else None,
            num_tokens=rows * width,
            num_targets=count,
            sample_ids=[],
            samples_per_row=[],
            groups=[group] * samples if in_groups else None,
            labels=torch.zeros(samples, config.task.num_labels or 1) if in_groups else None,
            target_counts=[each] * (samples * group - 1) + [count - each * (samples * group - 1)],
        )

    def _documents(self) -> list[list[int]] | None:
        """Lengths of the documents of each row. Devices compute them in one call, as if the row were one."""
        count, width = self.shape.sequences // self.shape.rows, self.shape.width
        if count == 1 or self.device != "cpu":
            return None
        return [[width // count] * (count - 1) + [width - width // count * (count - 1)]] * self.shape.rows


def _give_gradients(parameters: Sequence[nn.Parameter], live: LiveBytes) -> None:
    for parameter in parameters:
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)
            live.claim([parameter.grad], "gradients")


def _watch(tuned: TunedModel, engine: NativeEngine, live: LiveBytes) -> None:
    """Let parts and phases follow what the model and the engine do."""
    trained = [p for group in engine.parameter_sets.values() for p in group.parameters.values()]
    ids = {id(parameter) for parameter in trained}
    state = [*tuned.model.parameters(), *tuned.model.buffers()]
    live.claim((tensor for tensor in state if tuned.kind == "full" or id(tensor) not in ids), "weights")
    if tuned.kind != "full":
        live.claim(trained, "adapters")
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(lambda p: live.claim([p.grad], "gradients"))
    layers: Any = decoder_layers(tuned.model)[1]
    last = len(layers) - 1
    for number, layer in enumerate(layers):
        phase = f"backward of {'the first' if number == 0 else 'the last' if number == last else 'a middle'} layer"
        layer.register_forward_hook(_mark(live, phase))
        for child in layer.children():
            child.register_forward_pre_hook(lambda *_: live.go_inside(1))
            child.register_forward_hook(lambda *_: live.go_inside(-1), always_call=True)


def _mark(live: LiveBytes, phase: str) -> Any:
    """A hook after a layer's forward pass; when the gradient of its result is known, its backward pass begins."""

    def hook(_: Any, __: Any, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        if live.phase == "forward" and tensor is not None and tensor.requires_grad:
            tensor.register_hook(live.hook(phase, "temporary"))

    return hook


def _one_token(*_: Any, **__: Any) -> dict[str, list[int]]:
    return {"input_ids": [0]}
