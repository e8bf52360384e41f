"""The HTTP face, around an engine whose attempts end when the test says so; and the service's files."""

import json
import os
import stat

import pytest
from fastapi.testclient import TestClient
from tests.experiments.engines import World

from swift.experiments.api import _each, create_app
from swift.experiments.home import Home
from swift.experiments.service import HomeTaken, ServiceLock, read_token
from swift.experiments.store import Store

TOKEN = "secret"


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


@pytest.fixture
def http(world):
    app = create_app(world.engine, TOKEN, started=1000.0)
    return TestClient(app, headers={"Authorization": f"Bearer {TOKEN}"})


def post(http, path, **body):
    return http.post(path, json=body)


def submit(http, world, *names, **fields):
    specs = [world.spec(name, **fields).to_dict() for name in names]
    return post(http, "/submit", name="g", source="text", specs=specs)


def test_health_needs_no_token_and_everything_else_does(http, world):
    http.headers.pop("Authorization")
    assert http.get("/health").json()["pid"] == os.getpid()
    paths = http.get("/openapi.json").json()["paths"]
    assert len(paths) >= 15
    for path, methods in paths.items():
        if path == "/health":
            continue
        for method in methods:
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN}):
                answer = http.request(method, path.replace("{word}", "j1"), headers=headers)
                assert answer.status_code == 401, path


def test_every_endpoint_is_described(http):
    for path, methods in http.get("/openapi.json").json()["paths"].items():
        for method in methods.values():
            assert method.get("description"), path


def test_submit_list_and_show(http, world):
    answer = submit(http, world, "a", "b", "c")
    assert answer.status_code == 201
    assert [job["state"] for job in answer.json()["jobs"]] == ["queued"] * 3
    world.tick()
    listed = http.get("/jobs", params={"state": ["starting"]}).json()["jobs"]
    assert [(job["id"], job["devices"]) for job in listed] == [("j1", [0]), ("j2", [1])]
    assert [job["id"] for job in http.get("/jobs", params={"limit": 1}).json()["jobs"]] == ["j3"]
    shown = http.get("/jobs/b").json()
    assert shown["spec"]["command"] == "doctor"
    assert submit(http, world, "d").json()["group"] == "g-2"


def test_bad_requests_say_what_is_wrong(http, world):
    assert post(http, "/submit", name="g", specs=[{"name": "a"}]).status_code == 422
    circle = [world.spec("a", ["b"]).to_dict(), world.spec("b", ["a"]).to_dict()]
    answer = post(http, "/submit", name="g", specs=circle)
    assert (answer.status_code, answer.json()["exit_code"]) == (422, 2)
    assert "circle" in answer.json()["message"]
    assert world.store.jobs() == []
    submit(http, world, "alpha")
    missing = http.get("/jobs/alpah")
    assert missing.json()["fix"] == "did you mean alpha?"


def test_control_by_id_name_and_group(http, world):
    submit(http, world, "a", "b", "c")
    world.tick()
    assert post(http, "/pause", jobs=["c"]).json()["jobs"][0]["state"] == "paused"
    assert post(http, "/resume", jobs=["j3"]).json()["jobs"][0]["state"] == "queued"
    assert post(http, "/priority", jobs=["c"], priority=7).json()["jobs"][0]["priority"] == 7
    everything = post(http, "/stop", jobs=["g"], grace_seconds=3).json()
    assert [job["id"] for job in everything["jobs"]] == ["j1", "j2", "j3"]
    assert world.runner.stopped == [("j1", 1, 3), ("j2", 1, 3)]
    refused = post(http, "/stop", jobs=["j3"])
    assert (refused.status_code, refused.json()["message"]) == (422, "j3 (c) has ended already: cancelled")
    some = post(http, "/stop", jobs=["j3", "a"]).json()
    assert [entry["id"] for entry in some["refused"]] == ["j3"]
    assert post(http, "/retry", jobs=["c"]).json()["jobs"][0]["state"] == "queued"
    assert post(http, "/clone", job="c").json()["jobs"][0]["name"] == "c-2"


def test_the_engine_is_woken_when_the_change_can_be_seen(http, world, monkeypatch):
    submit(http, world, "a")
    post(http, "/stop", jobs=["a"])
    seen = []
    other = Store(world.home.store)  # a connection of its own sees only what is committed
    monkeypatch.setattr(world.engine, "wake", lambda: seen.append(other.job("a").state))
    post(http, "/retry", jobs=["a"])
    assert seen[-1] == "queued"


