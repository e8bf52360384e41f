"""Data that is read while training: the same rows, in bounded memory, from any position on."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from data_fakes import FakeTemplate, chat, options, write_jsonl

from swift.config.bind import resolve
from swift.config.sections.data import DataSection
from swift.core.errors import ConfigError, DataError
from swift.data.mapping import ColumnMapping
from swift.data.persona import dataset_specs
from swift.data.report import StreamReport
from swift.data.rows import Row
from swift.data.sources import find_files, parse_dataset_spec, read_rows
from swift.data.stream import Stream, StreamLoader, open_stream, stream_notes
from swift.data.tokenise import Encoder, encode_rows


def rows(path: Path, count: int, letter: str) -> Path:
    return write_jsonl(path, [chat("q", letter * (1 + number % 5) + str(number)) for number in range(count)])


def stream(*files: Path | str, **data: Any) -> Stream:
    values = {"dataset": [str(file) for file in files], "data_seed": 3, "max_length": 64, **data}
    return Stream(DataSection(**values), Encoder(FakeTemplate(), 64), batch_size=4)


def answers(loader: StreamLoader, epoch: int = 0, accumulation: int = 1, **start: Any) -> list[list[str]]:
    """The answers of each step's samples, in order."""
    steps = []
    for batches in loader.steps(epoch, accumulation, **start):
        ids = [token for batch in batches for token in batch.input_ids.flatten().tolist()]
        text = "".join(chr(token - 100) if token > 100 else "|" if token == 3 else " " for token in ids)
        steps.append([part.split()[0] for part in text.split("|")[1:]])
    return steps


