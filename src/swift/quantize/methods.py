"""One function for each way to quantise a model folder into another; which there are stands in `METHODS`.

bitsandbytes runs here; the others in their toolchains, where scripts of ours (``workers/``) get token ids and folders.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swift.config.export_rules import METHODS
from swift.config.sections.quantization import QuantizationSection
from swift.core.errors import ConfigError, ModelError
from swift.core.files import atomic_write_json
from swift.models.facts import ModelFacts
from swift.models.load import load_model
from swift.toolchains.toolchain import Toolchain

__all__ = ["Job", "check_awq_shapes", "check_for_vllm", "equal_pieces", "is_kept", "quantise", "run_worker"]

DEADLINE_SECONDS = 48 * 3600.0
"""A model of 70 billion parameters takes hours; what takes longer than this hangs."""
AWQ_LENGTH, AWQ_PIECES = 512, 128
"""Tokens of a calibration text of AWQ and the number of them at most (github.com/mit-han-lab/llm-awq)."""
_WORKERS = Path(__file__).with_name("workers")
_ROUTERS = ("gate", "router", "shared_expert_gate")


@dataclass(frozen=True)
class Job:
    """What is to be quantised, and how.

    Attributes:
        source: folder of the full-precision model.
        section: method, bits and the options of bitsandbytes.
        rows: calibration rows as token ids; empty for methods that need none.
        kept: full names of the linear layers that stay as they are.
        dtype: precision of what stays.
        scratch: folder for what a killed run can go on with.
    """

    source: Path
    section: QuantizationSection
    rows: Sequence[Sequence[int]]
    kept: Sequence[str]
    dtype: str
    device: str
    group_size: int
    batch_size: int
    lm_head: bool
    scratch: Path
    trust_remote_code: bool = False
    num_threads: int | None = None
    toolchain: Toolchain | None = None

    @property
    def method(self) -> str:
        assert self.section.quant_method is not None
        return self.section.quant_method


def quantise(job: Job, output: Path) -> dict[str, Any]:
    """Fill the empty folder ``output`` with the quantised weights and their config.json; returns what is known of it.

    Raises:
        SwiftError: the library failed; its last lines are the cause.
    """
    done = _FUNCTIONS[job.method](job, output)
    config = json.loads((output / "config.json").read_text(encoding="utf-8"))
    stored = config.get("quantization_config")
    if not isinstance(stored, dict) or stored.get("quant_method") != METHODS[job.method].stored_as:
        raise ModelError(
            f"{job.method} wrote no folder of {METHODS[job.method].stored_as}",
            where=str(output),
            why=f"quantization_config is {stored}",
        )
    return done


def _bitsandbytes(job: Job, output: Path) -> dict[str, Any]:
    """Layer by layer while the file is read."""
    import torch

    model = load_model(
        job.source,
        dtype=getattr(torch, job.dtype),
        device=job.device,
        trust_remote_code=job.trust_remote_code,
        quantization=job.section,
        kept_modules=job.kept,
    )
    model.config.use_cache = True
    model.save_pretrained(output)
    return {}


def equal_pieces(rows: Sequence[Sequence[int]], length: int, most: int) -> list[list[int]]:
    """The rows behind one another, cut into pieces of one length, ``most`` of them evenly spread.

    What is left at the end is dropped, unless it is all there is.
    """
    ids = [token for row in rows for token in row]
    whole = len(ids) - len(ids) % length or len(ids)
    starts = range(0, whole, length)
    count = min(most, len(starts))
    chosen = (starts[number * len(starts) // count] for number in range(count))
    return [ids[start : min(start + length, whole)] for start in chosen]


def _calibration(job: Job) -> list[list[int]]:
    """For AWQ, pieces of one length, as its authors calibrate: gptqmodel searches AWQ's scales and clips on the last
    batch alone when batches differ in length."""
    if job.method != "awq":
        return [list(row) for row in job.rows]
    context = ModelFacts.read(job.source).max_position_embeddings
    return equal_pieces(job.rows, min(AWQ_LENGTH, context or AWQ_LENGTH), AWQ_PIECES)


def _gptqmodel(job: Job, output: Path) -> dict[str, Any]:
    done = run_worker(
        job,
        "gptq_awq.py",
        {
            "model": str(job.source),
            "output": str(output),
            "scratch": str(job.scratch),
            "method": job.method,
            # gptqmodel's layers for AWQ exist in 16 bits only.
            "dtype": "float16" if job.method == "awq" and job.dtype == "float32" else job.dtype,
            "bits": job.section.quant_bits,
            "group_size": job.group_size,
            "rows": _calibration(job),
            "batch_size": job.batch_size,
            "exclude": [name for name in job.kept if not name.endswith("lm_head")],
            "lm_head": job.lm_head,
        },
    )
    _settle_config(job, output)
    return done


def _settle_config(job: Job, output: Path) -> None:
    """AWQ's loaders read the modules left out under a key of its own; gptqmodel goes on reading ``dynamic``."""
    for name in ("config.json", "quantize_config.json"):
        if not (path := output / name).is_file():
            continue
        record = json.loads(path.read_text(encoding="utf-8"))
        stored = record.get("quantization_config", record)
        if job.method == "awq":
            stored["modules_to_not_convert"] = list(job.kept) or None
        stored.get("meta", {}).pop("offload_to_disk_path", None)  # a folder that will be gone
        if name == "config.json":
            record["use_cache"] = True
        atomic_write_json(path, record)
    (output / "quant_log.csv").unlink(missing_ok=True)


