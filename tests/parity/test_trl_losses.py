"""Losses of TRL on the same tensors, where definitions agree. Skipped without TRL (``pip install .[bench]``).

TRL computes its losses inside trainers; they are called with a model that returns given log-probabilities.
"""

from collections import defaultdict
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

trl = pytest.importorskip("trl")

from swift.objectives import policy_loss, preference_loss  # noqa: E402
from swift.objectives.preference.objective import KtoLoss, RewardLoss  # noqa: E402
from swift.parallel.answers import AnswerEngine  # noqa: E402

GENERATOR = torch.Generator().manual_seed(7)
CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED = (-5 * torch.rand(4, 6, generator=GENERATOR) for _ in range(4))
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]])
OTHER = MASK.flip(0)
KINDS = [
    "sigmoid",
    "sigmoid_norm",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
]


def accelerator():
    same = lambda value: value  # noqa: E731
    return SimpleNamespace(
        device=torch.device("cpu"),
        gather_for_metrics=same,
        gather=same,
        unwrap_model=same,
        num_processes=1,
        reduce=lambda value, reduction: value,
    )


def outputs(logprobs):
    zeros = torch.zeros_like(logprobs)
    return SimpleNamespace(
        log_probs=logprobs,
        entropy=zeros,
        mean_logits=zeros,
        is_top1=zeros.bool(),
        log_sum_sq_probs=zeros,
        aux_loss=None,
    )


def trl_dpo(kind, **options):
    """The mean loss of TRL's DPOTrainer for the tensors above."""
    from trl import DPOTrainer

    masks = torch.cat([MASK, OTHER])
    policy = torch.cat([CHOSEN, REJECTED]) * masks
    reference = torch.cat([REF_CHOSEN, REF_REJECTED]) * masks
    model, ref = MagicMock(training=True), MagicMock()
    model.return_value, ref.return_value = outputs(policy), outputs(reference)
    values = {
        "label_smoothing": 0.1 if kind in ("exo_pair", "robust") else 0.0,
        "ld_alpha": None,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        **options,
    }
    trainer = MagicMock(
        accelerator=accelerator(),
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        model=model,
        ref_model=ref,
        beta=0.1,
        loss_types=[kind],
        loss_weights=[1.0],
        use_weighting=False,
        args=SimpleNamespace(discopop_tau=0.05, gradient_checkpointing_kwargs=None),
        _metrics={"train": MagicMock()},
        _total_train_tokens=0,
        _tp_size=1,
        **values,
    )
    prompt = torch.ones(8, 1, dtype=torch.int64)
    inputs = {
        "input_ids": torch.cat([prompt, masks], 1),
        "attention_mask": torch.cat([prompt, masks], 1),
        "completion_mask": torch.cat([0 * prompt, masks], 1),
    }
    return DPOTrainer._compute_loss(trainer, model, inputs, False).item()


def sums(values, mask):
    return (values * mask).sum(1)


@pytest.mark.parametrize("kind", KINDS)
def test_dpo_losses(kind):
    knobs = {"label_smoothing": 0.1} if kind in ("exo_pair", "robust") else {}
    lengths = {"chosen_lengths": MASK.sum(1), "rejected_lengths": OTHER.sum(1)}
    ours = preference_loss(
        kind,
        sums(CHOSEN, MASK),
        sums(REJECTED, OTHER),
        sums(REF_CHOSEN, MASK),
        sums(REF_REJECTED, OTHER),
        beta=0.1,
        **lengths,
        **knobs,
    )
    # TRL 1.16 counts the tokens of the answer with its prompt's last one left in: the same here.
    assert ours.mean().item() == pytest.approx(trl_dpo(kind), rel=1e-5)


@pytest.mark.parametrize("name", ["forward_kl", "js_divergence", "alpha_divergence"])
def test_f_divergences(name):
    ours = preference_loss(
        "sigmoid",
        sums(CHOSEN, MASK),
        sums(REJECTED, OTHER),
        sums(REF_CHOSEN, MASK),
        sums(REF_REJECTED, OTHER),
        beta=0.1,
        f_divergence_type=name,
    )
    assert ours.mean().item() == pytest.approx(trl_dpo("sigmoid", f_divergence_type=name), rel=1e-5)


