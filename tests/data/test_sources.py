"""Rows and their locations, for every file type and every way a file can be broken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_fakes import write_jsonl

from swift.core.errors import DataError
from swift.data.sources import find_files, parse_dataset_spec, read_rows, row_numbers


def outcome(path: Path) -> list[tuple[str, object]]:
    """(location relative to the folder, values or reason) of every row."""
    return [
        (row.location.replace(f"{path.parent}/", ""), row.error if row.error is not None else row.values)
        for row in read_rows(path)
    ]


def test_jsonl_counts_lines_from_one_and_passes_over_blank_ones(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}, "", "   ", {"text": "y"}])
    assert outcome(path) == [("a.jsonl:1", {"text": "x"}), ("a.jsonl:4", {"text": "y"})]
    assert row_numbers(path) == [1, 4]


def test_jsonl_bad_lines_do_not_stop_the_good_ones(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ['{"text": "x', "[1, 2]", '{"a": 1 "b": 2}', {"text": "y"}])
    assert outcome(path) == [
        ("a.jsonl:1", "broken JSON: Unterminated string starting at (column 10)"),
        ("a.jsonl:2", "a JSON object expected, found list"),
        ("a.jsonl:3", "broken JSON: Expecting ',' delimiter (column 9)"),
        ("a.jsonl:4", {"text": "y"}),
    ]


def test_jsonl_odd_text_survives(tmp_path: Path) -> None:
    text = "emoji 👩‍🚀, right-to-left שלום, NUL \x00, line separator \u2028, carriage \r return"
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"text": text}, ensure_ascii=False).encode() + b"\r\n")
    assert outcome(path) == [("a.jsonl:1", {"text": text})]


def test_jsonl_escapes(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ['{"text": "\\ud83d\\ude00"}', '{"text": "\\ud83d"}'])
    assert outcome(path) == [
        ("a.jsonl:1", {"text": "😀"}),
        ("a.jsonl:2", "a \\u escape is half a character (a lone surrogate)"),
    ]


def test_jsonl_nested_too_deeply(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ['{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"])
    assert outcome(path) == [("a.jsonl:1", "broken JSON: nested too deeply")]


def test_wrong_encoding_names_the_line_and_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"text": "ok"}\n{"text": "é"}\n'.encode("latin-1"))
    assert outcome(path)[1] == ("a.jsonl:2", "not UTF-8: byte 0xe9 at byte 11 of the line")
    path.write_bytes('{"text": "ok"}\n'.encode("utf-16"))
    assert outcome(path)[0] == ("a.jsonl:1", "not UTF-8: the file is UTF-16; save it as UTF-8")
    listed = tmp_path / "a.json"
    listed.write_bytes('[{"text": "ok"},\n\n{"text": "é"}]'.encode("latin-1"))
    assert outcome(listed) == [("a.json:3", "not UTF-8: byte 0xe9 at byte 11 of the line")]


def test_ten_megabyte_line(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x" * 10_000_000}, {"text": "y"}])
    rows = list(read_rows(path))
    assert [len(row.values["text"]) for row in rows] == [10_000_000, 1]
    assert rows[1].location == f"{path}:2"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
def test_empty_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"")
    assert outcome(path) == [(name, "the file is empty")]
    path.write_bytes(b"\n \n")
    assert outcome(path) == [(name, "the file is empty")]
    assert row_numbers(path) == [0]


def test_unreadable_file_is_one_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "gone.jsonl"
    assert outcome(path) == [("gone.jsonl", "cannot be read: No such file or directory")]


def test_json_list_knows_the_line_of_each_element(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[\n {"text":\n  "x"},\n\n {"text": "y"}, 3\n]\n')
    # Two elements share line 5, so lines would not tell them apart.
    assert outcome(path) == [
        ("a.json:element 1", {"text": "x"}),
        ("a.json:element 2", {"text": "y"}),
        ("a.json:element 3", "a JSON object expected, found int"),
    ]
    path.write_text('[\n {"text":\n  "x"},\n\n {"text": "y"}\n]\n')
    assert outcome(path) == [("a.json:2", {"text": "x"}), ("a.json:5", {"text": "y"})]


def test_json_list_broken_in_the_middle(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[\n{"text": "x"},\n{"text": oops},\n{"text": "y"}]')
    assert outcome(path) == [
        ("a.json:2", {"text": "x"}),
        ("a.json:3", "broken JSON: Expecting value (column 10); nothing after it can be read"),
    ]
    path.write_text('[\n{"text": "x"}\n{"text": "y"}]')
    reason = "broken JSON: Expecting ',' or ']' after an element (column 1); nothing after it can be read"
    assert outcome(path) == [("a.json:3", reason)]
    path.write_text('[\n{"text": "x"}\n]\nand more')
    assert outcome(path)[-1] == ("a.json:4", "broken JSON: text after the closing bracket")
    path.write_text('[\n{"text": "x"},\n')
    assert outcome(path)[-1][1] == "broken JSON: Expecting value (column 1); nothing after it can be read"


def test_json_with_one_object_or_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('\n{\n"text": "x"\n}\n')
    assert outcome(path) == [("a.json:2", {"text": "x"})]
    path.write_text('{"text": "x"}\n{"text": "y"}\n')
    assert outcome(path) == [("a.json:1", {"text": "x"}), ("a.json:2", {"text": "y"})]


def test_csv_quoting_and_line_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('query,response\n"a, ""b""\nc",d\n\ne,f\n')
    assert outcome(path) == [
        ("a.csv:2", {"query": 'a, "b"\nc', "response": "d"}),
        ("a.csv:5", {"query": "e", "response": "f"}),
    ]


def test_csv_faults(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'query,response\na\na,b,c\n"a"b,c\n\xff,b\ngood,row\n"open,b\n')
    assert outcome(path) == [
        ("a.csv:2", "1 fields, but the header has 2"),
        ("a.csv:3", "3 fields, but the header has 2"),
        ("a.csv:4", "broken CSV: ',' expected after '\"'"),
        ("a.csv:5", "not UTF-8: byte 0xff at byte 1 of the line"),
        ("a.csv:6", {"query": "good", "response": "row"}),
        ("a.csv:7", "broken CSV: unexpected end of data"),
    ]
    path.write_text("query,query\na,b\n")
    assert outcome(path) == [("a.csv:1", "the header names 'query' twice")]


def test_csv_large_cell_and_tsv(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text\n" + "x" * 1_000_000 + "\n")
    assert len(next(read_rows(path)).values["text"]) == 1_000_000
    tabs = tmp_path / "a.tsv"
    tabs.write_text("query\tresponse\na,b\tc\n")
    assert outcome(tabs) == [("a.tsv:2", {"query": "a,b", "response": "c"})]


def test_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    messages = [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]]
    pyarrow.parquet.write_table(pyarrow.table({"messages": messages, "id": [1, 2]}), path)
    assert outcome(path) == [
        ("a.parquet:row 1", {"messages": messages[0], "id": 1}),
        ("a.parquet:row 2", {"messages": messages[1], "id": 2}),
    ]
    path.write_bytes(path.read_bytes()[:100])
    [(location, reason)] = outcome(path)
    assert location == "a.parquet"
    assert str(reason).startswith("broken parquet: ")


def test_txt_documents_are_separated_by_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\n one\r\ntwo\r\n \r\n\r\nthree\n\n\xff\n")
    assert outcome(path) == [
        ("a.txt:2", {"text": " one\ntwo"}),
        ("a.txt:6", {"text": "three"}),
        ("a.txt:8", "not UTF-8: byte 0xff at byte 1 of the line"),
    ]


def test_columns_are_renamed(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"q": "x", "a": "y"}, {"q": "x", "query": "z"}])
    rows = list(read_rows(path, {"q": "query"}))
    assert rows[0].values == {"query": "x", "a": "y"}
    assert rows[1].error == 'renaming by --columns gives "query" twice'


def test_only_wanted_rows_are_parsed(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["broken", {"text": "x"}, "", {"text": "y"}])
    assert [row.number for row in read_rows(path, wanted={2, 4})] == [2, 4]


def test_dataset_spec(tmp_path: Path) -> None:
    spec = parse_dataset_spec("a.jsonl#500")
    assert (spec.path, spec.num_rows) == (Path("a.jsonl"), 500)
    assert parse_dataset_spec("a.jsonl").num_rows is None
    assert parse_dataset_spec("a#b.jsonl").path == Path("a#b.jsonl")
    literal = write_jsonl(tmp_path / "odd#5", [])
    assert parse_dataset_spec(str(literal)).path == literal
    with pytest.raises(DataError, match="0 rows asked for"):
        parse_dataset_spec("a.jsonl#0")


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{}])
    with pytest.raises(DataError) as caught:
        find_files(tmp_path / "trian.jsonl")
    assert caught.value.message == "no such file or folder"
    assert caught.value.where == str(tmp_path / "trian.jsonl")
    assert caught.value.fix == f"did you mean {tmp_path / 'train.jsonl'}?"
    with pytest.raises(DataError, match="there is no folder"):
        find_files(tmp_path / "nowhere" / "a.jsonl")


def test_folder_gives_its_data_files_in_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.csv", "sub/c.parquet", ".hidden/d.jsonl", ".e.jsonl", "notes.md"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
    assert find_files(tmp_path) == [tmp_path / "a.csv", tmp_path / "b.jsonl", tmp_path / "sub/c.parquet"]
    with pytest.raises(DataError, match=r"unknown file type '\.md'"):
        find_files(tmp_path / "notes.md")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="the folder holds no data file"):
        find_files(tmp_path / "empty")


def test_names_on_a_hub_say_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        find_files(parse_dataset_spec("org/name#500").path)
    assert caught.value.fix == "swift download org/name --type dataset"
    with pytest.raises(DataError) as caught:
        find_files(Path("dta/train.jsonl"))
    assert caught.value.why == "there is no folder dta"
