"""Losses of embeddings: sentence-transformers' formulas written out, and torch's cross-entropy."""

import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from swift.objectives.embedding import InfonceLoss, MatryoshkaLoss, PairLoss

NONE = torch.ones(3, 1)


def vectors(count, size=6, seed=0):
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pairs(labels, seed=0):
    values = vectors(2 * len(labels), seed=seed)
    return values, torch.tensor(labels, dtype=torch.float64)[:, None], [2] * len(labels)


def cosine(values):
    return F.cosine_similarity(values[0::2], values[1::2])


def test_cosine_similarity_is_the_squared_error():
    values, labels, groups = pairs([0.8, 0.0, -0.5, 1.0])
    loss = PairLoss("cosine_similarity")
    assert torch.allclose(
        loss(values, labels, groups).losses.mean(), F.mse_loss(cosine(values), labels[:, 0])
    )
    assert loss.num_terms(labels, groups) == 4


@pytest.mark.parametrize("margin", [0.5, 1.2])
def test_contrastive(margin):
    values, labels, groups = pairs([1, 0, 0, 1, 0])
    distances = 1 - cosine(values)
    wanted = 0.5 * (labels[:, 0] * distances.pow(2) + (1 - labels[:, 0]) * F.relu(margin - distances).pow(2))
    assert torch.allclose(PairLoss("contrastive", margin)(values, labels, groups).losses, wanted)


@pytest.mark.parametrize("labels", [[1, 0, 0, 1, 0, 1], [1, 0, 0], [1, 1, 0], [1, 1], [0, 0], [0], [1]])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_online_contrastive_takes_the_hard_pairs(labels, seed):
    values, targets, groups = pairs(labels, seed)
    distances = 1 - cosine(values)
    near, far = distances[targets[:, 0] == 1], distances[targets[:, 0] == 0]
    hard_far = far[far < (near.max() if len(near) > 1 else far.mean())] if len(far) else far
    hard_near = near[near > (far.min() if len(far) > 1 else near.mean())] if len(near) else near
    wanted = hard_near.pow(2).sum() + F.relu(0.5 - hard_far).pow(2).sum()
    loss = PairLoss("online_contrastive")
    assert torch.allclose(loss(values, targets, groups).losses, wanted[None])
    assert loss.num_terms(targets, groups) == 1
    assert loss.num_terms(targets[:0], []) == 0


def test_infonce_in_the_batch_is_cross_entropy():
    """As sentence-transformers' MultipleNegativesRankingLoss with a scale of 1 / temperature."""
    values = vectors(8)
    unit = F.normalize(values, dim=-1)
    scores = unit[0::2] @ unit[1::2].T / 0.05
    terms = InfonceLoss(0.05)(values, torch.ones(4, 1), [2] * 4)
    assert torch.allclose(terms.losses, F.cross_entropy(scores, torch.arange(4), reduction="none"))
    assert torch.equal(terms.num_correct, scores.argmax(1) == torch.arange(4))


GROUPS = [2, 4, 3]
ANCHORS, POSITIVES, OWN = [0, 2, 6], [1, 3, 7], [[1], [3, 4, 5], [7, 8]]
TEXTS = [1, 3, 4, 5, 7, 8]


def test_infonce_with_hard_negatives_and_the_batch():
    values = vectors(9)
    unit = F.normalize(values, dim=-1)
    scores = unit[ANCHORS] @ unit[TEXTS].T / 0.1
    wanted = F.cross_entropy(scores, torch.tensor([0, 1, 4]), reduction="none")
    assert torch.allclose(InfonceLoss(0.1)(values, NONE, GROUPS).losses, wanted)


def test_infonce_with_the_own_negatives_only():
    values = vectors(9)
    unit = F.normalize(values, dim=-1)
    wanted = [
        F.cross_entropy((unit[anchor] @ unit[own].T / 0.1)[None], torch.tensor([0]))
        for anchor, own in zip(ANCHORS, OWN, strict=True)
    ]
    assert torch.allclose(InfonceLoss(0.1, in_batch=False)(values, NONE, GROUPS).losses, torch.stack(wanted))


