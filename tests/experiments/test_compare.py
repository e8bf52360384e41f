"""Comparison of experiments at any moment: finished, running, failed, files missing or cut."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from swift.cli.compare import table_lines
from swift.cli.main import main
from swift.core.errors import UsageError
from swift.experiments.compare import collect
from swift.experiments.home import Home
from swift.experiments.outcome import job_of_folder
from swift.experiments.report import table_of
from swift.experiments.store import Store
from swift.experiments.types import Dependency, Job, JobSpec, Placement

MakeRun = Callable[..., Path]
SAMPLES = "eval/evaluate/samples.jsonl"


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Write a run folder as a training leaves it; ``answers``: exact match of each held-out row."""

    def make(
        name: str,
        losses: list[float] = [3.0, 2.0],  # noqa: B006 - only read
        eval_loss: float | None = None,
        answers: list[float] | None = None,
        state: str = "succeeded",
        **options: Any,
    ) -> Path:
        folder = tmp_path / "out" / name
        folder.mkdir(parents=True)
        rows: list[dict[str, Any]] = [
            {"step": 10 * n, "loss": loss, "num_tokens": 100 * n, "step_time": 0.5}
            for n, loss in enumerate(losses, 1)
        ]
        if eval_loss is not None:
            rows += [{"step": 10 * len(losses), "eval_loss": eval_loss, "eval_token_accuracy": 0.5}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = {
            "command": "sft",
            "tuner": {"tuner_type": "lora", **options},
            "explicit": ["run_name", *options],
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        status = {"state": state, "step": 10 * len(losses), "total_steps": 20, "message": "",
                  "pid": 1, "start_time": 0.0, "boot_id": "", "host": "elsewhere", "heartbeat_time": 0.0}  # fmt: skip
        (folder / "status.json").write_text(json.dumps(status))
        (folder / "summary.json").write_text(
            json.dumps({"steps": 10 * len(losses), "train_seconds": 7.5, "peak_memory_gib": 0.5})
        )
        if answers is not None:
            write_answers(folder / SAMPLES, answers)
        (folder / "checkpoint-20").mkdir()
        (folder / "checkpoint-20" / "state.json").write_text("{}")
        (folder / "last").symlink_to("checkpoint-20")
        return folder

    return make


def write_answers(path: Path, scores: list[float]) -> None:
    rows = [
        {
            "index": index, "key": f"{path}-{index}", "messages": [{"role": "user", "content": f"q{index}"}],
            "reference": "right", "response": "right" if score else "wrong", "finish_reason": "stop",
            "num_tokens": 2, "exact_match": score, "loss": 1.0 - score / 2, "num_loss_tokens": 2 + index,
        }
        for index, score in enumerate(scores)
    ]  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def job(name: str, run: Path, **changes: Any) -> Job:
    fields = {"run_dir": str(run), "parameters": {}, "estimate": {"memory_bytes": 1 << 30}}
    fields |= {key: changes.pop(key) for key in list(changes) if key in JobSpec.__dataclass_fields__}
    spec = JobSpec(name, name.partition("/")[0], **{"command": "sft", **fields})
    return Job(**{"id": f"j-{name}", "group": "g", "spec": spec, "state": "succeeded", **changes})


def test_everything_about_a_finished_experiment(make_run: MakeRun) -> None:
    run = make_run("a", [3.0, 1.5, 2.0], eval_loss=1.8, answers=[1.0, 0.0, 1.0, 1.0])
    retries = [{"reason": "out of memory: micro-batch 4 -> 2"}]
    place = Placement("cuda", (0, 1), 1, 1)
    training = job(
        "a", run, parameters={"lora_rank": 8}, started=100.0, ended=136.0, placement=place, retries=retries
    )
    evaluation = job(
        "a/evaluate",
        run,
        command="infer",
        run_dir=None,
        started=136.0,
        ended=172.0,
        retries=[{"kind": "crash"}],
    )
    sorry = job("a/sorry", run, command="doctor", run_dir=None, state="cancelled",
                after=[Dependency("a", "failure")])  # fmt: skip
    server = job("a/deploy", run, command="deploy", run_dir=None, state="running", started=136.0)
    comparison = collect([training, evaluation, sorry, server], now=1000.0)
    (row,) = comparison.to_dict()["rows"]
    assert row["parameters"] == {"lora_rank": 8}
    assert (row["last_loss"], row["best_loss"], row["best_loss_step"]) == (2.0, 1.5, 20)
    assert (row["eval_loss"], row["best_eval_loss"], row["eval_token_accuracy"]) == (1.8, 1.8, 0.5)
    assert row["evaluation"]["exact_match"] == 0.75
    assert row["evaluation"]["loss"] == pytest.approx((2 * 0.5 + 3 * 1.0 + 4 * 0.5 + 5 * 0.5) / 14)
    assert row["intervals"]["exact_match"] == {"mean": 0.75, "low": 0.25, "high": 1.0, "num_rows": 4}
    assert (row["num_tokens"], row["seconds"], row["wall_seconds"]) == (300, 7.5, 36.0)
    assert row["device_hours"] == pytest.approx((2 * 36 + 36) / 3600)
    assert (row["peak_memory_bytes"], row["estimated_memory_bytes"]) == (1 << 29, 1 << 30)
    assert row["retries"] == [{"job": "a", **retries[0]}]
    assert row["stage_retries"] == [{"job": "a/evaluate", "kind": "crash"}]
    assert row["failures"] == [], "a stage for failures that never came"
    assert row["finished"] and row["id"] == "j-a"


def test_the_smaller_eval_loss_wins_and_says_what_to_do_next(make_run: MakeRun) -> None:
    jobs = [job(name, make_run(name, eval_loss=loss)) for name, loss in (("a", 2.0), ("b", 1.0), ("c", 3.0))]
    comparison = collect(jobs)
    assert (comparison.metric, comparison.minimize) == ("eval_loss", True)
    assert [row.experiment for row in comparison.rows] == ["b", "a", "c"]
    assert comparison.winner is not None and comparison.winner.final
    last = f"{comparison.rows[0].run_dir}/last"
    assert comparison.winner.next_commands == [
        f"swift infer --adapters {last}", f"swift merge-lora --adapters {last}", "swift clone j-b"
    ]  # fmt: skip


def test_losses_of_different_kinds_name_no_winner(make_run: MakeRun) -> None:
    folders = [
        make_run("sft", eval_loss=2.0),
        make_run("dpo", eval_loss=0.6, rlhf_type="dpo"),
        make_run("rm", eval_loss=0.7, rlhf_type="rm"),
    ]
    jobs = [job_of_folder(folder) for folder in folders]
    comparison = collect(jobs)
    assert (
        comparison.winner is None
        and "losses of dpo, rm, sft are different quantities" in comparison.notes[-1]
    )
    asked = collect(jobs, metric="eval_token_accuracy")
    assert asked.winner is not None and "different quantities" not in str(asked.notes)
    alike = collect([jobs[1], job_of_folder(make_run("dpo-2", eval_loss=0.5, rlhf_type="dpo"))])
    assert alike.winner is not None and alike.winner.experiment == "dpo-2"
    of_rewards = collect([jobs[2]])
    assert of_rewards.winner is not None
    assert not any("swift infer" in command for command in of_rewards.winner.next_commands)


def test_a_declared_metric_decides_and_may_be_larger_is_better(make_run: MakeRun) -> None:
    jobs = [
        job("a", make_run("a", eval_loss=1.0, answers=[1.0] + [0.0] * 9)),
        job("b", make_run("b", eval_loss=2.0, answers=[1.0] * 10)),
    ]
    comparison = collect(jobs, declared=("exact_match", False))
    assert comparison.why == "the sweep's metric"
    assert comparison.winner is not None and comparison.winner.experiment == "b"
    assert comparison.winner.not_clearly_better_than == []
    gap = comparison.rows[1].against_best["exact_match"]
    assert gap.mean == pytest.approx(-0.9) and gap.high < 0 and gap.num_rows == 10
    assert collect(jobs, metric="eval_loss", declared=("exact_match", False)).rows[0].experiment == "a"


def test_equal_values_are_ordered_by_eval_loss(make_run: MakeRun) -> None:
    jobs = [job(n, make_run(n, eval_loss=loss, answers=[1.0, 1.0])) for n, loss in (("a", 2.0), ("b", 1.0))]
    assert [row.experiment for row in collect(jobs, metric="exact_match").rows] == ["b", "a"]


def test_few_experiments_stand_side_by_side_where_a_row_has_no_room(make_run: MakeRun) -> None:
    jobs = [
        job(
            name,
            make_run(name, [3.0, loss], eval_loss=loss, answers=[1.0, 0.0, loss]),
            parameters={"lora_rank": rank},
        )
        for name, loss, rank in (("a", 1.0, 4), ("b", 0.0, 8))
    ]
    columns = table_of(collect(jobs, metric="exact_match"))
    lines = table_lines(columns, None, "exact_match")
    assert len(lines) == 3 and len(lines[0]) > 120 and "same for all" not in lines[-1]
    lines = table_lines(columns, 60, "exact_match")
    assert max(map(len, lines[:-1])) <= 60
    assert lines[0].split() == ["experiment", "a", "b"]
    assert lines[1].split() == ["lora_rank", "4", "8"]
    assert lines[-1].startswith("same for all: state succeeded, ")
    assert not any(line.startswith("best_eval_loss") for line in lines), "the same as eval_loss"


def test_many_experiments_keep_what_decides(make_run: MakeRun) -> None:
    runs = [make_run(f"run-{n}", [3.0, n], eval_loss=float(n), answers=[1.0, n % 2]) for n in range(8)]
    columns = table_of(collect([job(run.name, run, parameters={"rank": run.name}) for run in runs]))
    lines = table_lines(columns, 60, "eval_loss")
    assert max(map(len, lines[:9])) <= 60 and len(lines) == 12
    assert {"experiment", "rank", "eval_loss"} <= set(lines[0].split()) and "rouge" not in lines[0]
    assert lines[-1].startswith("no room for eval_perplexity") or "--wide" in lines[-1]


def test_cut_answers_are_told(make_run: MakeRun) -> None:
    run = make_run("a", answers=[1.0, 0.0, 0.0, 0.0])
    text = (run / SAMPLES).read_text().replace('"stop"', '"length"', 1)
    (run / SAMPLES).write_text(text)
    (run / "eval/evaluate/results.json").write_text(
        json.dumps({"metrics": {"max_new_tokens": 22, "cut_off": 0.25}})
    )
    comparison = collect([job("a", run)])
    assert "answers cut off at 22 tokens (max_new_tokens): a 25%" in comparison.notes
    assert "max_new_tokens" not in comparison.rows[0].metrics()


def test_a_small_lead_on_few_rows_is_called_chance(make_run: MakeRun) -> None:
    jobs = [
        job("a", make_run("a", answers=[1.0, 0.0, 1.0, 0.0, 1.0, 1.0])),
        job("b", make_run("b", answers=[0.0, 1.0, 1.0, 0.0, 1.0, 0.0])),
    ]
    winner = collect(jobs, metric="exact_match").winner
    assert winner is not None
    assert (winner.experiment, winner.not_clearly_better_than) == ("a", ["b"])


def test_figures_of_programs_of_others_are_compared(make_run: MakeRun) -> None:
    """EvalScope and lm-eval leave no rows in our form, but means, and some of them intervals."""
    jobs = []
    for name, right in (("a", 0.25), ("b", 0.75)):
        run = make_run(name)
        interval = {"mean": right, "low": 0.1, "high": 0.9, "num_rows": 8}
        figures = {"acc": right, "f1": right / 2, "num_rows": 8, "intervals": {"acc": interval}}
        metrics = {"quiz.acc": right, "quiz.f1": right / 2}
        (run / "eval" / "evaluate").mkdir(parents=True)
        results = {"backend": "evalscope", "tasks": {"quiz": figures}, "metrics": metrics}
        (run / "eval" / "evaluate" / "results.json").write_text(json.dumps(results))
        jobs.append(job(name, run))
    comparison = collect(jobs, metric="quiz.f1")
    assert comparison.winner is not None and comparison.winner.experiment == "b"
    assert [row.value("quiz.f1") for row in comparison.rows] == [0.375, 0.125]
    assert comparison.rows[0].evaluation["num_rows"] == 8
    cells = {column.title: column.cells for column in table_of(comparison)}
    assert cells["quiz.f1"] == ["0.375", "0.125"]
    assert cells["quiz.acc"][0].startswith("0.75 [0.1, 0.9")
    lines = table_lines(table_of(comparison), 30, "quiz.f1")
    assert "quiz.acc" in lines[-1] and "quiz.f1" in "".join(lines[:-1])


def test_pairs_are_the_shared_rows_only(make_run: MakeRun) -> None:
    jobs = [
        job("a", make_run("a", answers=[1.0] * 5)),
        job("b", make_run("b", answers=[0.0] * 3)),
    ]
    comparison = collect(jobs, metric="exact_match")
    assert comparison.rows[1].against_best["exact_match"].num_rows == 3
    assert any("same number of rows" in note for note in comparison.notes)


def test_running_jobs_with_missing_and_cut_files(make_run: MakeRun, tmp_path: Path) -> None:
    running = make_run("running", eval_loss=0.1, state="running")
    (running / "summary.json").unlink()
    with (running / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "los')
    write_answers(running / SAMPLES, [1.0, 1.0, 0.0])
    with (running / SAMPLES).open("a") as file:
        file.write('{"index": 3, "resp')
    done = make_run("done", eval_loss=2.0)
    comparison = collect(
        [
            job("queued", tmp_path / "out" / "queued", state="queued"),
            job("running", running, state="running", started=90.0),
            job("done", done),
        ],
        now=100.0,
    )
    assert [row.experiment for row in comparison.rows] == ["done", "running", "queued"]
    assert comparison.winner is not None
    assert (comparison.winner.experiment, comparison.winner.final) == ("done", False)
    assert comparison.num_finished == 1
    middle, last = comparison.rows[1:]
    assert (middle.step, middle.wall_seconds, middle.problems) == (20, 10.0, [])
    assert middle.seconds == 10.0  # 20 steps of 0.5 s
    assert middle.evaluation["num_rows"] == 3
    assert (last.last_loss, last.step, last.evaluation) == (None, None, {})
    json.dumps(comparison.to_dict(curves=True), allow_nan=False)


def test_broken_files_are_named_and_stop_nothing(make_run: MakeRun) -> None:
    run = make_run("a")
    (run / "metrics.jsonl").write_text("what?\n")
    (run / "config.yaml").write_text("a: [")
    write_answers(run / SAMPLES, [])
    (run / SAMPLES).write_text('{"index": 0}\n')
    (row,) = collect([job("a", run)]).rows
    assert [name in " ".join(row.problems) for name in ("metrics.jsonl", "config.yaml", "samples.jsonl")] == [
        True
    ] * 3


def test_a_failed_run_does_not_win(make_run: MakeRun) -> None:
    failed = job("a", make_run("a", eval_loss=0.1), state="failed", reason="loss is nan", exit_code=1)
    assert collect([failed]).winner is None
    comparison = collect([failed, job("b", make_run("b", eval_loss=2.0))])
    assert comparison.winner is not None and comparison.winner.experiment == "b"
    assert comparison.rows[1].failures == [
        {"job": "a", "state": "failed", "exit_code": 1, "reason": "loss is nan"}
    ]


def test_nothing_to_judge_yet(tmp_path: Path) -> None:
    comparison = collect([job("a", tmp_path / "a", state="queued")])
    assert comparison.winner is None
    assert comparison.to_dict()["rows"][0]["value"] is None


def test_times_of_all_attempts_come_from_the_service_folder(make_run: MakeRun, tmp_path: Path) -> None:
    import os

    home = Home.find(tmp_path / "home")
    for attempt, (begin, end) in enumerate([(100.0, 130.0), (200.0, 260.0)], 1):
        folder = home.attempt_dir("j-a", attempt)
        folder.mkdir(parents=True)
        (folder / "supervisor.json").write_text("{}")
        os.utime(folder / "supervisor.json", (begin, begin))
        (folder / "exit.json").write_text(json.dumps({"ended": end}))
    folder = home.attempt_dir("j-a", 3)
    folder.mkdir()
    (folder / "supervisor.json").write_text("{}")  # lost with the machine, last heard of after 5 s
    os.utime(folder / "supervisor.json", (300.0, 300.0))
    (folder / "heartbeat").touch()
    os.utime(folder / "heartbeat", (305.0, 305.0))
    again = job(
        "a", make_run("a"), started=300.0, ended=305.0, attempt=3, placement=Placement("cuda", (0, 1), 1, 1)
    )
    comparison = collect([again], home=home)
    (row,) = comparison.rows
    assert (row.wall_seconds, row.device_seconds) == (95.0, 190.0)
    assert next(column.cells for column in table_of(comparison) if column.title == "time") == ["1m35s"]


def test_plain_run_folders_differ_in_what_was_set(make_run: MakeRun) -> None:
    runs = [make_run(name, [3.0, loss], lora_rank=rank, lora_alpha=16) for name, loss, rank in
            (("a", 2.0, 4), ("b", 1.0, 32))]  # fmt: skip
    comparison = collect([job_of_folder(run) for run in runs])
    assert comparison.metric == "loss"
    assert [row.parameters for row in comparison.rows] == [{"lora_rank": 32}, {"lora_rank": 4}]
    assert comparison.winner is not None
    assert comparison.winner.next_commands[-1] == f"swift sft {runs[1]}/config.yaml --run_name b-2"


def test_runs_of_one_name_are_told_apart(make_run: MakeRun) -> None:
    runs = [make_run("x/a", [2.0]), make_run("y/a", [1.0]), make_run("b", [3.0])]
    comparison = collect([job_of_folder(run) for run in runs])
    assert [row.experiment for row in comparison.rows] == ["y/a", "x/a", "b"]
    again = collect([job("a", runs[0], group="one"), job("a", runs[1], group="two")])
    assert [row.experiment for row in again.rows] == ["two/a", "one/a"]


def test_a_killed_run_is_failed_and_a_stopped_one_paused(make_run: MakeRun) -> None:
    assert job_of_folder(make_run("a", state="running")).state == "failed"
    assert job_of_folder(make_run("b", state="stopped")).state == "paused"


def test_an_unknown_metric_names_the_nearest(make_run: MakeRun) -> None:
    with pytest.raises(UsageError, match="did you mean eval_loss"):
        collect([job("a", make_run("a", eval_loss=1.0))], metric="eval_los")


def test_csv_has_a_column_for_every_parameter(make_run: MakeRun) -> None:
    jobs = [
        job(name, make_run(name), parameters={"lora_rank": rank}) for name, rank in (("a", 4), ("b,c", 8))
    ]
    rows = list(csv.DictReader(io.StringIO(collect(jobs).to_csv())))
    assert [(row["experiment"], row["parameters.lora_rank"], row["last_loss"]) for row in rows] == [
        ("a", "4", "2.0"),
        ("b,c", "8", "2.0"),
    ]


SWEEP = """
name: ranks
defaults: {model: m, dataset: [d], val_dataset: [v]}
sweep: {parameters: {lora_rank: [4, 8]}, metric: exact_match}
"""


@pytest.fixture
def submitted(make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two trials in the store, the second better by the sweep's metric; their run folders."""
    runs = [
        make_run("trial-01", eval_loss=1.0, answers=[0.0] * 8),
        make_run("trial-02", eval_loss=2.0, answers=[1.0] * 8),
    ]
    monkeypatch.setenv("SWIFT_HOME", str(tmp_path / "home"))
    specs = []
    for rank, run in zip((4, 8), runs, strict=True):
        specs.append(JobSpec(run.name, run.name, "sft", run_dir=str(run), parameters={"lora_rank": rank}))
        specs.append(JobSpec(f"{run.name}/evaluate", run.name, "infer", after=[Dependency(run.name)]))
    store = Store(Home.find().store)
    store.add_group("ranks", SWEEP, specs)
    for entry in store.jobs():
        if entry.state == "waiting":
            store.transition(entry.id, "waiting", "queued", "")
        store.transition(entry.id, "queued", "starting", "")
        store.transition(entry.id, "starting", "succeeded", "")
    store.close()
    return runs


def test_the_command_reads_the_store_without_a_service(
    submitted: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", "ranks", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["name"], shown["metric"], shown["winner"]["experiment"]) == (
        "ranks",
        "exact_match",
        "trial-02",
    )
    assert [row["parameters"] for row in shown["rows"]] == [{"lora_rank": 8}, {"lora_rank": 4}]
    assert main(["compare"]) == 0
    table = capsys.readouterr().out
    assert table.splitlines()[1].startswith("trial-02") and "winner: trial-02" in table
    assert main(["compare", "j2", "--csv"]) == 0
    assert [line.split(",")[1] for line in capsys.readouterr().out.splitlines()] == ["experiment", "trial-01"]


def test_the_command_compares_a_folder_of_runs_that_were_never_queued(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SWIFT_HOME", str(tmp_path / "home"))
    runs = [make_run("a", [2.0]), make_run("b", [1.0])]
    for words in ([str(runs[0].parent)], [str(runs[0]), str(runs[1])]):
        assert main(["compare", *words, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["winner"]["experiment"] == "b"
    assert not (tmp_path / "home" / "store.sqlite3").exists()


def test_the_command_refuses_what_names_nothing(
    submitted: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", "rank"]) == 2
    assert "did you mean ranks?" in capsys.readouterr().err
