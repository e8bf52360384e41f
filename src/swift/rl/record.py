"""Answers on disk as Parquet: ``rollouts/step-000012.parquet`` in a run folder, one row an answer.

The same form holds the batch under way in a checkpoint, and is what ``--replay`` reads. torch is not needed here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from swift.core.errors import DataError

if TYPE_CHECKING:
    from swift.rl.trajectory import Trajectory

__all__ = [
    "FOLDER",
    "find_rollouts",
    "read_rollouts",
    "read_seconds",
    "read_trajectories",
    "read_weights",
    "rollout_file",
    "write_trajectories",
]

FOLDER = "rollouts"
_FILE = re.compile(r"step-(\d+)\.parquet")
_FLOATS = ("advantage", "old_logprobs", "ref_logprobs", "entropies")
_SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("version", pa.int64()),
        ("group", pa.int64()),
        ("sample", pa.int64()),
        ("row", pa.string()),
        ("row_number", pa.int64()),
        ("seed", pa.uint64()),
        ("prompt", pa.string()),
        ("completion", pa.string()),
        ("finish_reason", pa.string()),
        ("reward", pa.float64()),
        ("rewards", pa.string()),
        ("is_used", pa.bool_()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("tokens", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float32())),
        ("mask", pa.list_(pa.bool_())),
        *((name, pa.list_(pa.float32())) for name in _FLOATS),
    ]
)


def rollout_file(run: Path, step: int) -> Path:
    """Of the answers that ``step`` is the first to learn from."""
    return run / FOLDER / f"step-{step:06d}.parquet"


def find_rollouts(run: Path) -> dict[int, Path]:
    """Step -> file, in order. Raises DataError when there are none."""
    found = {
        int(m[1]): file for file in (run / FOLDER).glob("step-*.parquet") if (m := _FILE.fullmatch(file.name))
    }
    if not found:
        raise DataError(
            "no answers are kept here",
            where=str(run / FOLDER),
            fix="name the folder of a run of swift rlhf --rlhf_type grpo (with save_rollouts)",
        )
    return dict(sorted(found.items()))


def write_trajectories(
    path: Path,
    trajectories: Sequence[Trajectory],
    *,
    step: int,
    prompts: Sequence[str],
    seconds: dict[str, float],
    weights: Sequence[float] = (),
) -> None:
    """Write a batch of answers; ``prompts`` are their texts.

    ``seconds`` of each stage and the ``weights`` of the rewards go into the file's metadata.
    """
    columns: dict[str, Any] = {
        "step": [step] * len(trajectories),
        "row": [one.row[0] for one in trajectories],
        "row_number": [one.row[1] for one in trajectories],
        "prompt": list(prompts),
        "completion": [one.text for one in trajectories],
        # JSON: a NaN must not become a missing value, and names may hold anything.
        "rewards": [json.dumps(one.rewards) for one in trajectories],
    }
    for name in _SCHEMA.names:
        if name not in columns:
            columns[name] = [getattr(one, name) for one in trajectories]
    about = {"seconds": json.dumps(seconds), "weights": json.dumps(list(weights))}
    table = pa.table(columns, schema=_SCHEMA).replace_schema_metadata(about)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")  # whole or absent
    pq.write_table(table, aside, compression="zstd")
    aside.replace(path)


def read_rollouts(path: Path) -> list[dict[str, Any]]:
    """The rows of a file as plain values, ``rewards`` as a dict. Raises DataError for a file that is damaged."""
    try:
        rows: list[dict[str, Any]] = pq.read_table(path, schema=_SCHEMA).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise DataError("cannot be read", where=str(path), why=str(error)) from error
    for row in rows:
        row["rewards"] = json.loads(row["rewards"])
    return rows


def read_seconds(path: Path) -> dict[str, float]:
    """Seconds of each stage."""
    found: dict[str, float] = _about(path, "seconds", {})
    return found


def read_weights(path: Path) -> list[float]:
    """Of the rewards, in their order; none in files of earlier versions."""
    found: list[float] = _about(path, "weights", [])
    return found


def _about(path: Path, name: str, default: Any) -> Any:
    metadata = pq.read_schema(path).metadata or {}
    return json.loads(metadata[name.encode()]) if name.encode() in metadata else default


def read_trajectories(path: Path) -> list[Trajectory]:
    """The answers as they were written."""
    from swift.rl.trajectory import Trajectory

    return [
        Trajectory(
            prompt_ids=np.asarray(row["prompt_ids"], np.int32),
            tokens=np.asarray(row["tokens"], np.int32),
            logprobs=np.asarray(row["logprobs"], np.float32),
            mask=np.asarray(row["mask"], np.bool_),
            version=row["version"],
            group=row["group"],
            sample=row["sample"],
            row=(row["row"], row["row_number"]),
            seed=row["seed"],
            finish_reason=row["finish_reason"],
            text=row["completion"],
            rewards=row["rewards"],
            reward=row["reward"],
            is_used=row["is_used"],
            **{name: None if row[name] is None else np.asarray(row[name], np.float32) for name in _FLOATS},
        )
        for row in read_rollouts(path)
    ]
