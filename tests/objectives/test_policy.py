"""Policy losses and advantages: worked values, exact oracles, invariance to how a step is split."""

import math
from dataclasses import replace

import pytest
import torch

from swift.core.errors import ConfigError
from swift.objectives import advantages, chord_loss, policy_loss
from swift.objectives.policy.algorithms import ALGORITHMS, Algorithm, with_knobs
from swift.objectives.policy.chord import chord_mu, chord_sft_loss
from swift.objectives.policy.corrections import entropy_threshold
from swift.objectives.policy.divergence import k1, k2, k3, kl_in_reward, ratio_k3
from swift.objectives.policy.estimators import generalised_advantages
from swift.objectives.policy.loss import policy_denominators
from swift.objectives.policy.shaping import moving_baseline, soft_overlong, value_loss, without_signal

D = torch.float64
MASK = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
RATIOS = torch.tensor([[1.1, 1.5, 1, 1], [0.7, 1, 1.25, 0.9]], dtype=D)
A = torch.tensor([1.0, -0.5], dtype=D)
OLD = torch.full((2, 4), -1.0, dtype=D)


def run(algo, *, ratios=RATIOS, adv=A, mask=MASK, **options):
    logprobs = (OLD[: len(ratios), : ratios.shape[1]] + ratios.log()).requires_grad_()
    old = torch.full_like(logprobs, -1.0).detach()
    loss, metrics = policy_loss(algo, logprobs, old, adv, mask, **options)
    loss.backward()
    return loss.item(), logprobs.grad, metrics


TOKEN = {"aggregation": "token_mean"}
FIXTURES = [
    ("grpo", {}, -0.328125, [-0.275, 0], [0, 0.0625, 0.078125, 0.05625]),
    ("grpo", TOKEN, -0.054167, [-0.183333, 0], [0, 0.083333, 0.104167, 0.075]),
    ("dapo", {}, -0.0675, [-0.183333, 0], [0, 0.083333, 0.104167, 0.075]),
    (
        "dr_grpo",
        {"max_completion_length": 8},
        -0.0203125,
        [-0.06875, 0],
        [0, 0.03125, 0.039062, 0.028125],
    ),
    ("grpo", {**TOKEN, "delta": 1.2}, -0.058333, [-0.183333, 0], [0, 0.083333, 0, 0.075]),
    ("gspo", {"epsilon": 0.2, "epsilon_high": 0.2}, -0.364494, [0, 0], [0.058877] * 4),
    ("gspo_token", {"epsilon": 0.2, "epsilon_high": 0.2}, -0.364494, [0, 0], [0.058877] * 4),
    ("gspo", {}, -0.250275, [0, 0], [0] * 4),
    ("sapo", {}, -0.680553, [-0.274314, -0.352506], [0.042682, 0.0625, 0.076794, 0.056095]),
    ("cispo", {}, -0.011804, [-0.183333, -0.25], [0.058333, 0.083333, 0.104167, 0.075]),
    ("cispo", {"cap": 1.28}, -0.033603, [-0.183333, -0.213333], [0.058333, 0.083333, 0.104167, 0.075]),
    (
        "cispo",
        {"cap": 1.2, "floor": 0.8},
        -0.049599,
        [-0.183333, -0.2],
        [0.066667, 0.083333, 0.1, 0.075],
    ),
    ("gmpo", {}, -0.405003, [-0.320255, 0], [0.058877] * 4),
    ("vespo", {}, -0.167090, [-0.064557] * 2, [0.062251] * 4),
    ("prime_rl", {}, -0.112440, [-0.183302, -0.249865], [0.058214, 0.083333, 0.104241, 0.074965]),
    (
        "real",
        {"groups": torch.tensor([7, 7])},
        1.108991,
        [-0.377358] * 2,
        [0.235087] * 4,
    ),
    ("fipo", {"epsilon_high": 0.2}, -0.107160, [-0.22, 0], [0, 0.093721, 0.117452, 0.075]),
    (
        "dppo",
        {"delta_high": 0.15, "delta_low": 0.10},
        -0.081298,
        [-0.183333, 0],
        [0, 0.083333, 0.104167, 0.075],
    ),
]


