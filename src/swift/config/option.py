"""How one option is declared. All a user sees of it (flag, YAML key, help, schema) comes from here."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue

__all__ = ["Section", "option"]


def option(
    default: Any, help: str, *, unit: str | None = None, essential: bool = False, **limits: Any
) -> Any:
    """One field of a section.

    Args:
        default: the value when nobody sets it. ``None`` means "derived" where ``config/rules.py`` has a rule.
        help: one plain sentence; the first words say what it is, not how it is stored.
        unit: "tokens", "steps", "seconds"... shown in help and reference.
        essential: listed by a bare ``--help``.
        limits: pydantic constraints (``ge``, ``gt``, ``le``).
    """
    extra: dict[str, JsonValue] = {"unit": unit, "essential": essential}
    if isinstance(default, list):
        return Field(
            default_factory=lambda: list(default), description=help, json_schema_extra=extra, **limits
        )
    return Field(default=default, description=help, json_schema_extra=extra, **limits)


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, assignments are validated, models build on first use."""

    model_config = ConfigDict(
        extra="forbid", validate_assignment=True, defer_build=True, protected_namespaces=()
    )
