"""Fused LoRA runs beside the same runs one after another, and in processes of their own; what their memory is.

    $ python benchmarks/fused.py                    # some ten minutes on a quiet machine
    $ python benchmarks/fused.py --rounds 2 --members 4 --tokens 64 --no_processes    # a look

K members (LoRA of rank 8 on all linear layers, dropout off) train on one Qwen3 of hidden size 512 with 8 layers; a
step of a member is one row of so many tokens, forward, backward, clipping and AdamW. One after another and fused take
turns in this process at every number of threads; each is judged at its best. Separate processes have a model each and
share the cores: they start together, and the last to be ready ends the round. Memory is that of living tensors after a
step: the base once, and what every member holds (A, B and AdamW's two moments).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from measure import describe_machine, described_parser, markdown_table, write_results

HIDDEN, LAYERS, VOCAB, RANK = 512, 8, 4096, 8
WARM_UP = 1


@dataclass
class Member:
    name: str
    engine: Any
    batch: Any
    parameters: dict[str, Any]


def make(num_members: int, tokens: int) -> tuple[list[Member], Any, Any]:
    """Members on one model; (members, switch, model)."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from swift.config.sections.tuner import TunerSection
    from swift.core.heap import keep_freed_memory
    from swift.data.collate import Batch
    from swift.models.attention import VARLEN, register_varlen_attention
    from swift.parallel.engine import ParameterSet
    from swift.parallel.native import NativeEngine
    from swift.tuners.apply import apply_tuner

    keep_freed_memory()  # as every training on a CPU does
    register_varlen_attention()
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=HIDDEN,
        intermediate_size=3 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=HIDDEN // 8,
        vocab_size=VOCAB,
        tie_word_embeddings=True,
        attn_implementation=VARLEN,
        use_cache=False,
    )
    model = Qwen3ForCausalLM(config)
    members, switch = [], None
    for number in range(num_members):
        section = TunerSection(lora_rank=RANK, lora_dropout=0.0)
        tuned = apply_tuner(model, section, seed=number, adapter_name=f"m{number}")
        parameters, switch = tuned.named_trainable(), tuned.switch
        optimizer = torch.optim.AdamW(parameters.values(), lr=1e-4, fused=True)
        group = ParameterSet("default", parameters, optimizer, lambda step: 1e-4, 1.0)
        engine = NativeEngine(model, [group], device=torch.device("cpu"), dtype=torch.float32)
        ids = torch.randint(3, VOCAB, (1, tokens), generator=torch.Generator().manual_seed(number))
        targets = torch.full_like(ids, -100)
        targets[:, :-1] = ids[:, 1:]
        positions = torch.arange(tokens)[None]
        batch = Batch(ids, positions, targets, None, [[tokens]], tokens, tokens - 1, [], [])
        members.append(Member(f"m{number}", engine, batch, parameters))
    return members, switch, model


def one_after_another(members: list[Member], switch: Any, objective: Any) -> None:
    for member in members:
        with switch.use(member.name):
            member.engine.forward_backward([member.batch], objective)
        member.engine.clip()
        member.engine.step(0)


def fused(members: list[Member], switch: Any, objective: Any) -> None:
    from swift.parallel.fused import MemberStep, fused_gradients

    steps = [MemberStep(member.name, member.engine, [member.batch], objective) for member in members]
    fused_gradients(steps, switch)
    for member in members:
        member.engine.clip()
        member.engine.step(0)


