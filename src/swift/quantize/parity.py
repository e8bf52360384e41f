"""The parity report: what merging or quantising has cost, measured, against limits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from swift.config.schema import Resolved
from swift.core.files import atomic_write_json
from swift.core.format import format_bytes
from swift.models.compare import LogitsDifference
from swift.models.facts import stored_tensors, weight_files
from swift.runs.cards import print_card

__all__ = ["REPORT_FILE", "Kept", "Limits", "ParityReport", "kept_tensors", "weights_size"]

REPORT_FILE = "parity.json"
_FLOATS = ("F64", "F32", "F16", "BF16")
_SHOWN = 3


@dataclass(frozen=True)
class Limits:
    """What the report is held against; None: not at all."""

    max_perplexity_increase: float | None = None
    max_kl: float | None = None
    min_agreement: float | None = None

    @classmethod
    def of(cls, resolved: Resolved, default_increase: float) -> Limits:
        options = resolved.config.export
        increase = options.max_perplexity_increase
        return cls(default_increase if increase is None else increase, options.max_kl, options.min_agreement)

    def broken(self, difference: LogitsDifference) -> list[str]:
        """A sentence for each limit that is passed. What is not a number passes every limit."""
        found = []
        increase = difference.perplexity_increase
        for value, limit, text in (
            (increase, self.max_perplexity_increase, "perplexity rose by {:.2%}, the limit is {:.2%}"),
            (difference.kl, self.max_kl, "KL divergence {:.2e}, the limit is {:.2e}"),
        ):
            if value is not None and limit is not None and not value <= limit:
                found.append(text.format(value, limit))
        if self.min_agreement is not None and not difference.same_choice >= self.min_agreement:
            found.append(
                f"same likeliest token at {difference.same_choice:.1%}, the limit is {self.min_agreement:.1%}"
            )
        if not found and not math.isfinite(difference.mean):
            found.append("logits are not finite")
        return found


@dataclass(frozen=True)
class Kept:
    """Tensors that stayed in full precision.

    Attributes:
        names: the matrices among them (norms and biases always stay).
        share: of all parameters, matrices or not.
    """

    names: list[str]
    share: float


@dataclass(frozen=True)
class ParityReport:
    """All of ``parity.json``.

    Attributes:
        method: ``merge``, ``bnb``, ``gptq``...
        settings: bits, group size and so on.
        original: folder of the model compared with.
        text: where the held-out text is from.
        difference: the comparison.
        bytes_before, bytes_after: size of the weights on disk.
        kept: None after a merge, where all did.
        loads: engine -> ``yes`` or why not, or why it was not tried.
        limits, broken: what was allowed, and what of it was passed.
        merge: the report's difference of the merge that went before.
    """

    method: str
    settings: Mapping[str, Any]
    original: str
    text: str
    difference: LogitsDifference
    bytes_before: int
    bytes_after: int
    loads: Mapping[str, str]
    limits: Limits
    broken: list[str]
    kept: Kept | None = None
    merge: Mapping[str, Any] | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return not self.broken

    def write(self, folder: Path) -> None:
        record = {
            **asdict(self),
            "difference": self.difference.to_dict(),
            "limits": asdict(self.limits),
            "passed": self.passed,
        }
        atomic_write_json(folder / REPORT_FILE, _finite(record))

    def show(self, folder: Path) -> None:
        """The report as a card on the terminal."""
        found = self.difference
        lines = [
            ("compared with", self.original),
            ("held-out text", f"{self.text}: {found.num_positions:,} tokens"),
            ("perplexity", _perplexities(found)),
            ("KL divergence", f"{found.kl:.2e} nats a token (original || result)"),
            ("same choice", f"{found.same_choice:.2%} of positions"),
            (
                "logits",
                f"differ by {found.max:.2e} at most, {found.mean:.2e} on average ({found.relative:.1e} of spread)",
            ),
            ("weights", _sizes(self.bytes_before, self.bytes_after)),
        ]
        if self.kept is not None:
            shown = ", ".join(self.kept.names[:_SHOWN])
            more = len(self.kept.names) - _SHOWN
            shown += f" and {more} more" if more > 0 else ""
            lines.append(
                ("full precision", f"{self.kept.share:.1%} of the parameters: {shown or 'no matrix'}")
            )
        lines += [("loads", f"{engine}: {result}") for engine, result in self.loads.items()]
        lines += [("FAILED", text) for text in self.broken]
        lines.append(("folder", str(folder)))
        print_card(f"parity of {self.method}" if self.passed else f"parity of {self.method}: FAILED", lines)


def _perplexities(found: LogitsDifference) -> str:
    if found.perplexity_before is None or found.perplexity_increase is None:
        return "not defined: the model gives no next token for the labels"
    change = found.perplexity_increase
    return f"{found.perplexity_before:.4f} -> {found.perplexity_after:.4f} ({change:+.2%}, {found.num_labels:,} tokens)"


def _sizes(before: int, after: int) -> str:
    ratio = f" ({before / after:.2f}x smaller)" if after and after < before else ""
    return f"{format_bytes(before)} -> {format_bytes(after)}{ratio}"


def _finite(value: Any) -> Any:
    """JSON knows no infinity and no nan: they become texts."""
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def weights_size(folder: Path) -> int:
    """Bytes of the weight files."""
    return sum(file.stat().st_size for file in weight_files(folder))


def kept_tensors(original: Path, folder: Path) -> Kept:
    """What of ``original`` stands in ``folder`` as it was: same name, same shape, floating point of 16 bits or more.

    Of an original that is not stored as safetensors, the floating-point matrices of ``folder`` called ``weight``.
    """
    before, after = stored_tensors(original), stored_tensors(folder)
    kept = {
        name: entry
        for name, entry in after.items()
        if entry["dtype"] in _FLOATS
        and (
            before[name]["shape"] == entry["shape"]
            if name in before
            else not before and name.endswith("weight")
        )
    }
    total = sum(math.prod(entry["shape"]) for entry in before.values())
    count = sum(math.prod(entry["shape"]) for entry in kept.values())
    names = sorted(name for name, entry in kept.items() if len(entry["shape"]) > 1)
    return Kept(names, count / total if total else math.nan)
