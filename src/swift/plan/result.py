"""What a plan says."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["Plan"]


@dataclass
class Plan:
    """A run on paper. All parts are plain values, ready for JSON; a part that cannot be known is empty.

    ``fits``: whether memory and devices suffice; None when the model or the device is not known here.
    """

    command: str
    config: dict[str, Any]
    sources: dict[str, str]
    model: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    steps: dict[str, Any] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    parallel: dict[str, Any] = field(default_factory=dict)
    export: dict[str, Any] = field(default_factory=dict)
    time: dict[str, Any] = field(default_factory=dict)
    solution: dict[str, Any] = field(default_factory=dict)
    fits: bool | None = None
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The parts by name, in the order of the attributes."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}
