"""A base model that several LoRA runs share, and which runs can share one."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from swift.config.schema import Resolved
from swift.core.errors import ConfigError
from swift.models.facts import ModelFacts
from swift.train.prepare import Prepared
from swift.tuners.apply import remove_adapter, tuned_model
from swift.tuners.switch import AdapterSwitch

__all__ = ["SharedBase", "fusing_problem"]

_SAME = {
    "model": ("torch_dtype", "attn_impl", "trust_remote_code"),
    "quantization": (
        "quant_method",
        "quant_bits",
        "bnb_4bit_quant_type",
        "bnb_4bit_use_double_quant",
        "bnb_4bit_compute_dtype",
    ),
    "training": ("gradient_checkpointing", "recompute_num_layers", "use_liger_kernel"),
}
"""Options that change the model itself, so that runs on one model have them in common."""


def fusing_problem(resolved: Resolved) -> tuple[str, str] | None:
    """(option, why) that keeps a run from sharing its base model; None when it can."""
    config = resolved.config
    tuner, training = config.tuner, config.training
    if tuner.tuner_type != "lora" or tuner.use_dora or tuner.target_parameters:
        return "--tuner_type", "only LoRA adapters share a base model"
    refused = {
        "--neftune_noise_alpha": (
            training.neftune_noise_alpha,
            "its noise would reach the rows of other runs",
        ),
        "--torch_compile": (
            training.torch_compile,
            "members come and go, which would compile again and again",
        ),
        "--activation_cpu_offload": (training.activation_cpu_offload, "it is not built for several runs"),
        "--longlora_group_size": (tuner.longlora_group_size, "it changes the attention of the model"),
        "--qat_bits": (config.quantization.qat_bits is not None, "it changes the layers of the model"),
        "--fp8": (config.quantization.fp8, "it changes the layers of the model"),
        "--task_type": (config.task.task_type != "causal_lm", "the head of the model belongs to the task"),
        "--rlhf_type": (config.rlhf.rlhf_type == "rm", "the head of the model belongs to the task"),
    }
    return next(((option, why) for option, (is_set, why) in refused.items() if is_set), None)


@dataclass(frozen=True)
class _Key:
    """What two runs on one model must have in common."""

    folder: str
    device: str
    dtype: str
    options: str

    @classmethod
    def of(cls, prepared: Prepared) -> _Key:
        config = prepared.resolved.config
        options = {
            f"--{name}": getattr(getattr(config, section), name)
            for section, names in _SAME.items()
            for name in names
        }
        return cls(
            str(prepared.model_path.resolve()),
            str(prepared.device),
            str(prepared.dtype),
            json.dumps(options, sort_keys=True, default=str),
        )

    def difference(self, other: _Key) -> str | None:
        """What differs, in words."""
        for name in ("folder", "device", "dtype"):
            first, second = getattr(self, name), getattr(other, name)
            if first != second:
                return f"{name} is {second}, not {first}"
        ours, theirs = json.loads(self.options), json.loads(other.options)
        return next(
            (f"{name} is {theirs[name]}, not {ours[name]}" for name in ours if ours[name] != theirs[name]),
            None,
        )


class SharedBase:
    """The model of a group of runs, loaded by the first of them.

    Attributes:
        model: None until then.
    """

    def __init__(self) -> None:
        self.model: Any = None
        self._key: _Key | None = None
        self._numbers = itertools.count(1)

    def new_name(self) -> str:
        """A name for the adapter of the next member; names are not used again."""
        return f"member{next(self._numbers)}"

    def remove(self, adapter: str) -> None:
        """Take a member's adapter off the model, if it is there."""
        if self.model is not None and adapter in tuned_model(self.model).adapter_names:
            remove_adapter(self.model, adapter)

    @property
    def switch(self) -> AdapterSwitch:
        """Which adapter acts; there is one as soon as a member has attached its adapter."""
        switch = tuned_model(self.model).switch
        assert switch is not None
        return switch

    def weights(self, prepared: Prepared, load: Callable[[Prepared], Any]) -> Any:
        """The model, as ``load`` gives it to the first member.

        Raises:
            ConfigError: this run cannot share a model, or not this one.
        """
        problem = fusing_problem(prepared.resolved)
        if problem is not None:
            raise ConfigError(
                "this run cannot be fused with others",
                where=problem[0],
                why=problem[1],
                fix="run it alone: --fuse never",
            )
        key = _Key.of(prepared)
        if self._key is None:
            _refuse_own_dropout(prepared)
            self.model, self._key = load(prepared), key
        difference = self._key.difference(key)
        if difference is not None:
            raise ConfigError(
                "this run cannot share the base model of the others",
                where=str(prepared.model_path),
                why=difference,
                fix="fuse runs that differ in data, adapter and optimization only",
            )
        return self.model


def _refuse_own_dropout(prepared: Prepared) -> None:
    """Dropout of the base itself would depend on who else is in the group."""
    facts = ModelFacts.read(prepared.model_path).config
    for name, value in facts.items():
        if (
            "dropout" in name
            and isinstance(value, int | float)
            and value > 0
            and name != "classifier_dropout"
        ):
            raise ConfigError(
                "this model cannot be shared by several runs",
                where=str(prepared.model_path / "config.json"),
                why=f"{name} is {value}: what it drops would depend on who else is in the group",
                fix=f"set {name} to 0 in a copy of the model, or run alone: --fuse never",
            )
