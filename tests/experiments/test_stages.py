"""What follows an experiment: stages as jobs in a graph."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from swift.config.bind import resolve
from swift.core.errors import ConfigError
from swift.experiments.expand import expand
from swift.experiments.file import parse_experiments
from swift.experiments.submit_checks import find_circle
from swift.experiments.types import JobSpec


@pytest.fixture
def work(tmp_path: Path, tiny_model_dir: Path) -> Path:
    (tmp_path / "model").symlink_to(tiny_model_dir)
    row = json.dumps({"query": "What is one plus one?", "response": "2"})
    (tmp_path / "train.jsonl").write_text((row + "\n") * 8)
    (tmp_path / "val.jsonl").write_text((row + "\n") * 2)
    return tmp_path


def jobs_of(work: Path, **entries: Any) -> dict[str, JobSpec]:
    defaults = {
        "model": "model",
        "dataset": "train.jsonl",
        "val_dataset": "val.jsonl",
        "device": "cpu",
        "max_steps": 2,
    }
    entries["defaults"] = {**defaults, "output_dir": "out", **entries.pop("more", {})}
    entries.setdefault("experiments", {"a": {}})
    return {spec.name: spec for spec in expand(parse_experiments(entries), work)}


def needs(job: JobSpec) -> list[tuple[str, str]]:
    return [(need.job, need.condition) for need in job.after]


def test_evaluation_follows_by_itself(work: Path) -> None:
    jobs = jobs_of(work)
    assert list(jobs) == ["a", "a/evaluate"]
    job = jobs["a/evaluate"]
    run = str(work / "out" / "a")
    assert (job.command, job.experiment, job.run_dir, needs(job)) == ("eval", "a", None, [("a", "success")])
    assert job.options["adapters"] == [run]
    assert job.options["eval_output_dir"] == f"{run}/eval/evaluate"
    assert job.options["metric"] == ["exact_match", "rouge", "loss"]
    assert job.estimate["memory_bytes"] > jobs["a"].estimate["parameters"] * 4
    resolve("eval", values=job.options)


@pytest.mark.parametrize(
    "entries",
    [{"evaluate": False}, {"more": {"evaluate": False}}, {"experiments": {"a": {"evaluate": "no"}}}],
)
def test_evaluation_can_be_left_out(work: Path, entries: dict[str, Any]) -> None:
    assert list(jobs_of(work, **entries)) == ["a"]


def test_no_evaluation_without_validation_data_or_questions(work: Path) -> None:
    assert list(jobs_of(work, more={"val_dataset": []})) == ["a"]
    assert list(jobs_of(work, more={"command": "pt"})) == ["a"]


def test_full_training_is_evaluated_as_a_model_and_not_merged(work: Path) -> None:
    after = ["merge", {"name": "ask", "command": "infer", "model": "{merged}", "needs": "merge"}]
    jobs = jobs_of(work, after=after, experiments={"a": {}, "full": {"tuner_type": "full"}})
    assert list(jobs) == ["a", "a/evaluate", "a/merge", "a/ask", "full", "full/evaluate"]
    assert jobs["full/evaluate"].options["model"] == str(work / "out" / "full")
    with pytest.raises(ConfigError, match="experiment full: there is no adapter that can be merged"):
        jobs_of(work, experiments={"full": {"tuner_type": "full", "after": ["merge"]}})


def test_a_graph(work: Path) -> None:
    after = {
        "evaluate": {"max_new_tokens": 8, "resources": {"memory": "1GiB"}},
        "merge": {"needs": "evaluate"},
        "ask": {"command": "infer", "model": "{merged}", "needs": ["merge"], "ENV": {"X": 1}},
        "tell": {"command": "doctor", "when": "failure", "words": ["--json"]},
        "always": {
            "command": "data",
            "words": ["check", "{run}/{name}.jsonl"],
            "when": "always",
            "needs": ["ask", "merge"],
        },
    }
    jobs = jobs_of(work, after=after)
    assert list(jobs) == ["a", *(f"a/{name}" for name in after)]
    run = work / "out" / "a"
    assert needs(jobs["a/merge"]) == [("a/evaluate", "success")]
    assert needs(jobs["a/tell"]) == [("a", "failure")]
    assert needs(jobs["a/always"]) == [("a/ask", "always"), ("a/merge", "always")]
    assert jobs["a/evaluate"].options["max_new_tokens"] == 8
    assert jobs["a/evaluate"].needs.memory_bytes == 1 << 30
    assert jobs["a/merge"].options["output_dir"] == str(run / "merged")
    assert jobs["a/ask"].options["model"] == str(run / "merged") and "adapters" not in jobs["a/ask"].options
    assert jobs["a/ask"].env == {"X": "1"}
    assert jobs["a/always"].words == ["check", f"{run}/a.jsonl"]
    assert jobs["a/tell"].estimate == {"memory_bytes": 1 << 30}  # not a whole device for want of a figure
    for name in ("a/evaluate", "a/merge", "a/ask"):
        resolve(jobs[name].command, values=jobs[name].options)


def test_export_follows_the_run_or_what_was_merged(work: Path) -> None:
    after = {
        "merge": {"needs": "evaluate"},
        "export": {"quant_method": "bnb", "needs": "merge", "model": "{merged}"},
        "evaluate": {},
        "small": {"command": "export", "quant_method": "gptq", "parity_dataset": "val.jsonl"},
        "ask": {"command": "infer", "model": "{exported}", "needs": "export"},
    }
    jobs = jobs_of(
        work, after=after, experiments={"a": {}, "full": {"tuner_type": "full", "after": {"merge": False}}}
    )
    run = work / "out" / "a"
    job = jobs["a/export"]
    assert (job.command, needs(job)) == ("export", [("a/merge", "success")])
    assert job.options["model"] == str(run / "merged") and job.options["output_dir"] == str(run / "exported")
    assert job.estimate["memory_bytes"] > jobs["a"].estimate["parameters"] * 4
    small = jobs["a/small"].options
    assert small["adapters"] == [str(run)] and small["output_dir"] == str(run / "small")
    assert small["parity_dataset"] == [str(work / "val.jsonl")]
    assert jobs["a/ask"].options["model"] == str(run / "exported")
    for name in ("a/export", "a/small", "a/ask"):
        resolve(jobs[name].command, values=jobs[name].options)


def test_training_after_training_has_a_run_of_its_own(work: Path) -> None:
    stage = {
        "name": "more",
        "command": "sft",
        "model": "{merged}",
        "dataset": "train.jsonl",
        "needs": "merge",
    }
    jobs = jobs_of(work, after=["merge", stage])
    assert jobs["a/more"].run_dir == str(work / "out" / "a-more")
    assert jobs["a/more"].options["model"] == str(work / "out" / "a" / "merged")


def test_an_experiment_changes_and_drops_stages(work: Path) -> None:
    after = {"evaluate": {"max_new_tokens": 8}, "merge": {"needs": "evaluate"}}
    own = {"evaluate": {"max_new_tokens": 99}}
    jobs = jobs_of(
        work, after=after, experiments={"a": {"after": own}, "b": {"after": {"merge": False}}, "c": {}}
    )
    assert jobs["a/evaluate"].options["max_new_tokens"] == 99
    assert [name for name in jobs if name[0] == "b"] == ["b", "b/evaluate"]
    assert [name for name in jobs if name[0] == "c"] == ["c", "c/evaluate", "c/merge"]


@pytest.mark.parametrize(
    ("after", "says", "fix"),
    [
        ([["merge"]], "is not a stage", None),
        (["evalute"], "unknown stage 'evalute'", "did you mean evaluate?"),
        (["export"], "stage export: nothing to do", "--quant_method"),
        (
            [{"export": {"quant_method": "gptq", "quant_bits": 3}}],
            "gptq stores 4 or 8 bits, not 3",
            "quant_bits",
        ),
        (["rollout"], "the stage rollout comes with a later version", "leave it out"),
        (["merge", "merge"], "two stages are called merge", "name"),
        ([{"evaluate": {"needs": "merg"}}, "merge"], "needs merg, which is no stage", "did you mean merge?"),
        (
            {"merge": {"needs": "evaluate"}, "evaluate": {"needs": "merge"}},
            "merge -> evaluate -> merge",
            "remove",
        ),
        ({"merge": {"when": "sucess"}}, "'sucess' is not one of", "did you mean success?"),
        ({"merge": {"lora_rank": 8}}, "stage merge: not used by swift merge-lora", None),
        ([{"when": "always"}], "unknown stage 'when'", None),
        ([3], "unknown stage '3'", None),
        ([{"name": "a b", "command": "infer"}], "cannot be the name of a stage", "letters"),
    ],
)
def test_complaints(work: Path, after: Any, says: str, fix: str | None) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        jobs_of(work, after=after)
    assert "experiments:" in (caught.value.where or "")
    assert fix is None or fix in (caught.value.fix or "")


def test_evaluation_asked_for_needs_data(work: Path) -> None:
    with pytest.raises(ConfigError, match="a, stage evaluate: missing"):
        jobs_of(work, after=["evaluate"], more={"val_dataset": []})


def test_circles_are_named_whatever_the_graph() -> None:
    assert find_circle({"a": ["b", "c"], "b": ["c"], "c": []}) == []
    assert find_circle({"x": ["a"], "a": ["b"], "b": ["c"], "c": ["a"]}) == ["a", "b", "c", "a"]
    assert find_circle({"a": ["a"]}) == ["a", "a"]
    chain = {str(i): [str(i + 1)] for i in range(1500)}
    assert find_circle(chain) == []
    assert find_circle({**chain, "1500": ["1498"]}) == ["1498", "1499", "1500", "1498"]
