"""``swift rlhf --rlhf_type grpo`` and its relatives from prompts to a trained adapter."""

import json
import shutil

import numpy as np
import pytest
import reward_samples
import torch
from safetensors.torch import load_file

from swift.core.errors import ConfigError, DataError, SwiftError
from swift.rl.record import find_rollouts, read_rollouts, read_trajectories
from swift.runs.metrics import read_metrics

ALL_LENGTHS = {"overlong_filter": False}
"""The tiny model hardly ever ends an answer: dapo would leave all of them out, and learn nothing."""


def lines(run):
    return [line for line in read_metrics(run.folder / "metrics.jsonl") if "loss" in line]


def weights(run):
    return load_file(run.folder / "last" / "adapter_model.safetensors")


def largest_difference(one, other):
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.mark.parametrize(
    "options",
    [
        {"rlhf_type": "grpo"},
        {"rlhf_type": "grpo", "tuner_type": "full", "padding_free": False},
        {"rlhf_type": "dapo", "soft_max_length": 6, "max_steps": 1, **ALL_LENGTHS},
        {"rlhf_type": "gspo", "max_steps": 4},
        pytest.param({"rlhf_type": "rloo", "kl_estimator": "k1"}, marks=pytest.mark.slow),
        {"rlhf_type": "reinforce_pp"},
        pytest.param({"rlhf_type": "real", "per_device_train_batch_size": 8}, marks=pytest.mark.slow),
        pytest.param({"rlhf_type": "gdpo", "num_iterations": 2}, marks=pytest.mark.slow),
        pytest.param(
            {"rlhf_type": "vespo", "old_logprobs": "recompute", "mismatch": "token_truncate"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"rlhf_type": "opo", "top_entropy_quantile": 0.5, "temperature": 0.7}, marks=pytest.mark.slow
        ),
    ],
    ids=lambda options: "-".join(f"{value}" for value in options.values()),
)
def test_algorithms_run_and_tell_what_they_do(run_policy, options):
    run = run_policy(**options)
    found = lines(run)
    assert len(found) == run.summary["steps"]
    first = found[0]
    assert {
        "reward",
        "rewards/task/mean",
        "rewards/length/mean",
        "reward_std",
        "entropy",
        "seconds/sample",
    } <= set(first)
    assert 1 <= first["completions/mean_length"] <= 6
    assert (
        first["grad_norm"] > 1e-4
        and abs(first["mismatch_kl"]) < 1e-5
        and first["approx_kl"] == pytest.approx(0, abs=1e-5)
    )
    files = find_rollouts(run.folder)
    assert next(iter(files)) == 1
    if options["rlhf_type"] == "gspo":
        assert list(files) == [1], "four updates learn from one batch of answers"
        assert len(read_rollouts(files[1])) == 64
        assert [line.get("reward") is None for line in found] == [False, True, True, True]
        assert found[3]["approx_kl"] > 0
    if options["rlhf_type"] == "dapo":
        assert "rewards/soft_overlong/mean" in first and "resampled_prompts" in first
    if options["rlhf_type"] in ("grpo", "rloo", "reinforce_pp"):
        assert first["kl"] == pytest.approx(0, abs=1e-5) and found[1]["kl"] > 0


def test_answers_are_kept_as_they_were_sampled(run_policy, tiny_model_dir):
    """Log-probabilities of the file are those that transformers computes of the file's own tokens."""
    from transformers import AutoModelForCausalLM

    run = run_policy(temperature=0.8, max_steps=1, tuner_type="full")
    answers = read_trajectories(find_rollouts(run.folder)[1])
    assert len(answers) == 16 and {one.version for one in answers} == {0}
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    for one in answers:
        ids = torch.from_numpy(np.concatenate([one.prompt_ids, one.tokens])).long()[None]
        with torch.no_grad():
            values = (model(ids).logits[0, :-1] / 0.8).log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        assert np.abs(values[len(one.prompt_ids) - 1 :].numpy() - one.logprobs).max() < 1e-5
        assert one.finish_reason == ("stop" if len(one.tokens) < 6 else one.finish_reason)
    by_group = {}
    for one in answers:
        by_group.setdefault(one.group, set()).add(one.tokens.tobytes())
    assert len(by_group) == 4 and all(len(different) > 1 for different in by_group.values())
    assert all(abs(one.reward - sum(one.rewards.values())) < 1e-9 for one in answers)