@pytest.mark.parametrize(("algo", "options", "value", "first", "second"), FIXTURES)
def test_worked_values(algo, options, value, first, second):
    loss, grad, _ = run(algo, **options)
    assert loss == pytest.approx(value, abs=6e-7)
    assert grad.tolist() == [pytest.approx([*first, 0, 0], abs=6e-7), pytest.approx(second, abs=6e-7)]


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"), [(5, -1, 3), (2, -1, 2), (0.5, 1, -0.5), (5, 1, -1.2)]
)
def test_dual_clip(ratio, advantage, expected):
    one = torch.tensor([[float(ratio)]], dtype=D)
    loss, _, _ = run(
        "grpo", ratios=one, adv=torch.tensor([float(advantage)]), mask=torch.ones(1, 1), dual_clip=3
    )
    assert loss == pytest.approx(expected)


def test_vespo_takes_the_samplers_mismatch_into_its_weight():
    old = torch.full((1, 2), -1.0, dtype=D)
    sampler = old - torch.tensor([[0.3, -0.1]], dtype=D)
    loss, _ = policy_loss("vespo", old, old, torch.tensor([1.0]), torch.ones(1, 2), sampler_logprobs=sampler)
    w = math.exp(0.2)
    assert loss.item() == pytest.approx(math.exp(3 + 2 * 0.2 - 3 * w), rel=1e-6)


def test_metrics_tell_cut_tokens_by_sign():
    _, _, metrics = run("grpo")
    assert metrics["clip_high"].item() == pytest.approx(1 / 6)  # 1.5
    assert metrics["clip_low"].item() == pytest.approx(1 / 6)  # 0.7
    assert metrics["ratio"].item() == pytest.approx((1.1 + 1.5 + 0.7 + 1 + 1.25 + 0.9) / 6)


# Kullback-Leibler divergence


@pytest.mark.parametrize(
    ("l", "ref", "expected"), [(-1, -1.5, (0.5, 0.125, 0.106531)), (-2, -1, (-1, 0.5, 0.718282))]
)
def test_kl_values(l, ref, expected):  # noqa: E741
    pair = torch.tensor([float(l)], dtype=D), torch.tensor([float(ref)], dtype=D)
    assert [one(*pair).item() for one in (k1, k2, k3)] == pytest.approx(expected, abs=6e-7)
    assert ratio_k3(*pair).item() == pytest.approx(expected[2], abs=6e-7)


def test_gradients_of_kl_losses_by_enumeration():
    """Section 4: k2 on-policy and ratio * k3 off-policy are exact, k1's gradient is 0, k3's is wrong."""
    torch.manual_seed(3)
    logits, old_logits, ref_logits = (torch.randn(5, dtype=D) for _ in range(3))

    def gradient(function, sampled):
        theta = logits.clone().requires_grad_()
        logp, ref = theta.log_softmax(0), ref_logits.log_softmax(0)
        probabilities = sampled.softmax(0)
        log_ratio = logp - sampled.log_softmax(0)
        (probabilities * function(logp, ref, log_ratio)).sum().backward()
        return theta.grad

    theta = logits.clone().requires_grad_()
    (theta.softmax(0) * (theta.log_softmax(0) - ref_logits.log_softmax(0))).sum().backward()
    exact = theta.grad
    assert (gradient(k2, logits) - exact).abs().max() < 1e-12
    assert (gradient(ratio_k3, logits) - exact).abs().max() < 1e-12
    assert (gradient(ratio_k3, old_logits) - exact).abs().max() < 1e-12
    assert gradient(k1, logits).abs().max() < 1e-12
    assert (gradient(k3, logits) - exact).abs().max() > 0.01


