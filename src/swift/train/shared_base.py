"""A base model that several LoRA runs share."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from swift.config.fusing import fusing_problem, model_options
from swift.core.errors import ConfigError
from swift.models.facts import ModelFacts
from swift.train.prepare import Prepared
from swift.tuners.apply import remove_adapter, tuned_model
from swift.tuners.switch import AdapterSwitch

__all__ = ["SharedBase"]


@dataclass(frozen=True)
class _Key:
    """What two runs on one model must have in common."""

    folder: str
    device: str
    dtype: str
    options: str

    @classmethod
    def of(cls, prepared: Prepared) -> _Key:
        options = model_options(prepared.resolved.config)
        return cls(
            str(prepared.model_path.resolve()),
            str(prepared.device),
            str(prepared.dtype),
            json.dumps(options, sort_keys=True),
        )

    def difference(self, other: _Key) -> str | None:
        """What differs, in words."""
        for name in ("folder", "device", "dtype"):
            first, second = getattr(self, name), getattr(other, name)
            if first != second:
                return f"{name} is {second}, not {first}"
        ours, theirs = json.loads(self.options), json.loads(other.options)
        return next(
            (f"{name} is {theirs[name]}, not {ours[name]}" for name in ours if ours[name] != theirs[name]),
            None,
        )


class SharedBase:
    """The model of a group of runs, loaded by the first of them.

    Attributes:
        model: None until then.
        division: how it is divided among processes, for `swift.train.assemble.make_engine`.
    """

    def __init__(self) -> None:
        self.model: Any = None
        self.division: dict[str, Any] = {}
        self._key: _Key | None = None
        self._numbers = itertools.count(1)

    def new_name(self) -> str:
        """A name for the adapter of the next member; names are not used again."""
        return f"member{next(self._numbers)}"

    def remove(self, adapter: str) -> None:
        """Take a member's adapter off the model, if it is there."""
        if self.model is not None and adapter in tuned_model(self.model).adapter_names:
            remove_adapter(self.model, adapter)

    @property
    def switch(self) -> AdapterSwitch:
        """Which adapter acts; there is one as soon as a member has attached its adapter."""
        switch = tuned_model(self.model).switch
        assert switch is not None
        return switch

    def weights(self, prepared: Prepared, load: Callable[[Prepared], Any]) -> Any:
        """The model, as ``load`` gives it to the first member.

        Raises:
            ConfigError: this run cannot share a model, or not this one.
        """
        problem = fusing_problem(prepared.resolved.config)
        if problem is not None:
            raise ConfigError(
                "this run cannot be fused with others",
                where=problem[0],
                why=problem[1],
                fix="run it alone: --fuse never",
            )
        key = _Key.of(prepared)
        if self._key is None:
            _refuse_own_dropout(prepared)
            self.model, self._key = load(prepared), key
        difference = self._key.difference(key)
        if difference is not None:
            raise ConfigError(
                "this run cannot share the base model of the others",
                where=str(prepared.model_path),
                why=difference,
                fix="fuse runs that differ in data, adapter and optimization only",
            )
        return self.model


def _refuse_own_dropout(prepared: Prepared) -> None:
    """Dropout of the base itself would depend on who else is in the group."""
    facts = ModelFacts.read(prepared.model_path).config
    for name, value in facts.items():
        if (
            "dropout" in name
            and isinstance(value, int | float)
            and value > 0
            and name != "classifier_dropout"
        ):
            raise ConfigError(
                "this model cannot be shared by several runs",
                where=str(prepared.model_path / "config.json"),
                why=f"{name} is {value}: what it drops would depend on who else is in the group",
                fix=f"set {name} to 0 in a copy of the model, or run alone: --fuse never",
            )
