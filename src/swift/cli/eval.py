"""``swift eval``: measure a model, look at its answers, compare two."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from swift.cli.arguments import ArgumentParser
from swift.config.bind import resolve
from swift.config.schema import Resolved
from swift.core.errors import ConfigError


def run(argv: list[str]) -> int:
    """``show``, ``compare``, or an evaluation with options."""
    if argv and argv[0] == "show":
        return _show(argv[1:])
    if argv and argv[0] == "compare":
        return _compare(argv[1:])
    evaluate_as_asked(resolve("eval", argv))
    return 0


def evaluate_as_asked(resolved: Resolved) -> dict[str, Any]:
    """Evaluate with the backend meant, print the figures, and return them."""
    from swift.evaluate.backends import backend_of, evaluate_with
    from swift.evaluate.show import tables

    backend = backend_of(resolved)
    results = _native(resolved) if backend == "native" else evaluate_with(backend, resolved)
    print("\n".join(tables(results)))
    print(f"{'results':15} {results['folder']}")
    return results


def _native(resolved: Resolved) -> dict[str, Any]:
    from swift.cli.progress import AnswerProgress
    from swift.evaluate.evaluation import evaluate

    for name in ("eval_dataset_args", "eval_generation_config", "extra_eval_args"):
        if resolved.value(name):
            raise ConfigError(
                "is for EvalScope and lm-eval; the built-in evaluators do not use it",
                where=f"--{name}",
                fix="--metric_args, sampling options such as --max_new_tokens, or --eval_backend evalscope",
            )
    with AnswerProgress("the same command with the --eval_name of this folder goes on") as progress:
        return evaluate(resolved, on_progress=progress.update)


def _show(argv: list[str]) -> int:
    parser = ArgumentParser(prog="swift eval show", description="Answers of an evaluation, one by one.")
    parser.add_argument("results", help="samples.jsonl, its folder, or a run (its newest evaluation)")
    parser.add_argument("--metric", help="what --worst and --wrong go by; default: the first")
    parser.add_argument("--worst", type=int, metavar="N", help="the N worst rows")
    parser.add_argument("--wrong", action="store_true", help="rows without the full score")
    parser.add_argument("--json", action="store_true", help="all rows as one JSON list")
    options = parser.parse(argv)
    from swift.evaluate.results import read_results
    from swift.evaluate.show import find_samples, show

    path = find_samples(options.results)
    rows = read_results(path)
    if options.json:
        print(json.dumps(rows, ensure_ascii=False))
        return 0
    print("\n".join(show(rows, metric=options.metric, worst=options.worst, wrong=options.wrong)))
    print(path)
    return 0


def _compare(argv: list[str]) -> int:
    parser = ArgumentParser(prog="swift eval compare", description="Two evaluations on the rows both have.")
    parser.add_argument("first", metavar="A", help="samples.jsonl, its folder, or a run")
    parser.add_argument("second", metavar="B")
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    options = parser.parse(argv)
    from swift.evaluate.show import compare, comparison_lines, find_samples

    first, second = find_samples(options.first), find_samples(options.second)
    found = compare(first, second)
    if options.json:
        rows = [asdict(entry) for entry in found]
        print(json.dumps({"first": str(first), "second": str(second), "differences": rows}))
        return 0
    print(f"A {first}\nB {second}")
    print("\n".join(comparison_lines(found)))
    return 0
