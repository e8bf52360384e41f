"""The commands around the queue, in this process, with a service of their own where one is needed."""

import io
import json
import os
import re
import signal
import subprocess
import sys

import pytest
import yaml
from tests.experiments.services import wait_for

from swift.cli.main import main
from swift.experiments.client import find_service, stop_service
from swift.experiments.follow import live_table
from swift.experiments.home import Home
from swift.experiments.inline import end_left_jobs
from swift.experiments.store import Store
from swift.experiments.types import FINISHED, Dependency, JobSpec, Placement


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("SWIFT_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    found = Home.find()
    yield found
    stop_service(found)


@pytest.fixture
def swift(capsys):
    """Run a command; returns (exit code, stdout, stderr)."""

    def run(*words):
        capsys.readouterr()
        code = main(list(words))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def spec(name, **fields):
    return JobSpec(name=name, experiment=name, command="config", words=["alias", "lora_rank"], **fields)


def ended(home):
    store = Store(home.store)
    wait_for(lambda: all(job.state in FINISHED for job in store.jobs()), "the jobs to end")


def experiments(path, **words):
    entries = {name: {"command": "config", "words": value} for name, value in words.items()}
    content = {"name": "pair", "experiments": entries, "resources": {"cold": True}}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return str(path)


def test_nothing_is_made_by_looking(home, swift):
    assert swift("ps", "--json")[1:] == ('{\n  "jobs": [],\n  "finished_not_shown": 0\n}\n', "")
    assert "no jobs" in swift("ps")[1]
    assert "no jobs" in swift("top")[1]
    assert json.loads(swift("service", "status", "--json")[1])["pid"] is None
    assert list(home.root.iterdir()) == []


def test_ps_json_has_what_programs_need(home, swift):
    store = Store(home.store)
    store.add_group("g", "", [spec("a", run_dir="/runs/a"), spec("a/next", after=[Dependency("a")])])
    code, out, _ = swift("ps", "--json")
    first, second = json.loads(out)["jobs"]
    assert code == 0
    wanted = {
        "id": "j1",
        "name": "a",
        "experiment": "a",
        "state": "queued",
        "run_dir": "/runs/a",
        "devices": [],
    }
    assert {key: first[key] for key in wanted} == wanted
    assert (second["state"], second["reason"]) == ("waiting", "waits for a")


def test_ps_shows_the_newest_that_ended_and_counts_the_rest(home, swift):
    store = Store(home.store)
    store.add_group("g", "", [spec(f"n{number}") for number in range(30)])
    for number in range(1, 30):
        store.transition(f"j{number}", "queued", "cancelled", "enough")
    _, out, _ = swift("ps")
    assert re.findall(r"^j(\d+)", out, re.MULTILINE) == [str(number) for number in range(10, 31)]
    assert "(9 more have ended" in out
    assert len(json.loads(swift("ps", "--json", "--all")[1])["jobs"]) == 30
    assert [job["id"] for job in json.loads(swift("ps", "j3", "n7", "--json")[1])["jobs"]] == ["j3", "j8"]
    assert len(json.loads(swift("ps", "g", "--json")[1])["jobs"]) == 30


def test_unknown_names_get_the_nearest(home, swift):
    store = Store(home.store)
    store.add_group("ranks", "", [spec("small")])
    for words, near in ((("ps", "smal"), "small"), (("ps", "rank"), "ranks"), (("logs", "smll"), "small")):
        code, _, err = swift(*words)
        assert (code, f"did you mean {near}?" in err) == (2, True), err


def test_why(home, swift):
    store = Store(home.store)
    store.add_group("g", "", [spec("a")])
    store.explain({"j1": "waits for 1 more free CPU slot: 1 needed, 0 free"})
    _, out, _ = swift("ps", "--why", "a")
    assert out.startswith("j1 a is queued: waits for 1 more free CPU slot")
    assert len(out.splitlines()) == 4
    record = json.loads(swift("ps", "--why", "j1", "--json")[1])
    assert [event["kind"] for event in record["events"]] == ["submitted", "reason"]
    store.transition("j1", "queued", "cancelled", "stopped by the user")
    store.event("j1", "placed", {"reason": "1 of 2 free", "memory": "plan 1 GiB", "attempt": 1})
    _, out, _ = swift("ps", "--why", "a")
    assert out.startswith("j1 a has been cancelled: stopped by the user")
    assert out.rstrip().endswith("placed       1 of 2 free (memory plan 1 GiB, attempt 1)")


def test_a_narrow_live_table_has_fewer_columns_and_whole_cells(home):
    from rich.console import Console

    store = Store(home.store)
    store.add_group("g", "", [spec("a-rather-long-name"), spec("b")])
    for job, device in (("j1", 0), ("j2", 1)):
        placement = Placement("cpu", (device,), 2**29, 1)
        store.transition(job, "queued", "starting", "x" * 60, placement=placement)
        store.transition(job, "starting", "running", "on cpu")
    shown = {}
    for width in (60, 200):
        console = Console(width=width, record=True, file=io.StringIO())
        console.print(live_table(store.jobs(), {}, width=width))
        shown[width] = console.export_text()
    assert "memory" in shown[200] and "memory" not in shown[60]
    for cell in ("j1", "a-rather-long-name", "running"):
        assert cell in shown[60]
    assert "…" not in shown[60]


def test_run_follows_to_the_end_and_tells_failures(home, swift, tmp_path):
    file = experiments(tmp_path / "pair.yaml", good=["alias", "lora_rank"], bad=["nonsense"])
    code, out, _ = swift("run", file)
    assert code == 1
    assert re.search(r"^good +succeeded", out, re.MULTILINE)
    assert re.search(r"^bad +failed .*bad configuration", out, re.MULTILINE)
    assert "next: swift logs j2\n      swift retry j2\n" in out
    service = json.loads(swift("service", "status", "--json")[1])
    assert service["pid"] == find_service(home)["pid"]
    assert service["jobs"]["failed"] == 1
    code, _, err = swift("logs", "pair")
    assert code == 2 and "pair is a submission of several jobs\n  fix: swift logs j1 or j2" in err
    _, out, _ = swift("logs", "good", "-n", "1")
    assert out.strip() == "also written: lora_r, adapter_rank"
    assert "also written" in swift("logs", "good", "-f")[1]
    code, out, _ = swift("retry", "bad")
    assert (code, out.startswith("j2  bad: queued")) == (0, True)
    ended(home)
    assert swift("clone", "good")[1].strip() == "j3  good-2"
    ended(home)
    assert Store(home.store).job("good-2").state == "succeeded"
    assert swift("stop", "good")[0] == 2
    assert swift("service", "stop")[1] == "stopped; jobs go on\n"
    assert swift("service", "stop")[1] == "no service runs\n"


def test_run_inline_needs_no_service(home, swift, tmp_path):
    file = experiments(tmp_path / "pair.yaml", one=["alias", "lora_rank"], two=["alias", "dataset"])
    code, out, _ = swift("run", file, "--inline")
    assert code == 0
    assert out.count("succeeded (done)") == 2
    assert find_service(home) is None


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_inline_run_is_ended_or_killed(home, tmp_path, sent):
    """Ctrl-C, SIGTERM: nothing outlives it, all is paused for ``swift resume``. Killed: the rest can be cancelled."""
    waits = {"command": "data", "words": ["show", str(tmp_path / "pipe")]}
    os.mkfifo(tmp_path / "pipe")  # reading it takes for ever
    path = tmp_path / "pair.yaml"
    content = {
        "name": "pair",
        "experiments": {"one": waits, "two": waits},
        "resources": {"max_parallel": 1, "cold": True, "memory": "500MiB"},
    }
    path.write_text(yaml.safe_dump(content))
    home.root.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "SWIFT_HOME": str(home.root)}
    command = [sys.executable, "-m", "swift", "run", str(path), "--inline"]
    with subprocess.Popen(
        command, env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True
    ) as process:
        store = Store(home.store)
        wait_for(lambda: any(job.state == "running" for job in store.jobs()), "a job to run")
        process.send_signal(sent)
        _, errors = process.communicate(timeout=60)
    if sent != signal.SIGKILL:
        assert process.returncode == 128 + sent and "swift resume pair" in errors
        assert [job.state for job in store.jobs()] == ["paused", "paused"]
        return
    assert end_left_jobs(home) == 2
    assert [job.state for job in store.jobs()] == ["cancelled", "cancelled"]
    assert end_left_jobs(home) == 0


