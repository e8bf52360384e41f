"""Rules of the house that ruff and import-linter do not know (docs/decisions, CONTRIBUTING.md)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src" / "swift").rglob("*.py"))
MAX_LINES = 500
REASON = "Longer than 500 lines because"
LAZY_FACES = {"src/swift/__init__.py", "src/swift/objectives/__init__.py", "src/swift/train/__init__.py"}
"""The user's face; `swift.train`, a package and a function at once; the functional face of the losses."""


def imported_names(tree: ast.AST) -> set[str]:
    """Names that stand for somebody's module or for something taken from one."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                names.add(alias.asname or alias.name.partition(".")[0])
    return names


def root_name(node: ast.expr) -> str | None:
    """``a`` for ``a.b.c``; None for anything that does not start with a name."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def patches(tree: ast.AST) -> Iterator[int]:
    """Lines that assign to, delete or ``setattr`` an attribute of something imported."""
    imported = imported_names(tree)
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign | ast.Delete):
            targets = list(node.targets)
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            name, subject = node.func.id, node.args[0] if node.args else None
            if name in ("setattr", "delattr") and subject is not None and root_name(subject) in imported:
                yield node.lineno
        for target in targets:
            for part in target.elts if isinstance(target, ast.Tuple | ast.List) else [target]:
                if isinstance(part, ast.Attribute) and root_name(part) in imported:
                    yield part.lineno


def swallowed_errors(tree: ast.AST) -> Iterator[int]:
    """Lines of ``except:``, and of handlers that do nothing at all."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            empty = all(isinstance(line, ast.Pass) for line in node.body)
            broad = node.type is None or (isinstance(node.type, ast.Name) and node.type.id in BROAD)
            if node.type is None or (broad and empty):
                yield node.lineno


BROAD = ("Exception", "BaseException")


def places(check: object, paths: list[Path]) -> list[str]:
    found = []
    for path in paths:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found += [f"{path.relative_to(ROOT)}:{line}" for line in check(tree)]  # type: ignore[operator]
    return found


@pytest.mark.parametrize(
    ("code", "lines"),
    [
        ("import torch\ntorch.nn.Linear.forward = f", [2]),
        ("import torch.nn as nn\nnn.Linear.forward = f", [2]),
        ("from peft import LoraLayer\nLoraLayer.a, x = f, 1", [2]),
        ("from peft import LoraLayer\nsetattr(LoraLayer, 'a', f)", [2]),
        ("import os\nos.environ['A'] = '1'\nmodule = f()\nmodule.forward = g\nself.torch = torch", []),
    ],
)
def test_the_patch_check_sees_patches_and_nothing_else(code: str, lines: list[int]) -> None:
    assert list(patches(ast.parse(code))) == lines


@pytest.mark.parametrize(
    ("body", "found"),
    [("except:\n  x()", True), ("except Exception:\n  pass", True), ("except OSError:\n  pass", False)],
)
def test_the_error_check_sees_swallowed_errors(body: str, found: bool) -> None:
    assert bool(list(swallowed_errors(ast.parse(f"try:\n  f()\n{body}")))) is found


def test_nobody_patches_an_imported_module() -> None:
    assert places(patches, SOURCES) == []


def test_no_error_is_swallowed() -> None:
    assert places(swallowed_errors, SOURCES) == []


def test_long_files_say_why() -> None:
    long = []
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > MAX_LINES and REASON not in (ast.get_docstring(ast.parse(text)) or ""):
            long.append(str(path.relative_to(ROOT)))
    assert long == [], f"split them, or say in the docstring: {REASON} ..."


def test_package_faces_hold_no_code() -> None:
    full = []
    for path in SOURCES:
        name = path.relative_to(ROOT).as_posix()
        if path.name == "__init__.py" and name not in LAZY_FACES:
            body = ast.parse(path.read_text(encoding="utf-8")).body
            if any(not isinstance(node, ast.Expr) for node in body):
                full.append(name)
    assert full == []


def test_every_package_stands_in_the_layer_contract() -> None:
    import tomllib

    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    packages = {f"swift.{path.parent.name}" for path in (ROOT / "src" / "swift").glob("*/__init__.py")}
    assert packages == set(layers)


def test_no_path_of_one_machine_is_in_the_repository() -> None:
    folders = ("src", "docs", "recipes", "benchmarks", "examples")
    files = [
        path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in TEXT_SUFFIXES
    ]
    files += [*ROOT.glob("*.md"), ROOT / "Makefile", ROOT / ".ci" / "run"]
    words = [f"/{folder}/" for folder in ("work", "home", "root")]
    found = []
    for path in files:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if any(f"{quote}{word}" in line for word in words for quote in (" ", '"', "'", "`", "=")):
                found.append(f"{path.relative_to(ROOT)}:{number}")
    assert found == []


def test_test_modules_have_names_of_their_own() -> None:
    """The folders are no packages: of two modules with one name the second is not collected."""
    names = [path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py"]
    assert sorted(names) == sorted(set(names))


TEXT_SUFFIXES = (".py", ".md", ".yaml", ".json", ".toml")
