"""Logits of two models on the same tokens: how far apart they are, and what each makes of the text.

The one place where two models are compared: after a merge, after quantising. Logits go by text by text, from a model
or from a folder, so that neither two models nor all logits have to be in memory at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["LogitsDifference", "Probe", "compare", "model_logits", "store_logits", "stored_logits"]

_IGNORED = -100
_ROWS_AT_ONCE = 256
"""Positions compared at a time: with a vocabulary of 150,000 that is 150 MB of float32 each."""


@dataclass(frozen=True)
class Probe:
    """One text to compare on.

    Attributes:
        ids: its tokens.
        labels: the same where a token counts for the perplexity, -100 elsewhere; the first never counts.
    """

    ids: list[int]
    labels: list[int]

    @classmethod
    def text(cls, ids: Sequence[int]) -> Probe:
        """Every token counts."""
        return cls(list(ids), list(ids))


@dataclass(frozen=True)
class LogitsDifference:
    """Logits of a changed model against those of the model it comes from.

    Attributes:
        max: largest absolute difference.
        mean: mean absolute difference.
        spread: standard deviation of the original logits, the scale to read the others by.
        kl: ``sum p log(p / q)`` of the original (p) and the changed model (q), in nats, mean over the positions.
        same_choice: share of positions at which both find the same token likeliest.
        perplexity_before, perplexity_after: of the labelled tokens; None when there are none.
        num_positions: positions compared.
        num_labels: tokens that the perplexities are means over.
    """

    max: float
    mean: float
    spread: float
    kl: float
    same_choice: float
    perplexity_before: float | None
    perplexity_after: float | None
    num_positions: int
    num_labels: int

    @property
    def relative(self) -> float:
        return self.mean / self.spread if self.spread > 0 else self.mean

    @property
    def perplexity_increase(self) -> float | None:
        """As a share: 0.01 is one percent more; below 0 the changed model is better."""
        if self.perplexity_before is None or self.perplexity_after is None:
            return None
        return self.perplexity_after / self.perplexity_before - 1

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "relative": self.relative, "perplexity_increase": self.perplexity_increase}

    def __str__(self) -> str:
        return (
            f"logits differ by {self.max:.1e} at most, {self.mean:.1e} on average "
            f"({self.relative:.1e} of their spread); same likeliest token at {self.same_choice:.1%} of positions"
        )


@torch.inference_mode()
def model_logits(model: Any, probes: Iterable[Probe]) -> Iterator[Tensor]:
    """The logits ``[tokens, vocabulary]`` of each text (of a classifier ``[1, classes]``), in the model's precision."""
    for probe in probes:
        ids = torch.tensor([probe.ids], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits
        yield logits.reshape(-1, logits.shape[-1]).cpu()


def store_logits(logits: Iterable[Tensor], folder: Path) -> None:
    """One file for each text, as they come."""
    from safetensors.torch import save_file

    for number, one in enumerate(logits):
        save_file({"logits": one.contiguous()}, folder / f"{number:06d}.safetensors")


def stored_logits(folder: Path) -> Iterator[Tensor]:
    """What `store_logits` (or a toolchain's worker) wrote, in order, one text at a time."""
    from safetensors.torch import load_file

    for file in sorted(folder.glob("*.safetensors")):
        yield load_file(file)["logits"]


def compare(
    original: Iterable[Tensor], changed: Iterable[Tensor], probes: Iterable[Probe]
) -> LogitsDifference:
    """Compare two streams of logits on ``probes``; sums are kept in float64.

    Raises:
        ValueError: the streams are not equally long, or of different shapes.
    """
    sums = _Sums()
    for before, after, probe in zip(original, changed, probes, strict=True):
        if before.shape != after.shape:
            raise ValueError(f"logits of shapes {tuple(before.shape)} and {tuple(after.shape)}")
        targets = torch.full((len(before),), _IGNORED)
        if len(before) == len(probe.labels):
            targets[:-1] = torch.tensor(probe.labels[1:], dtype=torch.long)
        for start in range(0, len(before), _ROWS_AT_ONCE):
            part = slice(start, start + _ROWS_AT_ONCE)
            sums.add(before[part].float(), after[part].float(), targets[part])
    return sums.result()


class _Sums:
    """Running sums over chunks ``[positions, vocabulary]``."""

    def __init__(self) -> None:
        self.max = self.absolute = self.total = self.squares = self.kl = self.before = self.after = 0.0
        self.values = self.positions = self.agreed = self.labels = 0

    def add(self, before: Tensor, after: Tensor, targets: Tensor) -> None:
        difference = (after - before).abs()
        largest = difference.max().item()
        self.max = largest if math.isnan(largest) else max(self.max, largest)
        self.absolute += difference.sum(dtype=torch.float64).item()
        self.total += before.sum(dtype=torch.float64).item()
        self.squares += before.double().square().sum().item()
        self.values += before.numel()
        self.positions += len(before)
        self.agreed += int((before.argmax(-1) == after.argmax(-1)).sum())
        p, q = before.log_softmax(-1), after.log_softmax(-1)
        self.kl += F.kl_div(q, p, reduction="none", log_target=True).sum(dtype=torch.float64).item()
        labelled = targets != _IGNORED
        self.labels += int(labelled.sum())
        self.before += F.nll_loss(p, targets, reduction="sum").item()
        self.after += F.nll_loss(q, targets, reduction="sum").item()

    def result(self) -> LogitsDifference:
        mean = self.total / self.values
        return LogitsDifference(
            max=self.max,
            mean=self.absolute / self.values,
            spread=math.sqrt(max(self.squares / self.values - mean**2, 0.0)),
            kl=max(self.kl / self.positions, 0.0) if not math.isnan(self.kl) else math.nan,
            same_choice=self.agreed / self.positions,
            perplexity_before=_perplexity(self.before, self.labels),
            perplexity_after=_perplexity(self.after, self.labels),
            num_positions=self.positions,
            num_labels=self.labels,
        )


def _perplexity(loss: float, count: int) -> float | None:
    return math.exp(min(loss / count, 700.0)) if count else None
