"""Which rows are taken: ``#N``, mixing weights, the split for validation. Works on numbers, not on data."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from swift.core.errors import ConfigError
from swift.data.batching import random_generator
from swift.data.store import TokenStore

__all__ = ["mix", "mixing_counts", "repeat_rows", "row_ids", "sample_rows", "split_rows"]


def sample_rows(total: int, num_rows: int, seed: int, name: str) -> np.ndarray:
    """``num_rows`` of ``total`` row indices without replacement, ascending. Needs ``num_rows <= total``."""
    chosen = random_generator("sample", seed, name).choice(total, num_rows, replace=False)
    return np.sort(chosen)


def row_ids(stores: Sequence[TokenStore]) -> np.ndarray:
    """For every sample of the stores a number of the row it comes from, int64 [samples].

    The pieces of a split row share a number, and so do copies of a row when a file is given twice.
    """
    files: dict[str, int] = {}
    rows = [store.global_rows(files) for store in stores]
    every = np.concatenate(rows) if rows else np.zeros((0, 2), np.int64)
    return np.unique(every, axis=0, return_inverse=True)[1].reshape(-1)


def repeat_rows(rows: np.ndarray, total: int, num_rows: int, seed: int, name: str) -> np.ndarray:
    """Sample indices for ``num_rows`` rows when there are only ``total``: whole copies and a random rest.

    ``rows`` is the row of each sample. Rows that were left out (too long, bad) are missing from every copy
    alike.
    """
    copies, rest = divmod(num_rows, total)
    every = np.arange(len(rows), dtype=np.int64)
    distinct = np.unique(rows)
    count = min(rest, len(distinct))
    chosen = random_generator("repeat", seed, name).choice(distinct, count, replace=False)
    return np.concatenate([np.tile(every, copies), every[np.isin(rows, chosen)]])


def mixing_counts(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """How many samples to take of each data set: as many as the proportions allow without repeating any.

    Raises ConfigError when there is not one weight >= 0 per data set, or all are 0.
    """
    if len(weights) != len(sizes):
        raise ConfigError(
            f"{len(weights)} weights for {len(sizes)} data sets",
            where="--dataset_weights",
            fix="give one weight per data set, in the same order",
        )
    total = sum(weights)
    if min(weights) < 0 or not 0 < total < float("inf"):
        raise ConfigError("weights must be 0 or more, and not all 0", where="--dataset_weights")
    shares = [weight / total for weight in weights]
    num_samples = min(size / share for size, share in zip(sizes, shares, strict=True) if share > 0)
    return [min(size, round(num_samples * share)) for size, share in zip(sizes, shares, strict=True)]


def mix(parts: Sequence[np.ndarray], weights: Sequence[float], seed: int) -> np.ndarray:
    """Sample indices of all data sets, mixed by ``weights`` (empty: everything), one data set after another."""
    if not weights:
        return np.concatenate(parts)
    counts = mixing_counts([len(part) for part in parts], weights)
    chosen = []
    for number, (part, count) in enumerate(zip(parts, counts, strict=True)):
        places = random_generator("mix", seed, number).choice(len(part), count, replace=False)
        chosen.append(part[np.sort(places)])
    return np.concatenate(chosen)


def split_rows(rows: np.ndarray, ratio: float, seed: int) -> np.ndarray:
    """True for the samples set aside for validation, bool [samples].

    Whole rows are set aside, at least one, so that no piece or copy of a validation row is trained on. Needs
    two rows.
    """
    distinct = np.unique(rows)
    count = min(max(1, round(len(distinct) * ratio)), len(distinct) - 1)
    chosen = random_generator("split", seed).choice(distinct, count, replace=False)
    return np.isin(rows, chosen)
