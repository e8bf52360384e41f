"""What a run computes and leaves behind."""

import importlib.util
import json
import math
import os
import signal
from functools import partial

import pytest
import torch
import yaml

from swift.core.errors import ConfigError, DataError, ModelError, SwiftError
from swift.runs.metrics import read_metrics
from swift.runs.status import read_status
from swift.train.callbacks.base import Callback
from swift.train.callbacks.user import load_callbacks
from swift.train.loop import Interrupted


def training_lines(folder):
    return [line for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]


class Record(Callback):
    """Keeps the batches' sample ids and the events."""

    def __init__(self):
        self.events = []

    def __getattribute__(self, name):
        if name.startswith("on_"):
            return lambda *args: object.__getattribute__(self, "events").append(name)
        return object.__getattribute__(self, name)


def test_run_folder_is_complete(run_training):
    result = run_training(split_dataset_ratio=0.2, save_steps=5, run_name="r")
    names = {entry.name for entry in result.folder.iterdir()}
    assert names >= {
        "config.yaml", "provenance.json", "metrics.jsonl", "log.txt", "logs", "env.json", "status.json",
        "curves.png", "summary.json", "val_dataset.jsonl", "checkpoint-5", "best", "last",
    }  # fmt: skip
    line = training_lines(result.folder)[-1]
    assert set(line) >= {
        "step", "epoch", "loss", "grad_norm", "learning_rate", "tokens_per_second", "step_time", "num_tokens",
        "gpu_mem_usage",
    }  # fmt: skip
    evaluations = [row for row in read_metrics(result.folder / "metrics.jsonl") if "eval_loss" in row]
    assert math.exp(evaluations[-1]["eval_loss"]) == pytest.approx(evaluations[-1]["eval_perplexity"])
    assert 0 <= evaluations[-1]["eval_token_accuracy"] <= 1
    assert len((result.folder / "val_dataset.jsonl").read_text().splitlines()) == 12
    assert read_status(result.folder)["state"] == "succeeded"
    log = [json.loads(text) for text in (result.folder / "logs" / "rank-0.jsonl").read_text().splitlines()]
    assert all({"time", "level", "message", "rank", "run"} <= set(entry) for entry in log)
    assert json.loads((result.folder / "summary.json").read_text())["steps"] == 12


def test_config_of_a_run_repeats_it(run_training, tmp_path):
    first = run_training(run_name="first", lora_rank=4)
    config = first.folder / "config.yaml"
    assert yaml.safe_load(config.read_text())["tuner"]["lora_rank"] == 4
    from swift.config.bind import resolve
    from swift.train.run import train

    again = train(resolve("sft", [str(config), "--run_name", "again"]), say=lambda text: None)
    losses = [[line["loss"] for line in training_lines(run.folder)] for run in (first, again)]
    assert losses[0] == losses[1]


