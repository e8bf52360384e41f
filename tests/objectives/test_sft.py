"""The SFT loss: worked numbers, transformers as the oracle, and invariance to how a step is split."""

from dataclasses import dataclass

import pytest
import torch

from swift.objectives.base import TokenOutputs
from swift.objectives.sft import SftObjective


@dataclass
class Targets:
    targets: torch.Tensor
    weights: torch.Tensor | None = None

    @property
    def num_targets(self):
        return int((self.targets != -100).sum())


def outputs(*logprobs):
    values = torch.tensor(logprobs, dtype=torch.float64, requires_grad=True)
    return TokenOutputs(values, values > -0.7)


def test_mean_over_targets():
    batch = Targets(torch.tensor([[5, -100, 7]]))
    objective = SftObjective()
    loss, metrics = objective(outputs(-1.0, -0.5), batch, objective.denominators([batch]))
    assert loss.item() == pytest.approx(0.75)
    assert metrics["loss_sum"].item() == pytest.approx(1.5)
    assert metrics["num_correct"].item() == 1


def test_weighted_mean():
    batch = Targets(torch.tensor([[5, -100, 7]]), torch.tensor([[2.0, 9.0, 0.5]]))
    objective = SftObjective()
    denominators = objective.denominators([batch])
    loss, _ = objective(outputs(-1.0, -0.5), batch, denominators)
    assert denominators.target_weight == 2.5
    assert loss.item() == pytest.approx((2.0 * 1.0 + 0.5 * 0.5) / 2.5)


def test_any_split_gives_the_same_loss():
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(0, 9, (6, 5), generator=generator)
    targets[torch.rand(6, 5, generator=generator) < 0.5] = -100
    weights = torch.rand(6, 5, generator=generator, dtype=torch.float64)
    logprobs = torch.full((6, 5), -1.0, dtype=torch.float64) - torch.rand(6, 5, generator=generator)
    objective = SftObjective()

    def step_loss(splits):
        batches = [Targets(t, w) for t, w in zip(targets.split(splits), weights.split(splits), strict=True)]
        denominators = objective.denominators(batches)
        total = 0.0
        for batch, chunk in zip(batches, logprobs.split(splits), strict=True):
            total += objective(outputs(*chunk[batch.targets != -100].tolist()), batch, denominators)[0].item()
        return total

    assert step_loss([6]) == pytest.approx(step_loss([1, 4, 1]), abs=1e-12)
    assert step_loss([6]) == pytest.approx(step_loss([2, 2, 2]), abs=1e-12)


def test_equals_transformers_loss():
    from transformers.loss.loss_utils import ForCausalLMLoss

    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(2, 6, 11, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 11, (2, 6), generator=generator)
    labels[0, :3] = -100
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    learned = targets != -100
    logprobs = logits.log_softmax(-1)[learned].gather(1, targets[learned][:, None]).squeeze(1)
    objective, batch = SftObjective(), Targets(targets)
    loss, _ = objective(TokenOutputs(logprobs, logprobs > 0), batch, objective.denominators([batch]))
    expected = ForCausalLMLoss(logits, labels, vocab_size=11, num_items_in_batch=batch.num_targets)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_dynamic_fine_tuning_weighs_by_the_probability_held_constant():
    batch = Targets(torch.tensor([[5, -100, 7]]))
    objective = SftObjective(dynamic=True)
    said = outputs(-1.0, -0.5)
    loss, _ = objective(said, batch, objective.denominators([batch]))
    # (e^-1 * 1 + e^-0.5 * 0.5) / 2; d loss / d logp = -p / 2
    assert loss.item() == pytest.approx((0.36787944 + 0.30326533) / 2)
    (gradient,) = torch.autograd.grad(loss, said.logprobs)
    assert gradient.tolist() == pytest.approx([-0.36787944 / 2, -0.60653066 / 2])


def test_sums_of_groups():
    batch = Targets(torch.tensor([[5, -100, 7, 8]]), torch.tensor([[2.0, 9.0, 0.5, 1.0]]))
    objective = SftObjective(groups=lambda batch: torch.tensor([1, 0, 1]), num_groups=3)
    loss, metrics = objective(outputs(-1.0, -0.5, -0.25), batch, objective.denominators([batch]))
    assert metrics["groups"].tolist() == [[0.25, 2.25, 0.0], [0.5, 3.0, 0.0]]
    assert loss.item() * 3.5 == pytest.approx(2.5)  # the loss itself is that of all
