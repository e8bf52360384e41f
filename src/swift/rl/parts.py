"""What policy optimisation brings into a run: sampler, source of batches, objective, evaluator."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from swift.config.schema import Resolved
from swift.config.sections.policy import PolicySection
from swift.core.errors import ConfigError
from swift.core.logging import get_logger
from swift.data.batching import Mode
from swift.data.mode import batch_mode
from swift.models.attention import VARLEN
from swift.objectives.policy.objective import PolicyObjective
from swift.parallel.answers import PolicyEngine
from swift.rl.evaluation import RewardEvaluator
from swift.rl.expert import Expert
from swift.rl.prompts import longest
from swift.rl.record import FOLDER, find_rollouts
from swift.rl.reference_sync import ReferenceSync
from swift.rl.replay import Replay
from swift.rl.rewards import Rewards
from swift.rl.sampler import EmbeddedSampler, Sampler, SharedSampler
from swift.rl.settings import PolicySettings
from swift.rl.sizes import answers_of_a_rank
from swift.rl.source import RolloutSource
from swift.rl.trajectory import AnswerLayout
from swift.runs.folder import RunFolder
from swift.runs.status import StatusFile
from swift.train.callbacks.base import Callback, RunView
from swift.train.evaluation import Evaluator
from swift.train.prepare import Prepared

__all__ = ["policy_parts"]

logger = get_logger(__name__)


@dataclass
class _Parts:
    """See `swift.train.build.PolicyParts`."""

    objective: PolicyObjective
    loader: RolloutSource
    evaluator: Evaluator | None
    callbacks: list[Callback]
    save: Callable[[Path | None], None]


def policy_parts(
    settings: PolicySettings,
    rewards: Rewards | None,
    prepared: Prepared,
    engine: PolicyEngine,
    sync_weights: tuple[dict[str, Any], dict[str, Any]] | None,
    folder: RunFolder,
    status: StatusFile,
    closing: contextlib.ExitStack,
) -> _Parts:
    """Sampler, source of batches, objective and evaluator of a run whose model is loaded."""
    resolved, config = prepared.resolved, prepared.resolved.config
    policy = config.policy
    if count := _without_dropout(engine.model):
        logger.info("dropout is switched off in %d modules: sampler and trainer must compute the same", count)
    data, world = prepared.data, prepared.world
    sampler: Sampler | None = None
    if rewards is not None:
        rewards.world = world
        sampler = _sampler(settings, prepared, engine)
    if sampler is None and data.validation is not None:
        raise ConfigError(
            "nothing is sampled with replay, so nothing can be evaluated", where="--val_dataset"
        )
    mode = batch_mode(config.data)
    assert prepared.plan.steps_per_epoch is not None
    source = RolloutSource(
        settings,
        prepared,
        engine,
        sampler=sampler,
        rewards=rewards,
        replay=Replay(policy.replay, settings) if policy.replay else None,
        expert=Expert(resolved, prepared.template, num_micro_batches=prepared.plan.accumulation, mode=mode)
        if policy.chord_sft_dataset
        else None,
        sync=_reference_sync(sync_weights, policy, engine) if sync_weights is not None else None,
        status=status,
        folder=folder.path,
        steps_per_epoch=prepared.plan.steps_per_epoch,
        layout=AnswerLayout(
            mode,
            share_prompts=_shares_prompts(resolved, engine, mode),
            pad_token_id=prepared.template.tokenizer.pad_token_id,
            temperature=config.generation.temperature,
        ),
    )
    closing.callback(source.close)
    if world.is_main:
        _remove_later(folder.path, source.updates)
    evaluator = None
    if data.validation is not None and sampler is not None and rewards is not None:
        evaluator = RewardEvaluator(
            data.validation,
            config.data,
            sampler,
            rewards,
            lambda: (source.updates, prepared.plan.total_steps),
            **_eval_batch(prepared),
        )
    objective = PolicyObjective(settings.algorithm, config.generation.max_new_tokens)
    return _Parts(objective, source, evaluator, [_Measured(source)], source.save)


def _eval_batch(prepared: Prepared) -> dict[str, int]:
    """Where nobody set it, the sampler shares out its slots as it likes."""
    size = prepared.resolved.config.evaluation.per_device_eval_batch_size
    if size is None or not prepared.resolved.is_explicit("per_device_eval_batch_size"):
        return {}
    return {"at_once": size * prepared.world.size}


def _sampler(settings: PolicySettings, prepared: Prepared, engine: PolicyEngine) -> Sampler:
    data, world = prepared.data, prepared.world
    sizes = [longest(part) for part in (data.train, data.validation) if part is not None]
    own = EmbeddedSampler(
        engine,
        prepared,
        longest_prompt=max(sizes),
        num_samples=answers_of_a_rank(settings.num_prompts, settings.num_generations, world.size),
    )
    return own if world.size == 1 else SharedSampler(own, world)


def _reference_sync(
    weights: tuple[dict[str, Any], dict[str, Any]], policy: PolicySection, engine: PolicyEngine
) -> ReferenceSync:
    return ReferenceSync(
        *weights,
        every=policy.ref_model_sync_steps,
        share=policy.ref_model_mixup_alpha,
        collect=engine.collect,
    )


def _shares_prompts(resolved: Resolved, engine: PolicyEngine, mode: Mode) -> bool:
    """Whether a prompt may be computed once for its answers: our attention can, but for shifted groups and for rows
    that ranks share.
    """
    if not resolved.config.policy.share_prompts:
        return False
    model: Any = engine.model
    takes = model.config._attn_implementation == VARLEN and not resolved.config.tuner.longlora_group_size
    cuts = engine.ranks is not None and engine.ranks.cuts_rows
    if mode != "padded" and takes and not cuts:
        return True
    if resolved.is_explicit("share_prompts"):
        raise ConfigError(
            "answers cannot share the computation of their prompt here",
            where="--share_prompts true",
            why="rows are padded"
            if mode == "padded"
            else "processes share every row"
            if cuts
            else "the attention in use does not know how",
            fix="leave it out, or --padding_free true with --attn_impl auto",
        )
    return False


def _without_dropout(model: nn.Module) -> int:
    """Switch dropout off for good; returns in how many modules it was on."""
    count = 0
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            module.p = 0.0
            count += 1
        if getattr(module, "attention_dropout", 0.0):  # of transformers' attention classes
            setattr(module, "attention_dropout", 0.0)  # noqa: B010 (not an attribute of every module)
            count += 1
    return count


def _remove_later(folder: Path, updates: int) -> None:
    """A resumed run samples the steps behind its checkpoint again; nothing of the first time may be left beside it."""
    if not (folder / FOLDER).is_dir():
        return
    for step, file in find_rollouts(folder).items():
        if step > updates:
            file.unlink()


class _Measured(Callback):
    """Puts the metrics of a new batch of answers into the window of the next metric line."""

    def __init__(self, source: RolloutSource) -> None:
        self.source = source

    def on_step_end(self, run: RunView) -> None:
        for name, value in self.source.take_measured().items():
            run.state.window.add_groups([name], [[value], [1.0]])
