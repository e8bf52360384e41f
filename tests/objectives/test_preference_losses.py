"""Losses of preferences: worked values and what they refuse."""

import math

import pytest
import torch

from swift.core.errors import ConfigError
from swift.objectives import kto_loss, preference_loss, reward_loss
from swift.objectives.preference.losses import PREFERENCE_LOSSES, needs_reference

D = torch.float64


def one(value):
    return torch.tensor([value], dtype=D)


def pair(kind, *, beta=0.1, lengths=None, chosen=-10.0, rejected=-14.0, reference=True, **knobs):
    given = {}
    if lengths is not None:
        given = {"chosen_lengths": one(lengths[0]), "rejected_lengths": one(lengths[1])}
    refs = (one(-11.0), one(-13.0)) if reference else ()
    return preference_loss(kind, one(chosen), one(rejected), *refs, beta=beta, **given, **knobs).item()


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("sigmoid", {}, 0.598139),
        ("dpo", {}, 0.598139),
        ("cdpo", {"label_smoothing": 0.1}, 0.618139),
        ("robust", {"label_smoothing": 0.1}, 0.573139),
        ("hinge", {}, 0.8),
        ("ipo", {}, 9),
        ("ipo", {"lengths": (5, 7)}, 21.688980),
        ("nca_pair", {}, 1.338793),
        ("bco_pair", {}, 1.288793),
        ("sppo_hard", {}, 32),
        ("apo_zero", {}, 0.950042),
        ("apo_down", {}, 0.975145),
        ("exo_pair", {"label_smoothing": 0.1}, 0.406304),
        ("cpo", {"reference": False}, 0.513015),
        ("cpo", {"cpo_alpha": 1.0, "lengths": (5, 7)}, 2.513015),
        ("simpo", {"beta": 2.0, "simpo_gamma": 1.0, "lengths": (5, 5)}, 0.437488),
        ("simpo", {"beta": 2.0, "simpo_gamma": 1.0, "lengths": (5, 7)}, 1.313262),
        ("orpo", {"beta": 0.1, "chosen": -2.5, "rejected": -8.4, "lengths": (5, 7)}, 0.524655),
        ("orpo", {"beta": 1.0, "chosen": -2.5, "rejected": -8.4, "lengths": (5, 7)}, 0.5 + 0.246553),
        ("sft", {"lengths": (5, 7)}, 2.0),
        ("sigmoid_norm", {"lengths": (5, 7)}, -math.log(1 / (1 + math.exp(-0.1 * (0.2 + 1 / 7))))),
        ("aot", {}, 0.598139),
        ("aot_unpaired", {}, 0.598139),
    ],
)
def test_worked_values(kind, options, expected):
    assert pair(kind, **options) == pytest.approx(expected, abs=6e-7)


def test_discopop():
    x = 0.1 * 2
    m = 1 / (1 + math.exp(-x / 0.05))
    assert pair("discopop") == pytest.approx(math.log1p(math.exp(-x)) * (1 - m) + math.exp(-x) * m)


def test_aot_compares_the_pairs_of_a_batch():
    chosen, rejected = torch.tensor([-1.0, -5.0], dtype=D), torch.tensor([-4.0, -3.0], dtype=D)
    zero = torch.zeros(2, dtype=D)
    ref = torch.tensor([0.5, 0.0], dtype=D)
    losses = preference_loss("aot", chosen, rejected, ref, zero, beta=1.0)
    margins = [-2.0 - 0.0, 3.0 - 0.5]  # sorted margins of policy less those of the reference
    assert losses.tolist() == pytest.approx([math.log1p(math.exp(-x)) for x in margins])
    losses = preference_loss("aot_unpaired", chosen, rejected, zero, zero, beta=1.0)
    assert losses.tolist() == pytest.approx([math.log1p(math.exp(-x)) for x in (-5 + 4, -1 + 3)])


@pytest.mark.parametrize(
    ("name", "difference"),
    [
        ("reverse_kl", 1 - -1),
        ("forward_kl", -math.exp(-1) + math.exp(1)),
        ("js_divergence", math.log(1 + math.exp(1)) - math.log(1 + math.exp(-1))),
        ("alpha_divergence", (math.exp(-0.5) - math.exp(0.5)) / -0.5),
    ],
)
def test_f_divergences(name, difference):
    expected = math.log1p(math.exp(-0.1 * difference))
    assert pair("sigmoid", f_divergence_type=name) == pytest.approx(expected)


