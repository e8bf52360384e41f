"""Estimates of memory held against what a real training holds, counted independently (``live_tensors.py``).

Formulas and traces are judged apart. What the process and the allocator need on top (``context``, ``reserve``) is no
tensor and is left out.
"""

import statistics

import pytest
from memory_cases import CASES, compare


def test_there_are_enough_cases():
    assert len(CASES) >= 24


@pytest.mark.slow
def test_median_and_tail_of_the_errors(monkeypatch, tmp_path):
    monkeypatch.setenv("SWIFT_HOME", str(tmp_path))
    errors = {"formulas": {}, "trace": {}}
    for name in CASES:
        counted, *estimates = compare(name, tmp_path)
        for method, parts in zip(errors, estimates, strict=True):
            errors[method][name] = sum(parts.values()) / counted - 1
    for found in errors.values():
        sizes = sorted(map(abs, found.values()))
        assert statistics.median(sizes) <= 0.03, errors
        assert sizes[int(0.95 * len(sizes))] <= 0.08, errors


FAST = ("lora, packed", "lora in float16", "full, short rows", "DPO")
SLOW = ("GRPO, cache", "GRPO, full in bfloat16", "lora on 8 bits")


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_few_of_them(name, monkeypatch, tmp_path):
    monkeypatch.setenv("SWIFT_HOME", str(tmp_path))
    counted, *estimates = compare(name, tmp_path)
    for parts in estimates:
        assert sum(parts.values()) == pytest.approx(counted, rel=0.04)