def timed(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def compare(num_members: int, tokens: int, rounds: int, threads: list[int]) -> dict[str, Any]:
    """Seconds of one step of all members; plans and numbers of threads take turns."""
    import torch

    from swift.objectives.sft import SftObjective

    members, switch, _ = make(num_members, tokens)
    objective = SftObjective()
    plans = {"one after another": one_after_another, "fused": fused}
    seconds: dict[str, dict[int, list[float]]] = {name: {n: [] for n in threads} for name in plans}
    for number in range(rounds + WARM_UP):
        for count in threads:
            torch.set_num_threads(count)
            for name, plan in plans.items():
                spent = timed(lambda plan=plan: plan(members, switch, objective))  # type: ignore[misc]
                if number >= WARM_UP:
                    seconds[name][count].append(spent)
    best = {name: min(found, key=lambda n: statistics.median(found[n])) for name, found in seconds.items()}
    ratios = [
        first / second
        for first, second in zip(
            seconds["one after another"][best["one after another"]],
            seconds["fused"][best["fused"]],
            strict=True,
        )
    ]
    return {
        "members": num_members,
        "tokens": tokens,
        "threads": best,
        "seconds": {name: statistics.median(found[best[name]]) for name, found in seconds.items()},
        "speedup": statistics.median(ratios),
        "speedup_rounds": [round(ratio, 3) for ratio in ratios],
    }


def processes(num_members: int, tokens: int, rounds: int, cores: int) -> float:
    """Seconds of one step of all members in so many processes as there are cores, one thread each; the median."""
    command = [sys.executable, __file__, "--worker", "--tokens", str(tokens), "--rounds", str(rounds)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    shares = [len(range(first, num_members, cores)) for first in range(min(cores, num_members))]
    pipe = subprocess.PIPE
    workers = [
        subprocess.Popen([*command, "--members", str(n)], stdin=pipe, stdout=pipe, text=True, env=env)
        for n in shares
    ]
    try:
        for worker in workers:
            assert worker.stdout is not None and worker.stdout.readline().strip() == "ready"
        spent = []
        for _ in range(rounds):
            start = time.perf_counter()
            for worker in workers:
                assert worker.stdin is not None
                worker.stdin.write("go\n")
                worker.stdin.flush()
            for worker in workers:
                assert worker.stdout is not None and worker.stdout.readline().strip() == "done"
            spent.append(time.perf_counter() - start)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    return statistics.median(spent)


def work(num_members: int, tokens: int, rounds: int) -> None:
    """A process of its own: its share of the members, a model of its own, at the word of the parent."""
    from swift.objectives.sft import SftObjective

    members, switch, _ = make(num_members, tokens)
    objective = SftObjective()
    one_after_another(members, switch, objective)
    print("ready", flush=True)
    for _ in range(rounds):
        sys.stdin.readline()
        one_after_another(members, switch, objective)
        print("done", flush=True)


def memory(num_members: int) -> dict[str, float]:
    """Bytes of living tensors after a step, and what they should be: the base once and everybody's own parts."""
    import gc

    import torch

    from swift.objectives.sft import SftObjective

    members, switch, model = make(num_members, 64)
    fused(members, switch, SftObjective())
    gc.collect()
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in gc.get_objects()
        if issubclass(type(tensor), torch.Tensor)  # isinstance would wake lazy modules
    }
    for member in members:  # the optimizer's state is in dictionaries that the collector does not list
        for state in member.engine.parameter_sets["default"].optimizer.state.values():
            for tensor in state.values():
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    own = sum(p.numel() for member in members for p in member.parameters.values()) * 4 * 3
    every = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    base = sum(every.values()) - own // 3
    return {"measured_bytes": sum(storages.values()), "expected_bytes": base + own, "base_bytes": base}


def report(rows: list[dict[str, Any]], held: dict[str, float]) -> str:
    """The figures as text."""
    plans = list(dict.fromkeys(plan for row in rows for plan in row["seconds"]))
    header = [
        "members",
        "tokens each",
        *(f"{plan} (s)" for plan in plans),
        "fused: times as fast as one by one",
    ]
    cells = [
        [
            str(row["members"]),
            str(row["tokens"]),
            *(f"{row['seconds'][plan]:.3f}" if plan in row["seconds"] else "-" for plan in plans),
            f"{row['speedup']:.2f}",
        ]
        for row in rows
    ]
    memory = f"Living tensors after a step: {held['share_of_expected']:.3f} of base once + the members' own parts.\n"
    return "# Fused LoRA runs\n\n" + markdown_table(header, cells) + "\n\n" + memory


def main() -> None:
    parser = described_parser(__doc__)
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument("--no_processes", action="store_true")
    parser.add_argument("--write", action="store_true", help="store the figures in results/")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.members, options.tokens[0], options.rounds)
        return
    rows = []
    for tokens in options.tokens:
        row = compare(options.members, tokens, options.rounds, options.threads)
        if not options.no_processes:
            cores = os.cpu_count() or 1
            row["seconds"]["separate processes"] = processes(options.members, tokens, options.rounds, cores)
        rows.append(row)
        print(json.dumps(row))
    held = memory(options.members)
    held["share_of_expected"] = round(held["measured_bytes"] / held["expected_bytes"], 4)
    print(json.dumps(held))
    if options.write:
        write_results("fused", report(rows, held), {**describe_machine(), "rows": rows, "memory": held})


if __name__ == "__main__":
    main()
