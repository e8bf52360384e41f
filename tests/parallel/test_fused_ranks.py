"""Fused runs on several processes: one base, in copies or in shards, and each member's gradient that of a run alone."""

import dataclasses

import pytest
import torch
from fused_members import KINDS, Member, alone, attach, base
from test_parallel_runs import COMMON, DRY, data, rows_of, same  # noqa: F401
from worker_pool import mesh_of, pool

from swift.config.sections.parallel import ParallelSection
from swift.config.sections.quantization import QuantizationSection
from swift.data.batching import deal
from swift.models.head import split_head
from swift.models.sharded import local
from swift.parallel.data_parallel import Ranks, ShardOptions
from swift.parallel.distribute import distribute
from swift.parallel.fused import fused_gradients
from swift.parallel.layout import Layout
from swift.parallel.world import World

LAYOUTS = {"copies": Layout(dp_replicate=2), "shards": Layout(dp_shard=2)}
GROUP = [dataclasses.replace(kind, tuner={**kind.tuner, "lora_dropout": 0.0}) for kind in KINDS]


def nothing(batch):
    """A micro-batch of a rank that others have left without work."""
    batch = dataclasses.replace(
        batch, targets=torch.full_like(batch.targets, -100), num_tokens=0, num_targets=0
    )
    batch.target_counts = [0] * len(batch.target_counts or [])
    return batch


def members_of(rank, model_dir, layout, dtype, kinds, **options):
    """Members on this rank's part of a base; the second half of them join when it is divided already."""
    world = World(rank, layout, mesh_of(layout))
    model, members, divided = base(model_dir, dtype, **options), [], None
    for at, kind in enumerate(kinds):
        parts = divided.split if divided else None
        known = {"split": lambda one, parts=parts: (parts[0], one.get_output_embeddings())} if parts else {}
        member = attach(model, kind, f"m{at}", dtype, **known)
        if divided is None and at >= len(kinds) // 2:
            whole = frozenset(p for p in model.parameters() if p.requires_grad)
            shards = ShardOptions(whole=whole) if layout.dp_shard > 1 else None
            divided = distribute(model, world, split_head(model), ParallelSection(), shards)
        members.append(member)
    for member in members:
        head = model.get_output_embeddings()
        member.engine._split = (divided.split[0], head)
        member.engine.ranks = Ranks(world, member.parameters, keeps_whole=True, **divided.parts)
    return members


def grouped(rank, model_dir, name, dtype, options):
    layout = LAYOUTS[name]
    kinds = [kind for kind in GROUP if not options or kind.loss != "dpo"]
    members = members_of(rank, model_dir, layout, dtype, kinds, **options)
    frozen = [p for p in members[0].engine.model.parameters() if not p.requires_grad]
    share = sum(local(p).numel() for p in frozen) / sum(p.numel() for p in frozen)
    steps = []
    for member in members:
        step = member.step()
        mine = deal(step.batches, (layout.data_rank(rank), layout.dp), nothing(step.batches[0]))
        steps.append(dataclasses.replace(step, batches=mine))
    outputs = fused_gradients(steps, members[0].engine._switch)
    losses = members[0].engine.ranks.world.sums([float(output.loss) for output in outputs])
    return losses, [member.gradients() for member in members], share


@pytest.mark.parametrize(
    ("name", "dtype", "limit", "options"),
    [
        ("copies", torch.float64, 1e-12, {}),
        ("shards", torch.float64, 1e-12, {}),
        pytest.param(
            "shards",
            torch.float32,
            1e-5,
            {"quantization": QuantizationSection(quant_method="bnb", quant_bits=4)},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["copies", "shards", "4-bit shards"],
)
def test_every_member_learns_what_it_would_alone(tiny_model_dir, name, dtype, limit, options):
    results = pool(2).run(grouped, tiny_model_dir, name, dtype, options)
    kinds = [kind for kind in GROUP if not options or kind.loss != "dpo"]
    for at, kind in enumerate(kinds):
        single: Member = attach(base(tiny_model_dir, dtype, **options), kind, "default", dtype)
        loss = float(alone(single).loss)
        expected = single.gradients()
        size = torch.stack([gradient.norm() for gradient in expected]).norm()
        for losses, gradients, share in results:
            assert losses[at] == pytest.approx(loss, rel=limit * 10)
            distance = torch.stack(
                [(a - b).norm() for a, b in zip(gradients[at], expected, strict=True)]
            ).norm()
            assert float(distance / size) < limit, kind.name
            assert share == 1 if name == "copies" else share < 0.6


def train_group(rank, runs):
    import os

    os.environ["SWIFT_HOME"] = str(runs[0]["output_dir"]) + "/home"
    from swift.config.bind import resolve
    from swift.train.fused import train_fused

    members = train_fused([resolve("sft", values=one) for one in runs], say=lambda text: None)
    for member in members:
        if member.error:
            raise member.error
    return [member.result.folder for member in members] if rank == 0 else None


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [{}, {"fsdp": "full"}], ids=["copies", "shards"])
def test_runs_on_two_ranks_report_what_each_does_alone(tiny_model_dir, data, tmp_path, monkeypatch, sharded):  # noqa: F811
    from test_parallel_runs import alone as run_alone

    common = {**COMMON, **DRY, "model": str(tiny_model_dir), "dataset": str(data / "chat.jsonl")}
    common |= {"split_dataset_ratio": 0.1, "eval_steps": 2, "save_strategy": "steps", "save_steps": 3}
    special = [
        {"lora_rank": 4},
        {"learning_rate": 3e-3, "seed": 7, "max_steps": 3},
        {"global_batch_size": 12},
    ]
    expected = [
        rows_of(run_alone("sft", {**common, **one, "output_dir": str(tmp_path / f"one-{at}")}, monkeypatch))
        for at, one in enumerate(special)
    ]
    for key, value in (("RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(key, value)
    runs = [
        {**common, **one, **sharded, "output_dir": str(tmp_path / f"two-{at}")}
        for at, one in enumerate(special)
    ]
    folders, _ = pool(2).run(train_group, [{**one, "nproc_per_node": 2} for one in runs])
    for folder, rows in zip(folders, expected, strict=True):
        same(rows_of(folder), rows)
        assert (folder / "last" / "adapter_model.safetensors").is_file()
