"""Parts of policy optimisation on their own: tasks, seeds, batches, buffers, settings, the sampler."""

import sys

import numpy as np
import pytest
import torch

from swift.config.bind import resolve
from swift.config.sections.rlhf import POLICY_LOSSES, POLICY_TYPES
from swift.core.errors import ConfigError, DataError, SwiftError
from swift.data.tasks import TASKS, score, task_file, task_rows
from swift.inference.engines.base import Delta
from swift.objectives.base import TokenOutputs
from swift.objectives.policy.algorithms import ALGORITHMS, LOSS_TYPES
from swift.objectives.policy.objective import PolicyObjective
from swift.rl.buffer import RolloutBuffer, micro_batches
from swift.rl.sampler import _Deadline
from swift.rl.settings import PolicySettings, derive_policy
from swift.rl.trajectory import AnswerLayout, Trajectory, request_seed, rollout_batch
from swift.train.config_record import recorded


def trajectory(prompt, tokens, mask=None, group=0, sample=0, advantage=1.0):
    tokens = np.asarray(tokens, np.int32)
    return Trajectory(
        prompt_ids=np.asarray(prompt, np.int32),
        tokens=tokens,
        logprobs=np.full(len(tokens), -1.0, np.float32),
        mask=np.ones(len(tokens), np.bool_) if mask is None else np.asarray(mask, np.bool_),
        version=0,
        group=group,
        sample=sample,
        row=("data.jsonl:", 1 + group),
        seed=0,
        finish_reason="stop",
        text="",
        advantage=np.array([advantage], np.float32),
    )


def settings_of(**options):
    values = {"model": "m", "dataset": "d.jsonl", "rlhf_type": "grpo", "reward_funcs": ["task"], **options}
    resolved = resolve("rlhf", values=values)
    return resolved, derive_policy(resolved)


def test_the_names_of_the_configuration_are_those_of_the_table():
    assert set(POLICY_TYPES) == set(ALGORITHMS)
    assert set(POLICY_LOSSES) == set(LOSS_TYPES)


@pytest.mark.parametrize("name", POLICY_TYPES)
def test_every_algorithm_becomes_its_row(name):
    more = {"chord_sft_dataset": "e.jsonl"} if name == "chord" else {}
    resolved, settings = settings_of(rlhf_type=name, per_device_train_batch_size=16, **more)
    row, policy = ALGORITHMS[name], resolved.config.policy
    assert (settings.algorithm.surrogate, settings.algorithm.aggregation) == (row.surrogate, row.aggregation)
    assert settings.algorithm.knobs == row.knobs and resolved.config.rlhf.beta == row.beta
    assert policy.dynamic_sample is bool(row.sampling.get("dynamic_sample", False))
    assert settings.num_updates == row.sampling.get("steps_per_generation", 1)
    assert settings.old_logprobs == ("policy" if settings.num_updates == 1 else "recompute")


def test_flags_of_ms_swift_change_the_row():
    _, settings = settings_of(
        loss_type="dapo",
        epsilon_high=0.28,
        importance_sampling_level="sequence",
        advantage_estimator="reinforce_plus_plus",
        rollout_importance_sampling_mode="token_truncate",
        rollout_importance_sampling_threshold=3.0,
        off_policy_sequence_mask_delta=0.5,
        beta=0,
    )
    row = settings.algorithm
    assert (row.aggregation, row.ratio, row.advantage) == ("token_mean", "sequence", "reinforce_pp_baseline")
    assert row.knobs == {"epsilon": 0.2, "epsilon_high": 0.28, "opsm_delta": 0.5, "mismatch_cap": 3.0}
    assert row.mismatch == "token_truncate" and row.beta == 0
    _, settings = settings_of(scale_rewards="batch", algo_args={"eps": 1e-6, "dual_clip": 3})
    assert settings.estimator == {"scale_rewards": "batch", "eps": 1e-6}
    for word in ("none", "None", "false", False):
        assert settings_of(scale_rewards=word)[1].estimator == {"scale_rewards": "none"}
    assert settings_of(scale_rewards="none", advantage_estimator="rloo")[1].estimator == {}
    assert settings_of(scale_rewards="null")[1].estimator == {}, "as if it were not there"
    assert settings.algorithm.knobs["dual_clip"] == 3
    _, settings = settings_of(rlhf_type="cispo", epsilon_high=4.0)
    assert settings.algorithm.knobs == {"cap": 4.0}
    resolved, settings = settings_of(
        per_device_train_batch_size=4, gradient_accumulation_steps=4, steps_per_generation=8, num_iterations=2
    )
    assert resolved.config.policy.generation_batch_size == 32
    assert (settings.num_prompts, settings.num_updates, settings.steps_per_batch) == (4, 2, 4)