def test_nothing_drifts_at_a_learning_rate_of_nothing(run_policy):
    run = run_policy(
        learning_rate=1e-30,
        max_steps=40,
        rlhf_type="gspo",
        generation_batch_size=32,
        beta=0.1,
        val_dataset="task:reverse:seed=9#8",
        eval_steps=8,
        weight_decay=0,
    )
    for line in lines(run):
        assert abs(line["mismatch_kl"]) < 1e-6 and abs(line["approx_kl"]) < 1e-6 and abs(line["kl"]) < 1e-6
        assert line["clip_ratio/low_mean"] == line["clip_ratio/high_mean"] == 0
    evaluated = [
        line["eval_reward"] for line in read_metrics(run.folder / "metrics.jsonl") if "eval_reward" in line
    ]
    assert len(evaluated) == 5 and len(set(evaluated)) == 1


def test_validation_prompts_are_answered_so_many_at_once(run_policy, tmp_path):
    (tmp_path / "counting.py").write_text(
        "from pathlib import Path\n\n\ndef count(completions, **columns):\n"
        f"    with Path({str(tmp_path / 'sizes')!r}).open('a') as file:\n"
        "        print(len(completions), file=file)\n    return [0.0] * len(completions)\n"
    )
    run_policy(
        max_steps=1,
        reward_funcs=[f"{tmp_path / 'counting.py'}:count"],
        val_dataset="task:reverse:seed=9#8",
        per_device_eval_batch_size=3,
    )
    sizes = [int(line) for line in (tmp_path / "sizes").read_text().split()]
    assert sum(sizes) == 16 + 8 and sizes[-3:] == [3, 3, 2]


@pytest.mark.parametrize("options", [{"rlhf_type": "dapo", "dynamic_sample": False, **ALL_LENGTHS}])
def test_a_step_does_not_depend_on_how_it_is_split(run_policy, options):
    whole = run_policy(**options)
    assert all(line["grad_norm"] > 1e-3 for line in lines(whole))
    split = run_policy(**options, per_device_train_batch_size=2, gradient_accumulation_steps=8)
    padded = run_policy(
        **options, per_device_train_batch_size=4, gradient_accumulation_steps=4, padding_free=False
    )
    for other in (split, padded):
        for one, same in zip(lines(other), lines(whole), strict=True):
            for name in ("loss", "grad_norm", "entropy", "clip_ratio/high_mean", "reward"):
                assert one[name] == pytest.approx(same[name], rel=1e-4, abs=1e-6)
        # In units of the learning rate, by which Adam moves every weight, however small its gradient is.
        assert largest_difference(weights(whole), weights(other)) < 1e-2 * 1e-2


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rlhf_type": "gspo", "generation_batch_size": 64},  # the checkpoint lies within a batch of answers
        pytest.param(
            {"sync_ref_model": True, "ref_model_sync_steps": 2, "beta": 0.1}, marks=pytest.mark.slow
        ),
        pytest.param({"rlhf_type": "dapo", "max_resample_times": 1, **ALL_LENGTHS}, marks=pytest.mark.slow),
    ],
    ids=lambda options: "-".join(map(str, options.values())) or "grpo",
)
def test_resumed_runs_are_bit_equal(run_policy, tmp_path, options):
    options = {"max_steps": 6, "save_steps": 3, **options}
    whole = run_policy(run_name="whole", **options)
    cut = tmp_path / "output" / "cut"
    shutil.copytree(whole.folder, cut, symlinks=True)
    again = run_policy(run_name="cut", resume_from_checkpoint=str(cut / "checkpoint-3"), **options)
    assert again.folder == cut
    files = [folder / "last" / "adapter_model.safetensors" for folder in (cut, whole.folder)]
    assert files[0].read_bytes() == files[1].read_bytes()
    for step, file in find_rollouts(whole.folder).items():
        same = find_rollouts(cut)[step]
        assert [row["tokens"] for row in read_rollouts(same)] == [
            row["tokens"] for row in read_rollouts(file)
        ]
    measured = [[line.get("reward") for line in lines(run)] for run in (whole, again)]
    assert measured[0] == measured[1]


