"""Batches worked out by hand."""

from __future__ import annotations

import numpy as np
import torch
from data_fakes import FakeEncoded

from swift.data.collate import collate
from swift.data.tokens import TokenDataset

X = -100
PAD = 99

# Three samples: all learned but the first token; only the last two; one learned token with weights.
SAMPLES = [
    FakeEncoded([11, 12, 13], [X, 12, 13]),
    FakeEncoded([21, 22, 23, 24, 25], [X, X, X, 24, 25]),
    FakeEncoded([31, 32], [31, 32]),
]


def test_padded() -> None:
    batch = collate(TokenDataset.from_samples(SAMPLES), [[0], [1], [2]], "padded", PAD)
    assert batch.input_ids.tolist() == [
        [11, 12, 13, PAD, PAD],
        [21, 22, 23, 24, 25],
        [31, 32, PAD, PAD, PAD],
    ]
    assert batch.targets.tolist() == [[12, 13, X, X, X], [X, X, 24, 25, X], [32, X, X, X, X]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4]] * 3
    assert batch.document_lengths is None
    assert batch.weights is None
    assert (batch.num_tokens, batch.num_targets) == (10, 5)
    assert batch.sample_ids == [0, 1, 2]
    assert batch.input_ids.dtype == batch.targets.dtype == batch.position_ids.dtype == torch.int64


def test_packed() -> None:
    batch = collate(TokenDataset.from_samples(SAMPLES), [[1, 2], [0, 2]], "packed", PAD)
    assert batch.input_ids.tolist() == [[21, 22, 23, 24, 25, 31, 32], [11, 12, 13, 31, 32, PAD, PAD]]
    # The last token of a document predicts nothing: 25 does not predict 31.
    assert batch.targets.tolist() == [[X, X, 24, 25, X, 32, X], [12, 13, X, 32, X, X, X]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1], [0, 1, 2, 0, 1, 0, 1]]
    assert batch.document_lengths == [[5, 2], [3, 2, 2]]
    assert (batch.num_tokens, batch.num_targets) == (12, 6)
    assert batch.sample_ids == [1, 2, 0, 2]


def test_padding_free() -> None:
    batch = collate(TokenDataset.from_samples(SAMPLES), [[0, 1, 2]], "padding_free", PAD)
    assert batch.input_ids.tolist() == [[11, 12, 13, 21, 22, 23, 24, 25, 31, 32]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3, 4, 0, 1]]
    assert batch.targets.tolist() == [[12, 13, X, X, X, 24, 25, X, 32, X]]
    assert batch.document_lengths == [[3, 5, 2]]


def test_weights_are_those_of_the_target() -> None:
    weighted = FakeEncoded([41, 42, 43], [X, 42, 43], [0.0, 0.5, 2.0])
    batch = collate(TokenDataset.from_samples([SAMPLES[0], weighted]), [[1], [0]], "padded", PAD)
    assert batch.weights is not None
    assert batch.weights.tolist() == [[0.5, 2.0, 0.0], [1.0, 1.0, 0.0]]
    assert batch.weights.dtype == torch.float32
    packed = collate(TokenDataset.from_samples([SAMPLES[0], weighted]), [[0, 1]], "packed", PAD)
    assert packed.weights is not None
    assert packed.weights.tolist() == [[1.0, 1.0, 0.0, 0.5, 2.0, 0.0]]


def test_an_empty_micro_batch_can_be_run_and_counts_nothing() -> None:
    for mode in ("padded", "packed"):
        batch = collate(TokenDataset.from_samples(SAMPLES), [], mode, PAD)
        assert batch.input_ids.tolist() == [[PAD]]
        assert batch.targets.tolist() == [[X]]
        assert (batch.num_tokens, batch.num_targets, batch.sample_ids) == (0, 0, [])
        assert batch.document_lengths == (None if mode == "padded" else [[1]])


def test_modes_hold_the_same_targets() -> None:
    """However rows are laid out, each sample brings the same (token, position, target) triples."""
    generator = np.random.default_rng(0)
    samples = []
    for _ in range(20):
        ids = generator.integers(1, 90, int(generator.integers(2, 15))).tolist()
        samples.append(FakeEncoded(ids, [token if generator.random() < 0.5 else X for token in ids]))
    dataset = TokenDataset.from_samples(samples)

    def triples(rows: list[list[int]], mode: str) -> list[tuple[int, ...]]:
        batch = collate(dataset, rows, mode, 0)  # type: ignore[arg-type]
        columns = (batch.input_ids, batch.position_ids, batch.targets)
        flat = zip(*(column.flatten().tolist() for column in columns), strict=True)
        return sorted(entry for entry in flat if entry[0] != 0)

    padded = triples([[number] for number in range(20)], "padded")
    assert padded == triples([list(range(20))], "padding_free")
    assert padded == triples([list(range(0, 20, 2)), list(range(1, 20, 2))], "packed")


def test_to_moves_every_tensor() -> None:
    batch = collate(TokenDataset.from_samples(SAMPLES), [[0]], "padded", PAD)
    moved = batch.to("meta")
    assert moved.input_ids.is_meta and moved.targets.is_meta and moved.position_ids.is_meta
    assert moved.sample_ids == batch.sample_ids
