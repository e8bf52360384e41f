"""What ``config.yaml`` of a run says: the options as used, with paths that mean the same from everywhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from swift.config.policy_rules import TASK_PREFIX
from swift.config.schema import Resolved, Source
from swift.data.sources import parse_dataset_spec

__all__ = ["recorded", "recorded_dataset"]


def recorded(resolved: Resolved) -> Resolved:
    """A copy for ``config.yaml``: paths are absolute, and where a resumed run went on from is left out."""
    config = resolved.config.model_copy(deep=True)
    config.model.model = _each(_absolute, config.model.model)
    config.model.adapters = [_absolute(name) for name in config.model.adapters]
    config.data.dataset = [recorded_dataset(name) for name in config.data.dataset]
    config.data.val_dataset = [recorded_dataset(name) for name in config.data.val_dataset]
    config.template.system = _each(_text_file, config.template.system)
    config.template.chat_template = _each(_absolute, config.template.chat_template)
    config.evaluation.eval_tasks = _each(_absolute, config.evaluation.eval_tasks)
    policy = config.policy
    policy.chord_sft_dataset = [recorded_dataset(name) for name in policy.chord_sft_dataset]
    policy.reward_funcs = [_callback(name) if ".py" in name else name for name in policy.reward_funcs]
    policy.reward_model = [_absolute(name) for name in policy.reward_model]
    policy.replay = _each(_absolute, policy.replay)
    policy.algo = _callback(policy.algo) if policy.algo and ".py:" in policy.algo else policy.algo
    config.rlhf.ref_model = _each(_absolute, config.rlhf.ref_model)
    config.rlhf.ref_adapters = [_absolute(name) for name in config.rlhf.ref_adapters]
    config.report.callbacks = [_callback(name) for name in config.report.callbacks]
    config.checkpoint.output_dir = str(Path(config.checkpoint.output_dir).expanduser().absolute())
    config.checkpoint.resume_from_checkpoint = None
    sources = {**resolved.sources, "resume_from_checkpoint": Source("default")}
    return dataclasses.replace(resolved, config=config, sources=sources)


def _each(convert: Callable[[str], str], value: str | None) -> str | None:
    return None if value is None else convert(value)


def _absolute(name: str) -> str:
    """The absolute path of something that exists here; any other name as it is."""
    path = Path(name).expanduser()
    return str(path.absolute()) if path.exists() else name


def recorded_dataset(name: str) -> str:
    """The name of a data set with an absolute path, when it is a path."""
    if name.startswith(TASK_PREFIX):
        return name
    spec = parse_dataset_spec(name)
    if spec.entry is not None or spec.subsets or spec.hub is not None:
        return name
    return _absolute(str(spec.path)) + ("" if spec.num_rows is None else f"#{spec.num_rows}")


def _text_file(text: str) -> str:
    return _absolute(text) if text.endswith(".txt") else text


def _callback(name: str) -> str:
    file, colon, wanted = name.partition(":")
    return f"{_absolute(file)}{colon}{wanted}"
