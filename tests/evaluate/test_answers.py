"""Batch inference: the result file survives being cut anywhere, and the summary adds up."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from swift.cli import infer as infer_command
from swift.cli import merge_lora as merge_command
from swift.config.bind import resolve
from swift.config.sections.generation import GenerationSection
from swift.config.sections.template import TemplateSection
from swift.config.sections.tuner import TunerSection
from swift.core.errors import ConfigError, DataError, SwiftError
from swift.data.sources import parse_dataset_spec
from swift.evaluate.answers import Task, answer_limit, answer_tasks, summarize
from swift.evaluate.evaluators import find_evaluators
from swift.evaluate.questions import Question, Questions, read_questions
from swift.evaluate.results import ResultFile
from swift.evaluate.subjects import LocalModel, Reply
from swift.inference.generate import Generator
from swift.models.load import load_bundle, load_model
from swift.tuners.apply import apply_tuner
from swift.tuners.peft_format import save_adapter

OPTIONS = GenerationSection(max_new_tokens=6, metric=["exact_match", "rouge", "loss"])


def specs(names):
    return [parse_dataset_spec(name) for name in names]


def answer_questions(
    generator: Generator,
    questions: list[Question],
    options: GenerationSection,
    path: Path,
    identity: tuple[str, ...] = (),
    on_progress: Callable[[int], None] = lambda count: None,
) -> list[dict[str, Any]]:
    task = Task("", Questions(questions), find_evaluators(options.metric, {}), options, answers=True)
    return answer_tasks(LocalModel(generator, identity, 2), [task], path, on_progress=on_progress)


@pytest.fixture(scope="module")
def generator(tiny_model_dir: Path) -> Generator:
    return Generator(load_bundle(tiny_model_dir, TemplateSection(), dtype=torch.float32, device="cpu"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [{"query": f"Add {n} and {n}.", "response": str(2 * n), "level": n} for n in range(5)]
    rows.append({"messages": [{"role": "user", "content": "no answer known"}]})
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_become_questions(data: Path) -> None:
    questions = read_questions(specs([str(data)]), {})
    assert [q.reference for q in questions.good] == ["0", "2", "4", "6", "8", None]
    assert questions.good[3].messages == [{"role": "user", "content": "Add 3 and 3."}]
    assert questions.good[3].extra == {"level": 3} and questions.good[3].location == f"{data}:4"
    assert len(read_questions(specs([f"{data}#2", f"{data}#1"]), {}).good) == 3


def test_bad_rows_are_refused_or_counted(data: Path) -> None:
    with data.open("a") as file:
        file.write('{"response": \n{"messages": [{"role": "assistant", "content": "only an answer"}]}\n')
    with pytest.raises(DataError) as caught:
        read_questions(specs([str(data)]), {})
    assert caught.value.where == f"{data}:7"
    questions = read_questions(specs([str(data)]), {}, "skip")
    assert len(questions.good) == 6
    assert questions.bad[1] == f"{data}:8: there is no question before the answer"


def test_answers_may_be_twice_as_long_as_the_longest_reference(generator: Generator, data: Path) -> None:
    questions = read_questions(specs([f"{data}#5"]), {}).good
    longest = max(len(generator.tokenizer.encode(str(2 * n), add_special_tokens=False)) for n in range(5))
    assert answer_limit(questions, generator.tokenizer, 512) == 2 * longest + 16
    assert answer_limit(questions, generator.tokenizer, 10) == 10
    assert answer_limit(read_questions(specs([str(data)]), {}).good, generator.tokenizer, 512) == 512


def test_results_hold_answers_and_metrics(generator: Generator, data: Path, tmp_path: Path) -> None:
    questions = read_questions(specs([str(data)]), {}).good
    done: list[int] = []
    results = answer_questions(generator, questions, OPTIONS, tmp_path / "out.jsonl", on_progress=done.append)
    assert done == [0, 6]
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == results
    assert [r["response"] for r in results] == generator.batch([q.messages for q in questions], OPTIONS)
    assert results[1]["extra"] == {"level": 1} and results[1]["reference"] == "2"
    assert "exact_match" not in results[5] and "loss" not in results[5]
    summary = summarize(results)
    assert (summary["num_rows"], summary["num_references"]) == (6, 5)
    tokens = sum(r["num_loss_tokens"] for r in results[:5])
    assert summary["loss"] == pytest.approx(
        sum(r["loss"] * r["num_loss_tokens"] for r in results[:5]) / tokens
    )
    assert summary["exact_match"] == sum(r["exact_match"] for r in results[:5]) / 5


def test_the_loss_is_that_of_the_answer_alone(generator: Generator, tmp_path: Path) -> None:
    """Earlier assistant turns belong to the question."""
    messages = [
        {"role": "user", "content": "a b"},
        {"role": "assistant", "content": "c d"},
        {"role": "user", "content": "e"},
        {"role": "assistant", "content": "Paris."},
    ]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}))
    questions = read_questions(specs([str(tmp_path / "a.jsonl")]), {}).good
    (result,) = answer_questions(generator, questions, OPTIONS, tmp_path / "out.jsonl")
    encoded = generator.template.encode(messages)
    prompt = generator.template.encode_prompt(messages[:-1])
    labels = torch.tensor([[-100] * len(prompt) + encoded.labels[len(prompt) :]])
    with torch.no_grad():
        loss = generator.model(
            input_ids=torch.tensor([encoded.input_ids]), labels=labels, use_cache=False
        ).loss
    assert result["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert result["num_loss_tokens"] == int((labels != -100).sum())


@pytest.mark.parametrize(
    "cut", ["after a line", "inside a line", "inside the first line", "inside a character"]
)
def test_a_cut_file_is_gone_on_with(generator: Generator, data: Path, tmp_path: Path, cut: str) -> None:
    content = data.read_text().replace("no answer known", "Größe?")
    data.write_text(content, encoding="utf-8")
    questions = read_questions(specs([str(data)]), {}).good
    path = tmp_path / "out.jsonl"
    expected = answer_questions(generator, questions, OPTIONS, path)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    size = {
        "after a line": len(b"".join(lines[:3])),
        "inside a line": len(b"".join(lines[:3])) + 25,
        "inside the first line": 10,
        "inside a character": whole.index("ß".encode()) + 1,
    }[cut]
    os.truncate(path, size)
    done: list[int] = []
    assert answer_questions(generator, questions, OPTIONS, path, on_progress=done.append) == expected
    assert done[0] == whole[:size].count(b"\n")
    assert path.read_bytes() == whole


def test_a_finished_file_has_the_order_of_the_data(tmp_path: Path) -> None:
    """Whoever answers first: each row is written when it is there, and moved to its place in the end."""

    class Backwards:
        identity = ("model",)

        def answers(self, questions, options, *, seed, numbers, on_reply):
            replies = [Reply(question.messages[0]["content"].upper(), "stop", 3) for question in questions]
            for index in reversed(range(len(replies))):
                on_reply(index, replies[index])
            return replies

    asked = [[{"role": "user", "content": f"row {n}"}] for n in range(40)]
    questions = [Question(n, f"rows:{n}", messages, None, None, {}) for n, messages in enumerate(asked)]
    task = Task("", Questions(questions), [], OPTIONS, answers=True)
    path, seen = tmp_path / "out.jsonl", []

    def look(count: int) -> None:
        if count and path.exists():
            seen.append([json.loads(line)["index"] for line in path.read_text().splitlines()])

    results = answer_tasks(Backwards(), [task], path, on_progress=look)
    assert seen[0] == list(range(39, 23, -1)) and len(seen[-1]) == 40
    stored = [json.loads(line) for line in path.read_text().splitlines()]
    assert stored == results and [row["index"] for row in stored] == list(range(40))
    assert [row["response"] for row in stored] == [f"ROW {n}" for n in range(40)]


def test_a_finished_file_is_not_answered_again(
    generator: Generator, data: Path, tmp_path: Path, monkeypatch
) -> None:
    questions = read_questions(specs([str(data)]), {}).good
    expected = answer_questions(generator, questions, OPTIONS, tmp_path / "out.jsonl")
    monkeypatch.setattr(generator, "answers", None)
    assert answer_questions(generator, questions, OPTIONS, tmp_path / "out.jsonl") == expected


def test_a_file_of_other_rows_or_options_is_refused(generator: Generator, data: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    questions = read_questions(specs([str(data)]), {}).good
    answer_questions(generator, questions, OPTIONS, path)
    content = path.read_bytes()
    other = OPTIONS.model_copy(update={"max_new_tokens": 7})
    for arguments in (
        (questions, other, ()),
        (questions[:3], OPTIONS, ()),
        (questions, OPTIONS, ("other model",)),
    ):
        with pytest.raises(ConfigError, match="other data, another model or other options"):
            answer_questions(generator, arguments[0], arguments[1], path, identity=arguments[2])
    assert path.read_bytes() == content
    path.write_text('{"index": 0}\n')
    with pytest.raises(SwiftError, match="not a result of swift infer") as caught:
        ResultFile(path)
    assert caught.value.where == f"{path}:1"


def test_a_full_disk_is_explained_and_the_file_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = ResultFile(tmp_path / "out.jsonl")
    file.append([{"index": 0, "key": "a"}])

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(SwiftError, match="cannot be written") as caught:
        patch.setattr(os, "fsync", full)
        file.append([{"index": 1, "key": "b"}])
    assert caught.value.why == "No space left on device" and list(file.results) == [0]
    file.close()
    again = ResultFile(tmp_path / "out.jsonl")
    again.check({0: "a", 1: "b"})
    again.append([{"index": 2, "key": "c"}])
    again.close()
    assert json.loads((tmp_path / "out.jsonl").read_bytes().splitlines()[-1]) == {"index": 2, "key": "c"}


# -- the commands ----------------------------------------------------------------------------------------


@pytest.fixture
def adapter(tiny_model_dir: Path, tmp_path: Path) -> Path:
    tuned = apply_tuner(load_model(tiny_model_dir, dtype=torch.float32), TunerSection(lora_rank=2))
    with torch.no_grad():
        for parameter in tuned.named_trainable().values():
            parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    save_adapter(tuned.model, tmp_path / "checkpoint-4", tiny_model_dir)
    return tmp_path / "checkpoint-4"


def test_infer_over_a_file(
    adapter: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [
        "--adapters",
        str(adapter),
        "--val_dataset",
        str(data),
        "--max_new_tokens",
        "4",
        "--device",
        "cpu",
    ]
    assert infer_command.run([*argv, "--result_path", str(tmp_path / "out.jsonl")]) == 0
    printed = capsys.readouterr().out
    assert "num_rows        6" in printed and str(tmp_path / "out.jsonl") in printed and "rougeL" in printed
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 6
    summary = infer_command.infer(resolve("infer", argv))
    assert Path(summary["result_path"]).parent == tmp_path and summary["num_rows"] == 6


def test_infer_answers_lines_of_standard_input(
    tiny_model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    generator: Generator,
) -> None:
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("Hello!\n\nHow are you?\n"))
    argv = ["--model", str(tiny_model_dir), "--max_new_tokens", "5", "--device", "cpu"]
    assert infer_command.run(argv) == 0
    options = GenerationSection(max_new_tokens=5)
    asked = [[{"role": "user", "content": text}] for text in ("Hello!", "How are you?")]
    assert capsys.readouterr().out == "".join(text + "\n" for text in generator.batch(asked, options))


def test_merge_lora(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], data: Path) -> None:
    argv = ["--adapters", str(adapter), "--device", "cpu"]
    assert merge_command.run(argv) == 0
    merged = tmp_path / "checkpoint-4-merged"
    assert "logits differ by" in capsys.readouterr().out
    rows = ["--val_dataset", str(data), "--max_new_tokens", "6", "--device", "cpu"]
    outputs = []
    for number, use in enumerate((["--adapters", str(adapter)], ["--model", str(merged)])):
        path = tmp_path / f"{number}.jsonl"
        infer_command.run([*use, *rows, "--result_path", str(path)])
        outputs.append([json.loads(line)["response"] for line in path.read_text().splitlines()])
    assert outputs[0] == outputs[1]
    with pytest.raises(ConfigError, match="exists already") as caught:
        merge_command.run(argv)
    assert caught.value.exit_code == 2
    assert merge_command.run([*argv, "--output_dir", str(tmp_path / "elsewhere")]) == 0
    assert (tmp_path / "elsewhere" / "model.safetensors").is_file()


def test_merge_lora_needs_room(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swift.quantize.merge.free_bytes", lambda path: 1000)
    with pytest.raises(SwiftError, match="1000 B are free"):
        merge_command.run(["--adapters", str(adapter), "--device", "cpu"])
