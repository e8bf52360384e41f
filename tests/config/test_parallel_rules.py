"""Layouts: open sizes are settled and explained, other tools' words become sizes, the rest is refused."""

import json
from pathlib import Path

import pytest

from swift.config.bind import dump_text, load_run_config, resolve
from swift.config.fusing import fusing_problem
from swift.config.schema import Resolved
from swift.core.errors import ConfigError

NEEDED = ["--model", "m", "--dataset", "d"]
VARIABLES = (
    "NPROC_PER_NODE",
    "NNODES",
    "NODE_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
)


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def sizes(resolved: Resolved) -> tuple[int, int, int, int | None]:
    """Data, shards, copies, processes on this machine."""
    section = resolved.config.parallel
    return (
        section.data_parallel_size,
        section.data_parallel_shard_size,
        section.data_parallel_replicate_size,
        section.nproc_per_node,
    )


def refused(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve("sft", [*NEEDED, *words])
    return caught.value.render()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", (1, 1, 1, None)),
        ("--nproc_per_node 4", (4, 1, 4, 4)),
        ("--nproc_per_node 4 --fsdp full", (4, 4, 1, 4)),
        ("--nproc_per_node 4 --fsdp fsdp2", (4, 4, 1, 4)),
        ("--fsdp_num_shards 2 --nproc_per_node 4", (4, 2, 2, 4)),
        ("--fsdp_num_shards 2", (2, 2, 1, 2)),
        ("--dp_size 4 --data_parallel_replicate_size 2", (4, 2, 2, 4)),
        ("--nproc_per_node 4 --deepspeed zero0", (4, 1, 4, 4)),
        ("--nproc_per_node 4 --deepspeed zero2", (4, 4, 1, 4)),
        ("--nproc_per_node 2 --nnodes 2 --master_addr a --deepspeed zero3_offload", (4, 4, 1, 2)),
    ],
)
def test_open_sizes_are_settled(words: str, expected: tuple[int, ...]) -> None:
    resolved = resolve("sft", [*NEEDED, *words.split()])
    assert sizes(resolved) == expected
    section = resolved.config.parallel
    assert section.reshard_after_forward is ("zero2" not in words)
    assert section.offload is ("offload" in words)


def test_the_rest_of_the_processes_is_for_data() -> None:
    resolved = resolve("sft", [*NEEDED, *"--tp_size 2 --pp_size 2 --nproc_per_node 8".split()], planning=True)
    assert sizes(resolved) == (2, 1, 2, 8)
    assert str(resolved.sources["data_parallel_size"]) == "derived from --nproc_per_node: what is left"
    assert resolved.value("gradient_accumulation_steps") == 8, "sixteen samples over two processes"


def test_the_environment_says_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPROC_PER_NODE", "two")
    with pytest.raises(ConfigError, match="'two' is no number") as caught:
        resolve("sft", ["--model", "m", "--dataset", "d.jsonl"])
    assert caught.value.where == "NPROC_PER_NODE of the environment"
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    assert sizes(resolve("sft", NEEDED)) == (2, 1, 2, 2)
    assert sizes(resolve("sft", [*NEEDED, "--nproc_per_node", "4"])) == (4, 1, 4, 4)
    monkeypatch.setenv("NNODES", "3")
    assert refused().startswith("--nnodes: 3 machines have to know where they meet")
    monkeypatch.setenv("MASTER_ADDR", "first")
    resolved = resolve("sft", NEEDED)
    assert sizes(resolved) == (6, 1, 6, 2)
    assert (resolved.config.parallel.master_addr, resolved.config.parallel.nnodes) == ("first", 3)
    assert resolve("infer", ["--model", "m"]).warnings == []


def test_a_started_process_believes_its_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert "but not which of them" in refused()
    monkeypatch.setenv("RANK", "1")
    assert sizes(resolve("sft", NEEDED))[0] == 4
    assert refused("--dp_size", "2").startswith("WORLD_SIZE=4: 4 processes, but the sizes multiply to 2")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--nproc_per_node 3 --tp_size 2", "--nproc_per_node: 3 processes cannot be laid out"),
        (
            "--dp_size 4 --dp_shard 3",
            "--dp_shard: 1 copies of 3 shards are not 4 data-parallel processes",
        ),
        ("--dp_size 3 --ep_size 2", "--ep_size: 3 processes that share a copy of the model cannot be split"),
        ("--dp_size 2 --nproc_per_node 4", "--nproc_per_node: 4 processes, but the sizes multiply to 2"),
        ("--deepspeed zero4", "--deepspeed: 'zero4' is no stage of ZeRO"),
        ("--deepspeed none.json", "--deepspeed none.json: there is no such file"),
        ("--offload", "--offload: one process has nothing to shard"),
        ("--dp_size 2 --offload", "--offload: offloading is for sharded weights"),
        ("--parallel_method megatron --tp_size 2", "--parallel_method: Megatron-Core needs CUDA"),
        ("--use_megatron", "--use_megatron: Megatron-Core needs CUDA"),
        ("--fsdp full --dp_size 2 --tuner_type vera", "--tuner_type: vera cannot be sharded"),
        ("--fsdp full --dp_size 2 --optim muon", "--optim: muon works on whole matrices"),
        ("--fsdp full --dp_size 2 --quant_bits 8", "--quant_bits: of quantised bases only those of 4 bits"),
        ("--tp_size 2 --quant_bits 4", "--tp_size: the layers of a quantised base are not divided"),
        (
            "--pp_size 2 --val_dataset v --eval_tasks s.yaml",
            "--pp_size: eval_tasks are answered with whole models, and no process has all layers",
        ),
    ],
)
def test_impossible_layouts_are_refused(words: str, message: str) -> None:
    assert refused(*words.split()).startswith(message)


