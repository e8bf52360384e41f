"""Stores on disk are whole or rebuilt; data sets index them."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from data_fakes import FakeEncoded, FakeTemplate, chat, write_jsonl

from swift.data.sources import read_rows
from swift.data.store import CorruptStoreError, TokenStore
from swift.data.tokenise import Encoder, encode_rows
from swift.data.tokens import TokenDataset


@pytest.fixture
def parts(tmp_path: Path) -> list[TokenStore]:
    first = write_jsonl(tmp_path / "a.jsonl", [chat("x", "yz"), chat("xx", "y")])
    weighted = {"messages": [{"role": "assistant", "content": "ab", "loss_scale": 0.5}]}
    second = write_jsonl(tmp_path / "b.jsonl", [weighted, "broken"])
    encoder = Encoder(FakeTemplate(), None)
    return [encode_rows(read_rows(path), encoder) for path in (first, second)]


def contents(dataset: TokenDataset) -> list[tuple[list[int], list[int], list[float] | None]]:
    return [
        (ids.tolist(), labels.tolist(), None if weights is None else weights.tolist())
        for ids, labels, weights in dataset
    ]


def test_a_store_reads_back_what_was_written(parts: list[TokenStore], tmp_path: Path) -> None:
    written = TokenStore.write(tmp_path / "store", iter(parts))
    joined = TokenStore.join(parts)
    assert contents(TokenDataset([written])) == contents(TokenDataset([joined]))
    assert contents(TokenDataset([written])) == [
        ([2, 220, 5, 3, 221, 222, 5], [-100, -100, -100, -100, 221, 222, 5], [1.0] * 7),
        ([2, 220, 220, 5, 3, 221, 5], [-100, -100, -100, -100, -100, 221, 5], [1.0] * 7),
        ([3, 197, 198, 5], [-100, 197, 198, 5], [0.0, 0.5, 0.5, 0.5]),
    ]
    assert isinstance(written.ids, np.memmap)
    dataset = TokenDataset([written])
    assert dataset.lengths.tolist() == [7, 7, 4]
    assert [dataset.row(i) for i in range(3)] == [
        (f"{tmp_path}/a.jsonl:", 1),
        (f"{tmp_path}/a.jsonl:", 2),
        (f"{tmp_path}/b.jsonl:", 1),
    ]
    report = dataset.report
    assert (report.rows_read, report.samples, report.num_tokens, report.num_targets) == (4, 3, 18, 8)
    assert [location for location, _ in report.bad_rows] == [f"{tmp_path}/b.jsonl:2"]
    assert report == joined.report


def test_stores_and_indices(parts: list[TokenStore]) -> None:
    dataset = TokenDataset(parts, np.asarray([2, 0, 2]))
    assert len(dataset) == 3
    assert dataset.lengths.tolist() == [4, 7, 4]
    assert [ids[0] for ids, _, _ in dataset] == [3, 2, 3]
    assert dataset[1][2] is None
    assert dataset.num_tokens == 15


def test_a_worker_gets_paths_not_tokens(parts: list[TokenStore], tmp_path: Path) -> None:
    long = FakeEncoded(list(range(20_000)), list(range(20_000)))
    in_memory = TokenDataset.from_samples([long])
    on_disk = TokenDataset([TokenStore.write(tmp_path / "store", in_memory.stores)])
    sent = pickle.dumps(on_disk)
    assert len(sent) < 2_000 < len(pickle.dumps(in_memory))
    assert contents(pickle.loads(sent)) == contents(in_memory)


def test_empty_store(tmp_path: Path) -> None:
    store = TokenStore.write(tmp_path / "store", [])
    assert len(store) == 0
    assert len(TokenDataset([store])) == 0


@pytest.mark.parametrize(
    "name", ["ids.bin", "learned.bin", "offsets.bin", "rows.bin", "weights.bin", "meta.json"]
)
@pytest.mark.parametrize("damage", ["truncate", "flip", "delete"])
def test_damage_is_noticed(parts: list[TokenStore], tmp_path: Path, name: str, damage: str) -> None:
    path = tmp_path / "store"
    TokenStore.write(path, parts)
    file = path / name
    content = file.read_bytes()
    if damage == "delete":
        file.unlink()
    elif damage == "truncate":
        file.write_bytes(content[:-1])
    else:
        file.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(CorruptStoreError):
        TokenStore.open(path)


def test_a_write_that_fails_leaves_nothing(parts: list[TokenStore], tmp_path: Path) -> None:
    def failing() -> object:
        yield parts[0]
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        TokenStore.write(tmp_path / "cache" / "store", failing())  # type: ignore[arg-type]
    assert list((tmp_path / "cache").iterdir()) == []


def test_labels_must_be_the_tokens() -> None:
    with pytest.raises(ValueError, match="labels must be the token ids"):
        TokenDataset.from_samples([FakeEncoded([1, 2], [-100, 3])])
