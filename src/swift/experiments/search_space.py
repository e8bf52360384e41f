"""The ``sweep`` of an experiments file: which values are tried, by which method, judged by which metric."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from swift.config.read import Written
from swift.config.sections.evaluation import smaller_is_better
from swift.experiments.fields import Fields, as_number, fail

__all__ = ["EarlyStop", "Parameter", "Sweep", "candidates", "read_sweep"]

_KEYS = ("method", "parameters", "trials", "metric", "direction", "parallel", "early_stop", "seed", "base")
_EARLY_KEYS = {
    "asha": ("method", "min_steps", "reduction_factor"),
    "hyperband": ("method", "min_steps", "max_steps", "reduction_factor"),
    "median": ("method", "warmup_steps", "startup_trials"),
}
MANY_TRIALS = 10_000
"""A grid above this is a mistake."""


@dataclass(frozen=True)
class Parameter:
    """What one option may be: ``choices``, or numbers from ``low`` to ``high``.

    Attributes:
        name: the option as spelled in the file.
        choices: the values, for a list.
        log: draw on a logarithmic scale.
        step: distance of the values; None: any value.
        integer: whole numbers only.
        place: where it stands.
    """

    name: str
    choices: tuple[Any, ...] | None = None
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    step: float | None = None
    integer: bool = False
    place: str = ""

    def grid(self) -> list[Any]:
        """All values. The parameter must have choices or a step."""
        if self.choices is not None:
            return list(self.choices)
        assert self.step is not None
        count = math.floor((self.high - self.low) / self.step + 1e-9) + 1
        return [self._value(self.low + index * self.step) for index in range(count)]

    def ends(self) -> list[Any]:
        """The values between which, or of which, it chooses."""
        return list(self.choices) if self.choices is not None else [self.low, self.high]

    def draw(self, numbers: random.Random) -> Any:
        """One value at random."""
        if self.choices is not None:
            return numbers.choice(self.choices)
        if self.step is not None:
            return numbers.choice(self.grid())
        if self.log:
            value = math.exp(numbers.uniform(math.log(self.low), math.log(self.high)))
        elif self.integer:
            return numbers.randint(int(self.low), int(self.high))
        else:
            value = numbers.uniform(self.low, self.high)
        return self._value(min(max(value, self.low), self.high))

    def _value(self, number: float) -> Any:
        # Twelve digits: 0.1 + 0.2 is written 0.3, and nobody tunes the thirteenth.
        return round(number) if self.integer else float(f"{number:.12g}")


@dataclass(frozen=True)
class EarlyStop:
    """When a trial is given up: the pruner and its settings (steps are optimizer steps)."""

    method: Literal["asha", "hyperband", "median"]
    settings: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Sweep:
    """A search over options.

    Attributes:
        base: the experiment whose overrides every trial starts from; None: the defaults alone.
        parallel: trials at a time; None: as many as the devices take (TPE: one).
        minimize: whether a smaller metric is better.
    """

    method: Literal["grid", "random", "tpe"]
    parameters: tuple[Parameter, ...]
    trials: int
    metric: str
    minimize: bool
    written: Written
    parallel: int | None = None
    early_stop: EarlyStop | None = None
    seed: int = 0
    base: str | None = None

    def limit(self, max_parallel: int | None) -> int:
        """Trials at a time: ``parallel``, else the file's, else one for TPE, which learns from each."""
        return self.parallel or max_parallel or (1 if self.method == "tpe" else self.trials)

    @property
    def is_controlled(self) -> bool:
        """True when trials depend on the results of earlier ones."""
        return self.method == "tpe" or self.early_stop is not None

    def trial_name(self, number: int) -> str:
        """``trial-07``: as many digits as the number of trials has, two at least."""
        return f"trial-{number + 1:0{max(2, len(str(self.trials)))}d}"


def read_sweep(written: Written | None) -> Sweep | None:
    """The sweep, or None when there is none. Raises ConfigError with the line."""
    if written is None or written.value is None:
        return None
    fields = Fields(
        written, "sweep", _KEYS, {"algorithm": "write method: tpe", "num_trials": "write trials: 20"}
    )
    method = fields.choice("method", ("grid", "random", "tpe"), "grid")
    if "parameters" not in fields:
        raise fail("has no parameters", written, "sweep", fix="parameters: {learning_rate: [1e-4, 3e-4]}")
    space = Fields(fields.items["parameters"], "parameters")
    parameters = tuple(_parameter(name, value, method) for name, value in space.items.items())
    if not parameters:
        raise fail("has no parameters", written, "sweep", fix="parameters: {learning_rate: [1e-4, 3e-4]}")
    metric = fields.text("metric") or "eval_loss"
    better = "minimize" if smaller_is_better(metric) else "maximize"
    return Sweep(
        method=method,  # type: ignore[arg-type]
        parameters=parameters,
        trials=_trials(fields, method, parameters),
        metric=metric,
        minimize=fields.choice("direction", ("minimize", "maximize"), better) == "minimize",
        written=written,
        parallel=fields.integer("parallel", 1),
        early_stop=_early_stop(fields.get("early_stop")),
        seed=fields.integer("seed", 0) or 0,
        base=fields.text("base"),
    )


