"""What dimensions inside a model save and cost on gloo ranks of one thread: two claims of the articles, measured.

    python benchmarks/parallel_dimensions.py [--steps 4] [--write]

1. "Sequence parallelism saves 40 to 70 % of memory": bytes that autograd keeps for the backward pass of one row of
   2,048 tokens (counted, not sampled: each storage once, parameters left out), and bytes of weights, on the rank that
   keeps most. LoRA on all linear layers of a Qwen3 with 8 layers of 512; the same step in every layout.
2. "Tensor and expert parallelism is up to 10 times faster than data parallelism for a mixture of experts": seconds of a
   step of four rows of 256 tokens and bytes of weights, gradients and AdamW's moments on a rank, two ranks, full
   training of a Qwen3-MoE with 32 experts. Two gloo ranks on two cores say what travels and what is kept; they say
   nothing of NVLink or of kernels.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

from measure import described_parser, markdown_table, write_results

_TEXT = """# Dimensions inside a model

`python benchmarks/parallel_dimensions.py --write`, gloo ranks of one thread on a 2-core CPU. Bytes are counted and the
same on any device that keeps the same tensors; seconds are of this machine, where two processes share the cores and a
collective is a copy through the loopback.
"""

SIZES = {"vocab_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
WIDTH = 2048


def dense() -> Any:
    from transformers import Qwen3Config

    return Qwen3Config(**SIZES, hidden_size=512, intermediate_size=1536, num_hidden_layers=8)


def mixture() -> Any:
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        **SIZES,
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=256,
        num_experts=32,
        num_experts_per_tok=4,
        num_hidden_layers=4,
    )


def engine_of(rank: int, layout: Any, options: dict[str, Any], config: Any, lora: bool) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    from swift.config.sections.parallel import ParallelSection
    from swift.models.attention import VARLEN, register_varlen_attention
    from swift.models.head import split_head
    from swift.parallel.data_parallel import Ranks, ShardOptions
    from swift.parallel.distribute import distribute
    from swift.parallel.engine import ParameterSet
    from swift.parallel.mesh import build_mesh
    from swift.parallel.native import NativeEngine
    from swift.parallel.world import World
    from swift.train.optimizers import split_by_mesh
    from swift.tuners.apply import attach_adapter
    from swift.tuners.lora import AdapterSpec, is_linear

    register_varlen_attention()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=VARLEN)
    if lora:
        names = [name for name, module in model.named_modules() if is_linear(module) and name != "lm_head"]
        attach_adapter(model, dict.fromkeys(names, AdapterSpec(8, 16)))
    parts = split_head(model)
    extra: dict[str, Any] = {}
    if layout.world_size > 1:
        world = World(rank, layout, build_mesh(layout, "cpu"))
        section = ParallelSection(
            tensor_parallel_size=layout.tp,
            context_parallel_size=layout.cp,
            expert_parallel_size=layout.ep,
            **options,
        )
        shards = ShardOptions() if layout.dp_shard > 1 else None
        found = distribute(model, world, parts, section, shards)
        parts = found.split
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        extra["ranks"] = Ranks(world, trained, **found.parts)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(split_by_mesh([{"params": list(trained.values())}]), lr=1e-4)
    sets = [ParameterSet("default", trained, optimizer, lambda step: 1e-4, 1.0)]
    split: Callable[[Any], Any] = lambda _: parts  # noqa: E731
    return NativeEngine(model, sets, device=torch.device("cpu"), dtype=torch.float32, split=split, **extra)


def batch_of(rows: int, width: int, seed: int) -> Any:
    import torch

    from swift.data.collate import Batch

    ids = torch.randint(3, 2000, (rows, width), generator=torch.Generator().manual_seed(seed))
    targets = torch.full_like(ids, -100)
    targets[:, :-1] = ids[:, 1:]
    positions = torch.arange(width).repeat(rows, 1)
    return Batch(ids, positions, targets, None, None, rows * width, rows * (width - 1), [], [])


def part_bytes(model: Any) -> int:
    from swift.models.sharded import local

    return sum(local(p).numel() * p.element_size() for p in model.parameters())


def memory(rank: int, layout: Any, options: dict[str, Any]) -> dict[str, int]:
    """Bytes that a step keeps for its backward pass, and bytes of weights."""
    import torch

    from swift.models.sharded import local
    from swift.objectives.sft import SftObjective

    engine = engine_of(rank, layout, options, dense(), lora=True)
    weights = {local(p).untyped_storage()._cdata for p in engine.model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Any) -> Any:
        storage = local(tensor).untyped_storage()
        if storage._cdata not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        engine.forward_backward([batch_of(1, WIDTH, 0)], SftObjective())
    return {"activations": sum(kept.values()), "weights": part_bytes(engine.model)}


def speed(rank: int, layout: Any, options: dict[str, Any], steps: int) -> dict[str, float]:
    """Median seconds of a step over four rows, and bytes of weights, gradients and moments."""
    from torch import distributed

    from swift.objectives.sft import SftObjective

    engine = engine_of(rank, layout, options, mixture(), lora=False)
    seconds = []
    for step in range(steps + 1):
        batches = [batch_of(2, 256, 2 * step + part) for part in range(2)]
        mine = batches[layout.data_rank(rank) :: layout.dp]
        if layout.world_size > 1:
            distributed.barrier()
        started = time.perf_counter()
        engine.forward_backward(mine, SftObjective())
        engine.clip()
        engine.step(0)
        seconds.append(time.perf_counter() - started)
    return {"seconds": statistics.median(seconds[1:]), "bytes": 4 * part_bytes(engine.model)}


def work(rank: int, size: int, folder: str, function: Callable[..., Any], args: Any, results: Any) -> None:
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    if size > 1:
        distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size
        )
    results.put(function(rank, *args))
    if size > 1:
        distributed.barrier()
    results.close()
    results.join_thread()
    os._exit(0)


def on_ranks(function: Callable[..., Any], layout: Any, options: dict[str, Any], *args: Any) -> list[Any]:
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        results, size = context.Queue(), layout.world_size
        ranks = [
            context.Process(
                target=work, args=(rank, size, folder, function, (layout, options, *args), results)
            )
            for rank in range(size)
        ]
        for rank in ranks:
            rank.start()
        found = [results.get(timeout=600) for _ in ranks]
        for rank in ranks:
            rank.join(60)
    return found


def main() -> None:
    from swift.parallel.layout import Layout

    parser = described_parser(__doc__)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--write", action="store_true", help="write results/parallel_dimensions.md")
    given = parser.parse_args()
    layouts: dict[str, tuple[Any, dict[str, Any]]] = {
        "one process": (Layout(), {}),
        "tensor 2": (Layout(tp=2), {}),
        "tensor 2, sequence parallel": (Layout(tp=2), {"sequence_parallel": True}),
        "tensor 4": (Layout(tp=4), {}),
        "tensor 4, sequence parallel": (Layout(tp=4), {"sequence_parallel": True}),
        "ulysses 2": (Layout(cp=2), {"sequence_parallel_method": "ulysses"}),
        "ring 2": (Layout(cp=2), {"sequence_parallel_method": "ring"}),
        "ulysses 4": (Layout(cp=4), {"sequence_parallel_method": "ulysses"}),
        "ring 4": (Layout(cp=4), {"sequence_parallel_method": "ring"}),
    }
    kept = {name: on_ranks(memory, *layout) for name, layout in layouts.items()}
    most = {name: {key: max(one[key] for one in found) for key in found[0]} for name, found in kept.items()}
    whole = most["one process"]
    first = markdown_table(
        ["layout", "kept for the backward pass, MiB", "saved", "weights, MiB"],
        [
            [
                name,
                f"{one['activations'] / 2**20:.0f}",
                f"{1 - one['activations'] / whole['activations']:.0%}",
                f"{one['weights'] / 2**20:.0f}",
            ]
            for name, one in most.items()
        ],
    )
    pairs: dict[str, tuple[Any, dict[str, Any]]] = {
        "data parallel, 2 copies": (Layout(dp_replicate=2), {}),
        "FSDP 2": (Layout(dp_shard=2), {}),
        "FSDP 2, expert 2": (Layout(dp_shard=2, ep=2), {}),
        "tensor 2, expert 2": (Layout(tp=2, ep=2), {}),
        "tensor 2, expert 2, sequence parallel": (Layout(tp=2, ep=2), {"sequence_parallel": True}),
    }
    times = {name: on_ranks(speed, *layout, given.steps) for name, layout in pairs.items()}
    base = max(one["seconds"] for one in times["data parallel, 2 copies"])
    second = markdown_table(
        ["layout", "seconds a step", "x data parallel", "weights, gradients, moments, MiB a rank"],
        [
            [
                name,
                f"{max(one['seconds'] for one in found):.2f}",
                f"{base / max(one['seconds'] for one in found):.2f}",
                f"{max(one['bytes'] for one in found) / 2**20:.0f}",
            ]
            for name, found in times.items()
        ],
    )
    text = f"{_TEXT}\n## Activations of one row of {WIDTH} tokens\n\n{first}\n## A mixture of experts\n\n{second}"
    print(text)
    if given.write:
        write_results("parallel_dimensions", text, {"memory": kept, "speed": times})


if __name__ == "__main__":
    main()
