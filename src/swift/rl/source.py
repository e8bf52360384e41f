"""Sampling as a source of batches for the training loop: prompts, answers, rewards, advantages, micro-batches.

The loop asks for the micro-batches of its next step; where no answers are left, new ones are sampled with the weights
as they are now. Whatever may take long is a named stage in the run's status.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from swift.core.errors import SwiftError
from swift.data.batching import deal
from swift.objectives.policy.divergence import k1, kl_in_reward
from swift.objectives.policy.estimators import advantages
from swift.objectives.policy.shaping import without_signal
from swift.parallel.answers import PolicyEngine
from swift.rl.buffer import RolloutBuffer, micro_batches
from swift.rl.expert import Expert
from swift.rl.probe import probe
from swift.rl.prompts import Prompts, columns_of
from swift.rl.record import read_trajectories, rollout_file, write_trajectories
from swift.rl.reference_sync import ReferenceSync
from swift.rl.reward_functions import RewardBatch
from swift.rl.rewards import Rewards
from swift.rl.sampler import Sampler, SamplingJob
from swift.rl.settings import PolicySettings
from swift.rl.trajectory import AnswerLayout, RolloutBatch, Trajectory, request_seed, rollout_batch
from swift.runs.status import StatusFile
from swift.train.prepare import Prepared

__all__ = ["RolloutSource", "Stages", "rewarded"]

STATE_FILE = "rollouts.json"
BUFFER_FILE = "rollouts.parquet"


class Stages:
    """What the run is doing, for its status; adds up the seconds of each stage."""

    def __init__(self, status: StatusFile) -> None:
        self._status = status
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._status.update(stage=name)
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
            self._status.update(stage="train")


class Replayed(Protocol):
    """Answers of another run, instead of sampling."""

    @property
    def weights(self) -> Sequence[float]:
        """Of the rewards."""

    def next_batch(self, number: int) -> list[Trajectory]: ...


class RolloutSource:
    """What `swift.train.loop` takes its batches from.

    Args:
        settings: sizes and algorithm.
        prepared: options, template, data.
        engine: the policy in training, with its reference.
        sampler: None with ``replay``.
        rewards: None with ``replay``.
        folder: of the run.
        checkpoint: to go on from, or None.
        steps_per_epoch: optimizer steps of a pass over the prompts.

    Attributes:
        updates: optimizer steps handed out so far, which is the version of the weights.
        measured: metrics of the newest batch of answers, until somebody takes them.
    """

    def __init__(
        self,
        settings: PolicySettings,
        prepared: Prepared,
        engine: PolicyEngine,
        *,
        sampler: Sampler | None,
        rewards: Rewards | None,
        replay: Replayed | None,
        expert: Expert | None,
        sync: ReferenceSync | None,
        status: StatusFile,
        folder: Path,
        steps_per_epoch: int,
        layout: AnswerLayout,
    ) -> None:
        self.settings, self.prepared, self.engine = settings, prepared, engine
        self.sampler, self.rewards, self.replay, self.expert, self.sync = (
            sampler,
            rewards,
            replay,
            expert,
            sync,
        )
        self.folder, self.steps_per_epoch, self.layout = folder, steps_per_epoch, layout
        self.config = prepared.resolved.config
        self.world = prepared.world
        self.share = (self.world.data_rank, self.world.layout.dp)
        self.stages = Stages(status)
        self.prompts = Prompts(prepared.data.train, self.config.data)
        self.updates = self.batches_made = 0
        self.measured: dict[str, float] = {}
        self._failed = 0
        self._buffer: RolloutBuffer | None = None
        if checkpoint := prepared.checkpoint:
            self._load(checkpoint)

    # -- what the loop sees -----------------------------------------------------------------------------------

    def steps(self, epoch: int, accumulation: int, start_step: int = 0) -> Iterator[list[RolloutBatch]]:
        """The micro-batches of each optimizer step of an epoch, from step ``start_step`` on."""
        for _ in range(start_step, self.steps_per_epoch):
            if self.sync is not None:
                self.sync.before_update(self.updates)
            if self._buffer is None or self._buffer.is_used_up:
                self._buffer = self._deal(self._collect())
            batches = self._buffer.next_step(self.share)
            if self.expert is not None:
                batches = self.expert.join(batches, self.updates, self.share)
            self.updates += 1
            yield batches

    def close(self) -> None:
        """End the processes of rewards and the engine."""
        if self.sampler is not None:
            self.sampler.close()
        if self.rewards is not None:
            self.rewards.close()

    def save(self, folder: Path | None) -> None:
        """The cursor, and answers that are not used up, into a checkpoint; None on ranks that do not write."""
        if self.sync is not None:
            self.sync.save(folder)
        if folder is None:
            return
        buffer = self._buffer
        state = {
            "updates": self.updates,
            "batches_made": self.batches_made,
            "cursor": self.prompts.cursor,
            "used": buffer.used if buffer is not None else 0,
        }
        if buffer is not None and not buffer.is_used_up:
            prompts = [""] * len(buffer.trajectories)
            write_trajectories(
                folder / BUFFER_FILE, buffer.trajectories, step=self.updates, prompts=prompts, seconds={}
            )
        (folder / STATE_FILE).write_text(json.dumps(state))

    def _load(self, folder: Path) -> None:
        try:
            state = json.loads((folder / STATE_FILE).read_text())
        except (OSError, ValueError) as error:
            raise SwiftError(
                "not a checkpoint of this kind of training", where=str(folder), why=str(error)
            ) from error
        self.updates, self.prompts.cursor = state["updates"], state["cursor"]
        self.batches_made = state["batches_made"]
        if (folder / BUFFER_FILE).is_file():
            self._buffer = self._deal(read_trajectories(folder / BUFFER_FILE), used=state["used"])
        if self.sync is not None:
            self.sync.load(folder)

    # -- one batch of answers ---------------------------------------------------------------------------------

    def _deal(self, trajectories: Sequence[Trajectory], used: int = 0) -> RolloutBuffer:
        return RolloutBuffer(trajectories, self.settings, self.layout, used=used)

    def _collect(self) -> list[Trajectory]:
        """Sample, reward, compare, weigh and record a batch of answers."""
        self.stages.seconds.clear()
        self._failed = 0
        if self.replay is not None:
            everything = chosen = self.replay.next_batch(self.batches_made)
        else:
            everything, chosen = self._sample()
        learned = {id(one) for one in chosen}
        for place, one in enumerate([*chosen, *(one for one in everything if id(one) not in learned)]):
            one.group = place // self.settings.num_generations  # those left out have the numbers behind
        if self.config.policy.overlong_filter:
            for one in chosen:
                if one.finish_reason == "length":
                    one.mask = np.zeros_like(one.mask)
        self._read_logprobs(chosen)
        self._weigh(chosen)
        self.measured = self._measure(everything, chosen)
        if self.config.policy.save_rollouts and self.replay is None and self.world.is_main:
            self._record(everything)
        self.batches_made += 1
        return chosen

    def _sample(self) -> tuple[list[Trajectory], list[Trajectory]]:
        """All answers sampled, and whole groups of them to learn from: as many as a batch has.

        With ``dynamic_sample`` groups whose answers all have the same reward are replaced by new prompts, up to
        ``max_resample_times``; those still missing then are filled with such groups, which teach nothing.
        """
        policy, wanted = self.config.policy, self.settings.num_prompts
        everything: list[Trajectory] = []
        useful: list[list[Trajectory]] = []
        dull: list[list[Trajectory]] = []
        for _ in range(1 + (policy.max_resample_times if policy.dynamic_sample else 0)):
            groups = self._ask(wanted - len(useful))
            for group in groups:
                everything += group
                (dull if policy.dynamic_sample and _is_dull(group) else useful).append(group)
            if len(useful) == wanted:
                break
        filled = dull[: wanted - len(useful)]
        for group in dull[len(filled) :]:
            for one in group:
                one.is_used = False
        return everything, [one for group in (*useful, *filled) for one in group]

    def _ask(self, num_prompts: int) -> list[list[Trajectory]]:
        """Sample and reward the answers to the next prompts, by groups."""
        assert self.sampler is not None and self.rewards is not None
        size = self.settings.num_generations
        jobs = []
        for number, (draw, sample) in enumerate(self.prompts.draw(num_prompts)):
            ids, place = self.prompts.ids(sample), self.prompts.place(sample)
            for k in range(size):
                seed = request_seed(self.config.training.seed, self.updates, draw, k)
                jobs.append(SamplingJob(ids, place, number, k, seed))
        with self.stages("sample"):
            answers = self.sampler.sample(jobs, self.updates)
        self._probe(answers)
        with self.stages("reward"):
            self._failed += rewarded(
                answers,
                self.rewards,
                self.prompts,
                step=self.updates,
                max_steps=self.prepared.plan.total_steps,
            )
        return [answers[at : at + size] for at in range(0, len(answers), size)]

    def _probe(self, answers: Sequence[Trajectory]) -> None:
        count = min(self.config.policy.probe_sequences, len(answers))
        if count:
            # Others every time: in the end all places of a batch have been looked at.
            places = (
                np.linspace(0, len(answers), count, endpoint=False).astype(int) + self.batches_made
            ) % len(answers)
            with self.stages("probe"):
                chosen = self._batch([answers[at] for at in dict.fromkeys(places.tolist())])
                probe(
                    self.engine,
                    *chosen,
                    limit=self.config.policy.max_mismatch,
                    where=f"step {self.updates + 1}",
                )

    def _batch(self, part: list[Trajectory]) -> tuple[RolloutBatch, list[Trajectory]]:
        return rollout_batch(part, self.layout), part

    def _read_logprobs(self, chosen: Sequence[Trajectory]) -> None:
        """Old and reference log-probabilities and entropies, where they are needed."""
        algorithm, old = self.settings.algorithm, self.settings.old_logprobs
        needs_old = old == "recompute" or (self.replay is not None and old == "policy")
        needs_entropy = self.settings.needs_entropies
        if old == "sampler":
            for one in chosen:
                one.old_logprobs = one.sampler_logprobs
        if not (needs_old or needs_entropy or algorithm.beta):
            return
        chunks = micro_batches(chosen, self.settings.micro_batch, self.layout.mode == "padded")

        def read(chunk: list[Trajectory]) -> dict[str, np.ndarray]:
            batch = self._batch(chunk)[0].to(self.engine.device)
            found = {}
            if needs_old:
                found["old_logprobs"] = self.engine.frozen_values(batch)
            if needs_entropy:
                found["entropies"] = self.engine.token_entropies(batch)
            if algorithm.beta:
                values = self.engine.reference_logprobs(batch)
                if values is None:
                    raise SwiftError("there is no reference", where="--beta", fix="--beta 0")
                found["ref_logprobs"] = values
            return {name: values.float().cpu().numpy() for name, values in found.items()}

        with self.stages("logprobs"):
            dealt = self.world.collect([read(chunk) for chunk in deal(chunks, self.share, [])])
        # Dealt out in turn, so taken back in turn.
        for number, chunk in enumerate(chunks):
            place, rank = divmod(number, len(dealt))
            for name, values in dealt[rank][place].items():
                _spread(chunk, name, values)

    def _weigh(self, chosen: Sequence[Trajectory]) -> None:
        """Advantages, over all answers of the batch that count."""
        algorithm = self.settings.algorithm
        used = [one for one in chosen if one.is_used]
        if not used:
            return
        totals = torch.tensor([one.reward for one in used], dtype=torch.float64)
        groups = torch.tensor([one.group for one in used])
        lengths = torch.tensor([one.num_learned for one in used])
        knobs: dict[str, Any] = dict(self.settings.estimator)
        rewards = totals
        if algorithm.advantage == "gdpo":
            names = list(used[0].rewards)
            rewards = torch.tensor(
                [[one.rewards[name] for name in names] for one in used], dtype=torch.float64
            )
            source = self.replay or self.rewards
            assert source is not None
            knobs["weights"] = source.weights
        width = int(lengths.max())
        mask = torch.arange(width)[None] < lengths[:, None]
        if algorithm.advantage == "reinforce_pp":
            knobs["mask"] = mask
        if algorithm.kl_in_reward and algorithm.beta:
            old, reference = (torch.zeros(len(used), width, dtype=torch.float64) for _ in range(2))
            for row, one in enumerate(used):
                known = one.sampler_logprobs if one.old_logprobs is None else one.old_logprobs
                assert one.ref_logprobs is not None
                old[row, : len(known)] = torch.from_numpy(known)
                reference[row, : len(known)] = torch.from_numpy(one.ref_logprobs)
            if algorithm.advantage == "reinforce_pp":
                knobs |= {"token_kl": k1(old, reference), "beta": algorithm.beta}
            elif rewards.ndim == 1:
                rewards = kl_in_reward(rewards, old, reference, mask, beta=algorithm.beta)
        values = advantages(algorithm.advantage, rewards, groups, lengths=lengths, **knobs)
        for one, value in zip(used, values, strict=True):
            count = one.num_learned if value.ndim else 1
            one.advantage = value.reshape(-1)[:count].float().numpy()

    # -- what is told -----------------------------------------------------------------------------------------

    def _measure(self, everything: Sequence[Trajectory], chosen: Sequence[Trajectory]) -> dict[str, float]:
        """Metrics of a batch, under the names of ms-swift and TRL."""
        totals = np.array([one.reward for one in everything])
        count = self.settings.num_generations
        lengths = np.array([len(one.tokens) for one in everything])
        cut = np.array([one.finish_reason == "length" for one in everything])
        found = {
            "reward": float(np.nanmean(totals)),
            "completions/mean_length": float(lengths.mean()),
            "completions/min_length": float(lengths.min()),
            "completions/max_length": float(lengths.max()),
            "completions/clipped_ratio": float(cut.mean()),
        }
        if count > 1:
            spread = np.array([_spread_of(group) for group in totals.reshape(-1, count)])
            found |= {
                "reward_std": float(spread.mean()),
                "frac_reward_zero_std": float((spread == 0).mean()),
            }
        for name in everything[0].rewards:
            values = np.array([one.rewards[name] for one in everything])
            values = values[~np.isnan(values)]
            if len(values):
                found |= {
                    f"rewards/{name}/mean": float(values.mean()),
                    f"rewards/{name}/std": _spread_of(values),
                }
        if self.replay is None:
            found["failed_rewards"] = float(self._failed)
        if self.config.policy.dynamic_sample:
            found["resampled_prompts"] = (len(everything) - len(chosen)) / count
        if (
            left_out := sum(not one.is_used for one in chosen)
        ) or self.config.policy.on_reward_failure == "drop":
            found["dropped_answers"] = float(left_out)
        for name, seconds in self.stages.seconds.items():
            found[f"seconds/{name}"] = seconds
        if sampling := self.stages.seconds.get("sample"):
            found["sampled_tokens_per_second"] = float(lengths.sum()) / sampling
        return found

    def take_measured(self) -> dict[str, float]:
        """The metrics of the newest batch, once."""
        found, self.measured = self.measured, {}
        return found

    def _record(self, answers: Sequence[Trajectory]) -> None:
        texts: dict[tuple[str, int], str] = {}
        for one in answers:
            if one.row not in texts:
                texts[one.row] = self.prepared.template.tokenizer.decode(one.prompt_ids.tolist())
        step = self.updates + 1
        write_trajectories(
            rollout_file(self.folder, step),
            answers,
            step=step,
            prompts=[texts[one.row] for one in answers],
            seconds=dict(self.stages.seconds),
            weights=self.rewards.weights if self.rewards is not None else (),
        )


def rewarded(
    answers: Sequence[Trajectory], rewards: Rewards, prompts: Prompts, *, step: int, max_steps: int
) -> int:
    """Fill in the rewards of answers; returns for how many one has failed."""
    asked = [prompts.question(one.row) for one in answers]
    batch = RewardBatch(
        prompts=[messages for messages, _ in asked],
        completions=[one.text for one in answers],
        completion_ids=[one.tokens.tolist() for one in answers],
        columns=columns_of([columns for _, columns in asked]),
        step=step,
        max_steps=max_steps,
    )

    def where(place: int) -> str:
        one = answers[place]
        return f"{one.row[0]}{one.row[1]}, answer {one.sample + 1} of step {step + 1}"

    scores = rewards(batch, where)
    for place, one in enumerate(answers):
        values = [part[place] for part in scores.parts]
        one.rewards = dict(zip(rewards.names, values, strict=True))
        one.is_used = place not in scores.dropped
        one.reward = rewards.total(values) if one.is_used else math.nan
    return len(scores.failures)


def _spread_of(rewards: np.ndarray) -> float:
    """Standard deviation (n - 1) of those that there are; 0 for fewer than two."""
    values = rewards[~np.isnan(rewards)]
    return float(values.std(ddof=1)) if len(values) > 1 and values.min() < values.max() else 0.0


def _is_dull(group: Sequence[Trajectory]) -> bool:
    """All answers that count have the same reward."""
    values = torch.tensor([one.reward for one in group if one.is_used], dtype=torch.float64)
    return bool(without_signal(values, torch.zeros(len(values), dtype=torch.int64)).all())


def _spread(part: Sequence[Trajectory], name: str, values: np.ndarray) -> None:
    """Give each answer its share of values that lie one behind the other."""
    pieces = np.split(values, np.cumsum([one.num_learned for one in part])[:-1])
    for one, piece in zip(part, pieces, strict=True):
        setattr(one, name, piece.copy())
