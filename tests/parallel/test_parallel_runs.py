"""Whole runs on several ranks: the metrics of one process; a checkpoint goes on with any number of ranks."""

import json
import random
import shutil
from pathlib import Path

import pytest
from worker_pool import pool, slow_but

from swift.runs.metrics import read_metrics

COMMON = {
    "max_length": 160,
    "per_device_train_batch_size": 2,
    "global_batch_size": 8,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "max_steps": 5,
    "lora_dropout": 0.1,
    "save_strategy": "no",
    "max_restarts": 0,
}
WORDS = "one two three red blue green cat dog bird runs sleeps sings".split()


def _sentence(generator, longest):
    return " ".join(generator.choice(WORDS) for _ in range(generator.randint(1, longest)))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """60 conversations, called good or bad; 40 with a worse answer beside."""
    folder, generator = tmp_path_factory.mktemp("rows"), random.Random(3)
    with (
        (folder / "chat.jsonl").open("w") as chat,
        (folder / "pairs.jsonl").open("w") as pairs,
        (folder / "judged.jsonl").open("w") as judged,
    ):
        for number in range(60):
            question, answer = (_sentence(generator, longest) for longest in (8, 16))
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            chat.write(json.dumps({"messages": messages}) + "\n")
            judged.write(json.dumps({"messages": messages, "label": number % 3 > 0}) + "\n")
            if number < 40:
                pairs.write(
                    json.dumps({"messages": messages, "rejected_response": _sentence(generator, 16)}) + "\n"
                )
    return folder


def train_on(rank, command, options):
    """Train as one of several ranks, or alone; rank 0 returns the run folder."""
    import os

    if options.get("tuner_type") == "full":
        options = {key: value for key, value in options.items() if key != "lora_dropout"}

    os.environ["SWIFT_HOME"] = str(Path(options["output_dir"]) / "home")
    from swift.config.bind import resolve
    from swift.train.run import train

    result = train(resolve(command, values=options), say=lambda text: None)
    return result.folder if rank == 0 else None


def alone(command, options, monkeypatch):
    """The same run in this process."""
    monkeypatch.setenv("SWIFT_HOME", str(Path(options["output_dir"]) / "home"))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return train_on(0, command, options)


def rows_of(folder):
    kept = (
        "step",
        "loss",
        "grad_norm",
        "token_accuracy",
        "num_tokens",
        "eval_loss",
        "eval_token_accuracy",
        "accuracy",
    )
    return [{key: row[key] for key in kept if key in row} for row in read_metrics(folder / "metrics.jsonl")]


def same(found, expected, rel=2e-5):
    assert len(found) == len(expected) > 0
    for row, other in zip(found, expected, strict=True):
        assert row == pytest.approx(other, rel=rel, abs=1e-6)