def test_replay_learns_the_same_from_the_same_answers(run_policy):
    first = run_policy(max_steps=1, beta=0)
    again = run_policy(max_steps=1, beta=0, replay=str(first.folder))
    assert largest_difference(weights(first), weights(again)) < 1e-6
    assert lines(again)[0]["reward"] == lines(first)[0]["reward"]
    with pytest.raises(DataError, match="in groups of 8"):
        run_policy(replay=str(first.folder), num_generations=8)
    with pytest.raises(DataError, match="no answers are kept here"):
        run_policy(replay=str(again.folder))


def test_replay_weighs_rewards_as_the_run_did_and_knows_left_out_groups(run_policy, tmp_path):
    """gdpo keeps rewards apart; with one weight of 0 another would show. Dull groups stand behind in the file."""
    file = tmp_path / "some.py"
    file.write_text(
        "def some(completions, answer):\n"
        "    return [float(len(t) % 2) * (a[0] < '5') for t, a in zip(completions, answer)]\n"
    )
    options = {"rlhf_type": "gdpo", "max_steps": 1}
    rewards = {"reward_funcs": [f"{file}:some", "task"], "reward_weights": [1.0, 0.0], "dynamic_sample": True}
    first = run_policy(**options, **rewards)
    again = run_policy(**options, replay=str(first.folder))
    assert largest_difference(weights(first), weights(again)) < 1e-6


def test_tokens_below_a_fixed_entropy_teach_nothing(run_policy):
    line = lines(run_policy(algo_args={"entropy_threshold": 1e6}, beta=0, max_steps=1))[0]
    assert line["mismatch_kept"] == 0 and line["grad_norm"] == 0


def test_rewards_know_the_step_in_evaluations_as_well(run_policy, tmp_path):
    file = tmp_path / "at.py"
    file.write_text(
        "def at(completions, trainer_state):\n"
        "    return [trainer_state.global_step + trainer_state.max_steps / 10] * len(completions)\n"
    )
    run = run_policy(reward_funcs=[f"{file}:at"], val_dataset="task:reverse:seed=9#4", eval_steps=1)
    found = read_metrics(run.folder / "metrics.jsonl")
    assert [line["reward"] for line in found if "loss" in line] == pytest.approx([0.2, 1.2])
    assert [line["eval_reward"] for line in found if "eval_reward" in line] == pytest.approx([1.2, 2.2])


def test_discounted_returns_need_no_reference(run_policy):
    run = run_policy(rlhf_type="reinforce_pp", beta=0, algo_args={"gamma": 0.5}, max_steps=1)
    one = read_trajectories(find_rollouts(run.folder)[1])[0]
    assert len(one.advantage) == one.num_learned


def test_groups_without_a_signal_are_sampled_again_and_at_last_teach_nothing(run_policy, tmp_path):
    """All answers are worth the same: three more rounds, then the step has a gradient of exactly 0."""
    file = tmp_path / "same.py"
    file.write_text("def same(completions): return [1.0] * len(completions)\n")
    run = run_policy(
        rlhf_type="dapo", reward_funcs=[f"{file}:same"], soft_overlong=False, overlong_filter=False
    )
    for line in lines(run):
        assert (
            line["grad_norm"] == 0 and line["frac_reward_zero_std"] == 1 and line["resampled_prompts"] == 12
        )
    rows = read_rollouts(find_rollouts(run.folder)[1])
    assert len(rows) == 64 and {row["group"] for row in rows} == set(range(16)), (
        "no two prompts share a number"
    )
    assert {row["group"] for row in rows if row["is_used"]} == set(range(4))


@pytest.mark.slow
def test_chord_learns_from_the_expert_with_a_weight_that_changes(run_policy):
    options = {
        "rlhf_type": "chord",
        "chord_sft_dataset": "task:reverse:seed=5#32",
        "chord_sft_per_device_train_batch_size": 4,
        "chord_mu_warmup_steps": 2,
        "chord_mu_decay_steps": 2,
        "max_steps": 5,
    }
    run = run_policy(**options)
    assert [line["chord/mu"] for line in lines(run)] == pytest.approx([0.0, 0.45, 0.9, 0.475, 0.05])
    split = run_policy(
        **options, per_device_train_batch_size=8, gradient_accumulation_steps=2
    )  # twice the expert's rows: another run, but one that ends
    assert len(lines(split)) == 5
    with pytest.raises(ConfigError, match="learns from an expert's answers"):
        run_policy(rlhf_type="chord")


