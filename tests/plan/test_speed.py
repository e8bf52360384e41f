"""Operations of a step against torch's own counter, and where a plan's time comes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from swift.config.bind import resolve
from swift.models.facts import ModelFacts
from swift.models.tiny import make_tiny_model
from swift.plan import speed
from swift.plan.device import DeviceFacts
from swift.plan.plan import make_plan, remember_run
from swift.train.callbacks.base import Callback
from swift.train.run import train

CPU = DeviceFacts("cpu", 1, 8 << 30)


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SWIFT_HOME", str(tmp_path / "home"))
    make_tiny_model(tmp_path / "model", hidden_size=128, num_layers=3)
    rows = [{"text": "a b c d e f g h " * 16} for _ in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def words(work: Path, more: str) -> list[str]:
    text = (
        f"--model {work / 'model'} --dataset {work / 'rows.jsonl'} --device cpu --max_length 96 --max_steps 2"
    )
    text += (
        f" --truncation_strategy right --split_dataset_ratio 0 --save_strategy no --output_dir {work / 'out'}"
    )
    return f"{text} --padding_free false --gradient_accumulation_steps 2 {more}".split()


class Flops(Callback):
    """Operations of the passes of the first step."""

    def on_train_begin(self, run: Any) -> None:
        self.counter = FlopCounterMode(display=False)
        self.counter.__enter__()

    def on_step_end(self, run: Any) -> None:
        if run.state.step == 1:
            self.counter.__exit__(None, None, None)
            self.found = self.counter.get_total_flops()


def operations(work: Path, more: str) -> tuple[float, float, Any]:
    """(planned without attention, counted, plan): torch counts neither attention on a CPU nor sums in place."""
    counted = Flops()
    more = f"--per_device_train_batch_size 2 {more}"
    train(resolve("pt", words(work, more)), callbacks=[counted], say=lambda text: None)
    plan = make_plan(resolve("pt", words(work, more), planning=True))
    facts = ModelFacts.read(work / "model")
    pairs = (
        2 * 96 * facts.num_attention_heads * facts.head_dim * facts.num_layers * plan.steps["tokens_per_step"]
    )
    passes = 4.5 if "checkpointing" in more else 3.5
    return plan.time["flops_per_step"] - passes * pairs, counted.found, plan


def test_operations_of_full_training(work: Path) -> None:
    planned, counted, _ = operations(work, "--tuner_type full")
    assert planned == pytest.approx(counted, rel=0.01)


def test_operations_of_recomputed_layers(work: Path) -> None:
    planned, counted, plan = operations(work, "--tuner_type full --gradient_checkpointing true")
    # recomputing ends before the last product of a layer (torch's early stop), which the plan counts
    last = 2 * 3 * 128 * 256 * plan.steps["tokens_per_step"]
    assert planned - last == pytest.approx(counted, rel=0.01)


def test_operations_of_adapters(work: Path) -> None:
    planned, counted, plan = operations(work, "--lora_dropout 0")
    adapters = 6 * plan.model["trainable_parameters"] * plan.steps["tokens_per_step"]
    assert counted < planned < counted + adapters


def test_a_reference_runs_forward() -> None:
    facts = ModelFacts.from_config({**speed._SHAPE, **speed._SMALL[0]}, "here")
    plain = speed.Setup(compute="float32", is_lora=True, trainable=1000, tokens=64)
    judged = speed.Setup(compute="float32", is_lora=True, trainable=1000, tokens=64, judged_passes=1)
    outer = facts.parts["embedding"] + facts.parts["head"] + facts.parts["norm"]
    attention = 2 * 32 * facts.num_attention_heads * facts.head_dim * facts.num_layers
    forward = 2 * (facts.num_active_parameters - outer) + 2 * 1000 + attention
    more = speed.micro_batch_flops(facts, judged, 64, 32, 10) - speed.micro_batch_flops(
        facts, plain, 64, 32, 10
    )
    assert more == 64 * forward + 10 * 2 * facts.vocab_size * facts.hidden_size


def test_where_the_time_comes_from(work: Path) -> None:
    resolved = resolve("pt", words(work, ""), planning=True)
    time = make_plan(resolved).time
    assert (time["seconds"], time["source"]) == (None, None) and time["flops_per_step"] > 0
    # a probe: so many operations a second, and what every layer takes at least
    key = f"{speed.device_key(CPU, resolved)}/float32"
    speed.remember("probes", key, {"flops": 1e9, "layer_seconds": 0.01})
    probed = make_plan(resolved).time
    passes = 3 * 2  # layers, micro-batches
    assert probed["source"] == "a probe of this machine"
    assert probed["seconds"] == pytest.approx(2 * (time["flops_per_step"] / 1e9 + passes * 0.01))
    # a run that ended replaces it
    remember_run(resolved, 100.0)
    measured = make_plan(resolved)
    assert measured.time["source"] == "runs like it"
    assert measured.time["seconds"] == pytest.approx(2 * measured.steps["tokens_per_step"] / 100)
    # of another batch size nothing is known
    other = resolve("pt", words(work, "--per_device_train_batch_size 3"), planning=True)
    assert make_plan(other).time["source"] == "a probe of this machine"


def test_the_probe_solves_its_two_equations(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from swift.train import speed as probe

    def seconds(config: dict[str, Any], tokens: int, device: str, dtype: str) -> float:
        facts = ModelFacts.from_config(config, "the probe")
        layers = speed.linear_layers(facts, {})
        trained = probe.PROBE_RANK * sum(layer.inputs + layer.outputs for layer in layers)
        setup = speed.Setup(compute=dtype, is_lora=True, trainable=trained, tokens=tokens)
        return speed.micro_batch_flops(facts, setup, tokens, tokens, tokens) / 5e9 + facts.num_layers * 0.003

    monkeypatch.setattr(probe, "pass_seconds", seconds)
    resolved = resolve("pt", words(work, ""), planning=True)
    pace = speed.measure_pace(resolved, CPU, "float32")
    assert (pace.flops, pace.layer_seconds) == (pytest.approx(5e9), pytest.approx(0.003))
    assert speed.read_pace(CPU, "float32", resolved) == pace


def test_the_probe_runs() -> None:
    from swift.train.speed import pass_seconds

    config, tokens = speed._SMALL
    assert 0 < pass_seconds(config, tokens, "cpu", "float32") < 60
    assert torch.is_grad_enabled()
