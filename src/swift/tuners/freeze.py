"""Full training: which of the model's own parameters are trained."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from swift.config.sections.tuner import TunerSection
from swift.core.errors import ConfigError
from swift.core.registry import closest

__all__ = ["freeze"]


def freeze(model: nn.Module, section: TunerSection) -> None:
    """Set ``requires_grad`` of every parameter.

    All are trained, except those frozen by ratio (the first parameters in the model's order, as long as
    their sum stays within that share of all parameters), by start of name, or by regular expression (found
    anywhere in the name); the ``trainable_parameters`` options win over all three.

    Raises:
        ConfigError: a name or expression matches nothing, or nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    frozen = _first_share(model, section.freeze_parameters_ratio)
    frozen |= _starting(names, section.freeze_parameters, "--freeze_parameters")
    frozen |= _matching(names, section.freeze_parameters_regex, "--freeze_parameters_regex")
    frozen -= _starting(names, section.trainable_parameters, "--trainable_parameters")
    frozen -= _matching(names, section.trainable_parameters_regex, "--trainable_parameters_regex")
    if len(frozen) == len(names):
        raise ConfigError(
            "every parameter is frozen: there is nothing to train",
            where="--freeze_parameters",
            fix="freeze less, or name what stays trainable with --trainable_parameters",
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)


def _first_share(model: nn.Module, ratio: float) -> set[str]:
    limit = int(sum(parameter.numel() for parameter in model.parameters()) * ratio)
    frozen: set[str] = set()
    count = 0
    for name, parameter in model.named_parameters():
        count += parameter.numel()
        if count > limit:
            break
        frozen.add(name)
    return frozen


def _starting(names: Sequence[str], starts: Sequence[str], flag: str) -> set[str]:
    found: set[str] = set()
    for start in starts:
        matching = [name for name in names if name.startswith(start)]
        if not matching:
            near = closest(start, _prefixes(names))
            raise ConfigError(
                f"no parameter's name starts with {start!r}",
                where=flag,
                why=f"names look like {names[0]}, {names[-1]}",
                fix=f"{flag} {near}" if near else None,
            )
        found.update(matching)
    return found


def _prefixes(names: Sequence[str]) -> list[str]:
    prefixes: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        prefixes.update(dict.fromkeys(".".join(parts[:size]) for size in range(1, len(parts) + 1)))
    return list(prefixes)


def _matching(names: Sequence[str], pattern: str | None, flag: str) -> set[str]:
    if pattern is None:
        return set()
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError("not a regular expression", where=flag, why=f"{pattern!r}: {error}") from None
    found = {name for name in names if compiled.search(name)}
    if not found:
        raise ConfigError(
            f"the expression {pattern!r} matches no parameter",
            where=flag,
            why=f"names look like {names[0]}, {names[-1]}",
        )
    return found
