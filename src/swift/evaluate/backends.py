"""EvalScope and lm-eval, each in its toolchain, against an OpenAI server: ``eval_url``, or one that is started here.

What they are given: benchmarks by name (``eval_dataset``), or rows of ours (``val_dataset``) written as the local data
that each of them reads. What comes back has the form of our own ``results.json``; their reports lie beside it.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from swift.config.commands import known_command
from swift.config.schema import Resolved
from swift.core.errors import ConfigError, SwiftError
from swift.core.files import atomic_write_json, atomic_write_text
from swift.evaluate.endpoint import Endpoint
from swift.evaluate.evaluation import find_model, result_folder
from swift.evaluate.results import RESULTS
from swift.evaluate.suite import TaskSpec, read_tasks, task_specs
from swift.toolchains.child import GRACE_SECONDS, Child

__all__ = ["backend_of", "evaluate_with", "own_server", "payload_of", "served"]

_SCRIPTS = Path(__file__).parent / "suites"
_DEADLINE_SECONDS = 24 * 3600.0
_OWN = "val_dataset"
"""What rows of ours are called there."""


def backend_of(resolved: Resolved) -> str:
    """native, evalscope or lm-eval. Names of benchmarks are EvalScope's with ``native``, as with ms-swift's Native."""
    suite = resolved.config.suite
    if suite.eval_backend == "native" and suite.eval_dataset:
        return "evalscope"
    return suite.eval_backend


def evaluate_with(backend: str, resolved: Resolved, *, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Run the benchmarks; returns what ``results.json`` holds. Raises SwiftError."""
    from swift.toolchains.toolchain import find_toolchain

    config = resolved.config
    if config.evaluation.eval_tasks:
        raise ConfigError(
            "suites are for the built-in evaluators", where="--eval_tasks", fix="--eval_backend native"
        )
    if config.suite.eval_dataset and config.data.val_dataset:
        raise ConfigError(
            f"{backend} takes benchmarks or rows of yours, not both in one run",
            where="--val_dataset",
            fix="run swift eval twice",
        )
    toolchain = find_toolchain(backend)
    context = find_model(resolved)
    folder = result_folder(resolved, context).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with served(resolved, say) as endpoint:
        payload = payload_of(backend, resolved, endpoint, folder)
        script = _SCRIPTS / f"{backend.replace('-', '_')}.py"
        say(f"{backend} asks {endpoint.model} at {endpoint.url}; its output: {folder / 'backend.log'}")
        variables = {"OPENAI_API_KEY": os.environ.get(endpoint.key_variable) or "EMPTY"}
        found = toolchain.run(
            script,
            payload,
            deadline_seconds=_DEADLINE_SECONDS,
            stage=backend,
            log=folder / "backend.log",
            variables=variables,
            cwd=folder,
        )
    results = {
        "name": folder.name,
        "created": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "model": str(context.model) if context else endpoint.model,
        "adapter": str(context.adapter.absolute()) if context and context.adapter else None,
        "url": config.suite.eval_url,
        "backend": backend,
        "backend_version": found["version"],
        "tasks": found["tasks"],
        "metrics": {
            f"{task}.{name}": value
            for task, entry in found["tasks"].items()
            for name, value in entry.items()
            if isinstance(value, int | float) and name != "num_rows"
        },
        "seconds": round(time.perf_counter() - started, 1),
        "folder": str(folder),
    }
    if not results["metrics"]:
        raise SwiftError(f"{backend} measured nothing", where=str(folder / "backend.log"))
    atomic_write_json(folder / RESULTS, results)
    return results


def payload_of(backend: str, resolved: Resolved, endpoint: Endpoint, folder: Path) -> dict[str, Any]:
    """What the script in the toolchain is told. Rows of ours are written into ``folder``."""
    config = resolved.config
    suite, sampling = config.suite, config.generation
    datasets: list[str] = list(suite.eval_dataset)
    local: dict[str, Any] | None = None
    if config.data.val_dataset:
        (spec,) = task_specs(resolved)
        local = _write_rows(backend, resolved, spec, folder)
        datasets = [local["name"]]
    generation: dict[str, Any] = {"max_tokens": sampling.max_new_tokens, "temperature": sampling.temperature}
    if sampling.temperature > 0:
        generation |= {"top_p": sampling.top_p, "seed": config.training.seed}
        if sampling.top_k:
            generation["top_k"] = sampling.top_k
    return {
        "url": endpoint.url,
        "model": endpoint.model,
        "datasets": datasets,
        "dataset_args": suite.eval_dataset_args,
        "local": local,
        "limit": suite.eval_limit,
        "generation": {**generation, **suite.eval_generation_config},
        "num_concurrent": suite.eval_num_proc,
        "extra": suite.extra_eval_args,
        "seed": config.training.seed,
        "tokenizer": _tokenizer(config.model.model),
        "folder": str(folder),
    }


