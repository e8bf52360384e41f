"""Where A and B start: from weight (PiSSA, OLoRA), rounding error (LoftQ), gradient (LoRA-GA) or inputs (EVA)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from swift.config.sections.tuner import TunerSection
from swift.core.errors import ConfigError
from swift.models.quantised import dequantised
from swift.tuners.lora import LoraLinear, lora_layers

__all__ = [
    "keeps_start",
    "needs_data",
    "start_from_gradients",
    "start_from_inputs",
    "start_from_rounding",
    "start_from_weights",
]


def needs_data(init: str) -> bool:
    """The start is computed from samples of the training data."""
    return init in ("eva", "lora-ga")


def keeps_start(init: str) -> bool:
    """A and B start at an update that is not zero, and that has to be taken away again."""
    return init.startswith("pissa") or init in ("olora", "lora-ga")


@torch.no_grad()
def start_from_weights(model: nn.Module, name: str, init: str, seed_of: Callable[[str], int]) -> None:
    """PiSSA (arXiv 2404.02948) or OLoRA (arXiv 2406.01775) for every layer of adapter ``name``.

    With W = U S V^T (PiSSA) B A scaling is the part of W of the largest ``rank`` singular values, split evenly;
    ``pissa_niter_N`` finds it by N rounds of a randomised method. OLoRA takes W = Q R: B is the first columns of Q
    and A the first rows of R.
    """
    for key, layer in lora_layers(model).items():
        if name not in layer.specs:
            continue
        spec = layer.specs[name]
        weight = _weight(layer)
        _check_rank(key, spec.rank, weight, init)
        if init == "olora":
            q, r = torch.linalg.qr(weight)
            layer.set_start(name, r[: spec.rank], q[:, : spec.rank])
            continue
        if init == "pissa":
            u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        else:
            with torch.random.fork_rng():
                torch.manual_seed(seed_of(key))
                u, s, v = torch.svd_lowrank(weight, q=spec.rank, niter=int(init.rpartition("_")[2]))
            vh = v.t()
        root = (s[: spec.rank] / spec.scaling).sqrt()
        layer.set_start(name, root[:, None] * vh[: spec.rank], u[:, : spec.rank] * root)


@torch.no_grad()
def start_from_gradients(
    model: nn.Module,
    name: str,
    gradients: Mapping[str, Tensor],
    section: TunerSection,
    seed_of: Callable[[str], int],
) -> None:
    """LoRA-GA (arXiv 2407.05000): the first step of LoRA resembles that of full training.

    With the gradient G = U S V^T ``[out, in]``, ``ArB2r`` gives A the first ``rank`` right singular vectors and B the
    next left ones (``A2rBr`` the other way round, ``ArBr`` alternating ones, ``random`` any). Scales of both:
    ``stable`` out^(1/4) / sqrt(gamma), ``gd`` 1 / scaling, ``unit`` 1, ``weightS`` the square root of the mean of
    the weight's largest singular values over the scaling.
    """
    for key, gradient in gradients.items():
        layer = model.get_submodule(key)
        assert isinstance(layer, LoraLinear)
        spec, weight = layer.specs[name], _weight(layer)
        _check_rank(key, 2 * spec.rank, weight, "lora-ga")
        with torch.random.fork_rng():
            torch.manual_seed(seed_of(key))
            u, _, v = torch.svd_lowrank(gradient, q=min(4 * spec.rank, *gradient.shape), niter=4)
            first, second = _directions(section.lora_ga_direction, spec.rank)
            scale = _scale(section, weight, spec.rank, spec.scaling)
        layer.set_start(name, v.t()[first] * scale, u[:, second] * scale)


def _directions(direction: str, rank: int) -> tuple[Tensor, Tensor]:
    """Which singular vectors A gets, and which B."""
    both = torch.arange(2 * rank)
    if direction == "ArBr":
        return both[1::2], both[::2]
    if direction == "A2rBr":
        return both[rank:], both[:rank]
    if direction == "ArB2r":
        return both[:rank], both[rank:]
    chosen = torch.randperm(2 * rank)[:rank]
    return chosen, chosen


def _scale(section: TunerSection, weight: Tensor, rank: int, scaling: float) -> float:
    if section.lora_ga_scale == "stable":
        return float(weight.shape[0] ** 0.25 / section.lora_ga_stable_gamma**0.5)
    if section.lora_ga_scale == "gd":
        return 1 / scaling
    if section.lora_ga_scale == "unit":
        return 1.0
    _, values, _ = torch.svd_lowrank(weight, q=rank, niter=4)
    return float((values.mean() / scaling).sqrt())


@torch.no_grad()
def start_from_inputs(model: nn.Module, name: str, inputs: Mapping[str, Tensor]) -> None:
    """EVA (arXiv 2410.07170) without its redistribution of ranks: A spans what the layer's inputs vary in most.

    ``inputs``: layer -> rows ``[tokens, in]``. A gets their right singular vectors, B stays zero.
    """
    for key, rows in inputs.items():
        layer = model.get_submodule(key)
        assert isinstance(layer, LoraLinear)
        rank = layer.specs[name].rank
        _check_rank(key, rank, rows, "eva")
        _, _, vh = torch.linalg.svd(rows, full_matrices=False)
        layer.lora_A[name].copy_(vh[:rank])


@torch.no_grad()
def start_from_rounding(model: nn.Module, name: str, stored: Callable[[nn.Module, str], Tensor]) -> None:
    """LoftQ (arXiv 2310.08659), one round: B A scaling is what rank ``rank`` can hold of the rounding error W - Q.

    Further rounds would quantise W - B A instead of W: a base of this adapter's own, which no adapter folder holds.

    Args:
        stored: a quantised layer and its name -> the matrix W ``[out, in]`` before it was rounded to Q.
    """
    for key, layer in lora_layers(model).items():
        if name not in layer.specs or not layer.is_quantised:
            continue
        spec, rounded = layer.specs[name], dequantised(layer.base)
        error = stored(layer.base, key).to(rounded) - rounded
        _check_rank(key, spec.rank, error, "loftq")
        u, s, vh = torch.linalg.svd(error, full_matrices=False)
        root = (s[: spec.rank] / spec.scaling).sqrt()
        layer.lora_A[name].copy_(root[:, None] * vh[: spec.rank])
        layer.lora_B[name].copy_(u[:, : spec.rank] * root)


def _weight(layer: LoraLinear) -> Tensor:
    if layer.is_quantised:
        return dequantised(layer.base)
    weight = layer.weight.detach().float()
    return weight.t() if layer.is_transposed else weight


def _check_rank(key: str, rank: int, matrix: Tensor, init: str) -> None:
    if rank > min(matrix.shape):
        raise ConfigError(
            f"{init} needs {rank} singular vectors, {key} has {min(matrix.shape)}",
            where="--init_weights",
            why=f"its matrix is {' x '.join(str(size) for size in matrix.shape)}",
            fix=f"--lora_rank {max(1, min(matrix.shape) // 2)}",
        )
