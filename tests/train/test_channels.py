"""A loss of each channel: against runs over one channel alone, packed and padded, and over a resume."""

import json

import pytest

from swift.config.bind import resolve
from swift.core.errors import ConfigError
from swift.runs.metrics import read_metrics
from swift.train.callbacks.base import Callback


class Killed(BaseException):
    pass


class Kill(Callback):
    def on_step_end(self, run):
        if run.state.step == 3:
            raise Killed


@pytest.fixture
def channel_file(chat_file, tmp_path):
    """The conversations in two channels and some without one, of different lengths."""
    rows = [json.loads(line) for line in chat_file.read_text().splitlines()]
    for number, row in enumerate(rows):
        if number % 4:
            row["channel"] = "math" if number % 4 == 1 else "code"
    path = tmp_path / "channels.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    for name in ("math", "code", None):
        chosen = [row for row in rows if row.get("channel") == name]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, chosen)) + "\n")
    return path


def lines(result):
    return read_metrics(result.folder / "metrics.jsonl")


@pytest.mark.parametrize("layout", [{"packing": True}, {"padding_free": True}, {"padding_free": False}])
def test_each_channel_has_the_loss_of_its_rows_alone(run_training, channel_file, tmp_path, layout):
    def only_step(file, name, **options):
        """The losses of one step over all rows of a file, and of the evaluation after it."""
        size = 1 if "packing" in layout else 60
        result = run_training(
            dataset=str(file), val_dataset=str(file), run_name=name, max_steps=1, learning_rate=1e-12,
            per_device_train_batch_size=size, gradient_accumulation_steps=60 // size, **layout, **options,
        )  # fmt: skip
        return {key: value for line in lines(result) for key, value in line.items() if "loss" in key}

    together = only_step(channel_file, "together", enable_channel_loss=True)
    for name in ("math", "code", None):
        alone = only_step(tmp_path / f"{name}.jsonl", f"only-{name}")["eval_loss"]
        channel = name or "default"
        assert together[f"eval_loss_{channel}"] == pytest.approx(alone, rel=1e-5)
        assert together[f"loss_{channel}"] == pytest.approx(alone, rel=1e-5)
    assert len({together[f"loss_{name}"] for name in ("math", "code", "default")}) == 3


def test_a_resumed_run_reports_the_same(run_training, channel_file):
    options = {"dataset": str(channel_file), "enable_channel_loss": True, "logging_steps": 4, "save_steps": 2}

    def losses(result):
        return [{key: line[key] for key in line if key.startswith("loss")} for line in lines(result)]

    whole = losses(run_training(run_name="whole", **options))
    with pytest.raises(Killed):
        run_training(run_name="cut", callbacks=[Kill()], **options)
    assert losses(run_training(run_name="cut", resume_from_checkpoint="last", **options)) == whole
    assert any("loss_math" in line for line in whole)


def test_not_with_a_stream(chat_file, tiny_model_dir):
    values = {"model": str(tiny_model_dir), "dataset": str(chat_file), "streaming": True, "max_steps": 2}
    with pytest.raises(ConfigError, match="not with a stream"):
        resolve("sft", values={**values, "enable_channel_loss": True})
