"""Chunked log-probabilities against the plain log_softmax, values and gradients."""

import math

import pytest
import torch

from swift.objectives.logprobs import entropies, linear_logprobs, module_logprobs

ROWS, WIDTH, VOCAB = 50, 16, 33


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(VOCAB, WIDTH, generator=generator, dtype=dtype).requires_grad_()
    targets = torch.randint(0, VOCAB, (ROWS,), generator=generator)
    upstream = torch.randn(ROWS, generator=generator, dtype=dtype)
    return hidden, weight, targets, upstream


def reference(hidden, weight, targets):
    return (hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)


def gradients(logprobs, upstream, *leaves):
    return torch.autograd.grad((logprobs * upstream).sum(), leaves)


@pytest.mark.parametrize("chunk_size", [1, 7, 50, 1000])
@pytest.mark.parametrize("trained", [False, True])
def test_equals_log_softmax(chunk_size, trained):
    hidden, weight, targets, upstream = inputs()
    leaves = (hidden, weight) if trained else (hidden,)
    used = weight if trained else weight.detach()
    logprobs, is_argmax = linear_logprobs(hidden, used, targets, chunk_size=chunk_size)
    expected = reference(hidden, used, targets)
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-12)
    assert torch.equal(is_argmax, (hidden @ weight.T).argmax(-1) == targets)
    for ours, theirs in zip(
        gradients(logprobs, upstream, *leaves), gradients(expected, upstream, *leaves), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_hand_worked():
    # logits (ln 1, ln 3): p = 1/4, 3/4; d logp_0 / d h = W[0] - (W[0] + 3 W[1]) / 4 = 3/4 (W[0] - W[1])
    weight = torch.tensor([[0.0, 1.0], [torch.log(torch.tensor(3.0)).item(), 0.0]], dtype=torch.float64)
    hidden = torch.tensor([[1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    logprobs, is_argmax = linear_logprobs(hidden, weight, torch.tensor([0]))
    assert logprobs.item() == pytest.approx(-1.3862943611198906)
    assert not is_argmax.item()
    (gradient,) = torch.autograd.grad(logprobs.sum(), hidden)
    torch.testing.assert_close(gradient, 0.75 * (weight[0] - weight[1])[None])


def test_very_unlikely_target_stays_finite():
    hidden = torch.tensor([[1.0]], requires_grad=True)
    weight = torch.tensor([[500.0], [-500.0]])
    logprobs, _ = linear_logprobs(hidden, weight, torch.tensor([1]))
    assert logprobs.item() == -1000.0


@pytest.mark.parametrize("trained", [False, True])
def test_no_targets(trained):
    hidden = torch.randn(0, WIDTH, requires_grad=True)
    weight = torch.randn(VOCAB, WIDTH, requires_grad=trained)
    empty = torch.empty(0, dtype=torch.long)
    for logprobs, _ in (
        linear_logprobs(hidden, weight, empty),
        module_logprobs(hidden, lambda rows: rows @ weight.T, empty),
    ):
        assert logprobs.shape == (0,)
        logprobs.sum().backward()


def test_any_head_equals_log_softmax():
    hidden, weight, targets, upstream = inputs()

    def capped(rows):
        return torch.tanh(rows @ weight.T / 5) * 5

    logprobs, _ = module_logprobs(hidden, capped, targets, chunk_size=9)
    expected = capped(hidden).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(logprobs, expected)
    for ours, theirs in zip(
        gradients(logprobs, upstream, hidden, weight),
        gradients(expected, upstream, hidden, weight),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("trained", [False, True])
def test_bfloat16_autocast_is_as_close_as_plain_autocast(trained):
    hidden, weight, targets, upstream = inputs(torch.float32)
    used = weight if trained else weight.detach()
    exact = reference(hidden, used, targets)
    with torch.autocast("cpu", torch.bfloat16):
        ours, _ = linear_logprobs(hidden, used, targets, chunk_size=8)
        plain = (hidden @ used.T).float().log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    assert ours.dtype == torch.float32
    assert (ours - exact).abs().max() <= 1.01 * (plain - exact).abs().max()
    leaves = (hidden, weight) if trained else (hidden,)
    for gradient, true in zip(
        gradients(ours, upstream, *leaves), gradients(exact, upstream, *leaves), strict=True
    ):
        assert gradient.dtype == torch.float32
        assert (gradient - true).norm() / true.norm() < 0.01


def test_entropies_are_those_of_the_distributions():
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)) * 4
    logits[0] = 0  # log(7)
    logits[1, 1:] = -torch.inf  # certain
    found = entropies(logits)
    assert found[:2].tolist() == pytest.approx([math.log(7), 0], abs=1e-6)
    torch.testing.assert_close(found[2:], torch.distributions.Categorical(logits=logits[2:]).entropy())