def test_losses_equal_an_independent_loop(run_training, tiny_model_dir):
    """Same start, same rows: PEFT + transformers' loss with a padding mask + AdamW give the same losses."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    rows_of_steps = []

    class Rows(Callback):
        def on_train_begin(self, run):
            original = run.engine.forward_backward

            def recorded(batches, *rest):
                rows_of_steps.append(batches)
                return original(batches, *rest)

            run.engine.forward_backward = recorded  # an instance attribute of our own object

    start = run_training(run_name="start", max_steps=1, learning_rate=1e-12, weight_decay=0.0)
    options = {"max_steps": 6, "gradient_accumulation_steps": 2, "learning_rate": 5e-3, "padding_free": False}
    result = run_training(
        callbacks=[Rows()], run_name="ours", adapters=[str(start.folder / "last")], **options
    )
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model = PeftModel.from_pretrained(base, start.folder / "last", is_trainable=True).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    expected = []
    for step, batches in enumerate(rows_of_steps):
        count = sum(batch.num_targets for batch in batches)
        total = 0.0
        for batch in batches:
            lengths = batch.targets.shape[1]
            labels = torch.full_like(batch.targets, -100)
            labels[:, 1:] = batch.targets[:, :-1]
            mask = torch.zeros_like(batch.input_ids)
            for row in range(len(mask)):
                real = (batch.input_ids[row] != 0).nonzero().max() + 1
                mask[row, : max(int(real), int((labels[row] != -100).nonzero().max()) + 1)] = 1
            assert mask.shape[1] == lengths
            loss = model(
                input_ids=batch.input_ids, attention_mask=mask, labels=labels, num_items_in_batch=count
            ).loss
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * 0.5 * (1 + math.cos(math.pi * step / 6))
        optimizer.step()
        optimizer.zero_grad()
        expected.append(total)
    assert [line["loss"] for line in training_lines(result.folder)] == pytest.approx(expected, rel=2e-5)


def test_loss_falls(run_training):
    result = run_training(num_train_epochs=6, lr_scheduler_type="constant")
    assert result.summary["last_loss"] < result.summary["first_loss"] - 0.5


def test_joined_rows_are_the_default_and_equal_padded_ones(run_training):
    """The same random samples in the same steps; only padding differs."""
    joined = run_training(run_name="joined")
    padded = run_training(run_name="padded", padding_free=False, group_by_length=False)
    assert "padding_free: true" in (joined.folder / "config.yaml").read_text()
    ours, theirs = ([line["loss"] for line in training_lines(run.folder)] for run in (joined, padded))
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_signal_saves_and_names_the_resume_command(run_training):
    options = {"save_steps": 100, "split_dataset_ratio": 0.2, "eval_steps": 5}

    class Terminate(Callback):
        def on_step_end(self, run):
            if run.state.step == 5:
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted) as caught:
        run_training(callbacks=[Terminate()], run_name="stopped", **options)
    assert caught.value.exit_code == 128 + signal.SIGTERM
    folder = caught.value.fix.split()[-1]
    assert caught.value.fix == f"swift resume {folder}"
    resumed = run_training(resume_from_checkpoint=folder, **options)
    whole = run_training(run_name="whole", **options)
    for key in ("loss", "eval_loss"):
        ours, theirs = (
            [(row["step"], row[key]) for row in read_metrics(run.folder / "metrics.jsonl") if key in row]
            for run in (resumed, whole)
        )
        assert ours == theirs


def test_signal_during_an_evaluation_leaves_it_to_the_resumed_run(run_training):
    options = {
        "save_steps": 100,
        "split_dataset_ratio": 0.2,
        "eval_steps": 5,
        "per_device_eval_batch_size": 2,
    }
    asked = []

    class Terminate(Callback):
        def on_train_begin(self, run):
            run.evaluator.run = partial(evaluate, run.evaluator.run)

    def evaluate(original, engine, given_up):
        def counting():
            asked.append(given_up())
            if len(asked) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return given_up()

        return original(engine, counting)

    with pytest.raises(Interrupted):
        run_training(callbacks=[Terminate()], run_name="stopped", max_steps=7, **options)
    assert len(asked) == 2  # the first batch was evaluated, then no other
    folder = run_training(resume_from_checkpoint="last", max_steps=7, **options).folder
    whole = run_training(run_name="whole", max_steps=7, **options).folder
    for key in ("loss", "eval_loss"):
        ours, theirs = (
            [(row["step"], row[key]) for row in read_metrics(path / "metrics.jsonl") if key in row]
            for path in (folder, whole)
        )
        assert ours == theirs


def test_status_of_a_stopped_run(run_training, tmp_path):
    class Interrupt(Callback):
        def on_step_end(self, run):
            if run.state.step == 2:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        run_training(callbacks=[Interrupt()], run_name="stopped")
    status = read_status(tmp_path / "output" / "stopped")
    assert status["state"] == "stopped"
    assert status["step"] == 2


def test_nonfinite_loss_stops_the_run_and_keeps_good_weights(run_training, tmp_path):
    class Spoil(Callback):
        def on_step_end(self, run):
            if run.state.step == 3:
                next(iter(run.engine.gather().values())).fill_(float("nan"))

    with pytest.raises(SwiftError, match="not finite at step 4") as caught:
        run_training(callbacks=[Spoil()], save_steps=2, run_name="nan")
    assert "checkpoint-2" in caught.value.fix
    assert read_status(tmp_path / "output" / "nan")["state"] == "failed"
    assert not (tmp_path / "output" / "nan" / "checkpoint-4").exists()


def test_best_and_last_and_limit(run_training):
    result = run_training(
        split_dataset_ratio=0.2, save_steps=2, save_total_limit=1, num_train_epochs=2, learning_rate=0.3
    )
    evaluations = {
        row["step"]: row["eval_loss"]
        for row in read_metrics(result.folder / "metrics.jsonl")
        if "eval_loss" in row
    }
    best = min(evaluations, key=evaluations.get)
    assert (result.folder / "best").resolve().name == f"checkpoint-{best}"
    assert (result.folder / "last").resolve().name == f"checkpoint-{max(evaluations)}"
    kept = {path.name for path in result.folder.glob("checkpoint-*")}
    assert len(kept) <= 3
    assert {f"checkpoint-{best}", f"checkpoint-{max(evaluations)}"} <= kept
    assert result.summary["best_metric"] == evaluations[best]


def test_early_stop(run_training):
    result = run_training(
        split_dataset_ratio=0.2, eval_steps=1, save_steps=1, num_train_epochs=50, learning_rate=1e-12,
        early_stop_interval=3, save_total_limit=1,
    )  # fmt: skip
    assert "did not improve" in result.summary["stop_reason"]
    assert result.summary["steps"] < 600


def test_steps_after_the_last_line_are_logged_when_a_run_ends_early(run_training):
    class Enough(Callback):
        def on_evaluate(self, run, metrics):
            if run.state.step == 4:
                run.stop("enough")

    result = run_training(
        callbacks=[Enough()], split_dataset_ratio=0.2, eval_steps=2, save_steps=100, logging_steps=3
    )
    rows = read_metrics(result.folder / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == [1, 3, 4]


def test_callbacks_see_the_run(run_training, tmp_path):
    recorder = Record()
    run_training(callbacks=[recorder], max_steps=2, split_dataset_ratio=0.2, save_steps=2)
    assert recorder.events[0] == "on_train_begin"
    assert recorder.events[-1] == "on_train_end"
    assert {"on_step_end", "on_log", "on_evaluate", "on_save"} <= set(recorder.events)
    file = tmp_path / "mine.py"
    file.write_text(
        "from swift.train.callbacks.base import Callback\n"
        "class Stop(Callback):\n"
        "    def on_log(self, run, metrics):\n"
        "        run.stop('enough')\n"
    )
    result = run_training(callbacks=load_callbacks([f"{file}:Stop"]))
    assert result.summary["steps"] == 1
    assert result.summary["stop_reason"] == "enough"


def test_user_callback_errors(tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("import nothing_of_this_name\n")
    with pytest.raises(ConfigError, match="cannot be imported"):
        load_callbacks([str(broken)])
    with pytest.raises(ConfigError, match="no such file"):
        load_callbacks([str(tmp_path / "absent.py")])


def test_errors_come_before_the_run_folder(run_training, tmp_path):
    with pytest.raises(SwiftError):
        run_training(model=str(tmp_path / "no-model"))
    with pytest.raises(DataError):
        run_training(dataset=str(tmp_path / "no-data.jsonl"))
    with pytest.raises(SwiftError, match="takes 2 processes"):
        run_training(tensor_parallel_size=2)
    with pytest.raises(ConfigError, match="leaves the noise out"):
        run_training(torch_compile=True, neftune_noise_alpha=5)
    with pytest.raises(ConfigError, match="float16 computation"):
        run_training(torch_dtype="float16", lora_dtype="float16")
    with pytest.raises(ModelError, match="no such folder"):
        run_training(adapters=[str(tmp_path / "no-adapter")])
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot create a run folder"):
        run_training(output_dir=str(tmp_path / "file" / "runs"))
    assert not (tmp_path / "output").exists()


def test_storage_precision_must_fit_the_computation(run_training, tmp_path):
    with pytest.raises(ConfigError, match="stored in bfloat16 cannot be trained in float32"):
        run_training(tuner_type="full", torch_dtype="float32", param_dtype="bfloat16")
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "frozen",
    [
        {"freeze_parameters_regex": r"embed|layers\.0"},
        {"freeze_parameters_regex": ".*", "trainable_parameters_regex": "norm"},
        {"freeze_parameters_ratio": 0.5},
    ],
)
def test_half_precision_with_frozen_parts_is_close_to_float32(run_training, dtype, frozen):
    options = {"tuner_type": "full", "max_steps": 3, "learning_rate": 1e-3, **frozen}
    half, full = (run_training(torch_dtype=name, **options) for name in (dtype, "float32"))
    for key, tolerance in (("loss", 2e-3), ("grad_norm", 3e-2)):
        ours, theirs = ([row[key] for row in training_lines(run.folder)] for run in (half, full))
        assert ours == pytest.approx(theirs, rel=tolerance)


def test_debug_mode_shows_alignment(tiny_model_dir, chat_file, tmp_path):
    from swift.config.bind import resolve
    from swift.train.run import train

    said = []
    values = {
        "model": str(tiny_model_dir), "dataset": str(chat_file), "output_dir": str(tmp_path), "max_steps": 1,
        "max_length": 160, "debug_mode": True,
    }  # fmt: skip
    train(resolve("sft", values=values), say=said.append)
    text = "\n".join(said)
    assert "first batch:" in text
    assert "input embeddings:" in text
    assert "mean_norm" in text


def test_full_training_writes_a_loadable_model(run_training):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = run_training(tuner_type="full", learning_rate=1e-3, max_steps=3)
    model = AutoModelForCausalLM.from_pretrained(result.folder / "last")
    assert AutoTokenizer.from_pretrained(result.folder / "last").chat_template
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_pretraining_on_plain_text(run_training, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"line {i} of a small book about numbers and letters" for i in range(30)))
    result = run_training(command="pt", dataset=str(text), truncation_strategy="split", num_train_epochs=4)
    assert result.summary["last_loss"] < result.summary["first_loss"]


def test_missing_callbacks_and_taken_names_are_refused_before_torch(tiny_model_dir, chat_file, tmp_path):
    from swift.config.bind import resolve
    from swift.train.preflight import preflight

    words = ["--model", str(tiny_model_dir), "--dataset", str(chat_file), "--output_dir", str(tmp_path)]
    with pytest.raises(ConfigError, match="no such file"):
        preflight(resolve("sft", [*words, "--callbacks", str(tmp_path / "absent.py")]))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "config.yaml").write_text("command: sft\n")
    with pytest.raises(ConfigError, match="already holds a run"):
        preflight(resolve("sft", [*words, "--run_name", "taken"]))
    assert preflight(resolve("sft", [*words, "--run_name", "free"])) == tiny_model_dir
    with pytest.raises(ConfigError, match="flash_attn is not installed"):
        preflight(resolve("sft", [*words, "--attn_impl", "flash_attention_2"]))


@pytest.mark.parametrize(
    ("devices", "wanted", "has"), [(0, 17, "2 cores and no accel"), (4, 8, "4 CUDA devices")]
)
def test_more_processes_than_the_machine_can_run_are_not_started(
    tiny_model_dir, chat_file, monkeypatch, devices, wanted, has
):
    from swift.config.bind import resolve
    from swift.train.preflight import preflight

    monkeypatch.setattr("swift.train.preflight.cpu_count", lambda: 2)
    monkeypatch.setattr("swift.train.preflight.nvidia_memory", lambda: [80 << 30] * devices)
    words = ["--model", str(tiny_model_dir), "--dataset", str(chat_file), "--nproc_per_node"]
    with pytest.raises(ConfigError, match=f"takes {wanted} processes") as caught:
        preflight(resolve("sft", [*words, str(wanted)]))
    assert has in str(caught.value.why)
    preflight(resolve("sft", [*words, "4"]))


def test_recomputing_some_layers_changes_nothing_but_memory(run_training):
    recomputed = []

    class Count(Callback):
        def on_train_begin(self, run):
            layers = run.engine.model.base_model.layers
            recomputed.append([layer.gradient_checkpointing for layer in layers])

    results = [
        run_training(callbacks=[Count()], run_name=f"r{number}", gradient_checkpointing=number > 0, **options)
        for number, options in enumerate([{}, {"recompute_num_layers": 1}, {}])
    ]
    assert [sum(flags) for flags in recomputed] == [0, 1, len(recomputed[0])]
    losses = [
        [line["loss"] for line in read_metrics(result.folder / "metrics.jsonl") if "loss" in line]
        for result in results
    ]
    assert losses[0] == losses[1] == losses[2]


def test_offloading_needs_an_accelerator(run_training):
    with pytest.raises(ConfigError, match="needs an accelerator"):
        run_training(activation_cpu_offload=True)


@pytest.mark.parametrize("options", [{"lora_rank": 4}, {"use_rslora": True}, {"target_modules": ["q_proj"]}])
def test_tuner_options_beside_an_adapter_are_refused(run_training, options):
    start = run_training(run_name="start", max_steps=1)
    with pytest.raises(ConfigError, match="would have no effect"):
        run_training(run_name="more", max_steps=1, adapters=[str(start.folder)], **options)
    run_training(run_name="same", max_steps=1, adapters=[str(start.folder)], lora_rank=8)


def test_peft_is_asked_for_before_anything_is_loaded(run_training, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else find(name))
    with pytest.raises(ConfigError, match="peft is not installed") as error:
        run_training(use_dora=True)
    assert error.value.fix == "pip install 'swift-forge[tuners]'"


def test_a_run_that_ended_before_its_first_checkpoint_says_what_to_do(run_training, tmp_path):
    class Fail(Callback):
        def on_train_begin(self, run):
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        run_training(run_name="early", callbacks=[Fail()])
    with pytest.raises(ConfigError, match="ended before its first checkpoint") as error:
        run_training(run_name="early")
    assert error.value.fix.startswith(f"delete it: rm -r {tmp_path / 'output' / 'early'}")
