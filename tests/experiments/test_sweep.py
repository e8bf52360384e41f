"""Grids, random search, and the controller that learns from its trials and survives a kill."""

from __future__ import annotations

import importlib.util
import json
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from swift.core.errors import ConfigError, SwiftError
from swift.experiments.expand import expand
from swift.experiments.file import ExperimentFile, parse_experiments
from swift.experiments.search_space import candidates
from swift.experiments.sweep_controller import SweepController, metric_of
from swift.runs.metrics import MetricsLog


@pytest.fixture
def work(tmp_path: Path, tiny_model_dir: Path) -> Path:
    (tmp_path / "model").symlink_to(tiny_model_dir)
    row = json.dumps({"query": "What is one plus one?", "response": "2"})
    (tmp_path / "train.jsonl").write_text((row + "\n") * 8)
    return tmp_path


LINE = {"min": 0.0, "max": 0.4}


def file_of(parameters: dict[str, Any] | None = None, **sweep: Any) -> ExperimentFile:
    defaults = {
        "model": "model",
        "dataset": "train.jsonl",
        "split_dataset_ratio": 0.2,
        "device": "cpu",
        "max_steps": 2,
    }
    sweep["parameters"] = parameters or {"lora_dropout": LINE}
    return parse_experiments({"defaults": defaults, "sweep": sweep})


def test_grid(work: Path) -> None:
    jobs = expand(file_of({"lr": ["1e-4", 3e-4], "lora_rank": {"min": 4, "max": 12, "step": 4}}), work)
    assert [job.name for job in jobs] == [f"trial-0{number}" for number in range(1, 7)]
    assert [(job.parameters["learning_rate"], job.parameters["lora_rank"]) for job in jobs] == [
        (rate, rank) for rate in (1e-4, 3e-4) for rank in (4, 8, 12)
    ]
    assert jobs[0].options["learning_rate"] == 1e-4
    assert jobs[5].run_dir == str(work / "output" / "trial-06")


@pytest.mark.parametrize(
    ("metric", "minimize"),
    [("eval_loss", True), ("mae", True), ("eval_rewards_rejected", True), ("rougeL", False)],
)
def test_which_way_is_better_follows_from_the_metric(metric: str, minimize: bool) -> None:
    sweep = file_of({"lora_rank": [4, 8]}, metric=metric).sweep
    assert sweep is not None and sweep.minimize == minimize


def test_words_and_lists_as_choices(work: Path) -> None:
    jobs = expand(
        file_of({"target_modules": [["q_proj"], ["q_proj", "v_proj"]], "packing": [True, False]}), work
    )
    assert [job.parameters["target_modules"] for job in jobs][::2] == [["q_proj"], ["q_proj", "v_proj"]]
    assert [job.parameters["packing"] for job in jobs] == [True, False, True, False]


def test_random_is_decided_by_the_seed() -> None:
    parameters = {
        "learning_rate": {"min": "1e-5", "max": "1e-3", "log": True},
        "lora_rank": {"min": 2, "max": 64},
    }
    draw = [
        list(candidates(file_of(parameters, method="random", trials=50, seed=seed).sweep))
        for seed in (1, 1, 2)
    ]
    assert draw[0] == draw[1] != draw[2]
    assert all(1e-5 <= point["learning_rate"] <= 1e-3 and 2 <= point["lora_rank"] <= 64 for point in draw[0])
    below = sum(point["learning_rate"] < 1e-4 for point in draw[0])
    assert 12 < below < 38  # half of a logarithmic scale lies below its middle
    few = list(candidates(file_of({"lora_rank": [1, 2, 3]}, method="random", trials=3).sweep))
    assert sorted(point["lora_rank"] for point in few) == [1, 2, 3]


