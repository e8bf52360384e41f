"""Every tuner through the real training loop: learns, changes only what it should, saves, loads, merges, resumes."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from swift.cli.merge_lora import merge
from swift.config.bind import resolve
from swift.core.errors import ModelError
from swift.models.load import load_model
from swift.models.tiny import make_tiny_model
from swift.plan.plan import make_plan
from swift.runs.metrics import read_metrics
from swift.train.callbacks.base import Callback
from swift.train.run import train
from swift.tuners.apply import tuned_model
from swift.tuners.peft_format import load_adapter
from swift.tuners.starts import keeps_start

TOKENS = torch.arange(3, 19)[None]


@dataclass
class Case:
    options: dict[str, Any] = field(default_factory=dict)
    learning_rate: float = 1e-2
    in_peft: bool = True
    can_merge: bool = True
    same_at_first: bool = True
    model: str = "qwen3"


CASES = {
    "dora": Case({"use_dora": True, "lora_dropout": 0.1}),
    "pissa": Case({"init_weights": "pissa", "lora_rank": 4, "lora_dropout": 0.1}, 1e-3),
    "adalora": Case({"tuner_type": "adalora", "adalora_tinit": 1, "adalora_tfinal": 2, "adalora_init_r": 6,
                     "adalora_target_r": 3}, 2e-2),
    "vera": Case({"tuner_type": "vera", "vera_rank": 16}, 5e-2),
    "reft": Case({"tuner_type": "reft", "reft_rank": 8}, 1e-1, in_peft=False, can_merge=False),
    "llamapro": Case({"tuner_type": "llamapro", "llamapro_num_new_blocks": 2}, in_peft=False, can_merge=False),
    "experts": Case({"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
                     "lora_rank": 2}, model="qwen3_moe"),
    "lora": Case({"lora_dropout": 0.1}),
    "rslora": Case({"use_rslora": True, "init_weights": "gaussian"}),
    "pissa randomised": Case({"init_weights": "pissa_niter_4", "lora_rank": 4, "use_rslora": True}, 1e-3),
    "olora": Case({"init_weights": "olora", "lora_rank": 4}, 1e-3),
    "lora-ga": Case({"init_weights": "lora-ga", "lora_rank": 4}, 1e-3),
    "eva": Case({"init_weights": "eva", "lora_rank": 4}),
    "longlora": Case({"longlora_group_size": 8, "modules_to_save": ["norm", "input_layernorm"]}),
    "oft": Case({"tuner_type": "oft", "oft_block_size": 12}),
    "boft": Case({"tuner_type": "boft"}),
    "ia3": Case({"tuner_type": "ia3"}, 1e-1),
    "loha": Case({"tuner_type": "loha"}),
    "lokr": Case({"tuner_type": "lokr"}),
    "fourierft": Case({"tuner_type": "fourierft", "fourier_n_frequency": 200}, 1e-1, same_at_first=False),
    "bone": Case({"tuner_type": "bone", "lora_rank": 4}),
    "bat": Case({"tuner_type": "bone", "lora_rank": 4, "init_weights": "bat"}),
    "adapter": Case({"tuner_type": "adapter", "adapter_length": 8}, in_peft=False, can_merge=False),
    "lisa": Case({"tuner_type": "full", "lisa_activated_layers": 1, "lisa_step_interval": 2},
                 in_peft=False, can_merge=False),
}  # fmt: skip


class Last(Callback):
    """Keeps what the trained model computes, with and without its adapter."""

    def on_train_begin(self, run: Any) -> None:
        self.first = self._logits(run.engine.model)

    def on_train_end(self, run: Any, summary: dict[str, Any]) -> None:
        self.model = run.engine.model
        self.last = self._logits(self.model)
        sets = run.engine.parameter_sets
        self.count = sum(p.numel() for group in sets.values() for p in group.parameters.values())

    @torch.no_grad()
    def _logits(self, model: Any) -> torch.Tensor:
        was, _ = model.training, model.eval()
        logits = model(input_ids=TOKENS, use_cache=False).logits
        model.train(was)
        return logits


@pytest.fixture(scope="module")
def models(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("moe") / "moe"
    return {"qwen3": tiny_model_dir, "qwen3_moe": make_tiny_model(folder, architecture="qwen3_moe")}


@pytest.fixture
def options(tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("SWIFT_HOME", str(tmp_path / "home"))
    rows = [("the answer is", "red green blue " * 3), ("count to three", "one two three " * 2)] * 8
    lines = [
        json.dumps({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]})
        for q, a in rows
    ]
    (tmp_path / "chat.jsonl").write_text("\n".join(lines))
    return {
        "dataset": str(tmp_path / "chat.jsonl"), "output_dir": str(tmp_path / "out"), "max_length": 128,
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "logging_steps": 1, "max_steps": 6,
        "num_train_epochs": 4, "save_steps": 3, "lr_scheduler_type": "constant", "weight_decay": 0.0,
    }  # fmt: skip


def run(values: dict[str, Any], **more: Any) -> tuple[Path, Last]:
    last = Last()
    result = train(resolve("sft", values={**values, **more}), callbacks=[last], say=lambda text: None)
    return result.folder, last


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {f"{file.name}/{name}": value for file in files for name, value in load_file(file).items()}


@pytest.mark.parametrize("name", CASES)
def test_method(name: str, options: dict[str, Any], models: dict[str, Path], tmp_path: Path) -> None:
    case = CASES[name]
    base = models[case.model]
    values = {**options, "model": str(base), "learning_rate": case.learning_rate, **case.options}
    before = load_model(base, dtype=torch.float32).eval()
    untouched = before(input_ids=TOKENS, use_cache=False).logits
    planned = make_plan(resolve("sft", values=values)).model["trainable_parameters"]

    folder, trained = run(values, run_name="whole")
    losses = [row["loss"] for row in read_metrics(folder / "metrics.jsonl")]
    assert losses[-1] < losses[0] - 0.05
    assert trained.count == planned
    if case.same_at_first:
        torch.testing.assert_close(trained.first, untouched, atol=1e-4, rtol=1e-4)
    assert (trained.last - untouched).abs().max() > 1e-3

    whole_model = case.options.get("tuner_type") in ("full", "llamapro")
    if whole_model:
        check_whole(name, folder / "last", before, trained)
    else:
        with tuned_model(trained.model).adapter_disabled():
            assert torch.equal(trained._logits(trained.model), untouched)
        check_adapter(case, folder / "last", base, trained.last, tmp_path)

    (tmp_path / "out" / "cut").mkdir()
    shutil.copytree(folder, tmp_path / "out" / "cut", symlinks=True, dirs_exist_ok=True)
    start = str(tmp_path / "out" / "cut" / "checkpoint-3")
    cut, again = run(values, run_name="cut", resume_from_checkpoint=start)
    assert torch.equal(again.last, trained.last)
    ours, theirs = weights(cut / "last"), weights(folder / "last")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def check_adapter(case: Case, last: Path, base: Path, expected: torch.Tensor, tmp_path: Path) -> None:
    ours = load_model(base, dtype=torch.float32).eval()
    load_adapter(ours, last)
    found = ours.eval()(input_ids=TOKENS, use_cache=False).logits
    if keeps_start(case.options.get("init_weights", "")):  # the stored rank is twice as large: another sum
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    else:
        assert torch.equal(found, expected)
    if case.in_peft:
        from peft import PeftModel

        theirs = PeftModel.from_pretrained(load_model(base, dtype=torch.float32), last).eval()
        found = theirs(input_ids=TOKENS, use_cache=False).logits
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    merging = resolve("merge-lora", values={"adapters": [str(last)], "output_dir": str(tmp_path / "merged")})
    if not case.can_merge:
        with pytest.raises(ModelError, match="cannot be merged"):
            merge(merging)
        return
    merged = load_model(merge(merging), dtype=torch.float32).eval()
    found = merged(input_ids=TOKENS, use_cache=False).logits
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def check_whole(name: str, last: Path, before: Any, trained: Last) -> None:
    stored = load_model(last, dtype=torch.float32).eval()
    assert torch.equal(stored(input_ids=TOKENS, use_cache=False).logits, trained.last)
    old, new = dict(before.named_parameters()), dict(stored.named_parameters())
    if name == "lisa":
        assert any(not torch.equal(old[key], new[key]) for key in old if "layers." in key)
        return
    assert stored.config.num_hidden_layers == 4
    for key, value in new.items():  # layers 1 and 3 are new, 0 and 2 are the old ones
        number = int(key.split(".")[2]) if ".layers." in key else None
        if number is None:
            assert torch.equal(value, old[key])
        elif number in (0, 2):
            assert torch.equal(value, old[key.replace(f".{number}.", f".{number // 2}.")])