def trl_grpo(loss_type, level, old, advantages, mask, new, ref, beta, **options):
    from trl import GRPOTrainer

    trainer = MagicMock(
        accelerator=accelerator(),
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=level,
        beta=beta,
        loss_type=loss_type,
        epsilon_low=0.2,
        epsilon_high=options.pop("epsilon_high", 0.28),
        use_vllm=False,
        max_completion_length=8,
        current_gradient_accumulation_steps=1,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        model=MagicMock(training=True),
        args=SimpleNamespace(
            delta=options.get("delta"),
            use_bias_correction_kl=options.get("corrected", False),
            sapo_temperature_pos=1.0,
            sapo_temperature_neg=1.05,
            vespo_k_pos=2.0,
            vespo_lambda_pos=3.0,
            vespo_k_neg=3.0,
            vespo_lambda_neg=2.0,
            steps_per_generation=1,
        ),
    )
    trainer._get_per_token_logps_and_entropies.return_value = (new, torch.zeros_like(new), None)
    ones = torch.ones_like(mask)
    inputs = {
        "prompt_ids": ones[:, :1],
        "prompt_mask": ones[:, :1],
        "completion_ids": ones,
        "completion_mask": mask,
        "advantages": advantages,
        "old_per_token_logps": old,
        "ref_per_token_logps": ref,
        "num_items_in_batch": mask.sum(),
    }
    return GRPOTrainer._compute_loss(trainer, trainer.model, inputs)


@pytest.mark.parametrize(
    ("loss_type", "algo", "knobs"),
    [
        ("grpo", "grpo", {}),
        ("dapo", "dapo", {}),
        ("dr_grpo", "dr_grpo", {}),
        ("bnpo", "bnpo", {}),
        ("luspo", "luspo", {}),
        ("cispo", "cispo", {"epsilon_high": 5.0}),
        ("sapo", "sapo", {}),
        ("vespo", "vespo", {}),
        ("grpo", "gspo", {}),
    ],
)
@pytest.mark.parametrize("corrected", [False, True])
def test_policy_losses(loss_type, algo, knobs, corrected):
    old = -3 * torch.rand(4, 6, generator=torch.Generator().manual_seed(1))
    new = (old + 0.4 * torch.randn(4, 6, generator=torch.Generator().manual_seed(2))).requires_grad_()
    advantages = torch.tensor([1.0, -0.5, 0.3, -2.0])
    ref = old - 0.3
    level = "sequence" if algo in ("gspo", "luspo") else "token"
    if corrected and level == "sequence":
        pytest.skip("TRL corrects by the sequence's ratio, ours by that of the token")
    theirs = trl_grpo(loss_type, level, old, advantages, MASK, new, ref, 0.1, corrected=corrected, **knobs)
    (their_gradient,) = torch.autograd.grad(theirs, new)
    clipping = {} if algo in ("sapo", "vespo", "cispo") else {"epsilon": 0.2, "epsilon_high": 0.28}
    ours, _ = policy_loss(
        algo,
        new,
        old,
        advantages,
        MASK,
        ref_logprobs=ref,
        beta=0.1,
        kl="ratio_k3" if corrected else "k3",
        max_completion_length=8,
        **clipping,
    )
    (our_gradient,) = torch.autograd.grad(ours, new)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert torch.allclose(our_gradient, their_gradient, atol=1e-6)


