"""Attention for packed rows: every document of a row is computed on its own, so nothing can leak.

Registered with transformers under the name ``swift_varlen`` (its public ``AttentionInterface``). A model
loaded with ``attn_implementation="swift_varlen"`` takes the lengths of the documents as a keyword argument of
its forward, ``document_lengths``; without it, rows are plain causal. Whenever transformers makes a mask
(padding on the left, a key/value cache), the call goes to its own sdpa function, so generation is what it is
with ``sdpa``.

On CPU a loop over documents is as fast as anything else (and costs the sum of squares of their lengths, not
the square of the sum); on CUDA one call of a variable-length kernel computes all of them, where torch or
flash-attn has one that works for the case.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swift.models.facts import keeps_documents_apart

__all__ = ["SHIFTED_GROUPS", "VARLEN", "register_varlen_attention", "supports_varlen", "varlen_attention"]

VARLEN = "swift_varlen"
SHIFTED_GROUPS = "swift_shifted_groups"
"""Attribute of an attention module: tokens of a group of shifted sparse attention, see `_shifted`."""


def register_varlen_attention() -> None:
    """Make ``attn_implementation="swift_varlen"`` known to transformers. Calling it again does nothing new."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(VARLEN, varlen_attention)
    AttentionMaskInterface.register(VARLEN, _varlen_mask)


def supports_varlen(config: Any) -> bool:
    """Whether ``swift_varlen`` computes exactly what the model's own attention does.

    No where `keeps_documents_apart` says no, and for architectures that do not take their attention from
    transformers' interface.
    """
    import transformers

    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    names = [*(getattr(config, "architectures", None) or []), *(getattr(text, "architectures", None) or [])]
    model = next((getattr(transformers, name, None) for name in names), None)
    if model is None or not getattr(model, "_supports_sdpa", False):
        return False
    if not getattr(model, "_supports_attention_backend", False):
        return False
    return keeps_documents_apart(vars(text))