def test_why(http, world):
    submit(http, world, "a", "b", "c")
    world.tick()
    answer = http.get("/jobs/c/why").json()
    assert answer["reason"].startswith("waits for 1 more free CPU slot")
    assert [event["kind"] for event in answer["events"]] == ["submitted", "reason"]
    placed = [event for event in http.get("/jobs/a/why").json()["events"] if event["kind"] == "placed"]
    assert placed[0]["data"]["memory"] == "as asked for"


def test_logs_from_the_end(http, world):
    submit(http, world, "a")
    world.tick()
    assert http.get("/jobs/a/logs").text == ""
    folder = world.home.job_dir("j1")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "output.log").write_text("".join(f"line {number}\n" for number in range(50_000)))
    assert http.get("/jobs/a/logs", params={"tail": 2}).text == "line 49998\nline 49999\n"
    assert http.get("/jobs/a/logs", params={"tail": 0}).text == ""
    assert http.get("/jobs/a/logs", params={"tail": 10**6}).text.count("\n") == 50_000
    world.end("a")
    assert http.get("/jobs/a/logs", params={"tail": 1, "follow": True}).text == "line 49999\n"


def test_events_go_on_from_a_number(http, world):
    submit(http, world, "a")
    world.tick()

    def events(**params):
        text = http.get("/events", params={"follow": False, **params}).text
        blocks = [block.split("\n") for block in text.strip().split("\n\n") if block]
        return [json.loads(lines[2].removeprefix("data: ")) for lines in blocks]

    first = events()
    assert [event["kind"] for event in first] == ["submitted", "state", "placed"]
    assert events(after=first[0]["seq"]) == first[1:]
    assert events(after=first[-1]["seq"]) == []
    again = http.get("/events", params={"follow": False}, headers={"Last-Event-ID": str(first[1]["seq"])})
    assert again.text.startswith(f"id: {first[2]['seq']}\nevent: placed\n")


def test_inventory_samples_and_metrics(http, world):
    submit(http, world, "a", "b", "c")
    world.tick()
    world.tick()
    assert [device["kind"] for device in http.get("/inventory").json()["devices"]] == ["cpu", "cpu"]
    (host,) = http.get("/samples", params={"subject": "host"}).json()["samples"]
    assert 0 < host["memory_used_bytes"] <= host["memory_bytes"]
    text = http.get("/metrics").text
    assert 'swift_jobs{state="running"} 2' in text
    assert 'swift_jobs{state="queued"} 1' in text
    assert "swift_service_start_time_seconds 1000.000" in text
    assert f'swift_disk_free_bytes{{path="{world.home.root}"}}' in text
    for line in text.splitlines():
        assert line.startswith("# ") or len(line.rsplit(" ", 1)) == 2


def test_nothing_is_measured_while_nothing_runs(world):
    world.tick()
    world.tick(100)
    assert world.store.samples() == []


def test_the_token_is_private_and_stays(tmp_path):
    home = Home.find(tmp_path / "home")
    token = read_token(home)
    assert len(token) >= 32
    assert stat.S_IMODE(home.token_file.stat().st_mode) == 0o600
    home.token_file.chmod(0o644)
    assert read_token(home) == token
    assert stat.S_IMODE(home.token_file.stat().st_mode) == 0o600
    home.token_file.write_text("")  # a kill between creating and writing it
    assert len(read_token(home)) >= 32


def test_one_engine_for_a_home(tmp_path):
    home = Home.find(tmp_path / "home")
    lock = ServiceLock(home)
    with pytest.raises(HomeTaken):
        ServiceLock(home)
    lock.release()
    ServiceLock(home).release()


def test_a_large_group_is_stopped_in_one_transaction(world):
    group = world.engine.submit("g", "", [world.spec(f"n{number}") for number in range(300)])
    world.tick()
    statements = []
    world.store._database._connection().set_trace_callback(statements.append)
    answer = _each(world.engine, world.store.jobs(group="g"), lambda job: world.engine.stop(job.id))
    assert tuple(job["id"] for job in answer["jobs"]) == group.jobs
    assert {job["state"] for job in answer["jobs"][2:]} == {"cancelled"}
    assert [entry[0] for entry in world.runner.stopped] == ["j1", "j2"]
    # One for all that waited; two for each that runs: the wish, then its reason.
    assert statements.count("COMMIT") == 1 + 2 * 2
