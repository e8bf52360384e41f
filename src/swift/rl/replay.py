"""Learning from the answers that another run has kept."""

from __future__ import annotations

from pathlib import Path

from swift.core.errors import DataError
from swift.rl.record import find_rollouts, read_trajectories
from swift.rl.settings import PolicySettings
from swift.rl.trajectory import Trajectory
from swift.runs.folder import locate

__all__ = ["Replay"]


class Replay:
    """The batches of another run, in their order, again and again.

    Args:
        run: its folder.
        settings: of this run; batches and groups must be of the same size.
    """

    def __init__(self, run: str, settings: PolicySettings) -> None:
        self.folder = locate(run)[0].path
        self.files: list[Path] = list(find_rollouts(self.folder).values())
        self.size, self.group = settings.num_prompts * settings.num_generations, settings.num_generations
        self.next_batch(0)

    def next_batch(self, number: int) -> list[Trajectory]:
        """The answers of one batch that were learned from. Raises DataError when they are too few or too many."""
        file = self.files[number % len(self.files)]
        answers = [one for one in read_trajectories(file) if one.is_used]
        if len(answers) != self.size or any(
            len({one.row for one in answers[at : at + self.group]}) > 1
            for at in range(0, self.size, self.group)
        ):
            raise DataError(
                f"{len(answers)} answers, and a batch of this run has {self.size} in groups of {self.group}",
                where=str(file),
                fix="--generation_batch_size and --num_generations of the run that sampled them",
            )
        for one in answers:
            one.old_logprobs = one.ref_logprobs = one.entropies = one.advantage = None
        return answers