def test_a_disagreement_of_sampler_and_trainer_ends_the_run_and_names_the_cause(run_policy, monkeypatch):
    from swift.rl import source
    from swift.rl.sampler import EmbeddedSampler

    sample = EmbeddedSampler.sample

    def wrong(self, jobs, version, *, temperature=None):
        return sample(self, jobs, version, temperature=1.0)

    monkeypatch.setattr(EmbeddedSampler, "sample", wrong)
    with pytest.raises(SwiftError, match=r"sampler and trainer disagree") as caught:
        run_policy(temperature=0.5)
    assert "the temperature 0.5" in caught.value.why
    assert caught.value.where == "step 1"
    monkeypatch.undo()
    frozen = source.probe

    def in_training(engine, *arguments, **options):
        for module in engine.model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.5
        return frozen(engine, *arguments, **options)

    monkeypatch.setattr(source, "probe", in_training)
    with pytest.raises(SwiftError) as caught:
        run_policy()
    assert "dropout" in caught.value.why


def test_failed_rewards_do_not_end_a_run(run_policy, tmp_path):
    file = tmp_path / "often.py"
    file.write_text(
        "def often(completions):\n"
        "    if len(completions) == 1 and len(completions[0]) % 2: raise ValueError(completions[0])\n"
        "    if len(completions) > 1: raise ValueError('several')\n"
        "    return [float(len(text)) for text in completions]\n"
    )
    run = run_policy(reward_funcs=[f"{file}:often"], on_reward_failure="drop")
    rows = read_rollouts(find_rollouts(run.folder)[1])
    odd = [row for row in rows if len(row["completion"]) % 2]
    assert odd and not any(row["is_used"] for row in odd)
    assert all(row["is_used"] for row in rows if row not in odd)
    first = lines(run)[0]
    assert first["dropped_answers"] == first["failed_rewards"] == len(odd)
    assert first["reward"] == pytest.approx(np.mean([row["reward"] for row in rows if row["is_used"]]))
    spreads = [
        np.std(rewards, ddof=1) if len(rewards) > 1 else 0.0
        for rewards in (
            [row["reward"] for row in rows if row["group"] == group and row["is_used"]] for group in range(4)
        )
    ]
    assert first["reward_std"] == pytest.approx(np.mean(spreads))
    assert first["frac_reward_zero_std"] == spreads.count(0.0) / 4
    again = run_policy(replay=str(run.folder))
    assert largest_difference(weights(run), weights(again)) < 1e-6


