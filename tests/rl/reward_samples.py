"""Rewards of a user, good and bad, in their file."""

import asyncio
import math
import os
import time


def length(completions, **kwargs):
    """ms-swift's form: texts."""
    return [float(len(text)) for text in completions]


def trl_length(prompts, completions, **kwargs):
    """TRL's form: messages."""
    assert prompts[0][0]["role"] == "user"
    return [float(len(one[0]["content"])) for one in completions]


def trl_annotated(completions: list[list[dict[str, str]]], wanted: list[str], **kwargs):
    """As trl.rewards.accuracy_reward: messages, without prompts."""
    return [float(one[0]["content"] == right) for one, right in zip(completions, wanted, strict=True)]


def one_at_a_time(completion, wanted):
    return float(completion == wanted)


async def later(completions, completion_ids, trainer_state):
    await asyncio.sleep(0)
    return [len(ids) + trainer_state.global_step for ids in completion_ids]


class Scaled:
    def __init__(self, factor=1.0):
        self.factor = factor

    def __call__(self, completions, **kwargs):
        return [self.factor * len(text) for text in completions]


def hangs(completions, **kwargs):
    if any("hang" in text for text in completions):
        time.sleep(600)
    return [1.0] * len(completions)


def dies(completions, **kwargs):
    if any("die" in text for text in completions):
        os._exit(7)
    return [1.0] * len(completions)


def raises(completions, **kwargs):
    if any("raise" in text for text in completions):
        raise RuntimeError("no such thing")
    return [1.0] * len(completions)


def exits(completions, **kwargs):
    raise SystemExit(0)


def nan(completions, **kwargs):
    return [math.nan if "nan" in text else None if "none" in text else 1.0 for text in completions]


def infinite(completions, **kwargs):
    return [math.inf if "inf" in text else 1.0 for text in completions]


def too_few(completions, **kwargs):
    return [1.0]


def a_number(completions, **kwargs):
    return 1.0


def slow(completions, **kwargs):
    """Slow for many, quick for one."""
    if len(completions) > 1:
        time.sleep(600)
    return [2.0] * len(completions)


def prints(completions, **kwargs):
    print("this must not disturb anybody", flush=True)
    return [0.5] * len(completions)


def no_answers(texts):
    return texts


def digits(completions, answer, **kwargs):
    """Share of the right digits; the toy's reward."""
    return [
        sum(one == other for one, other in zip(text, right, strict=False)) / max(len(text), len(right), 1)
        for text, right in zip(completions, answer, strict=True)
    ]
