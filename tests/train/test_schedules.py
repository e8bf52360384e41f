"""Learning rates against transformers' schedules, step by step."""

import pytest
import torch

from swift.config.schema import options
from swift.train.schedules import learning_rate_schedule


def transformers_rates(name, total, warmup, **kwargs):
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-4)
    scheduler = get_scheduler(name, optimizer, warmup, total, scheduler_specific_kwargs=kwargs or None)
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("warmup", [0, 1, 5])
@pytest.mark.parametrize(
    ("ours", "theirs"), [("cosine", "cosine"), ("linear", "linear"), ("constant", "constant_with_warmup")]
)
def test_equals_transformers(ours, theirs, warmup):
    rate = learning_rate_schedule(ours, peak=3e-4, total_steps=20, warmup_steps=warmup)
    assert [rate(step) for step in range(20)] == pytest.approx(
        transformers_rates(theirs, 20, warmup), rel=1e-9
    )


def test_minimum_equals_transformers_cosine_with_min_lr():
    rate = learning_rate_schedule("cosine", peak=3e-4, total_steps=20, warmup_steps=4, min_ratio=0.1)
    expected = transformers_rates("cosine_with_min_lr", 20, 4, min_lr_rate=0.1)
    assert [rate(step) for step in range(20)] == pytest.approx(expected, rel=1e-9)


def test_warmup_stable_decay_by_hand():
    rate = learning_rate_schedule("wsd", peak=1.0, total_steps=12, warmup_steps=2, decay_ratio=0.5)
    # 10 steps after warm-up; the last half of them falls from 1 to 0
    expected = [0, 0.5, 1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]
    assert [rate(step) for step in range(12)] == pytest.approx(expected)


def test_every_schedule_that_can_be_chosen_begins_at_the_peak():
    for name in options()["lr_scheduler_type"].kind.choices:
        assert learning_rate_schedule(name, peak=3e-4, total_steps=9, warmup_steps=2)(2) == 3e-4
