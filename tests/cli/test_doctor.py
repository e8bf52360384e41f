"""The doctor's findings; its report runs once for real."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from swift.cli import doctor
from swift.core.errors import UsageError


def test_report_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    code = doctor.run(["--json"])
    report = json.loads(capsys.readouterr().out)
    assert code == (1 if report["problems"] else 0)
    assert set(report) == {
        "python", "versions", "cpu", "devices", "nvidia", "disk", "optional", "toolchains", "problems", "warnings"
    }  # fmt: skip
    assert report["versions"]["torch"] and report["cpu"]["cores"] >= 1
    assert report["optional"]["wandb"]["for"] == "--report_to wandb"


def test_other_distribution_with_our_module_name() -> None:
    owners = {"swift": ["swift-forge", "ms_swift", "swift"], "torch": ["torch"]}
    assert doctor.other_owners(lambda: owners) == ["ms_swift", "swift"]
    assert doctor.other_owners(lambda: {"swift": ["swift_forge"]}) == []


@pytest.mark.parametrize(
    ("setting", "finding"),
    [
        (None, None),
        ("2", None),
        ("2,1", None),
        ("8", "8 on 4 cores"),
        ("many", "not a number"),
        ("0", "not a number"),
    ],
)
def test_threads(setting: str | None, finding: str | None) -> None:
    warning = doctor.thread_warning(setting, 4)
    assert (finding is None and warning is None) or (warning is not None and str(finding) in warning)


def test_import_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_one.py").write_text("raise RuntimeError('operator nms does not exist')")
    (tmp_path / "endless_one.py").write_text("import time; time.sleep(600)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert doctor.import_probe("json") is None
    assert doctor.import_probe("broken_one") == "RuntimeError: operator nms does not exist"
    assert doctor.import_probe("endless_one", seconds=0.5) == "no answer after 0.5 s"


def test_a_problem_means_exit_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    report = doctor.examine()
    monkeypatch.setattr(doctor, "examine", lambda: {**report, "problems": ["torch is broken"]})
    assert doctor.run([]) == 1
    assert "problem: torch is broken" in capsys.readouterr().out


def test_unknown_option() -> None:
    with pytest.raises(UsageError, match="--jsn"):
        doctor.run(["--jsn"])


def test_importing_the_command_is_light() -> None:
    program = (
        "import sys, swift.cli.doctor; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    assert doctor._child(program, 60.0) == "[]\n"


def test_every_extra_that_is_named_brings_the_package() -> None:
    settings = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    extras = settings["project"]["optional-dependencies"]
    assert set(extras) - {"dev", "bench"} == {
        doctor.extra_of(name) for name in doctor.OPTIONAL if name not in doctor.INSTALL
    }
    for name in doctor.OPTIONAL:
        if name not in doctor.INSTALL:
            assert any(entry.startswith(name) for entry in extras[doctor.extra_of(name)]), name
