"""load_data: mixing, splitting, truncation, bad rows, the cache."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_fakes import FakeTemplate, chat, options, write_jsonl

from swift.core.errors import ConfigError, DataError
from swift.data.cache import cache_root
from swift.data.load import LoadedData, describe_rows, load_data
from swift.data.mixing import mixing_counts
from swift.data.store import TokenStore
from swift.data.tokens import TokenDataset


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWIFT_HOME", str(tmp_path / "home"))


def rows_file(path: Path, count: int, letter: str = "a") -> str:
    """``count`` rows whose answer is the letter, twice, and whose question is the row's number."""
    return str(write_jsonl(path, [chat(str(number), letter * 2) for number in range(1, count + 1)]))


def load(max_length: int | None = None, template: FakeTemplate | None = None, **data: Any) -> LoadedData:
    return load_data(options(**data), template or FakeTemplate(), max_length)


def places(dataset: TokenDataset) -> list[tuple[str, int]]:
    return [
        (Path(source[:-1]).name, number) for source, number in (dataset.row(i) for i in range(len(dataset)))
    ]


def test_one_file(tmp_path: Path) -> None:
    data = load(dataset=[rows_file(tmp_path / "a.jsonl", 3)])
    assert places(data.train) == [("a.jsonl", 1), ("a.jsonl", 2), ("a.jsonl", 3)]
    assert (data.validation, data.validation_rows, data.notes) == (None, [], [])
    ids, labels, weights = data.train[1]
    assert ids.tolist() == [2, 150, 5, 3, 197, 197, 5]
    assert labels.tolist() == [-100, -100, -100, -100, 197, 197, 5]
    assert weights is None
    report = data.train.report
    assert (report.rows_read, report.samples, report.num_tokens, report.num_targets) == (3, 3, 21, 9)


def test_several_files_and_folders(tmp_path: Path) -> None:
    rows_file(tmp_path / "a.jsonl", 2)
    (tmp_path / "more").mkdir()
    rows_file(tmp_path / "more" / "b.jsonl", 1)
    rows_file(tmp_path / "more" / "c.jsonl", 2)
    data = load(dataset=[str(tmp_path / "a.jsonl"), str(tmp_path / "more")])
    assert places(data.train) == [
        ("a.jsonl", 1),
        ("a.jsonl", 2),
        ("b.jsonl", 1),
        ("c.jsonl", 1),
        ("c.jsonl", 2),
    ]


def test_taking_some_rows(tmp_path: Path) -> None:
    file = rows_file(tmp_path / "a.jsonl", 100)
    data = load(dataset=[f"{file}#10"])
    chosen = [number for _, number in places(data.train)]
    assert len(set(chosen)) == 10
    assert chosen == sorted(chosen)
    assert [number for _, number in places(load(dataset=[f"{file}#10"]).train)] == chosen
    assert [number for _, number in places(load(dataset=[f"{file}#10"], data_seed=8).train)] != chosen


def test_taking_more_rows_than_there_are_repeats_them(tmp_path: Path) -> None:
    file = rows_file(tmp_path / "a.jsonl", 4)
    data = load(dataset=[f"{file}#10"])
    counts = np.bincount([number for _, number in places(data.train)])[1:]
    assert counts.sum() == 10
    assert set(counts.tolist()) == {2, 3}
    assert data.train.report.num_tokens == 70


def test_taking_rows_of_a_folder(tmp_path: Path) -> None:
    rows_file(tmp_path / "a.jsonl", 30)
    rows_file(tmp_path / "b.jsonl", 30)
    data = load(dataset=[f"{tmp_path}#20"])
    assert len(set(places(data.train))) == 20
    assert {name for name, _ in places(data.train)} == {"a.jsonl", "b.jsonl"}


@pytest.mark.parametrize(
    ("sizes", "weights", "counts"),
    [
        ([100, 100], [1, 1], [100, 100]),
        ([100, 300], [1, 1], [100, 100]),
        ([100, 300], [0.25, 0.75], [100, 300]),
        ([100, 300], [1, 9], [33, 300]),
        ([100, 300], [0, 2], [0, 300]),
    ],
)
def test_mixing_counts(sizes: list[int], weights: list[float], counts: list[int]) -> None:
    assert mixing_counts(sizes, weights) == counts


