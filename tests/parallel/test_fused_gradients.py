"""Fused gradients against separate runs, layer by layer counts, and that nothing of one member reaches another."""

import pytest
import torch
from fused_members import KINDS, Kind, alone, attach, base
from torch.utils._python_dispatch import TorchDispatchMode

from swift.config.sections.quantization import QuantizationSection
from swift.parallel.fused import fused_gradients
from swift.tuners.lora import lora_layers


def group(model_dir, kinds=KINDS, dtype=torch.float64, **options):
    model = base(model_dir, dtype, **options)
    return [attach(model, kind, f"m{at}", dtype) for at, kind in enumerate(kinds)]


def fused(members, number=0, kinds=None):
    kinds = kinds or [member.kind for member in members]
    steps = [member.step(number, kind) for member, kind in zip(members, kinds, strict=True)]
    return fused_gradients(steps, members[0].engine._switch)


def relative_difference(first, second):
    """Length of the difference of two gradients over the length of the second."""
    distance = sum((a - b).double().square().sum() for a, b in zip(first, second, strict=True))
    return (distance / sum(b.double().square().sum() for b in second)).sqrt().item()


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("attention", ["auto", "sdpa"])
def test_gradients_equal_those_of_separate_runs(tiny_model_dir, dtype, tolerance, attention):
    """Mixed ranks, lengths, layouts, accumulation, dropout, target modules and losses, all in one group."""
    members = group(tiny_model_dir, dtype=dtype, attention=attention)
    outputs = fused(members)
    for member, output in zip(members, outputs, strict=True):
        together = member.gradients()
        single = attach(base(tiny_model_dir, dtype, attention=attention), member.kind, "default", dtype)
        expected = alone(single)
        assert relative_difference(together, single.gradients()) < tolerance, member.kind.name
        torch.testing.assert_close(output.loss, expected.loss, rtol=tolerance, atol=tolerance)
        assert output.metrics.keys() == expected.metrics.keys()
        for name, value in expected.metrics.items():
            torch.testing.assert_close(output.metrics[name].double(), value.double(), rtol=1e-4, atol=1e-6)


def test_gradient_checkpointing_recomputes_what_each_member_computed(tiny_model_dir):
    members = group(tiny_model_dir)
    fused(members)
    expected = [member.gradients() for member in members]
    model = members[0].engine.model
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    fused(members)
    for member, gradients in zip(members, expected, strict=True):
        assert relative_difference(member.gradients(), gradients) < 1e-12


def test_members_with_a_module_of_their_own_beside_lora(tiny_model_dir):
    """The last norm trained in full by one member: it is run for each, the others keep the base's."""
    kinds = [KINDS[0], Kind("f", [[8, 3]], tuner={"modules_to_save": ["norm"]}, seed=6), KINDS[1]]
    members = group(tiny_model_dir, kinds)
    fused(members)
    for member in members:
        single = attach(base(tiny_model_dir), member.kind, "default")
        alone(single)
        assert relative_difference(member.gradients(), single.gradients()) < 1e-12


class Products(TorchDispatchMode):
    """Counts products with each frozen weight."""

    def __init__(self, layers):
        self.counts = dict.fromkeys(layers, 0)
        self.of_storage = {layer.weight.untyped_storage().data_ptr(): name for name, layer in layers.items()}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            for tensor in args:
                name = self.of_storage.get(tensor.untyped_storage().data_ptr())
                if name is not None:
                    self.counts[name] += 1
        return function(*args, **(kwargs or {}))


def test_every_frozen_layer_runs_once_forward_and_once_backward_in_a_micro_step(tiny_model_dir):
    members = group(tiny_model_dir, [kind for kind in KINDS if kind.loss != "dpo"])
    layers = lora_layers(members[0].engine.model)
    layers.pop("lm_head")  # LoRA on the head is run for each member
    assert len(layers) > 10
    with Products(layers) as products:
        fused(members)
    first = next(
        iter(layers)
    )  # nobody asks for the gradient of the first layers' input: embeddings are frozen
    micro_steps = max(len(member.kind.lengths) for member in members)
    backward = dict.fromkeys(layers, micro_steps)
    for name in layers:
        if name.startswith(first.rpartition("self_attn")[0] + "self_attn") and not name.endswith("o_proj"):
            backward[name] = 0
    assert products.counts == {name: micro_steps + backward[name] for name in layers}