def test_the_kl_term_is_added_after_the_weights():
    reference = OLD - 0.5
    sampler = OLD - math.log(1.5)
    plain, _, _ = run("grpo", mismatch="token_truncate", sampler_logprobs=sampler)
    with_kl, _, metrics = run(
        "grpo", mismatch="token_truncate", sampler_logprobs=sampler, ref_logprobs=reference, beta=0.1
    )
    gaps = reference - (OLD + RATIOS.log())
    kl = RATIOS * (gaps.exp() - gaps - 1) * MASK
    expected = 0.1 * (kl.sum(1) / MASK.sum(1)).mean().item()
    assert plain == pytest.approx(1.5 * -0.328125)
    assert with_kl - plain == pytest.approx(expected)
    assert metrics["kl"].item() == pytest.approx(((gaps.exp() - gaps - 1) * MASK).sum().item() / 6, rel=1e-9)


def test_a_beta_without_a_reference():
    assert run("grpo")[0] == pytest.approx(-0.328125)  # the row's own 0.04 is left out
    with pytest.raises(ConfigError, match="reference"):
        run("grpo", beta=0.1)


def test_kl_in_the_reward():
    rewards = kl_in_reward(torch.tensor([1.0, 0.0]), OLD, OLD - 0.5, MASK, beta=0.1)
    assert rewards.tolist() == pytest.approx([1 - 0.1, -0.2])


# Mismatch of sampler and trainer


X = torch.tensor([[0.5, -0.1, 0, 0], [1.2, -0.3, 0, 0.1]], dtype=D)


@pytest.mark.parametrize(
    ("options", "first", "second"),
    [
        (
            {"mismatch": "token_truncate", "mismatch_cap": 2.0},
            [1.648721, 0.904837],
            [2, 0.740818, 1, 1.105171],
        ),
        ({"mismatch": "token_mask", "mismatch_high": 2.0}, [1.648721, 0.904837], [0, 0.740818, 1, 1.105171]),
        ({"mismatch": "sequence_truncate", "mismatch_cap": 2.0}, [1.491825] * 2, [2.0] * 4),
        ({"mismatch": "sequence_mask", "mismatch_high": 2.0}, [1.491825] * 2, [0.0] * 4),
        ({"mismatch": "sequence_mask"}, [1.491825] * 2, [2.718282] * 4),
        (
            {"mismatch": "sequence_mask_tis", "mismatch_high": 1.25},
            [1.648721, 0.904837],
            [0.0] * 4,
        ),  # geometric means 1.221403, 1.284025
        ({"mismatch": "geometric_mask", "mismatch_low": 1.25, "mismatch_high": 1.3}, [0, 0], [1.0] * 4),
        ({"mismatch": "geometric_mask"}, [0, 0], [0.0] * 4),
    ],
)
def test_mismatch_weights(options, first, second):
    adv = torch.ones(2, dtype=D)
    _, grad, _ = run(
        "grpo", ratios=torch.ones(2, 4, dtype=D), adv=adv, sampler_logprobs=OLD - X, **TOKEN, **options
    )
    assert (-6 * grad).tolist() == [pytest.approx([*first, 0, 0], abs=6e-7), pytest.approx(second, abs=6e-7)]


def test_off_policy_sequences_are_left_out():
    ratios = torch.tensor([[0.5, 0.5, 1, 1], [0.5, 0.5, 0.5, 0.5]], dtype=D)
    _, grad, _ = run("cispo", ratios=ratios, opsm_delta=0.5)
    assert grad[0, :2].abs().min() > 0  # positive advantage
    assert (grad[1] == 0).all()
    _, grad, _ = run("cispo", ratios=ratios.sqrt(), opsm_delta=0.5)
    assert grad[1].abs().min() > 0  # mean log-ratio 0.35