def test_mixing(tmp_path: Path) -> None:
    files = [rows_file(tmp_path / "a.jsonl", 20), rows_file(tmp_path / "b.jsonl", 60)]
    data = load(dataset=files, dataset_weights=[2, 1])
    names = [name for name, _ in places(data.train)]
    assert (names.count("a.jsonl"), names.count("b.jsonl")) == (20, 10)
    assert len(set(places(data.train))) == 30
    assert data.notes == [f"mixed by weight: 20 of 20 from {files[0]}, 10 of 60 from {files[1]}"]
    assert places(load(dataset=files, dataset_weights=[2, 1]).train) == places(data.train)
    with pytest.raises(ConfigError, match="1 weights for 2 data sets"):
        load(dataset=files, dataset_weights=[1])
    with pytest.raises(ConfigError, match="0 or more, and not all 0"):
        load(dataset=files, dataset_weights=[0, 0])


def test_split(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [chat(str(number), "aa", id=number) for number in range(40)])
    data = load(dataset=[str(file)], split_dataset_ratio=0.1)
    assert data.validation is not None
    assert (len(data.train), len(data.validation)) == (36, 4)
    assert sorted(places(data.train) + places(data.validation)) == [("a.jsonl", n) for n in range(1, 41)]
    numbers = [number for _, number in places(data.validation)]
    assert data.validation_rows == [chat(str(number - 1), "aa", id=number - 1) for number in numbers]
    assert data.validation.report.num_tokens == data.validation.num_tokens
    again = load(dataset=[str(file)], split_dataset_ratio=0.1)
    assert again.validation is not None
    assert places(again.validation) == places(data.validation)


def test_no_copy_and_no_piece_of_a_validation_row_is_trained_on(tmp_path: Path) -> None:
    text = [{"text": "x" * 30} for _ in range(10)]
    file = str(write_jsonl(tmp_path / "a.jsonl", text))
    data = load(10, dataset=[f"{file}#25", file], split_dataset_ratio=0.2, truncation_strategy="split")
    assert data.validation is not None
    train, validation = set(places(data.train)), set(places(data.validation))
    assert (len(train), len(validation)) == (8, 2)
    assert not train & validation


def test_tiny_split(tmp_path: Path) -> None:
    data = load(dataset=[rows_file(tmp_path / "a.jsonl", 2)], split_dataset_ratio=0.01)
    assert data.validation is not None
    assert (len(data.train), len(data.validation)) == (1, 1)
    with pytest.raises(DataError, match="one row cannot be split"):
        load(dataset=[rows_file(tmp_path / "b.jsonl", 1)], split_dataset_ratio=0.5)


def test_validation_files_win_over_a_split(tmp_path: Path) -> None:
    data = load(
        dataset=[rows_file(tmp_path / "a.jsonl", 10)],
        val_dataset=[rows_file(tmp_path / "v.jsonl", 2)],
        split_dataset_ratio=0.5,
    )
    assert data.validation is not None
    assert len(data.train) == 10
    assert places(data.validation) == [("v.jsonl", 1), ("v.jsonl", 2)]


# -- truncation ----------------------------------------------------------------------------------------------


@pytest.fixture
def uneven(tmp_path: Path) -> str:
    """Rows of 7, 12 and 7 tokens: role, question, end, role, answer, end."""
    rows = [chat("q", "ab"), chat("q", "abcdefg"), chat("q", "cd")]
    return str(write_jsonl(tmp_path / "u.jsonl", rows))


def ids_of_row_2(data: LoadedData) -> list[list[int]]:
    return [data.train[i][0].tolist() for i in range(len(data.train)) if data.train.row(i)[1] == 2]


WHOLE = [2, 213, 5, 3, 197, 198, 199, 200, 201, 202, 203, 5]