def _trials(fields: Fields, method: str, parameters: tuple[Parameter, ...]) -> int:
    given = fields.integer("trials", 1)
    if method != "grid":
        if given is None:
            raise fail(
                f"a {method} search needs a number of trials", fields.written, "sweep", fix="trials: 20"
            )
        return given
    size = math.prod(len(parameter.grid()) for parameter in parameters)
    if given is not None and given != size:
        raise fields.fail(
            f"this grid has {size} points, not {given}",
            "trials",
            fix="leave trials out, or use method: random",
        )
    if size > MANY_TRIALS:
        raise fail(
            f"the grid has {size} points", fields.written, "sweep", fix="use method: random and trials: 50"
        )
    return size


def _parameter(name: str, written: Written, method: str) -> Parameter:
    if written.entries is not None:
        # Words stay letters ("no" is not False); the option's own type decides later what a value means.
        choices = tuple(_choice(entry) for entry in written.entries)
        if not choices:
            raise fail("has no values", written, name)
        if len({json.dumps(choice, sort_keys=True) for choice in choices}) < len(choices):
            raise fail("a value stands twice", written, name)
        return Parameter(name, choices, place=written.place)
    if written.items is None:
        raise fail(
            f"{written.value!r} is neither a list nor a range",
            written,
            name,
            fix="a list [1e-4, 3e-4], or {min: 1e-5, max: 1e-3, log: true}",
        )
    fields = Fields(written, name, ("min", "max", "log", "step"))
    low, high, step, log = (
        fields.number("min"),
        fields.number("max"),
        fields.number("step"),
        fields.boolean("log", False),
    )
    if low is None or high is None:
        raise fail("a range needs min and max", written, name, fix="{min: 1e-5, max: 1e-3, log: true}")
    if not low < high:
        raise fail(f"min {low} is not below max {high}", written, name)
    if log and low <= 0:
        raise fields.fail("a logarithmic range starts above 0", "min")
    if step is not None and (log or step <= 0):
        raise fields.fail("step is a distance above 0, and does not go together with log", "step")
    if method == "grid" and step is None:
        raise fail(
            "a grid needs values", written, name, fix="give a list, or add step; or use method: random"
        )
    integer = all(isinstance(number, int) for number in (low, high, step if step is not None else 1))
    return Parameter(name, None, low, high, log, step, integer, written.place)


def _choice(entry: Written) -> Any:
    """A value as YAML understands it, except that unquoted words keep their letters."""
    number = as_number(entry.value)
    if number is not None:
        return number
    return entry.value if isinstance(entry.value, list | dict | bool | None) else entry.text


def _early_stop(written: Written | None) -> EarlyStop | None:
    if written is None:
        return None
    if isinstance(written.text, str):  # early_stop: asha
        items = {"method": written}
        written = Written({"method": written.value}, {"method": written.text}, written.place, items)
    method = Fields(written, "early_stop").choice("method", tuple(_EARLY_KEYS), "asha")
    fields = Fields(written, f"early_stop of {method}", _EARLY_KEYS[method])
    least = {"reduction_factor": 2, "startup_trials": 0, "warmup_steps": 0}
    settings = {key: fields.integer(key, least.get(key, 1)) for key in _EARLY_KEYS[method][1:]}
    if method == "hyperband" and settings["max_steps"] is None:
        raise fail(
            "hyperband needs max_steps, the steps of a whole trial",
            written,
            "early_stop",
            fix="max_steps: 100",
        )
    return EarlyStop(method, {key: value for key, value in settings.items() if value is not None})  # type: ignore[arg-type]


def candidates(sweep: Sweep) -> Iterator[dict[str, Any]]:
    """The points of a grid in order (the last parameter changes fastest), or random ones by seed, no point twice
    as long as there are others."""
    names = [parameter.name for parameter in sweep.parameters]
    if sweep.method == "grid":
        for point in itertools.product(*(parameter.grid() for parameter in sweep.parameters)):
            yield dict(zip(names, point, strict=True))
        return
    numbers = random.Random(sweep.seed)
    seen: set[str] = set()
    for _ in range(sweep.trials):
        for _attempt in range(100):
            values = {parameter.name: parameter.draw(numbers) for parameter in sweep.parameters}
            if json.dumps(values) not in seen:
                break
        seen.add(json.dumps(values))
        yield values
