"""Losses of rerankers and metrics of rankings, against values worked out by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from sklearn import metrics

from swift.objectives.measures import ndcg, reciprocal_rank
from swift.objectives.ranking import ListwiseLoss, PointwiseLoss, split_documents

SCORES = torch.tensor([[2.0], [0.5], [-1.0], [3.0], [1.0], [-2.0], [0.0]], dtype=torch.float64)
GROUPS = [3, 4]
RELEVANT = torch.tensor([[1.0], [2.0]])  # query 1: 2.0 | 0.5, -1.0; query 2: 3.0, 1.0 | -2.0, 0.0


def log(x):
    return math.log(x)


def test_documents_are_told_apart():
    lists = split_documents(SCORES, RELEVANT, GROUPS)
    assert [(a.tolist(), b.tolist()) for a, b in lists] == [([2], [0.5, -1]), ([3, 1], [-2, 0])]


def test_pointwise_is_binary_cross_entropy():
    terms = PointwiseLoss()(SCORES, RELEVANT, GROUPS)
    signs = [1, -1, -1, 1, 1, -1, -1]
    by_hand = [
        log(1 + math.exp(-sign * score)) for sign, score in zip(signs, SCORES[:, 0].tolist(), strict=True)
    ]
    assert terms.losses.tolist() == pytest.approx(by_hand)
    assert terms.num_correct.tolist() == [True, False, True, True, True, True, True]
    assert PointwiseLoss().num_terms(RELEVANT, GROUPS) == 7


def test_pointwise_of_a_difference_is_the_cross_entropy_of_two_answers():
    yes_no = torch.tensor([[0.3, -0.8], [1.5, 2.0]], dtype=torch.float64)
    wanted = torch.tensor([0, 1])
    terms = PointwiseLoss()((yes_no[:, 0] - yes_no[:, 1])[:, None], torch.tensor([[1.0]]), [2])
    assert torch.allclose(terms.losses, F.cross_entropy(yes_no, wanted, reduction="none"))


@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_listwise_is_the_softmax_against_the_other_documents(temperature):
    terms = ListwiseLoss(temperature)(SCORES, RELEVANT, GROUPS)
    lists = [[2.0, 0.5, -1.0], [3.0, -2.0, 0.0], [1.0, -2.0, 0.0]]
    wanted = [
        float(F.cross_entropy(torch.tensor([one], dtype=torch.float64) / temperature, torch.tensor([0])))
        for one in lists
    ]
    by_hand = [log(sum(math.exp((score - one[0]) / temperature) for score in one)) for one in lists]
    assert terms.losses.tolist() == pytest.approx(wanted)
    assert terms.losses.tolist() == pytest.approx(by_hand)
    assert terms.num_correct.all()
    assert ListwiseLoss(temperature).num_terms(RELEVANT, GROUPS) == 3


def test_short_lists_are_left_out():
    loss = ListwiseLoss(min_group_size=4)
    assert len(loss(SCORES, RELEVANT, GROUPS).losses) == loss.num_terms(RELEVANT, GROUPS) == 0
    loss = ListwiseLoss(min_group_size=2)
    alone = torch.tensor([[1.0]])
    assert len(loss(SCORES[:1], alone, [1]).losses) == loss.num_terms(alone, [1]) == 0
    assert ListwiseLoss(min_group_size=3).num_terms(RELEVANT, GROUPS) == 3


def test_metrics_by_hand():
    # Query 1: order 2.0* 0.5 -1.0. Query 2 with scores 1.0* 0.0* | 3.0 0.5: ranks 2 and 4.
    assert reciprocal_rank(torch.tensor([2.0]), torch.tensor([0.5, -1.0])) == 1
    second = torch.tensor([0.0, 1.0]), torch.tensor([3.0, 0.5])
    assert reciprocal_rank(*second) == 0.5
    gain = 1 / math.log2(3) + 1 / math.log2(5)
    assert ndcg(*second, k=10) == pytest.approx(gain / (1 + 1 / math.log2(3)))
    assert ndcg(*second, k=3) == pytest.approx((1 / math.log2(3)) / (1 + 1 / math.log2(3)))
    assert ndcg(*second, k=1) == 0
    values = torch.tensor([[2.0], [0.5], [-1.0], [1.0], [0.0], [3.0], [0.5]])
    measured = PointwiseLoss().measure(values, RELEVANT, GROUPS)
    assert measured["mrr"] == pytest.approx(0.75)
    assert measured["ndcg_at_10"] == pytest.approx((1 + gain / (1 + 1 / math.log2(3))) / 2)


def test_equal_scores_count_against_the_relevant_document():
    """A model that gives every document the same score must not look perfect because relevant ones come first."""
    same = torch.zeros(4, 1)
    measured = ListwiseLoss().measure(same, torch.tensor([[1.0]]), [4])
    assert measured == {"mrr": 0.25, "ndcg_at_10": pytest.approx(1 / math.log2(5))}


def test_ndcg_agrees_with_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        scores = torch.randn(30, generator=generator)
        wanted = torch.rand(30, generator=generator) < 0.3
        theirs = metrics.ndcg_score([wanted.int().tolist()], [scores.tolist()], k=10)
        assert ndcg(scores[wanted], scores[~wanted], k=10) == pytest.approx(theirs)
