"""Which architectures of the installed transformers train here: each is tried, tiny, on the real path.

For one architecture: write a tiny random model, run ``swift sft`` with LoRA for one step, look that the loss is
finite and the adapter changed, load base and checkpoint again and compare the logits, and see whether packed documents
are kept apart. Every trial is a forked child with a deadline; the parent imports what all of them need once.
"""

from __future__ import annotations

import importlib
import json
import math
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from swift.core.errors import SwiftError, UsageError
from swift.core.files import atomic_write_text
from swift.core.registry import suggest
from swift.train.callbacks.base import Callback

__all__ = ["Result", "causal_architectures", "verify_architecture", "verify_architectures", "write_table"]

PRELOADED = (
    "torch.optim", "transformers.modeling_utils", "transformers.modeling_layers", "transformers.generation",
    "transformers.masking_utils", "transformers.models.auto.modeling_auto", "safetensors.torch", "matplotlib.figure",
    "matplotlib.backends.backend_agg", "swift.train.run",
    "swift.models.load", "swift.models.tiny", "swift.tuners.peft_format",
)  # fmt: skip
TOLERANCE = 1e-5
"""Largest difference of logits after a reload, relative to the largest logit."""


@dataclass
class Result:
    """One architecture, tried.

    Attributes:
        trained: one LoRA step was made, with a finite loss and a changed adapter, saved and loaded again alike.
        packing: "exact" (packed documents are computed apart, checked on this model), "no", or "" when unknown.
        cause: why not trained, in one line.
    """

    model_type: str
    class_name: str
    trained: bool = False
    packing: str = ""
    parameters: int = 0
    loss: float = math.nan
    difference: float = math.nan
    cause: str = ""
    cpu_seconds: float = 0.0


def causal_architectures() -> dict[str, str]:
    """Model type -> class for every causal language model of the installed transformers, each class once."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    names: dict[str, str] = {}
    for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():  # llama, not internlm3, which uses its class
        names[name] = min(names.get(name, kind), kind, key=len)
    return {kind: name for name, kind in sorted(names.items(), key=lambda item: item[1])}


def verify_architectures(
    only: str = "*", *, deadline_seconds: float = 300.0, say: Callable[[str], None] = print
) -> list[Result]:
    """Try every architecture whose model type or class matches ``only``. Raises UsageError when none does."""
    known = causal_architectures()
    wanted = {kind: name for kind, name in known.items() if fnmatch(kind, only) or fnmatch(name, only)}
    if not wanted:
        raise UsageError(f"no causal architecture matches {only!r}", fix=suggest(only, known))
    for module in PRELOADED:
        importlib.import_module(module)
    results = []
    for kind, name in wanted.items():
        result = _in_child(kind, name, deadline_seconds)
        packing = f", packing {result.packing}" if result.packing else ""
        outcome = f"trains{packing}" if result.trained else f"FAILS: {result.cause}"
        say(f"{kind:<26} {result.cpu_seconds:5.1f} s  {outcome}")
        results.append(result)
    return results


def _in_child(kind: str, name: str, deadline_seconds: float) -> Result:
    """`verify_architecture` in a forked child that is killed at the deadline."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    sys.stdout.flush()
    sys.stderr.flush()
    started = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = os.fork()
    if process == 0:
        try:
            _child(kind, name, receiver, sender)
        finally:
            os._exit(1)
    sender.close()
    result = Result(kind, name)
    if receiver.poll(deadline_seconds):
        try:
            result = Result(**json.loads(receiver.recv_bytes()))
        except EOFError:
            result.cause = "the process died"
    else:
        result.cause = f"not done after {deadline_seconds:g} s"
        os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    receiver.close()
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = ended.ru_utime + ended.ru_stime - started.ru_utime - started.ru_stime
    result.cpu_seconds = round(used, 2)
    return result


def _child(kind: str, name: str, receiver: Any, sender: Any) -> None:
    """Never returns: nothing of the parent's (handlers, buffers, tests) may run a second time."""
    receiver.close()
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    with tempfile.TemporaryDirectory(prefix="swift-verify-") as folder:
        result = verify_architecture(kind, name, Path(folder))
    sender.send_bytes(json.dumps(asdict(result)).encode())
    sender.close()
    os._exit(0)


