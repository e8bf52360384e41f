"""Policy optimisation on several ranks: the answers, rewards, losses and gradients of one process."""

import contextlib
import functools
import json
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from parallel_parity import exact_norm
from worker_pool import pool

from swift.core.errors import ConfigError, SwiftError
from swift.models.facts import ModelFacts
from swift.models.tiny import make_tiny_model
from swift.plan.analytic import whole_bytes
from swift.plan.sampling import cache_bytes_per_token
from swift.rl.record import find_rollouts, read_trajectories
from swift.runs.metrics import read_metrics

REWARD = """
def length(completions, **kwargs):
    return [len(text) / 10 for text in completions]
"""
COMMON = {
    "rlhf_type": "grpo",
    "dataset": "task:reverse#12",
    "num_generations": 4,
    "per_device_train_batch_size": 2,
    "global_batch_size": 8,
    "generation_batch_size": 16,  # two updates learn from each batch of answers
    "max_completion_length": 6,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "beta": 0.1,
    "max_steps": 4,
    "save_steps": 3,
    "logging_steps": 1,
    "val_dataset": "task:reverse:seed=9#5",
    "eval_steps": 2,
    "reward_num_proc": 1,
    "max_restarts": 0,
}
SLOW = [pytest.mark.slow]
LAYOUTS = {
    "copies": {"nproc_per_node": 2},
    "shards": {"fsdp": "full", "nproc_per_node": 2},
    "sequence shared": {"context_parallel_size": 2},
    "sequence in a ring": {"context_parallel_size": 2, "sequence_parallel_method": "ring"},
    "layers shared": {"tensor_parallel_size": 2},
    "layers and sequence shared": {"tensor_parallel_size": 2, "sequence_parallel": True},
    "sequence in shards": {"context_parallel_size": 2, "fsdp": "full", "nproc_per_node": 4},
    "layers in shards": {"tensor_parallel_size": 2, "fsdp": "full", "nproc_per_node": 4},
}
SIZES = {"expert_parallel_size", *(name for layout in LAYOUTS.values() for name in layout)}
METRICS = ("loss", "reward", "reward_std", "grad_norm", "kl", "approx_kl", "entropy", "eval_reward", "num_tokens",
           "rewards/length/mean", "rewards/task/mean", "completions/mean_length", "ratio")  # fmt: skip


@contextlib.contextmanager
def exactly(gradients):
    """Compute in float64, and keep the gradients of every step."""
    from swift.models.load import load_model
    from swift.models.streamed import empty_model
    from swift.parallel.data_parallel import whole
    from swift.parallel.native import NativeEngine

    clip = NativeEngine.clip

    def exact(make, *args, **options):
        model = make(*args, **{**options, "dtype": torch.float64})
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = functools.partial(exact_norm, module)
        return model

    load = functools.partial(exact, load_model)

    def keep(self):
        parameters = self.parameter_sets["default"].parameters
        gradients.append({name: whole(p.grad).clone() for name, p in parameters.items()})
        return clip(self)

    with contextlib.ExitStack() as stack:
        for place in ("assemble", "build", "reference"):
            stack.enter_context(
                mock.patch(f"swift.train.{place}.param_dtype", lambda resolved: torch.float64)
            )
        for place in ("build", "reference"):
            stack.enter_context(mock.patch(f"swift.train.{place}.load_model", load))
        stack.enter_context(
            mock.patch("swift.train.build.empty_model", functools.partial(exact, empty_model))
        )
        stack.enter_context(mock.patch.object(NativeEngine, "clip", keep))
        yield


def train_on(rank, options, exact=False):
    """Train as one of several ranks, or alone; (run folder, gradients of every step, how many reward processes)."""
    import os

    os.environ["SWIFT_HOME"] = str(Path(options["output_dir"]) / "home")
    from swift.config.bind import resolve
    from swift.rl.reward_pool import RewardPool
    from swift.rl.run import train

    gradients, started = [], []
    start = RewardPool._start

    def count(self, number):
        started.append(number)
        start(self, number)

    with (
        exactly(gradients) if exact else contextlib.nullcontext(),
        mock.patch.object(RewardPool, "_start", count),
    ):
        resolved = resolve("rlhf", values=options)
        if exact:
            for section, name in (
                (resolved.config.tuner, "lora_dtype"),
                (resolved.config.model, "torch_dtype"),
            ):
                vars(section)[name] = "float64"  # which no user can ask for
        result = train(resolved, say=lambda text: None)
    return result.folder, gradients, len(started)


