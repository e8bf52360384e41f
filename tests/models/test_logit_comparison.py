"""Two models' logits compared, against the same figures computed in one piece in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from swift.models.compare import Probe, compare, store_logits, stored_logits


def test_chunked_figures_are_those_of_the_whole(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = [5, 700, 1]
    before = [torch.randn(size, 37) * 3 for size in sizes]
    after = [one + 0.1 * torch.randn_like(one) for one in before]
    ids = [torch.randint(0, 37, (size,)).tolist() for size in sizes]
    probes = [Probe(row, [-100 if place % 3 else token for place, token in enumerate(row)]) for row in ids]
    store_logits(iter(before), tmp_path)
    found = compare(stored_logits(tmp_path), after, probes)

    p, q = torch.cat(before).double(), torch.cat(after).double()
    assert found.max == pytest.approx((p - q).abs().max().item(), rel=1e-6)
    assert found.mean == pytest.approx((p - q).abs().mean().item(), rel=1e-6)
    assert found.spread == pytest.approx(p.std(correction=0).item(), rel=1e-6)
    assert found.same_choice == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    kl = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1).mean()
    assert found.kl == pytest.approx(kl.item(), rel=1e-4)
    losses = [
        F.cross_entropy(
            logits[:-1].double(), torch.tensor(probe.labels[1:], dtype=torch.long), reduction="sum"
        )
        for logits, probe in zip(after, probes, strict=True)
    ]
    count = sum(label != -100 for probe in probes for label in probe.labels[1:])
    assert found.num_labels == count and found.num_positions == sum(sizes)
    assert found.perplexity_after == pytest.approx((sum(losses) / count).exp().item(), rel=1e-5)
    assert found.perplexity_increase == pytest.approx(found.perplexity_after / found.perplexity_before - 1)


def test_equal_logits_and_streams_that_do_not_fit() -> None:
    logits, probe = [torch.randn(4, 9)], [Probe.text([1, 2, 3, 4])]
    same = compare(logits, logits, probe)
    assert (same.max, same.kl, same.same_choice, same.perplexity_increase) == (0.0, 0.0, 1.0, 0.0)
    with pytest.raises(ValueError):
        compare(logits, [], probe)
    with pytest.raises(ValueError, match=r"\(4, 9\) and \(4, 8\)"):
        compare(logits, [torch.randn(4, 8)], probe)


def test_a_classifier_has_no_perplexity() -> None:
    found = compare([torch.randn(1, 3)], [torch.randn(1, 3)], [Probe.text([1, 2, 3, 4])])
    assert found.perplexity_before is None and found.perplexity_increase is None and found.max > 0
