"""Lock files: exactly what a toolchain consists of, in the order in which it is installed.

A lock is a complete list of ``name==version`` as ``pip freeze`` writes it, so every line is installed with
``--no-deps``: what was tested is what gets installed, also where a package's own metadata would not allow it. Lines
that start with ``#:`` say what pip's format cannot:

    #: python 3.11                 the Python it was made with
    #: tested yes                  no: written from public metadata, never installed by us
    #: disk 2.4                    GB it takes while it is installed
    #: set NAME=VALUE              environment variable for everything that runs in it
    #: step TITLE [OPTION ...] [NAME=VALUE ...]     the lines below are installed together, with these options of pip
                                   and variables; ``--fallback-index URL`` is tried when the index has them not
    #: alias NEW = OLD             after that, the installed OLD is also known by the distribution name NEW
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from swift.core.errors import UsageError

__all__ = ["Lock", "Step", "read_lock", "toolchain_names", "toolchain_purpose"]

FOLDER = Path(__file__).with_name("locks")
CATALOG = Path(__file__).with_name("catalog.yaml")


@cache
def _catalog() -> dict[str, str]:
    purposes: dict[str, str] = yaml.safe_load(CATALOG.read_text(encoding="utf-8"))
    return purposes


def toolchain_names() -> list[str]:
    """All toolchains there are."""
    return list(_catalog())


def toolchain_purpose(name: str) -> str:
    """What a toolchain is for, in a few words."""
    return _catalog()[name]


@dataclass(frozen=True)
class Step:
    """Packages that are installed together.

    Attributes:
        title: what they are, for messages.
        pins: ``name==version``.
        options: of pip, besides ``--no-deps``.
        variables: environment of the installation (a build reads them).
        fallback_index: address of an index that has them when the user's own has not.
    """

    title: str
    pins: tuple[str, ...]
    options: tuple[str, ...] = ()
    variables: tuple[tuple[str, str], ...] = ()
    fallback_index: str | None = None


@dataclass(frozen=True)
class Lock:
    """What a toolchain consists of on one kind of machine; attributes as in the file."""

    path: Path
    python: str
    tested: bool
    disk_bytes: int
    variables: dict[str, str]
    steps: tuple[Step, ...]
    aliases: tuple[tuple[str, str], ...]
    digest: str

    def versions(self) -> dict[str, str]:
        """Distribution (in lower case, with hyphens) -> version."""
        pins = (pin.split("==") for step in self.steps for pin in step.pins)
        return {name.lower().replace("_", "-"): version for name, version in pins}


def read_lock(name: str, variant: str, folder: Path = FOLDER) -> Lock:
    """The lock of a toolchain for ``cpu`` or ``cuda``.

    Raises UsageError when there is none. A malformed one is a ValueError: it is part of the package.
    """
    path = folder / f"{name}-{variant}.txt"
    if not path.exists():
        have = sorted(other.stem.rpartition("-")[2] for other in folder.glob(f"{name}-*.txt"))
        raise UsageError(
            f"the toolchain {name} has no variant {variant!r}",
            why=f"there is {' and '.join(have) or 'none'}",
            fix=f"--variant {have[0]}" if have else None,
        )
    return _parse(path, path.read_text(encoding="utf-8"))


def _parse(path: Path, text: str) -> Lock:
    facts: dict[str, str] = {}
    variables: dict[str, str] = {}
    aliases: list[tuple[str, str]] = []
    steps: list[tuple[list[str], list[str]]] = []
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip()
        words = line[2:].split() if line.startswith("#:") else []
        if words[:1] == ["step"]:
            steps.append((words[1:], []))
        elif words[:1] == ["set"]:
            key, _, value = words[1].partition("=")
            variables[key] = value
        elif words[:1] == ["alias"]:
            aliases.append((words[1], words[3]))
        elif words:
            facts[words[0]] = " ".join(words[1:])
        elif line and not line.startswith("#"):
            if not steps or line.count("==") != 1 or " " in line:
                raise ValueError(f"{path}:{number}: expected name==version below a step, not {line!r}")
            steps[-1][1].append(line)
    return Lock(
        path,
        facts["python"],
        facts["tested"] == "yes",
        int(float(facts["disk"]) * 1e9),
        variables,
        tuple(_step(words, pins) for words, pins in steps),
        tuple(aliases),
        hashlib.sha256(text.encode()).hexdigest()[:16],
    )


def _step(words: list[str], pins: list[str]) -> Step:
    title, *rest = words
    index = None
    if "--fallback-index" in rest:
        at = rest.index("--fallback-index")
        index = rest[at + 1]
        del rest[at : at + 2]
    variables = tuple(
        (key, value)
        for key, _, value in (word.partition("=") for word in rest if not word.startswith("-"))
        if key
    )
    return Step(title, tuple(pins), tuple(word for word in rest if word.startswith("-")), variables, index)
