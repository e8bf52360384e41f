"""Every optimizer: the loss falls, its state is saved, a resumed run is the uninterrupted one to the last bit."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch

from swift.config.bind import resolve
from swift.config.sections.optimizer import OptimizerSection
from swift.config.sections.training import TrainingSection
from swift.core.errors import ConfigError
from swift.runs.metrics import read_metrics
from swift.train import optimizers
from swift.train.low_rank import LowRankAdamW, pack_4bit, unpack_4bit
from swift.train.optimizers import OPTIMIZERS, build_optimizer

LOW_RANK = {"galore_rank": 4, "galore_update_proj_gap": 3}
CASES = {name: ({"optim": name}, 2e-2) for name in OPTIMIZERS}
CASES["galore_adamw"] = ({"optim": "galore_adamw", **LOW_RANK}, 2e-2)
CASES["q-galore"] = ({"optim": "galore_adamw", "galore_quantization": True, **LOW_RANK}, 2e-2)
CASES["apollo_adamw"] = ({"optim": "apollo_adamw", **LOW_RANK}, 2e-2)
CASES["apollo mini"] = (
    {"optim": "apollo_adamw", "apollo_scale_type": "tensor", "galore_rank": 1, "galore_scale": 2.0},
    2e-2,
)
for name in ("lion", "lion_8bit", "paged_lion", "paged_lion_8bit"):
    CASES[name] = ({"optim": name}, 4e-3)


def make_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(32, 160), torch.nn.Tanh(), torch.nn.Linear(160, 16))


def make(name: str, model: torch.nn.Module) -> torch.optim.Optimizer:
    options, rate = CASES[name]
    section = OptimizerSection(**options)  # type: ignore[arg-type]
    training = TrainingSection(learning_rate=rate, weight_decay=0.01)
    return build_optimizer(dict(model.named_parameters()), training, section, torch.device("cpu"))


def switch(optimizer: torch.optim.Optimizer, mode: str) -> None:
    if hasattr(optimizer, mode):
        getattr(optimizer, mode)()


def steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> list[float]:
    losses = []
    switch(optimizer, "train")
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(64, 32, generator=generator)
        loss = (model(x) - x[:, :16].sin()).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    switch(optimizer, "eval")
    return losses


@pytest.mark.parametrize("name", CASES)
def test_learns_and_resumes_exactly(name: str) -> None:
    model = make_model()
    optimizer = make(name, model)
    losses = steps(model, optimizer, 0, 25)
    assert losses[-1] < 0.8 * losses[0]
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again = make_model()
    again.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed = make(name, again)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert steps(again, resumed, 25, 32) == steps(model, optimizer, 25, 32)
    for mine, other in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_every_optimizer_of_the_option_is_in_the_table() -> None:
    annotation = OptimizerSection.model_fields["optim"].annotation
    assert list(OPTIMIZERS) == list(annotation.__args__)  # type: ignore[union-attr]


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        optimizers.check_optimizer(OptimizerSection(optim="paged_adamw_8bit"))
    assert caught.value.fix == "pip install 'swift-forge[bnb]'"


def test_lora_plus_multiplies_the_rate_of_b_only() -> None:
    parameters = {
        f"layer.q_proj.{name}.default": torch.nn.Parameter(torch.zeros(2, 2)) for name in ("lora_A", "lora_B")
    }
    section = OptimizerSection(lorap_lr_ratio=16)
    built = build_optimizer(parameters, TrainingSection(learning_rate=1e-3), section, torch.device("cpu"))
    ratios = {id(p): group.get("lr_ratio", 1.0) for group in built.param_groups for p in group["params"]}
    assert [ratios[id(p)] for p in parameters.values()] == [1.0, 16]


def one_step(method: str, gradient: torch.Tensor, rank: int, **options: object) -> torch.Tensor:
    """What one step subtracts at rate 1."""
    parameter = torch.nn.Parameter(torch.zeros_like(gradient))
    parameter.grad = gradient.clone()
    LowRankAdamW(
        [{"params": [parameter], "rank": rank}],
        lr=1.0,
        betas=(0.9, 0.95),
        eps=1e-12,
        method=method,
        gap=10,
        scale=1.0,
        **options,  # type: ignore[arg-type]
    ).step()
    return -parameter.detach()


@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
def test_galore_by_hand(shape: tuple[int, int]) -> None:
    """The first step of Adam is the sign; of the projected gradient here, projected back."""
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    left, _, right = torch.linalg.svd(gradient, full_matrices=False)
    if shape[0] <= shape[1]:
        basis = left[:, :3]
        expected = basis @ torch.sign(basis.t() @ gradient)
    else:
        basis = right[:3].t()
        expected = torch.sign(gradient @ basis) @ basis.t()
    torch.testing.assert_close(one_step("galore", gradient, 3), expected, rtol=1e-4, atol=1e-4)


def test_apollo_scales_whole_channels() -> None:
    gradient = torch.randn(6, 10, generator=torch.Generator().manual_seed(3))
    channel = one_step("apollo", gradient, 2) / gradient
    torch.testing.assert_close(channel, channel[:1].expand(6, 10), rtol=1e-4, atol=1e-4)
    assert channel.std() > 0
    tensor = one_step("apollo", gradient, 2, per_channel=False) / gradient
    torch.testing.assert_close(tensor, tensor[:1, :1].expand(6, 10), rtol=1e-4, atol=1e-4)


def test_four_bits() -> None:
    values = torch.randn(3, 100, generator=torch.Generator().manual_seed(4))
    packed, scale = pack_4bit(values)
    assert (
        packed.dtype == torch.uint8 and packed.numel() == 256
    )  # 300 numbers in two groups of 256, two a byte
    back = unpack_4bit(packed, scale, (3, 100))
    assert (back - values).abs().max() <= scale.max() / 14 + 1e-6


@pytest.mark.parametrize(
    "tuner", [{"tuner_type": "reft"}, {"tuner_type": "full", "lisa_activated_layers": 1}]
)
def test_an_optimizer_of_two_parts_serves_tuners_that_act_after_steps(
    run_training: Any, tuner: dict[str, Any]
) -> None:
    folder = run_training(optim="muon", max_steps=3, **tuner).folder
    assert len(read_metrics(folder / "metrics.jsonl")) >= 3


@pytest.mark.parametrize(
    ("optim", "option"), [("adafactor", "adam_beta1"), ("paged_lion_8bit", "adam_epsilon")]
)
def test_options_that_an_optimizer_does_not_know_are_refused(optim: str, option: str) -> None:
    with pytest.raises(ConfigError, match=f"has no effect with optim {optim}"):
        resolve("sft", values={"model": "m", "dataset": "d.jsonl", "optim": optim, option: 0.5})
