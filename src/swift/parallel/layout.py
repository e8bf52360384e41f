"""How many processes work along which dimension, and which place each of them has. Imports no torch.

The sizes multiply to the number of processes. Ranks are counted with ``tp`` fastest and ``pp`` slowest: neighbours
talk most. Experts take ``ep`` neighbours out of the ranks of one copy of a stage (``dp_shard`` x ``cp`` x ``tp``):
they need no processes of their own.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from swift.core.errors import ConfigError

if TYPE_CHECKING:
    from swift.config.sections.parallel import ParallelSection

__all__ = ["AXES", "Coordinates", "Layout"]

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""The dimensions of the mesh, the slowest first."""


@dataclass(frozen=True)
class Coordinates:
    """The place of one rank along each axis."""

    pp: int
    dp_replicate: int
    dp_shard: int
    cp: int
    tp: int


@dataclass(frozen=True)
class Layout:
    """Sizes of the dimensions.

    Attributes:
        pp: groups of consecutive layers (pipeline stages).
        dp_replicate: copies of the model, each on its own data, that add up their gradients.
        dp_shard: ranks that share weights, gradients and optimizer of one copy (FSDP), each on its own data.
        cp: ranks that share one sequence (ring, Ulysses, or both).
        tp: ranks that share each layer's matrices.
        ep: ranks, out of the others, that share the experts.
    """

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        for name, size in asdict(self).items():
            if size < 1:
                raise ConfigError(f"a size of {size} is not possible", where=name, fix="at least 1")
        if self.ranks_of_a_copy % self.ep:
            raise ConfigError(
                f"{self.ep} ranks cannot share the experts",
                where="--expert_parallel_size",
                why=f"they are taken out of the {self.ranks_of_a_copy} ranks of dp_shard x cp x tp, "
                "which must be a multiple",
                fix=f"--data_parallel_shard_size {self.ep}, or a divisor of {self.ranks_of_a_copy}",
            )

    @classmethod
    def of(cls, section: ParallelSection) -> Layout:
        """The layout of a configuration whose open sizes are settled."""
        return cls(
            pp=section.pipeline_parallel_size,
            dp_replicate=section.data_parallel_replicate_size,
            dp_shard=section.data_parallel_shard_size,
            cp=section.context_parallel_size,
            tp=section.tensor_parallel_size,
            ep=section.expert_parallel_size,
        )

    @property
    def world_size(self) -> int:
        """How many processes it takes."""
        return self.pp * self.dp * self.cp * self.tp

    @property
    def dp(self) -> int:
        """Ranks that see different data."""
        return self.dp_replicate * self.dp_shard

    @property
    def ranks_of_a_copy(self) -> int:
        """Ranks that hold one copy of a stage."""
        return self.dp_shard * self.cp * self.tp

    def coordinates(self, rank: int) -> Coordinates:
        """Where ``rank`` stands. Raises ValueError when there is no such rank."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is not one of {self.world_size}")
        places = {}
        for axis in reversed(AXES):
            rank, places[axis] = divmod(rank, getattr(self, axis))
        return Coordinates(**places)

    def rank_of(self, place: Coordinates) -> int:
        """The reverse of `coordinates`."""
        rank = 0
        for axis in AXES:
            rank = rank * getattr(self, axis) + getattr(place, axis)
        return rank

    def data_rank(self, rank: int) -> int:
        """Which of the ``dp`` parts of the data ``rank`` reads; ranks that differ in tp, cp or pp read the same."""
        place = self.coordinates(rank)
        return place.dp_replicate * self.dp_shard + place.dp_shard

    def describe(self) -> str:
        """``pp2 x dp_shard2 x tp2``; one process is ``1 process``."""
        words = [f"{axis}{getattr(self, axis)}" for axis in AXES if getattr(self, axis) > 1]
        words += [f"ep{self.ep}"] if self.ep > 1 else []
        return " x ".join(words) or "1 process"