def test_orpo_is_finite_and_differentiable_at_both_ends():
    for chosen, rejected in ((-1e-9, -400.0), (-300.0, -1e-9), (0.0, 0.0)):
        value = torch.tensor([chosen], dtype=D, requires_grad=True)
        ones = torch.ones(1)
        loss = preference_loss(
            "orpo", value, one(rejected), beta=0.1, chosen_lengths=ones, rejected_lengths=ones
        )
        loss.sum().backward()
        assert torch.isfinite(loss).all()
        assert torch.isfinite(value.grad).all()


def test_kto():
    args = torch.tensor([-10.0, -14.0], dtype=D), torch.tensor([-11.0, -13.0], dtype=D), torch.tensor([1, 0])
    assert kto_loss(*args, 0.5, beta=0.1).tolist() == pytest.approx([0.487503, 0.462570], abs=6e-7)
    weighted = kto_loss(*args, 0.5, beta=0.1, desirable_weight=2.0, undesirable_weight=3.0)
    assert weighted.tolist() == pytest.approx([2 * 0.487503, 3 * 0.462570], abs=2e-6)
    zero = kto_loss(*args, -3.0, beta=0.1)
    assert torch.equal(zero, kto_loss(*args, 0.0, beta=0.1))
    assert torch.equal(zero, kto_loss(*args, 0.5, beta=0.1, loss_type="apo_zero_unpaired"))
    kl = torch.tensor(0.5, dtype=D, requires_grad=True)
    policy = args[0].clone().requires_grad_()
    kto_loss(policy, *args[1:], kl, beta=0.1).sum().backward()
    assert kl.grad is None
    sig = 1 / (1 + math.exp(-0.05))
    assert policy.grad[0].item() == pytest.approx(-0.1 * sig * (1 - sig))


def test_reward_model():
    assert reward_loss(one(1.5), one(0.5)).item() == pytest.approx(0.313262, abs=6e-7)
    assert reward_loss(one(1.5), one(0.5), one(0.5)).item() == pytest.approx(0.474077, abs=6e-7)
    centred = reward_loss(one(1.5), one(0.5), center_rewards_coefficient=0.01)
    assert centred.item() == pytest.approx(0.313262 + 0.04, abs=6e-7)


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match="did you mean 'apo_zero'"):
        pair("apo_zro")
    with pytest.raises(ConfigError, match="no effect on hinge"):
        pair("hinge", label_smoothing=0.1)
    with pytest.raises(ConfigError, match="did you mean 'simpo_gamma'"):
        pair("simpo", lengths=(1, 1), simpo_gama=2.0)
    with pytest.raises(ConfigError, match="means over tokens"):
        pair("simpo")
    with pytest.raises(ConfigError, match="label_smoothing"):
        pair("robust", label_smoothing=0.5)
    with pytest.raises(ConfigError, match="no form for"):
        pair("apo_zero", f_divergence_type="forward_kl")
    with pytest.raises(ConfigError, match="reference of one answer"):
        preference_loss("dpo", one(0), one(0), one(0), beta=0.1)


def test_which_losses_read_a_reference():
    assert {kind for kind in PREFERENCE_LOSSES if not needs_reference(kind)} == {
        "cpo",
        "simpo",
        "orpo",
        "sft",
    }
    assert needs_reference("dpo")


def test_shapes_and_numbers_that_make_no_sense_are_refused():
    two, three = torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -2.0, -3.0])
    with pytest.raises(ValueError, match=r"rejected must be \[batch\] = \[2\]"):
        preference_loss("dpo", two, one(-1), beta=0.1)
    with pytest.raises(ValueError, match="chosen_lengths must be"):
        preference_loss("simpo", two, two, beta=2.0, chosen_lengths=one(1), rejected_lengths=two)
    with pytest.raises(ValueError, match="ref_chosen must be"):
        preference_loss("dpo", two, two, one(1), two, beta=0.1)
    with pytest.raises(ValueError, match="desirable must be"):
        kto_loss(two, two, torch.tensor([1, 0, 1]), 0.0, beta=0.1)
    with pytest.raises(ValueError, match="margin must be"):
        reward_loss(two, two, three)
    with pytest.raises(ConfigError, match="above 0"):
        preference_loss("ipo", two, two, beta=0.0)
    with pytest.raises(ConfigError, match="label_smoothing"):
        preference_loss("dpo", two, two, beta=0.1, label_smoothing=3.0)


def test_half_precision_is_computed_in_float32():
    """1,001 tokens would be 1,000 in bfloat16."""
    sums = (torch.tensor([value], dtype=torch.bfloat16) for value in (-300.0, -310.0))
    lengths = {"chosen_lengths": torch.tensor([1001]), "rejected_lengths": torch.tensor([1001])}
    loss = preference_loss("simpo", *sums, beta=2.0, **lengths)
    assert loss.item() == pytest.approx(math.log1p(math.exp(1 - 2 * 10 / 1001)), rel=1e-6)
