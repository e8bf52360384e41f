"""Learning from the answers that another run has kept."""

from __future__ import annotations

from pathlib import Path

from swift.core.errors import DataError
from swift.rl.record import find_rollouts, read_trajectories, read_weights
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
        answers = self.next_batch(0)
        self.weights = read_weights(self.files[0]) or [1.0] * len(answers[0].rewards)

    def next_batch(self, number: int) -> list[Trajectory]:
        """The answers of one batch, whole groups in order; some of them may not be used.

        Groups that dynamic sampling has left out have the numbers behind. Raises DataError when there are too few or
        too many.
        """
        file = self.files[number % len(self.files)]
        groups: dict[int, list[Trajectory]] = {}
        for one in read_trajectories(file):
            groups.setdefault(one.group, []).append(one)
        left_out = [
            number
            for number, group in groups.items()
            if number >= self.size // self.group and not any(one.is_used for one in group)
        ]
        answers = [one for number in sorted(groups) if number not in left_out for one in groups[number]]
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
