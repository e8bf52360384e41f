"""Rewards in every form that people write them, and what a bad one does."""

import http.server
import json
import math
import socketserver
import threading
from pathlib import Path

import pytest
import reward_samples

from swift.config.bind import resolve
from swift.core.errors import ConfigError, SwiftError
from swift.rl.builtin_rewards import BUILT_IN
from swift.rl.reward_functions import RewardBatch, RewardFunction, find_reward, reward_source
from swift.rl.reward_pool import RewardPool
from swift.rl.rewards import Rewards

FILE = str(Path(reward_samples.__file__))


def batch_of(*texts, **columns):
    count = len(texts)
    return RewardBatch(
        prompts=[[{"role": "user", "content": f"question {at}"}] for at in range(count)],
        completions=list(texts),
        completion_ids=[list(range(len(text))) for text in texts],
        columns=columns,
        step=4,
        max_steps=10,
    )


def call(function, batch, **options):
    return find_reward(f"{FILE}:{function}", options)(batch)


def test_every_form_of_a_reward():
    batch = batch_of("ab", "abc", wanted=["ab", "x"])
    assert call("length", batch) == [2.0, 3.0]
    assert call("trl_length", batch) == [2.0, 3.0]
    assert call("trl_annotated", batch) == [1.0, 0.0]
    assert call("one_at_a_time", batch) == [1.0, 0.0]
    assert call("later", batch) == [6.0, 7.0]
    assert call("Scaled", batch, factor=3.0) == [6.0, 9.0]
    assert find_reward("reward_samples:length", {})(batch) == [2.0, 3.0]
    assert math.isnan(call("nan", batch_of("nan"))[0]) and math.isnan(call("nan", batch_of("none"))[0])


