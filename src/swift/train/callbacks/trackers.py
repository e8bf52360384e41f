"""Experiment trackers behind one small table. To add one: a class with ``log`` and ``close``, and a line in TRACKERS.

Nobody has to log in or be online: a tracker with an offline mode starts in it unless the user configured
another one through its own environment variables. A tracker that fails in the middle of a run is reported
once and left out from then on; training goes on.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from swift.config.bind import dump
from swift.core.errors import ConfigError
from swift.core.logging import get_logger
from swift.train.callbacks.base import Callback, RunView

__all__ = ["TRACKERS", "Tracker", "TrackerCallback", "check_trackers", "tracker_callbacks"]

logger = get_logger(__name__)
PROJECT = "swift"
Import = Callable[[str], Any]


class Tracker(Protocol):
    """What the callback needs of a tracker, once it is started."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record numbers of one step."""

    def close(self) -> None:
        """Write out and end."""


class TensorBoard:
    """Event files in ``RUN/tensorboard``."""

    def __init__(self, load: Import, folder: Path, config: dict[str, Any]) -> None:
        module = load("tensorboard.summary.writer.event_file_writer")
        event, summary = (
            load("tensorboard.compat.proto.event_pb2"),
            load("tensorboard.compat.proto.summary_pb2"),
        )
        # Not torch.utils.tensorboard: it imports much of torch (and tensorflow, where installed) for the
        # same file.
        self._event, self._summary = event.Event, summary.Summary
        self._writer = module.EventFileWriter(str(folder / "tensorboard"))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        import time

        values = [
            self._summary.Value(tag=_grouped(name), simple_value=value) for name, value in metrics.items()
        ]
        self._writer.add_event(
            self._event(wall_time=time.time(), step=step, summary=self._summary(value=values))
        )

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """Weights & Biases, offline unless WANDB_MODE or an API key says otherwise; ``wandb sync`` uploads later."""

    def __init__(self, load: Import, folder: Path, config: dict[str, Any]) -> None:
        mode = None if {"WANDB_MODE", "WANDB_API_KEY"} & set(os.environ) else "offline"
        self._run = load("wandb").init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=folder.name,
            dir=str(folder),
            config=config,
            mode=mode,
            resume="allow",
        )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log({_grouped(name): value for name, value in metrics.items()}, step=step)

    def close(self) -> None:
        self._run.finish()


class SwanLab:
    """SwanLab, writing to ``RUN/swanlab`` unless SWANLAB_MODE or an API key says otherwise."""

    def __init__(self, load: Import, folder: Path, config: dict[str, Any]) -> None:
        online = {"SWANLAB_MODE", "SWANLAB_API_KEY"} & set(os.environ)
        self._module = load("swanlab")
        self._module.init(
            project=PROJECT,
            experiment_name=folder.name,
            logdir=str(folder / "swanlab"),
            config=config,
            mode=os.environ.get("SWANLAB_MODE") if online else "offline",
        )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._module.log({_grouped(name): value for name, value in metrics.items()}, step=step)

    def close(self) -> None:
        self._module.finish()


class Trackio:
    """trackio: local by nature."""

    def __init__(self, load: Import, folder: Path, config: dict[str, Any]) -> None:
        self._module = load("trackio")
        self._module.init(project=PROJECT, name=folder.name, config=config, resume="allow")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._module.log(dict(metrics), step=step)

    def close(self) -> None:
        self._module.finish()


class MLflow:
    """MLflow, in ``RUN/mlruns`` unless MLFLOW_TRACKING_URI names a server."""

    def __init__(self, load: Import, folder: Path, config: dict[str, Any]) -> None:
        self._module = load("mlflow")
        if "MLFLOW_TRACKING_URI" not in os.environ:
            self._module.set_tracking_uri((folder / "mlruns").absolute().as_uri())
        self._module.set_experiment(PROJECT)
        self._module.start_run(run_name=folder.name)
        # MLflow refuses parameter values above 500 characters (6000 in newer versions).
        self._module.log_params({name: str(value)[:500] for name, value in config.items()})

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._module.log_metrics(dict(metrics), step=step)

    def close(self) -> None:
        self._module.end_run()


TRACKERS: dict[str, Callable[[Import, Path, dict[str, Any]], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "swanlab": SwanLab,
    "trackio": Trackio,
    "mlflow": MLflow,
}
"""Name for ``--report_to`` (also the package and the extra) -> tracker."""


class TrackerCallback(Callback):
    """Passes metric lines on to one tracker.

    Args:
        name: a key of TRACKERS.
        load: imports a module by name; for tests.
    """

    def __init__(self, name: str, load: Import = importlib.import_module) -> None:
        self.name = name
        self._load = load
        self._tracker: Tracker | None = None

    def on_train_begin(self, run: RunView) -> None:
        sections = dump(run.resolved)
        config = {
            name: value
            for section in sections.values()
            if isinstance(section, dict)
            for name, value in section.items()
        }

        def begin() -> None:
            self._tracker = TRACKERS[self.name](self._load, run.folder.path, config)

        self._guard(begin)

    def on_log(self, run: RunView, metrics: dict[str, Any]) -> None:
        self._log(metrics, run.state.step)

    def on_evaluate(self, run: RunView, metrics: dict[str, Any]) -> None:
        self._log(metrics, run.state.step)

    def close(self) -> None:
        tracker, self._tracker = self._tracker, None
        if tracker is not None:
            self._guard(tracker.close)

    def _log(self, metrics: dict[str, Any], step: int) -> None:
        tracker = self._tracker
        if tracker is not None:
            numbers = _numbers(metrics)
            self._guard(lambda: tracker.log(numbers, step))

    def _guard(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # a tracker may fail in any way (network, disk, its own bugs)
            self._tracker = None
            logger.warning(
                "%s failed and is left out from now on: %s: %s", self.name, type(error).__name__, error
            )


def check_trackers(names: Sequence[str], load: Import = importlib.import_module) -> None:
    """Raise ConfigError for the first tracker whose package is not installed, with the command that installs it.

    ``all`` means those that are installed, and is refused when none is.
    """
    if "all" in names and not _installed(load):
        fix = "pip install 'swift-forge[tensorboard]', or leave out --report_to all"
        raise ConfigError("no tracker is installed", where="--report_to", fix=fix)
    for name in names:
        if name in ("none", "all"):
            continue
        try:
            load(name)
        except ImportError as error:
            raise ConfigError(
                f"{name} cannot be imported",
                where="--report_to",
                why=str(error),
                fix=f"pip install 'swift-forge[{name}]', or leave out --report_to {name}",
            ) from error


def tracker_callbacks(names: Sequence[str], load: Import = importlib.import_module) -> list[Callback]:
    """A callback for each named tracker (``none`` is nothing, ``all`` every installed one).

    Raises ConfigError when a package is missing.
    """
    check_trackers(names, load)
    chosen = [name for name in names if name not in ("none", "all")]
    chosen += _installed(load) if "all" in names else []
    return [TrackerCallback(name, load) for name in dict.fromkeys(chosen)]


def _installed(load: Import) -> list[str]:
    found = []
    for name in TRACKERS:
        with contextlib.suppress(ImportError):
            load(name)
            found.append(name)
    return found


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers among the metrics; trackers disagree about what NaN means."""
    return {
        name: float(value)
        for name, value in metrics.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if name != "step"
    }


def _grouped(name: str) -> str:
    """``eval_loss`` -> ``eval/loss``, ``loss`` -> ``train/loss``: the panels people know from other tools."""
    return f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"