def verify_architecture(kind: str, name: str, folder: Path) -> Result:
    """Try one architecture in this process; what goes wrong is the result's cause."""
    result = Result(kind, name)
    try:
        _try(kind, folder, result)
        result.trained = True
    except Exception as error:  # any failure of any model is what the table is for
        result.cause = result.cause or _cause(error)
    return result


def _cause(error: Exception) -> str:
    text = f"{error.message}: {error.why or ''}" if isinstance(error, SwiftError) else str(error)
    kind = "" if isinstance(error, SwiftError) else f"{type(error).__name__}: "
    return (kind + " ".join(text.split())).rstrip(": ")[:160]


class _Watch(Callback):
    """Keeps the last loss, and the model as it is at the end of training."""

    model: Any = None
    loss = math.nan

    def on_log(self, run: Any, metrics: dict[str, Any]) -> None:
        self.loss = float(metrics["loss"])

    def on_train_end(self, run: Any, summary: dict[str, Any]) -> None:
        self.model = run.engine.model


def _try(kind: str, folder: Path, result: Result) -> None:
    import torch

    from swift.models.load import isolates_documents, load_model
    from swift.models.tiny import make_tiny_model
    from swift.tuners.peft_format import load_adapter

    model_folder = make_tiny_model(folder / "model", architecture=kind)
    isolated = isolates_documents(model_folder)
    watch = _Watch()
    checkpoint = _train(model_folder, folder, watch)
    result.parameters = sum(parameter.numel() for parameter in watch.model.parameters())
    result.loss, result.packing = watch.loss, "exact" if isolated else "no"
    _require(math.isfinite(watch.loss), f"the loss is {watch.loss}")
    changed = [
        parameter.abs().max().item() > 0
        for key, parameter in watch.model.named_parameters()
        if "lora_B" in key
    ]
    _require(bool(changed) and any(changed), "the step left the adapter as it was")
    again = load_model(model_folder, dtype=torch.float32)
    load_adapter(again, checkpoint)
    tokens = torch.arange(5, 29)[None]
    with torch.no_grad():
        ours, theirs = (model.eval()(input_ids=tokens).logits for model in (watch.model, again))
    result.difference = float((ours - theirs).abs().max() / ours.abs().max())
    _require(result.difference <= TOLERANCE, f"reloaded logits differ by {result.difference:.1e}")


def _train(model: Path, folder: Path, watch: _Watch) -> Path:
    """One step of ``swift sft`` with LoRA; returns its checkpoint."""
    from swift.config.bind import resolve
    from swift.train.run import train

    rows = [{"query": f"{n} plus {n}?", "response": f"It is {2 * n}."} for n in range(4)]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    values = {
        "model": str(model),
        "dataset": [str(data)],
        "output_dir": str(folder / "out"),
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_length": 64,
        "split_dataset_ratio": 0.0,
        "report_to": [],
        "torch_dtype": "float32",
        "num_threads": 1,
    }
    result = train(resolve("sft", values=values), callbacks=[watch], say=lambda line: None)
    return result.folder / "last"


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise SwiftError(otherwise)


def write_table(results: Sequence[Result], path: Path | str) -> None:
    """The results as a Markdown page with the versions they were found with."""
    import torch
    import transformers

    trained = [result for result in results if result.trained]
    exact = sum(result.packing == "exact" for result in trained)
    lines = [
        "# Supported models",
        "",
        "Every causal language model of transformers, tried on CPU by `swift models verify`: a tiny random model of",
        "the architecture makes one LoRA step with `swift sft`; its loss is finite, the adapter changed, base and",
        "checkpoint loaded again give the same logits. *Packing exact* means that packed documents are computed apart,",
        "checked on this model before training; the others are trained in padded batches. What fails says why.",
        "",
        f"transformers {transformers.__version__}, torch {torch.__version__}:"
        f" {len(trained)} of {len(results)} architectures train, {exact} of them with exact packing;"
        f" {sum(result.cpu_seconds for result in results):.0f} CPU seconds in all.",
        "",
        "| model type | class | trains | packing | cause |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {result.model_type} | {result.class_name} | {'yes' if result.trained else 'no'} |"
        f" {result.packing or '-'} | {result.cause.replace('|', '/')} |"
        for result in results
    ]
    atomic_write_text(Path(path), "\n".join(lines) + "\n")
