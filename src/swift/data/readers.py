"""One reader for each file type: bytes to rows. A new type is a function and a line in ``READERS``.

A reader yields a row's number and a function that makes the row, so that rows which are not wanted are not
parsed. It never raises for what stands in the file: a row that cannot be read is a ``Row`` with ``error``
set.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, BinaryIO

from swift.data.rows import Row

__all__ = ["READERS"]

_Lazy = tuple[int, Callable[[], Row]]
_Reader = Callable[[BinaryIO, str], Iterator[_Lazy]]

_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_BOM = b"\xef\xbb\xbf"


def _decode(raw: bytes) -> str:
    """UTF-8 text; raises ValueError with a reason that names the byte."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        if raw.startswith(_UTF16):
            raise ValueError("not UTF-8: the file is UTF-16; save it as UTF-8") from None
        where = f"byte 0x{raw[error.start]:02x} at byte {error.start + 1} of the line"
        raise ValueError(f"not UTF-8: {where}") from None


def _parse_object(text: str) -> dict[str, Any]:
    """A JSON object; raises ValueError with a reason."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"broken JSON: {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise ValueError("broken JSON: nested too deeply") from None
    return _check_object(value, "\\u" in text)


def _check_object(value: Any, has_escapes: bool) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"a JSON object expected, found {type(value).__name__}")
    if has_escapes:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("a \\u escape is half a character (a lone surrogate)") from None
    return value


def _read_jsonl(file: BinaryIO, name: str) -> Iterator[_Lazy]:
    for number, raw in enumerate(file, start=1):
        line = raw.removeprefix(_BOM) if number == 1 else raw
        if line.strip():
            yield number, partial(_jsonl_row, line, f"{name}:", number)


def _jsonl_row(line: bytes, source: str, number: int) -> Row:
    try:
        return Row(_parse_object(_decode(line).strip()), source, number)
    except ValueError as error:
        return Row({}, source, number, str(error))


def _read_json(file: BinaryIO, name: str) -> Iterator[_Lazy]:
    raw = file.read().removeprefix(_BOM)
    source = f"{name}:"
    start = len(raw) - len(raw.lstrip())
    if start == len(raw):
        return
    first_line = raw[start:].split(b"\n", 1)[0]
    try:
        text = _decode(raw)
    except ValueError:
        # Name the line, not a byte counted from the start of the file.
        for number, line in enumerate(raw.split(b"\n"), start=1):
            try:
                _decode(line)
            except ValueError as error:
                yield _constant(Row({}, source, number, str(error)))
                return
        return
    if raw[start : start + 1] == b"[":
        rows = _json_list(text, source)
    elif _jsonl_row(first_line, source, 1).error is None:  # JSON Lines under the name .json
        yield from _read_jsonl(io.BytesIO(raw), name)
        return
    else:
        rows = _json_single(text, source)
    for row in rows:
        yield _constant(row)


def _constant(row: Row) -> _Lazy:
    return row.number, lambda: row


def _json_single(text: str, source: str) -> list[Row]:
    line = 1 + text[: len(text) - len(text.lstrip())].count("\n")
    try:
        return [Row(_check_object(json.loads(text), "\\u" in text), source, line)]
    except json.JSONDecodeError as error:
        return [Row({}, source, error.lineno, f"broken JSON: {error.msg} (column {error.colno})")]
    except RecursionError:
        return [Row({}, source, line, "broken JSON: nested too deeply")]
    except ValueError as error:
        return [Row({}, source, line, str(error))]


_SPACE = re.compile(r"[ \t\r\n]*")


def _json_list(text: str, source: str) -> list[Row]:
    """The elements of a JSON list with the lines they start at; reading ends at the first syntax error."""
    decoder = json.JSONDecoder()
    has_escapes = "\\u" in text
    rows: list[Row] = []
    place = _skip_space(text, text.index("[") + 1)
    line, counted = 1, 0
    while not text.startswith("]", place):
        line, counted = line + text.count("\n", counted, place), place
        try:
            value, end = decoder.raw_decode(text, place)
            place = _skip_space(text, end)
            if text.startswith(",", place):
                place = _skip_space(text, place + 1)
            elif not text.startswith("]", place):
                raise json.JSONDecodeError("Expecting ',' or ']' after an element", text, place)
        except json.JSONDecodeError as error:
            reason = f"broken JSON: {error.msg} (column {error.colno}); nothing after it can be read"
            rows.append(Row({}, source, error.lineno, reason))
            return rows
        except RecursionError:
            rows.append(Row({}, source, line, "broken JSON: nested too deeply; nothing after it can be read"))
            return rows
        try:
            rows.append(Row(_check_object(value, has_escapes), source, line))
        except ValueError as error:
            rows.append(Row({}, source, line, str(error)))
    rest = _skip_space(text, place + 1)
    if rest < len(text):
        line += text.count("\n", counted, rest)
        rows.append(Row({}, source, line, "broken JSON: text after the closing bracket"))
    elif len({row.number for row in rows}) < len(rows):  # elements share a line: the line says too little
        element = f"{source}element "
        rows = [Row(row.values, element, number, row.error) for number, row in enumerate(rows, start=1)]
    return rows


def _skip_space(text: str, place: int) -> int:
    found = _SPACE.match(text, place)
    return found.end() if found else place


def _read_csv(file: BinaryIO, name: str, delimiter: str = ",") -> Iterator[_Lazy]:
    source = f"{name}:"
    faults: list[str] = []  # decoding faults of the lines that the current record is made of

    def lines() -> Iterator[str]:
        for number, raw in enumerate(file, start=1):
            line = raw.removeprefix(_BOM) if number == 1 else raw
            try:
                yield _decode(line)
            except ValueError as error:
                faults.append(str(error))
                yield line.decode("utf-8", errors="replace")

    csv.field_size_limit(2**31 - 1)  # Python's own limit is 128 KiB a cell
    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        number = reader.line_num + 1
        faults.clear()
        try:
            record = next(reader)
            reason = faults[0] if faults else None
        except StopIteration:
            return
        except csv.Error as error:
            record, reason = [], f"broken CSV: {error}"
        if not record and reason is None:  # a blank line
            continue
        if header is None:
            header = record
            reason = reason or _header_fault(header)
            if reason:
                yield _constant(Row({}, source, number, reason))
                return
            continue
        if reason is None and len(record) != len(header):
            reason = f"{len(record)} fields, but the header has {len(header)}"
        values = {} if reason else dict(zip(header, record, strict=True))
        yield _constant(Row(values, source, number, reason))


def _header_fault(header: list[str]) -> str | None:
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        return f"the header names {twice[0]!r} twice"
    return None


def _read_parquet(file: BinaryIO, name: str) -> Iterator[_Lazy]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1024):
            for values in batch.to_pylist():
                number += 1
                yield _constant(Row(values, f"{name}:row ", number))
    except (pyarrow.ArrowException, OSError) as error:
        reason = f"broken parquet: {str(error).splitlines()[0]}"
        yield _constant(Row({}, f"{name}:row ", number + 1 if number else 0, reason))


def _read_txt(file: BinaryIO, name: str) -> Iterator[_Lazy]:
    source = f"{name}:"
    parts: list[bytes] = []
    first = 0
    for number, raw in enumerate(file, start=1):
        line = raw.removeprefix(_BOM) if number == 1 else raw
        if line.strip():
            first = first or number
            parts.append(line)
        elif parts:
            yield _constant(_txt_row(parts, source, first))
            parts, first = [], 0
    if parts:
        yield _constant(_txt_row(parts, source, first))


def _txt_row(parts: list[bytes], source: str, first: int) -> Row:
    lines: list[str] = []
    for place, part in enumerate(parts):
        try:
            lines.append(_decode(part))
        except ValueError as error:
            return Row({}, source, first + place, str(error))
    return Row({"text": "".join(lines).replace("\r\n", "\n").removesuffix("\n")}, source, first)


READERS: dict[str, _Reader] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": partial(_read_csv, delimiter="\t"),
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}
