"""Sampling against a slow reference: distributions, cuts, penalties, seeds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from swift.inference.engines.base import SamplingOptions
from swift.inference.engines.embedded_sampler import Sampler, uniform

VOCAB = 60


def logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


def reference(
    row: torch.Tensor, options: SamplingOptions, prompt: list[int], answer: list[int]
) -> torch.Tensor:
    """Probabilities of one row, step by step as the options are defined."""
    row = row.double().clone()
    for token in range(VOCAB):
        if token in prompt or token in answer:
            penalty = options.repetition_penalty
            row[token] = row[token] / penalty if row[token] > 0 else row[token] * penalty
        row[token] -= options.frequency_penalty * answer.count(token)
        row[token] -= options.presence_penalty * (token in answer)
        row[token] += options.logit_bias.get(token, 0.0)
        if token in options.stop_token_ids and len(answer) < options.min_tokens:
            row[token] = -torch.inf
    probabilities = (row / options.temperature).softmax(-1)
    order = probabilities.argsort(descending=True).tolist()
    kept, total = [], 0.0
    for rank, token in enumerate(order):
        if (options.top_k and rank >= options.top_k) or (rank and total >= options.top_p):
            break
        if probabilities[token] < options.min_p * probabilities[order[0]]:
            break
        kept.append(token)
        total += float(probabilities[token])
    cut = torch.zeros_like(probabilities)
    cut[kept] = probabilities[kept]
    return cut / cut.sum()


CASES = [
    SamplingOptions(),
    SamplingOptions(temperature=0.6),
    SamplingOptions(top_k=5),
    SamplingOptions(top_p=0.7, temperature=1.3),
    SamplingOptions(min_p=0.2),
    SamplingOptions(top_k=12, top_p=0.8, min_p=0.05, temperature=2.0),
    SamplingOptions(presence_penalty=1.0, frequency_penalty=0.5),
    SamplingOptions(repetition_penalty=1.7, logit_bias={3: 4.0, 8: -100.0}),
    SamplingOptions(stop_token_ids=(2, 9), min_tokens=10),
]


@pytest.mark.parametrize("options", CASES, ids=range(len(CASES)))
def test_tokens_are_drawn_from_the_distribution_the_options_define(options: SamplingOptions) -> None:
    """4,000 draws: every frequency is within 4.5 standard deviations; what is cut off never comes."""
    count, prompt, answer = 4000, [1, 2, 3], [4, 4, 5, 8]
    sampler = Sampler(count, VOCAB, torch.device("cpu"))
    for slot in range(count):
        sampler.place(slot, options, 1000 + slot, prompt, answer, None)
    row = logits(1)
    drawn = sampler.sample(row.expand(count, -1), np.arange(count), np.full(count, len(answer))).tokens
    expected = reference(row[0], options, prompt, answer).numpy()
    found = np.bincount(drawn, minlength=VOCAB) / count
    assert (found[expected == 0] == 0).all()
    assert (np.abs(found - expected) <= 4.5 * np.sqrt(expected * (1 - expected) / count) + 1e-9).all()


def test_a_seeded_draw_does_not_depend_on_the_rows_beside_it() -> None:
    rows = logits(len(CASES), seed=1)
    together, alone = Sampler(9, VOCAB, torch.device("cpu")), Sampler(9, VOCAB, torch.device("cpu"))
    for slot, options in enumerate(CASES):
        together.place(slot, options, 7, [1], [2, 3], None)
    numbers = np.full(len(CASES), 2)
    drawn = together.sample(rows, np.arange(len(CASES)), numbers).tokens
    for slot, options in enumerate(CASES):
        alone.place(4, options, 7, [1], [2, 3], None)
        assert alone.sample(rows[slot : slot + 1], np.array([4]), numbers[:1]).tokens[0] == drawn[slot]


def test_the_counts_follow_the_answer_and_move_with_it() -> None:
    options = SamplingOptions(temperature=0, frequency_penalty=100.0)
    sampler = Sampler(3, VOCAB, torch.device("cpu"))
    sampler.place(2, options, 0, [1], [], None)
    row = logits(1)
    drawn = []
    for number in range(5):
        drawn.append(
            int(sampler.sample(row, np.array([2 if number < 2 else 0]), np.array([number])).tokens[0])
        )
        if number == 1:
            sampler.move(2, 0)
    assert drawn == row[0].topk(5)[1].tolist()


def test_logprobs_are_of_the_distribution_before_it_is_cut() -> None:
    options = SamplingOptions(temperature=0.5, top_k=2, logprobs=4, presence_penalty=2.0, seed=3)
    sampler = Sampler(1, VOCAB, torch.device("cpu"))
    sampler.place(0, options, 3, [], [6], None)
    row = logits(1)
    sampled = sampler.sample(row, np.array([0]), np.array([1]))
    expected = reference(row[0], replace(options, top_k=0), [], [6]).log()
    info = sampled.infos[0]
    assert info.token == sampled.tokens[0]
    assert info.logprob == pytest.approx(float(expected[info.token]), abs=1e-5)
    assert [token for token, _ in info.top] == expected.topk(4)[1].tolist()
    assert [value for _, value in info.top] == pytest.approx(expected.topk(4)[0].tolist(), abs=1e-5)


def test_a_flat_distribution_is_sorted_whole_where_a_part_does_not_suffice() -> None:
    vocab, count = 5000, 2000
    options = SamplingOptions(top_p=0.5)
    sampler = Sampler(count, vocab, torch.device("cpu"))
    for slot in range(count):
        sampler.place(slot, options, slot, [], [], None)
    row = torch.linspace(0, 0.1, vocab)[None]
    drawn = sampler.sample(row.expand(count, -1), np.arange(count), np.zeros(count, np.int64)).tokens
    order = row[0].softmax(-1).sort(descending=True)
    allowed = int((order[0].cumsum(0) - order[0] < 0.5).sum())
    assert allowed > 1024
    border = vocab - allowed
    assert drawn.min() >= border and drawn.min() < border + 30 and len(set(drawn.tolist())) > 1000


def test_uniform_numbers_are_uniform_and_unrelated() -> None:
    seeds = np.repeat(np.arange(200, dtype=np.uint64), 50)
    counters = np.tile(np.arange(50), 200)
    drawn = uniform(seeds, counters)
    assert drawn.min() >= 0 and drawn.max() < 1 and len(np.unique(drawn)) == 10_000
    counts = np.histogram(drawn, 20, (0, 1))[0]
    assert ((counts - 500) ** 2 / 500).sum() < 44  # chi-squared with 19 degrees of freedom: p = 0.001
    table = drawn.reshape(200, 50)
    assert abs(np.corrcoef(table[:-1].ravel(), table[1:].ravel())[0, 1]) < 0.04
    assert abs(np.corrcoef(table[:, :-1].ravel(), table[:, 1:].ravel())[0, 1]) < 0.04
