"""An engine with everything around it replaced: attempts end when the test says so, time moves when it says so."""

import json
from pathlib import Path

from swift.experiments.engine import Engine
from swift.experiments.home import Home
from swift.experiments.runner import Exit, Observation
from swift.experiments.store import Store
from swift.experiments.types import ACTIVE, Dependency, Device, Inventory, JobSpec, Needs

GIB = 2**30


class FakeRunner:
    """Remembers what was launched and stopped."""

    def __init__(self):
        self.seen = {}
        self.launched = []
        self.stopped = []
        self.error = None

    def launch(self, job_id, attempt, launch, warm):
        if self.error is not None:
            raise self.error
        assert (job_id, attempt) not in self.seen, "an attempt was started twice"
        self.launched.append((job_id, attempt, launch))
        self.seen[job_id, attempt] = Observation("running", pid=1)

    def observe(self, job_id, attempt):
        return self.seen.get((job_id, attempt), Observation("vanished"))

    def stop(self, job_id, attempt, grace_seconds):
        self.stopped.append((job_id, attempt, grace_seconds))

    def watch(self, job_id, attempt):
        return None

    @property
    def running(self):
        return [job for (job, _), seen in self.seen.items() if seen.state == "running"]


class World:
    """A home, a store, an engine and the clock."""

    def __init__(self, root, slots=2, devices=(), **settings):
        self.root = Path(root)
        self.home = Home.find(self.root / "home")
        self.store = Store(self.home.store)
        self.runner = FakeRunner()
        self.now = 0.0
        self.devices = devices or tuple(Device("cpu", n, "cpu", 8 * GIB, 8 * GIB) for n in range(slots))
        self.settings = {"least_free_bytes": 0, **settings}
        self.engine = self.new_engine()

    def new_engine(self):
        inventory = Inventory(self.devices, 2, 16 * GIB)
        return Engine(
            self.home,
            self.store,
            take=lambda *_: inventory,
            runner=self.runner,
            base_env={"PATH": "/bin"},
            threads=0,
            monotonic=lambda: self.now,
            **self.settings,
        )

    def spec(self, name, after=(), command="doctor", **fields):
        needs = fields.pop("needs", Needs(memory_bytes=GIB))
        waits = [Dependency(*entry) if isinstance(entry, tuple) else Dependency(entry) for entry in after]
        return JobSpec(
            name=name,
            experiment=name.partition("/")[0],
            command=command,
            cwd=str(self.root),
            needs=needs,
            after=waits,
            **fields,
        )

    def training(self, name, **fields):
        options = {
            "model": "m",
            "dataset": ["d"],
            "output_dir": str(self.root / "out"),
            **fields.pop("options", {}),
        }
        return self.spec(
            name,
            command="sft",
            options={**options, "run_name": name},
            run_dir=str(self.root / "out" / name),
            **fields,
        )

    def submit(self, *specs, group="g"):
        submitted = self.engine.submit(group, "", list(specs))
        self.engine.tick()
        return submitted

    def tick(self, seconds=1.0):
        self.now += seconds
        return self.engine.tick()

    def end(self, name, code=0, *, signal=None, reason="exited", log="", status=None):
        """The running attempt of a job ends."""
        job = self.job(name)
        exit = Exit(None if signal else code, signal, reason, self.store._clock(), 100, 1.0)
        folder = self.home.attempt_dir(job.id, job.attempt)
        folder.mkdir(parents=True, exist_ok=True)
        if log:
            with (self.home.job_dir(job.id) / "output.log").open("a") as file:
                file.write(f"=== attempt-{job.attempt}, now: x\n{log}\n")
        if status is not None:
            self.write_status(name, **status)
        vanished = reason in ("lost", "not_begun")
        self.runner.seen[job.id, job.attempt] = Observation("vanished" if vanished else "ended", exit)
        self.tick()

    def write_status(self, name, **fields):
        """``status.json`` in the run folder, written by the running attempt."""
        job = self.job(name)
        folder = self.home.attempt_dir(job.id, job.attempt)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "child.json").write_text(json.dumps({"pid": 4242, "processes": []}))
        record = {
            "pid": 4242, "start_time": 0.0, "boot_id": "b", "host": "elsewhere", "heartbeat_time": 4e9,
            "step": 1, "stage": "train", "updated": "t", **fields,
        }  # fmt: skip
        run = Path(job.spec.run_dir)
        run.mkdir(parents=True, exist_ok=True)
        (run / "status.json").write_text(json.dumps(record))

    def checkpoint(self, name, step=5):
        folder = Path(self.job(name).spec.run_dir) / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text("{}")

    def job(self, name):
        return self.store.job(name)

    def state(self, name):
        return self.job(name).state

    def states(self):
        return {job.spec.name: job.state for job in self.store.jobs()}

    def argv(self, name):
        """The words after ``swift`` of the last launch of a job."""
        job = self.job(name)
        return [launch.argv[3:] for job_id, _, launch in self.runner.launched if job_id == job.id][-1]

    @property
    def is_done(self):
        """Nothing runs and nothing can start any more."""
        counts = self.store.counts()
        return not self.engine.sweeps.names and not any(
            counts[state] for state in (*ACTIVE, "queued", "waiting")
        )

    def events(self, name, kind):
        return [event.data for event in self.store.events(job=self.job(name).id) if event.kind == kind]