@pytest.mark.parametrize(
    ("parameters", "sweep", "says", "fix"),
    [
        ({"lora_rnk": [1]}, {}, "unknown option", "did you mean lora_rank?"),
        ({"lora_rank": ["many"]}, {}, "'many' is not an integer", None),
        ({"lora_rank": 8}, {}, "neither a list nor a range", "list"),
        ({"lora_rank": []}, {}, "has no values", None),
        ({"lora_rank": [8, 8]}, {}, "stands twice", None),
        ({"lora_rank": {"min": 8, "max": 4, "step": 1}}, {}, "min 8 is not below max 4", None),
        ({"lora_rank": {"min": 8}}, {}, "needs min and max", None),
        ({"lora_rank": {"min": 1, "max": 4}}, {}, "a grid needs values", "random"),
        (
            {"lora_dropout": {"min": 0, "max": 1, "log": True}},
            {"method": "random", "trials": 2},
            "above 0",
            None,
        ),
        ({"lora_rank": [1], "lora-rank": [2]}, {}, "same option", None),
        ({"max_steps": [1], "output_dir": ["a", "b"]}, {}, "names the folders", None),
        ({"lora_rank": [1]}, {"method": "tpe"}, "needs a number of trials", "trials: 20"),
        ({"lora_rank": [1, 2]}, {"trials": 9}, "this grid has 2 points", "random"),
        ({"lora_rank": [1]}, {"method": "bayes"}, "'bayes' is not one of grid, random, tpe", None),
        ({"lora_rank": [1]}, {"metric": "rouge"}, "unknown metric 'rouge'", "did you mean rouge"),
        ({"lora_rank": [1]}, {"metric": "rougeL"}, "comes from the stage evaluate", "after"),
        ({"lora_rank": [1]}, {"early_stop": "hyperband"}, "needs max_steps", "max_steps: 100"),
        ({"lora_rank": [1]}, {"early_stop": {"method": "asha", "min_step": 3}}, "unknown key", "min_steps"),
        ({"lora_rank": [1]}, {"base": "x"}, "no experiment 'x'", None),
    ],
)
def test_complaints(
    work: Path, parameters: dict[str, Any], sweep: dict[str, Any], says: str, fix: str | None
) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        expand(file_of(parameters, **sweep), work)
    assert "experiments:" in (caught.value.where or "")
    assert fix is None or fix in (caught.value.fix or "")


def test_controlled_sweeps_are_checked_at_submit(work: Path) -> None:
    assert expand(file_of(method="tpe", trials=3), work) == []
    with pytest.raises(ConfigError, match="must be less than 1"):
        expand(file_of({"lora_dropout": {"min": 0.0, "max": 2.0}}, method="tpe", trials=3), work)


def play(controller: SweepController, trials: int) -> list[float]:
    """Trials one after another, judged by a bowl with its bottom at 0.3."""
    values = []
    for _ in range(trials):
        (job,) = controller.next_specs(1, known=controller.running)
        values.append(job.parameters["lora_dropout"])
        controller.finish(job.experiment, (values[-1] - 0.3) ** 2)
    return values


def test_tpe_learns_and_goes_on_after_a_kill_as_if_nothing_happened(work: Path) -> None:
    file = file_of(method="tpe", trials=30, seed=3)
    whole = SweepController(file, work / "whole", work)
    values = play(whole, 30)
    assert whole.done and whole.next_specs(5) == []
    assert sum(abs(value - 0.3) for value in values[20:]) < sum(abs(value - 0.3) for value in values[:10]) / 2
    assert min(abs(row["values"]["lora_dropout"] - 0.3) for row in whole.results()) < 0.05
    first = SweepController(file, work / "killed", work)
    before = play(first, 17)
    first.close()
    with (work / "killed" / "trials.jsonl").open("a") as log:
        log.write('{"event": "ask", "tri')  # the kill came in the middle of a line
    again = SweepController.open(work / "killed")
    assert before + play(again, 13) == values
    assert again.results() == whole.results()


def test_jobs_lost_between_asking_and_storing_are_given_again(work: Path) -> None:
    file = file_of(method="tpe", trials=4, parallel=2)
    controller = SweepController(file, work / "sweep", work)
    asked = controller.next_specs(2)
    controller.close()
    again = SweepController.open(work / "sweep")
    assert again.next_specs(0, known=["trial-01"]) == [job for job in asked if job.name == "trial-02"]
    assert again.next_specs(9, known=["trial-01", "trial-02"]) == []  # two at a time
    again.finish("trial-02", None)
    assert [job.name for job in again.next_specs(9, known=again.running)] == ["trial-03"]
    assert [row["state"] for row in again.results()] == ["running", "failed", "running"]


