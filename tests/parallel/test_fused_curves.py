"""Fifty steps of a fused group against the same runs alone."""

import pytest
import torch
import torch.nn.functional as F
from fused_members import KINDS, Kind, attach, base

from swift.data.collate import Batch
from swift.parallel.fused import fused_gradients, join_rows

STEPS = 50
CURVES = [
    Kind(**{**vars(KINDS[0]), "rate": 6e-4, "clip": 1.0}),
    Kind(**{**vars(KINDS[1]), "rate": 3e-4, "lengths": [[6, 11], [8]]}),
    Kind(**{**vars(KINDS[3]), "rate": 5e-4, "clip": 0.5}),
]


def fused_curves(model_dir, dtype):
    model = base(model_dir, dtype)
    members = [attach(model, kind, f"m{at}", dtype) for at, kind in enumerate(CURVES)]
    curves = []
    for number in range(STEPS):
        outputs = fused_gradients([member.step(number % 5) for member in members], members[0].engine._switch)
        for member in members:
            member.update(number)
        curves.append([output.loss.item() for output in outputs])
    return torch.tensor(curves, dtype=torch.float64).T


def solo_curve(model_dir, kind, dtype, padding=0):
    member = attach(base(model_dir, dtype), kind, "default", dtype)
    losses = []
    for number in range(STEPS):
        step = member.step(number % 5)
        batches = [wider(batch, padding) for batch in step.batches]
        losses.append(member.engine.forward_backward(batches, step.objective, step.seed).loss.item())
        member.update(number)
    return torch.tensor(losses, dtype=torch.float64)


def wider(batch, padding):
    """The same rows with more padding."""
    if not padding:
        return batch
    width = batch.input_ids.shape[1] + padding
    longest = Batch(
        torch.zeros(1, width, dtype=torch.long),
        torch.arange(width)[None],
        torch.full((1, width), -100),
        None,
        None,
        0,
        0,
        [],
        [],
    )
    joined = join_rows([batch, longest])
    rows = batch.input_ids.shape[0]
    return Batch(
        **{
            **vars(batch),
            "input_ids": joined.input_ids[:rows],
            "position_ids": joined.position_ids[:rows],
            "targets": joined.targets[:rows],
            "document_lengths": (joined.document_lengths or [None])[:rows]
            if batch.document_lengths is not None
            else None,
        }
    )


def test_curves_in_double_precision_are_those_of_solo_runs(tiny_model_dir):
    curves = fused_curves(tiny_model_dir, torch.float64)
    assert (curves[:, 0] - curves[:, -1]).min() > 0.01  # they learn
    for curve, kind in zip(curves, CURVES, strict=True):
        expected = solo_curve(tiny_model_dir, kind, torch.float64)
        assert (curve - expected).abs().max() < 1e-9, kind.name


@pytest.mark.slow
def test_curves_in_single_precision_differ_no_more_than_by_twice_the_noise_of_padding(tiny_model_dir):
    """Other shapes round otherwise. Without dropout: a solo run's noise depends on the width of its rows."""
    kinds = [Kind(**{**vars(kind), "tuner": {**kind.tuner, "lora_dropout": 0.0}}) for kind in CURVES]
    model = base(tiny_model_dir, torch.float32)
    members = [attach(model, kind, f"m{at}", torch.float32) for at, kind in enumerate(kinds)]
    curves = [[] for _ in kinds]
    for number in range(STEPS):
        outputs = fused_gradients([member.step(number % 5) for member in members], members[0].engine._switch)
        for member, curve, output in zip(members, curves, outputs, strict=True):
            member.update(number)
            curve.append(output.loss.item())
    for curve, kind in zip(curves, kinds, strict=True):
        plain = solo_curve(tiny_model_dir, kind, torch.float32)
        noise = max(
            (solo_curve(tiny_model_dir, kind, torch.float32, padding) - plain).abs().max().item()
            for padding in (1, 2, 5)
        )
        assert 0 < noise < 1e-3
        assert (torch.tensor(curve, dtype=torch.float64) - plain).abs().max().item() <= 2 * noise, kind.name


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_joined_rows_are_padded_at_their_right_end_only(layout):
    def made(width, documents):
        ids = torch.arange(1, width + 1)[None]
        positions = torch.cat([torch.arange(length) for length in documents])[None]
        lengths = [documents] if layout == "packed" else None
        return Batch(ids, positions, ids + 1, None, lengths, width, width, [], [])

    short = made(4, [3, 1] if layout == "packed" else [4])
    both = join_rows([short, made(6, [6])])
    assert both.input_ids.tolist() == [[1, 2, 3, 4, 0, 0], [1, 2, 3, 4, 5, 6]]
    assert both.targets.tolist() == [[2, 3, 4, 5, -100, -100], [2, 3, 4, 5, 6, 7]]
    if layout == "packed":
        assert both.document_lengths == [[3, 1, 2], [6]]
        assert both.position_ids[0].tolist() == [0, 1, 2, 0, 0, 1]
    else:
        assert both.document_lengths is None
        assert both.position_ids[0].tolist() == [0, 1, 2, 3, 4, 5]
    assert torch.equal(F.pad(short.input_ids, (0, 2)), both.input_ids[:1])