def test_submit_pause_resume_stop(home, swift, tmp_path):
    code, out, _ = swift(
        "submit", "--name", "look", "--cold", "--priority", "2", "--", "config", "alias", "lora_rank"
    )
    assert (code, out) == (0, "j1  look\n")
    ended(home)
    job = Store(home.store).job("look")
    assert (job.state, job.priority, job.group) == ("succeeded", 2, "look")
    store = Store(home.store)
    swift("service", "stop")
    store.add_group("g", "", [spec("a", after=[Dependency("b")]), spec("b", after=[])])
    store.transition("j3", "queued", "paused", "for the test")
    assert swift("pause", "a")[1] == "j2  a: paused (paused by the user)\n"
    assert swift("resume", "a")[1] == "j2  a: waiting (resumed by the user)\n"
    assert swift("stop", "g")[0] == 0
    assert {job.state for job in store.jobs(group="g")} == {"cancelled"}


def test_resources_of_experiments_stand_in_their_file(home, swift, tmp_path):
    file = experiments(tmp_path / "pair.yaml", one=["alias", "lora_rank"])
    code, _, err = swift("submit", file, "--devices", "2")
    assert (code, "stand in their file" in err) == (2, True)
    code, _, err = swift("submit", "sft", "--model", "m")
    assert code == 2 and "fix: swift submit -- sft --model m" in err
    code, _, err = swift("submit", file, "--", "config", "alias", "x")
    assert (code, "what shall be queued?" in err) == (2, True)
    assert not home.store.exists()


