"""Where answers come from: the embedded engine with the very weights in training, or the log of another run."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from swift.core.errors import ConfigError, TransientError
from swift.inference.engines.base import Delta, Request, SamplingOptions
from swift.inference.engines.blocking import Completion
from swift.inference.engines.embedded_core import EmbeddedCore
from swift.inference.text import decode
from swift.models.facts import ModelFacts
from swift.models.load import ModelBundle
from swift.parallel.answers import PolicyEngine
from swift.parallel.world import World
from swift.rl.sizes import engine_limits
from swift.rl.trajectory import Trajectory
from swift.train.prepare import Prepared
from swift.tuners.apply import tuned_model
from swift.tuners.merged import MergedWeights

__all__ = ["EmbeddedSampler", "Sampler", "SamplingJob", "SharedSampler"]

_CHECKED_EVERY = 256
_LATE_SECONDS = 300.0
"""By how much a rank may be behind others when it begins to sample."""


@dataclass(frozen=True)
class SamplingJob:
    """One answer that is wanted."""

    prompt_ids: np.ndarray
    row: tuple[str, int]
    group: int
    sample: int
    seed: int


class Sampler(Protocol):
    """Answers prompts with the policy as it is now. Every answer depends on its job and the weights alone."""

    def sample(
        self, jobs: Sequence[SamplingJob], version: int, *, temperature: float | None = None
    ) -> list[Trajectory]:
        """In the order of the jobs. Raises SwiftError naming the stage when it takes too long or fails."""
        ...

    def close(self) -> None: ...


class EmbeddedSampler:
    """The embedded engine over the trainer's own model: nothing has to be synchronised.

    There is no second copy of the weights, but for LoRA on a small float32 model, which samples faster with the
    adapter in the weights (`swift.tuners.merged`).

    Args:
        engine: of the training.
        prepared: template and options.
        longest_prompt: tokens; with the longest answer it bounds the memory of keys and values.
        num_samples: answers that are wanted at a time.
        deadline_seconds: for all answers of one call.
    """

    def __init__(
        self,
        engine: PolicyEngine,
        prepared: Prepared,
        *,
        longest_prompt: int,
        num_samples: int,
        deadline_seconds: float = 3600.0,
    ) -> None:
        config = prepared.resolved.config
        self.engine, self.template = engine, prepared.template
        self.options, self.deadline_seconds = config.generation, deadline_seconds
        self._check_room(prepared, longest_prompt)
        limits = engine_limits(prepared.resolved, longest_prompt, num_samples)
        with engine.evaluating() as model:
            self._merged = MergedWeights.of(tuned_model(model))
            with self._adapted():
                self.core = EmbeddedCore(_bundle(model, prepared), limits)
        self.core.shares_prompts = True

    def _adapted(self) -> contextlib.AbstractContextManager[None]:
        """Where that is cheap, the adapter acts through the weights."""
        return contextlib.nullcontext() if self._merged is None else self._merged.applied()

    def _check_room(self, prepared: Prepared, longest_prompt: int) -> None:
        most = ModelFacts.read(prepared.model_path).max_position_embeddings
        wanted = longest_prompt + self.options.max_new_tokens
        if most and wanted > most:
            raise ConfigError(
                f"the longest prompt ({longest_prompt} tokens) and max_completion_length "
                f"{self.options.max_new_tokens} are more than the model's {most} positions",
                where="--max_completion_length",
                fix=f"--max_completion_length {max(1, most - longest_prompt)}, or a smaller --max_length",
            )

    def sample(
        self, jobs: Sequence[SamplingJob], version: int, *, temperature: float | None = None
    ) -> list[Trajectory]:
        """See `Sampler`. ``temperature`` replaces that of the options (0: the likeliest answers)."""
        # The first answer of each group computes the prompt for all of them; long prompts go first.
        order = sorted(range(len(jobs)), key=lambda at: (jobs[at].sample > 0, -len(jobs[at].prompt_ids)))
        requests = [self._request(str(at), jobs[at], temperature) for at in order]
        watch = _Deadline(self.deadline_seconds, len(jobs))
        with self.engine.evaluating(), self._adapted():
            answers = self.core.generate(requests, watch)
        found = dict(zip(order, answers, strict=True))
        return [self._trajectory(job, found[at], version) for at, job in enumerate(jobs)]

    def _request(self, name: str, job: SamplingJob, temperature: float | None) -> Request:
        options = self.options
        sampling = SamplingOptions(
            max_tokens=options.max_new_tokens,
            temperature=options.temperature if temperature is None else temperature,
            top_p=options.top_p,
            top_k=options.top_k,
            seed=job.seed,
            stop_token_ids=tuple(self.template.stop_token_ids),
            logprobs=0,
        )
        return Request(name, job.prompt_ids.tolist(), sampling)

    def _trajectory(self, job: SamplingJob, answer: Completion, version: int) -> Trajectory:
        if answer.finish_reason not in ("stop", "length"):
            raise TransientError(
                "an answer could not be sampled",
                where=f"sampling, {job.row[0]}{job.row[1]}",
                why=answer.error,
            )
        tokens = np.asarray(answer.tokens, np.int32)
        is_stopped = answer.finish_reason == "stop"
        return Trajectory(
            prompt_ids=job.prompt_ids,
            tokens=tokens,
            logprobs=np.fromiter((info.logprob for info in answer.infos), np.float32, len(tokens)),
            mask=np.ones(len(tokens), np.bool_),
            version=version,
            group=job.group,
            sample=job.sample,
            row=job.row,
            seed=job.seed,
            finish_reason=answer.finish_reason,
            text=decode(self.template.tokenizer, answer.tokens[:-1] if is_stopped else answer.tokens),
        )

    def close(self) -> None:
        self.core.close()


class SharedSampler:
    """Samples with all ranks: the answers to a prompt are one rank's, prompts are dealt out in turn.

    An answer depends on its job and the weights alone, so these are the answers of one process.

    Args:
        own: of this rank.
        world: all ranks.
    """

    def __init__(self, own: EmbeddedSampler, world: World) -> None:
        self.own, self.world = own, world

    def sample(
        self, jobs: Sequence[SamplingJob], version: int, *, temperature: float | None = None
    ) -> list[Trajectory]:
        """See `Sampler`; every rank calls this with the same jobs, and gets all answers."""
        numbers = {group: number for number, group in enumerate(dict.fromkeys(job.group for job in jobs))}
        rank_of = [numbers[job.group] % self.world.size for job in jobs]
        mine = [job for job, rank in zip(jobs, rank_of, strict=True) if rank == self.world.rank]
        found = self.world.together(
            lambda: self.own.sample(mine, version, temperature=temperature),
            stage="sample",
            seconds=self.own.deadline_seconds + _LATE_SECONDS,
        )
        answers = [iter(part) for part in found]
        return [next(answers[rank]) for rank in rank_of]

    def close(self) -> None:
        self.own.close()


class _Deadline:
    """Called with every new token; raises SwiftError when sampling has taken too long."""

    def __init__(self, seconds: float, num_jobs: int) -> None:
        self.end, self.seconds, self.num_jobs = time.monotonic() + seconds, seconds, num_jobs
        self._calls = self._done = 0

    def __call__(self, index: int, delta: Delta) -> None:
        self._calls += 1
        self._done += delta.finish_reason is not None
        if self._calls % _CHECKED_EVERY == 0 and time.monotonic() > self.end:
            raise TransientError(
                f"{self._done} of {self.num_jobs} answers after {self.seconds:.0f} s",
                where="sampling",
                fix="a smaller --max_completion_length or --generation_batch_size",
            )


def _bundle(model: Any, prepared: Prepared) -> ModelBundle:
    folder, template = prepared.model_path, prepared.template
    attention = model.config._attn_implementation
    return ModelBundle(model, template.tokenizer, template, ModelFacts.read(folder), folder, attention)