LAYOUT = (
    *("fsdp", "deepspeed", "tensor_parallel_size", "tp_size", "sequence_parallel", "pipeline_parallel_size"),
    *("pp_size", "context_parallel_size", "sequence_parallel_size", "use_ring_attention"),
)
AGAIN = {"gradient_checkpointing": True}
DRY = {"lora_dropout": 0.0}  # what ranks drop is their own
CASES = {
    "lora, copies": ("sft", {}),
    "lora, shards": ("sft", {"fsdp": "full"}),
    "full, shards, packed": (
        "sft",
        {"fsdp": "full", "tuner_type": "full", "packing": True, "global_batch_size": 4},
    ),
    "full, grads, evaluated": (
        "sft",
        {"deepspeed": "zero2", "tuner_type": "full", "split_dataset_ratio": 0.1, "eval_steps": 2},
    ),
    "padded, uneven, evaluated": (
        "sft",
        {"global_batch_size": 12, "padding_free": False, "split_dataset_ratio": 0.15, "eval_steps": 3},
    ),
    "pre-training, offloaded": ("pt", {"deepspeed": "zero3_offload", "tuner_type": "full"}),
    "stopped early": (
        "sft",
        {
            "fsdp": "full",
            "split_dataset_ratio": 0.1,
            "eval_steps": 1,
            "early_stop_interval": 2,
            "metric_for_best_model": "eval_loss",
            "greater_is_better": True,  # the loss falls: never better
        },
    ),
    "stream": ("sft", {"streaming": True, "shuffle_buffer_size": 20}),
    "dpo, copies": ("rlhf", {"rlhf_type": "dpo"}),
    "dpo, shards": ("rlhf", {"rlhf_type": "dpo", "fsdp": "full"}),
    "dpo, full, shards": (
        "rlhf",
        {"rlhf_type": "dpo", "fsdp": "full", "tuner_type": "full", "learning_rate": 1e-3},
    ),
    "layers shared": ("sft", {"tensor_parallel_size": 2, "split_dataset_ratio": 0.1, "eval_steps": 2, **DRY}),
    "layers and sequence shared": (
        "sft",
        {"tp_size": 2, "sequence_parallel": True, "tuner_type": "full", **AGAIN},
    ),
    "layers shared, dpo": ("rlhf", {"rlhf_type": "dpo", "tp_size": 2, **DRY}),
    "sequence shared": (
        "sft",
        {"sequence_parallel_size": 2, "split_dataset_ratio": 0.1, "eval_steps": 2, **DRY},
    ),
    "sequence in a ring": (
        "pt",
        {"use_ring_attention": True, "tuner_type": "full", "packing": True, **AGAIN},
    ),
    "sequence shared, dpo": ("rlhf", {"rlhf_type": "dpo", "context_parallel_size": 2, **DRY}),
    "stages": ("sft", {"pipeline_parallel_size": 2, "split_dataset_ratio": 0.1, "eval_steps": 2}),
    "stages, full": ("pt", {"pp_size": 2, "tuner_type": "full", "gradient_checkpointing": True}),
    "stages, dpo": ("rlhf", {"rlhf_type": "dpo", "pp_size": 2, "gradient_checkpointing": True}),
}


FULL_DPO = {"rlhf_type": "dpo", "tuner_type": "full", "learning_rate": 1e-3}
CASES |= {
    "layers shared, dpo, full": ("rlhf", {"tp_size": 2, **FULL_DPO}),
    "sequence shared, dpo, full": ("rlhf", {"context_parallel_size": 2, **FULL_DPO}),
    "stages, dpo, full": ("rlhf", {"pp_size": 2, **FULL_DPO}),
    "layers shared, rewards": ("rlhf", {"rlhf_type": "rm", "tp_size": 2, "sequence_parallel": True, **DRY}),
    "sequence shared, rewards": ("rlhf", {"rlhf_type": "rm", "context_parallel_size": 2, **DRY}),
    "sequence in a ring, rewards, full": (
        "rlhf",
        {**FULL_DPO, "rlhf_type": "rm", "use_ring_attention": True, "split_dataset_ratio": 0.2},
    ),
    "layers shared, kto": ("rlhf", {"rlhf_type": "kto", "tp_size": 2, **DRY}),
    "sequence shared, kto": ("rlhf", {"rlhf_type": "kto", "context_parallel_size": 2, **DRY}),
    "stages, kto": ("rlhf", {"rlhf_type": "kto", "pp_size": 2, "split_dataset_ratio": 0.2, **DRY}),
}


SLOW = (
    *(name for name in CASES if name.endswith(("dpo, full", "kto", "rewards", "rewards, full"))),
    "lora, shards",
    "dpo, copies",
    "full, grads, evaluated",
    "sequence shared",
    "layers and sequence shared",
    "layers shared, dpo",
    "sequence shared, dpo",
    "stages, full",
    "stages, dpo",
)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in CASES]
)
def test_two_ranks_report_what_one_process_does(tiny_model_dir, data, tmp_path, monkeypatch, name):
    command, special = CASES[name]
    file = "judged.jsonl" if "kto" in name else "pairs.jsonl" if command == "rlhf" else "chat.jsonl"
    options = {**COMMON, "model": str(tiny_model_dir), "dataset": str(data / file), **special}
    if command == "pt":
        options["loss_scale"] = "all"
    single = {key: value for key, value in options.items() if key not in LAYOUT}
    expected = rows_of(alone(command, {**single, "output_dir": str(tmp_path / "one")}, monkeypatch))
    assert len(expected) >= 5
    folder, _ = pool(2).run(train_on, command, {**options, "output_dir": str(tmp_path / "two")})
    same(rows_of(folder), expected)
    if name == "stopped early":
        assert max(row["step"] for row in expected) == 3
    assert {path.name for path in (folder / "logs").iterdir()} >= {
        "rank-0.jsonl",
        "rank-1.jsonl",
        "rank-1.txt",
    }
    assert json.loads((folder / "ranks" / "1" / "status.json").read_text())["state"] == "succeeded"


