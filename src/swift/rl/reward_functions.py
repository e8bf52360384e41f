"""Finding and calling reward functions. No torch: this runs in the processes of `swift.rl.reward_pool`.

A function is called with what its parameters name:

- ``completions`` (and ``prompts``): all answers at once, returns a list of numbers. With a parameter ``prompts``, or
  completions annotated as lists of dicts, it is TRL's form: prompts and completions are lists of messages. Without, it
  is ms-swift's: completions are texts.
- ``completion``: one answer as a text, returns a number.

Other parameters are columns of the rows (lists, or the value of the row), ``completion_ids``, ``response_token_ids``,
``messages`` and ``trainer_state`` (``global_step``, ``max_steps``); with ``**kwargs`` all of them are passed. A class
is made once, with the options of ``reward_args``, and its ``__call__`` is the function. It may be ``async``. None and
NaN: does not apply. An exception in the list, where a number should be: it failed for this answer.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from swift.core.errors import ConfigError, SwiftError
from swift.core.registry import closest
from swift.core.user_code import load_file
from swift.rl.builtin_rewards import BUILT_IN

__all__ = ["ENTRY_POINTS", "RewardBatch", "RewardFunction", "find_reward", "reward_source"]

_OWN_CLASS = "leave out the import: any class with __call__(self, completions, **kwargs) is a reward"
ENTRY_POINTS = "swift.rewards"
"""Group of entry points by which a package offers rewards under a name."""


@dataclass(frozen=True)
class RewardBatch:
    """Answers to be rewarded.

    Attributes:
        prompts: messages of each.
        completions: texts.
        completion_ids: tokens of each.
        columns: name -> value of each answer's row.
        step, max_steps: where the training stands.
    """

    prompts: Sequence[Any]
    completions: Sequence[str]
    completion_ids: Sequence[Sequence[int]]
    columns: Mapping[str, Sequence[Any]]
    step: int = 0
    max_steps: int = 0

    def part(self, place: int) -> RewardBatch:
        """One answer alone."""
        return RewardBatch(
            [self.prompts[place]],
            [self.completions[place]],
            [self.completion_ids[place]],
            {name: [values[place]] for name, values in self.columns.items()},
            self.step,
            self.max_steps,
        )

    def __len__(self) -> int:
        return len(self.completions)


class WrongShape(ValueError):
    """The function returned something else than one number for each answer."""


class RewardFunction:
    """A reward, ready to be called.

    Args:
        name: in messages.
        function: what the user wrote.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name, self._function = name, function
        try:
            parameters = list(inspect.signature(function).parameters.values())
        except (TypeError, ValueError) as error:
            raise ConfigError("this reward cannot be called", where=name, why=str(error)) from None
        self._takes = {
            one.name for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)
        }
        # TRL's own rewards take completions: list[list[dict[str, str]]] and no prompts.
        annotated = [str(one.annotation) for one in parameters if one.name == "completions"]
        self._reads_messages = "prompts" in self._takes or any("dict" in text for text in annotated)
        self._takes_all = any(one.kind is one.VAR_KEYWORD for one in parameters)
        self._required = [
            one.name
            for one in parameters
            if one.default is one.empty and one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)
        ]
        if not {"completions", "completion"} & self._takes:
            raise ConfigError(
                "a reward takes completions (all answers) or completion (one)",
                where=name,
                why=f"its parameters are: {', '.join(self._takes) or 'none that have a name'}",
                fix="def reward(completions, **kwargs): return [0.0 for text in completions]",
            )

    def __call__(self, batch: RewardBatch) -> list[float | str]:
        """One number for each answer, NaN where it does not apply, a text where it failed and why.

        Raises whatever the function raises, WrongShape.
        """
        if "completions" not in self._takes:
            return [self._one(batch.part(place)) for place in range(len(batch))]
        values = self._run(self._arguments(batch))
        if isinstance(values, str | bytes | Mapping) or not hasattr(values, "__len__"):
            raise WrongShape(f"returned {type(values).__name__}, not a list of {len(batch)} numbers")
        if len(values) != len(batch):
            raise WrongShape(f"returned {len(values)} rewards for {len(batch)} answers")
        return [_number(value) for value in values]

    def _one(self, batch: RewardBatch) -> float | str:
        given = {name: values[0] for name, values in self._arguments(batch, single=True).items()}
        return _number(self._run(given))

    def _arguments(self, batch: RewardBatch, *, single: bool = False) -> dict[str, Any]:
        completions: Sequence[Any] = batch.completions
        if self._reads_messages and batch.prompts and not isinstance(batch.prompts[0], str):
            completions = [[{"role": "assistant", "content": text}] for text in completions]
        state = SimpleNamespace(global_step=batch.step, max_steps=batch.max_steps)
        known: dict[str, Any] = {
            **batch.columns,
            "prompts": batch.prompts,
            "completions": completions,
            "completion_ids": batch.completion_ids,
            "response_token_ids": batch.completion_ids,
            "messages": batch.prompts,
            "trainer_state": [state] if single else state,
        }
        if single:
            known |= {"completion": batch.completions, "prompt": batch.prompts}
        if self._takes_all:
            return (
                known
                if not single
                else {k: v for k, v in known.items() if k not in ("prompts", "completions")}
            )
        missing = [name for name in self._required if name not in known]
        if missing:
            raise KeyError(
                f"the rows have no column {missing[0]!r}; they have: {', '.join(sorted(batch.columns)) or 'none'}"
            )
        return {name: value for name, value in known.items() if name in self._takes}

    def _run(self, arguments: Mapping[str, Any]) -> Any:
        value = self._function(**arguments)
        return asyncio.run(_awaited(value)) if inspect.isawaitable(value) else value