def test_early_stop_gives_up_what_falls_behind(work: Path) -> None:
    early = {"method": "median", "startup_trials": 2, "warmup_steps": 5}
    file = file_of({"lora_rank": [1, 2, 3, 4]}, early_stop=early, parallel=4)
    controller = SweepController(file, work / "sweep", work)
    jobs = controller.next_specs(9)
    assert [job.parameters["lora_rank"] for job in jobs] == [1, 2, 3, 4]
    for name in ("trial-01", "trial-02"):
        assert [controller.report(name, step, 1.0) for step in (4, 10)] == ["continue", "continue"]
        controller.finish(name, 1.0)
    assert controller.report("trial-03", 4, 9.0) == "continue"  # still warming up
    assert (
        controller.report("trial-03", 4, 0.0) == "continue"
    )  # a resumed run says a step again: the first counts
    assert controller.report("trial-03", 10, 9.0) == "stop"
    assert controller.report("trial-04", 10, 0.5) == "continue"
    assert controller.report("trial-04", 11, float("nan")) == "continue"
    controller.finish("trial-03", 9.0, "stopped")
    controller.close()
    again = SweepController.open(work / "sweep")
    assert again.report("trial-03", 15, 0.0) == "stop"
    assert not again.should_stop("trial-04")
    again.finish("trial-04", 0.5)
    again.finish("trial-04", 7.0)  # said twice: nothing happens
    assert again.results()[3]["value"] == 0.5


@pytest.mark.parametrize("early", ["asha", {"method": "hyperband", "max_steps": 9, "min_steps": 1}])
def test_other_pruners_stop_the_worst(work: Path, early: Any) -> None:
    file = file_of({"lora_rank": list(range(1, 10))}, early_stop=early)
    controller = SweepController(file, work / "sweep", work)
    stopped = set()
    for job in controller.next_specs(9):
        for step in range(1, 10):
            if controller.report(job.name, step, float(job.parameters["lora_rank"])) == "stop":
                stopped.add(job.name)
                controller.finish(job.name, None, "stopped")
                break
        else:
            controller.finish(job.name, float(job.parameters["lora_rank"]))
    assert "trial-01" not in stopped and len(stopped) >= 4


def write_results(run: Path, metrics: dict[str, float]) -> None:
    (run / "eval" / "evaluate").mkdir(parents=True)
    (run / "eval" / "evaluate" / "results.json").write_text(json.dumps({"metrics": metrics}))


def test_where_the_metric_comes_from(work: Path) -> None:
    run = work / "run"
    run.mkdir()
    assert metric_of(run, "eval_loss") is None and metric_of(run, "rougeL") is None
    rows = [{"step": 1, "eval_loss": 2.0}, {"step": 2, "loss": 0.1}, {"step": 3, "eval_loss": 1.5}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_results(run, {"rougeL": 0.25, "loss": 9.0})
    assert [metric_of(run, name) for name in ("eval_loss", "loss", "rougeL")] == [1.5, 0.1, 0.25]
    assert metric_of(run, "evaluation.loss") == 9.0


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_a_metric_that_is_not_finite_is_none(work: Path, number: float) -> None:
    with closing(MetricsLog(work / "metrics.jsonl")) as log:
        log.append({"step": 1, "loss": 2.0, "eval_loss": 1.0})
        log.append({"step": 2, "loss": 1.5, "eval_loss": number})
        log.append({"step": 3, "loss": None})
    write_results(work, {"rougeL": number, "bleu": 0.5})
    found = [metric_of(work, name) for name in ("eval_loss", "rougeL", "loss", "bleu")]
    assert found == [None, None, 1.5, 0.5]
    (work / "metrics.jsonl").write_text(json.dumps({"step": 1, "eval_loss": number}) + "\n")
    assert metric_of(work, "eval_loss") is None


def test_folder_of_another_sweep_and_missing_optuna(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    SweepController(file_of(method="tpe", trials=3), work / "sweep", work).close()
    with pytest.raises(SwiftError, match="belongs to another sweep"):
        SweepController(file_of(method="tpe", trials=4), work / "sweep", work)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(SwiftError, match="needs Optuna") as caught:
        SweepController(file_of(method="tpe", trials=3), work / "new", work)
    assert "swift-forge[sweep]" in (caught.value.fix or "")


def test_missing_optuna_is_said_at_submit(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs Optuna"):
        expand(file_of(method="tpe", trials=3), work)
    assert len(expand(file_of({"lora_rank": [2, 4]}), work)) == 2
