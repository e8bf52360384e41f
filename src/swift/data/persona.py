"""Data sets by the names in the options, with the placeholders in their texts filled.

Self-cognition rows say who the model is: ``{{NAME}}`` and ``{{AUTHOR}}`` in them stand for ``model_name`` and
``model_author``, the first value in Chinese rows, the second (or the only one) in the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from swift.config.sections.data import DataSection
from swift.core.errors import ConfigError
from swift.data.sources import DatasetSpec, parse_dataset_spec

__all__ = ["dataset_specs"]

_OPTIONS = {"NAME": "model_name", "AUTHOR": "model_author"}


def dataset_specs(section: DataSection, texts: Sequence[str]) -> list[DatasetSpec]:
    """What the names stand for. Raises ConfigError when a placeholder has no value."""
    return [_filled(parse_dataset_spec(text), section) for text in texts]


def _filled(spec: DatasetSpec, section: DataSection) -> DatasetSpec:
    if spec.entry is None or not spec.entry.fill:
        return spec
    fill: dict[str, tuple[str, str]] = {}
    for placeholder in spec.entry.fill:
        option = _OPTIONS[placeholder]
        values: list[str] = getattr(section, option)
        if not 1 <= len(values) <= 2:
            raise ConfigError(
                f"{spec.entry.name} asks who the model is"
                if not values
                else f"{len(values)} values are too many",
                where=f"--{option}",
                why=f"{{{{{placeholder}}}}} in its rows stands for it: one text, or a Chinese and an English one",
                fix="--model_name 小黄 'Xiao Huang' --model_author 魔搭 ModelScope",
            )
        fill[placeholder] = (values[0], values[-1])
    return replace(spec, mapping=replace(spec.mapping, fill=fill))