def alone(options, monkeypatch, exact=False):
    monkeypatch.setenv("SWIFT_HOME", str(Path(options["output_dir"]) / "home"))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    single = {key: value for key, value in options.items() if key not in SIZES}
    return train_on(0, single, exact)


def on_ranks(function, options, *arguments):
    """The results of all ranks; a busy machine may take its time."""
    return pool(options.get("nproc_per_node", 2)).run(function, options, *arguments, seconds=400.0)


def sampled_on(rank, options):
    """Train on as one of several ranks; (run folder, most bytes of the model that samples, of keys and values)."""
    from swift.inference.engines.embedded_core import EmbeddedCore

    seen, step = [(0, 0)], EmbeddedCore.step

    def note(self):
        found = step(self)
        storages = {part.untyped_storage() for part in self.model.parameters()}
        seen.append((sum(one.nbytes() for one in storages), self.cache.num_bytes))
        return found

    with mock.patch.object(EmbeddedCore, "step", note):
        folder, _, _ = train_on(rank, options)
    return folder, *map(max, zip(*seen, strict=True))


def planned_setup(options):
    """What the plan of a run says decides its memory."""
    from swift.config.bind import resolve
    from swift.plan import plan

    with mock.patch.object(plan, "memory_of", wraps=plan.memory_of) as memory:
        plan.make_plan(resolve("rlhf", values=options, planning=True))
    return memory.call_args.args[2]


@pytest.fixture
def options(tiny_model_dir, tmp_path):
    file = tmp_path / "reward.py"
    file.write_text(REWARD)
    return {**COMMON, "model": str(tiny_model_dir), "reward_funcs": [f"{file}:length", "task"]}


def measured(folder):
    return [
        {key: row[key] for key in METRICS if key in row} for row in read_metrics(folder / "metrics.jsonl")
    ]


def same_answers(folder, other):
    files, others = find_rollouts(folder), find_rollouts(other)
    assert list(files) == list(others)
    for step in files:
        for one, two in zip(read_trajectories(files[step]), read_trajectories(others[step]), strict=True):
            assert (one.tokens == two.tokens).all() and one.rewards == two.rewards
            assert (one.group, one.sample, one.seed, one.row[1]) == (
                two.group,
                two.sample,
                two.seed,
                two.row[1],
            )
            assert np.abs(one.logprobs - two.logprobs).max() < 1e-6


def same_gradients(found, expected):
    assert len(found) == len(expected)
    for step, other in zip(found, expected, strict=True):
        assert step.keys() == other.keys()
        scale = max(float(gradient.abs().max()) for gradient in other.values())
        assert scale > 1e-4
        for name, gradient in other.items():
            assert float((step[name] - gradient).abs().max()) < 1e-10 * scale, name


