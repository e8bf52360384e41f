"""Installing: what is there afterwards, and what is there when it goes wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.experiments.supervised import wait_for
from tests.toolchains.fakes import Place, exists, make_wheel

from swift.core.errors import UsageError
from swift.toolchains.check import examine_toolchain, list_toolchains
from swift.toolchains.install import _only_one as only_one
from swift.toolchains.install import install, installed_versions, remove
from swift.toolchains.toolchain import ToolchainError, find_toolchain


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("SWIFT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path / "bin"), os.environ["PATH"]]))
    return Place(tmp_path)


def test_an_installed_toolchain_is_tested_recorded_and_found(place: Place, monkeypatch) -> None:
    # Settings that would break, or be broken by, another environment.
    monkeypatch.setenv("PIP_TARGET", str(place.root / "elsewhere"))
    monkeypatch.setenv("PIP_REQUIRE_VIRTUALENV", "1")
    monkeypatch.setenv("PIP_CONSTRAINT", str(place.root / "missing.txt"))
    before = installed_versions(Path(sys.prefix))
    with pytest.raises(ToolchainError, match="swift toolchain install lm-eval"):
        find_toolchain("lm-eval")

    made = install(place.wanted(installer="pip"))

    found = find_toolchain("lm_eval")
    assert found == made
    assert found.versions == {"fakelib": "1.0"} == installed_versions(found.environment)
    assert found.record["smoke"]["result"] == {"doubled": 42}
    assert (found.record["variant"], found.record["installer"]) == ("cpu", "pip")
    assert not (place.root / "elsewhere").exists()
    assert installed_versions(Path(sys.prefix)) == before
    assert "fakelib-1.0" in (place.folder / "install.log").read_text()
    row = next(row for row in list_toolchains() if row["name"] == "lm-eval")
    assert (row["variant"], row["problem"]) == ("cpu", None)

    place.lines.clear()
    assert install(place.wanted(installer="pip")) == found
    assert place.lines == [f"lm-eval is installed in {found.environment}"]


def test_a_missing_wheel_is_named_and_the_same_command_goes_on(place: Place) -> None:
    place.write_lock("fakelib==1.0\n#: step more\nmissing==3.0")
    with pytest.raises(
        ToolchainError, match=r"installing more failed[\s\S]*missing==3\.0[\s\S]*pip download"
    ):
        install(place.wanted())
    with pytest.raises(ToolchainError, match="not installed"):
        find_toolchain("lm-eval")
    (kept,) = place.environments()

    make_wheel(place.wheels, "missing", "3.0", "")
    place.lines.clear()
    assert install(place.wanted(installer="pip")).versions == {"fakelib": "1.0", "missing": "3.0"}
    assert place.environments() == [kept]
    assert "going on with an interrupted installation" in place.lines


def test_a_failed_smoke_test_leaves_what_was_there_in_force(place: Place) -> None:
    first = install(place.wanted())
    make_wheel(place.wheels, "fakelib", "2.0", "def double(x):\n    return 3 * x\n")
    place.write_lock("fakelib==2.0")
    place.write_smoke(
        "import fakelib\ndef main(payload):\n    assert fakelib.double(1) == 2, 'twice 1 is 2'\n"
    )
    with pytest.raises(ToolchainError, match="smoke test failed: AssertionError: twice 1 is 2"):
        install(place.wanted())
    assert find_toolchain("lm-eval") == first
    assert first.python.exists()

    place.write_smoke("import fakelib\ndef main(payload):\n    return {'tripled': fakelib.double(1)}\n")
    second = install(place.wanted())
    assert second.versions == {"fakelib": "2.0"}
    assert place.environments() == [second.environment.name], "the old one and no other is deleted"


def test_a_killed_installation_leaves_nothing_running_and_is_taken_up(place: Place) -> None:
    pid_file = place.root / "pid"
    place.write_smoke(
        "import os, pathlib, time\ndef main(payload):\n"
        f"    pathlib.Path({str(pid_file)!r}).write_text(str(os.getpid()) + chr(10))\n    time.sleep(600)\n"
    )
    program = (
        "import sys; from pathlib import Path; from tests.toolchains.fakes import Place;"
        "from swift.toolchains.install import install; install(Place(Path(sys.argv[1])).wanted())"
    )
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    installer = subprocess.Popen(
        [sys.executable, "-c", program, str(place.root)], env={**os.environ, "PYTHONPATH": path}
    )
    try:
        wait_for(lambda: pid_file.exists() and pid_file.read_text().endswith("\n"))
    finally:
        installer.send_signal(signal.SIGKILL)
        installer.wait()
    smoke = int(pid_file.read_text())
    wait_for(lambda: not exists(smoke))
    with pytest.raises(ToolchainError, match="not installed"):
        find_toolchain("lm-eval")

    # As if pip had been killed too: the files of a package are there, the last one is not.
    (environment,) = place.folder.glob("env-*")
    (info,) = environment.glob("lib/python*/site-packages/fakelib-1.0.dist-info")
    (info / "RECORD").unlink()
    (info.parent / "fakelib.py").write_text("half")
    place.write_smoke("import fakelib\ndef main(payload):\n    return {'doubled': fakelib.double(1)}\n")
    assert install(place.wanted()).record["smoke"]["result"] == {"doubled": 2}


def test_too_small_a_disk_is_refused_before_anything_is_made(place: Place) -> None:
    with pytest.raises(ToolchainError, match=r"not enough disk[\s\S]*SWIFT_HOME"):
        install(place.wanted(free=lambda path: 1000))
    assert place.environments() == []


def test_two_installations_at_once_do_not_meet(place: Place) -> None:
    place.folder.mkdir(parents=True)
    with (
        only_one(place.folder, "lm-eval"),
        pytest.raises(ToolchainError, match=f"is being installed or removed by process {os.getpid()}"),
    ):
        install(place.wanted())


def test_a_step_has_a_deadline_and_a_name(place: Place) -> None:
    place.folder.mkdir(parents=True)
    with pytest.raises(ToolchainError, match=r"making the environment took longer than 0\.01 s"):
        install(place.wanted(stage_seconds=0.01))


def test_options_of_pip_reach_it_and_are_remembered(place: Place) -> None:
    made = install(place.wanted(arguments=("--strict",)))
    assert made.record["arguments"] == ["--strict"]
    place.write_lock("missing==1")
    with pytest.raises(ToolchainError, match="no wheel for missing==1"):
        install(place.wanted(arguments=("--strict",)))
    assert find_toolchain("lm-eval") == made


def test_what_the_index_has_not_is_looked_for_in_the_fallback(place: Place) -> None:
    place.write_lock("fakelib==1.0")
    with pytest.raises(ToolchainError, match="the index is empty"):
        install(place.wanted(wheels=None))
    place.write_lock("fakelib==1.0", step=f"all --fallback-index {place.wheels}")
    assert install(place.wanted(wheels=None)).versions == {"fakelib": "1.0"}
    assert f"  not in the index in use; trying {place.wheels}" in place.lines


def test_variables_and_aliases_of_the_lock(place: Place) -> None:
    place.write_lock("fakelib==1.0", head="#: set FROM_LOCK=yes\n#: alias realname = fakelib\n")
    place.write_smoke(
        "import os\nfrom importlib.metadata import version\ndef main(payload):\n"
        "    return {'version': version('realname'), 'set': os.environ['FROM_LOCK']}\n"
    )
    assert install(place.wanted()).record["smoke"]["result"] == {"version": "1.0", "set": "yes"}


def test_removal_waits_for_nobody_and_takes_nothing_in_use(place: Place) -> None:
    toolchain = install(place.wanted())
    child = toolchain.spawn(["-c", "import time; time.sleep(600)"], log=place.root / "server.log")
    with child, pytest.raises(ToolchainError, match="in use"):
        remove("lm-eval")
    assert remove("lm-eval") > 100
    assert not place.folder.exists()
    with pytest.raises(ToolchainError, match="not installed"):
        remove("lm-eval")


def test_doctor_sees_what_changed_and_tests_again(place: Place) -> None:
    toolchain = install(place.wanted())
    report = examine_toolchain("lm-eval", place.locks, place.smoke)
    assert (report["problems"], report["notes"]) == ([], [])
    assert report["smoke"]["result"] == {"doubled": 42}

    (info,) = toolchain.environment.glob("lib/python*/site-packages/fakelib-1.0.dist-info")
    info.rename(info.with_name("fakelib-9.0.dist-info"))
    metadata = info.with_name("fakelib-9.0.dist-info") / "METADATA"
    metadata.write_text(metadata.read_text().replace("1.0", "9.0"))
    (info.parent / "fakelib.py").write_text("raise ImportError('broken')")
    place.write_lock("fakelib==1.0\n# changed")
    report = examine_toolchain("lm-eval", place.locks, place.smoke)
    assert report["problems"][0] == "fakelib was 1.0 when it was tested, and is 9.0"
    assert "ImportError: broken" in report["problems"][1]
    assert report["notes"] == ["this version of swift has another lock: swift toolchain install lm-eval"]
    shutil.rmtree(toolchain.environment)
    assert "is broken" in examine_toolchain("lm-eval", place.locks, place.smoke)["problems"][0]


def test_wrong_words_are_refused(place: Place) -> None:
    with pytest.raises(UsageError, match="did you mean vllm"):
        install(place.wanted(name="vlm"))
    with pytest.raises(UsageError, match=r"no variant 'cuda'[\s\S]*there is cpu"):
        install(place.wanted(variant="cuda"))
    with pytest.raises(UsageError, match="--wheels: there is no folder"):
        install(place.wanted(wheels=place.root / "no"))


def test_the_command_lists_what_there_is(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    from swift.cli.toolchain import run

    assert run(["ls", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == ["vllm", "gptqmodel", "llmcompressor", "evalscope", "lm-eval"]
    assert all(row["version"] is None and row["disk_bytes"] > 1e8 for row in rows)
    assert run(["doctor"]) == 0
    assert "no toolchain is installed" in capsys.readouterr().out
    assert run(["doctor", "vllm"]) == 1
    assert "swift toolchain install vllm" in capsys.readouterr().out
