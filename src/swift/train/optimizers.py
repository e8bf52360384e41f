"""The optimizers: one table of what each is called, needs, keeps in memory, and how it is built.

Planning reads the table without torch; libraries are imported when an optimizer of theirs is built.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from swift.config.sections.optimizer import OptimizerSection
from swift.config.sections.training import TrainingSection
from swift.core.errors import ConfigError

if TYPE_CHECKING:
    import torch

__all__ = ["OPTIMIZERS", "build_optimizer", "check_optimizer", "is_target", "split_by_mesh", "state_bytes"]

_SPLIT = ("galore_adamw", "apollo_adamw", "muon")  # hidden matrices are treated apart from all else
Groups = list[dict[str, Any]]
Builder = Callable[[Groups, TrainingSection, OptimizerSection, "torch.device"], "torch.optim.Optimizer"]


@dataclass(frozen=True)
class OptimizerKind:
    """One optimizer.

    Attributes:
        build: parameter groups and options to optimizer.
        state_bytes: bytes it keeps of one trained number, by that number's own bytes in storage.
        module: the module it comes from, when that is an extra.
        extra: the extra that installs the module.
        update_numbers: numbers its update makes for the time being, as a multiple of the largest matrix.
        paged: its state lies in memory that the driver moves between device and host (CUDA).
    """

    build: Builder
    state_bytes: Callable[[int], float]
    module: str | None = None
    extra: str | None = None
    paged: bool = False
    update_numbers: float = 0.0


def check_optimizer(section: OptimizerSection) -> None:
    """Raise ConfigError when the package of the chosen optimizer is not installed."""
    kind = OPTIMIZERS[section.optim]
    if kind.module is not None and importlib.util.find_spec(kind.module) is None:
        raise ConfigError(
            f"needs {kind.module}, which is not installed",
            where=f"--optim {section.optim}",
            fix=f"pip install 'swift-forge[{kind.extra}]'",
        )


def build_optimizer(
    parameters: Mapping[str, torch.nn.Parameter],
    training: TrainingSection,
    section: OptimizerSection,
    device: torch.device,
    *,
    head: str | None = None,
) -> torch.optim.Optimizer:
    """The chosen optimizer over named parameters; weight decay on matrices and embeddings, not on biases and norms.

    Groups may carry ``lr_ratio``: the engine multiplies the schedule's rate by it.

    Args:
        head: name of the output head's module, which GaLore, APOLLO and Muon treat as they treat embeddings.
    """
    groups: dict[tuple[bool, bool, bool], dict[str, Any]] = {}
    for name, parameter in parameters.items():
        decays = parameter.ndim >= 2
        is_b = "lora_B" in name.split(".")
        inner = section.optim in _SPLIT and is_target(
            name, parameter.ndim, section.galore_target_modules, head
        )
        ratio = section.lorap_lr_ratio if is_b and section.lorap_lr_ratio else 1.0
        group = groups.setdefault(
            (decays, ratio != 1.0, inner),
            {"params": [], "weight_decay": training.weight_decay if decays else 0.0, "inner": inner},
        )
        group["params"].append(parameter)
        if ratio != 1.0:
            group["lr_ratio"] = ratio
    ordered = split_by_mesh([groups[key] for key in sorted(groups, reverse=True)])
    return OPTIMIZERS[section.optim].build(ordered, training, section, device)


def split_by_mesh(groups: Groups) -> Groups:
    """Groups whose parameters lie on the same ranks: one call of torch takes no others.

    ``order`` of a group says which of all parameters its own are, were they not split.
    """
    split: list[dict[str, Any]] = []
    number = 0
    for group in groups:
        parts: dict[Any, dict[str, Any]] = {}
        for parameter in group["params"]:
            part = parts.setdefault(
                getattr(parameter, "device_mesh", None), {**group, "params": [], "order": []}
            )
            part["params"].append(parameter)
            part["order"].append(number)
            number += 1
        split += parts.values()
    return split if len(split) > len(groups) else groups


def is_target(name: str, ndim: int, targets: Sequence[str], head: str | None) -> bool:
    """Whether a parameter is a hidden layer's matrix that ``targets`` (ends of module names, or all-linear) names."""
    module = name.rpartition(".")[0]
    is_outer = any(part.startswith(("embed", "wte", "wpe", "lm_head")) for part in module.split("."))
    if ndim != 2 or is_outer or (head is not None and f"{module}.".startswith(f"{head}.")):
        return False
    return any(one == "all-linear" or module == one or module.endswith(f".{one}") for one in targets)


def state_bytes(
    section: OptimizerSection, trainable: int, storage: int, matrices: Sequence[tuple[int, int]] = ()
) -> int:
    """Bytes an optimizer keeps for ``trainable`` numbers.

    Args:
        storage: bytes of a number in storage.
        matrices: ``(rows, columns)`` of the hidden layers' matrices among them, which low-rank optimizers project.
    """
    kind = OPTIMIZERS[section.optim]
    if section.optim not in _SPLIT:
        return round(trainable * kind.state_bytes(storage))
    inner = sum(rows * columns for rows, columns in matrices)
    other = (trainable - inner) * 2 * storage
    if section.optim == "muon":
        return other + inner * storage
    total = float(other)
    for rows, columns in matrices:
        short, long = sorted((rows, columns))
        rank = section.galore_rank
        if rank >= short:
            total += rows * columns * 8
            continue
        total += 8 * rank * long  # two moments in float32
        if section.optim == "galore_adamw":
            total += rank * short * (0.5 + 4 / 256 if section.galore_quantization else 4)
    return math.ceil(total)


