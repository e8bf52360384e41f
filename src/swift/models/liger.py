"""liger-kernel's fused Triton kernels (norms, rotary embedding, gated MLP) on one loaded model; CUDA only."""

from __future__ import annotations

from typing import Any

from swift.core.errors import ConfigError

__all__ = ["apply_liger_kernels"]


def apply_liger_kernels(model: Any, *, experts: bool = True) -> None:
    """Let ``model`` use liger's kernels. Its fused cross-entropy stays off: `objectives.logprobs` does that work.

    They are bound to norms, MLPs and experts, which read their weights when they run: a model may be divided
    afterwards. ``experts``: False where these lie on several devices and get the tokens of all of them.

    Raises:
        ConfigError: liger-kernel is not installed.
    """
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance
    except ImportError as error:
        raise ConfigError(
            "liger-kernel is not installed", where="--use_liger_kernel", fix="pip install 'swift-forge[cuda]'"
        ) from error
    _apply_liger_kernel_to_instance(model=model, fused_linear_cross_entropy=False)
    for name, module in model.named_modules():
        if not experts and name.endswith(".experts"):
            module.__dict__.pop("forward", None)