def varlen_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    document_lengths: Sequence[Sequence[int]] | None = None,
    document_continues: Sequence[Sequence[bool]] | None = None,
    is_causal: bool | None = None,
    context: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within documents, in the form transformers calls attention functions.

    Args:
        query: [rows, heads, width, channels].
        key: [rows, key/value heads, width, channels]; more positions than the query when there is a cache.
        value: as key.
        sliding_window: a token sees itself and at most ``sliding_window - 1`` tokens before it.
        document_lengths: for each row the lengths of its documents, which fill the row.
        document_continues: for each of them whether it continues the last one that does not: its tokens see all of
            that one, and of their own document what comes before them.
        context: what computes attention over tokens that are spread over ranks (``parallel/sequence/context.py``);
            it knows the documents.

    Returns:
        [rows, width, heads, channels] and None (no attention weights).
    """
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise ValueError("swift_varlen computes neither soft-capped scores nor attention sinks")
    if context is not None:
        kwargs |= {"dropout": dropout, "sliding_window": sliding_window, "is_causal": is_causal}
        return context.attend(module, query, key, value, scaling, **kwargs), None
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    plain = attention_mask is None and query.shape[2] == key.shape[2] and kwargs.get("position_bias") is None
    if not plain or not causal:
        if document_lengths is not None:
            raise ValueError("document_lengths cannot be combined with a mask or a cache")
        from transformers import AttentionInterface

        sdpa = AttentionInterface()["sdpa"]
        return sdpa(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=causal,
            **kwargs,
        )
    attend = partial(_documents, dropout=dropout, scaling=scaling, window=sliding_window)
    size = getattr(module, SHIFTED_GROUPS, 0) if module.training else 0
    if size:
        if document_continues is not None:
            raise ValueError("shifted sparse attention cannot share the beginning of documents")
        lengths = document_lengths or [[query.shape[2]]] * query.shape[0]
        return _shifted(attend, (query, key, value), lengths, size), None
    if document_lengths is None:
        return _causal(query, key, value, dropout, scaling, sliding_window).transpose(1, 2), None
    return attend((query, key, value), document_lengths, document_continues), None


def _documents(
    parts: Sequence[Tensor],
    document_lengths: Sequence[Sequence[int]],
    document_continues: Sequence[Sequence[bool]] | None = None,
    *,
    dropout: float,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """Query, key and value of packed rows, each document on its own: [rows, width, heads, channels]."""
    kernel = _usable_kernel(parts[0], parts[2], dropout, document_continues is not None)
    if kernel is not None:
        return _call_kernel(kernel, parts, document_lengths, document_continues, scaling, window)
    query, key, value = parts
    if all(list(lengths) == [query.shape[2]] for lengths in document_lengths):  # a document fills each row
        return _causal(query, key, value, dropout, scaling, window).transpose(1, 2)
    rows = []
    for number, (lengths, *row) in enumerate(zip(document_lengths, *parts, strict=True)):
        continues = None if document_continues is None else document_continues[number]
        rows.append(_row([part[None] for part in row], list(lengths), continues, dropout, scaling, window))
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _shifted(
    attend: Callable[..., Tensor], parts: Sequence[Tensor], lengths: Sequence[Sequence[int]], size: int
) -> Tensor:
    """Shifted sparse attention (LongLoRA, arXiv 2309.12307): [rows, width, heads, channels].

    A token sees the tokens before it in its group of ``size``; for the second half of the heads the borders of the
    groups lie half a group further, so that layer by layer what a token knows spreads over the whole document. Unlike
    the paper's shift, which rolls the text round, the half groups at its start and its end stay apart.
    """
    heads = parts[0].shape[1]
    if parts[1].shape[1] % 2:  # a key/value head is shared by query heads of both halves
        parts = [parts[0], *(part.repeat_interleave(heads // part.shape[1], 1) for part in parts[1:])]
    halves = zip(*(part.tensor_split(2, 1) for part in parts), strict=True)
    outputs = [
        attend(half, _groups(lengths, size, first))
        for half, first in zip(halves, (size, size // 2), strict=True)
    ]
    return torch.cat(outputs, 2)


def _groups(lengths: Sequence[Sequence[int]], size: int, first: int) -> list[list[int]]:
    """Lengths of the groups of each row: of a document longer than ``size`` one of ``first``, then of ``size``."""
    rows = []
    for row in lengths:
        groups: list[int] = []
        for length in row:
            start = length if length <= size else first
            full, rest = divmod(length - start, size)
            groups += [start, *[size] * full, *([rest] if rest else [])]
        rows.append(groups)
    return rows


def _varlen_mask(
    *, q_length: int, kv_length: int, q_offset: Any = 0, attention_mask: Tensor | None = None, **kwargs: Any
) -> Tensor | None:
    """No mask where `varlen_attention` needs none; else the one sdpa gets."""
    if attention_mask is None and q_length == kv_length and isinstance(q_offset, int) and q_offset == 0:
        return None
    from transformers import AttentionMaskInterface

    make: Callable[..., Tensor | None] = AttentionMaskInterface()["sdpa"]
    return make(
        q_length=q_length, kv_length=kv_length, q_offset=q_offset, attention_mask=attention_mask, **kwargs
    )


def _row(
    row: Sequence[Tensor],
    lengths: list[int],
    continues: Sequence[bool] | None,
    dropout: float,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """One row (query, key, value), document by document: [1, width, heads, channels].

    Splitting (instead of slicing) keeps the backward pass linear in the width.
    """
    queries, keys, values = (part.split(lengths, 2) for part in row)
    if continues is not None:
        keys, values = _with_roots(keys, continues, 2), _with_roots(values, continues, 2)
    documents = zip(queries, keys, values, strict=True)
    outputs = [_causal(q, k, v, dropout, scaling, window).transpose(1, 2) for q, k, v in documents]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)


def _with_roots(documents: Sequence[Tensor], continues: Sequence[bool], dim: int) -> list[Tensor]:
    """Each document behind the one it continues."""
    found: list[Tensor] = []
    root: Tensor | None = None
    for document, goes_on in zip(documents, continues, strict=True):
        if goes_on and root is not None:
            found.append(torch.cat([root, document], dim))
        else:
            root = document
            found.append(document)
    return found


def _causal(
    query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float | None, window: int | None
) -> Tensor:
    """Causal attention, windowed where the document is longer than the window: [rows, heads, width, channels].

    Keys may begin before the queries: the last query is the last key's.
    """
    width, num_keys = query.shape[2], key.shape[2]
    # Measured on CPU, forward and backward: enable_gqa beats repeating the heads by 2-20 %.
    shared: dict[str, Any] = {
        "dropout_p": dropout,
        "scale": scaling,
        "enable_gqa": query.shape[1] != key.shape[1],
    }
    if width == num_keys and (window is None or width <= window):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, **shared)
    outputs = []
    before, piece = num_keys - width, window or width
    for start in range(0, width, piece):
        end = min(start + piece, width)
        first = max(0, before + start - window + 1) if window else 0
        here = torch.arange(before + start, before + end, device=query.device)[:, None]
        there = torch.arange(first, before + end, device=query.device)[None]
        mask = there <= here if window is None else (there <= here) & (there > here - window)
        part = slice(first, before + end)
        outputs.append(
            F.scaled_dot_product_attention(
                query[:, :, start:end], key[:, :, part], value[:, :, part], attn_mask=mask, **shared
            )
        )
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)


# -- CUDA ---------------------------------------------------------------------------------------------------


Kernel = Callable[..., Tensor]
"""(query, key, value, ends, longest, scale, window) -> output; tensors [tokens, heads, channels], ``ends`` and
``longest`` are pairs: of queries, of keys. The last query of a document is its last key's."""