@pytest.mark.parametrize(
    ("options", "name", "why"),
    [
        ({"beta": 0, "ref_model": "m"}, "ref_model", "beta is 0"),
        ({"rlhf_type": "dapo", "sync_ref_model": True}, "sync_ref_model", "beta is 0"),
        ({"rlhf_type": "dapo", "kl_estimator": "k2"}, "kl_estimator", "beta is 0"),
        ({"rlhf_type": "rloo", "kl_estimator": "k3"}, "kl_estimator", "part of the reward"),
        ({"old_logprobs": "sampler", "mismatch": "token_mask"}, "mismatch", "sampler itself"),
        ({"max_resample_times": 2}, "max_resample_times", "sampled again"),
        ({"soft_cache_length": 8}, "soft_cache_length", "not punished"),
        ({"cosine_max_len": 8}, "cosine_max_len", "cosine is not"),
        ({"repetition_n_grams": 2}, "repetition_n_grams", "repetition is not"),
        ({"chord_mu_peak": 0.5}, "chord_mu_peak", "no expert"),
        ({"probe_sequences": 0, "max_mismatch": 1.0}, "max_mismatch", "nothing is compared"),
        ({"replay": "run"}, "reward_funcs", "another run"),
        ({"reward_funcs": [], "reward_model": "rm", "reward_timeout": 9.0}, "reward_timeout", "no reward functions"),
        ({"rlhf_type": "gdpo", "beta": 0.1, "kl_in_reward": True}, "kl_in_reward", None),
    ],
)  # fmt: skip
def test_what_the_algorithm_leaves_without_effect_is_refused(options, name, why):
    with pytest.raises(ConfigError) as caught:
        settings_of(**options)
    assert caught.value.where == f"--{name}" and caught.value.fix
    assert why is None or why in caught.value.why
    if name in ("kl_estimator", "ref_model"):
        settings_of(**{**options, "beta": 0.1, "kl_in_reward": False, "rlhf_type": "grpo"})


@pytest.mark.parametrize("name", TASKS)
def test_the_right_answer_of_a_task_is_worth_one(name):
    rows = task_rows(name, 20, size=TASKS[name].size, seed=3)
    assert rows == task_rows(name, 40, size=TASKS[name].size, seed=3)[:20]
    for row in rows:
        assert score(row["messages"][1]["content"], row) == 1.0
        assert score("no idea", row) < 1.0 and score("", row) < 1.0


def test_scores_by_hand():
    assert score("12x45", {"task": "reverse", "answer": "12345"}) == pytest.approx(0.8)
    assert score("1234567890", {"task": "reverse", "answer": "12345"}) == pytest.approx(0.5)
    assert score("so it is 42.", {"task": "arithmetic", "answer": "42"}) == 1.0
    row = {"task": "countdown", "numbers": [2, 3, 4], "target": 10}
    assert score("2 * 3 + 4 = 10", row) == 1.0
    assert score("2 + 2 + 4", row) == score("(2 + 3) * 4", row) == 0.1, "an expression, but not the right one"
    for bad in ("2 ** 3", "__import__('os')", "2 +", "4 / 0", "2 * 3.0 + 4", "(" * 5000):
        assert score(bad, row) == 0.0


