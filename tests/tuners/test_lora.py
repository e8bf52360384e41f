"""The LoRA layer against PEFT's, against its own formula, and against itself in separate runs."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from swift.tuners.lora import AdapterSpec, LoraLinear, lora_layers
from swift.tuners.switch import AdapterSwitch, Draw

IN, OUT, RANK = 12, 20, 4


def layer(
    *, bias: bool = True, spec: AdapterSpec | None = None, dtype: torch.dtype = torch.float64, base=None
) -> LoraLinear:
    torch.manual_seed(0)
    made = LoraLinear(base or nn.Linear(IN, OUT, bias=bias).to(dtype), AdapterSwitch("one"))
    made.add_adapter(
        "one", spec or AdapterSpec(RANK, 8), dtype=torch.float64 if dtype == torch.float64 else torch.float32
    )
    with torch.no_grad():
        made.lora_B["one"].normal_(0, 0.3, generator=torch.Generator().manual_seed(3))
    return made


def peft_twin(ours: LoraLinear, *, use_rslora: bool = False) -> PeftLinear:
    spec = ours.specs["one"]
    config = LoraConfig(r=spec.rank, lora_alpha=spec.alpha, use_rslora=use_rslora)
    is_conv = isinstance(ours.base, Conv1D)
    twin = PeftLinear(
        copy.deepcopy(ours.base), "one", config, r=spec.rank, lora_alpha=spec.alpha, fan_in_fan_out=is_conv
    )
    for ours_set, theirs in ((ours.lora_A, twin.lora_A), (ours.lora_B, twin.lora_B)):
        theirs["one"].weight = nn.Parameter(ours_set["one"].detach().clone())
    return twin


@pytest.mark.parametrize("kind", ["bias", "no bias", "conv1d", "rslora"])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_outputs_and_gradients_equal_peft(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    spec = AdapterSpec(RANK, 8, use_rslora=kind == "rslora")
    base = Conv1D(OUT, IN).to(dtype) if kind == "conv1d" else None
    ours = layer(bias=kind != "no bias", spec=spec, dtype=dtype, base=base)
    twin = peft_twin(ours, use_rslora=kind == "rslora")
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(3, 5, IN, dtype=dtype, generator=generator)
    grad = torch.randn(3, 5, OUT, dtype=dtype, generator=generator)
    results = []
    for module, a, b in (
        (ours, ours.lora_A["one"], ours.lora_B["one"]),
        (twin, twin.lora_A["one"].weight, twin.lora_B["one"].weight),
    ):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        y.backward(grad)
        results.append((y.detach(), leaf.grad, a.grad, b.grad))
    for mine, theirs in zip(*results, strict=True):
        assert mine.shape == theirs.shape
        assert (mine - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_gradients_are_right_by_finite_differences() -> None:
    module = layer()
    x = torch.randn(4, IN, dtype=torch.float64, requires_grad=True)

    def run(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, {"lora_A.one": a, "lora_B.one": b}, (x,))

    assert torch.autograd.gradcheck(run, (x, module.lora_A["one"], module.lora_B["one"]))


def test_the_base_gets_no_gradient_and_a_frozen_input_neither() -> None:
    module = layer()
    x = torch.randn(4, IN, dtype=torch.float64)
    module(x).sum().backward()
    assert module.base.weight.grad is None and module.base.bias.grad is None
    assert x.grad is None and module.lora_A["one"].grad is not None


def test_without_an_adapter_it_is_exactly_the_base() -> None:
    module = layer(dtype=torch.float32)
    x = torch.randn(4, IN)
    assert not torch.equal(module(x), module.base(x))
    with module.switch.use(None):
        assert torch.equal(module(x), module.base(x))
    assert module.switch.active == "one"


def test_dropout_keeps_the_right_share_and_the_right_gradients() -> None:
    """Outputs and gradients equal those of the formula with the mask that was drawn."""
    spec = AdapterSpec(IN, IN, dropout=0.25)
    module = layer(spec=spec, bias=False)
    with torch.no_grad():
        module.base.weight.zero_()
        module.lora_A["one"].copy_(torch.eye(IN))
    module.train()
    x = torch.ones(4000, IN, dtype=torch.float64, requires_grad=True)
    y = module(x)
    # B is injective on its columns, so the dropped input can be read off the output.
    dropped = torch.linalg.lstsq(module.lora_B["one"].detach(), y.detach().t()).solution.t()
    mask = dropped > 0.5
    torch.testing.assert_close(dropped, mask.double() / 0.75)
    assert abs(mask.double().mean().item() - 0.75) < 0.01
    assert mask.double().mean(0).std() < 0.02
    grad = torch.randn(y.shape, dtype=torch.float64)
    y.backward(grad)
    a, b = (module.lora_A["one"], module.lora_B["one"])
    leaves = [t.detach().clone().requires_grad_() for t in (x, a, b)]
    expected = (leaves[0] * mask / 0.75) @ leaves[1].t() @ leaves[2].t()
    expected.backward(grad)
    for mine, theirs in zip((x, a, b), leaves, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_dropout_follows_the_seed_and_is_off_in_evaluation() -> None:
    module = layer(spec=AdapterSpec(RANK, 8, dropout=0.5), dtype=torch.float32)
    x = torch.randn(6, IN)
    module.eval()
    assert torch.equal(module(x), module(x))
    module.train()
    torch.manual_seed(7)
    first = module(x)
    assert not torch.equal(first, module(x))
    torch.manual_seed(7)
    assert torch.equal(first, module(x))


def test_mixed_rows_equal_separate_runs_and_do_not_touch_each_other() -> None:
    module = layer(dtype=torch.float32)
    module.add_adapter("two", AdapterSpec(2, 4), seed=9)
    with torch.no_grad():
        module.lora_B["two"].normal_()
    x = torch.randn(6, 5, IN)
    with module.switch.mixed([("two", 2), (None, 1), ("one", 3)]):
        mixed = module(x)
    mixed[:2].sum().backward()
    assert torch.equal(module.lora_A["one"].grad, torch.zeros_like(module.lora_A["one"]))
    alone = {}
    for name in ("one", "two", None):
        with module.switch.use(name):
            alone[name] = module(x[:2] if name == "two" else x[2:3] if name is None else x[3:])
    assert torch.equal(mixed, torch.cat([alone["two"], alone[None], alone["one"]]))
    expected = module.lora_A["two"].grad.clone()
    module.zero_grad()
    alone["two"].sum().backward()
    torch.testing.assert_close(module.lora_A["two"].grad, expected)


@pytest.mark.parametrize("trains", [True, False])
def test_a_mixed_batch_gives_every_gradient_and_runs_the_base_once(trains: bool) -> None:
    """Tokens of one row in groups, one adapter twice, one without any; the head sees fewer tokens."""
    module = layer(spec=AdapterSpec(RANK, 8)).train(trains)
    module.add_adapter("two", AdapterSpec(2, 4), dtype=torch.float64, seed=9)
    with torch.no_grad():
        module.lora_B["two"].normal_(generator=torch.Generator().manual_seed(1))
    groups = (("two", 2), (None, 1), ("one", 3), ("two", 1))
    x = torch.randn(1, 7, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    grad = torch.randn(1, 7, OUT, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    results = []
    for is_mixed in (True, False):
        module.zero_grad()
        given = x.clone().requires_grad_()
        if is_mixed:
            with module.switch.mixed(groups, [("one", 2)]):
                y = module(given)
                kept = module(x[:, 3:5])
        else:
            parts = []
            for (name, _), part in zip(groups, given.split([size for _, size in groups], 1), strict=True):
                with module.switch.use(name):
                    parts.append(module(part))
            y = torch.cat(parts, 1)
            with module.switch.use("one"):
                kept = module(x[:, 3:5])
        (y * grad).sum().backward()
        gradients = [module.lora_A[n].grad.clone() for n in ("one", "two")]
        gradients += [module.lora_B[n].grad.clone() for n in ("one", "two")]
        results.append([y.detach(), kept.detach(), given.grad, *gradients])
    for mixed, alone in zip(*results, strict=True):
        torch.testing.assert_close(mixed, alone, rtol=1e-12, atol=1e-12)
    calls = []
    module.eval().base.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad(), module.switch.mixed(groups):
        torch.testing.assert_close(module(x), results[1][0], rtol=1e-12, atol=1e-12)
    assert len(calls) == 1


def test_mixed_rows_must_add_up() -> None:
    module = layer(dtype=torch.float32)
    with module.switch.mixed([("one", 2)]), pytest.raises(ValueError, match="add up to the 3 rows"):
        module(torch.randn(3, IN))


def test_drawn_dropout_depends_on_seed_micro_batch_and_layer_alone() -> None:
    module = layer(spec=AdapterSpec(RANK, 8, dropout=0.5), dtype=torch.float32).train()
    x = torch.randn(2, 5, IN, generator=torch.Generator().manual_seed(1))

    def run(draw: Draw, key: int = 7) -> torch.Tensor:
        module.key = key
        with module.switch.drawing({"one": draw}):
            return module(x)

    first = run(Draw(1))
    torch.manual_seed(99)
    assert torch.equal(run(Draw(1)), first)
    for other in (run(Draw(2)), run(Draw(1, 1)), run(Draw(1), key=8)):
        assert not torch.equal(other, first)


def test_padded_rows_of_a_mixed_batch_keep_the_noise_of_their_own_width() -> None:
    """Two adapters of one batch: each drops what it would drop alone, whatever stands beside it."""
    module = layer(spec=AdapterSpec(RANK, 8, dropout=0.4), dtype=torch.float64).train()
    module.add_adapter("two", AdapterSpec(2, 8, dropout=0.2), dtype=torch.float64, seed=4)
    with torch.no_grad():
        module.lora_B["two"].normal_(0, 0.3, generator=torch.Generator().manual_seed(8))
    short = torch.randn(3, 4, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    long = torch.randn(2, 7, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    alone = []
    for name, x, draw in (("one", short, Draw(5, 1)), ("two", long, Draw(6, 2))):
        with module.switch.use(name), module.switch.drawing({name: draw}):
            alone.append(module(x))
    both = torch.cat([F.pad(short, (0, 0, 0, 3)), long])
    draws = {"one": Draw(5, 1, (4, 7)), "two": Draw(6, 2, (7, 7))}
    with module.switch.mixed((("one", 3), ("two", 2))), module.switch.drawing(draws):
        mixed = module(both)
    torch.testing.assert_close(mixed[:3, :4], alone[0], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(mixed[3:], alone[1], rtol=1e-13, atol=1e-13)


def test_gradient_checkpointing_recomputes_the_same_dropout() -> None:
    module = layer(spec=AdapterSpec(RANK, 8, dropout=0.3), dtype=torch.float32).train()
    x = torch.randn(4, IN, requires_grad=True)
    gradients = []
    for recompute in (False, True):
        module.zero_grad()
        x.grad = None
        torch.manual_seed(1)
        # Twice the same layer in one graph: nothing of one call may leak into the other.
        run = lambda x: module(F.gelu(module(x))[:, :IN])  # noqa: E731
        y = checkpoint(run, x, use_reentrant=False) if recompute else run(x)
        y.pow(2).sum().backward()
        gradients.append(
            [x.grad.clone(), *(p.grad.clone() for p in module.parameters() if p.grad is not None)]
        )
    assert len(gradients[0]) == 3
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_autocast_computes_in_its_precision_and_keeps_float32_gradients() -> None:
    module = layer(dtype=torch.float32)
    x = torch.randn(8, IN, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    exact = module(x.detach())
    assert (y - exact).abs().max() < 0.05 * exact.abs().max()
    assert module.lora_A["one"].grad.dtype == torch.float32 and x.grad.dtype == torch.float32


def test_bfloat16_base_with_float32_adapter() -> None:
    module = layer(dtype=torch.bfloat16)
    x = torch.randn(8, IN, dtype=torch.bfloat16, requires_grad=True)
    y = module(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16
    assert module.lora_B["one"].grad.dtype == torch.float32
    full = copy.deepcopy(module).float()
    exact = full(x.detach().float())
    assert (y.float() - exact).abs().max() < 0.03 * exact.abs().max()


@pytest.mark.parametrize("with_bias", [True, False])
def test_compiled_path_equals_the_other(with_bias: bool) -> None:
    module = layer(bias=with_bias, dtype=torch.float32)
    x = torch.randn(8, IN)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    a = module.lora_A["one"]
    module(x).pow(2).sum().backward()
    expected, a.grad = a.grad, None
    y = compiled(x)
    y.pow(2).sum().backward()
    torch.testing.assert_close(y, module(x))
    torch.testing.assert_close(a.grad, expected)


def test_delta_is_what_the_adapter_adds() -> None:
    for base in (None, Conv1D(OUT, IN).double()):
        module = layer(base=base)
        x = torch.randn(5, IN, dtype=torch.float64)
        before = module(x)
        with torch.no_grad():
            module.base.weight += module.delta("one")
        with module.switch.use(None):
            torch.testing.assert_close(module(x), before)


def test_start_of_the_adapter() -> None:
    base = nn.Linear(400, 10)
    module = LoraLinear(base, AdapterSwitch("a"))
    module.add_adapter("a", AdapterSpec(64, 64), seed=1)
    module.add_adapter("b", AdapterSpec(64, 64, init="gaussian"), seed=1)
    a, b = module.lora_A["a"], module.lora_A["b"]
    assert a.abs().max() <= 1 / 20 and abs(a.std().item() - 1 / 20 / 3**0.5) < 5e-4
    assert abs(b.std().item() - 1 / 64) < 5e-4
    assert not module.lora_B["a"].any()
    x = torch.randn(3, 400)
    assert torch.equal(module(x), base(x))


def test_copies_of_a_model_share_their_own_switch() -> None:
    first = nn.Sequential(layer(dtype=torch.float32), nn.Identity())
    second = copy.deepcopy(first)
    (inner,) = lora_layers(second).values()
    inner.switch.active = None
    assert first[0].switch.active == "one"
    assert list(lora_layers(first)) == ["0"]