def test_entropy_mask():
    entropies = torch.tensor([[0.1, 0.9, 9, 9], [0.2, 0.3, 0.4, 0.8]], dtype=D)
    threshold = entropy_threshold(entropies, MASK, 0.3)
    expected = torch.quantile(entropies[MASK == 1], 0.7).item()
    assert threshold == pytest.approx(expected)
    _, grad, _ = run("cispo", entropies=entropies, top_entropy_quantile=0.3)
    assert (grad != 0).tolist() == [[False, True, False, False], [False, False, False, True]]
    denominators = policy_denominators([MASK])
    with pytest.raises(ConfigError, match="quantile"):
        run("cispo", entropies=entropies, top_entropy_quantile=0.3, denominators=denominators)
    _, split, _ = run("cispo", entropies=entropies, entropy_threshold=threshold, denominators=denominators)
    assert torch.equal(grad, split)


# Oracles


def reinforce(logprobs, adv, mask, aggregation, longest):
    """-A log p with the aggregations written out."""
    losses = -adv[:, None] * logprobs * mask
    tokens = mask.sum(1)
    return {
        "sequence_mean": (losses.sum(1) / tokens).mean(),
        "token_mean": losses.sum() / mask.sum(),
        "micro_batch_mean": losses.sum() / mask.sum(),
        "constant_length": losses.sum() / (len(mask) * longest),
        "sequence_sum": losses.sum(1).mean(),
    }[aggregation]


@pytest.mark.parametrize("algo", sorted(set(ALGORITHMS) - {"real", "vespo"}))
def test_on_policy_gradients_are_those_of_reinforce(algo):
    torch.manual_seed(0)
    old = -torch.rand(4, 6, dtype=D) - 0.1
    mask = (torch.arange(6) < torch.tensor([[6], [3], [1], [4]])).to(D)
    adv = torch.tensor([0.7, -1.3, 2.0, -0.1], dtype=D)
    row = ALGORITHMS[algo]
    ours, theirs = old.clone().requires_grad_(), old.clone().requires_grad_()
    policy_loss(algo, ours, old, adv, mask, max_completion_length=9)[0].backward()
    reinforce(theirs, adv, mask, row.aggregation, 9).backward()
    assert (ours.grad - theirs.grad).abs().max() < 1e-15


def test_sapo_on_policy_for_every_tau():
    for tau in (0.1, 3.0):
        logprobs = OLD.clone().requires_grad_()
        policy_loss("sapo", logprobs, OLD, A, MASK, tau_pos=tau, tau_neg=tau)[0].backward()
        assert (logprobs.grad + A[:, None] * MASK / MASK.sum(1, keepdim=True) / 2).abs().max() < 1e-15


@pytest.mark.parametrize(("algo", "share"), [("rloo", 1.0), ("dr_grpo", 2 / 3)])
def test_the_expected_gradient_of_an_enumerated_policy(algo, share):
    """All groups of G = 3 answers of T = 2 tokens out of V = 3, weighted by their probability."""
    torch.manual_seed(5)
    first, second = torch.randn(3, dtype=D), torch.randn(3, 3, dtype=D)
    rewards = torch.randn(9, dtype=D)
    answers = [(a, b) for a in range(3) for b in range(3)]

    def token_logprobs(one, two):
        p, q = one.log_softmax(0), two.log_softmax(1)
        return torch.stack([torch.stack([p[a], q[a, b]]) for a, b in answers])

    def gradient(make):
        one, two = first.clone().requires_grad_(), second.clone().requires_grad_()
        make(token_logprobs(one, two)).backward()
        return torch.cat([one.grad, two.grad.flatten()])

    true = gradient(lambda logprobs: -(logprobs.sum(1).exp() * rewards).sum())
    picks = torch.cartesian_prod(*[torch.arange(9)] * 3)
    groups = torch.arange(len(picks)).repeat_interleave(3)

    def expected(logprobs):
        chosen = logprobs[picks.flatten()]
        adv = advantages(algo, rewards[picks.flatten()], groups)
        weights = logprobs.detach().sum(1).exp()[picks].prod(1).repeat_interleave(3)
        # The loss is linear in the advantages: weighting them by the probability of the group is the expectation.
        loss, _ = policy_loss(
            algo, chosen, chosen.detach(), adv * weights, torch.ones_like(chosen), max_completion_length=1
        )
        return loss * len(picks)

    assert (gradient(expected) - share * true).abs().max() < 1e-12


