"""How the work is spread over devices (the sizes multiply to the number of devices)."""

from __future__ import annotations

from swift.config.option import Section, option


class ParallelSection(Section):
    """Parallel layout. This version trains on one device: larger sizes are planned, and refused in a run."""

    tensor_parallel_size: int = option(1, "Devices that share each layer's matrices.", ge=1)
    pipeline_parallel_size: int = option(1, "Devices that hold consecutive groups of layers.", ge=1)
    context_parallel_size: int = option(1, "Devices that share one sequence.", ge=1)
    expert_parallel_size: int = option(1, "Devices that share the experts of MoE layers.", ge=1)
    data_parallel_size: int = option(1, "Copies of the model, each on its own data.", ge=1)
    sequence_parallel: bool = option(
        False, "Split activations between tensor-parallel regions along the sequence."
    )
