"""The demo: the data is honest, the model learns, what is shown is what was measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from swift.core.errors import SwiftError
from swift.demo.experiments import LEARNING_RATES
from swift.demo.show import answer_table, sparkline
from swift.demo.task import WORD_LENGTH, write_task


def words(path: Path) -> list[str]:
    rows = [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]
    for question, answer in rows:
        assert question["content"].removeprefix("Reverse ") == answer["content"][::-1]
        assert len(answer["content"]) == WORD_LENGTH
    return [answer["content"] for _, answer in rows]


def test_no_word_is_both_trained_and_held_out(tmp_path: Path) -> None:
    train, heldout = write_task(tmp_path, num_train=5000, num_heldout=200, seed=3)
    assert len(set(words(train)) | set(words(heldout))) == 5200


def test_the_second_task_has_files_of_its_own(tmp_path: Path) -> None:
    write_task(tmp_path, num_train=3, num_heldout=2, seed=3)
    train, heldout = write_task(tmp_path, num_train=3, num_heldout=2, seed=3, verb="Rotate")
    assert {path.name for path in tmp_path.iterdir()} == {
        "train.jsonl",
        "heldout.jsonl",
        train.name,
        heldout.name,
    }
    question, answer = json.loads(heldout.read_text(encoding="utf-8").splitlines()[0])["messages"]
    word = question["content"].removeprefix("Rotate ")
    assert answer["content"] == word[1:] + word[:1]


def test_a_seed_gives_the_same_task(tmp_path: Path) -> None:
    first, _ = write_task(tmp_path / "a", num_train=50, num_heldout=5, seed=3)
    second, _ = write_task(tmp_path / "b", num_train=50, num_heldout=5, seed=3)
    other, _ = write_task(tmp_path / "c", num_train=50, num_heldout=5, seed=4)
    assert first.read_bytes() == second.read_bytes() != other.read_bytes()


def test_the_model_masters_held_out_words(tmp_path: Path) -> None:
    from swift.demo.run import run_demo

    lines: list[str] = []
    result = run_demo(tmp_path / "demo", seed=1, num_steps=120, say=lines.append)
    assert result.accuracy_before <= 0.02
    assert result.accuracy_after >= 0.95
    assert len(result.after) == 200
    assert result.losses[-1] < 0.2 * result.losses[0]
    assert (result.run / "curves.png").stat().st_size > 0
    written = [json.loads(line) for line in (result.run / "answers.jsonl").read_text().splitlines()]
    assert sum(row["response"] == row["reference"] for row in written) / 200 == result.accuracy_after
    assert f"$ swift sft {tmp_path / 'demo' / 'sft.yaml'}" in lines


def test_a_folder_with_a_foreign_model_is_left_alone(tmp_path: Path) -> None:
    from swift.demo.run import run_demo

    precious = tmp_path / "model" / "weights"
    precious.mkdir(parents=True)
    with pytest.raises(SwiftError, match="no demo has made"):
        run_demo(tmp_path)
    assert precious.exists() and not (tmp_path / "train.jsonl").exists()


@pytest.mark.parametrize(
    ("values", "options", "line"),
    [
        ([], {}, ""),
        ([2.0, 2.0], {}, "▁▁"),
        ([7.0, 3.5, 0.0], {}, "█▅▁"),
        ([4.0, 2.0, 1.0, 1.0], {"width": 2}, "█▁"),
        ([7.0, 0.0], {"encoding": "ascii"}, "@_"),
    ],
)
def test_sparkline(values: list[float], options: dict[str, object], line: str) -> None:
    assert sparkline(values, **options) == line  # type: ignore[arg-type]


def test_answer_table_shows_control_characters_and_long_answers_safely() -> None:
    def row(response: str) -> dict[str, object]:
        right = float(response == "CBA")
        messages = [{"role": "user", "content": "Reverse ABC"}]
        return {"messages": messages, "reference": "CBA", "response": response, "exact_match": right}

    assert answer_table([row("\x1b[31m" + "x" * 40), row("")], [row("CBA"), row("CAB")]) == [
        "question     wanted  before          after",
        "Reverse ABC  CBA     .[31mxxxxxx...  CBA    ok",
        "Reverse ABC  CBA                     CAB    wrong",
    ]


@pytest.mark.slow
def test_four_experiments_their_report_and_the_winner_merged_quantised_and_served(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "swift", "demo", "--output_dir", "demo"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "what the reward taught" in done.stdout
    assert "winner: bold" in done.stdout
    for made in ("winner", "winner-nf4"):
        parity = json.loads((tmp_path / "demo" / made / "parity.json").read_text())
        assert parity["passed"], parity
    assert "ok    the service is stopped" in done.stdout
    assert not (tmp_path / "demo" / "serving.json").exists(), "the server of the winner still runs"
    report = (tmp_path / "demo" / "report.html").read_text(encoding="utf-8")
    for name in LEARNING_RATES:
        run = tmp_path / "demo" / "experiments" / name
        assert json.loads((run / "summary.json").read_text())["steps"] == 120
        assert (run / "eval/evaluate/results.json").is_file()
        assert name in report
    assert not (tmp_path / "demo" / "service" / "service.json").exists(), "the demo's service still runs"