def _adamw(
    groups: Groups, training: TrainingSection, section: OptimizerSection, device: torch.device
) -> torch.optim.Optimizer:
    import torch

    return torch.optim.AdamW(
        groups,
        lr=training.learning_rate or 0.0,
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_epsilon,
        fused=device.type in ("cpu", "cuda", "mps", "xpu"),
    )


def _bitsandbytes(name: str) -> Builder:
    def build(
        groups: Groups, training: TrainingSection, section: OptimizerSection, device: torch.device
    ) -> torch.optim.Optimizer:
        import bitsandbytes.optim

        options: dict[str, Any] = {"betas": (training.adam_beta1, training.adam_beta2)}
        if "Adam" in name:
            options["eps"] = training.adam_epsilon
        # Paged memory is CUDA's; elsewhere the same optimizer without it.
        chosen = name if device.type == "cuda" else name.removeprefix("Paged")
        optimizer = getattr(bitsandbytes.optim, chosen)
        built: torch.optim.Optimizer = optimizer(groups, lr=training.learning_rate or 0.0, **options)
        return built

    return build


def _adafactor(
    groups: Groups, training: TrainingSection, section: OptimizerSection, device: torch.device
) -> torch.optim.Optimizer:
    """With the rate of the schedule (``relative_step`` and ``scale_parameter`` off), as usual in fine-tuning."""
    from transformers.optimization import Adafactor

    built: torch.optim.Optimizer = Adafactor(
        groups, lr=training.learning_rate or 0.0, relative_step=False, scale_parameter=False
    )
    return built


def _muon(
    groups: Groups, training: TrainingSection, section: OptimizerSection, device: torch.device
) -> torch.optim.Optimizer:
    """Muon (torch's) for hidden matrices, with updates of AdamW's size (arXiv 2502.16982); AdamW for the rest."""
    import torch

    from swift.train.combined import CombinedOptimizer

    inner = [group for group in groups if group["inner"]]
    rest = [group for group in groups if not group["inner"]]
    rate = training.learning_rate or 0.0
    parts: list[torch.optim.Optimizer] = []
    if inner:
        parts.append(torch.optim.Muon(inner, lr=rate, adjust_lr_fn="match_rms_adamw"))
    if rest:
        parts.append(_adamw(rest, training, section, device))
    return CombinedOptimizer(parts)


def _low_rank(
    groups: Groups, training: TrainingSection, section: OptimizerSection, device: torch.device
) -> torch.optim.Optimizer:
    from swift.train.low_rank import LowRankAdamW

    for group in groups:
        group["rank"] = section.galore_rank if group["inner"] else 0
    return LowRankAdamW(
        groups,
        lr=training.learning_rate or 0.0,
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_epsilon,
        method="galore" if section.optim == "galore_adamw" else "apollo",
        gap=section.galore_update_proj_gap,
        scale=section.galore_scale,
        quantized=section.galore_quantization,
        cos_threshold=section.galore_cos_threshold,
        per_channel=section.apollo_scale_type == "channel",
    )


def _schedule_free(
    groups: Groups, training: TrainingSection, section: OptimizerSection, device: torch.device
) -> torch.optim.Optimizer:
    """Schedule-free AdamW (arXiv 2405.15682). It trains at one point and evaluates and stores another."""
    from schedulefree import AdamWScheduleFree

    built: torch.optim.Optimizer = AdamWScheduleFree(
        groups,
        lr=training.learning_rate or 0.0,
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_epsilon,
    )
    return built


def _two(storage: int) -> float:
    return 2 * storage


_BNB = ("bitsandbytes", "bnb")
_BLOCK = 1 + 4 / 256  # an 8-bit moment, and the float32 scale of each block of 256 (arXiv 2110.02861)

OPTIMIZERS: dict[str, OptimizerKind] = {
    "adamw": OptimizerKind(_adamw, _two),
    "adamw_8bit": OptimizerKind(_bitsandbytes("AdamW8bit"), lambda _: 2 * _BLOCK, *_BNB),
    "paged_adamw": OptimizerKind(_bitsandbytes("PagedAdamW32bit"), lambda _: 8, *_BNB, paged=True),
    "paged_adamw_8bit": OptimizerKind(
        _bitsandbytes("PagedAdamW8bit"), lambda _: 2 * _BLOCK, *_BNB, paged=True
    ),
    "lion": OptimizerKind(_bitsandbytes("Lion32bit"), lambda _: 4, *_BNB),
    "lion_8bit": OptimizerKind(_bitsandbytes("Lion8bit"), lambda _: _BLOCK, *_BNB),
    "paged_lion": OptimizerKind(_bitsandbytes("PagedLion32bit"), lambda _: 4, *_BNB, paged=True),
    "paged_lion_8bit": OptimizerKind(_bitsandbytes("PagedLion8bit"), lambda _: _BLOCK, *_BNB, paged=True),
    # A row and a column of second moments for each matrix: far below a hundredth of it.
    "adafactor": OptimizerKind(_adafactor, lambda _: 0.02),
    "muon": OptimizerKind(_muon, _two),
    "galore_adamw": OptimizerKind(_low_rank, _two),
    "apollo_adamw": OptimizerKind(_low_rank, _two),
    "schedule_free_adamw": OptimizerKind(_schedule_free, _two, "schedulefree", "optim"),
}
