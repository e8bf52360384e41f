"""pass@k: programs that a model wrote, run against the tests of their row (Chen et al. 2021, arXiv 2107.03374).

The tests stand in ``test`` (as in HumanEval; ``check(entry_point)`` is called where the row names one), or in
``tests`` or ``test_list`` (as in MBPP: a list of statements). What was asked may be the beginning of the program.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from swift.core.errors import ConfigError, DataError
from swift.core.logging import get_logger
from swift.evaluate.evaluators import Case, Scorer
from swift.evaluate.metrics import pass_at_k
from swift.evaluate.questions import Question
from swift.evaluate.sandbox import ProgramResult, Sandbox

__all__ = ["make", "program_of"]

logger = get_logger(__name__)

_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)


def make(
    k: int | Sequence[int] = 1,
    timeout_seconds: float = 10.0,
    memory_mb: int = 1024,
    num_proc: int = 4,
) -> Scorer:
    """``pass_at_K`` for each of ``k``; ``passed`` counts the samples that did, ``failure`` is the first other one's.

    Args:
        k: at most the number of samples for each question.
        timeout_seconds: wall clock of one program.
        memory_mb: address space of one program.
        num_proc: programs that run at the same time.
    """
    wanted = [k] if isinstance(k, int) else list(k)
    sandbox = Sandbox(timeout_seconds=timeout_seconds, memory_mb=memory_mb)
    if missing := sandbox.missing():
        logger.warning(
            "programs are limited in time, memory and processes, but not walled off here: %s", missing
        )

    def scorer(cases: Sequence[Case]) -> list[dict[str, Any]]:
        for case in cases:
            if max(wanted) > len(case.answers):
                raise ConfigError(
                    f"pass@{max(wanted)} needs as many samples, there are {len(case.answers)}",
                    where="--num_samples",
                    fix=f"--num_samples {max(wanted)} --temperature 0.8",
                )
        programs = [(case.question, answer) for case in cases for answer in case.answers]
        with ThreadPoolExecutor(num_proc) as pool:
            results = iter(list(pool.map(lambda entry: _run(sandbox, *entry), programs)))
        return [_scores([next(results) for _ in case.answers], wanted) for case in cases]

    return scorer


def _scores(results: Sequence[ProgramResult], wanted: Sequence[int]) -> dict[str, Any]:
    passed = sum(result.passed for result in results)
    scores: dict[str, Any] = {f"pass_at_{k}": pass_at_k(len(results), passed, k) for k in wanted}
    failure = next((result.reason for result in results if not result.passed), None)
    return scores | {"passed": passed} | ({"failure": failure} if failure else {})


def _run(sandbox: Sandbox, question: Question, answer: str) -> ProgramResult:
    """Passed: the line behind the tests was reached, so that leaving early is not passing."""
    token = secrets.token_hex(16)
    result = sandbox.run(f"{program_of(answer, question)}\n\nprint('\\n{token}')\n")
    if result.passed and token not in result.stdout[-100:]:
        return ProgramResult(False, "ended before its tests did", result.stdout, result.stderr)
    return result


def program_of(answer: str, question: Question) -> str:
    """The program of an answer with the row's tests behind it. Raises DataError for a row without tests."""
    blocks = _BLOCK.findall(answer)
    code = "\n".join(blocks) if blocks else answer
    entry = question.extra.get("entry_point")
    if entry and not re.search(rf"^(async )?(def|class) {re.escape(str(entry))}\b", code, re.MULTILINE):
        code = f"{question.messages[-1]['content']}{code}"  # the answer goes on where the question ends
    return f"{code}\n\n{_tests(question, entry)}"


def _tests(question: Question, entry: Any) -> str:
    setup = str(question.extra.get("test_setup_code") or "")
    for name in ("test", "tests", "test_list"):
        tests = question.extra.get(name)
        if isinstance(tests, str) and tests.strip():
            call = f"\ncheck({entry})\n" if entry and "def check" in tests else ""
            return f"{setup}\n{tests}{call}"
        if isinstance(tests, list) and tests and all(isinstance(test, str) for test in tests):
            return "\n".join([setup, *tests])
    raise DataError(
        "the row has no tests to run",
        where=question.location,
        why="pass_at_k reads test, tests or test_list: Python source, or a list of statements",
    )