def test_a_package_offers_rewards_under_a_name(tmp_path, monkeypatch):
    about = tmp_path / "their_rewards-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: their-rewards\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[swift.rewards]\nvowels = their_rewards:vowels\n")
    (tmp_path / "their_rewards.py").write_text(
        "def vowels(completions): return [sum(c in 'aeiou' for c in text) for text in completions]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find_reward("vowels", {})(batch_of("banana", "xyz")) == [3.0, 0.0]


def test_a_plugin_of_ms_swift_is_told_what_to_leave_out(tmp_path):
    file = tmp_path / "plugin.py"
    file.write_text("from swift.plugin import ORM, orms\nclass Mine(ORM):\n    pass\n")
    with pytest.raises(ConfigError, match=r"No module named 'swift.plugin'") as caught:
        find_reward(f"{file}:Mine", {})
    assert "leave out the import" in caught.value.fix


def test_what_is_no_reward_says_so():
    with pytest.raises(ConfigError, match="did you mean length"):
        find_reward(f"{FILE}:lenght", {})
    with pytest.raises(ConfigError, match="takes completions"):
        find_reward(f"{FILE}:no_answers", {})
    with pytest.raises(ConfigError, match="did you mean accuracy"):
        find_reward("acuracy", {})
    with pytest.raises(ConfigError, match="did you mean factor"):
        call("Scaled", batch_of("a"), facter=2)
    with pytest.raises(ConfigError, match="no such file"):
        find_reward("nowhere.py:reward", {})
    with pytest.raises(ConfigError, match="judge needs url") as caught:
        find_reward("judge", {})
    assert caught.value.where == "--reward_args" and caught.value.fix.startswith('--reward_args \'{"judge"')
    with pytest.raises(ConfigError, match="regex needs pattern") as caught:
        find_reward("regex", {})
    assert caught.value.fix == '--reward_args \'{"regex": {"pattern": ...}}\''
    with pytest.raises(KeyError, match="no column 'wanted'"):
        call("one_at_a_time", batch_of("a"))
    with pytest.raises(ConfigError, match="cannot be found by another process"):
        reward_source(lambda completions: [])
    assert reward_source(reward_samples.length) == f"{FILE}:length"


def builtin(name, batch, **options):
    return RewardFunction(name, BUILT_IN[name](**options))(batch)


def test_built_in_rewards_by_hand():
    good = "<think>two and two</think> <answer>4</answer>"
    assert builtin("format", batch_of(good, "4")) == [1.0, 0.0]
    assert builtin("regex", batch_of("a1", "b"), pattern=r"a\d") == [1.0, 0.0]
    assert builtin("accuracy", batch_of(good, "5", r"\boxed{4}", solution=["4"] * 3)) == [1.0, 0.0, 1.0]
    # n-grams of "a b a b a": (a b a), (b a b), (a b a): two different ones of three.
    assert builtin("repetition", batch_of("a b a b a", "a b"), n_grams=3) == pytest.approx([-1 / 3, 0.0])
    overlong = builtin(
        "soft_overlong", batch_of("a" * 6, "a" * 8, "a" * 10, "a" * 12), max_length=10, cache_length=4
    )
    assert overlong == pytest.approx([0.0, -0.5, -1.0, -1.0])
    # cosine, right: 1.0 at length 0, 0.5 at the limit, 0.75 half way; wrong: -0.25 half way.
    halfway = batch_of("4" + " " * 9, "5" + " " * 9, solution=["4", "4"])
    assert builtin("cosine", halfway, max_len=20) == pytest.approx([0.75, -0.25])
    schema = {"type": "object", "required": ["a"]}
    assert builtin("json_schema", batch_of('{"a": 1}', "{}", "no"), schema=schema) == [1.0, 0.0, 0.0]
    numeric = batch_of("the answer is 4", "5", solution=["4", "4"])
    assert builtin("numeric", numeric) == [1.0, 0.0]
    assert builtin("exact_match", batch_of("a", "b", solution=["a", "a"])) == [1.0, 0.0]


def test_code_runs_in_the_sandbox():
    batch = batch_of("def f(): return 1", "def f(): return 2", tests=[["assert f() == 1"]] * 2)
    assert builtin("code", batch) == [1.0, 0.0]


@pytest.fixture
def pool():
    pools = []

    def make(*names, timeout=1.0, num_processes=2):
        pools.append(
            RewardPool(
                [(f"{FILE}:{name}", {}) for name in names], timeout=timeout, num_processes=num_processes
            )
        )
        pools[-1].check()
        return pools[-1]

    yield make
    for one in pools:
        one.close()


@pytest.mark.parametrize(
    ("name", "kind", "why"),
    [
        ("hangs", "hung", "no result within 1 s"),
        ("dies", "died", "code 7"),
        ("raises", "raised", "RuntimeError: no such thing"),
        ("infinite", "raised", "infinite"),
    ],
)
def test_a_failing_answer_is_told_from_the_others(pool, name, kind, why):
    [(values, failures)] = pool(name)(batch_of("a", f"{name[:-1]} it inf hang", "b"))
    assert (values[0], values[2]) == (1.0, 1.0) and math.isnan(values[1])
    assert list(failures) == [1] and failures[1].kind == kind and why in failures[1].why


def test_the_pool_goes_on_after_failures_and_functions_do_not_disturb_one_another(pool):
    both = pool("hangs", "prints", "length")
    for _ in range(2):
        results = both(batch_of("hang", "b"))
        assert results[1] == ([0.5, 0.5], {}) and results[2] == ([4.0, 1.0], {})
        assert list(results[0][1]) == [0]


def test_what_is_only_slow_together_is_computed_one_by_one(pool):
    one = pool("slow")
    assert one(batch_of("a", "b")) == [([2.0, 2.0], {})]
    assert one._is_slow == {0}
    assert one(batch_of("a", "b", "c")) == [([2.0, 2.0, 2.0], {})]


def test_a_judge_over_http_is_a_reward_and_fails_for_single_answers():
    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    options = {"judge": {"url": f"http://127.0.0.1:{server.server_address[1]}/v1", "model": "j"}}
    values = {"model": "m", "dataset": "d.jsonl", "rlhf_type": "grpo", "reward_funcs": ["judge"]}
    rewards = Rewards(resolve("rlhf", values={**values, "reward_args": options, "reward_num_proc": 1}).config)
    try:
        scores = rewards(batch_of("fine", "odd", "fine", solution=["x"] * 3), lambda place: f"row {place}")
    finally:
        rewards.close()
        server.shutdown()
        server.server_close()
    assert scores.parts == [[0.7, 0.0, 0.7]] and not scores.dropped
    assert list(scores.failures) == [1] and "row 1: the reward judge failed" in scores.failures[1]


class _Judge(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        asked = self.rfile.read(int(self.headers["content-length"])).decode()
        text = "no idea" if "odd" in asked else "Score: 7"
        reply = {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]}
        body = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def test_a_script_that_trains_where_it_is_imported_starts_no_other_training(tmp_path):
    """Its reward is found by importing it, in a process that must not train and start such processes itself."""
    script = tmp_path / "script.py"
    script.write_text(
        "from swift import train\n"
        "def right(completions): return [1.0] * len(completions)\n"
        "train(model='nowhere', dataset='d.jsonl')\n"
    )
    pool = RewardPool([(f"{script}:right", {})], timeout=60.0, num_processes=1)
    try:
        with pytest.raises(ConfigError, match="a file that trains was imported") as caught:
            pool.check()
    finally:
        pool.close()
    assert "__main__" in caught.value.fix


def test_a_process_that_was_killed_while_idle_is_replaced(pool):
    one = pool("length", timeout=60.0)
    assert one(batch_of("a", "bc")) == [([1.0, 2.0], {})]
    for worker in one._workers:
        worker.process.kill()
        worker.process.wait()
    assert one(batch_of("a", "bc")) == [([1.0, 2.0], {})]


@pytest.mark.parametrize(
    ("name", "message"), [("too_few", "returned 1 rewards for 2 answers"), ("a_number", "returned float")]
)
def test_a_wrong_shape_ends_the_run(pool, name, message):
    with pytest.raises(SwiftError, match=message):
        pool(name)(batch_of("a", "b"))


def test_a_reward_that_cannot_be_made_is_found_before_training(pool):
    with pytest.raises(ConfigError, match="did you mean length"):
        pool("lenght")


def rewards_of(policy="zero", weights=(), *names):
    values = {
        "model": "m",
        "dataset": "d.jsonl",
        "rlhf_type": "grpo",
        "reward_funcs": [f"{FILE}:{name}" for name in names],
        "reward_weights": list(weights),
        "on_reward_failure": policy,
        "reward_timeout": 1.0,
    }
    return Rewards(resolve("rlhf", values=values).config)


@pytest.mark.parametrize("policy", ["zero", "drop", "stop"])
def test_the_policy_for_failures(policy):
    rewards = rewards_of(policy, (), "dies")
    try:
        rewards.check()
        batch = batch_of("a", "die", "b")
        if policy == "stop":
            with pytest.raises(SwiftError, match=r"row 1: the reward dies died"):
                rewards(batch, lambda place: f"row {place}")
            return
        scores = rewards(batch, lambda place: f"row {place}")
        assert "row 1" in scores.failures[1] and "dies died" in scores.failures[1]
        assert scores.dropped == ({1} if policy == "drop" else set())
        assert scores.parts[0][0] == 1.0
        if policy == "zero":
            assert scores.parts[0][1] == 0.0
        with pytest.raises(SwiftError, match="for all 2 answers"):
            rewards(batch_of("die", "die"), str)
    finally:
        rewards.close()


def test_sums_are_weighted_and_what_does_not_apply_counts_nothing():
    rewards = rewards_of("zero", (2.0, 0.5), "nan", "length")
    try:
        scores = rewards(batch_of("nan", "abcd"), str)
        assert rewards.names == ["nan", "length"]
        assert rewards.total([part[0] for part in scores.parts]) == pytest.approx(0.5 * 3)
        assert rewards.total([part[1] for part in scores.parts]) == pytest.approx(2.0 + 0.5 * 4)
        assert not scores.dropped
    finally:
        rewards.close()
    alone = rewards_of("zero", (), "nan")
    try:
        assert alone(batch_of("nan", "a"), str).dropped == {0}, "no reward applies: nothing to learn from"
    finally:
        alone.close()