@pytest.mark.parametrize("command", ["stop", "pause", "retry", "clone", "resume", "logs"])
def test_no_service_is_started_for_a_job_that_is_not_there(home, swift, command):
    code, _, err = swift(command, "j1")
    assert code == 2 and ("there is no job 'j1'" in err or "no job of this name" in err)
    assert find_service(home) is None and not home.store.exists()


def test_what_this_machine_cannot_run_is_refused_unless_it_may_wait(home, swift, tmp_path):
    file = tmp_path / "big.yaml"
    job = {"command": "config", "words": ["alias", "x"], "resources": {"devices": 4096}}
    file.write_text(yaml.safe_dump({"experiments": {"big": job}}))
    code, _, err = swift("run", str(file))
    assert code == 2
    assert "big: asks for 4096" in err
    assert "--wait" in err
    assert not home.store.exists()
    code, _, err = swift("submit", str(file), "--wait")
    assert (code, "warning: big: asks for 4096" in err) == (0, True)
    assert Store(home.store).job("big").state == "queued"


def test_plan_of_a_file_runs_nothing(home, swift, tmp_path):
    file = experiments(tmp_path / "pair.yaml", one=["alias", "lora_rank"], two=["alias", "dataset"])
    code, out, _ = swift("plan", file)
    assert code == 0
    assert out.startswith("pair: 2 jobs; nothing runs")
    record = json.loads(swift("plan", file, "--json")[1])
    assert [(job["name"], job["order"]) for job in record["jobs"]] == [("one", 1), ("two", 2)]
    assert not home.store.exists()


@pytest.mark.parametrize(
    "name", ["run", "submit", "ps", "top", "logs", "stop", "pause", "retry", "clone", "service", "resume"]
)
def test_help(name, swift, monkeypatch):
    try:
        code, out, _ = swift(name, "--help")
    except SystemExit as leave:
        code, out = leave.code, None
    assert code == 0
    assert out is None or f"swift {name}" in out


def test_run_experiments_returns_rows(home, tmp_path):
    import swift

    values = {"name": "py", "experiments": {"one": {"command": "config", "words": ["alias", "lora_rank"]}}}
    (row,) = swift.run_experiments(values, inline=True, show=False)
    assert (row["experiment"], row["state"], row["retries"]) == ("one", "succeeded", 0)
    assert row["seconds"] > 0
