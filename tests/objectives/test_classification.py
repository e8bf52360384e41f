"""Metrics of classifiers and regressions, by hand and against scikit-learn and scipy."""

import math

import pytest
import torch
from scipy import stats
from sklearn import metrics

from swift.objectives.base import PooledOutputs
from swift.objectives.classification import MultiLabelLoss, RegressionLoss, SingleLabelLoss
from swift.objectives.measures import f1_scores, pearson, spearman
from swift.objectives.pooled import PooledObjective


class OneBatch:
    def __init__(self, labels, groups):
        self.labels, self.groups = labels, groups


def test_f1_by_hand():
    predicted = torch.tensor([[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0]]).bool()
    wanted = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 1, 0]]).bool()
    # class 0: TP 1 FP 1 FN 0 -> 2/3; class 1: TP 2 FP 0 FN 1 -> 4/5; class 2 never occurs
    assert f1_scores(predicted, wanted) == (pytest.approx((2 / 3 + 4 / 5) / 2), pytest.approx(3 / 4))
    assert f1_scores(torch.zeros(2, 2).bool(), torch.zeros(2, 2).bool()) == (0.0, 0.0)


def test_classes_agree_with_scikit_learn():
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(40, 4, generator=generator)
    wanted = torch.randint(0, 4, (40, 1), generator=generator)
    measured = SingleLabelLoss().measure(scores, wanted.float(), [1] * 40)
    pair = wanted[:, 0].tolist(), scores.argmax(1).tolist()
    assert measured["accuracy"] == pytest.approx(metrics.accuracy_score(*pair))
    assert measured["macro_f1"] == pytest.approx(metrics.f1_score(*pair, average="macro"))
    assert measured["micro_f1"] == pytest.approx(metrics.f1_score(*pair, average="micro"))
    several = (torch.rand(40, 4, generator=generator) < 0.4).float()
    measured = MultiLabelLoss().measure(scores, several, [1] * 40)
    pair = several.int().numpy(), (scores > 0).int().numpy()
    assert measured["accuracy"] == pytest.approx(metrics.accuracy_score(*pair))
    assert measured["macro_f1"] == pytest.approx(metrics.f1_score(*pair, average="macro"))
    assert measured["micro_f1"] == pytest.approx(metrics.f1_score(*pair, average="micro"))


def test_correlations_by_hand_and_with_equal_values():
    first, second = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 4.0, 9.0, 16.0])
    assert spearman(first, second) == pytest.approx(1)
    assert pearson(first, second) == pytest.approx(25 / math.sqrt(5 * 129))
    generator = torch.Generator().manual_seed(2)
    one, other = (torch.randint(0, 5, (30,), generator=generator).float() for _ in range(2))
    assert spearman(one, other) == pytest.approx(stats.spearmanr(one, other).statistic)
    assert pearson(one, other) == pytest.approx(stats.pearsonr(one, other).statistic)
    assert math.isnan(pearson(torch.ones(3), first[:3]))


def test_the_sum_over_a_step_is_divided_by_its_terms():
    objective = PooledObjective(RegressionLoss())
    batches = [
        OneBatch(torch.tensor([[1.0, 2.0]]), [1]),
        OneBatch(torch.tensor([[0.0, 0.0], [1.0, 1.0]]), [1, 1]),
    ]
    denominators = objective.denominators(batches)
    assert (denominators.target_weight, denominators.num_answers) == (6.0, 6)
    values = [torch.tensor([[1.0, 4.0]]), torch.tensor([[3.0, 0.0], [1.0, 0.0]])]
    parts = [objective(PooledOutputs(v), b, denominators) for v, b in zip(values, batches, strict=True)]
    assert [float(loss) for loss, _ in parts] == [pytest.approx(4 / 6), pytest.approx(10 / 6)]
    assert [float(sums["loss_sum"]) for _, sums in parts] == [4, 10]


def test_an_empty_micro_batch_gives_zeros():
    values = torch.zeros(0, 3, requires_grad=True)
    objective = PooledObjective(SingleLabelLoss())
    batch = OneBatch(torch.zeros(0, 1), [])
    loss, sums = objective(PooledOutputs(values), batch, objective.denominators([batch]))
    loss.backward()
    assert loss.item() == float(sums["loss_sum"]) == float(sums["num_correct"]) == 0
    assert values.grad.shape == (0, 3)