async def _awaited(value: Any) -> Any:
    return await value


def _number(value: Any) -> float | str:
    """Raises WrongShape for what is no number, ValueError for an infinite one; an exception becomes its text."""
    if value is None:
        return math.nan
    if isinstance(value, Exception):
        return f"{type(value).__name__}: {value}"
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise WrongShape(f"returned {type(value).__name__} {value!r:.60} as a reward") from None
    if math.isinf(number):
        raise ValueError("returned an infinite reward")
    return number


def reward_source(function: Callable[..., Any]) -> str:
    """``FILE.py:name`` of a function or class that stands in a file, so that another process finds it.

    Raises ConfigError for what has no such place (lambdas, functions within functions, notebooks).
    """
    named = getattr(function, "__qualname__", "")
    try:
        file = inspect.getsourcefile(function)
    except TypeError:
        file = None
    if file is None or not named.isidentifier() or not Path(file).is_file():
        raise ConfigError(
            f"the reward {named or function!r} cannot be found by another process",
            why="rewards run in processes of their own, so that one that hangs can be ended",
            fix="write it as a function or class of a .py file, and not within another function",
        )
    return f"{file}:{named}"


def find_reward(text: str, options: Mapping[str, Any]) -> RewardFunction:
    """A built-in reward, an entry point, ``FILE.py:name`` or ``package.module:name``.

    Raises ConfigError with the nearest name, or with what is wrong with its file or options.
    """
    name = text.rpartition(":")[2]
    found = BUILT_IN.get(text)
    if found is None and ".py" in text:
        found = _from_file(text)
    if found is None and (points := entry_points(group=ENTRY_POINTS, name=text)):
        found = next(iter(points)).load()
    if found is None and ":" in text:
        found = _attribute(_imported(text), name, text)
    if found is None:
        near = closest(text, BUILT_IN)
        raise ConfigError(
            f"unknown reward {text!r}",
            where="--reward_funcs",
            why=f"built in: {', '.join(BUILT_IN)}; your own: FILE.py:function or package.module:function",
            fix=f"did you mean {near}?" if near else None,
        )
    if text in BUILT_IN or inspect.isclass(found):
        found = _made(found, options, text)
    elif options:
        raise ConfigError(
            f"{text} is a function and takes no options", where="--reward_args", fix="make it a class"
        )
    return RewardFunction(text, found)


def _made(make: Callable[..., Any], options: Mapping[str, Any], text: str) -> Callable[..., Any]:
    known = inspect.signature(make).parameters
    takes_all = any(one.kind is one.VAR_KEYWORD for one in known.values())
    for option in options:
        if option not in known and not takes_all:
            near = closest(option, known)
            raise ConfigError(
                f"{text} has no option {option!r}",
                where="--reward_args",
                why=f"it has: {', '.join(known) or 'none'}",
                fix=f"did you mean {near}?" if near else None,
            )
    missing = [
        one.name
        for one in known.values()
        if one.default is one.empty
        and one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)
        and one.name not in options
    ]
    if missing:
        wanted = f'{{"{text}": {{"{missing[0]}": ...}}}}'
        raise ConfigError(
            f"{text} needs {' and '.join(missing)}", where="--reward_args", fix=f"--reward_args '{wanted}'"
        )
    try:
        made: Callable[..., Any] = make(**options)
    except TypeError as error:
        raise ConfigError("this reward cannot be made", where=text, why=str(error)) from None
    return made


def _from_file(text: str) -> Any:
    path, _, name = text.rpartition(":")
    if not path or not name:
        raise ConfigError("which function of the file?", where=text, fix=f"{text or 'FILE.py'}:NAME")
    try:
        module = load_file(path, "reward", where="--reward_funcs")
    except ConfigError as error:
        cause = error.__cause__
        if isinstance(cause, ImportError) and (cause.name or "").startswith("swift."):
            error.fix = _OWN_CLASS
        elif isinstance(cause, SwiftError):
            error.fix = cause.fix
        raise
    return _attribute(module, name, text)


def _imported(text: str) -> Any:
    try:
        return importlib.import_module(text.rpartition(":")[0])
    except ImportError as error:
        raise ConfigError("there is no such module", where=text, why=str(error)) from None


def _attribute(module: Any, name: str, text: str) -> Any:
    if not hasattr(module, name):
        near = closest(name, [one for one in vars(module) if not one.startswith("_")])
        raise ConfigError(f"there is no {name}", where=text, fix=f"did you mean {near}?" if near else None)
    return getattr(module, name)
