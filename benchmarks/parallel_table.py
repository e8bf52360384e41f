"""The table of docs/en/parallelism.md, from the results of the parity tests.

    python benchmarks/parallel_table.py              run tests/parallel (slow ones too) and write the table
    python benchmarks/parallel_table.py results.xml  write it from files of `pytest --junitxml`, later ones winning;
                                                     rows of tests that none of them has stay as they are

A row is a test function; its cases are counted, and those that failed are named.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "en" / "parallelism.md"
MOST = 6
"""Cases that a row names."""
BEGIN, END = "<!-- table: benchmarks/parallel_table.py -->", "<!-- end of table -->"


HEAD = ["| test | what it shows | cases passed | cases |", "|---|---|---|---|"]


def rows_of(*results: Path) -> list[str]:
    cases: dict[tuple[str, str], dict[str, bool]] = defaultdict(dict)
    for case in (case for file in results for case in ElementTree.parse(file).iter("testcase")):
        where = case.get("classname") or ""  # it has none where a run was interrupted
        if case.find("skipped") is not None or not where.startswith("tests.parallel."):
            continue
        name, _, parameters = case.get("name", "").partition("[")
        file = where.rpartition(".")[2]
        passed = case.find("failure") is None and case.find("error") is None
        cases[file, name][parameters.rstrip("]")] = passed
    lines = []
    for (file, name), found in cases.items():
        passed = sum(found.values())
        labels = [label for label in found if label]
        listed = "; ".join(labels[:MOST]) + (f"; {len(labels) - MOST} more" if len(labels) > MOST else "")
        failed = [label or name for label, ok in found.items() if not ok]
        note = f" **failed: {', '.join(failed)}**" if failed else ""
        shown = name.removeprefix("test_").replace("_", " ")
        lines.append(
            f"| `{file.removeprefix('test_')}` | {shown} | {passed} of {len(found)}{note} | {listed} |"
        )
    return lines


def merged(old: list[str], new: list[str]) -> list[str]:
    """``old`` rows with those of the same test replaced; others behind them."""
    found = {row.split("|")[1] + row.split("|")[2]: row for row in [*old, *new]}
    return sorted(found.values(), key=lambda row: row.split("|")[1])


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    if len(sys.argv) > 1:
        old = page.partition(BEGIN)[2].partition(END)[0].strip().splitlines()[len(HEAD) :]
        rows = merged(old, rows_of(*map(Path, sys.argv[1:])))
    else:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "results.xml"
            command = [
                sys.executable,
                "-m",
                "pytest",
                "tests/parallel",
                "-q",
                "-n",
                "0",
                f"--junitxml={file}",
            ]
            subprocess.run(command, cwd=ROOT, check=False)
            rows = rows_of(file)
    text = "\n".join([*HEAD, *rows])
    before, after = page.partition(BEGIN)[0], page.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