def test_tasks_of_a_group_are_measured_on_copies_only() -> None:
    words = [*NEEDED, *"--dp_size 2 --val_dataset v --eval_tasks s.yaml".split()]
    assert fusing_problem(resolve("sft", words, planning=True).config) is None
    problem = fusing_problem(resolve("sft", [*words, "--fsdp", "full"], planning=True).config)
    assert problem is not None and problem[0] == "--eval_tasks"


def test_a_ring_takes_all_processes() -> None:
    words = [*NEEDED, "--use_ring_attention", "True"]
    assert "one process holds the whole sequence" in resolve("sft", words, planning=True).warnings[0]
    section = resolve("sft", [*words, "--nproc_per_node", "4"], planning=True).config.parallel
    assert (section.context_parallel_size, section.data_parallel_size) == (4, 1)
    section = resolve(
        "sft", [*words, *"--nproc_per_node 4 --fsdp_num_shards 2".split()], planning=True
    ).config.parallel
    assert (section.context_parallel_size, section.data_parallel_shard_size) == (2, 2)


def test_mixes_of_the_articles_are_planned_as_what_is_meant() -> None:
    words = "--parallel_method megatron --tensor_parallel_size 4 --pipeline_parallel_size 2 --deepspeed zero3"
    resolved = resolve("sft", [*NEEDED, *words.split(), "--nproc_per_node", "16"], planning=True)
    assert sizes(resolved) == (2, 2, 1, 16)
    assert (
        "--parallel_method megatron with --deepspeed zero3: no engine combines these; the native engine does what is "
        "meant: tensor 4 x pipeline 2 x FSDP 2, 16 processes" in resolved.warnings
    )


def test_a_deepspeed_file_is_taken_over(tmp_path: Path) -> None:
    """The file of the article, and what else such files say."""
    file = tmp_path / "zero3.json"
    article = {
        "fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 32},
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "cpu"},
            "allgather_partitions": True,
            "reduce_scatter": True,
        },
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
    }
    file.write_text(json.dumps(article))
    words = [*NEEDED, "--deepspeed", str(file), "--nproc_per_node", "2"]
    resolved = resolve("sft", words)
    assert sizes(resolved) == (2, 2, 1, 2)
    assert resolved.config.parallel.offload is True
    assert resolved.config.model.torch_dtype == "bfloat16"
    assert any("fp16: shards compute in bfloat16" in warning for warning in resolved.warnings)
    assert resolve("sft", [*words, "--torch_dtype", "float32"]).config.model.torch_dtype == "float32"
    more = {"gradient_clipping": 0.5, "train_micro_batch_size_per_gpu": 3, "flops_profiler": {}}
    more["zero_optimization"] = {"stage": 1, "zero_hpz_partition_size": 2}
    file.write_text(json.dumps(more))
    resolved = resolve("sft", words)
    assert resolved.value("max_grad_norm") == 0.5
    assert resolved.value("per_device_train_batch_size") == 3
    assert any(
        warning.endswith(
            "not used by the native engine: flops_profiler, zero_optimization.zero_hpz_partition_size"
        )
        for warning in resolved.warnings
    )
    file.write_text('{"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}')
    assert "NVMe" in refused(*words[4:])


def test_a_recorded_number_of_processes_is_read_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump_text(resolve("sft", [*NEEDED, "--nproc_per_node", "2"])))
    assert load_run_config(tmp_path).config.parallel.data_parallel_size == 2


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "NPROC_PER_NODE"])
def test_a_recorded_layout_is_read_whatever_processes_there_are_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    """A run that goes on in another layout reads what it was: three processes are no hindrance."""
    text = dump_text(resolve("sft", [*NEEDED, "--tp_size", "2", "--fsdp", "full", "--dp_size", "2"]))
    (tmp_path / "config.yaml").write_text(text)
    monkeypatch.setenv(variable, "3")
    read = load_run_config(tmp_path)
    assert read.config.parallel.tensor_parallel_size == 2
    with pytest.raises(ConfigError, match="3 processes"):
        resolve("sft", [str(tmp_path / "config.yaml")])
