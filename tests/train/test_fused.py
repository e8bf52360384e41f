"""Fused runs as runs: each leaves what it leaves alone, whoever joins, leaves, fails or is stopped beside it."""

import json
import os
import signal

import hypothesis
import pytest
import torch
from hypothesis import stateful
from hypothesis import strategies as st
from safetensors.torch import load_file

from swift.config.bind import resolve
from swift.core.errors import ConfigError
from swift.parallel.fused import fused_gradients
from swift.runs.metrics import read_metrics
from swift.runs.status import read_status
from swift.train.callbacks.base import Callback
from swift.train.failures import NonFiniteError
from swift.train.fused import FusedGroup, train_fused
from swift.train.loop import Interrupted
from swift.train.run import train

STEPS = 5
OPTIONS = {
    "small": {"lora_rank": 2, "learning_rate": 2e-3},
    "dropped": {"lora_dropout": 0.2, "seed": 5, "gradient_accumulation_steps": 2, "packing": True},
    "short": {"target_modules": ["q_proj", "up_proj"], "max_length": 40, "per_device_train_batch_size": 2},
}
POISON = {"learning_rate": 1e38, "max_grad_norm": 0.0}


@pytest.fixture
def config(tiny_model_dir, chat_file, tmp_path, monkeypatch):
    """Call with a name and options: a resolved configuration with that run name."""
    monkeypatch.setenv("SWIFT_HOME", str(tmp_path / "home"))
    return make_config(tiny_model_dir, chat_file, tmp_path / "output")


def make_config(model_dir, chat_file, output):
    def make(name, command="sft", **options):
        values = {
            "model": str(model_dir),
            "dataset": str(chat_file),
            "output_dir": str(output),
            "run_name": name,
            "max_length": 160,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "learning_rate": 5e-3,
            "logging_steps": 1,
            "max_steps": STEPS,
            "lora_dropout": 0.0,
            **options,
        }
        return resolve(command, values=values)

    return make


def quiet(_text):
    pass


def adapter(folder):
    return load_file(folder / "last" / "adapter_model.safetensors")


def distance(first, second):
    """Of two adapters, relative to the second."""
    assert first.keys() == second.keys()
    difference = sum((first[name] - second[name]).double().square().sum() for name in second)
    return (difference / sum(tensor.double().square().sum() for tensor in second.values())).sqrt().item()


def losses(folder):
    return [row["loss"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]


def test_every_member_leaves_what_it_leaves_alone(config):
    evaluated = {"split_dataset_ratio": 0.2, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 3}
    options = [*OPTIONS.values(), evaluated]
    members = train_fused([config(f"f{at}", **one) for at, one in enumerate(options)], say=quiet)
    assert [member.error for member in members] == [None] * 4
    for at, (member, one) in enumerate(zip(members, options, strict=True)):
        folder = member.result.folder
        alone = train(config(f"s{at}", **one), say=quiet)
        assert losses(folder) == pytest.approx(losses(alone.folder), rel=1e-4)
        assert distance(adapter(folder), adapter(alone.folder)) < 1e-3
        ours, theirs = (
            json.loads((one / "last" / "adapter_config.json").read_text()) for one in (folder, alone.folder)
        )
        assert ours == theirs
        assert read_status(folder)["state"] == "succeeded"
        evaluations = [
            [row["eval_loss"] for row in read_metrics(one / "metrics.jsonl") if "eval_loss" in row]
            for one in (folder, alone.folder)
        ]
        assert evaluations[0] == pytest.approx(evaluations[1], rel=1e-4)
        log = (folder / "log.txt").read_text()
        assert log.count("saved checkpoint-") == len([*folder.glob("checkpoint-*")])


def test_members_may_pursue_different_objectives(config, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    rows = [
        {
            "messages": [
                {"role": "user", "content": "say"},
                {"role": "assistant", "content": f"one two {at}"},
            ],
            "rejected_response": "three",
        }
        for at in range(12)
    ]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"one two three {at} " * 4}) + "\n" for at in range(12)))
    wanted = [
        ("sft", {}),
        ("pt", {"dataset": str(text)}),
        ("rlhf", {"dataset": str(pairs), "rlhf_type": "dpo", "lora_dropout": 0.1}),
    ]
    configs = [config(f"f{name}", command=name, **one) for name, one in wanted]
    members = train_fused(configs, say=quiet)
    for member, (name, one) in zip(members, wanted, strict=True):
        assert member.error is None
        alone = train(config(f"s{name}", command=name, **one), say=quiet)
        assert losses(member.result.folder) == pytest.approx(losses(alone.folder), rel=1e-4)