@pytest.mark.parametrize("algo", sorted(ALGORITHMS))
def test_any_split_gives_the_same_gradient(algo):
    torch.manual_seed(1)
    old = -torch.rand(8, 5, dtype=D) - 0.1
    new = old + 0.3 * torch.randn(8, 5, dtype=D)
    reference, sampler = old - 0.2, old + 0.1 * torch.randn(8, 5, dtype=D)
    mask = (torch.arange(5) < torch.tensor([[5], [1], [3], [0], [2], [5], [4], [1]])).to(D)
    groups = torch.arange(4).repeat_interleave(2)
    adv = torch.randn(8, dtype=D)

    def gradient(size):
        logprobs = new.clone().requires_grad_()
        parts = [range(start, start + size) for start in range(0, 8, size)]
        counts = policy_denominators([mask[list(p)] for p in parts], [groups[list(p)] for p in parts])
        total, ratios = 0.0, 0.0
        for part in map(list, parts):
            loss, metrics = policy_loss(
                algo,
                logprobs[part],
                old[part],
                adv[part],
                mask[part],
                groups=groups[part],
                ref_logprobs=reference[part],
                sampler_logprobs=sampler[part],
                denominators=counts,
                max_completion_length=7,
                beta=0.1,
                **({} if algo == "real" else {"mismatch": "sequence_mask"}),
            )
            loss.backward()
            total, ratios = total + loss.item(), ratios + metrics["ratio"].item()
        return logprobs.grad, total, ratios

    whole, loss, ratio = gradient(8)
    for size in (2, 4):
        if algo == "bnpo":
            with pytest.warns(UserWarning, match="split"):
                assert (gradient(size)[0] - whole).abs().max() > 1e-4
            continue
        part = gradient(size)
        assert (part[0] - whole).abs().max() < 1e-12
        assert part[1:] == pytest.approx((loss, ratio), abs=1e-12)


@pytest.mark.parametrize("algo", sorted(ALGORITHMS))
def test_what_stands_at_masked_tokens_changes_nothing(algo):
    def gradient(filling):
        hole = MASK == 0
        logprobs = (OLD + RATIOS.log()).masked_fill(hole, filling).requires_grad_()
        old = OLD.masked_fill(hole, filling * 2)
        loss, _ = policy_loss(
            algo,
            logprobs,
            old,
            A,
            MASK,
            groups=torch.tensor([0, 0]),
            ref_logprobs=old,
            sampler_logprobs=old,
            max_completion_length=4,
        )
        loss.backward()
        return loss.item(), logprobs.grad

    loss, grad = gradient(-1.0)
    for filling in (-50.0, -math.inf):
        other = gradient(filling)
        assert other[0] == loss
        assert torch.equal(other[1], grad)


@pytest.mark.parametrize(
    "kind", ["grpo", "dr_grpo", "rloo", "batch", "reinforce_pp_baseline", "opo", "maxrl", "gdpo"]
)
def test_equal_rewards_teach_nothing_at_all(kind):
    rewards = torch.tensor([0.1, 0.1, 0.1, 1.0, 0.0, 0.3])
    groups = torch.tensor([4, 4, 4, 2, 2, 2])
    values = advantages(kind, rewards, groups, lengths=torch.tensor([3, 5, 7, 1, 2, 3]))
    assert (values[:3] == 0).all()
    assert (values[3:] != 0).any()
    assert torch.isfinite(values).all()
    assert without_signal(rewards, groups).tolist() == [True] * 3 + [False] * 3


@pytest.mark.parametrize(
    "kind", ["grpo", "dr_grpo", "rloo", "batch", "reinforce_pp_baseline", "opo", "maxrl", "gdpo"]
)
def test_a_group_of_one_has_no_advantage(kind):
    values = advantages(kind, torch.tensor([0.7, 1.0, 0.0]), torch.tensor([0, 1, 1]), lengths=torch.ones(3))
    assert values[0] == 0


