"""What a model folder says about itself without loading it: config.json and the headers of its weights.

Imports neither torch nor transformers.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swift.core.errors import ModelError
from swift.core.format import format_bytes
from swift.core.registry import closest
from swift.models.counting import count_by_config, count_tensors, decoder_sizes, routed_parameters

__all__ = [
    "ModelFacts",
    "check_model_folder",
    "read_json_object",
    "read_model_config",
    "read_safetensors_header",
    "resolve_model_path",
    "stored_tensors",
]

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "tekken.json",
    "vocab.txt",
    "spiece.model",
)
_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class ModelFacts:
    """Sizes of a decoder.

    Attributes:
        parts: parameters by part: embedding, attention, mlp, norm, head (0 when tied), other.
        num_parameters: all of them, each counted once.
        num_active_parameters: parameters one token uses; fewer than all in a mixture of experts.
        exact: counted from the weights; False: computed from config.json, which for mixtures of experts with latent
            attention (DeepSeek) is an approximation.
        weights_bytes: size of the weights on disk; None when there are none.
        dtype: as config.json names it ("bfloat16"), or None.
    """

    architecture: str
    model_type: str
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    dtype: str | None
    parts: dict[str, int]
    num_active_parameters: int
    exact: bool
    weights_bytes: int | None = None
    num_experts: int = 0
    num_experts_per_token: int = 0
    config: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def num_parameters(self) -> int:
        return sum(self.parts.values())

    @property
    def is_mixture_of_experts(self) -> bool:
        return self.num_experts > 0

    @property
    def keeps_documents_apart(self) -> bool:
        """Whether nothing in config.json speaks against several documents in one row; see the function."""
        return keeps_documents_apart(self.config)

    @classmethod
    def read(cls, folder: Path) -> ModelFacts:
        """Facts of a model folder.

        Weights that are missing or damaged only mean that numbers come from config.json (``exact`` is False): a plan
        needs no weights. `check_model_folder` is what refuses such a folder.

        Raises:
            ModelError: config.json is missing, or is not a decoder's.
        """
        raw = read_model_config(folder)
        try:
            weights = weight_files(folder)
            tensors = _tensors(weights)
        except ModelError:
            weights, tensors = [], {}
        size = sum(file.stat().st_size for file in weights) if weights else None
        return cls.from_config(raw, str(folder / "config.json"), tensors=tensors, weights_bytes=size)

    @classmethod
    def from_config(
        cls,
        raw: dict[str, Any],
        where: str,
        *,
        tensors: Mapping[str, tuple[int, ...]] | None = None,
        weights_bytes: int | None = None,
        beside: int = 0,
    ) -> ModelFacts:
        """Facts of a configuration.

        Args:
            raw: the contents of config.json.
            where: named in errors.
            tensors: name -> shape of the stored weights, for exact numbers.
            beside: parameters outside the decoder, where there are no weights to count.

        Raises:
            ModelError: the configuration is not a decoder's.
        """
        config = {**raw, **raw["text_config"]} if isinstance(raw.get("text_config"), dict) else raw
        try:
            sizes = decoder_sizes(config)
        except KeyError as error:
            raise ModelError(
                f"config.json does not say {error.args[0]}",
                where=where,
                why=f"model type {raw.get('model_type')!r} may not be a causal language model",
            ) from None
        tied = _tied(raw, config)
        parts = count_tensors(dict(tensors), tied) if tensors else count_by_config(config, sizes, tied)
        if not tensors:
            parts["other"] += beside
        active = sum(parts.values())
        if sizes["num_experts"]:
            idle = 1 - sizes["num_experts_per_token"] / sizes["num_experts"]
            active -= round(routed_parameters(config, sizes) * idle)
        architectures = raw.get("architectures") or config.get("architectures") or ["unknown"]
        return cls(
            architecture=architectures[0],
            model_type=raw.get("model_type", "unknown"),
            tie_word_embeddings=tied,
            dtype=config.get("dtype") or config.get("torch_dtype"),
            parts=parts,
            num_active_parameters=active,
            exact=bool(tensors),
            weights_bytes=weights_bytes,
            config=raw,
            **sizes,
        )


_EXACT_LAYERS = {"full_attention", "sliding_attention"}
# Parts of configuration keys of models whose layers carry a state from token to token: documents of one row would
# see each other through it.
_RECURRENT = (
    "mamba",
    "ssm",
    "linear_attn",
    "linear_attention",
    "recurrent",
    "rwkv",
    "conv_kernel",
    "conv_l_cache",
    "lru_width",
)


_OWN_ATTENTION = {"nemotron"}
"""Model types that say they take any attention function and call their own all the same."""


def keeps_documents_apart(config: Mapping[str, Any]) -> bool:
    """Whether a decoder's layers can be computed document by document, going by its configuration.

    No for soft-capped scores, chunked, bidirectional or dynamically masked attention, and recurrent layers.
    """
    if config.get("model_type") in _OWN_ATTENTION:
        return False
    if set(config.get("layer_types") or _EXACT_LAYERS) - _EXACT_LAYERS:
        return False
    refused = (
        "attn_logit_softcapping",
        "use_bidirectional_attention",
        "is_encoder_decoder",
        "attention_chunk_size",
        "keep_window_size",
    )
    if any(config.get(key) for key in refused):
        return False
    return not any(part in key.lower() for part in _RECURRENT for key in config)


def resolve_model_path(name: str) -> Path:
    """The folder a ``--model`` value means. Raises ModelError when there is none; never asks the network."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise ModelError("a model is a folder, not a file", where=name, fix=f"--model {path.parent}")
    parent = path.parent
    while not parent.is_dir():
        parent = parent.parent
    siblings = [entry.name for entry in parent.iterdir() if (entry / "config.json").is_file()]
    near = closest(path.name, siblings)
    fix = f"--model {parent / near}" if near else "give the path of a folder with config.json and weights"
    raise ModelError(
        f"no model folder {name!r}",
        where="--model",
        fix=fix,
    )