CASES = {
    # Three micro-batches for two ranks; groups without a signal are sampled again.
    "copies, dapo, uneven": {
        "rlhf_type": "dapo",
        "generation_batch_size": 12,
        "global_batch_size": 12,
        "per_device_train_batch_size": 4,
        "soft_max_length": 6,
        "overlong_filter": False,  # all are long
    },
    "shards, reference that moves": {
        "tuner_type": "full",
        "rlhf_type": "gspo",
        "generation_batch_size": 8,
        "sync_ref_model": True,
        "ref_model_sync_steps": 2,
        "top_entropy_quantile": 0.5,
    },
    "copies, padded": {"padding_free": False, "rlhf_type": "cispo", "generation_batch_size": 8},
    "copies, loss by group": {"rlhf_type": "real", "per_device_train_batch_size": 4, "beta": 0.0},
    "copies, loss by micro-batch": {"rlhf_type": "bnpo", "global_batch_size": 8, "num_iterations": 2},
    "shards, penalty in the reward": {"rlhf_type": "reinforce_pp", "advantage_estimator": "reinforce_pp"},
    "shards, expert": {
        "rlhf_type": "chord",
        "chord_sft_dataset": "task:reverse:seed=5#16",
        "chord_sft_per_device_train_batch_size": 3,
        "global_batch_size": 6,
        "generation_batch_size": 12,
    },
}
CASES |= {
    "sequence shared, entropies": {"top_entropy_quantile": 0.5, "generation_batch_size": 8},
    "sequence in a ring, padded, full": {"tuner_type": "full", "padding_free": False, "max_steps": 2},
    "layers shared": {"rlhf_type": "cispo", "beta": 0.0},
    "layers and sequence shared, full": {"tuner_type": "full", "top_entropy_quantile": 0.5},
    "sequence in shards, reference that moves": {
        "tuner_type": "full",
        "sync_ref_model": True,
        "ref_model_sync_steps": 2,
        "generation_batch_size": 8,
    },
    "layers in shards, penalty in the reward": {"rlhf_type": "reinforce_pp", "beta": 0.05},
}
FAST = ("copies, dapo, uneven", "sequence shared, entropies")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FAST else SLOW) for n in CASES])
def test_every_way_to_learn_is_that_of_one_process(options, tmp_path, monkeypatch, name):
    options = {**options, "max_steps": 3, **CASES[name]}
    expected, wanted, _ = alone({**options, "output_dir": str(tmp_path / "one")}, monkeypatch, True)
    two = {**options, **LAYOUTS[name.split(",")[0]], "output_dir": str(tmp_path / "two")}
    folder, gradients, _ = on_ranks(train_on, two, True)[0]
    same_answers(folder, expected)
    same_gradients(gradients, wanted)
    for row, other in zip(measured(folder), measured(expected), strict=True):
        assert row == pytest.approx(other, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("layout", [pytest.param("copies", marks=SLOW), "shards"])
def test_a_run_goes_on_with_another_number_of_ranks(options, tmp_path, monkeypatch, layout):
    """Its steps keep their size, though the options speak of micro-batches of each process."""
    del options["global_batch_size"]
    options |= {"gradient_accumulation_steps": 2, "generation_batch_size": 16, "beta": 0.0}
    two = {**options, **LAYOUTS[layout], "output_dir": str(tmp_path / "two")}
    results = on_ranks(sampled_on, two)
    folder = results[0][0]
    setup, facts = planned_setup(two), ModelFacts.read(Path(two["model"]))
    for _, weights, cache in results:  # of each rank, against what the plan says
        assert weights == pytest.approx(whole_bytes(facts, setup), rel=0.02)
        assert setup.sampling.gathered == (whole_bytes(facts, setup) if layout == "shards" else 0)
        wanted = setup.sampling.cache_tokens * cache_bytes_per_token(facts, 4)
        assert 0.8 * wanted < cache <= wanted
    cut = tmp_path / "cut"
    shutil.copytree(folder, cut, symlinks=True)
    alone(
        {**options, "output_dir": str(tmp_path), "resume_from_checkpoint": str(cut / "checkpoint-3")},
        monkeypatch,
    )
    same_answers(cut, folder)
    for row, other in zip(measured(cut), measured(folder), strict=True):
        assert row == pytest.approx(other, rel=2e-4, abs=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["a base of four bits", "experts of several ranks"])
def test_what_is_not_computed_in_double_precision(options, tmp_path, monkeypatch, what):
    options |= {"max_steps": 2, "save_steps": 2}
    if what == "a base of four bits":
        options |= {"quant_method": "bnb", "quant_bits": 4}
    else:
        model = make_tiny_model(tmp_path / "moe", architecture="qwen3_moe", texts=["a b c 1 2 3"] * 5)
        options |= {"model": str(model), "expert_parallel_size": 2}
    expected, _, _ = alone({**options, "output_dir": str(tmp_path / "one")}, monkeypatch)
    two = {**options, **LAYOUTS["shards"], "output_dir": str(tmp_path / "two")}
    folder, _, _ = on_ranks(train_on, two)[0]
    same_answers(folder, expected)
    for row, other in zip(measured(folder), measured(expected), strict=True):
        assert row == pytest.approx(other, rel=2e-4, abs=2e-5)


@pytest.mark.slow
def test_copies_learn_again_from_kept_answers(options, tmp_path, monkeypatch):
    options |= {"beta": 0.0, "max_steps": 2}
    first, wanted, _ = alone({**options, "output_dir": str(tmp_path / "one")}, monkeypatch, True)
    for name in ("val_dataset", "eval_steps", "reward_funcs", "reward_num_proc"):
        del options[name]
    again = {**options, "replay": str(first), "output_dir": str(tmp_path / "two")}
    _, gradients, _ = on_ranks(train_on, {**again, **LAYOUTS["copies"]}, True)[0]
    same_gradients(gradients, wanted)


def refused_on(rank, options):
    with pytest.raises(SwiftError) as caught:
        train_on(rank, options)
    return str(caught.value)


def test_a_reward_that_dies_ends_all_ranks_with_the_name_of_the_answer(options, tmp_path):
    file = tmp_path / "deadly.py"
    file.write_text(
        "import os\ndef deadly(completions, solution):\n"
        "    return [os._exit(3) if text == solution[0] else 1.0 for text in solution]\n"
    )
    options |= {
        "reward_funcs": [f"{file}:deadly"],
        "on_reward_failure": "stop",
        "output_dir": str(tmp_path / "two"),
    }
    texts = on_ranks(refused_on, {**options, **LAYOUTS["copies"]})
    assert texts[0] == texts[1] and "the reward deadly died" in texts[0]
    assert "of step 1" in texts[0] and "reverse-5-0-12" in texts[0]
    states = [json.loads(path.read_text()) for path in (tmp_path / "two").glob("*/**/status.json")]
    assert len(states) == 2 and all(state["state"] == "failed" for state in states)


def test_stages_do_not_sample(options, tmp_path):
    from swift.config.bind import resolve

    with pytest.raises(ConfigError, match="samples with whole models, and no process has all layers"):
        resolve("rlhf", values={**options, "output_dir": str(tmp_path), "pipeline_parallel_size": 2})


@pytest.mark.parametrize(
    ("layout", "tuner"),
    [
        ("copies", "lora"),
        ("shards", "full"),
        pytest.param("copies", "full", marks=SLOW),
        pytest.param("shards", "lora", marks=SLOW),
    ],
)
def test_two_ranks_do_what_one_process_does(options, tmp_path, monkeypatch, layout, tuner):
    """Also from a checkpoint that lies within a batch of answers."""
    options = {**options, "tuner_type": tuner}
    expected, wanted, _ = alone({**options, "output_dir": str(tmp_path / "one")}, monkeypatch, True)
    two = {**options, **LAYOUTS[layout], "output_dir": str(tmp_path / "two")}
    results = on_ranks(train_on, two, True)
    folder, gradients, started = results[0]
    assert started and not results[1][2], "rewards have processes on rank 0 only"
    same_answers(folder, expected)
    same_gradients(gradients, wanted)
    for row, other in zip(measured(folder), measured(expected), strict=True):
        assert row == pytest.approx(other, rel=1e-6, abs=1e-9)
    cut = tmp_path / "cut"
    shutil.copytree(folder, cut, symlinks=True)
    recorded = cut / "checkpoint-3" / "config.yaml"  # is read, and double precision is none of its values
    recorded.write_text(recorded.read_text().replace("float64", "float32"))
    again, gradients, _ = on_ranks(
        train_on, {**two, "resume_from_checkpoint": str(cut / "checkpoint-3")}, True
    )[0]
    assert again == cut
    same_gradients(gradients, wanted[3:])
    assert measured(cut) == measured(folder), "with the same ranks it is bit-identical"