def test_a_member_s_loss_has_no_derivative_by_others_parameters(tiny_model_dir):
    """Exactly zero: where one member alone has targets, all others' gradients are zero or absent."""
    members = group(tiny_model_dir)
    for chosen in members:
        steps = [member.step() for member in members]
        for step, member in zip(steps, members, strict=True):
            if member is not chosen:
                for batch in step.batches:
                    batch.targets.fill_(-100)
                    batch.num_targets = 0
                    batch.target_counts = [0] * len(batch.target_counts or [])
        steps = [
            step for step in steps if step.adapter == chosen.adapter or step.engine.__class__ is not None
        ]
        fused_gradients(steps, members[0].engine._switch)
        for member in members:
            found = [p.grad for p in member.parameters.values() if p.grad is not None]
            if member is chosen:
                assert max(gradient.abs().max().item() for gradient in found) > 1e-6
            else:
                assert all(torch.count_nonzero(gradient) == 0 for gradient in found)
            member.clear()


@pytest.mark.parametrize("change", ["data", "learning rate", "not a number"])
def test_others_stay_bitwise_the_same_whatever_becomes_of_one_member(tiny_model_dir, change):
    kinds = KINDS[:4]

    def train(changed):
        members = group(tiny_model_dir, kinds, torch.float32)
        if changed and change == "not a number":
            next(iter(members[1].parameters.values())).data.fill_(float("nan"))
        if changed and change == "learning rate":
            members[1].engine.parameter_sets["default"].learning_rate = lambda step: 0.5
        for number in range(3):
            now = list(kinds)
            if changed and change == "data":
                now[1] = Kind(**{**vars(kinds[1]), "seed": 77})
            fused(members, number, now)
            for member in members:
                member.update(number)
        return [member.values() for member in members]

    before, after = train(False), train(True)
    for at, (first, second) in enumerate(zip(before, after, strict=True)):
        same = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert same is (at != 1)


def test_a_quantised_base_is_unpacked_once_for_all_members(tiny_model_dir):
    section = QuantizationSection(quant_method="bnb", quant_bits=4)
    kinds = [kind for kind in KINDS if kind.loss != "dpo" and kind.name != "e"]
    members = group(tiny_model_dir, kinds, torch.float32, quantization=section)
    layers = lora_layers(members[0].engine.model)
    calls = dict.fromkeys(layers, 0)

    def count(name):
        def hook(*_):
            calls[name] += 1

        return hook

    for name, layer in layers.items():
        assert layer.is_quantised
        layer.base.register_forward_hook(count(name))
    fused(members)
    assert set(calls.values()) == {3}
    for member in members:
        together = member.gradients()
        single = attach(
            base(tiny_model_dir, torch.float32, quantization=section), member.kind, "default", torch.float32
        )
        alone(single)
        assert relative_difference(together, single.gradients()) < 1e-5


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_members_of_equal_shape_are_computed_by_batched_products(tiny_model_dir, dtype, tolerance, dropout):
    """As in a sweep over seeds and learning rates: gradients as alone, and others bitwise the same beside NaN."""
    kinds = [Kind(f"e{at}", [[7, 5], [4, 8]], tuner={"lora_dropout": dropout}, seed=at) for at in range(4)]
    members = group(tiny_model_dir, kinds, dtype)
    fused(members)
    together = [member.gradients() for member in members]
    for member, gradients in zip(members, together, strict=True):
        single = attach(base(tiny_model_dir, dtype), member.kind, "default", dtype)
        alone(single)
        assert relative_difference(gradients, single.gradients()) < tolerance
    members[2].parameters[next(iter(members[2].parameters))].data.fill_(float("nan"))
    fused(members)
    for at, member in enumerate(members):
        same = all(torch.equal(a, b) for a, b in zip(member.gradients(), together[at], strict=True))
        assert same is (at != 2)