def test_files_of_tasks(tmp_path, monkeypatch):
    monkeypatch.setenv("SWIFT_HOME", str(tmp_path))
    file = task_file("task:sort:size=3/seed=2#7")
    assert len(file.read_text().splitlines()) == 7 and file == task_file("task:sort:length=3/seed=2#7")
    with pytest.raises(DataError, match="is no option of a task"):
        task_file("task:sort:bigness=3#7")
    with pytest.raises(DataError) as caught:
        task_file("task:srot")
    assert "task:sort" in caught.value.fix


def test_seeds_differ_and_are_functions_of_their_parts():
    seeds = {
        request_seed(run, version, draw, k)
        for run in (0, 1)
        for version in (0, 1)
        for draw in (0, 1)
        for k in (0, 1)
    }
    assert len(seeds) == 16 and all(0 <= seed < 2**64 for seed in seeds)
    assert request_seed(1, 2, 3, 4) == request_seed(1, 2, 3, 4)


@pytest.mark.parametrize("mode", ["padded", "padding_free"])
def test_targets_are_the_tokens_that_the_policy_wrote(mode):
    """A result of a tool between two answers is read, and not learned."""
    one = trajectory([5, 6], [7, 8, 20, 21, 9], mask=[1, 1, 0, 0, 1])
    batch = rollout_batch([one, trajectory([3], [4])], AnswerLayout(mode, True, 0, 0.5))
    learned = batch.targets[batch.targets != -100].tolist()
    assert learned == [7, 8, 9, 4] and batch.target_counts == [3, 1] and batch.temperature == 0.5
    assert batch.input_ids.flatten().tolist()[:7] == [5, 6, 7, 8, 20, 21, 9]
    assert one.sampler_logprobs.tolist() == [-1.0] * 3
    moved = batch.to("cpu")
    assert type(moved) is type(batch)


def test_micro_batches_hold_every_answer_once():
    answers = [trajectory([1] * (3 + at % 4), [2] * (1 + at % 3), sample=at) for at in range(7)]
    for by_length in (False, True):
        parts = micro_batches(answers, 3, by_length)
        assert sorted(one.sample for part in parts for one in part) == list(range(7))
        assert [len(part) for part in parts] == [3, 3, 1]
    assert [len(one.prompt_ids) + len(one.tokens) for one in parts[0]] == sorted(
        (len(one.prompt_ids) + len(one.tokens) for one in answers), reverse=True
    )[:3]