def _resumed(folder, target):
    """The checkpoint of step 3 in a copy of a run that knows nothing of what came later."""
    shutil.copytree(folder, target, symlinks=True)
    file = target / "metrics.jsonl"
    known = [line for line in file.read_text().splitlines(True) if json.loads(line).get("step", 0) <= 3]
    file.write_text("".join(known))
    return str(target / "checkpoint-3")


@pytest.mark.parametrize("tuner", slow_but(["lora"], ["lora", "full"]))
def test_a_checkpoint_goes_on_with_any_number_of_ranks(tiny_model_dir, data, tmp_path, monkeypatch, tuner):
    """Saved by four ranks in two copies of two shards; the same samples in the same steps follow."""
    options = {
        **COMMON,
        "model": str(tiny_model_dir),
        "dataset": str(data / "chat.jsonl"),
        "tuner_type": tuner,
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
        "num_train_epochs": 3,
    }
    if tuner == "full":
        options["learning_rate"] = 1e-3
    four = {**options, "data_parallel_shard_size": 2, "output_dir": str(tmp_path / "four")}
    folder, *_ = pool(4).run(train_on, "sft", four)
    expected = rows_of(folder)
    same(rows_of(alone("sft", {**options, "output_dir": str(tmp_path / "one")}, monkeypatch)), expected)
    for size in (1, 2, 3, 4):
        for name, value in (("RANK", "0"), ("WORLD_SIZE", str(size))):
            monkeypatch.setenv(name, value)
        target = tmp_path / f"on-{size}"
        more = {**options, "output_dir": str(tmp_path), "resume_from_checkpoint": _resumed(folder, target)}
        if size == 1:
            alone("sft", more, monkeypatch)
        else:
            sharded = {"fsdp": "full"} if size != 4 else {"data_parallel_shard_size": 2}
            pool(size).run(train_on, "sft", {**more, **sharded})
        same(rows_of(target), expected)
        if size == 4:
            assert rows_of(target) == expected, "with the same ranks it is bit-identical"


ON_EXPERTS = {
    "tuner_type": "lora",
    "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    "lora_dropout": 0.0,
}
LAYOUTS = {
    "layers and shards": (4, {"tp_size": 2, "data_parallel_shard_size": 2}),
    "stages": (2, {"pp_size": 2}),
    "stages of shared layers": (4, {"pp_size": 2, "tp_size": 2, "sequence_parallel": True}),
    "sequence": (2, {"context_parallel_size": 2}),
}