# Advantages


def adv(kind, rewards, groups=None, **options):
    values = torch.tensor(rewards, dtype=D)
    where = torch.zeros(len(values), dtype=torch.int64) if groups is None else torch.tensor(groups)
    return advantages(kind, values, where, **options).tolist()


TWO = [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("kind", "rewards", "options", "expected"),
    [
        ("grpo", [1, 0, 0, 1], {}, [0.865875, -0.865875, -0.865875, 0.865875]),
        ("grpo", [1, 0, 0, 0], {}, [1.4997, -0.4999, -0.4999, -0.4999]),
        ("dapo", [1, 0, 0, 0], {}, [1.4997, -0.4999, -0.4999, -0.4999]),
        ("rloo", [1, 0, 0, 0], {}, [1, -1 / 3, -1 / 3, -1 / 3]),
        ("dr_grpo", [1, 0, 0, 0], {}, [0.75, -0.25, -0.25, -0.25]),
        ("grpo", [1, 0, 0, 0], {"scale_rewards": "none"}, [0.75, -0.25, -0.25, -0.25]),
        ("maxrl", [1, 0, 0, 0], {}, [3, -1, -1, -1]),
        ("reinforce_mean", [1, 0, 0, 0], {}, [0.75, -0.25, -0.25, -0.25]),
        ("opo", [1, 0, 0, 0], {"lengths": torch.tensor([2, 4, 4, 10])}, [0.9, -0.1, -0.1, -0.1]),
        (
            "reinforce_pp_baseline",
            [1, 0, 0, 0, 1, 1, 1, 0],
            {"groups": TWO},
            [1.620185, *[-0.540062] * 3, *[0.540062] * 3, -1.620185],
        ),
        (
            "batch",
            [1, 0, 0, 0, 1, 1, 1, 0],
            {"groups": TWO, "eps": 0.0},
            [x / math.sqrt(2 / 7) for x in (0.75, -0.25, -0.25, -0.25, 0.25, 0.25, 0.25, -0.75)],
        ),
        ("gdpo", [[1, 0.2], [0, 0.8], [0, 0.2], [1, 0.8]], {}, [0, 0, -1.224745, 1.224745]),
        (
            "grpo",
            [[1, 0.2], [0, 0.8], [0, 0.2], [1, 0.8]],
            {"eps": 0.0},
            [0.297044, -0.297044, -1.188177, 1.188177],
        ),
        ("grpo", [[1, math.nan], [0, 4]], {"weights": [1, 0.5], "scale_rewards": "none"}, [-0.5, 0.5]),
        ("remax", [1, 0], {"baselines": torch.tensor([0.5, 0.5])}, [0.5, -0.5]),
        ("gpg", [1, 0, 1, 1], {"groups": [0, 0, 1, 1]}, [1, -1, 0, 0]),
        (
            "reinforce_pp",
            [1, 0],
            {"lengths": torch.tensor([1, 3])},
            [0.75 / 0.5, -0.25 / 0.5],  # as if the values were 1, 0, 0, 0
        ),
    ],
)
def test_advantages(kind, rewards, options, expected):
    assert adv(kind, rewards, **options) == pytest.approx(expected, abs=6e-7)


def test_whitening_over_tokens_and_over_sequences_differ_with_lengths():
    lengths = torch.tensor([1, 1, 2, 2])
    rewards, groups = [1, 0, 1, 0], [0, 0, 1, 1]
    by_sequence = adv("reinforce_pp_baseline", rewards, groups, lengths=lengths)
    by_token = adv("reinforce_pp_baseline", rewards, groups, lengths=lengths, whiten_over="tokens")
    tokens = torch.tensor([0.5, -0.5, 0.5, 0.5, -0.5, -0.5], dtype=D)
    assert by_token == pytest.approx([x / tokens.std().item() for x in (0.5, -0.5, 0.5, -0.5)], rel=1e-6)
    assert by_sequence[0] != pytest.approx(by_token[0])


