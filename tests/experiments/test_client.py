"""A real service, started on demand by its client, and a real job."""

import psutil
import pytest
from tests.experiments.services import wait_for

from swift.core.errors import SwiftError, UsageError
from swift.experiments import client as client_module
from swift.experiments.client import Client, find_service, stop_service
from swift.experiments.home import Home
from swift.experiments.store import Store
from swift.experiments.submission import Submission, from_mapping, from_words
from swift.experiments.types import FINISHED, JobSpec


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("SWIFT_HOME", str(tmp_path / "home"))
    found = Home.find()
    yield found
    stop_service(found)


def quick(name, cwd, words=("alias", "lora_rank")):
    return JobSpec(name=name, experiment=name, command="config", words=list(words), cwd=str(cwd), cold=True)


def test_started_on_demand_runs_jobs_and_is_found_again(home, tmp_path):
    assert find_service(home) is None
    with pytest.raises(SwiftError, match="no service runs"):
        Client(home, start=False)
    client = Client(home)
    assert client.record["pid"] == find_service(home)["pid"]
    answer = client.submit(
        Submission("g", "", [quick("good", tmp_path), quick("bad", tmp_path, ("nonsense",))])
    )
    assert [job["name"] for job in answer["jobs"]] == ["good", "bad"]
    store = Store(home.store)
    wait_for(lambda: all(job.state in FINISHED for job in store.jobs()), "the jobs to end")
    assert {job.spec.name: (job.state, job.exit_code) for job in store.jobs()} == {
        "good": ("succeeded", 0),
        "bad": ("failed", 2),
    }
    assert "option of section tuner" in (home.job_dir("j1") / "output.log").read_text()
    assert client.job("bad")["reason"].startswith("bad configuration: ")
    assert Client(home).record == client.record  # the same service
    with pytest.raises(UsageError, match="there is no job"):
        client.control("stop", ["godo"])
    assert client.clone("good")["jobs"][0]["name"] == "good-2"
    assert stop_service(home)
    assert find_service(home) is None
    assert not stop_service(home)
    with pytest.raises(SwiftError, match="does not answer"):
        client.job("good")


def test_what_an_earlier_service_said_is_no_reason_of_this_one(home, monkeypatch):
    home.service_log.write_text("error: trouble of last week\n  fix: forget it\n")
    with monkeypatch.context() as patched:
        patched.setattr(client_module, "START_SECONDS", 0.0)
        with pytest.raises(SwiftError, match="could not be reached") as late:
            Client(home)
    assert "last week" not in str(late.value.why)
    wait_for(lambda: find_service(home), "the service that came late")


def test_a_service_that_cannot_start_is_quoted_with_its_fix(home):
    home.service_log.write_text("error: trouble of last week\n  fix: forget it\n")
    home.store.write_text("no database, but long enough to be looked at as one")
    with pytest.raises(SwiftError, match="could not be started") as refused:
        Client(home)
    assert refused.value.why == (
        f"{home.store}: the store of experiments cannot be used; "
        "the file is not a store of swift (file is not a database)"
    )
    assert refused.value.fix == "move it away, or set SWIFT_HOME"


def test_the_record_of_a_dead_service_is_not_believed(home):
    client = Client(home)
    psutil.Process(client.record["pid"]).kill()
    wait_for(lambda: find_service(home) is None, "the service to be seen as dead")
    assert home.service_file.exists()
    assert Client(home).record["pid"] != client.record["pid"]


def test_one_command_line_as_a_job(tmp_path):
    submission = from_words(
        ["config", "alias", "lora_rank"], tmp_path, name="look", resources={"priority": 3}
    )
    (spec,) = submission.specs
    assert (submission.name, spec.name, spec.words, spec.priority) == (
        "look",
        "look",
        ["alias", "lora_rank"],
        3,
    )
    assert submission.source == "swift config alias lora_rank"
    with pytest.raises(SwiftError, match="cannot be a job"):
        from_words(["service", "stop"], tmp_path)


def test_experiments_as_a_dict(tmp_path):
    values = {"name": "two", "experiments": {"x": {"command": "config", "words": ["alias", "lora_rank"]}}}
    submission = from_mapping(values, tmp_path)
    assert (submission.name, [spec.name for spec in submission.specs], submission.sweep) == (
        "two",
        ["x"],
        None,
    )