@pytest.mark.parametrize("layout", [{}, {"padding_free": True}, {"packing": True}], ids=str)
@pytest.mark.parametrize("accumulation", [1, 3])
def test_every_row_is_served_once_and_any_step_can_be_gone_on_from(
    tmp_path: Path, layout: dict[str, bool], accumulation: int
) -> None:
    file = rows(tmp_path / "a.jsonl", 43, "a")
    loader = StreamLoader(stream(file, shuffle_buffer_size=10, **layout))
    whole, positions = [], []
    for batches in loader.steps(0, accumulation):
        positions.append(loader.position)
        whole.append([batch.input_ids.tolist() for batch in batches])
    served = Counter(answer for step in answers(loader, 0, accumulation) for answer in step)
    assert served == Counter("a" * (1 + n % 5) + str(n) for n in range(43))
    assert answers(loader, 1, accumulation) != answers(loader, 0, accumulation)
    for step in (1, len(whole) // 2, len(whole) - 1):
        again = StreamLoader(stream(file, shuffle_buffer_size=10, **layout))
        rest = again.steps(0, accumulation, step, positions[step - 1])
        assert [[batch.input_ids.tolist() for batch in batches] for batches in rest] == whole[step:]


@dataclass(frozen=True)
class Counting(ColumnMapping):
    """Counts the rows that are made."""

    def apply(self, row: Row) -> Row:
        made_rows.append(row.number)
        return row


made_rows: list[int] = []


def test_rows_held_are_bounded_by_the_buffer_and_rows_passed_over_are_not_parsed(tmp_path: Path) -> None:
    source = stream(rows(tmp_path / "a.jsonl", 500, "a"), shuffle_buffer_size=20)
    object.__setattr__(source.specs[0], "mapping", Counting())
    made_rows.clear()
    used = 0
    for window in source.windows(0):
        used += len(window.dataset)
        assert len(made_rows) == used and len(window.dataset) <= 20
    made_rows.clear()
    next(source.windows(0, start=20))
    assert made_rows == list(range(401, 421))
    made_rows.clear()
    loader = StreamLoader(source)
    served = 0
    for batches in loader.steps(0, 1):
        served += sum(len(batch.sample_ids) for batch in batches)
        # what the thread holds: one window, and the batches made in advance (4 of 4 rows, and one in its hands)
        assert len(made_rows) - served <= 20 + 6 * 4
    assert served == 500


def test_weights_mix_the_data_sets_and_decide_the_end(tmp_path: Path) -> None:
    a, b = rows(tmp_path / "a.jsonl", 300, "a"), rows(tmp_path / "b.jsonl", 30, "b")

    def letters(**data: Any) -> Counter[str]:
        source = stream(a, b, dataset_weights=[3, 1], shuffle_buffer_size=50, **data)
        return Counter(answer[0] for step in answers(StreamLoader(source)) for answer in step)

    first = letters()
    assert first["b"] == 30 and 60 <= first["a"] <= 130  # three to one until b ends
    every = letters(stopping_strategy="all_exhausted")
    assert every["a"] == 300 and every["b"] > 70  # b again and again until a ends
    plain = stream(a, b, shuffle_buffer_size=50, dataset_shuffle=False)
    assert Counter(x[0] for step in answers(StreamLoader(plain)) for x in step) == {"a": 300, "b": 30}
    head = stream(f"{a}#7")
    assert sum(map(len, answers(StreamLoader(head)))) == 7


def test_bad_rows_and_streams_without_targets_are_refused(tmp_path: Path) -> None:
    bad = write_jsonl(tmp_path / "bad.jsonl", [chat("q", "a"), "{"])
    with pytest.raises(DataError, match="at least 1 of 2 rows"):
        list(StreamLoader(stream(bad)).steps(0, 1))
    assert len(answers(StreamLoader(stream(bad, on_bad_rows="skip")))) == 1
    mute = write_jsonl(tmp_path / "mute.jsonl", [{"messages": [{"role": "user", "content": "q"}]}])
    with pytest.raises(DataError, match="no row is left"):
        list(StreamLoader(stream(mute)).steps(0, 1))
    with pytest.raises(DataError, match="no row is left"):
        open_stream(options(dataset=[str(mute)], streaming=True), FakeTemplate(), 4, 1)


def test_the_first_window_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [{"messages": [{"role": "user", "content": "mute"}]}] * 10
    file = write_jsonl(tmp_path / "a.jsonl", [*lines, *[chat("q", f"a{number}") for number in range(25)]])
    read: list[int] = []

    def counted(rows: list[Row], encoder: Encoder) -> Any:
        read.extend(row.number for row in rows)
        return encode_rows(rows, encoder)

    monkeypatch.setattr("swift.data.stream.encode_rows", counted)
    values = {"dataset": [str(file)], "streaming": True, "shuffle_buffer_size": 10, "max_length": 64}
    source, loaded, _ = open_stream(options(**values), FakeTemplate(), 4, 1)
    assert read == list(range(1, 21)) and len(loaded.train) == 10  # the first ten teach nothing
    plain = StreamLoader(stream(file, shuffle_buffer_size=10, data_seed=source.section.data_seed))
    expected, again = answers(plain), answers(plain, 1)
    read.clear()
    loader = StreamLoader(source)
    assert answers(loader) == expected
    assert read == list(range(21, 36))
    assert answers(loader, 1) == again


def test_rows_left_out_behind_the_first_window_are_counted_from_any_step_on(tmp_path: Path) -> None:
    mute = {"messages": [{"role": "user", "content": "q"}]}
    lines: list[Any] = [chat("q", f"a{number}") for number in range(60)]
    for place in range(12, 20):  # all eight places of these are more than are kept
        lines[place] = chat("q", "long " * 40)
    lines[30:40] = ["{"] * 10  # a window of nothing else
    lines[50:] = [mute] * 10  # the same, at the end
    file = write_jsonl(tmp_path / "a.jsonl", lines)
    kind = {"shuffle_buffer_size": 10, "on_bad_rows": "skip"}
    loader, reports, positions = StreamLoader(stream(file, **kind)), [], []
    for _ in loader.steps(0, 2):
        reports.append(loader.report)
        positions.append(loader.position)
    seen = [(made["rows_read"], made["counts"]["deleted"], made["counts"]["bad_rows"]) for made in reports]
    assert seen[0] == (10, 0, 0) and (30, 8, 0) in seen and (50, 8, 10) in seen
    final = loader.report
    numbers = StreamReport.from_dict(final).summary()
    wanted = {"rows_read": 60, "samples": 32, "deleted": 8, "truncated": 0, "untargeted": 10, "bad_rows": 10}
    assert {name: numbers[name] for name in wanted} == wanted
    assert sum(map(len, final["deleted"].values())) == 6 and len(final["bad_rows"]) == 6
    first, second, third = stream_notes(final, stream(file, **kind).section)
    start = "of the 60 rows streamed: "
    assert (
        first
        == f"{start}8 rows longer than max_length 64 were left out: {file}:13, 14, 15, 16, 17, 18 and 2 more"
    )
    assert second.startswith(f"{start}10 rows have no token to learn and were left out: {file}:51, 52")
    assert third.startswith(f"{start}10 bad rows were skipped, the first: {file}:31: ")
    for step, (made, position) in enumerate(zip(reports, positions, strict=True), start=1):
        again = StreamLoader(stream(file, **kind))
        assert len(list(again.steps(0, 2, step, position, made))) == len(reports) - step
        assert again.report == final
    assert len(list(loader.steps(1, 2, report=final))) == len(reports) and loader.report == final


def test_validation_data_is_loaded_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWIFT_HOME", str(tmp_path))
    train, held = rows(tmp_path / "a.jsonl", 30, "a"), rows(tmp_path / "v.jsonl", 5, "v")
    values = {
        "dataset": [str(train)],
        "val_dataset": [str(held)],
        "shuffle_buffer_size": 10,
        "streaming": True,
    }
    _, loaded, schedule = open_stream(options(max_length=64, **values), FakeTemplate(), 4, 1)
    assert loaded.validation is not None and len(loaded.validation) == 5 and len(loaded.validation_rows) == 5
    assert len(loaded.train) == 10 and schedule.num_micro_batches == 3


def test_options_that_need_each_other(tmp_path: Path) -> None:
    values = {"model": "m", "dataset": "a.jsonl", "streaming": True}
    with pytest.raises(ConfigError, match="needs max_steps"):
        resolve("sft", values=values)
    with pytest.raises(ConfigError, match="no effect with streaming true"):
        resolve("sft", values={**values, "max_steps": 5, "split_dataset_ratio": 0.1})
    with pytest.raises(ConfigError, match="no effect with streaming false"):
        resolve("sft", values={"model": "m", "dataset": "a.jsonl", "shuffle_buffer_size": 10})


# -- names ---------------------------------------------------------------------------------------------------


def test_self_cognition_takes_the_names_from_the_options() -> None:
    def texts(**names: Any) -> list[dict[str, Any]]:
        (spec,) = dataset_specs(DataSection(**names), ["swift/self-cognition"])
        return [row.values for file in find_files(spec) for row in read_rows(file, mapping=spec.mapping)]

    named = texts(model_name=["小明", "Ming"], model_author=["学校", "The School"])
    assert len(named) >= 100 and not any("{{" in json.dumps(row) for row in named)
    for row in named:
        name, author = ("小明", "学校") if row["language"] == "zh" else ("Ming", "The School")
        assert name in row["response"] and author in row["response"]
    assert all("Ming" in row["response"] for row in texts(model_name=["Ming"], model_author=["X"]))
    with pytest.raises(ConfigError, match="asks who the model is") as error:
        texts(model_name=["Ming"])
    assert error.value.where == "--model_author" and "--model_name" in (error.value.fix or "")


def test_names_subsets_and_counts_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    spec = parse_dataset_spec("HF::AI-MO/NuminaMath-CoT:default/extra#500")
    assert (spec.hub, spec.subsets, spec.num_rows) == ("hf", ("default", "extra"), 500)
    assert spec.entry is not None and spec.entry.name == "numina-math-cot"
    with pytest.raises(DataError, match="not on this machine") as error:
        find_files(spec)
    assert error.value.fix == "swift download numina-math-cot --type dataset --use_hf true"
    Path("gsm8k").mkdir()
    rows(Path("gsm8k/x.jsonl"), 2, "a")
    assert parse_dataset_spec("gsm8k#1").entry is None  # a local path comes first
    with pytest.raises(DataError, match="no data set of this name") as error:
        find_files(parse_dataset_spec("alpaka-zh"))
    assert error.value.fix == "did you mean alpaca-zh? (swift data ls)"


def test_files_of_subsets_and_splits(tmp_path: Path) -> None:
    folder = tmp_path / "repo"
    for name in ("en/train-0.jsonl", "en/test-0.jsonl", "zh/train-0.jsonl", "zh-extra.jsonl", "README.md"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"query": "q", "response": "r"}\n')
    (folder / "README.md").write_text("no front matter")

    def found(name: str) -> list[str]:
        files = find_files(parse_dataset_spec(f"{folder}{name}"))
        return [file.relative_to(folder).as_posix() for file in files]

    assert found(":en") == ["en/train-0.jsonl"]
    assert found(":en/zh") == ["en/train-0.jsonl", "zh/train-0.jsonl"]
    assert len(found("")) == 4  # a local folder without a subset: all of it
    with pytest.raises(DataError, match="no file for split train of fr"):
        found(":fr")
    card = {"configs": [{"config_name": "small", "data_files": [{"split": "train", "path": "zh-*.jsonl"}]}]}
    (folder / "README.md").write_text(f"---\n{json.dumps(card)}\n---\ntext")
    assert found(":small") == ["zh-extra.jsonl"]


def test_gzip_is_read_and_a_damaged_file_is_named(tmp_path: Path) -> None:
    import gzip

    file = tmp_path / "a.jsonl.gz"
    file.write_bytes(gzip.compress(b'{"text": "x"}\n{"text": "y"}\n'))
    assert [row.values["text"] for path in find_files(file) for row in read_rows(path)] == ["x", "y"]
    file.write_bytes(file.read_bytes()[:-9])
    assert next(row.error for row in read_rows(file) if row.error) is not None
