"""``swift data show`` and ``swift data check`` as a user sees them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_fakes import chat, write_jsonl

from swift.cli.main import main


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "good.jsonl", [chat("Hello!", "I am fine.", id=1), chat("Two?", "2")])
    write_jsonl(tmp_path / "bad.jsonl", [chat("q", "a"), '{"messages": [', {"text_only": "x"}])
    return tmp_path


def test_check_prints_every_bad_line_and_a_total(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", "good.jsonl", "bad.jsonl"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "bad.jsonl:2: broken JSON: Expecting value (column 15)",
        "bad.jsonl:3: no known columns: found [text_only]; expected messages | conversations | query,response | "
        "instruction,output | prompt,completion | text",
        "2 of 5 rows cannot be used",
    ]


def test_check_of_good_files(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", "good.jsonl"]) == 0
    assert capsys.readouterr().out == "2 rows, all of them good\n"


def test_check_as_json_over_a_folder(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", ".", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["num_rows"], found["num_bad"]) == (5, 2)
    assert found["bad"][0] == {
        "location": "bad.jsonl:2",
        "reason": "broken JSON: Expecting value (column 15)",
    }


def test_check_with_a_model_tells_long_rows(
    files: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(files / "c.jsonl", [chat("q", "word " * 200), {"query": "only a question"}, chat("q", "a")])
    assert main(["data", "check", "c.jsonl", "--model", str(tiny_model_dir), "--max_length", "64"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "c.jsonl:1: longer than max_length 64",
        "c.jsonl:2: no token is learned",
        "2 of 3 rows cannot be used",
    ]


def test_show_messages(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "show", "good.jsonl", "--num-rows", "1"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "good.jsonl:1   other columns: id",
        "user: Hello!",
        "assistant: I am fine.",
        "",
    ]


def test_show_tokens_with_the_learned_part_marked(
    files: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "show", "good.jsonl", "--model", str(tiny_model_dir), "--num_rows", "1"]) == 0
    out = capsys.readouterr().out
    head = out.splitlines()[0]
    assert head.startswith("good.jsonl:1   ")
    assert " learned" in head
    before, _, learned = out.partition("[[")
    assert "Hello!" in before
    assert learned.startswith("I am fine.")
    assert "[[...]]: learned" in out


def test_show_as_json(files: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "show", "good.jsonl", "--json"]) == 0
    [first, second] = json.loads(capsys.readouterr().out)["samples"]
    assert first == {
        "location": "good.jsonl:1",
        "messages": chat("Hello!", "I am fine.")["messages"],
        "extra": {"id": 1},
    }
    assert second["location"] == "good.jsonl:2"
    assert main(["data", "show", "good.jsonl#1", "--json", "--model", str(tiny_model_dir)]) == 0
    [sample] = json.loads(capsys.readouterr().out)["samples"]
    assert len(sample["input_ids"]) == len(sample["labels"])
    assert any(segment["learned"] for segment in sample["segments"])


def test_as_pretraining_sees_it(
    files: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (files / "a.txt").write_text("Once upon a time\nthere was.\n\nSecond.\n")
    assert main(["data", "show", "a.txt", "--pt", "--model", str(tiny_model_dir), "--json"]) == 0
    samples = json.loads(capsys.readouterr().out)["samples"]
    assert [sample["location"] for sample in samples] == ["a.txt:1", "a.txt:4"]
    assert samples[0]["segments"][0]["text"].startswith("Once upon a time\nthere was.")
    assert samples[0]["labels"] == samples[0]["input_ids"]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["check", "goood.jsonl"], 1, "goood.jsonl: no such file or folder\n  fix: did you mean good.jsonl?"),
        (["show", "bad.jsonl"], 1, "bad.jsonl:2: broken JSON: Expecting value (column 15)"),
        (["chekc", "good.jsonl"], 2, "fix: did you mean check?"),
        (["check", "good.jsonl", "--jsn"], 2, "--jsn: unknown option\n  fix: did you mean --json?"),
        (["check", "good.jsonl", "--columns", "x"], 2, "--columns: not a JSON object of names"),
        (["show", "good.jsonl", "--model", "nowhere"], 1, "nowhere"),
    ],
)
def test_mistakes(
    files: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, message: str
) -> None:
    assert main(["data", *words]) == code
    assert message in capsys.readouterr().err


def test_columns(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(files / "c.jsonl", [{"ask": "Q", "say": "A"}])
    columns = '{"ask": "query", "say": "response"}'
    assert main(["data", "show", "c.jsonl", "--columns", columns]) == 0
    assert "user: Q\nassistant: A" in capsys.readouterr().out


def test_check_tells_rows_that_teach_nothing(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preference = {"prompt": "q", "chosen": "a", "rejected": "b"}
    answered = chat("q", "a", rejected_response="b")
    question = {"messages": [{"role": "user", "content": "only a question"}]}
    write_jsonl(files / "c.jsonl", [preference, answered, question, chat("q", "a")])
    assert main(["data", "check", "c.jsonl"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "4 rows, all of them readable",
        "warning: 1 row has no assistant message: sft learns nothing from them (c.jsonl:3)",
        "warning: 2 rows have chosen or rejected answers, so this is preference data: for swift rlhf "
        "(c.jsonl:1, c.jsonl:2)",
    ]
    write_jsonl(files / "e.jsonl", [{"question": "q", "reply": "r", "id": 1}] * 4)
    assert main(["data", "check", "e.jsonl"]) == 0
    assert capsys.readouterr().out.splitlines()[1] == (
        "warning: 4 rows have no assistant message: sft learns nothing from them (e.jsonl:1, e.jsonl:2, e.jsonl:3, ...)"
        """; not read: reply; --columns '{"reply": "response"}' says where the answers are"""
    )
    assert main(["data", "check", "c.jsonl", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["warnings"]) == 2
    assert main(["data", "check", "c.jsonl", "--pt"]) == 0
    assert "no assistant message" not in capsys.readouterr().out


def test_ls_finds_by_name_and_task(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "ls", "gsm8k", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["datasets"]
    assert found and all("gsm8k" in f"{entry['name']} {entry['hf']} {entry['ms']}".lower() for entry in found)
    assert main(["data", "ls", "dpo"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 10 and {line.count("\t") for line in lines} == {
        4
    }  # whole, however narrow a terminal is


def test_a_built_cache_is_the_one_the_run_reads(
    files: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SWIFT_HOME", str(files / "home"))
    words = ["--model", str(tiny_model_dir), "--dataset", "good.jsonl", "--max_length", "64"]
    assert main(["data", "build-cache", *words]) == 0
    assert capsys.readouterr().out.startswith("training: 2 samples, ")
    (entry,) = (files / "home/cache/tokens").iterdir()
    (entry / "mark").touch()  # a run that made its own would replace the folder
    assert main(["sft", *words, "--max_steps", "1"]) == 0
    assert [folder.name for folder in (files / "home/cache/tokens").iterdir()] == [entry.name]
    assert (entry / "mark").exists()


def test_what_a_name_stands_for_is_said(
    files: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A name that stands for something else than it says must not pass in silence."""
    monkeypatch.setenv("SWIFT_HOME", str(files / "home"))
    (files / "home/datasets").mkdir(parents=True)
    (files / "home/datasets/own.yaml").write_text(
        f"mine: {{path: {files}/good.jsonl, note: another one is taken}}"
    )
    assert main(["sft", "--model", str(tiny_model_dir), "--dataset", "mine", "--max_steps", "1"]) == 0
    assert "mine: another one is taken" in capsys.readouterr().out
