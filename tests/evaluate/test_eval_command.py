"""``swift eval``: suites, choices by a plain forward pass, results to browse and to compare, resuming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_openai import chat_reply, fake_server

from swift.cli import eval as eval_command
from swift.config.bind import resolve
from swift.config.sections.generation import GenerationSection
from swift.config.sections.template import TemplateSection
from swift.core.errors import ConfigError, DataError, UsageError
from swift.data.sources import parse_dataset_spec
from swift.evaluate.answers import intervals, summarize
from swift.evaluate.evaluation import evaluate
from swift.evaluate.questions import Question, few_shot_messages, read_questions
from swift.evaluate.results import read_results
from swift.evaluate.show import compare, find_samples, show
from swift.evaluate.statistics import sign_flip_p
from swift.evaluate.subjects import LocalModel
from swift.evaluate.suite import read_suite
from swift.inference.generate import Generator
from swift.models.load import load_bundle


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def quiz(tmp_path: Path) -> Path:
    rows = [
        {"question": "The capital of France?", "choices": ["Rome", "Paris", "Berlin"], "answer": 1},
        {"question": "2+2?", "options": ["three", "four"], "answer": "B", "level": 1},
        {"question": "Sky?", "choices": {"text": ["blue", "red"], "label": ["1", "2"]}, "answerKey": "2"},
        {"query": "Again?", "choices": ["yes", "no"], "label": "no"},
    ]
    return write(tmp_path / "quiz.jsonl", rows)


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    return write(tmp_path / "sums.jsonl", [{"query": f"Add {n}.", "response": str(n)} for n in range(5)])


def questions(path: Path) -> list[Question]:
    return read_questions([parse_dataset_spec(str(path))], {}).good


def test_choices_are_read_as_benchmarks_write_them(quiz: Path, tmp_path: Path) -> None:
    rows = questions(quiz)
    assert [(row.choices[row.correct or 0], row.correct, row.reference) for row in rows] == [
        ("Paris", 1, "Paris"), ("four", 1, "four"), ("red", 1, "red"), ("no", 1, "no"),
    ]  # fmt: skip
    assert rows[1].messages == [{"role": "user", "content": "2+2?"}] and rows[1].extra == {"level": 1}
    for bad, says in (
        ({"query": "x", "choices": ["a", "b"], "answer": "C"}, "neither a number from 0 to 1, nor A to B"),
        ({"query": "x", "choices": ["a"], "answer": 0}, "two or more texts"),
        ({"query": "x", "choices": ["a", "b"], "answer": 2}, "neither a number"),
    ):
        with pytest.raises(DataError, match=says):
            questions(write(tmp_path / "bad.jsonl", [bad]))


def test_choice_is_the_plain_forward_pass(tiny_model_dir: Path, quiz: Path) -> None:
    """Log-probability of the text alone: without the token that ends the turn."""
    bundle = load_bundle(tiny_model_dir, TemplateSection(), dtype=torch.float32, device="cpu")
    subject = LocalModel(Generator(bundle), [], 3)
    rows = questions(quiz)
    pairs = [(row, choice) for row in rows for choice in row.choices]
    found = subject.losses(pairs, end=False)
    for (row, choice), (loss, count) in zip(pairs, found, strict=True):
        text = bundle.template.render(row.messages, add_generation_prompt=True)
        ids = bundle.tokenizer(text + choice, add_special_tokens=False)["input_ids"]
        start = len(bundle.tokenizer(text, add_special_tokens=False)["input_ids"])
        with torch.no_grad():
            logits = bundle.model(input_ids=torch.tensor([ids])).logits[0].double()
        logprobs = logits.log_softmax(-1)[range(len(ids) - 1), ids[1:]][start - 1 :]
        assert count == len(ids) - start and -loss == pytest.approx(logprobs.sum().item(), rel=1e-5)


def test_a_suite_from_file_to_figures(
    tiny_model_dir: Path, quiz: Path, sums: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text("def length(answer, question):\n    return len(answer)\n")
    (tmp_path / "suite.yaml").write_text(
        "defaults: {max_new_tokens: 4}\n"
        "tasks:\n"
        "  quiz: {dataset: quiz.jsonl, metric: choice}\n"
        "  sums:\n"
        "    dataset: sums.jsonl\n"
        "    metric: [exact_match, 'mine.py:length', {regex: {pattern: '.*'}}, loss]\n"
        "    few_shot: {dataset: sums.jsonl, num: 2}\n"
        "    limit: 3\n"
    )
    words = ["--model", str(tiny_model_dir), "--eval_tasks", str(tmp_path / "suite.yaml"), "--device", "cpu"]
    out = tmp_path / "out"
    assert eval_command.run([*words, "--eval_output_dir", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "quiz: 4 rows" in printed and "choice_norm" in printed and str(out) in printed
    results = json.loads((out / "results.json").read_text())
    rows = read_results(out / "samples.jsonl")
    assert [row["task"] for row in rows] == ["quiz"] * 4 + ["sums"] * 3
    assert [message["content"] for message in rows[5]["messages"]] == ["Add 0.", "0", "Add 1.", "1", "Add 1."]
    choices = [row["choice"] for row in rows[:4]]
    assert results["metrics"]["quiz.choice"] == sum(choices) / 4
    assert rows[0]["response"] == rows[0]["chosen"] and "num_tokens" not in rows[0]
    top = max(range(3), key=lambda number: rows[0]["choice_logprobs"][number])
    assert rows[0]["chosen"] == rows[0]["choices"][top] and rows[0]["choice"] == float(top == 1)
    by_length = [
        value / len(text) for value, text in zip(rows[0]["choice_logprobs"], rows[0]["choices"], strict=True)
    ]
    assert rows[0]["choice_norm"] == float(by_length.index(max(by_length)) == 1)
    assert results["metrics"]["sums.length"] == sum(len(row["response"]) for row in rows[4:]) / 3
    interval = results["tasks"]["sums"]["intervals"]["loss"]
    assert (
        interval["low"] <= results["metrics"]["sums.loss"] <= interval["high"] and interval["num_rows"] == 3
    )
    before = (out / "samples.jsonl").read_bytes()
    assert eval_command.run([*words, "--eval_output_dir", str(out)]) == 0  # nothing is answered again
    assert (out / "samples.jsonl").read_bytes() == before
    with pytest.raises(ConfigError, match="other data, another model or other options"):
        eval_command.run([*words, "--eval_output_dir", str(out), "--eval_limit", "2"])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tasks: {}", "there are no tasks"),
        ("task: {a: {dataset: x}}", "unknown key 'task'"),
        ("tasks: {a: {metric: rouge}}", "has no dataset"),
        ("tasks: {a: {dataset: x, metrics: rouge}}", "did you mean metric"),
        ("tasks: {a: {dataset: x, temperature: -1}}", "temperature cannot be -1"),
        ("tasks: {a: {dataset: x, few_shot: 3}}", "a data set and a number"),
        ("tasks: {a b: {dataset: x}}", "cannot name a task"),
    ],
)
def test_mistakes_in_a_suite_have_a_line(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_suite(tmp_path / "s.yaml")
    assert says in caught.value.render() and "s.yaml" in (caught.value.where or "")


def test_few_shot_needs_as_many(sums: Path) -> None:
    specs = [parse_dataset_spec(str(sums))]
    assert [turn["content"] for turn in few_shot_messages(specs, {}, 1)] == ["Add 0.", "0"]
    with pytest.raises(DataError, match="9 examples are asked for"):
        few_shot_messages(specs, {}, 9)


def test_what_an_evaluation_refuses(tiny_model_dir: Path, sums: Path, tmp_path: Path) -> None:
    words = ["--model", str(tiny_model_dir), "--val_dataset", str(sums), "--device", "cpu"]
    for more, says in (
        (["--metric", "exact_mach"], "did you mean exact_match"),
        (["--metric", "choice"], "choice finds no row"),
        (["--num_samples", "3"], "all the same"),
        (["--eval_generation_config", '{"a": 1}'], "built-in evaluators do not use it"),
        (["--metric_args", '{"rouge": {"stem": true}}'], "rouge has no option 'stem'"),
        (["--eval_backend", "OpenCompass"], "use evalscope"),
    ):
        with pytest.raises((ConfigError, DataError)) as caught:
            eval_command.run([*words, *more, "--eval_output_dir", str(tmp_path / "out")])
        assert says in caught.value.render()
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="missing"):
        eval_command.run(["--val_dataset", str(sums)])


def test_a_served_model(sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def answer(path: str, body: dict[str, Any], number: int) -> tuple[int, dict[str, str], Any]:
        if path == "/v1/completions":
            return 404, {}, {"detail": "Not Found"}
        return 200, {}, chat_reply(body["messages"][-1]["content"].split()[-1].strip("."))

    with fake_server(answer) as server:
        values = {
            "eval_url": server.url,
            "val_dataset": [str(sums)],
            "eval_name": "x",
            "metric": ["exact_match"],
        }
        results = evaluate(resolve("eval", values=values), say=lambda line: None)
        assert (results["model"], results["url"]) == ("fake-model", server.url)
        assert results["metrics"]["exact_match"] == 1.0 and results["folder"] == "eval/x"
        with pytest.raises(ConfigError, match="does not tell the log-probabilities"):
            evaluate(resolve("eval", values={**values, "metric": ["loss"], "eval_name": "y"}))


def row(index: int, score: float, **more: Any) -> dict[str, Any]:
    message = {"role": "user", "content": f"q{index % 4}"}
    return {"index": index, "key": "k", "location": f"f:{index}", "messages": [message], "reference": "r",
            "response": f"a{index}", "finish_reason": "stop", "exact_match": score, **more}  # fmt: skip


def test_two_results_are_compared_row_by_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = [row(n, float(n % 3 == 0), loss=1.0, num_loss_tokens=2 + n) for n in range(6)]
    second = [row(n, 1.0, loss=0.5, num_loss_tokens=2 + n) for n in range(5)]  # the last row is not there
    a, b = write(tmp_path / "a.jsonl", first), write(tmp_path / "b.jsonl", second)
    found = {entry.metric: entry for entry in compare(a, b)}
    exact = found["exact_match"]
    assert (exact.first.mean, exact.second.mean, exact.first.num_rows) == (2 / 5, 1.0, 5)
    assert (
        (exact.better, exact.worse) == (3, 0)
        and exact.difference
        and exact.difference.mean == pytest.approx(0.6)
    )
    assert exact.p_value == 2 * 0.5**3 == sign_flip_p([1.0, 1, 1, 1, 1], [1.0, 0, 0, 1, 0])
    assert (found["loss"].better, found["loss"].worse) == (5, 0)  # smaller is better
    assert eval_command.run(["compare", str(a), str(b)]) == 0
    assert "+0.6 (" in capsys.readouterr().out
    eval_command.run(["compare", str(a), str(b), "--json"])
    assert json.loads(capsys.readouterr().out)["differences"][0]["better"] == 3
    write(tmp_path / "c.jsonl", [{**row(0, 1.0), "messages": [{"role": "user", "content": "else"}]}])
    with pytest.raises(UsageError, match="no row in common"):
        compare(a, tmp_path / "c.jsonl")


def test_answers_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row(n, score) for n, score in enumerate([1.0, 0.0, 0.5])] + [
        {**row(3, 0.0), "judge_error": "no score", "exact_match": None}
    ]
    assert (
        len([line for line in show(rows, metric=None, worst=None, wrong=False) if line.startswith("[")]) == 4
    )
    wrong = [
        line for line in show(rows, metric="exact_match", worst=None, wrong=True) if line.startswith("[")
    ]
    assert [line[:3] for line in wrong] == ["[1]", "[2]", "[3]"]  # what failed is always shown
    worst = [line for line in show(rows[:3], metric=None, worst=1, wrong=False) if line.startswith("[")]
    assert worst == ["[1] f:1  exact_match 0"]
    with pytest.raises(UsageError, match="no row has a metric 'rouge'"):
        show(rows, metric="rouge", worst=None, wrong=False)
    run = tmp_path / "run"
    for name in ("old", "new"):
        (run / "eval" / name).mkdir(parents=True)
        write(run / "eval" / name / "samples.jsonl", rows[:3])
    assert find_samples(str(run / "eval" / "old")) == run / "eval" / "old" / "samples.jsonl"
    assert eval_command.run(["show", str(run), "--wrong"]) == 0
    assert "2 of 3 rows" in capsys.readouterr().out
    with pytest.raises(UsageError, match="there are no results"):
        find_samples(str(tmp_path / "nothing"))
    theirs = tmp_path / "lm" / "lm_eval_samples.jsonl"
    theirs.parent.mkdir()
    theirs.touch()
    with pytest.raises(UsageError) as caught:
        find_samples(str(theirs.parent))
    assert str(theirs) in str(caught.value.fix)


def test_summaries_tell_failures_and_weigh_losses() -> None:
    rows = [row(0, 1.0, loss=1.0, num_loss_tokens=1), row(1, 0.0, loss=3.0, num_loss_tokens=3, judge=4.0)]
    rows[0] |= {"judge_error": "x", "judge_failures": 2}
    summary = summarize(rows)
    assert (summary["loss"], summary["judge_failures"], summary["judge"]) == (2.5, 2, 4.0)
    assert intervals(rows)["judge"].num_rows == 1
    assert GenerationSection().num_samples == 1