def _tokenizer(model: str | None) -> str | None:
    """The model's folder, where it is one here."""
    folder = Path(model).expanduser() if model is not None else None
    return str(folder.absolute()) if folder is not None and (folder / "tokenizer.json").is_file() else None


def _write_rows(backend: str, resolved: Resolved, spec: TaskSpec, folder: Path) -> dict[str, Any]:
    """Rows of ours as local data of EvalScope (general_qa: query, response) or of lm-eval (question, answer)."""
    (task,) = read_tasks(resolved, [spec])
    rows = []
    for question in task.questions.good:
        if question.reference is None or len(question.messages) > 2 or question.tools:
            raise ConfigError(
                f"{backend} takes rows with one question and one answer",
                where=question.location,
                fix="--eval_backend native measures conversations",
            )
        system = question.messages[0]["content"] if question.messages[0]["role"] == "system" else None
        text = question.messages[-1]["content"]
        if backend == "evalscope":
            rows.append(
                {"query": text, "response": question.reference, **({"system": system} if system else {})}
            )
        else:
            rows.append({"question": f"{system}\n\n{text}" if system else text, "answer": question.reference})
    data = folder / "data"
    name = "general_qa" if backend == "evalscope" else _OWN
    file = data / f"{_OWN}.jsonl"
    atomic_write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return {"name": name, "folder": str(data), "file": str(file), "subset": _OWN}


@contextlib.contextmanager
def served(resolved: Resolved, say: Callable[[str], None]) -> Iterator[Endpoint]:
    """The server of ``eval_url``, or one of ``swift deploy`` for the model's folder, stopped afterwards."""
    suite = resolved.config.suite
    if suite.eval_url is not None:
        endpoint = Endpoint(suite.eval_url, suite.eval_model or "", suite.eval_num_proc)
        endpoint.find_model()
        yield endpoint
        return
    with tempfile.TemporaryDirectory(prefix="swift-eval-") as scratch:
        ready, log = Path(scratch) / "ready.json", Path(scratch) / "server.log"
        options = Path(scratch) / "deploy.yaml"
        options.write_text(yaml.safe_dump(_serving_options(resolved)), encoding="utf-8")
        words = ["deploy", str(options), "--port", "0", "--ready_file", str(ready)]
        with own_server(words, ready, log) as url:
            endpoint = Endpoint(url, "", suite.eval_num_proc)
            endpoint.find_adapter()
            yield endpoint


def _serving_options(resolved: Resolved) -> dict[str, Any]:
    """What somebody set about the model, its template and its quantisation, as swift deploy takes it."""
    deploy = known_command("deploy")
    assert deploy is not None
    sections, others = ("model", "template", "quantization"), ("seed", "num_threads")
    wanted = [name for name, row in deploy.options().items() if row.section in sections or name in others]
    return {name: resolved.value(name) for name in wanted if resolved.is_explicit(name)}


@contextlib.contextmanager
def own_server(
    words: list[str],
    ready: Path,
    log: Path,
    *,
    ready_seconds: float = 1800.0,
    grace_seconds: float = GRACE_SECONDS,
) -> Iterator[str]:
    """The address of ``swift WORDS``, a server that writes the file ``ready``, while it is needed; it is stopped then.

    Raises SwiftError with the end of its ``log`` when it ends before it answers, or takes longer than
    ``ready_seconds``.
    """
    command = [sys.executable, "-P", "-m", "swift", *words]
    with Child(command, environment=os.environ, log=log, grace_seconds=grace_seconds) as server:
        _wait_until_ready(server, ready, ready_seconds)
        yield str(json.loads(ready.read_text(encoding="utf-8"))["url"])


def _wait_until_ready(server: Child, ready: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not ready.exists():
        if server.poll() is not None:
            raise SwiftError("the model's server did not start", where="swift deploy", why=server.log_tail())
        if time.monotonic() > deadline:
            raise SwiftError(
                f"the model's server was not ready after {seconds:g} s",
                where="swift deploy",
                why=server.log_tail(),
            )
        time.sleep(0.1)