def test_a_reward_model_of_ours_is_a_reward(run_policy, tiny_model_dir, tmp_path):
    from swift.config.bind import resolve
    from swift.rl.run import train

    rows = [
        {
            "messages": [{"role": "user", "content": "go"}, {"role": "assistant", "content": "1" * count}],
            "rejected_response": "red",
        }
        for count in range(1, 9)
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"model": str(tiny_model_dir), "rlhf_type": "rm", "dataset": str(file), "max_steps": 2}
    values |= {"output_dir": str(tmp_path / "rm"), "per_device_train_batch_size": 8}
    judge = train(resolve("rlhf", values=values), say=lambda text: None)
    run = run_policy(reward_funcs=[], reward_model=[str(judge.folder)], max_steps=1)
    rows = read_rollouts(find_rollouts(run.folder)[1])
    assert len({round(row["reward"], 6) for row in rows}) > 4
    assert all(row["rewards"] == {judge.folder.name: row["reward"]} for row in rows)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"reward_funcs": []}, "which reward"),
        ({"reward_weights": [1.0]}, "1 weights for 2 rewards"),
        ({"lora_dropout": 0.1}, "dropout makes"),
        ({"temperature": 0}, "all answers to a prompt are the same"),
        ({"use_vllm_sampler": True}, "the asynchronous pool of vLLM samplers"),
        ({"num_generations": 3}, "no whole groups of 3"),
        ({"num_generations": 1, "reward_funcs": ["task"]}, "compares the answers to a prompt"),
        ({"generation_batch_size": 24}, "cannot be dealt out in steps of 16"),
        ({"loss_type": "sigmoid"}, "no loss of policy optimisation"),
        ({"rlhf_type": "sapo", "epsilon": 0.2}, "epsilon has no effect on sapo"),
        (
            {"rlhf_type": "real", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 8},
            "must lie in one micro-batch",
        ),
        ({"rlhf_type": "rloo", "scale_rewards": "group"}, "scale_rewards has no effect on"),
        ({"algo": "no_such"}, "unknown algorithm"),
        ({"algo_args": {"cliprange": 1}}, "no knob 'cliprange'"),
        ({"rlhf_type": "reinforce_pp", "algo_args": {"beta": 0.5}}, "an option of its own"),
        ({"rlhf_type": "reinforce_pp", "algo_args": {"mask": 1}}, "no knob 'mask'"),
        ({"packing": True}, "no effect with rlhf_type grpo"),
        ({"stop_words": ["x"]}, "no effect with rlhf_type grpo"),
        ({"debug_mode": True}, "no effect with rlhf_type grpo"),
        ({"truncation_strategy": "right"}, "cut a prompt off"),
        ({"rlhf_type": "dapo", "algo": "gspo"}, "another algorithm than rlhf_type dapo"),
        ({"max_completion_length": 4000}, "more than the model's 2048 positions"),
        ({"old_logprobs": "policy", "num_iterations": 2}, "only the first has the policy"),
        ({"mismatch_threshold": 2.0}, "no effect without a weight"),
        ({"metric_for_best_model": "eval_loss"}, "there is no metric 'eval_loss'"),
        ({"dataset": "task:revers#4"}, "there is no such task"),
    ],
)
def test_what_does_not_go_together_is_refused(run_policy, options, reason):
    with pytest.raises(SwiftError, match=reason):
        run_policy(**options)


def test_the_command_shows_answers(run_policy, capsys):
    from swift.cli.rollouts import run as command

    run = run_policy(max_steps=2)
    assert command(["show", str(run.folder), "--step", "2", "--worst", "2", "--tokens"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("step 2: 16 answers, reward") and text.count("answer: ") == 2
    assert command(["show", str(run.folder), "--best", "1", "--json"]) == 0
    best = json.loads(capsys.readouterr().out)
    assert best["reward"] == max(row["reward"] for row in read_rollouts(find_rollouts(run.folder)[2]))
    assert command(["show", str(run.folder), "--steps"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_the_python_trainer_takes_rows_and_functions(tiny_model_dir, tmp_path, monkeypatch):
    from swift import GRPOTrainer

    monkeypatch.setenv("SWIFT_HOME", str(tmp_path / "home"))
    rows = [
        {"query": f"Reverse {number}", "answer": str(number)[::-1], "note": "x"} for number in range(10, 18)
    ]
    trainer = GRPOTrainer(
        model=tiny_model_dir,
        train_dataset=rows,
        eval_dataset=rows[:2],
        reward_funcs=[reward_samples.digits, "format"],
        reward_weights=[1.0, 0.5],
        num_generations=4,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
        max_completion_length=4,
        max_steps=1,
        output_dir=str(tmp_path / "out"),
    )
    run = trainer.train()
    assert trainer.resolved.config.rlhf.beta == 0.1
    found = read_rollouts(find_rollouts(run.folder)[1])
    assert set(found[0]["rewards"]) == {"digits", "format"} and len(found) == 8
    assert "eval_rewards/digits" in run.summary["evaluation"]


def test_shared_prompts_change_no_gradient(run_policy):
    """After three updates the weights are those of training with every prompt computed for each answer."""
    results = [
        run_policy(share_prompts=shared, run_name=str(shared), max_steps=3, dataset="task:arithmetic#16")
        for shared in (True, False)
    ]
    # An explicit share_prompts is refused where it cannot be had.
    assert largest_difference(*(weights(result) for result in results)) < 1e-4
