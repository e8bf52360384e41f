"""What our engine costs on top of a hand-written FSDP2 loop, on two gloo ranks of one thread.

    python benchmarks/fsdp_overhead.py [--steps 40] [--write]

Both train all weights of the 6.8M-parameter Qwen3 of `make_work.py` on the same batches, sharded layer by layer over
two processes. The hand-written loop is what one would write for this one job: `fully_shard`, a forward pass, the
log-probabilities of the targets by the same function that the engine uses (so that only the engine is compared), the
step's target count summed over the ranks, clipping by the global norm, AdamW. They take turns in the same processes,
step by step, so that what else the machine does falls on both; figures are CPU-seconds of both ranks a step, and the
median of the ratios of neighbouring steps with its 95 % interval.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from make_work import make_work
from measure import described_parser, markdown_table, write_results

_TEXT = """# The engine beside a hand-written FSDP2 loop

`python benchmarks/fsdp_overhead.py --write`: all weights of a 6.8M-parameter Qwen3, two gloo ranks of one thread each,
4 rows of 128 tokens, two micro-batches a step, the same head function on both sides; both take turns in the same
processes.
"""

ROWS, WIDTH, MICRO_BATCHES = 4, 128, 2
WARM_UP = 4


def batches(step: int, rank: int) -> list[Any]:
    """Rows of random tokens, each of which is learned."""
    import torch

    from swift.data.collate import Batch

    generator = torch.Generator().manual_seed(2 * step + rank)
    found = []
    for _ in range(MICRO_BATCHES):
        ids = torch.randint(3, 1000, (ROWS, WIDTH), generator=generator)
        targets = torch.full_like(ids, -100)
        targets[:, :-1] = ids[:, 1:]
        positions = torch.arange(WIDTH).repeat(ROWS, 1)
        count = ROWS * (WIDTH - 1)
        found.append(Batch(ids, positions, targets, None, None, ROWS * WIDTH, count, [], []))
    return found


class ByHand:
    """The loop that one would write."""

    def __init__(self, folder: Path, mesh: Any) -> None:
        import torch
        from torch import nn
        from torch.distributed.fsdp import FSDPModule, fully_shard

        from swift.models.load import load_model
        from swift.objectives.logprobs import linear_logprobs

        self.model = load_model(folder, dtype=torch.float32).train()

        class Loss(nn.Module):
            def __init__(self, model: Any) -> None:
                super().__init__()
                self.model = model

            def forward(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
                hidden = self.model.model(input_ids=ids, use_cache=False).last_hidden_state
                wanted = targets != -100
                logprobs, _ = linear_logprobs(
                    hidden[wanted], self.model.lm_head.weight, targets[wanted], chunk_size=1024
                )
                return -logprobs.sum()

        for layer in self.model.model.layers:
            fully_shard(layer, mesh=mesh)
        self.loss = fully_shard(Loss(self.model), mesh=mesh)
        for module in self.loss.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)

    def step(self, found: list[Any]) -> None:
        import torch
        from torch import distributed

        count = torch.tensor(float(sum(batch.num_targets for batch in found)))
        distributed.all_reduce(count)
        for batch in found:
            (self.loss(batch.input_ids, batch.targets) / count).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


class Ours:
    """The same through the engine."""

    def __init__(self, folder: Path, world: Any) -> None:
        import torch

        from swift.models.load import load_model
        from swift.objectives.sft import SftObjective
        from swift.parallel.data_parallel import Ranks, ShardOptions, shard_model
        from swift.parallel.engine import ParameterSet
        from swift.parallel.native import NativeEngine

        model = load_model(folder, dtype=torch.float32)
        split = (model.model, model.lm_head)
        root = shard_model(model, model.model.layers, world, ShardOptions())
        parameters = dict(model.named_parameters())
        optimizer = torch.optim.AdamW(parameters.values(), lr=1e-4)
        sets = [ParameterSet("default", parameters, optimizer, lambda step: 1e-4, 1.0)]
        self.engine = NativeEngine(
            model,
            sets,
            device=torch.device("cpu"),
            dtype=torch.float32,
            split=lambda _: split,
            ranks=Ranks(world, parameters, root),
        )
        self.objective = SftObjective()

    def step(self, found: list[Any]) -> None:
        self.engine.forward_backward(found, self.objective, 0)
        self.engine.clip()
        self.engine.step(0)


def work(rank: int, folder: Path, model: Path, steps: int, results: Any) -> None:
    import torch
    from torch import distributed

    from swift.parallel.layout import Layout
    from swift.parallel.mesh import build_mesh
    from swift.parallel.world import World

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    layout = Layout(dp_shard=2)
    world = World(rank, layout, build_mesh(layout, "cpu"))
    loops: dict[str, Any] = {
        "by hand": ByHand(model, world.mesh["dp_shard_cp"]),  # type: ignore[index]
        "engine": Ours(model, world),
    }
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for step in range(WARM_UP + steps):
        found = batches(step, rank)
        for name in list(loops) if step % 2 else list(loops)[::-1]:
            distributed.barrier()
            started = time.process_time()
            loops[name].step(found)
            seconds[name].append(time.process_time() - started)
    results.put((rank, {name: values[WARM_UP:] for name, values in seconds.items()}))
    distributed.barrier()
    results.close()
    results.join_thread()
    os._exit(0)


def main() -> None:
    import torch

    parser = described_parser(__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--write", action="store_true", help="write results/fsdp_overhead.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, _ = make_work(folder)
        context = multiprocessing.get_context("spawn")
        results = context.Queue()
        ranks = [
            context.Process(target=work, args=(rank, folder, model, options.steps, results))
            for rank in (0, 1)
        ]
        for rank in ranks:
            rank.start()
        found = dict(results.get(timeout=900) for _ in ranks)
        for rank in ranks:
            rank.join(60)
    totals = {loop: [a + b for a, b in zip(found[0][loop], found[1][loop], strict=True)] for loop in found[0]}
    ratios = [ours / hand for ours, hand in zip(totals["engine"], totals["by hand"], strict=True)]
    draws = torch.tensor(ratios)[torch.randint(len(ratios), (10_000, len(ratios)))].median(1).values
    low, high = torch.quantile(draws, torch.tensor([0.025, 0.975])).tolist()
    table = markdown_table(
        ["", "CPU-s a step (both ranks)", "x by hand [95 % interval]"],
        [
            ["by hand", f"{statistics.median(totals['by hand']):.3f}", "1"],
            [
                "engine",
                f"{statistics.median(totals['engine']):.3f}",
                f"{statistics.median(ratios):.3f} [{low:.3f}, {high:.3f}]",
            ],
        ],
    )
    print(table)
    print(json.dumps({"ratios": [round(ratio, 4) for ratio in ratios]}))
    if options.write:
        write_results("fsdp_overhead", f"{_TEXT}\n{table}", {"seconds": totals, "ratios": ratios})


if __name__ == "__main__":
    main()