def test_token_returns_of_reinforce_pp_pass_over_observations():
    mask = torch.tensor([[1, 0, 1], [1, 1, 0]])
    kl = torch.tensor([[0.1, 9.0, 0.2], [0.3, 0.4, 9.0]], dtype=D)
    values = advantages(
        "reinforce_pp",
        torch.tensor([1.0, 0.0], dtype=D),
        torch.tensor([0, 1]),
        mask=mask,
        token_kl=kl,
        beta=1.0,
        gamma=0.5,
    )
    last = 1 - 0.2
    returns = torch.tensor([-0.1 + 0.5 * last, last, -0.3 + 0.5 * -0.4, -0.4], dtype=D)
    expected = (returns - returns.mean()) / returns.std()
    assert values[mask == 1].tolist() == pytest.approx(expected.tolist(), rel=1e-6)
    assert (values[mask == 0] == 0).all()


def test_integer_rewards_and_any_group_numbers():
    values = advantages("dr_grpo", torch.tensor([1, 0, 5]), torch.tensor([-3, -3, 900]))
    assert values.dtype == torch.float32
    assert values.tolist() == [0.5, -0.5, 0]


# Around the loss


def test_chord():
    mu = [chord_mu(s, warmup_steps=10, decay_steps=100, peak=0.9, valley=0.05) for s in (0, 5, 10, 60, 110)]
    assert mu == pytest.approx([0, 0.45, 0.9, 0.475, 0.05])
    logprobs = torch.tensor([[0.9, 0.5, 0.1, 0.3]], dtype=D).log().requires_grad_()
    mask = torch.tensor([[1, 1, 1, 0]])
    assert chord_sft_loss(logprobs, mask).item() == pytest.approx(1.033698, abs=6e-7)
    weighted = chord_sft_loss(logprobs, mask, phi=True)
    assert weighted.item() == pytest.approx(0.130001, abs=6e-7)
    weighted.backward()
    assert logprobs.grad.tolist()[0] == pytest.approx([-0.03, -0.25 / 3, -0.03, 0])  # p is held constant
    halves = sum(
        chord_sft_loss(logprobs[:, s], mask[:, s], num_tokens=3).item() for s in (slice(2), slice(2, 4))
    )
    assert halves == pytest.approx(1.033698, abs=6e-7)
    assert chord_loss(torch.tensor(2.0), torch.tensor(4.0), 0.25).item() == 2.5


def test_soft_overlong():
    lengths = torch.tensor([16384, 18432, 20480, 30000])
    assert soft_overlong(lengths, max_length=20480, cache_length=4096).tolist() == [0, -0.5, -1, -1]


def test_generalised_advantages_and_value_loss():
    mask = torch.tensor([[1, 1, 0, 1]])
    rewards = torch.tensor([[0, 0, 7.0, 1]], dtype=D)
    values = torch.tensor([[0.2, 0.5, 7.0, 0.6]], dtype=D)
    result, returns = generalised_advantages(rewards, values, mask)
    assert result[0].tolist() == pytest.approx([0.756, 0.48, 0, 0.4])
    assert returns[0].tolist() == pytest.approx([0.956, 0.98, 0, 1.0])
    assert value_loss(torch.tensor(0.9), torch.tensor(0.5), torch.tensor(0.6)).item() == pytest.approx(0.045)
    assert moving_baseline(1.0, 0.0, decay=0.9) == pytest.approx(0.9)


# The table


OWN = Algorithm("mine", surrogate="cispo", aggregation="token_mean", knobs={"cap": 1.28})


