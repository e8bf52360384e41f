"""Trackers: TensorBoard for real, the others through a stand-in for their module."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from swift.config.bind import resolve
from swift.core.errors import ConfigError
from swift.runs.folder import RunFolder
from swift.train.callbacks.trackers import TRACKERS, TrackerCallback, check_trackers, tracker_callbacks

METRICS = {"step": 5, "loss": 0.5, "grad_norm": float("nan"), "gpu_mem_usage": None, "learning_rate": 1e-4}


class Recorder:
    """A module that writes down every call; ``failing`` names raise."""

    def __init__(self, failing: tuple[str, ...] = ()) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.failing = failing

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Recorder:
            self.calls.append((name, args, kwargs))
            if name in self.failing:
                raise RuntimeError(f"{name} is broken")
            return self

        return call

    def named(self, name: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        return [(args, kwargs) for called, args, kwargs in self.calls if called == name]


@pytest.fixture
def run(tmp_path: Path) -> Any:
    folder = tmp_path / "mine"
    folder.mkdir()
    resolved = resolve("sft", ["--model", "m", "--dataset", "a.jsonl", "--lora_rank", "4"])
    return SimpleNamespace(
        state=SimpleNamespace(step=5), folder=RunFolder(folder), resolved=resolved, total_steps=10
    )


def whole_life(callback: TrackerCallback, run: Any) -> None:
    callback.on_train_begin(run)
    callback.on_log(run, METRICS)
    callback.on_evaluate(run, {"eval_loss": 0.75})
    callback.close()


def test_tensorboard_event_file(run: Any) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (callback,) = tracker_callbacks(["tensorboard"])
    assert isinstance(callback, TrackerCallback)
    whole_life(callback, run)
    events = EventAccumulator(str(run.folder.path / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["eval/loss", "train/learning_rate", "train/loss"]
    (loss,) = events.Scalars("train/loss")
    assert (loss.step, loss.value) == (5, 0.5)
    assert events.Scalars("eval/loss")[0].value == 0.75


@pytest.mark.parametrize("name", ["wandb", "swanlab", "trackio"])
def test_trackers_with_init_and_log(run: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("WANDB_MODE", "WANDB_API_KEY", "SWANLAB_MODE", "SWANLAB_API_KEY"):
        monkeypatch.delenv(variable, raising=False)
    module = Recorder()
    whole_life(TrackerCallback(name, load=lambda _: module), run)
    ((_, options),) = module.named("init")
    assert options["config"]["lora_rank"] == 4
    if name != "trackio":  # which is local anyway
        assert options["mode"] == "offline"
    logged = module.named("log")
    assert [kwargs["step"] for _, kwargs in logged] == [5, 5]
    values = [list(args[0].values()) for args, _ in logged]
    assert values == [[0.5, 1e-4], [0.75]]
    assert len(module.named("finish")) == 1


def test_wandb_stays_as_the_user_configured_it(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    module = Recorder()
    TrackerCallback("wandb", load=lambda _: module).on_train_begin(run)
    assert module.named("init")[0][1]["mode"] is None


def test_mlflow_writes_into_the_run_folder(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    module = Recorder()
    whole_life(TrackerCallback("mlflow", load=lambda _: module), run)
    ((uri,), _) = module.named("set_tracking_uri")[0]
    assert uri == (run.folder.path / "mlruns").absolute().as_uri()
    assert module.named("log_metrics") == [
        (({"loss": 0.5, "learning_rate": 1e-4},), {"step": 5}),
        (({"eval_loss": 0.75},), {"step": 5}),
    ]
    assert len(module.named("end_run")) == 1


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_a_failing_tracker_is_told_once_and_left_out(
    run: Any, broken: str, caplog: pytest.LogCaptureFixture
) -> None:
    module = Recorder(failing=(broken,))
    callback = TrackerCallback("trackio", load=lambda _: module)
    whole_life(callback, run)
    callback.on_log(run, METRICS)
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [f"trackio failed and is left out from now on: RuntimeError: {broken} is broken"]


def test_missing_package_names_the_extra() -> None:
    def load(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    with pytest.raises(ConfigError, match=r"pip install 'swift-forge\[wandb\]'"):
        check_trackers(["none", "wandb"], load)


def test_none_is_nothing_and_twice_is_once() -> None:
    assert tracker_callbacks(["none"]) == []
    assert len(tracker_callbacks(["wandb", "wandb"], load=lambda _: Recorder())) == 1


def test_every_choice_has_a_tracker() -> None:
    from swift.config.schema import options

    choices = options()["report_to"].info.annotation
    assert set(TRACKERS) | {"none", "all"} == set(choices.__args__[0].__args__)  # type: ignore[union-attr]


def test_all_means_the_installed_ones() -> None:
    def load(name: str) -> Any:
        if name.partition(".")[0] not in ("tensorboard", "mlflow"):
            raise ImportError(name)
        return Recorder()

    assert [callback.name for callback in tracker_callbacks(["all"], load)] == ["tensorboard", "mlflow"]
    assert len(tracker_callbacks(["mlflow", "all"], load)) == 2

    def nothing(name: str) -> Any:
        raise ImportError(name)

    with pytest.raises(ConfigError, match="no tracker is installed"):
        check_trackers(["all"], nothing)
