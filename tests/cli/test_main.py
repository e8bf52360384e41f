"""The ``swift`` command itself: dispatch, exit codes, what stands on stderr."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from swift.cli import main as main_module
from swift.cli.main import main
from swift.cli.table import COMMANDS, find_command
from swift.core.errors import DataError, UsageError


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch):
    """Replace what a command does; returns the list of argument lists it was called with."""

    def replace(effect: object = 0) -> list[list[str]]:
        calls: list[list[str]] = []

        def run(argv: list[str]) -> int:
            calls.append(argv)
            if isinstance(effect, BaseException):
                raise effect
            assert isinstance(effect, int)
            return effect

        monkeypatch.setattr(main_module, "load_command", lambda _: run)
        return calls

    return replace


def test_the_rest_of_the_words_go_to_the_command(command) -> None:
    calls = command(7)
    assert main(["sft", "run.yaml", "--debug", "--lora_rank", "3"]) == 7
    assert main(["merge_lora", "x"]) == 7
    assert calls == [["run.yaml", "--lora_rank", "3"], ["x"]]


def test_a_file_may_name_its_command(command, tmp_path: Path) -> None:
    calls = command()
    path = tmp_path / "run.yaml"
    path.write_text("command: pt\nmodel: m\n")
    assert main([str(path), "--max_steps", "3"]) == 0
    assert calls == [[str(path), "--max_steps", "3"]]


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (
            DataError("is not JSON", where="data.jsonl:57", why="a comma is missing", fix="repair it"),
            1,
            "error: data.jsonl:57: is not JSON\n  cause: a comma is missing\n  fix: repair it\n",
        ),
        (UsageError("unknown option", where="--x"), 2, "error: --x: unknown option\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (
            ZeroDivisionError("division\nby zero"),
            1,
            "error: ZeroDivisionError: division by zero\n  fix: run again with --debug for the traceback\n",
        ),
    ],
)
def test_failures_become_lines_and_exit_codes(
    error: BaseException, code: int, expected: str, command, capsys: pytest.CaptureFixture[str]
) -> None:
    command(error)
    assert main(["sft"]) == code
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", expected)


@pytest.mark.parametrize("error", [DataError("x"), ValueError("x")])
def test_debug_shows_the_traceback(error: Exception, command) -> None:
    command(error)
    with pytest.raises(type(error)):
        main(["sft", "--debug"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["sftt"], "error: unknown command 'sftt'\n  fix: did you mean swift sft?\n"),
        (["merge-lore"], "error: unknown command 'merge-lore'\n  fix: did you mean swift merge-lora?\n"),
        (
            ["app"],
            "error: swift app comes with a later version\n"
            "  fix: use swift deploy (swift plan app ... plans it)\n",
        ),
        (
            ["web_ui"],
            "error: swift web-ui comes with a later version\n"
            "  fix: use the command line (swift plan web-ui ... plans it)\n",
        ),
        (["qqqq"], "error: unknown command 'qqqq'\n  fix: swift --help lists the commands\n"),
        (
            ["--lora_rank", "3"],
            "error: --lora_rank: unknown option\n  fix: swift COMMAND --option: the command comes first\n",
        ),
        (["--versoin"], "error: --versoin: unknown option\n  fix: did you mean --version?\n"),
        (
            ["sft", "--help", "checkpont"],
            "error: --help checkpont: no option is about this\n  fix: did you mean --help checkpoint?\n",
        ),
        (
            ["sft", "--help", "nonsense"],
            "error: --help nonsense: no option is about this\n  fix: --help all lists every option\n",
        ),
        (
            ["config"],
            "error: swift config: what of it?\n  fix: swift config show|alias|schema|reference|completion\n",
        ),
        (
            ["data", "check", "f", "--modle", "x", "--clumns", "y"],
            "error: 2 unknown options\n  --modle: did you mean --model?\n  --clumns: did you mean --columns?\n",
        ),
    ],
)
def test_wrong_usage(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", expected)


@pytest.mark.parametrize(
    ("words", "start"),
    [
        ([], "usage: swift COMMAND"),
        (["--help"], "usage: swift COMMAND"),
        (["-h"], "usage: swift COMMAND"),
        (["sft", "--help"], "usage: swift sft [FILE.yaml"),
        (["sft", "-h"], "usage: swift sft [FILE.yaml"),
        (["help", "sft"], "usage: swift sft [FILE.yaml"),
        (["sft", "--help=lora"], "usage: swift sft [FILE.yaml"),
        (["plan", "--help"], "usage: swift plan COMMAND"),
        (["plan", "sft", "--help", "lora"], "usage: swift sft [FILE.yaml"),
        (["--version"], "swift "),
    ],
)
def test_help_goes_to_stdout(words: list[str], start: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(start)
    assert captured.err == ""


def test_find_command() -> None:
    assert find_command("merge_lora") is COMMANDS["merge-lora"]


def test_python_m_swift() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "swift", "sftt"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "error: unknown command 'sftt'\n  fix: did you mean swift sft?\n"


def test_a_reader_that_goes_away_is_no_error() -> None:
    done = subprocess.run(
        f"{sys.executable} -m swift config schema | head -1",
        shell=True,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "{\n"
    assert done.stderr == ""


def test_sigterm_closes_what_a_command_has_open(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left = []

    def run(argv: list[str]) -> int:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Event().wait(60)
        finally:
            left.append(argv)
        return 0

    monkeypatch.setattr(main_module, "load_command", lambda _: run)
    before = signal.getsignal(signal.SIGTERM)
    assert main(["eval", "x"]) == 143
    assert left == [["x"]] and capsys.readouterr().err == "terminated\n"
    assert signal.getsignal(signal.SIGTERM) is before