def test_delete(uneven: str) -> None:
    data = load(7, dataset=[uneven])
    assert [number for _, number in places(data.train)] == [1, 3]
    assert data.train.report.deleted == {f"{uneven}:": [2]}
    assert data.notes == [f"1 rows longer than max_length 7 were left out: {uneven}:2"]


def test_cut(uneven: str) -> None:
    right = load(7, dataset=[uneven], truncation_strategy="right")
    assert ids_of_row_2(right) == [WHOLE[:7]]
    assert right.train.report.truncated == {f"{uneven}:": [2]}
    assert right.notes == [f"1 rows longer than max_length 7 were cut at the right: {uneven}:2"]
    left = load(7, dataset=[uneven], truncation_strategy="left")
    assert ids_of_row_2(left) == [WHOLE[-7:]]
    assert left.notes == [f"1 rows longer than max_length 7 were cut at the left: {uneven}:2"]


def test_split_pieces_overlap_by_the_token_that_predicts_the_next(uneven: str) -> None:
    data = load(5, dataset=[uneven], truncation_strategy="split")
    assert ids_of_row_2(data) == [WHOLE[0:5], WHOLE[4:9], WHOLE[8:12]]
    whole = load(None, dataset=[uneven])
    assert data.train.report.num_targets == whole.train.report.num_targets


def test_a_cut_that_takes_all_targets_is_reported(uneven: str) -> None:
    data = load(9, dataset=[uneven], truncation_strategy="right")
    assert data.train.report.untargeted == {}
    with pytest.raises(DataError) as caught:
        load(4, dataset=[uneven], truncation_strategy="right", load_from_cache_file=False)
    assert caught.value.message == "no row is left to learn from"
    assert caught.value.why == "3 rows read, 3 with no token to learn (no assistant message?)"


def test_rows_without_targets_are_left_out_and_named(tmp_path: Path) -> None:
    unweighted = {"messages": [{"role": "assistant", "content": "x", "loss_scale": 0.0}]}
    rows = [chat("q", "a"), {"query": "no answer"}, unweighted]
    file = str(write_jsonl(tmp_path / "a.jsonl", rows))
    data = load(dataset=[file])
    assert places(data.train) == [("a.jsonl", 1)]
    assert data.train.report.untargeted == {f"{file}:": [2, 3]}
    assert data.notes == [f"2 rows have no token to learn and were left out: {file}:2, 3"]


def test_everything_too_long(uneven: str) -> None:
    with pytest.raises(DataError) as caught:
        load(5, dataset=[uneven])
    assert caught.value.why == "3 rows read, 3 longer than max_length 5"
    assert caught.value.fix is not None
    assert "--truncation_strategy left" in caught.value.fix


def test_describe_rows() -> None:
    assert describe_rows({"a.jsonl:": [1, 2], "b.parquet:row ": [7]}) == "a.jsonl:1, 2, b.parquet:row 7"
    assert describe_rows({"a.jsonl:": list(range(1, 11))}, limit=3) == "a.jsonl:1, 2, 3 and 7 more"


# -- bad rows ------------------------------------------------------------------------------------------------


@pytest.fixture
def faulty(tmp_path: Path) -> str:
    rows: list[Any] = [chat("q", "a") for _ in range(20)]
    rows[4] = '{"messages": ['
    for number in (6, 7, 8, 9, 10):
        rows[number] = {"text_only": "x"}
    return str(write_jsonl(tmp_path / "f.jsonl", rows))


def test_bad_rows_stop_the_run(faulty: str) -> None:
    with pytest.raises(DataError) as caught:
        load(dataset=[faulty])
    error = caught.value
    assert error.message == "6 of 20 rows cannot be used"
    assert error.where == faulty
    assert error.why is not None
    lines = [line.strip() for line in error.why.splitlines()]
    assert lines[0] == f"{faulty}:5: broken JSON: Expecting value (column 15)"
    assert lines[1].startswith(f"{faulty}:7: no known columns: found [text_only]; expected messages | ")
    assert lines[5] == "and 1 more"
    assert error.fix == f"swift data check {faulty}   (or go on without them: --on_bad_rows skip)"


