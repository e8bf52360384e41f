"""Which files of a repository are fetched."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from swift.hubs.types import HubFile, Kind

__all__ = ["wanted_files"]

_OTHER_FORMATS = (
    *("*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.tflite", "*.ot", "*.gguf", "*.mlmodel", "*.ckpt"),
    *("original/*", "onnx/*", "openvino/*", "coreml/*", "*.mlpackage/*", "flax_model*", "tf_model*"),
)
_OTHER_WEIGHTS = ("*.bin", "*.bin.index.json", "*.pth", "*.pt")


def wanted_files(
    files: Sequence[HubFile], kind: Kind, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> list[HubFile]:
    """The files to fetch: those that match ``include`` and not ``exclude`` (shell patterns over the whole path).

    Without ``include`` a model comes without the weights that transformers does not read here: other frameworks'
    files, and, where there are safetensors, the same weights as pickles or under a second name.
    """
    if include:
        chosen = [file for file in files if _matches(file.path, include)]
    elif kind == "model":
        chosen = _model_files(files)
    else:
        chosen = list(files)
    return [file for file in chosen if not _matches(file.path, exclude)]


def _model_files(files: Sequence[HubFile]) -> list[HubFile]:
    kept = [file for file in files if not _matches(file.path, _OTHER_FORMATS)]
    main = [file for file in kept if _matches(file.path, ("model*.safetensors", "adapter_model.safetensors"))]
    if any("/" not in file.path for file in main):
        kept = [
            file for file in kept if not _matches(file.path, (*_OTHER_WEIGHTS, "consolidated*.safetensors"))
        ]
    weights = (".safetensors", ".bin", ".pt", ".pth")
    return kept if any(file.path.endswith(weights) for file in kept) else list(files)


def _matches(path: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(path, pattern + "*" if pattern.endswith("/") else pattern) for pattern in patterns)