@pytest.mark.parametrize("ld_alpha", [0.0, 0.5])
def test_long_answers_count_less(ld_alpha):
    """LD-DPO: TRL's, and our sums over the answers of pairs that lie one behind the other."""
    counts = torch.stack([MASK.sum(1), OTHER.sum(1)], 1).flatten().tolist()

    def sums_of(chosen, rejected):
        rows = torch.stack([chosen, rejected], 1).flatten(0, 1)
        flat = torch.cat([row[:count] for row, count in zip(rows, counts, strict=True)])
        return AnswerEngine._sums(flat, SimpleNamespace(target_counts=counts), ld_alpha)

    policy, reference = sums_of(CHOSEN, REJECTED), sums_of(REF_CHOSEN, REF_REJECTED)
    pairs = policy[0::2], policy[1::2], reference[0::2], reference[1::2]
    ours = preference_loss("sigmoid", *pairs, beta=0.1)
    assert ours.mean().item() == pytest.approx(trl_dpo("sigmoid", ld_alpha=ld_alpha), rel=1e-5)


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_kto(loss_type):
    """Loss and metrics of TRL's KTOTrainer, with KL pairs of their own."""
    from trl import KTOTrainer

    label = torch.tensor([True, False, False, True])
    prompt = torch.ones(4, 1, dtype=torch.int64)
    model, ref = MagicMock(training=True), MagicMock()
    # In each model the mismatched pairs are computed first.
    model.side_effect = [outputs(REJECTED * OTHER), outputs(CHOSEN * MASK)]
    ref.side_effect = [outputs((REF_REJECTED - 3) * OTHER), outputs(REF_CHOSEN * MASK)]
    metrics = defaultdict(list)
    trainer = MagicMock(
        accelerator=accelerator(),
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        calculate_KL=loss_type == "kto",
        model=model,
        ref_model=ref,
        beta=0.1,
        desirable_weight=1.5,
        undesirable_weight=0.7,
        loss_type=loss_type,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        _metrics={"train": metrics},
        _total_train_tokens=0,
        _tp_size=1,
    )
    trainer._compute_kl_logps = lambda one, batch: KTOTrainer._compute_kl_logps(trainer, one, batch)
    if loss_type != "kto":
        model.side_effect, ref.side_effect = [outputs(CHOSEN * MASK)], [outputs(REF_CHOSEN * MASK)]
    batch = {
        "input_ids": torch.cat([prompt, MASK], 1),
        "attention_mask": torch.cat([prompt, MASK], 1),
        "completion_mask": torch.cat([0 * prompt, MASK], 1),
        "KL_input_ids": torch.cat([prompt, OTHER], 1),
        "KL_attention_mask": torch.cat([prompt, OTHER], 1),
        "KL_completion_mask": torch.cat([0 * prompt, OTHER], 1),
        "label": label,
    }
    theirs = KTOTrainer._compute_loss(trainer, model, batch, False).item()
    mismatched = sums(REJECTED, OTHER) - sums(REF_REJECTED - 3, OTHER)
    columns = [sums(CHOSEN, MASK), sums(REF_CHOSEN, MASK), MASK.sum(1), sums(CHOSEN, MASK), mismatched]
    values, labels = torch.stack([one.float() for one in columns], 1), label[:, None].float()
    ours = KtoLoss(0.1, 1.5, 0.7, loss_type)(values, labels, [1] * 4)
    assert ours.losses.mean().item() == pytest.approx(theirs, rel=1e-5)
    found = KtoLoss(0.1, 1.5, 0.7, loss_type).measure(values, labels, [1] * 4)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"):
        assert found[name] == pytest.approx(metrics[name][0], rel=1e-5)
    if loss_type == "kto":
        assert metrics["kl"][0] > 0 and found["kl"] == pytest.approx(metrics["kl"][0], rel=1e-5)


@pytest.mark.parametrize("margin", [False, True])
@pytest.mark.parametrize("coefficient", [None, 0.01])
def test_reward_models(margin, coefficient):
    """Loss and metrics of TRL's RewardTrainer."""
    from trl import RewardTrainer

    chosen, rejected = (2 * torch.randn(4, generator=torch.Generator().manual_seed(n)) for n in (1, 2))
    margins = torch.tensor([0.1, 0.5, 0.0, 1.0])
    metrics = defaultdict(list)
    trainer = MagicMock(
        accelerator=accelerator(),
        model=MagicMock(training=True),
        args=SimpleNamespace(center_rewards_coefficient=coefficient),
        _metrics={"train": metrics},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {"attention_mask": torch.ones(8, 2, dtype=torch.int64)}
    if margin:
        inputs["margin"] = margins
    model = MagicMock(return_value=SimpleNamespace(logits=torch.cat([chosen, rejected])[:, None]))
    theirs = RewardTrainer.compute_loss(trainer, model, inputs).item()
    values = torch.stack([chosen, rejected], 1).reshape(-1, 1)
    labels = (margins if margin else torch.zeros(4))[:, None]
    loss = RewardLoss(coefficient or 0.0)
    assert loss(values, labels, [2] * 4).losses.mean().item() == pytest.approx(theirs, rel=1e-5)
    for name, value in loss.measure(values, labels, [2] * 4).items():
        assert value == pytest.approx(metrics[name][0], rel=1e-5)