def test_a_row_of_ones_own_by_dotted_path():
    import sys
    import types

    module = types.ModuleType("own_rows")
    module.ROW, module.OTHER = OWN, 3
    sys.modules["own_rows"] = module
    try:
        assert run("own_rows.ROW")[0] == run("own_rows:ROW")[0] == pytest.approx(-0.033603, abs=6e-7)
        with pytest.raises(ConfigError, match="not a row"):
            run("own_rows.OTHER")
    finally:
        del sys.modules["own_rows"]
    with pytest.raises(ConfigError, match="no algorithm at"):
        run("own_rows.ROW")


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match="did you mean 'dapo'"):
        run("dapoo")
    with pytest.raises(ConfigError, match="did you mean 'epsilon_high'"):
        run("grpo", epsilon_hihg=0.3)
    with pytest.raises(ConfigError, match="no effect on grpo"):
        run("grpo", cap=5.0)
    with pytest.raises(ConfigError, match="did you mean 'token_mean'"):
        run("grpo", aggregation="token_meen")
    with pytest.raises(ConfigError, match="no effect on maxrl"):
        adv("maxrl", [1, 0], eps=1.0)
    with pytest.raises(ConfigError, match="longest completion"):
        run("dr_grpo")
    with pytest.raises(ConfigError, match="lengths"):
        adv("opo", [1, 0])


def test_spellings_of_ms_swift():
    assert run("grpo", loss_type="cispo", epsilon_high=1.28)[0] == pytest.approx(-0.033603, abs=6e-7)
    sequence = run("grpo", importance_sampling_level="sequence", epsilon=0.2)
    assert sequence[0] == pytest.approx(-0.364494, abs=6e-7)
    assert with_knobs("grpo", {"loss_type": "cispo"}).knobs == {}, "no cap of 0.2 is left over from the clip"
    assert with_knobs("grpo", {"advantage_estimator": "rloo"}).advantage == "rloo"
    assert replace(OWN, knobs={}) == with_knobs(replace(OWN, knobs={}), {})


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"ref_logprobs": OLD[:1]}, "ref_logprobs must be"),
        ({"entropies": OLD[:, :1], "top_entropy_quantile": 0.5}, "entropies must be"),
        ({"groups": torch.tensor([0])}, "groups must be"),
        ({"sampler_logprobs": OLD[:, :2]}, "sampler_logprobs must be"),
        ({"adv": A[:1]}, "advantages are"),
        ({"mismatch": "token_mask"}, "sampler_logprobs"),
        ({"kl": "k9"}, "unknown KL estimator"),
        ({"loss_type": "real"}, "compares the samples of a prompt"),
        ({"top_entropy_quantile": 2.0, "entropies": OLD}, "not a share"),
    ],
)
def test_nothing_is_broadcast_or_left_out_in_silence(options, reason):
    with pytest.raises((ConfigError, ValueError), match=reason):
        run("grpo", **options)


def test_advantages_refuse_what_they_cannot_use():
    with pytest.raises(ValueError, match="infinite reward"):
        adv("grpo", [math.inf, 0])
    with pytest.raises(ValueError, match="lengths must be"):
        adv("opo", [1, 0], lengths=torch.tensor([1]))
    with pytest.raises(ConfigError, match="of one prompt"):
        advantages("grpo", torch.tensor([1.0, 0.0]), None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    """Ratios of 10^6 stay finite, and 4,000 tokens are added up exactly."""
    logprobs = torch.tensor([[-1.0]], dtype=dtype, requires_grad=True)
    far = torch.tensor([[-15.0]], dtype=dtype)
    loss, metrics = policy_loss("grpo", logprobs, far, torch.tensor([-1.0]), torch.ones(1, 1))
    loss.backward()
    assert loss.item() == pytest.approx(math.exp(14), rel=1e-6) == metrics["ratio"].item()
    assert logprobs.grad.dtype == dtype
    many = torch.full((1, 4000), -0.125, dtype=dtype)
    loss, _ = policy_loss("dapo", many, many - 0.0078125, torch.tensor([1.0]), torch.ones(1, 4000))
    assert loss.item() == pytest.approx(-math.exp(0.0078125), rel=1e-6)
