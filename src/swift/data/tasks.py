"""Small tasks made on the spot, each with a way to score an answer: for demonstrations, tests and first experiments.

``task:reverse#500`` is a data set of 500 rows wherever a file could stand; options follow the name:
``task:reverse:length=5/seed=1#200``. Rows are a pure function of name, options and number. Each has ``messages`` with
the right answer, and the columns ``task``, ``answer`` and what the scorer needs; `score` is the reward ``task``.
"""

from __future__ import annotations

import ast
import json
import operator
import random
import re
import string
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from swift.core.errors import DataError
from swift.core.files import atomic_write_text
from swift.core.home import swift_home
from swift.core.registry import closest

__all__ = ["TASKS", "Task", "score", "task_file", "task_rows"]

_DEFAULT_ROWS = 1000
_VERSION = 1
"""Raised when the same name gives other rows than before."""


class Question(NamedTuple):
    """What is asked, the right answer, and further columns for the scorer."""

    text: str
    answer: str
    extra: Mapping[str, Any] = MappingProxyType({})


class Task(NamedTuple):
    """One task.

    Attributes:
        make: (generator, size) -> question; larger sizes are harder.
        size: the usual one.
        score: (answer, row) -> reward from 0 to 1.
    """

    make: Callable[[random.Random, int], Question]
    size: int
    score: Callable[[str, dict[str, Any]], float]


def _same_places(answer: str, row: dict[str, Any]) -> float:
    """Share of places with the right character; what is too much or missing counts as wrong."""
    wanted, given = str(row["answer"]), answer.strip()
    same = sum(one == other for one, other in zip(given, wanted, strict=False))
    return same / max(len(wanted), len(given))


def _last_word(answer: str, row: dict[str, Any]) -> float:
    """The answer's last word or number is the right one."""
    words = re.findall(r"-?\w+", answer)
    return float(bool(words) and words[-1].lower() == str(row["answer"]).lower())


def _digits(generator: random.Random, size: int) -> str:
    return "".join(generator.choices(string.digits, k=size))


def _reverse(generator: random.Random, size: int) -> Question:
    text = _digits(generator, size)
    return Question(f"Reverse {text}", text[::-1])


def _sort(generator: random.Random, size: int) -> Question:
    text = _digits(generator, size)
    return Question(f"Sort {text}", "".join(sorted(text)))


def _arithmetic(generator: random.Random, size: int) -> Question:
    first, second = (generator.randrange(10**size) for _ in range(2))
    sign = generator.choice("+-*" if size < 3 else "+-")
    value = {"+": operator.add, "-": operator.sub, "*": operator.mul}[sign](first, second)
    return Question(f"{first} {sign} {second} =", str(value))


def _base_conversion(generator: random.Random, size: int) -> Question:
    number, base = generator.randrange(2**size), generator.choice((2, 8, 16))
    written = format(number, {2: "b", 8: "o", 16: "x"}[base])
    return Question(f"Write {number} in base {base}.", written)


def _letter_counting(generator: random.Random, size: int) -> Question:
    word = "".join(generator.choices(string.ascii_lowercase[:6], k=size))
    letter = generator.choice(word)
    return Question(f"How many {letter} are in {word}?", str(word.count(letter)))


def _countdown(generator: random.Random, size: int) -> Question:
    """Numbers and a value they make when each is used once."""
    numbers = [generator.randint(1, 20) for _ in range(size)]
    text, value = str(numbers[0]), numbers[0]
    for number in numbers[1:]:
        sign = generator.choice("+-")
        text, value = f"{text} {sign} {number}", value + (number if sign == "+" else -number)
    shuffled = generator.sample(numbers, len(numbers))
    asked = f"Make {value} of {', '.join(map(str, shuffled))} with + - * /, each number once."
    return Question(asked, text, {"numbers": shuffled, "target": value})


_SIGNS: dict[type, Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def _value(node: ast.AST, used: list[int]) -> float:
    """The value of an expression of whole numbers and + - * /. Raises ValueError for anything else."""
    if isinstance(node, ast.Expression):
        return _value(node.body, used)
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used.append(node.value)
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _SIGNS:
        return _SIGNS[type(node.op)](_value(node.left, used), _value(node.right, used))
    raise ValueError("not an expression of numbers")


def _makes_target(answer: str, row: dict[str, Any]) -> float:
    """1 when the answer (up to an equals sign) has the value and uses each number once; 0.1 for a valid expression."""
    used: list[int] = []
    text = answer.strip().partition("=")[0]
    if len(text) > 200:
        return 0.0
    try:
        value = _value(ast.parse(text.strip(), mode="eval"), used)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError, OverflowError):
        return 0.0
    return 1.0 if sorted(used) == sorted(row["numbers"]) and abs(value - row["target"]) < 1e-6 else 0.1


TASKS: dict[str, Task] = {
    "reverse": Task(_reverse, 5, _same_places),
    "sort": Task(_sort, 5, _same_places),
    "arithmetic": Task(_arithmetic, 2, _last_word),
    "countdown": Task(_countdown, 3, _makes_target),
    "base_conversion": Task(_base_conversion, 6, _last_word),
    "letter_counting": Task(_letter_counting, 6, _last_word),
}


def score(answer: str, row: dict[str, Any]) -> float:
    """The reward ``task``: how right an answer to a row of these tasks is, 0 to 1."""
    return TASKS[row["task"]].score(answer, row)


def task_rows(name: str, count: int, *, size: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of one task; the first ones of a longer list are those of a shorter one."""
    generator = random.Random(f"{_VERSION}/{name}/{size}/{seed}")
    rows = []
    for _ in range(count):
        question = TASKS[name].make(generator, size)
        messages = [
            {"role": "user", "content": question.text},
            {"role": "assistant", "content": question.answer},
        ]
        rows.append({"messages": messages, "task": name, "answer": question.answer, **question.extra})
    return rows


def task_file(text: str) -> Path:
    """The file of ``task:NAME[:size=N/seed=N][#ROWS]`` in the user's folder; made where it is not there.

    Raises DataError for unknown tasks and options.
    """
    found = re.fullmatch(r"task:(\w+)(?::([\w=/]+))?(?:#(\d+))?", text)
    name = found[1] if found else text.removeprefix("task:").partition(":")[0].partition("#")[0]
    if found is None or name not in TASKS:
        near = closest(name, TASKS)
        raise DataError(
            "there is no such task",
            where=text,
            why=f"known: {', '.join(TASKS)}; written task:NAME:size=N/seed=N#ROWS",
            fix=f"task:{near}#500" if near else "task:reverse#500",
        )
    options = {"size": TASKS[name].size, "seed": 0}
    for part in (found[2] or "").split("/"):
        key, _, value = part.partition("=")
        key = {"length": "size", "digits": "size"}.get(key, key)
        if part and (key not in options or not value.isdecimal()):
            raise DataError(f"{part!r} is no option of a task", where=text, fix="size=N or seed=N")
        if part:
            options[key] = int(value)
    count = int(found[3] or _DEFAULT_ROWS)
    if count == 0 or options["size"] == 0:
        raise DataError("nothing asked for", where=text, fix=f"task:{name}#500")
    path = swift_home() / "tasks" / f"{name}-{options['size']}-{options['seed']}-{count}-v{_VERSION}.jsonl"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = task_rows(name, count, **options)
        atomic_write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return path
