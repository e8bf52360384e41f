"""Files of experiments: what they say, what is wrong with them (file and line), and the jobs they become."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from swift.config.bind import resolve
from swift.core.errors import ConfigError, SwiftError, UsageError
from swift.core.format import parse_size
from swift.core.process import ProcessIdentity
from swift.experiments.estimator import changed_data
from swift.experiments.expand import expand, single
from swift.experiments.fields import parse_duration
from swift.experiments.file import is_experiment_file, parse_experiments, read_experiments
from swift.experiments.types import JobSpec, Needs


@pytest.fixture
def work(tmp_path: Path, tiny_model_dir: Path) -> Path:
    (tmp_path / "model").symlink_to(tiny_model_dir)
    for name, count in (("train", 24), ("val", 4)):
        rows = [{"query": f"What is {i} plus one?", "response": str(i + 1)} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


DEFAULTS: dict[str, Any] = {
    "model": "model",
    "dataset": ["train.jsonl"],
    "device": "cpu",
    "max_steps": 3,
    "output_dir": "out",
}


def jobs_of(work: Path, **entries: Any) -> dict[str, JobSpec]:
    entries.setdefault("defaults", DEFAULTS)
    return {spec.name: spec for spec in expand(parse_experiments(entries), work)}


def complaint(work: Path, text: str) -> ConfigError:
    file = work / "e.yaml"
    file.write_text(text)
    with pytest.raises(SwiftError) as caught:
        expand(read_experiments(file), work)
    assert isinstance(caught.value, ConfigError)
    return caught.value


def test_sizes_and_times() -> None:
    assert [parse_size(text) for text in ("8GiB", "8G", "500 MB", "1.5KiB", "123", "7b")] == [
        8 << 30, 8 << 30, 500_000_000, 1536, 123, 7,
    ]  # fmt: skip
    assert [parse_size(text) for text in ("eight", "8 apples", "-1G", "")] == [None] * 4
    assert [parse_duration(text) for text in ("2h30m", "45m", "90s", "1d", "90", "1h 5s", "0.5s")] == [
        9000, 2700, 90, 86400, 90, 3605, 0.5,
    ]  # fmt: skip
    assert [parse_duration(text) for text in ("soon", "2:30", "", "h")] == [None] * 4


def test_one_job_for_each_experiment(work: Path) -> None:
    jobs = jobs_of(work, experiments={"a": {"lora-rank": 4}, "b": {"tuner": {"lora_rank": 16}}, "c": {}})
    assert list(jobs) == ["a", "b", "c"]
    assert jobs["a"].run_dir == str(work / "out" / "a")
    assert jobs["a"].options["model"] == str(work / "model")
    assert jobs["a"].options["dataset"] == [str(work / "train.jsonl")]
    assert [job.parameters for job in jobs.values()] == [
        {"lora_rank": 4},
        {"lora_rank": 16},
        {"lora_rank": 8},
    ]
    assert jobs["a"].estimate["steps"] == 3
    assert jobs["a"].estimate["memory_bytes"] > 100_000
    assert jobs["a"].code_version.startswith("0.")
    assert JobSpec.from_dict(json.loads(json.dumps(jobs["a"].to_dict()))) == jobs["a"]


def test_the_snapshot_resolves_to_the_same_options(work: Path) -> None:
    job = jobs_of(work, experiments={"a": {"val_dataset": "val.jsonl", "learning_rate": "1e-3"}})["a"]
    again = resolve("sft", values=job.options)
    assert again.config.training.learning_rate == 1e-3
    assert again.config.checkpoint.run_name == "a"
    assert again.config.evaluation.eval_strategy == "steps"


def test_rows_of_a_file_stay_with_its_name(work: Path) -> None:
    jobs = jobs_of(work, experiments={"a": {"dataset": "train.jsonl#5"}})
    assert jobs["a"].options["dataset"] == [str(work / "train.jsonl") + "#5"]
    assert [record["path"] for record in jobs["a"].fingerprints] == [str(work / "train.jsonl")]


def test_an_override_replaces_what_it_makes_pointless(work: Path) -> None:
    defaults = {**DEFAULTS, "lora_rank": 4, "warmup_steps": 1}
    jobs = jobs_of(
        work, defaults=defaults, experiments={"lora": {}, "full": {"tuner_type": "full", "warmup_ratio": 0.5}}
    )
    assert jobs["lora"].options["lora_rank"] == 4
    assert "lora_rank" not in jobs["full"].options and "warmup_steps" not in jobs["full"].options
    assert "lora_rank" not in jobs["full"].parameters
    assert jobs["full"].parameters["tuner_type"] == "full"


def test_a_contradiction_within_one_experiment_stays_one(work: Path) -> None:
    with pytest.raises(ConfigError, match="experiment a: has no effect with tuner_type full"):
        jobs_of(work, experiments={"a": {"tuner_type": "full", "lora_rank": 4}})


def test_resources(work: Path) -> None:
    resources = {"memory": "8GiB", "time_limit": "2h30m", "max_parallel": 2, "devices": "auto"}
    jobs = jobs_of(
        work,
        resources=resources,
        experiments={
            "a": {},
            "b": {"resources": {"priority": 5, "threads": 2, "exclusive": True, "cold": True}},
        },
    )
    assert jobs["a"].needs == Needs(1, 8 << 30, None, 9000.0)
    assert jobs["b"].needs == Needs(1, 8 << 30, 2, 9000.0, True)
    assert (jobs["a"].priority, jobs["b"].priority) == (0, 5)
    assert (jobs["a"].max_parallel, jobs["b"].cold) == (2, True)


def test_variables_go_to_the_jobs_only(work: Path) -> None:
    jobs = jobs_of(work, ENV={"SWIFT_TEST_X": 1}, experiments={"a": {"ENV": {"SWIFT_TEST_Y": "no"}}})
    assert jobs["a"].env == {"SWIFT_TEST_X": "1", "SWIFT_TEST_Y": "no"}
    assert "SWIFT_TEST_X" not in os.environ


def test_any_command_and_needs(work: Path) -> None:
    jobs = jobs_of(
        work,
        experiments={
            "a": {},
            "check": {"command": "data", "words": ["check", "train.jsonl"]},
            "ask": {
                "command": "infer", "adapters": "out/a", "val_dataset": "val.jsonl", "needs": "a",
            },
        }
    )  # fmt: skip
    assert jobs["check"].words == ["check", "train.jsonl"]
    assert jobs["check"].options == {} and jobs["check"].estimate == {}
    assert jobs["ask"].options["adapters"] == [str(work / "out" / "a")]
    assert "max_steps" not in jobs["ask"].options
    assert [(need.job, need.condition) for need in jobs["ask"].after] == [("a", "success")]


def test_later_edits_change_nothing_and_changed_data_is_found(work: Path) -> None:
    prints = jobs_of(work, experiments={"a": {"val_dataset": "val.jsonl"}})["a"].fingerprints
    assert changed_data(prints) == []
    text = (work / "train.jsonl").read_text()
    (work / "train.jsonl").write_text(text.replace("plus", "PLUS"))
    assert changed_data(prints) == [f"{work / 'train.jsonl'}: other content than when it was submitted"]
    (work / "val.jsonl").unlink()
    assert len(changed_data(prints)) == 2


@pytest.mark.parametrize(
    ("text", "line", "says", "fix"),
    [
        ("experments: {a: {}}", 1, "unknown key in the file", "did you mean experiments?"),
        ("experiments: {a: {}}\nlora_rank: 8", 2, "unknown key", "write lora_rank under defaults:"),
        ("experiments:\n  a:\n    lora_rnk: 8", 3, "experiment a: unknown option", "did you mean lora_rank?"),
        ("experiments:\n  a: {}\n  a: {}", 3, "a is set twice", None),
        ("experiments:\n  a/b: {}", 2, "cannot be the name of an experiment", "use letters"),
        ("experiments:\n  ..: {}", 2, "cannot be the name", "use letters"),
        ("experiments:\n  -x: {}", 2, "cannot be the name", "use letters"),
        ("experiments:\n  a: {}\n  A: {}", 3, "differ in capitals only", "rename"),
        ("experiments:\n  a: {run_name: b}", 2, "run_name b is not the experiment's name", "call the experiment b"),
        ("experiments:\n  a: {needs: b}\n  b: {needs: c}\n  c: {needs: b}", 3, "circle: b -> c -> b", "remove"),
        ("experiments:\n  alpha: {}\n  b: {needs: alpa}", 3, "needs alpa", "did you mean alpha?"),
        ("experiments:\n  a: {command: sfft}", 2, "unknown command 'sfft'", "did you mean sft?"),
        ("experiments:\n  a: {command: sample}", 2, "comes with a later version", "use swift infer"),
        ("experiments:\n  a: {command: data, lora_rank: 8}", 2, "takes words, not options", "words:"),
        ("experiments:\n  a: {words: [x]}", 2, "takes options, not words", "NAME: value"),
        ("experiments: {a: {}}\nresources:\n  memory: lots", 3, "'lots' is not a size", "8GiB"),
        ("experiments: {a: {}}\nresources:\n  time_limit: soon", 3, "'soon' is not a time", "2h30m"),
        ("experiments: {a: {}}\nresources:\n  devices: 0", 3, "at least 1", None),
        ("experiments: {a: {}}\nresources:\n  mem: 8G", 3, "unknown key in resources", "did you mean memory?"),
        ("experiments:\n  a:\n    resources: {max_parallel: 2}", 3, "unknown key", "at the top of the file"),
        ("experiments:\n  a: {dry_run: true}", None, "for one command on a terminal", "leave it out"),
        ("experiments:\n  a: {explicit: [x]}", 2, "belongs to the config.yaml", "copy only"),
        ("experiments:\n  - a", 1, "needs a mapping", "experiments:"),
        ("experiments:\n  a: [1]", 2, "needs a mapping", "a:"),
        ("name: x", None, "declares no experiment", "add experiments:"),
    ],
)  # fmt: skip
def test_complaints(work: Path, text: str, line: int | None, says: str, fix: str | None) -> None:
    defaults = f"defaults: {json.dumps(DEFAULTS)}\n"
    error = complaint(work, text + "\n" + defaults)
    assert says in error.message
    if line is not None:
        assert f"e.yaml:{line}" in (error.where or "")
    assert (fix is None) or fix in (error.fix or "")


def test_missing_model_and_data_name_the_experiment(work: Path) -> None:
    (work / "e.yaml").write_text(
        "experiments:\n  a: {}\ndefaults:\n  model: modell\n  dataset: train.jsonl\n"
    )
    with pytest.raises(SwiftError, match="experiment a: ") as caught:
        expand(read_experiments(work / "e.yaml"), work)
    assert caught.value.where == f"{work / 'e.yaml'}:4: model"
    assert "--model" not in (caught.value.fix or "")
    with pytest.raises(SwiftError, match="experiment a: no such file") as caught:
        jobs_of(work, experiments={"a": {"dataset": "trian.jsonl"}})
    assert "train.jsonl" in (caught.value.fix or "")


def test_a_folder_with_a_run_is_refused_and_only_noted_when_planning(work: Path) -> None:
    (work / "out" / "a").mkdir(parents=True)
    (work / "out" / "a" / "config.yaml").write_text("command: sft\n")
    with pytest.raises(ConfigError, match="already holds a run"):
        jobs_of(work, experiments={"a": {}})
    file = parse_experiments({"defaults": DEFAULTS, "experiments": {"a": {"model": "gone"}}})
    problems = expand(file, work, planning=True)[0].estimate["problems"]
    assert any("already holds a run" in problem for problem in problems)
    assert any("gone" in problem for problem in problems)


def test_an_extended_file_runs_only_what_is_new(work: Path) -> None:
    def begun(name: str, state: str) -> None:
        folder = work / "out" / name
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text("command: sft\n")
        record = {**ProcessIdentity.of().to_dict(), "host": "here", "state": state, "heartbeat_time": 0.0}
        (folder / "status.json").write_text(json.dumps(record))

    experiments = {"a": {"lora_rank": 4}, "b": {"lora_rank": 8, "needs": ["a"]}, "c": {"lora_rank": 16}}
    file = parse_experiments({"defaults": DEFAULTS, "experiments": experiments, "after": ["merge"]})
    begun("a", "succeeded")
    specs = expand(file, work, new_only=True)
    assert [spec.name for spec in specs] == ["b", "b/merge", "c", "c/merge"]
    assert specs[0].after == [] and specs[0].parameters == {"lora_rank": 8}
    begun("c", "failed")
    assert [spec.experiment for spec in expand(file, work, new_only=True)] == ["b", "b"]
    begun("b", "succeeded")
    with pytest.raises(UsageError, match="has a run already"):
        expand(file, work, new_only=True)
    shutil.rmtree(work / "out" / "b")
    (work / "out" / "a" / "status.json").unlink()
    with pytest.raises(ConfigError, match="b needs a, which did not succeed"):
        expand(file, work, new_only=True)


def test_two_experiments_with_one_run_folder(work: Path) -> None:
    (work / "other").symlink_to(work / "out")
    after = [{"name": "b", "command": "sft", "model": "{merged}", "dataset": "train.jsonl"}]
    with pytest.raises(ConfigError, match="a/b and a-b have one run folder"):
        jobs_of(work, experiments={"a": {"after": after}, "a-b": {"output_dir": "other"}})


def test_a_command_line_as_a_job(work: Path) -> None:
    words = ["sft", "--model", "model", "--dataset", "train.jsonl", "--device", "cpu", "--output_dir", "out"]
    job = single([*words, "--run_name", "mine"], work, resources={"memory": "1GiB", "priority": 3})
    assert (job.name, job.run_dir, job.priority) == ("mine", str(work / "out" / "mine"), 3)
    assert job.needs.memory_bytes == 1 << 30
    assert single(words, work).name.startswith("sft-")
    (work / "run.yaml").write_text(
        "model: model\ndataset: train.jsonl\nENV: {SWIFT_TEST_Z: 1}\nlora_rank: 2\n"
    )
    job = single(["sft", "run.yaml", "--device", "cpu"], work, name="file")
    assert (job.options["lora_rank"], job.env) == (2, {"SWIFT_TEST_Z": "1"})
    assert single(["data", "check", "train.jsonl"], work).words == ["check", "train.jsonl"]
    with pytest.raises(UsageError, match="unknown command"):
        single(["sfft"], work)
    with pytest.raises(ConfigError, match="missing"):
        single(["sft", "--model", "model"], work)


def test_which_files_are_experiments(work: Path) -> None:
    (work / "a.yaml").write_text("experiments: {a: {}}\n")
    (work / "b.yaml").write_text("model: x\n")
    (work / "c.yaml").write_text("defaults: {}\nexperimnts: {a: {}}\n")
    assert [is_experiment_file(work / f"{name}.yaml") for name in "abc"] == [True, False, True]


def test_expanding_imports_no_torch(work: Path) -> None:
    (work / "e.yaml").write_text(json.dumps({"defaults": DEFAULTS, "experiments": {"a": {}}}))
    code = (
        "import sys; from swift.experiments.expand import expand; from swift.experiments.file import read_experiments;"
        "print(len(expand(read_experiments('e.yaml'), '.')), 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=work, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "1 False False", done.stderr


RECIPES = sorted((Path(__file__).parents[2] / "recipes" / "experiments").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_expand(recipe: Path, tmp_path: Path) -> None:
    file = read_experiments(recipe)
    jobs = expand(file, tmp_path, planning=True)
    trainings = [job for job in jobs if job.command == "sft"]
    assert file.name == recipe.stem
    assert len(trainings) == len(file.experiments) + (file.sweep.trials if file.sweep else 0)
    assert all(job.run_dir == str(tmp_path / "output" / file.name / job.name) for job in trainings)


def test_the_file_in_the_guide_expands(tmp_path: Path) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "en" / "experiments.md").read_text(encoding="utf-8")
    blocks = [block.split("```")[0] for block in guide.split("```yaml\n")[1:]]
    defaults, after, sweep = blocks
    for extra in ("", sweep):
        jobs = expand(parse_experiments(defaults + extra), tmp_path, planning=True)
        assert [job.name for job in jobs][:3] == ["small", "small/evaluate", "small/merge"]
        trials = [job for job in jobs if job.experiment.startswith("trial-") and job.command == "sft"]
        assert len(trials) == (20 if extra else 0)
        assert all((job.max_parallel, job.options["lora_rank"]) == (2, 16) for job in trials)
    jobs = expand(
        parse_experiments(defaults.replace("after: [evaluate, merge]\n", after)), tmp_path, planning=True
    )
    assert [job.name for job in jobs if job.experiment == "small"] == [
        "small", "small/evaluate", "small/merge", "small/try-it", "small/look",
    ]  # fmt: skip
