"""A run that was cut and resumed equals the uninterrupted one to the last bit."""

import json
from pathlib import Path

import pytest
import torch

from swift.config.bind import load_run_config, resolve
from swift.core.errors import ConfigError, SwiftError
from swift.runs.metrics import read_metrics
from swift.train.callbacks.base import Callback
from swift.train.checkpoints import read_state
from swift.train.run import train

TIMING = ("tokens_per_second", "step_time", "cpu_seconds", "eval_seconds")


class Kill(Callback):
    """Ends the run as a crash does: no saving, after ``step`` steps."""

    class Killed(BaseException):
        pass

    def __init__(self, step):
        self.step = step

    def on_step_end(self, run):
        if run.state.step == self.step:
            raise self.Killed


def metric_lines(folder):
    return [
        {k: v for k, v in line.items() if k not in TIMING} for line in read_metrics(folder / "metrics.jsonl")
    ]


def final_weights(folder):
    from safetensors.torch import load_file

    files = sorted((folder / "last").glob("*model*.safetensors"))
    assert files
    return {f"{file.name}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


def cut_and_resume(run_training, kill_at, **options):
    """Three parts of one run: killed twice, resumed twice."""
    for step in kill_at:
        with pytest.raises(Kill.Killed):
            run_training(callbacks=[Kill(step)], run_name="cut", **options)
        options["resume_from_checkpoint"] = "last"
    return run_training(run_name="cut", **options)


CASES = {
    "plain": {},
    "dropout": {"lora_dropout": 0.3},
    "accumulation": {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2},
    "packing": {"packing": True, "per_device_train_batch_size": 1},
    "padding_free": {"padding_free": True},
    "workers": {"dataloader_num_workers": 2, "lora_dropout": 0.1},
    "log window open at the save": {"logging_steps": 5, "neftune_noise_alpha": 5.0},
    "full": {"tuner_type": "full", "learning_rate": 1e-3},
    "full bfloat16 masters": {"tuner_type": "full", "learning_rate": 1e-3, "torch_dtype": "bfloat16"},
    "lora bfloat16": {"torch_dtype": "bfloat16", "lora_dropout": 0.2},
    "gradient checkpointing": {"gradient_checkpointing": True, "lora_dropout": 0.2},
    "one layer recomputed": {"gradient_checkpointing": True, "recompute_num_layers": 1},
    "streaming": {"streaming": True, "shuffle_buffer_size": 10, "gradient_accumulation_steps": 2},
    "streaming packed": {
        "streaming": True,
        "shuffle_buffer_size": 25,
        "packing": True,
        "per_device_train_batch_size": 1,
    },
    "evaluation in between": {"split_dataset_ratio": 0.2, "eval_steps": 2, "lora_dropout": 0.2},
}


@pytest.mark.parametrize("name", CASES)
def test_resumed_equals_uninterrupted(run_training, name):
    options = {"save_steps": 4, "max_steps": 13, "num_train_epochs": 10, **CASES[name]}
    whole = run_training(run_name="whole", **options)
    # kill between saves (6), and exactly at a save (8: the callback runs before the checkpoint is written)
    cut = cut_and_resume(run_training, [6, 8], **options)
    assert cut.folder.name == "cut"
    assert metric_lines(cut.folder) == metric_lines(whole.folder)
    ours, theirs = final_weights(cut.folder), final_weights(whole.folder)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    first, second = (torch.load(run.folder / "last" / "optimizer.pt") for run in (cut, whole))
    for name_, state in first["optimizers"].items():
        for index, moments in state["state"].items():
            for key, value in moments.items():
                assert torch.equal(value, second["optimizers"][name_]["state"][index][key])


def test_changed_data_and_tuners_are_refused_and_leave_the_run_as_it_was(run_training, chat_file, tmp_path):
    options = {"save_steps": 2, "max_steps": 4, "run_name": "first"}
    folder = run_training(**options).folder
    before = {name: (folder / name).read_text() for name in ("config.yaml", "status.json", "metrics.jsonl")}
    shorter = tmp_path / "shorter.jsonl"
    shorter.write_text("".join(chat_file.read_text().splitlines(keepends=True)[:40]))
    with pytest.raises(SwiftError, match="changed since the checkpoint"):
        run_training(**{**options, "dataset": str(shorter), "resume_from_checkpoint": "last", "max_steps": 8})
    for changed in ({"lora_rank": 5}, {"tuner_type": "full"}, {"target_modules": ["q_proj"]}):
        name = next(iter(changed))
        with pytest.raises(ConfigError, match=f"was begun with {name} .* and cannot go on with"):
            run_training(**options, **changed, resume_from_checkpoint=str(folder))
    assert before == {name: (folder / name).read_text() for name in before}


def test_a_stream_from_a_relative_path_is_resumed_and_a_change_behind_the_first_window_is_refused(
    run_training, chat_file, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    file = Path("data.jsonl")
    file.write_text(chat_file.read_text())
    options = {"streaming": True, "shuffle_buffer_size": 10, "save_steps": 2, "max_steps": 8}
    with pytest.raises(Kill.Killed):
        run_training(callbacks=[Kill(5)], dataset="data.jsonl", run_name="cut", **options)
    config = tmp_path / "output" / "cut" / "config.yaml"
    whole = run_training(dataset="data.jsonl", run_name="whole", **options)
    text = file.read_text()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    def resume():
        resolved = resolve("sft", [str(config), "--resume_from_checkpoint", str(config.parent)])
        assert resolved.config.data.dataset == [str(tmp_path / "data.jsonl")]
        return train(resolved, say=lambda line: None)

    file = tmp_path / file
    file.write_text("".join(text.splitlines(keepends=True)[:50]))  # the first window, of 10 rows, is the same
    with pytest.raises(SwiftError, match="changed since the checkpoint"):
        resume()
    file.unlink()
    file.write_text(text)  # a copy, with another time
    assert metric_lines(resume().folder) == metric_lines(whole.folder)


def test_the_epoch_of_a_stream_is_the_number_of_passes_done(run_training):
    result = run_training(streaming=True, shuffle_buffer_size=10, max_steps=20)  # 6 windows of 3 batches
    assert [line["epoch"] for line in metric_lines(result.folder)] == [0] * 18 + [1] * 2
    assert result.summary["epochs"] == 1


def test_what_a_stream_left_out_is_said_at_the_end_also_of_a_resumed_run(run_training, chat_file, tmp_path):
    lines = chat_file.read_text().splitlines()
    lines[25], lines[45] = "{", "["
    file = tmp_path / "bad.jsonl"
    file.write_text("\n".join(lines))
    options = {"dataset": str(file), "streaming": True, "shuffle_buffer_size": 10, "on_bad_rows": "skip"}
    options |= {"max_steps": 20, "save_steps": 4}  # 18 steps make a pass
    whole = run_training(run_name="whole", **options)
    rows = whole.summary["rows"]
    assert (rows["rows_read"], rows["samples"], rows["bad_rows"], rows["deleted"]) == (60, 58, 2, 0)
    with pytest.raises(Kill.Killed):
        run_training(callbacks=[Kill(10)], run_name="cut", **options)
    folder = whole.folder.parent / "cut"
    said = []
    resolved = resolve("sft", [str(folder / "config.yaml"), "--resume_from_checkpoint", str(folder)])
    assert train(resolved, say=said.append).summary["rows"] == rows
    (note,) = [text for text in said if "bad rows" in text]
    assert note.startswith(f"of the 60 rows streamed: 2 bad rows were skipped, the first: {file}:26: ")
    assert json.loads((folder / "summary.json").read_text())["rows"] == rows
    assert "rows" not in run_training(max_steps=1).summary


def test_checkpoint_without_optimizer_cannot_be_resumed(run_training):
    run_training(save_steps=2, max_steps=4, save_only_model=True)
    with pytest.raises(SwiftError, match="no optimizer state"):
        run_training(save_steps=2, max_steps=8, resume_from_checkpoint="last")


def test_state_counts_what_was_trained(run_training, chat_file):
    result = run_training(num_train_epochs=2)
    state = read_state(result.folder / "last")
    assert (state.step, state.epoch, state.step_in_epoch) == (30, 1, 15)
    assert state.num_tokens == result.summary["num_tokens"] == metric_lines(result.folder)[-1]["num_tokens"]


def test_going_on_longer_continues_the_same_run(run_training):
    first = run_training(max_steps=4, lr_scheduler_type="constant")
    second = run_training(max_steps=8, lr_scheduler_type="constant", resume_from_checkpoint=str(first.folder))
    whole = run_training(max_steps=8, lr_scheduler_type="constant", run_name="whole")
    assert second.folder == first.folder
    assert metric_lines(second.folder) == metric_lines(whole.folder)


def test_steps_keep_the_size_that_two_processes_gave_them_through_every_part(run_training):
    """One process that goes on for two, twice: the options say two micro-batches, for each of two processes."""
    common = {"per_device_train_batch_size": 2, "lr_scheduler_type": "constant", "save_steps": 2}
    whole = run_training(
        run_name="whole", max_steps=6, gradient_accumulation_steps=4, num_train_epochs=3, **common
    )
    run_training(run_name="cut", max_steps=2, gradient_accumulation_steps=4, num_train_epochs=3, **common)
    state_file = whole.folder.parent / "cut" / "checkpoint-2" / "state.json"
    state = json.loads(state_file.read_text())
    assert (state["step_size"], state["data_ranks"]) == (4, 1)
    state_file.write_text(json.dumps({**state, "data_ranks": 2}))
    for steps in (4, 6):
        part = run_training(
            run_name="cut",
            max_steps=steps,
            gradient_accumulation_steps=2,
            num_train_epochs=3,
            resume_from_checkpoint=str(whole.folder.parent / "cut"),
            **common,
        )
        assert json.loads((part.folder / f"checkpoint-{steps}" / "state.json").read_text())["data_ranks"] == 2
    assert metric_lines(part.folder) == metric_lines(whole.folder)


def test_a_run_can_be_resumed_from_anywhere_with_other_options_and_remembers_them(
    run_training, tiny_model_dir, chat_file, tmp_path, monkeypatch
):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    Path("data.jsonl").write_text(chat_file.read_text())
    Path("sys.txt").write_text("Be brief.")
    Path("model").symlink_to(tiny_model_dir)
    first = run_training(
        model="model", dataset="data.jsonl#40", system="sys.txt", output_dir="out", max_steps=2, save_steps=2
    )
    monkeypatch.chdir(tmp_path)
    config = str(first.folder / "config.yaml")
    written = Path(config).read_text()
    with pytest.raises(ConfigError, match="2 steps are done already, 1 are asked for"):
        train(resolve("sft", [config, "--resume_from_checkpoint", str(first.folder), "--max_steps", "1"]))
    assert Path(config).read_text() == written  # which says what was trained
    longer = resolve("sft", [config, "--resume_from_checkpoint", str(first.folder), "--max_steps", "4"])
    assert train(longer, say=lambda text: None).summary["steps"] == 4
    recorded = load_run_config(first.folder)
    assert recorded.config.training.max_steps == 4
    assert recorded.config.checkpoint.resume_from_checkpoint is None
    assert recorded.config.data.dataset == [str(tmp_path / "work" / "data.jsonl") + "#40"]
    assert recorded.config.template.system == str(tmp_path / "work" / "sys.txt")
    again = resolve("sft", [config, "--output_dir", str(tmp_path / "again")])
    whole = train(again, say=lambda text: None)
    assert [row["loss"] for row in metric_lines(whole.folder)][:2] == [
        row["loss"] for row in metric_lines(first.folder)
    ][:2]


def test_going_back_to_an_earlier_checkpoint_sets_the_later_ones_aside(run_training):
    options = {"save_steps": 2, "split_dataset_ratio": 0.2, "eval_steps": 2, "max_steps": 8}
    first = run_training(**options)
    assert (first.folder / "best").resolve().name == "checkpoint-8"
    start = str(first.folder / "checkpoint-4")
    with pytest.raises(Kill.Killed):
        run_training(callbacks=[Kill(5)], resume_from_checkpoint=start, learning_rate=1e-3, **options)
    kept = sorted(path.name for path in first.folder.glob("*checkpoint-*"))
    assert kept == [
        "checkpoint-2", "checkpoint-4", "superseded-checkpoint-6", "superseded-checkpoint-8"
    ]  # fmt: skip
    for link in ("best", "last"):
        assert (first.folder / link).resolve().name == "checkpoint-4"


def test_resuming_a_finished_run_changes_nothing(run_training):
    options = {"max_steps": 4, "save_steps": 2, "split_dataset_ratio": 0.2}
    first = run_training(**options)
    again = run_training(resume_from_checkpoint=str(first.folder), **options)
    assert again.summary["evaluation"] == first.summary["evaluation"]
    assert again.summary["last_loss"] == first.summary["last_loss"]
