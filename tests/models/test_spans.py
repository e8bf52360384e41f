"""Where turns end, and turns that only a comparison of renderings finds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from swift.core.errors import DataError
from swift.models.spans import end_of_turn_token, find_turns, fit_end

ENDS = ["<e>", "<eos>"]


@pytest.mark.parametrize(
    ("before", "turn", "after", "learned"),
    [
        ("u:", "answer", "<e>\n", "answer<e>"),
        ("u:", "answer<e>", "\n", "answer<e>"),
        ("u:", "answer<e>\n", "next", "answer<e>"),
        ("u:", "answer<e>\n<eos>", "", "answer<e>"),
        ("u:", "answer \n", "<e>", "answer \n<e>"),
        ("u:", " <e>", "", " <e>"),
        ("u:", "", "<e>\nnext", "<e>"),
        ("u:", "a<e>b", "<e>", "a<e>b<e>"),
        ("u:", "answer\n", "next", "answer"),
        ("u:", "answer", "next<e>", "answer"),
    ],
)
def test_fit_end(before: str, turn: str, after: str, learned: str) -> None:
    text = before + turn + after
    end = fit_end(text, len(before), len(before) + len(turn), ENDS)
    assert text[len(before) : end] == learned


def render(messages: Sequence[Any], prompt: bool, last_mark: str = "") -> str:
    """Earlier answers are shortened, so no rendering is a prefix of a longer one."""
    pieces = []
    for index, message in enumerate(messages):
        last = index == len(messages) - 1
        content = message["content"] if last else message["content"].rpartition("|")[2]
        pieces.append(f"[{message['role'][0]}]{content}<e>{last_mark if last else ''}\n")
    return "".join(pieces) + ("[a]" if prompt else "")


def test_rewritten_history() -> None:
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "thought|one"},
        {"role": "user", "content": "one<e>\n[a]one"},
        {"role": "assistant", "content": "thought|two"},
    ]
    text = render(messages, False)
    turns = find_turns(render, messages, text, ENDS)
    assert [(turn.index, text[turn.start : turn.end]) for turn in turns] == [
        (1, "one<e>"),
        (3, "thought|two<e>"),
    ]


def test_an_answer_without_a_question() -> None:
    messages = [{"role": "assistant", "content": "hi"}, {"role": "user", "content": "q"}]
    text = render(messages, False)
    (turn,) = find_turns(render, messages, text, ENDS)
    assert text[turn.start : turn.end] == "hi<e>"


def test_a_template_that_shuffles_is_refused() -> None:
    def backwards(messages: Sequence[Any], prompt: bool) -> str:
        return "".join(message["content"] for message in reversed(messages))

    messages = [
        {"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))
    ]
    with pytest.raises(DataError, match="cannot tell which part"):
        find_turns(backwards, messages, backwards(messages, False), ENDS)


def test_a_generation_prompt_unlike_the_history_is_refused() -> None:
    def marked(messages: Sequence[Any], prompt: bool) -> str:
        return render(messages, prompt, last_mark="!")

    messages = [
        {"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))
    ]
    with pytest.raises(DataError, match="cannot tell which part"):
        find_turns(marked, messages, marked(messages, False), ENDS)


def test_end_of_turn_token() -> None:
    assert end_of_turn_token(render, ["<e>", "<eos>", "<x>"]) == "<e>"
    assert end_of_turn_token(render, ["<x>"]) is None