def test_a_buffer_deals_out_updates_and_passes():
    settings = PolicySettings(ALGORITHMS["grpo"], {}, 2, 2, 2, 2, 2, 1, "recompute")
    answers = [trajectory([1], [2, 3], group=at // 2, sample=at % 2, advantage=at) for at in range(4)]
    answers[1].is_used = False
    for one in answers:
        one.old_logprobs = one.logprobs
    buffer = RolloutBuffer(answers, settings, AnswerLayout("padded", False, 0, 1.0))
    steps = []
    while not buffer.is_used_up:
        steps.append([float(batch.policy.advantages[0]) for batch in buffer.next_step()])
    assert steps == [[0, 1], [2, 3], [0, 1], [2, 3]]
    buffer.used = 0
    assert not buffer.next_step()[1].policy.mask.any(), "left out, and counted as an answer without tokens"


@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo", "cispo", "rloo", "dr_grpo"])
@pytest.mark.parametrize("split", [1, 2, 4])
def test_gradients_do_not_depend_on_the_split_nor_on_masked_tokens(name, split):
    """Through the objective, float64: shares of micro-batches add up; what a tool wrote has no influence."""
    generator = torch.Generator().manual_seed(0)
    answers = [
        trajectory([1], [2] * (2 + at), mask=[1, 0] + [1] * at, group=at // 2, advantage=float(at) - 1.5)
        for at in range(4)
    ]
    table = torch.randn(4, 5, generator=generator, dtype=torch.float64) - 1
    settings = PolicySettings(ALGORITHMS[name], {}, 2, 2, 1, 1, 4, 4 // split, "recompute")
    for one, row in zip(answers, table, strict=True):
        one.old_logprobs = (row[: one.num_learned] + 0.1).float().numpy()
    buffer = RolloutBuffer(answers, settings, AnswerLayout("padding_free", False, 0, 1.0))
    objective = PolicyObjective(settings.algorithm, 8)

    def gradient(size):
        values = [
            row[: one.num_learned].clone().requires_grad_() for one, row in zip(answers, table, strict=True)
        ]
        buffer.used, buffer.settings = (
            0,
            PolicySettings(ALGORITHMS[name], {}, 2, 2, 1, 1, 4, size, "recompute"),
        )
        batches = buffer.next_step()
        counts = objective.denominators(batches)
        at = 0
        for batch in batches:
            part = values[at : at + len(batch.target_counts)]
            at += len(part)
            logprobs = torch.cat(part)
            objective(TokenOutputs(logprobs, logprobs > 0), batch, counts)[0].backward()
        return torch.cat([value.grad for value in values])

    assert torch.allclose(gradient(4 // split), gradient(4), atol=1e-10, rtol=0)


def test_means_over_no_tokens_are_not_told():
    answer = trajectory([1], [2, 3], mask=[0, 0])
    settings = PolicySettings(ALGORITHMS["dapo"], {}, 1, 1, 1, 1, 1, 1, "policy")
    buffer = RolloutBuffer([answer], settings, AnswerLayout("padding_free", False, 0, 1.0))
    objective, batches = PolicyObjective(settings.algorithm, 8), buffer.next_step()
    logprobs = torch.zeros(0, requires_grad=True)
    outputs = TokenOutputs(logprobs, logprobs > 0)
    loss, found = objective(outputs, batches[0], objective.denominators(batches))
    assert loss.item() == 0 and not found["groups"].any()


def test_sampling_that_takes_too_long_says_how_far_it_came():
    watch = _Deadline(-1.0, 3)
    watch(0, Delta(finish_reason="stop"))
    with pytest.raises(SwiftError, match=r"1 of 3 answers after -1 s") as caught:
        for _ in range(256):
            watch(0, Delta())
    assert caught.value.where == "sampling" and "--max_completion_length" in caught.value.fix


def test_a_row_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "own_rows.py").write_text(
        "from swift.objectives.policy.algorithms import Algorithm\n"
        "MINE = Algorithm('none', advantage='rloo', beta=0.02)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])  # the current folder is added
    for algo in ("own_rows.MINE", "own_rows.py:MINE", f"{tmp_path}/own_rows.py:MINE"):
        resolved, settings = settings_of(algo=algo)
        assert settings.algorithm.advantage == "rloo" and resolved.config.rlhf.beta == 0.02
    assert (
        recorded(settings_of(algo="own_rows.py:MINE")[0]).config.policy.algo == f"{tmp_path}/own_rows.py:MINE"
    )
    monkeypatch.delitem(sys.modules, "own_rows")
    with pytest.raises(ConfigError, match="there is no algorithm at"):
        settings_of(algo="own_rows.YOURS")


def test_answers_to_one_prompt_share_it_in_a_row():
    asked = list(range(10, 21))
    answers = [
        trajectory(asked, [1, 2]),
        trajectory(asked, [1, 3, 4]),
        trajectory(asked, [5], mask=[0]),
        trajectory([7] * 9, [6]),
    ]
    batch = rollout_batch(answers, AnswerLayout("padding_free", True, 0, 1.0))
    assert batch.document_lengths == [[10, 3, 4, 2, 10]]
    assert batch.document_continues == [[False, True, True, True, False]]
    assert batch.input_ids.tolist() == [[*range(10, 20), 20, 1, 2, 20, 1, 3, 4, 20, 5, *[7] * 9, 6]]
    expected = [*range(10), 10, 11, 12, 10, 11, 12, 13, 10, 11, *range(10)]
    assert batch.position_ids.tolist() == [expected]
    apart = rollout_batch(answers, AnswerLayout("padding_free", False, 0, 1.0))
    assert apart.document_continues is None and apart.document_lengths == [[13, 14, 12, 10]]
    for one in (batch, apart):
        assert one.targets[one.targets != -100].tolist() == [1, 2, 1, 3, 4, 6]
        assert one.target_counts == [2, 3, 0, 1] and one.num_tokens == 13 + 14 + 12 + 10