def test_a_member_that_is_not_finite_is_ejected_and_the_others_stay_bitwise_the_same(config):
    def group(tag, **second):
        configs = [config(f"{tag}{at}", **one) for at, one in enumerate(({}, second, OPTIONS["small"]))]
        return train_fused(configs, say=quiet)

    fine, poisoned = group("a", max_steps=2), group("b", max_steps=2, **POISON)
    assert isinstance(poisoned[1].error, NonFiniteError)
    status = read_status(poisoned[0].result.folder.with_name("b1"))
    assert (status["state"], status["failure"]) == ("failed", "nonfinite")
    for at in (0, 2):
        first, second = (adapter(one[at].result.folder) for one in (fine, poisoned))
        assert all(torch.equal(first[name], second[name]) for name in first)


class StopAt(Callback):
    """Sends this process a signal after some step, as the terminal or a service does."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, run):
        if run.state.step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_stops_and_saves_all_members_and_each_can_go_on_alone_or_fused(config):
    configs = [config("x", **OPTIONS["small"]), config("y", **OPTIONS["dropped"])]
    members = train_fused(configs, say=quiet, options=[{"callbacks": [StopAt(2)]}, {}])
    assert all(isinstance(member.error, Interrupted) for member in members)
    assert [member.exit_code for member in members] == [128 + signal.SIGTERM] * 2
    output = configs[0].config.checkpoint.output_dir
    first = train(config("x", **OPTIONS["small"], resume_from_checkpoint=f"{output}/x"), say=quiet)
    again = config("y", **OPTIONS["dropped"], resume_from_checkpoint=f"{output}/y")
    (second,) = train_fused([again], say=quiet)
    for name, result, options in (("x", first, "small"), ("y", second.result, "dropped")):
        assert result.folder.name == name
        alone = train(config(f"solo-{name}", **OPTIONS[options]), say=quiet)
        assert losses(result.folder) == pytest.approx(losses(alone.folder), rel=1e-4)
        assert distance(adapter(result.folder), adapter(alone.folder)) < 1e-3


def test_a_group_that_does_not_fit_into_memory_goes_on_in_smaller_ones(config):
    """Nothing is lost: the step begins again with half of the members."""
    said, sizes = [], []

    def on_a_small_device(steps, switch):
        sizes.append(len(steps))
        if len(steps) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return fused_gradients(steps, switch)

    group = FusedGroup(say=said.append, gradients=on_a_small_device)
    members = [group.join(config(name, **OPTIONS["small"], seed=at)) for at, name in enumerate("pqr")]
    group.run()
    assert sizes[:5] == [3, 2, 1, 2, 1]
    assert any("do not fit into memory together: now 2 at a time" in line for line in said)
    for at, (member, name) in enumerate(zip(members, "pqr", strict=True)):
        alone = train(config(f"solo-{name}", **OPTIONS["small"], seed=at), say=quiet)
        assert losses(member.result.folder) == pytest.approx(losses(alone.folder), rel=1e-4)


@pytest.mark.parametrize(
    "options,word",
    [
        ({"tuner_type": "full"}, "LoRA"),
        ({"neftune_noise_alpha": 5.0}, "noise"),
        ({"torch_compile": True}, "compile"),
        ({"use_dora": True}, "LoRA"),
    ],
)
def test_what_cannot_be_fused_is_refused_by_name_and_the_others_go_on(config, options, word):
    members = train_fused([config("fine", max_steps=1), config("odd", max_steps=1, **options)], say=quiet)
    assert members[0].error is None
    assert isinstance(members[1].error, ConfigError) and word in str(members[1].error)


def test_runs_on_another_model_or_in_another_precision_cannot_join(config):
    members = train_fused(
        [config("one", max_steps=1), config("two", max_steps=1, torch_dtype="bfloat16")], say=quiet
    )
    assert members[0].error is None and "dtype is torch.bfloat16" in str(members[1].error)


@pytest.fixture(scope="module")
def solo_adapters(tiny_model_dir, chat_file, tmp_path_factory):
    """What each configuration gives alone."""
    with pytest.MonkeyPatch.context() as patch:
        output = tmp_path_factory.mktemp("solo")
        patch.setenv("SWIFT_HOME", str(output / "home"))
        make = make_config(tiny_model_dir, chat_file, output)
        yield (
            {name: adapter(train(make(name, **OPTIONS[name]), say=quiet).folder) for name in OPTIONS},
            make_config(tiny_model_dir, chat_file, output / "fused"),
        )


def test_any_sequence_of_joining_leaving_failing_and_resuming(solo_adapters, tmp_path_factory):
    """Whatever happens, a run that came to its end has the adapter of its solo run."""
    expected, make = solo_adapters

    class Group(stateful.RuleBasedStateMachine):
        def __init__(self):
            super().__init__()
            self.group = FusedGroup(say=quiet)
            self.tag = tmp_path_factory.mktemp("sequence").name
            self.members, self.poisoned, self.stopped = {}, 0, set()

        def _make(self, name, resumed=False):
            resolved = make(f"{self.tag}-{name}", **OPTIONS[name])
            if resumed:
                folder = f"{resolved.config.checkpoint.output_dir}/{self.tag}-{name}"
                resolved = make(f"{self.tag}-{name}", **OPTIONS[name], resume_from_checkpoint=folder)
            return resolved

        @stateful.rule(name=st.sampled_from(sorted(OPTIONS)))
        def join(self, name):
            if name not in self.members:
                self.members[name] = self.group.join(self._make(name))
            elif name in self.stopped:
                self.stopped.discard(name)
                self.members[name] = self.group.join(self._make(name, resumed=True))

        @stateful.precondition(lambda self: self.group.members)
        @stateful.rule()
        def step(self):
            self.group.step()

        @stateful.precondition(lambda self: self.group.members)
        @stateful.rule(data=st.data())
        def stop(self, data):
            running = sorted(name for name, member in self.members.items() if not member.is_done)
            if not running:
                return
            name = data.draw(st.sampled_from(running))
            self.members[name].signals.receive(signal.SIGTERM)
            self.group.step()
            member = self.members[name]
            assert member.is_done
            if isinstance(member.error, Interrupted):
                self.stopped.add(name)

        @stateful.precondition(lambda self: self.poisoned < 1)
        @stateful.rule()
        def poison(self):
            self.poisoned += 1
            member = self.group.join(make(f"{self.tag}-poison-{self.poisoned}", **POISON))
            for _ in range(3):
                if not member.is_done:
                    self.group.step()
            assert isinstance(member.error, NonFiniteError)

        def teardown(self):
            self.group.run()
            for name in self.stopped:
                self.members[name] = self.group.join(self._make(name, resumed=True))
            self.group.run()
            for name, member in self.members.items():
                assert member.error is None, member.error
                assert distance(adapter(member.result.folder), expected[name]) < 1e-3

    settings = hypothesis.settings(
        max_examples=4,
        stateful_step_count=10,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[hypothesis.Phase.generate],  # shrinking would take minutes
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    stateful.run_state_machine_as_test(Group, settings=settings)