def test_bad_rows_skipped_on_request_are_counted(faulty: str) -> None:
    data = load(dataset=[faulty], on_bad_rows="skip")
    assert len(data.train) == 14
    assert [location for location, _ in data.train.report.bad_rows] == [
        f"{faulty}:{n}" for n in (5, 7, 8, 9, 10, 11)
    ]
    reason = "broken JSON: Expecting value (column 15)"
    assert data.notes == [f"6 bad rows were skipped, the first: {faulty}:5: {reason}"]
    with pytest.raises(DataError, match="6 of 20 rows cannot be used"):
        load(dataset=[faulty])  # the cached tokens of the skipping run do not hide them


def test_a_row_that_the_template_refuses_is_named(tmp_path: Path) -> None:
    file = str(write_jsonl(tmp_path / "a.jsonl", [chat("q", "a"), chat("q", "REFUSE"), chat("q", "b")]))
    with pytest.raises(DataError, match="at least 1 of 3 rows cannot be used") as caught:
        load(dataset=[file])
    assert caught.value.why == f"{file}:2: the template refuses this"
    data = load(dataset=[file], on_bad_rows="skip")
    assert [number for _, number in places(data.train)] == [1, 3]


def test_missing_files_are_found_before_anything_is_read(tmp_path: Path) -> None:
    template = FakeTemplate()
    file = rows_file(tmp_path / "a.jsonl", 3)
    with pytest.raises(DataError, match="no such file or folder"):
        load(template=template, dataset=[file], val_dataset=[str(tmp_path / "b.jsonl")])
    assert template.encoded == 0


# -- cache ---------------------------------------------------------------------------------------------------


def entries() -> list[Path]:
    return sorted(cache_root().iterdir())


def test_cache_hit(tmp_path: Path) -> None:
    file = rows_file(tmp_path / "a.jsonl", 3)
    first, second = FakeTemplate(), FakeTemplate()
    a = load(template=first, dataset=[file])
    b = load(template=second, dataset=[file])
    assert (first.encoded, second.encoded) == (3, 0)
    assert [ids.tolist() for ids, _, _ in a.train] == [ids.tolist() for ids, _, _ in b.train]
    assert a.train.report == b.train.report


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 50},
        {"max_length": 50, "truncation_strategy": "right"},
        {"columns": {"x": "y"}},
        {"template": FakeTemplate("other")},
        {"load_from_cache_file": False},
    ],
)
def test_cache_miss(tmp_path: Path, change: dict[str, Any]) -> None:
    file = rows_file(tmp_path / "a.jsonl", 3)
    load(dataset=[file])
    template = change.pop("template", FakeTemplate())
    load(template=template, dataset=[file], **change)
    assert template.encoded == 3


def test_cache_miss_when_the_content_changes(tmp_path: Path) -> None:
    file = rows_file(tmp_path / "a.jsonl", 3, "a")
    load(dataset=[file])
    rows_file(tmp_path / "a.jsonl", 3, "b")
    data = load(dataset=[file])
    assert data.train[0][0].tolist() == [2, 149, 5, 3, 198, 198, 5]


def test_seed_and_mixing_reuse_the_tokens(tmp_path: Path) -> None:
    files = [rows_file(tmp_path / "a.jsonl", 10), rows_file(tmp_path / "b.jsonl", 10)]
    load(dataset=files)
    template = FakeTemplate()
    load(template=template, dataset=files, dataset_weights=[1, 3], data_seed=9, split_dataset_ratio=0.2)
    assert template.encoded == 0


@pytest.mark.parametrize("name", ["ids.bin", "meta.json"])
def test_a_truncated_cache_is_made_again(tmp_path: Path, name: str) -> None:
    file = rows_file(tmp_path / "a.jsonl", 3)
    first = load(dataset=[file])
    expected = [ids.tolist() for ids, _, _ in first.train]
    [entry] = entries()
    content = (entry / name).read_bytes()
    (entry / name).unlink()  # the file is mapped: shortening it in place would take it away from ``first``
    (entry / name).write_bytes(content[:-5])
    template = FakeTemplate()
    data = load(template=template, dataset=[file])
    assert template.encoded == 3
    assert len(data.notes) == 1
    assert data.notes[0].startswith("the token cache was damaged and is made again")
    assert [ids.tolist() for ids, _, _ in data.train] == expected
    assert load(template=FakeTemplate(), dataset=[file]).notes == []


