"""How the work is spread over processes, one for each device."""

from __future__ import annotations

from typing import Literal

from swift.config.option import Section, option


class ParallelSection(Section):
    """Parallel layout: pipeline x data (copies x shards) x context x tensor processes; experts use some of these."""

    parallel_method: Literal["native", "megatron"] = option(
        "native", "Engine: PyTorch's own parallel dimensions, or Megatron-Core."
    )
    tensor_parallel_size: int = option(1, "Processes that share each layer's matrices.", ge=1)
    sequence_parallel: bool = option(
        False, "Split activations between tensor-parallel regions along the sequence."
    )
    pipeline_parallel_size: int = option(1, "Processes that hold consecutive groups of layers.", ge=1)
    pipeline_schedule: Literal["gpipe", "1f1b", "interleaved_1f1b", "interleaved_zb", "zbv"] = option(
        "1f1b", "In which order pipeline stages work on micro-batches."
    )
    microbatches: int | None = option(
        None,
        "Parts of a step that a pipeline works on at a time; default: gradient_accumulation_steps.",
        ge=1,
    )
    context_parallel_size: int = option(1, "Processes that share one sequence.", ge=1)
    sequence_parallel_method: Literal["auto", "ulysses", "ring", "hybrid"] = option(
        "auto",
        "How they do: ulysses trades sequence for heads, ring passes keys and values on, hybrid does both; "
        "auto: ulysses as far as there are heads.",
    )
    expert_parallel_size: int = option(
        1, "Processes, of those that share a copy of the model, that share its experts.", ge=1
    )
    data_parallel_size: int = option(
        1, "Processes with data of their own; unless given, what the other dimensions leave.", ge=1
    )
    data_parallel_shard_size: int = option(
        1,
        "Of these, how many share weights, gradients and optimizer of one copy of the model (FSDP2).",
        ge=1,
    )
    data_parallel_replicate_size: int = option(
        1, "Copies of the model; unless given, data_parallel_size by data_parallel_shard_size.", ge=1
    )
    fsdp: Literal["full", "grads"] | None = option(
        None,
        "Shard over all data-parallel processes: full gathers a layer's weights for each pass, grads keeps them "
        "from the forward to the backward pass.",
    )
    deepspeed: str | None = option(
        None,
        "zero0 to zero3, zero2_offload, zero3_offload, or a DeepSpeed JSON file: its stage and offload become "
        "sharding of the native engine.",
    )
    reshard_after_forward: bool = option(
        True,
        "Free a layer's gathered weights after its forward pass; unless given, not with fsdp grads or zero2.",
    )
    offload: bool = option(
        False,
        "Keep sharded weights, gradients and optimizer in host memory; unless given, as deepspeed says.",
    )
    nproc_per_node: int | None = option(
        None, "Processes to start on this machine; default: NPROC_PER_NODE, else what the layout needs.", ge=1
    )
    nnodes: int = option(1, "Machines that train together; unless given, NNODES.", ge=1)
    node_rank: int | None = option(
        None,
        "Which of them this one is; default: NODE_RANK, else whoever has master_addr is the first.",
        ge=0,
    )
    master_addr: str | None = option(None, "Where the machines meet; default: MASTER_ADDR.")
    master_port: int | None = option(
        None, "The port there; default: MASTER_PORT, else 29400 with several machines.", ge=0, le=65535
    )
    max_restarts: int = option(
        2, "How often the processes are started again from the last checkpoint when one of them dies.", ge=0
    )
    ddp_timeout: int = option(
        600,
        "How long processes wait for one another before the run fails with their stacks.",
        unit="seconds",
        ge=1,
    )

    @property
    def num_processes(self) -> int:
        """How many processes the layout takes, once its open sizes are settled."""
        return (
            self.tensor_parallel_size
            * self.pipeline_parallel_size
            * self.context_parallel_size
            * self.data_parallel_size
        )
