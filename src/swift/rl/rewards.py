"""The reward of an answer: functions, reward models, their weighted sum, and what a failure means."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from swift.config.bind import resolve
from swift.config.policy_rules import reward_name
from swift.config.schema import Config
from swift.core.errors import ConfigError, SwiftError, TransientError
from swift.core.logging import get_logger
from swift.core.registry import closest
from swift.parallel.world import World
from swift.rl.reward_functions import RewardBatch
from swift.rl.reward_pool import START_SECONDS, RewardFailure, RewardPool, RewardResult

__all__ = ["Rewards", "Scores", "reward_functions"]

logger = get_logger(__name__)

_TEXTS = "completions are texts; a reward that also takes prompts gets lists of messages, as in TRL"
_MODEL_SECONDS = 3600.0
"""How long ranks wait for one reward model."""


@dataclass(frozen=True)
class Scores:
    """What a batch of answers got.

    Attributes:
        parts: of each reward, in order of ``Rewards.names``, a value of each answer; NaN: does not apply.
        failures: place of an answer -> what went wrong.
        dropped: answers that must not be learned from.
    """

    parts: list[list[float]]
    failures: dict[int, str] = field(default_factory=dict)
    dropped: frozenset[int] = frozenset()


class Rewards:
    """All rewards of a run.

    Args:
        config: of the run.
        is_main: of several processes one computes the rewards of all, and tells the others.

    Attributes:
        world: all processes, once they have met.
    """

    def __init__(self, config: Config, *, is_main: bool = True) -> None:
        self.world = World()
        policy = config.policy
        chosen = reward_functions(config)
        self.names = _distinct(
            [reward_name(text) for text, _ in chosen] + [reward_name(m) for m in policy.reward_model]
        )
        self.weights = _weights(config, len(chosen))
        self.policy = policy.on_reward_failure
        self._pool = (
            RewardPool(chosen, timeout=policy.reward_timeout, num_processes=policy.reward_num_proc)
            if chosen and is_main
            else None
        )
        models = policy.reward_model if is_main else []
        self._models = [_RewardModel(folder, config.model.device) for folder in models]
        # All of them at once, then each alone where that has failed; reward models have no deadline of their own.
        self._slots = max(1, policy.reward_num_proc)
        self._seconds_of_one = START_SECONDS + len(chosen) * policy.reward_timeout
        self._seconds_of_models = _MODEL_SECONDS * len(policy.reward_model)

    def check(self) -> None:
        """Wait until all functions are there. Raises SwiftError when one cannot be found or made."""
        if self._pool is not None:
            self._pool.check()

    def __call__(self, batch: RewardBatch, where: Callable[[int], str]) -> Scores:
        """The rewards of a batch; every rank calls this with the same answers.

        Args:
            where: names an answer in messages.

        Raises SwiftError when all answers fail, and for any failure with ``on_reward_failure stop``.
        """
        rounds = 1 + -(-len(batch) // self._slots)
        seconds = rounds * self._seconds_of_one + self._seconds_of_models
        return self.world.by_main(lambda: self._scores(batch, where), stage="reward", seconds=seconds)

    def _scores(self, batch: RewardBatch, where: Callable[[int], str]) -> Scores:
        results: list[RewardResult] = self._pool(batch) if self._pool is not None else []
        parts = [values for values, _ in results]
        parts += [model(batch) for model in self._models]
        failures: dict[int, str] = {}
        for name, (values, failed) in zip(self.names, results, strict=False):
            for place, failure in failed.items():
                failures[place] = self._failed(name, failure, where(place), len(failed), len(batch))
                values[place] = math.nan if self.policy == "drop" else 0.0
        dropped = set(failures) if self.policy == "drop" else set()
        for place in range(len(batch)):
            if place not in failures and all(math.isnan(values[place]) for values in parts):
                dropped.add(place)  # no reward applies
        if len(dropped) == len(batch):
            why = failures.get(0, f"{where(0)}: no reward applies")
            raise SwiftError("no answer of the batch has a reward", where=why, fix="look at --reward_funcs")
        return Scores(parts, failures, frozenset(dropped))

    def _failed(self, name: str, failure: RewardFailure, where: str, count: int, total: int) -> str:
        text = f"{where}: the reward {name} {failure.kind}: {failure.why}"
        if self.policy == "stop" or count == total:
            raise TransientError(
                f"the reward {name} {failure.kind}" + (f" for all {total} answers" if count == total else ""),
                where=where,
                why=failure.why,
                fix=_TEXTS
                if "string indices" in failure.why
                else None
                if count == total
                else "--on_reward_failure zero (or drop) goes on without it",
            )
        logger.warning(text)
        return text

    def total(self, parts: Sequence[float]) -> float:
        """The weighted sum of one answer's rewards; those that do not apply count nothing."""
        return sum(w * value for w, value in zip(self.weights, parts, strict=True) if not math.isnan(value))

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()


