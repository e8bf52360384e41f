"""Jobs that serve: the last stage of an experiment, which its group does not wait for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml
from tests.experiments.engines import World
from tests.experiments.services import wait_for

from swift.cli.main import main
from swift.core.errors import ConfigError, UsageError
from swift.core.files import atomic_write_json
from swift.core.process import ProcessIdentity
from swift.experiments.client import stop_service
from swift.experiments.expand import expand
from swift.experiments.file import parse_experiments
from swift.experiments.follow import is_over
from swift.experiments.home import Home
from swift.experiments.inline import run_inline
from swift.experiments.serving import ready_file, serving_line
from swift.experiments.store import Store
from swift.experiments.submission import Submission


def answers(world: World, job_id: str, pid: int | None = None) -> None:
    """The job's server says that it is ready."""
    job = world.store.job(job_id)
    record = {**ProcessIdentity.of().to_dict(), "url": "http://127.0.0.1:7"}
    path = ready_file(world.home, job)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_json(path, record if pid is None else {**record, "pid": pid})


def test_a_group_is_over_when_its_last_job_answers(tmp_path: Path) -> None:
    world = World(tmp_path)
    group = world.store.add_group("g", "", [world.spec("a"), world.spec("a/deploy", ["a"], command="deploy")])
    first, second = [job.id for job in world.store.jobs(group=group.name)]
    world.engine.tick()
    world.end(first)
    world.engine.tick()
    world.engine.tick()
    assert world.store.job(second).state == "running"
    assert not is_over(world.home, "g", world.store.jobs(group="g"))
    answers(world, second, pid=2**22 + 1)  # of an attempt that has died
    world.engine.tick()
    assert not is_over(world.home, "g", world.store.jobs(group="g"))
    answers(world, second)
    world.engine.tick()
    assert is_over(world.home, "g", world.store.jobs(group="g"))
    reason = world.store.job(second).reason
    assert reason == f"serving at http://127.0.0.1:7; swift stop {second} ends it"
    launch = world.runner.launched[-1][2]
    options = yaml.safe_load(Path(launch.argv[-1]).read_text())
    assert options["ready_file"] == str(ready_file(world.home, world.store.job(second)))


def test_servers_without_a_place_do_not_hold_up_the_end(tmp_path: Path) -> None:
    world = World(tmp_path, slots=1)
    specs = [world.spec(name, command="deploy") for name in ("one", "two")]
    world.store.add_group("g", "", specs)
    world.engine.tick()
    world.engine.tick()
    running, queued = world.store.jobs(group="g")
    assert (running.state, queued.state) == ("running", "queued")
    assert not is_over(world.home, "g", world.store.jobs(group="g"))
    answers(world, running.id)
    world.engine.tick()
    assert is_over(world.home, "g", world.store.jobs(group="g"))
    assert serving_line(world.home, queued) is None


@pytest.fixture
def work(tmp_path: Path, tiny_model_dir: Path) -> Path:
    (tmp_path / "model").symlink_to(tiny_model_dir)
    (tmp_path / "train.jsonl").write_text(json.dumps({"query": "one?", "response": "1"}) + "\n")
    return tmp_path


def content(**experiment: Any) -> dict[str, Any]:
    return {
        "defaults": {
            "model": "model", "dataset": "train.jsonl", "output_dir": "out", "device": "cpu", "max_steps": 1,
            "max_length": 128, "report_to": "none",
        },
        "experiments": {"a": experiment},
    }  # fmt: skip


def test_a_stage_serves_the_run_at_a_free_port_when_nothing_else_waits(work: Path) -> None:
    specs = {spec.name: spec for spec in expand(parse_experiments(content(after=["deploy"])), work)}
    stage = specs["a/deploy"]
    assert stage.command == "deploy" and stage.options["adapters"] == [str(work / "out" / "a")]
    assert stage.options["port"] == 0
    assert stage.priority == specs["a"].priority - 1 and stage.cold
    after = [
        {"deploy": {"port": 9000, "adapters": ["mine={run}/checkpoint-1"], "resources": {"priority": 3}}}
    ]
    specs = {spec.name: spec for spec in expand(parse_experiments(content(after=after)), work)}
    assert specs["a/deploy"].options["port"] == 9000 and specs["a/deploy"].priority == 3
    assert specs["a/deploy"].options["adapters"] == [f"mine={work}/out/a/checkpoint-1"]


def test_nothing_follows_a_server_and_no_inline_run_leaves_one(work: Path, tmp_path: Path) -> None:
    after = ["deploy", {"merge": {"needs": "deploy"}}]
    with pytest.raises(ConfigError, match="needs deploy, which serves until it is stopped"):
        expand(parse_experiments(content(after=after)), work)
    specs = expand(parse_experiments(content(after=["deploy"])), work)
    with pytest.raises(UsageError, match="a/deploy would serve until it is stopped"):
        run_inline(Home.find(tmp_path / "home"), Submission("g", "", specs))


@pytest.mark.slow
def test_train_serve_ask_stop(work: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """From one file to an answer of a trained model, and an end that leaves nothing behind."""
    monkeypatch.setenv("SWIFT_HOME", str(work / "home"))
    monkeypatch.chdir(work)
    (work / "val.jsonl").write_text(json.dumps({"query": "two?", "response": "2"}) + "\n")
    stages = ["evaluate", {"deploy": {"needs": "evaluate"}}]
    (work / "file.yaml").write_text(yaml.safe_dump(content(val_dataset="val.jsonl", after=stages)))
    home = Home.find()
    try:
        run = subprocess.run(
            [sys.executable, "-m", "swift", "run", "file.yaml"], timeout=400, capture_output=True, text=True,
            env=dict(os.environ),
        )  # fmt: skip
        assert run.returncode == 0, run.stdout + run.stderr
        assert "swift stop" in run.stdout
        (job,) = [job for job in Store(home.store).jobs() if job.spec.command == "deploy"]
        assert job.state == "running"
        url = json.loads(ready_file(home, job).read_text())["url"]
        assert f"serving at {url}" in run.stdout
        results = json.loads((work / "out" / "a" / "eval" / "evaluate" / "results.json").read_text())
        capsys.readouterr()
        assert main(["compare", job.group, "--json"]) == 0
        comparison = json.loads(capsys.readouterr().out)
        (row,) = comparison["rows"]
        assert comparison["finished"] == 1 and comparison["winner"]["final"]
        assert row["evaluation"]["num_rows"] == 1
        assert row["evaluation"]["perplexity"] == results["tasks"]["val_dataset"]["perplexity"]
        with openai.OpenAI(base_url=f"{url}/v1", api_key="-") as client:
            assert [model.id for model in client.models.list()][1] == "a"
            question: list[Any] = [{"role": "user", "content": "one?"}]
            answer = client.chat.completions.create(model="a", messages=question, max_tokens=4)
            assert answer.usage and answer.usage.completion_tokens
        assert main(["stop", job.id]) == 0
        wait_for(lambda: Store(home.store).job(job.id).state == "succeeded", "the server to end")
        assert not ready_file(home, job).exists()
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")
    finally:
        stop_service(home)