def test_what_killed_processes_left_is_cleared_after_a_day(tmp_path: Path) -> None:
    old, new = (cache_root() / f".key.partial-{name}" for name in ("old", "new"))
    for folder in (old, new):
        folder.mkdir(parents=True)
        (folder / "ids.bin").write_bytes(b"")
    os.utime(old, (1_000_000_000, 1_000_000_000))
    load(dataset=[rows_file(tmp_path / "a.jsonl", 3)])
    assert not old.exists()
    assert new.exists()


def test_the_entries_used_longest_ago_make_room(tmp_path: Path) -> None:
    files = [rows_file(tmp_path / f"{name}.jsonl", 20) for name in "abc"]
    for day, file in enumerate(files[:2]):
        load(dataset=[file])
        newest = max(entries(), key=lambda entry: entry.stat().st_mtime)
        os.utime(newest, times=(time.time() - (5 - day) * 86400,) * 2)
    oldest, second = sorted(entries(), key=lambda entry: entry.stat().st_mtime)
    size = sum(file.stat().st_size for file in oldest.iterdir())
    load(dataset=[files[2]], token_cache_gib=2.5 * size / 2**30)
    assert oldest not in entries() and second in entries() and len(entries()) == 2
    load(dataset=[files[0]], token_cache_gib=1e-9)  # what was used within a day stays whatever the limit
    assert len(entries()) == 2 and second not in entries()


def test_an_unwritable_cache_does_not_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "occupied"
    home.write_text("a file where a folder should be")
    monkeypatch.setenv("SWIFT_HOME", str(home))
    data = load(dataset=[rows_file(tmp_path / "a.jsonl", 3)])
    assert len(data.train) == 3
    assert data.notes == [f"tokens are not cached: Not a directory ({home}/cache/tokens)"]


def test_a_full_cache_disk_does_not_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, parts: Any) -> TokenStore:
        next(iter(parts))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TokenStore, "write", full)
    data = load(dataset=[rows_file(tmp_path / "a.jsonl", 3)])
    assert len(data.train) == 3
    assert data.notes == [f"tokens are not cached: No space left on device ({cache_root()})"]


# -- several processes ---------------------------------------------------------------------------------------


def test_processes_change_nothing(tmp_path: Path) -> None:
    rows = [chat(str(number), "ab" * (number % 9)) for number in range(1500)]
    rows[1400] = {"messages": "no"}
    file = str(write_jsonl(tmp_path / "a.jsonl", rows))
    one, two = (
        load(18, dataset=[file], on_bad_rows="skip", dataset_num_proc=count, load_from_cache_file=False)
        for count in (1, 2)
    )
    assert one.train.report == two.train.report
    assert [ids.tolist() for ids, _, _ in one.train] == [ids.tolist() for ids, _, _ in two.train]
    assert places(one.train) == places(two.train)
    assert len(one.train.report.deleted[f"{file}:"]) > 100
    with pytest.raises(DataError, match="1 of 1500 rows"):
        load(18, dataset=[file], dataset_num_proc=2, load_from_cache_file=False)


def test_a_real_template(tmp_path: Path, tiny_model_dir: Path) -> None:
    from swift.config.sections.template import TemplateSection
    from swift.models.load import load_template

    template = load_template(tiny_model_dir, TemplateSection())
    file = str(
        write_jsonl(tmp_path / "a.jsonl", [chat("Hello!", "I am fine."), {"query": "x", "response": 3}])
    )
    data = load_data(options(dataset=[file], on_bad_rows="skip"), template, 64)
    ids, labels, _ = data.train[0]
    learned = template.tokenizer.decode(labels[labels != -100])
    assert learned.startswith("I am fine.")
    assert "Hello!" in template.tokenizer.decode(ids)
    assert "Hello!" not in learned
    assert [reason for _, reason in data.train.report.bad_rows] == ['"response" is a number, not text']