def test_infonce_with_anchors_and_texts_among_themselves_and_masked_fakes():
    values, t, margin = (
        vectors(9, size=2),
        0.2,
        0.1,
    )  # two numbers: some negatives are nearer than the positive
    unit = F.normalize(values, dim=-1)
    wanted, masked = [], 0
    for row, (anchor, positive) in enumerate(zip(ANCHORS, POSITIVES, strict=True)):
        own = float(unit[anchor] @ unit[positive])
        others = [float(unit[anchor] @ unit[text]) for text in TEXTS]
        others += [float(unit[anchor] @ unit[other]) for place, other in enumerate(ANCHORS) if place != row]
        others += [float(unit[positive] @ unit[text]) for text in TEXTS if text != positive]
        kept = [value for value in others if value <= own + margin]
        masked += len(others) - len(kept)
        wanted.append(torch.tensor(kept, dtype=torch.float64).div(t).logsumexp(0) - own / t)
    assert masked > 3
    loss = InfonceLoss(t, fake_margin=margin, include_qq=True, include_dd=True)
    assert torch.allclose(loss(values, NONE, GROUPS).losses, torch.stack(wanted))


def test_infonce_metrics_by_hand():
    values = vectors(9)
    unit = F.normalize(values, dim=-1)
    groups = [3, 4, 2]
    measured = InfonceLoss().measure(
        values, NONE, groups
    )  # the last row has no negatives: those of the others count
    similar = unit[[0, 3, 7]] @ unit[[1, 4, 8]].T
    off = ~torch.eye(3, dtype=torch.bool)
    assert measured["mean_positive"] == pytest.approx(float(similar.diagonal().mean()))
    assert measured["mean_negative"] == pytest.approx(float(similar[off].mean()))
    nearest = similar.masked_fill(~off, -9).max(1).values
    assert measured["margin"] == pytest.approx(float((similar.diagonal() - nearest).mean()))
    measured = InfonceLoss().measure(values[:7], NONE[:2], [3, 4])  # own negatives
    assert measured["mean_positive"] == pytest.approx(float((unit[0] @ unit[1] + unit[3] @ unit[4]) / 2))
    own = [[float(unit[0] @ unit[2])], [float(unit[3] @ unit[5]), float(unit[3] @ unit[6])]]
    assert measured["mean_negative"] == pytest.approx((own[0][0] + sum(own[1])) / 3)
    assert measured["margin"] == pytest.approx(measured["mean_positive"] - (own[0][0] + max(own[1])) / 2)


def test_matryoshka_is_the_mean_over_the_sizes():
    values = vectors(8)
    labels, groups = torch.ones(4, 1), [2] * 4
    cut = [InfonceLoss(0.1)(values[:, :dim], labels, groups).losses for dim in (6, 3, 2)]
    loss = MatryoshkaLoss(InfonceLoss(0.1), (6, 3, 2))
    assert torch.allclose(loss(values, labels, groups).losses, sum(cut) / 3)
    measured = loss.measure(values, labels, groups)
    assert measured["margin_dim_3"] == InfonceLoss(0.1).measure(values[:, :3], labels, groups)["margin"]
    assert measured["margin"] == measured["margin_dim_6"]


def test_pair_metrics_are_correlations_of_the_cosine():
    values, labels, groups = pairs([0.8, 0.0, -0.5, 1.0])
    values[1::2] = values[0::2] * torch.tensor([[2.0], [-1.0], [1.0], [3.0]], dtype=torch.float64)
    measured = PairLoss("cosine_similarity").measure(values, labels, groups)  # cosines 1, -1, 1, 1
    assert measured["pearson"] == pytest.approx(stats.pearsonr([1, -1, 1, 1], labels[:, 0]).statistic)