def _llmcompressor(job: Job, output: Path) -> dict[str, Any]:
    payload = {
        "model": str(job.source),
        "output": str(output),
        "method": job.method,
        "rows": [list(row) for row in job.rows],
        "exclude": list(job.kept),
    }
    return run_worker(job, "compressed.py", payload)


_FUNCTIONS: dict[str, Callable[[Job, Path], dict[str, Any]]] = {
    "bnb": _bitsandbytes,
    "gptq": _gptqmodel,
    "awq": _gptqmodel,
    "fp8": _llmcompressor,
    "w8a8": _llmcompressor,
}


def run_worker(job: Job, script: str, payload: dict[str, Any]) -> dict[str, Any]:
    """A script of ``workers/`` in the job's toolchain; its output goes to ``worker.log`` in the scratch folder."""
    assert job.toolchain is not None
    common = {
        "device": job.device,
        "dtype": job.dtype,
        "trust_remote_code": job.trust_remote_code,
        "num_threads": job.num_threads,
    }
    return job.toolchain.run(
        _WORKERS / script,
        {**common, **payload},
        deadline_seconds=DEADLINE_SECONDS,
        stage=f"{job.method} ({script.removesuffix('.py')})",
        log=job.scratch / "worker.log",
    )


def is_kept(name: str, is_head: bool, exclude: Sequence[str], lm_head: bool) -> bool:
    """Whether a linear layer stays in full precision: the output head unless asked, routers, and what is excluded."""
    if is_head:
        return not lm_head
    return name.rpartition(".")[2] in _ROUTERS or any(
        name == one or name.endswith(f".{one}") for one in exclude
    )


_VLLM_NEEDS = {
    "gptq": {"bits", "group_size", "desc_act"},
    "awq": {"bits", "group_size", "zero_point"},
    "compressed-tensors": {"config_groups", "ignore", "format"},
}
"""What vLLM 0.33 must find in ``quantization_config``: gptq_marlin.py, awq.py, compressed_tensors.py."""


def check_for_vllm(folder: Path) -> list[str]:
    """Reasons why vLLM's loaders could not read the folder, by its config.json; empty when there are none."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    stored = config["quantization_config"]
    method = stored["quant_method"]
    if method not in _VLLM_NEEDS:
        return [f"vLLM has no loader for {method}"]
    found = [
        f"quantization_config lacks {key}, which vLLM reads"
        for key in sorted(_VLLM_NEEDS[method] - stored.keys())
    ]
    if method == "awq":
        if stored.get("bits") != 4:
            found.append(f"vLLM's AWQ kernels are for 4 bits, not {stored.get('bits')}")
        if stored.get("version", "gemm") != "gemm" or stored.get("zero_point") is not True:
            found.append("vLLM reads AWQ in the layout gemm with zero points")
    if method == "gptq" and stored.get("checkpoint_format", "gptq") != "gptq":
        found.append(f"vLLM reads GPTQ in the format gptq, not {stored['checkpoint_format']}")
    return found


_AWQ_OUTPUTS = 64
_AWQ_UNCLIPPED = ("q_", "k_", "query", "key", "Wqkv")


def check_awq_shapes(shapes: Mapping[str, tuple[int, int]], group_size: int) -> None:
    """Raise ConfigError for a layer, name -> (inputs, outputs), that gptqmodel's AWQ would stumble over an hour later.

    It takes inputs by groups, and clips 64 outputs at once, except those of queries and keys.
    """
    for name, (inputs, outputs) in shapes.items():
        if group_size > 0 and inputs % group_size:
            fits = next((size for size in (64, 32, 16) if size < group_size and not inputs % size), -1)
            raise ConfigError(
                f"{name} has {inputs} inputs, no multiple of {group_size}",
                where="--group_size",
                fix=f"--group_size {fits}",
            )
        if outputs % _AWQ_OUTPUTS and not any(word in name for word in _AWQ_UNCLIPPED):
            raise ConfigError(
                f"AWQ cannot quantise {name}: its {outputs} outputs are no multiple of {_AWQ_OUTPUTS}",
                where="--quant_method",
                fix=f"--quant_method gptq, or --quant_exclude {name.rpartition('.')[2]}",
            )


def check_excluded(exclude: Sequence[str], names: Sequence[str]) -> None:
    """Raise ConfigError for a ``quant_exclude`` that matches no linear layer."""
    for one in exclude:
        if not any(name == one or name.endswith(f".{one}") for name in names):
            raise ConfigError(
                f"no linear layer is called {one}",
                where="--quant_exclude",
                why=f"there are {', '.join(sorted({name.rpartition('.')[2] for name in names}))}",
            )
