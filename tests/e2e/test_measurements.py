"""The measurements measure what they say: the same work everywhere, the same batches on both sides."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
STEPS = 6

# The common work of all published figures: other bytes would be other figures.
SHA256 = {
    "sft.jsonl": "1a18ac90e34432a68ef72afd95d8e0abafab59ae74dc695bf4eb8132dc40dc4a",
    "heldout.jsonl": "fc05ae3bf45a263a635f6957e2fcf8e0a1ba9a8132e59922573db3459e708815",
    "dpo.jsonl": "3e6190e19338e31f212062393fb1366f49659981a9dd9efda035b8c37f576346",
    "grpo.jsonl": "b2e909065d4b5870878e613060bc1c32bee708c26d006d1ead78557401192c73",
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    subprocess.run([sys.executable, BENCHMARKS / "make_work.py", folder], check=True, capture_output=True)
    return folder


@pytest.mark.slow
def test_the_work_is_the_same_everywhere(work: Path) -> None:
    assert {
        name: hashlib.sha256((work / "data" / name).read_bytes()).hexdigest() for name in SHA256
    } == SHA256


@pytest.mark.slow
@pytest.mark.parametrize("row_number", [0, 1])
def test_our_run_and_the_bare_loop_take_the_same_batches(
    work: Path, tmp_path: Path, row_number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from measure import one_thread, read_marks
    from settings import SWIFT_ROWS, swift_command

    row = SWIFT_ROWS[row_number]
    out = tmp_path / "run"
    ours = swift_command(row, work / "models" / "qwen3-tiny", work / "data" / "sft.jsonl", out, STEPS)
    subprocess.run(ours, check=True, capture_output=True, env=one_thread())
    bare = [sys.executable, str(BENCHMARKS / "bare_loop.py"), "--mode", row.bare_mode, "--steps", str(STEPS)]
    bare += ["--work", str(work), "--out", str(tmp_path / "bare.jsonl")]
    subprocess.run(bare, check=True, capture_output=True, env=one_thread())
    tokens = [mark.num_tokens for mark in read_marks(out / "marks.jsonl")]
    assert len(tokens) == STEPS
    assert tokens == [mark.num_tokens for mark in read_marks(tmp_path / "bare.jsonl")]