def check_model_folder(folder: Path, need_weights: bool = True, need_tokenizer: bool = True) -> None:
    """Raise ModelError for what would otherwise fail late: missing, incomplete or truncated files."""
    if not folder.is_dir():
        raise ModelError("there is no such folder", where=str(folder))
    read_model_config(folder)
    if need_tokenizer and not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise ModelError(
            "the model folder has no tokenizer",
            where=str(folder),
            fix="copy tokenizer.json and tokenizer_config.json of the model into it",
        )
    if not need_weights:
        return
    weights = weight_files(folder)
    if not weights:
        raise ModelError(
            "the model folder has no weights", where=str(folder), fix="copy model*.safetensors into it"
        )
    for file in weights:
        if file.suffix == ".safetensors":
            _check_complete(file)


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder, those of an index if there is one. Raises ModelError for missing shards."""
    for name in _WEIGHT_FILES:
        index = folder / f"{name}.index.json"
        if index.is_file():
            try:
                shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ModelError(
                    "the index of the weights is damaged", where=str(index), why=str(error)
                ) from error
            missing = [shard for shard in shards if not (folder / shard).is_file()]
            if missing:
                more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
                raise ModelError(
                    f"{len(missing)} of {len(shards)} weight files are missing",
                    where=str(folder),
                    why=", ".join(missing[:3]) + more,
                    fix="download or copy them again",
                )
            return [folder / shard for shard in shards]
        if (folder / name).is_file():
            return [folder / name]
    return []


def read_safetensors_header(file: Path) -> tuple[dict[str, Any], int]:
    """Tensor entries of a safetensors file, and the size in bytes the file must have.

    Layout: 8 bytes little-endian length of the JSON header, the header, the data.
    """
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > 100 << 20:
                raise ValueError(f"header of {length} bytes")
            header = json.loads(stream.read(length))
    except (struct.error, ValueError) as error:
        raise ModelError(
            "this is not a complete safetensors file", where=str(file), why=str(error), fix="copy it again"
        ) from error
    header.pop("__metadata__", None)
    ends = [entry["data_offsets"][1] for entry in header.values()]
    return header, 8 + length + max(ends, default=0)


def stored_tensors(folder: Path) -> dict[str, dict[str, Any]]:
    """Name -> header entry (``shape``, ``dtype``) of every tensor in the safetensors files of a folder."""
    files = [file for file in weight_files(folder) if file.suffix == ".safetensors"]
    return {name: entry for file in files for name, entry in read_safetensors_header(file)[0].items()}


def _check_complete(file: Path) -> None:
    _, expected = read_safetensors_header(file)
    actual = file.stat().st_size
    if actual < expected:
        raise ModelError(
            "the weight file is truncated",
            where=str(file),
            why=f"{format_bytes(actual)} of {format_bytes(expected)}",
            fix="download or copy it again",
        )


def read_model_config(folder: Path) -> dict[str, Any]:
    """The config.json of a model folder. Raises ModelError when there is none, or it is not JSON."""
    file = folder / "config.json"
    if not file.is_file():
        adapter = (folder / "adapter_config.json").is_file()
        raise ModelError(
            "the folder has no config.json",
            where=str(folder),
            why="it holds an adapter, not a model" if adapter else None,
            fix=f"--adapters {folder}" if adapter else "--model must name a Hugging Face model folder",
        )
    return read_json_object(file)


def read_json_object(file: Path) -> dict[str, Any]:
    """A file of a model folder. Raises ModelError when it is not a JSON object."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        fix = "download or copy it again"
        raise ModelError(
            f"{file.name} is not valid JSON", where=str(file), why=str(error), fix=fix
        ) from error
    if not isinstance(content, dict):
        raise ModelError(f"{file.name} is not a JSON object", where=str(file))
    return content


def _tied(raw: dict[str, Any], config: dict[str, Any]) -> bool:
    default = raw.get("model_type", "").startswith(("gemma", "gpt2", "cohere"))
    return bool(raw.get("tie_word_embeddings", config.get("tie_word_embeddings", default)))


def _tensors(weights: list[Path]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every stored tensor; empty when the weights are not safetensors or are quantised."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weights:
        if file.suffix != ".safetensors":
            return {}
        header, _ = read_safetensors_header(file)
        for name, entry in header.items():
            if entry["dtype"] not in ("F64", "F32", "F16", "BF16"):
                return {}  # Packed weights: shapes are not those of the matrices.
            shapes[name] = tuple(entry["shape"])
    return shapes
