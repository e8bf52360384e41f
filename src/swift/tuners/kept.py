"""What the adapter of one linear layer keeps for the backward pass beside the layer's input, by PEFT method.

Each function takes inputs, outputs, options and the bytes of a computed number (4; 2 where autocast makes copies), and
gives (bytes of a token, bytes however many tokens there are). Tensors were listed with autograd's hooks for saved
tensors, one method and precision after another (PEFT 0.21).
"""

from __future__ import annotations

from collections.abc import Callable

from swift.config.sections.tuner import TunerSection

__all__ = [
    "Kept",
    "keep_adalora",
    "keep_bone",
    "keep_butterfly",
    "keep_change",
    "keep_dora",
    "keep_frequencies",
    "keep_output",
    "keep_ranks",
    "keep_rotation",
    "keep_vera",
]

Kept = Callable[[int, int, TunerSection, int], tuple[float, float]]


def keep_ranks(inputs: int, outputs: int, tuner: TunerSection, size: int) -> tuple[float, float]:
    """The [rank] projection of each token."""
    return size * tuner.lora_rank, 0.0


def keep_dora(inputs: int, outputs: int, tuner: TunerSection, size: int) -> tuple[float, float]:
    """The projection, and the results of base and adapter; the lengths of the rows of W + B A have no gradient."""
    return size * (tuner.lora_rank + 2 * outputs), 0.0


def keep_adalora(inputs: int, outputs: int, tuner: TunerSection, size: int) -> tuple[float, float]:
    """The projection, and A times the singular values; with autocast the result and a copy of B."""
    rank, cast = tuner.adalora_init_r, outputs if size < 4 else 0
    return size * (rank + cast), size * rank * (inputs + cast)


def keep_vera(inputs: int, outputs: int, tuner: TunerSection, size: int) -> tuple[float, float]:
    """The projection, and the result before it is scaled; with autocast copies of the shared matrices."""
    rank = tuner.vera_rank
    return size * (rank + outputs), size * rank * (inputs + outputs) if size < 4 else 0.0


def keep_rotation(inputs: int, outputs: int, tuner: TunerSection, size: int) -> tuple[float, float]:
    """Powers of the blocks (Cayley's formula as a Neumann series); with autocast the rotated input."""
    return _cast_input(inputs, size), (4 if size == 4 else 7) * size * inputs * tuner.oft_block_size


def keep_butterfly(inputs: int, outputs: int, tuner: TunerSection, size: int) -> tuple[float, float]:
    """The result before it is scaled; the rotation as [inputs, inputs] matrices."""
    return size * outputs, 3 * size * inputs * inputs


def keep_output(inputs: int, outputs: int, tuner: TunerSection, size: int) -> tuple[float, float]:
    """The result before it is scaled."""
    return size * outputs, 0.0


def keep_change(inputs: int, outputs: int, tuner: TunerSection, size: int) -> tuple[float, float]:
    """The change of the weight."""
    return _cast_input(inputs, size), size * inputs * outputs


def keep_frequencies(inputs: int, outputs: int, tuner: TunerSection, size: int) -> tuple[float, float]:
    """The change of the weight, and two int64 places of each frequency."""
    return _cast_input(inputs, size), size * inputs * outputs + 16 * tuner.fourier_n_frequency


def keep_bone(inputs: int, outputs: int, tuner: TunerSection, size: int) -> tuple[float, float]:
    """The folded input, [rank] numbers; bat: the changed weight twice."""
    if tuner.init_weights == "bat":
        return 0.0, 2 * size * inputs * outputs
    return size * tuner.lora_rank, size * tuner.lora_rank * outputs if size < 4 else 0.0


def _cast_input(inputs: int, size: int) -> int:
    return size * inputs if size < 4 else 0