def _usable_kernel(query: Tensor, value: Tensor, dropout: float, branches: bool) -> Kernel | None:
    """For CUDA, half precision, no dropout, equal head sizes of at most 256 channels; else None."""
    channels = query.shape[-1]
    fits = channels == value.shape[-1] and channels <= 256 and channels % 8 == 0
    if not query.is_cuda or not fits or dropout or query.dtype not in (torch.float16, torch.bfloat16):
        return None
    return _kernel(query.device.index, query.dtype, branches)


def _torch_kernel() -> Kernel | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    parameters = inspect.signature(varlen_attn).parameters
    if "window_size" not in parameters or "scale" not in parameters:
        return None
    grouped = "enable_gqa" in parameters

    def run(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        ends: tuple[Tensor, Tensor],
        longest: tuple[int, int],
        scale: float | None,
        window: tuple[int, int],
    ) -> Tensor:
        options: dict[str, Any] = {"scale": scale, "window_size": window}
        if query.shape[1] != key.shape[1]:
            if grouped:
                options["enable_gqa"] = True
            else:
                times = query.shape[1] // key.shape[1]
                key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
        output = varlen_attn(query, key, value, *ends, *longest, **options)
        assert isinstance(output, Tensor)  # A tuple only where extra outputs are asked for.
        return output

    return run


def _flash_kernel() -> Kernel | None:
    try:
        from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]
    except ImportError:
        return None

    def run(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        ends: tuple[Tensor, Tensor],
        longest: tuple[int, int],
        scale: float | None,
        window: tuple[int, int],
    ) -> Tensor:
        return flash_attn_varlen_func(
            query,
            key,
            value,
            *ends,
            *longest,
            softmax_scale=scale,
            causal=True,
            window_size=window,
        )

    return run


@lru_cache(maxsize=16)
def _kernel(device: int, dtype: torch.dtype, branches: bool) -> Kernel | None:
    """The first kernel that gives what the loop gives on a small case (grouped heads, documents, gradient)."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    lengths, continues = [[16, 20, 12]], [[False, branches, branches]] if branches else None
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cuda", enabled=False):
        sizes = ((1, 4, 48, 64), (1, 2, 48, 64), (1, 2, 48, 64))
        tensors = [torch.randn(size, generator=generator).to(f"cuda:{device}", dtype) for size in sizes]
        for kernel in (_torch_kernel(), _flash_kernel()):
            if kernel is None:
                continue
            try:
                ours = [tensor.clone().requires_grad_() for tensor in tensors]
                output = _call_kernel(kernel, ours, lengths, continues, None, None)
                gradients = torch.autograd.grad(output.float().square().sum(), ours)
            except (RuntimeError, TypeError, ValueError, NotImplementedError):
                continue  # Not built for this device: the next one, or the loop.
            theirs = [tensor.clone().requires_grad_() for tensor in tensors]
            expected = _row(theirs, lengths[0], None if continues is None else continues[0], 0.0, None, None)
            wanted = torch.autograd.grad(expected.float().square().sum(), theirs)
            pairs = zip((output, *gradients), (expected, *wanted), strict=True)
            if all(torch.allclose(one.float(), other.float(), atol=0.1, rtol=0.05) for one, other in pairs):
                return kernel
    return None


def _call_kernel(
    kernel: Kernel,
    parts: Sequence[Tensor],
    document_lengths: Sequence[Sequence[int]],
    document_continues: Sequence[Sequence[bool]] | None,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """All documents of all rows in one call: [rows, width, heads, channels]."""
    rows, heads, width, channels = parts[0].shape
    query, key, value = (part.transpose(1, 2).reshape(rows * width, -1, channels) for part in parts)
    lengths = tuple(length for row in document_lengths for length in row)
    key_lengths = lengths
    if document_continues is not None:
        continues = [goes_on for row in document_continues for goes_on in row]
        keys = _with_roots(key.split(lengths), continues, 0)
        key_lengths = tuple(len(one) for one in keys)
        key, value = torch.cat(keys), torch.cat(_with_roots(value.split(lengths), continues, 0))
    ends, longest = (
        (_ends(lengths, query.device), _ends(key_lengths, query.device)),
        (max(lengths), max(key_lengths)),
    )
    span = (-1 if window is None else window - 1, 0)
    output = kernel(query, key, value, ends, longest, scaling, span)
    return output.reshape(rows, width, heads, channels)


@lru_cache(maxsize=32)
def _ends(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Cumulative lengths, int32, starting with 0. Cached: all layers of a model ask for the same."""
    with torch.inference_mode(False):
        total = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return total.to(device, non_blocking=True)