@pytest.mark.slow
@pytest.mark.parametrize("tuner", ["lora", "full"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_checkpoint_goes_on_in_another_layout(tiny_model_dir, data, tmp_path, monkeypatch, name, tuner):
    options = {
        **COMMON,
        **DRY,
        "model": str(tiny_model_dir),
        "dataset": str(data / "chat.jsonl"),
        "tuner_type": tuner,
        "learning_rate": 1e-3,
        "max_steps": 5,
        "save_strategy": "steps",
        "save_steps": 3,
    }
    size, layout = LAYOUTS[name]
    for key, value in (("RANK", "0"), ("WORLD_SIZE", str(size))):
        monkeypatch.setenv(key, value)
    folder, *_ = pool(size).run(train_on, "sft", {**options, **layout, "output_dir": str(tmp_path / "all")})
    expected = rows_of(folder)
    same(rows_of(alone("sft", {**options, "output_dir": str(tmp_path / "one")}, monkeypatch)), expected)
    others = {"one": (1, {}), "shards": (3, {"fsdp": "full"}), "the same": (size, layout)}
    for place, (ranks, other) in others.items():
        for key, value in (("RANK", "0"), ("WORLD_SIZE", str(ranks))):
            monkeypatch.setenv(key, value)
        target = tmp_path / f"on {place}"
        more = {
            **options,
            **other,
            "output_dir": str(tmp_path),
            "resume_from_checkpoint": _resumed(folder, target),
        }
        if ranks == 1:
            alone("sft", more, monkeypatch)
        else:
            pool(ranks).run(train_on, "sft", more)
        same(rows_of(target), expected)
    assert rows_of(tmp_path / "on the same") == expected, "with the same ranks it is bit-identical"


@pytest.mark.parametrize(
    "layout",
    [
        {"fsdp": "full", "expert_parallel_size": 2},
        pytest.param({"tp_size": 2, "ep_size": 2, "sequence_parallel": True}, marks=pytest.mark.slow),
        pytest.param({"pp_size": 2}, marks=pytest.mark.slow),
        pytest.param({"fsdp": "full", "ep_size": 2, **ON_EXPERTS}, marks=pytest.mark.slow),
        pytest.param({"fsdp": "full", **ON_EXPERTS}, marks=pytest.mark.slow),
        pytest.param({"tp_size": 2, "ep_size": 2, **ON_EXPERTS}, marks=pytest.mark.slow),
    ],
)
def test_experts_are_shared_saved_and_go_on_in_one_process(data, tmp_path, monkeypatch, layout):
    from swift.models.tiny import make_tiny_model

    model = make_tiny_model(tmp_path / "moe", architecture="qwen3_moe", texts=[" ".join(WORDS)])
    options = {
        **COMMON,
        "model": str(model),
        "dataset": str(data / "chat.jsonl"),
        "tuner_type": "full",
        "learning_rate": 1e-3,
        "save_strategy": "steps",
        "save_steps": 3,
        **{key: layout[key] for key in ON_EXPERTS if key in layout},
    }
    for key, value in (("RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(key, value)
    folder, _ = pool(2).run(train_on, "sft", {**options, **layout, "output_dir": str(tmp_path / "two")})
    same(
        rows_of(alone("sft", {**options, "output_dir": str(tmp_path / "one")}, monkeypatch)), rows_of(folder)
    )
    target = tmp_path / "on"
    alone(
        "sft",
        {**options, "output_dir": str(tmp_path), "resume_from_checkpoint": _resumed(folder, target)},
        monkeypatch,
    )
    same(rows_of(target), rows_of(folder))


def test_shards_go_on_from_what_one_process_has_saved(tiny_model_dir, data, tmp_path, monkeypatch):
    options = {
        **COMMON,
        "model": str(tiny_model_dir),
        "dataset": str(data / "chat.jsonl"),
        "tuner_type": "full",
        "learning_rate": 1e-3,
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
    }
    folder = alone("sft", {**options, "output_dir": str(tmp_path / "one")}, monkeypatch)
    more = {
        **options,
        "output_dir": str(tmp_path),
        "resume_from_checkpoint": _resumed(folder, tmp_path / "on"),
    }
    pool(2).run(train_on, "sft", {**more, "fsdp": "full"})
    same(rows_of(tmp_path / "on"), rows_of(folder))


def test_a_sharded_model_is_written_as_transformers_does(tiny_model_dir, data, tmp_path):
    """In several files when it is large; loaded by transformers, tied weights once."""
    import torch
    from transformers import AutoModelForCausalLM

    from swift.models.load import load_model
    from swift.train.weights import save_gathered

    model = load_model(tiny_model_dir, dtype=torch.float32)
    folder = tmp_path / "saved"
    folder.mkdir()
    save_gathered(model, folder, torch.float32, dict.items, file_bytes=100_000)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    again = AutoModelForCausalLM.from_pretrained(folder)
    expected = model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())