def reward_functions(config: Config) -> list[tuple[str, dict[str, Any]]]:
    """The functions of a run with their options: ``reward_args`` over those that have options of their own."""
    policy = config.policy
    longest = config.generation.max_new_tokens
    soft = policy.soft_max_length or longest
    own: dict[str, dict[str, Any]] = {
        "cosine": {
            "min_len_value_wrong": policy.cosine_min_len_value_wrong,
            "max_len_value_wrong": policy.cosine_max_len_value_wrong,
            "min_len_value_correct": policy.cosine_min_len_value_correct,
            "max_len_value_correct": policy.cosine_max_len_value_correct,
            "max_len": policy.cosine_max_len or longest,
        },
        "repetition": {"n_grams": policy.repetition_n_grams, "max_penalty": policy.repetition_max_penalty},
        "soft_overlong": {"max_length": soft, "cache_length": policy.soft_cache_length or max(1, soft // 5)},
    }
    names = list(policy.reward_funcs)
    if policy.soft_overlong and "soft_overlong" not in names:
        names.append("soft_overlong")
    unused = set(policy.reward_args) - {*names, *map(reward_name, names)}
    if unused:
        near = closest(min(unused), {*names, *map(reward_name, names)})
        raise ConfigError(
            f"{min(unused)} is not among the rewards",
            where="--reward_args",
            why=f"they are: {', '.join(names) or 'none'}",
            fix=f"did you mean {near}?" if near else None,
        )
    args: Mapping[str, Any] = policy.reward_args
    return [
        (name, {**own.get(name, {}), **args.get(name, args.get(reward_name(name), {}))}) for name in names
    ]


def _weights(config: Config, num_functions: int) -> list[float]:
    policy = config.policy
    given = list(policy.reward_weights) or [1.0] * (len(policy.reward_funcs) + len(policy.reward_model))
    added = num_functions - len(policy.reward_funcs)  # soft_overlong of the algorithm
    return [*given[: len(policy.reward_funcs)], *[1.0] * added, *given[len(policy.reward_funcs) :]]


def _distinct(names: list[str]) -> list[str]:
    """Names for metrics; the second of one name gets a number."""
    return [
        f"{name}_{names[:at].count(name) + 1}" if name in names[:at] else name
        for at, name in enumerate(names)
    ]


class _RewardModel:
    """A classifier with one score, in this process."""

    def __init__(self, folder: str, device: str) -> None:
        from swift.inference.context import find_context, load_context
        from swift.inference.engines.embedded_core import EmbeddedCore

        resolved = resolve("infer", values={"model": folder, "device": device})
        try:
            context = find_context(resolved)
            bundle = load_context(context, resolved)
        except SwiftError as error:
            error.where = f"--reward_model {folder}" if error.where == "--model" else error.where
            raise
        self.core = EmbeddedCore(bundle, resolved.config.engine, task=context.task_options)
        if self.core.writes_text:
            raise ConfigError(
                "this model writes text and gives no scores",
                where=f"--reward_model {folder}",
                fix="a run of swift rlhf --rlhf_type rm (or of swift sft --task_type seq_cls --num_labels 1)",
            )
        self.template, self.folder = bundle.template, folder

    def __call__(self, batch: RewardBatch) -> list[float]:
        conversations = [
            [*(prompt if not isinstance(prompt, str) else [{"role": "user", "content": prompt}]),
             {"role": "assistant", "content": text}]
            for prompt, text in zip(batch.prompts, batch.completions, strict=True)
        ]  # fmt: skip
        scores = self.core.pool([self.template.encode_sequence(one) for one in conversations])
        if any(len(one) != 1 for one in scores):
            raise ConfigError("a reward is one number", where=f"--reward_model {self.folder}")
        return [float(one[0]) for one in scores]
