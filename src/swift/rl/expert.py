"""The expert of CHORD (arXiv 2508.11408): rows with good answers, a few in every step, with a weight that changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from swift.config.schema import Resolved
from swift.data.batching import BatchSchedule, MicroBatch, Mode, deal
from swift.data.collate import collate
from swift.data.load import load_data
from swift.models.template import Template
from swift.objectives.policy.chord import chord_mu
from swift.objectives.policy.objective import ExpertShare
from swift.rl.trajectory import RolloutBatch

__all__ = ["Expert"]


class Expert:
    """Adds micro-batches of expert answers to those of the policy.

    Args:
        resolved: of the run; its ``chord_sft_dataset`` is read as data of ``swift sft``.
        num_micro_batches: of an optimizer step.
        mode: how rows are laid out.
    """

    def __init__(self, resolved: Resolved, template: Template, *, num_micro_batches: int, mode: Mode) -> None:
        policy = self.policy = resolved.config.policy
        config = resolved.config.model_copy(deep=True)
        config.data.dataset, config.data.val_dataset = list(policy.chord_sft_dataset), []
        config.data.dataset_weights, config.data.split_dataset_ratio = [], 0.0
        config.rlhf.rlhf_type = None
        self.data = load_data(replace(resolved, config=config), template, config.data.max_length).train
        self.num_micro_batches, self.mode = num_micro_batches, mode
        self.pad_token_id: int = template.tokenizer.pad_token_id
        self._schedule = BatchSchedule(
            self.data.lengths,
            batch_size=policy.chord_sft_per_device_train_batch_size,
            mode=mode,
            shuffle=config.data.dataset_shuffle,
            seed=config.data.data_seed or 0,
        )

    def join(
        self, batches: Sequence[RolloutBatch], updates: int, share: tuple[int, int] = (0, 1)
    ) -> list[RolloutBatch]:
        """Our micro-batches of the step with ours of the expert; a function of the number of updates alone.

        ``share``: which rank we are, of how many.
        """
        policy = self.policy
        assert policy.chord_mu_peak is not None and policy.chord_mu_valley is not None
        mu = chord_mu(
            updates,
            warmup_steps=policy.chord_mu_warmup_steps,
            decay_steps=policy.chord_mu_decay_steps,
            peak=policy.chord_mu_peak,
            valley=policy.chord_mu_valley,
        )
        own = [self._batch(updates * self.num_micro_batches + at) for at in range(self.num_micro_batches)]
        num_tokens = sum(batch.num_targets for batch in own)
        weight = ExpertShare(mu, bool(policy.chord_enable_phi_function), max(num_tokens, 1))
        for batch in batches:
            assert batch.policy is not None
            batch.policy = replace(batch.policy, weight=1 - mu)
        return [*batches, *(replace(batch, expert=weight) for batch in deal(own, share, self._batch_of([])))]

    def _batch(self, number: int) -> RolloutBatch:
        epoch, place = divmod(number, self._schedule.num_micro_batches)
        return self._batch_of(self._schedule.micro_batches(epoch)[place])

    def _batch_of(self, rows: MicroBatch) -> RolloutBatch:
        return RolloutBatch(**vars(collate(self.data, rows, self.mode, self.pad_token_id)))
