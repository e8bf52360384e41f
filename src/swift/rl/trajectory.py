"""What sampling produces and training consumes: tokens, never text that would have to be tokenised again."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from swift.data.batching import Mode
from swift.data.collate import Batch, batch_of
from swift.data.layout import Sequence, lay_out_sequences
from swift.data.store import IGNORE
from swift.objectives.policy.objective import ExpertShare, PolicyTensors

__all__ = ["AnswerLayout", "RolloutBatch", "Trajectory", "request_seed", "rollout_batch"]


@dataclass
class Trajectory:
    """One sampled answer. Arrays are ``[tokens]``, of what follows the prompt.

    Attributes:
        prompt_ids: int32, what was asked.
        tokens: int32, what followed; tokens that the policy did not write (results of tools) are masked.
        logprobs: float32, of the sampler, at its temperature; 0 where masked.
        mask: bool, what the policy wrote and may learn from.
        version: optimizer updates that the sampler's weights had seen.
        group: number of its prompt within the batch; ``sample``: its number within the group.
        row: place of the prompt's row: (source, number).
        seed: of its randomness.
        finish_reason: ``stop`` or ``length``.
        text: the answer without control tokens; a view.
        rewards: name -> value, NaN where one does not apply; ``reward``: their weighted sum, NaN for an answer that a
            failed reward leaves out.
        is_used: False for those that dynamic sampling or a failed reward has left out.
        advantage: float32, ``[1]`` or one of each token that is not masked.
        old_logprobs, ref_logprobs, entropies: float32, of the tokens that are not masked; None where not known.
    """

    prompt_ids: np.ndarray
    tokens: np.ndarray
    logprobs: np.ndarray
    mask: np.ndarray
    version: int
    group: int
    sample: int
    row: tuple[str, int]
    seed: int
    finish_reason: str
    text: str
    rewards: dict[str, float] = field(default_factory=dict)
    reward: float = float("nan")
    is_used: bool = True
    advantage: np.ndarray | None = None
    old_logprobs: np.ndarray | None = None
    ref_logprobs: np.ndarray | None = None
    entropies: np.ndarray | None = None

    @property
    def sampler_logprobs(self) -> np.ndarray:
        """Those of the tokens that are not masked."""
        return self.logprobs[self.mask]

    @property
    def num_learned(self) -> int:
        return int(self.mask.sum())

    def sequence(self) -> Sequence:
        """Ids and targets for a batch: a target is the next token, where the policy wrote it."""
        ids = np.concatenate([self.prompt_ids, self.tokens])
        targets = np.full(len(ids), IGNORE, np.int64)
        start = len(self.prompt_ids) - 1
        targets[start : start + len(self.tokens)] = np.where(self.mask, self.tokens, IGNORE)
        return ids, targets


def request_seed(run_seed: int, version: int, draw: int, sample: int) -> int:
    """64 bits from run, step, prompt (the number of its draw) and number of the sample.

    No answer depends on what is sampled beside it, and no two answers of a group share their randomness.
    """
    text = f"{run_seed}/{version}/{draw}/{sample}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


@dataclass
class RolloutBatch(Batch):
    """A micro-batch of answers, or (CHORD) of an expert's."""

    policy: PolicyTensors | None = None
    expert: ExpertShare | None = None

    def to(self, device: Any) -> RolloutBatch:
        """The same batch with its tensors on ``device``."""
        moved = super().to(device)
        assert isinstance(moved, RolloutBatch)
        return replace(moved, policy=None if self.policy is None else self.policy.to(device))


@dataclass(frozen=True)
class AnswerLayout:
    """How the answers of a micro-batch become rows of tokens.

    Attributes:
        mode: padded, or all of them in one row.
        share_prompts: in one row, neighbours with the same prompt have it once.
        pad_token_id: of padded rows.
        temperature: log-probabilities are those of logits divided by it.
    """

    mode: Mode
    share_prompts: bool
    pad_token_id: int
    temperature: float


def rollout_batch(trajectories: list[Trajectory], layout: AnswerLayout) -> RolloutBatch:
    """Tokens and targets of some answers; ``policy`` is left to the caller."""
    sequences = [one.sequence() for one in trajectories]
    rows = [[one] for one in sequences] if layout.mode == "padded" else [sequences]
    batch = batch_of(lay_out_sequences(rows, layout.mode, layout.pad_token_id, share=layout.share_prompts))
    return RolloutBatch(**{**vars(batch), "temperature": layout.temperature})
