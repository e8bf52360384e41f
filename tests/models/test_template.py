"""Weights, strategies, plain text, options and errors of the template."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from swift.config.sections.template import TemplateSection
from swift.core.errors import ConfigError, DataError, ModelError
from swift.models.load import load_template, load_tokenizer
from swift.models.template import Encoded, Template

CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "first"},
    {"role": "user", "content": "two"},
    {"role": "assistant", "content": "second"},
]


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> Any:
    return load_tokenizer(tiny_model_dir)


def template(tokenizer: Any, pretraining: bool = False, **options: Any) -> Template:
    return Template(tokenizer, TemplateSection(**options), pretraining)


def learned_text(tokenizer: Any, encoded: Encoded) -> str:
    return tokenizer.decode([label for label in encoded.labels if label != -100])


def weights_by_text(tokenizer: Any, encoded: Encoded) -> list[tuple[str, float]]:
    """Runs of tokens of the same weight."""
    assert encoded.weights is not None and len(encoded.weights) == len(encoded.input_ids)
    runs: list[tuple[list[int], float]] = []
    for token, weight in zip(encoded.input_ids, encoded.weights, strict=True):
        if not runs or runs[-1][1] != weight:
            runs.append(([], weight))
        runs[-1][0].append(token)
    return [(tokenizer.decode(ids), weight) for ids, weight in runs]


def changed(index: int, **keys: Any) -> list[dict[str, Any]]:
    return [{**message, **keys} if number == index else message for number, message in enumerate(CHAT)]


@pytest.mark.parametrize(
    ("strategy", "text"),
    [("default", "first<|im_end|>second<|im_end|>"), ("last_round", "second<|im_end|>")],
)
def test_strategies(tokenizer: Any, strategy: str, text: str) -> None:
    encoded = template(tokenizer, loss_scale=strategy).encode(CHAT)
    assert learned_text(tokenizer, encoded) == text and encoded.weights is None


def test_strategy_all_learns_every_token(tokenizer: Any) -> None:
    encoded = template(tokenizer, loss_scale="all").encode(CHAT)
    assert encoded.labels == encoded.input_ids and encoded.weights is None


def test_last_round_is_everything_after_the_last_question(tokenizer: Any) -> None:
    steps = [*CHAT[:3], {"role": "assistant", "content": "call"}, {"role": "tool", "content": "2"}, CHAT[3]]
    encoded = template(tokenizer, loss_scale="last_round").encode(steps)
    assert learned_text(tokenizer, encoded) == "call<|im_end|>second<|im_end|>"


def test_loss_false_of_a_message(tokenizer: Any) -> None:
    encoded = template(tokenizer).encode(changed(1, loss=False))
    assert learned_text(tokenizer, encoded) == "second<|im_end|>" and encoded.weights is None
    encoded = template(tokenizer, loss_scale="all").encode(changed(1, loss=False))
    assert "first" not in learned_text(tokenizer, encoded) and "two" in learned_text(tokenizer, encoded)


def test_loss_true_wins_over_last_round(tokenizer: Any) -> None:
    encoded = template(tokenizer, loss_scale="last_round").encode(changed(1, loss=True))
    assert learned_text(tokenizer, encoded) == "first<|im_end|>second<|im_end|>"


def test_loss_scale_of_a_message(tokenizer: Any) -> None:
    encoded = template(tokenizer).encode(changed(3, loss_scale=0.25))
    assert [run for run in weights_by_text(tokenizer, encoded) if run[1] > 0] == [
        ("first<|im_end|>", 1.0),
        ("second<|im_end|>", 0.25),
    ]


def test_loss_scale_of_parts(tokenizer: Any) -> None:
    parts = [
        {"type": "text", "text": "think. ", "loss_scale": 0.5},
        {"type": "text", "text": "skip ", "loss_scale": 0},
        {"type": "text", "text": "answer", "loss_scale": 2.0},
    ]
    messages = [*CHAT[:3], {"role": "assistant", "content": parts}]
    encoded = template(tokenizer, use_loss_scale=True).encode(messages)
    runs = weights_by_text(tokenizer, encoded)
    # A token belongs to the part its first character is in; byte-level tokens take the space before a word along.
    positive = [(text.strip(), weight) for text, weight in runs]
    assert ("think.", 0.5) in positive and ("answer<|im_end|>", 2.0) in positive
    assert all(
        label == -100 for label, w in zip(encoded.labels, encoded.weights or [], strict=True) if w == 0
    )
    plain = template(tokenizer).encode(messages)
    assert plain.weights is None and plain.input_ids == encoded.input_ids


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "user", "content": "x", "loss": True}, "only assistant"),
        ({"role": "assistant", "content": "x", "loss": "yes"}, "not true or false"),
        ({"role": "assistant", "content": "x", "loss_scale": -1}, "from 0 on"),
        ({"role": "user", "content": 3}, "not text"),
        ({"content": "x"}, "no role"),
        ({"role": "user", "content": [{"type": "image", "image": "a.png"}]}, "only text parts"),
        ({"role": "critic", "content": "x"}, "cannot stand here"),
    ],
)
def test_wrong_messages(tokenizer: Any, message: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        template(tokenizer).encode([CHAT[0], message])


def test_no_messages(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="without messages"):
        template(tokenizer).encode([])


def test_plain_text_for_pretraining(tokenizer: Any) -> None:
    pt = template(tokenizer, pretraining=True, loss_scale="all")
    encoded = pt.encode([{"role": "assistant", "content": "Hello there"}])
    assert encoded.labels == encoded.input_ids
    assert tokenizer.decode(encoded.input_ids) == "Hello there<|im_end|>"
    ended = pt.encode([{"role": "assistant", "content": "Hello there<|im_end|>"}])
    assert ended.input_ids == encoded.input_ids


def test_plain_text_with_a_question(tokenizer: Any) -> None:
    plain = template(tokenizer, use_chat_template=False)
    assert learned_text(tokenizer, plain.encode(CHAT[:2])) == "first<|im_end|>"
    assert tokenizer.decode(plain.encode_prompt(CHAT[:1])) == "one"


def test_begin_of_text_of_plain_text(tmp_path: Path) -> None:
    from swift.models.tiny import make_tiny_model

    llama = load_tokenizer(make_tiny_model(tmp_path / "m", architecture="llama", chat_template="llama3"))
    pt = template(llama, pretraining=True, loss_scale="all")
    for text in ("Hi", "<|begin_of_text|>Hi"):
        ids = pt.encode([{"role": "assistant", "content": text}]).input_ids
        assert llama.decode(ids) == "<|begin_of_text|>Hi<|eot_id|>"
    sft = template(llama).encode(CHAT[:2])
    assert sft.input_ids.count(llama.bos_token_id) == 1
    assert learned_text(llama, sft) == "first<|eot_id|>"


def test_many_are_encoded_as_one(tokenizer: Any) -> None:
    samples: list[Any] = [(CHAT[: 2 + 2 * (number % 2)], None) for number in range(9)]
    one = template(tokenizer)
    assert one.encode_many(samples) == [one.encode(*sample) for sample in samples]
    assert one.encode_many([]) == []


def test_it_can_be_sent_to_another_process(tokenizer: Any) -> None:
    here = template(tokenizer, system="x")
    there = pickle.loads(pickle.dumps(here))
    assert there.encode(CHAT) == here.encode(CHAT) and there.fingerprint == here.fingerprint


def test_a_token_across_the_border_is_not_learned(tokenizer: Any) -> None:
    """The prompt ends in "a", the answer begins with "n", and "an" is one token: it starts before the answer."""
    assert len(tokenizer("an", add_special_tokens=False)["input_ids"]) == 1
    source = (
        "{% for m in messages %}{% if m.role == 'assistant' %}a{% generation %}{{ m.content }}"
        "{% endgeneration %}{{ eos_token }}{% else %}{{ m.content + '\\n' }}{% endif %}{% endfor %}"
    )
    path = Path(tokenizer.name_or_path).parent / "border.jinja"
    path.write_text(source, encoding="utf-8")
    encoded = template(tokenizer, chat_template=str(path)).encode(
        [CHAT[0], {"role": "assistant", "content": "n,"}]
    )
    assert "".join(tokenizer.convert_ids_to_tokens(encoded.input_ids)).endswith("an,<|im_end|>")
    assert learned_text(tokenizer, encoded) == ",<|im_end|>"


def test_a_character_of_several_tokens_is_learned_whole(tokenizer: Any) -> None:
    encoded = template(tokenizer).encode([CHAT[0], {"role": "assistant", "content": "🎉"}])
    assert sum(label != -100 for label in encoded.labels) == 5  # four bytes and the end
    assert learned_text(tokenizer, encoded) == "🎉<|im_end|>"


def test_default_system_prompt(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "system.txt"
    file.write_text("Be brief.\n", encoding="utf-8")
    for system in ("Be brief.", str(file)):
        text = template(tokenizer, system=system).render(CHAT)
        assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>")
    own = [{"role": "system", "content": "Mine"}, *CHAT]
    assert "Be brief" not in template(tokenizer, system="Be brief.").render(own)
    with pytest.raises(ConfigError, match="system prompt"):
        template(tokenizer, system=str(tmp_path / "none.txt"))


def test_tools_reach_the_template(tokenizer: Any) -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    call = {"function": {"name": "add", "arguments": '{"a": [1, "é"]}'}}
    messages = [CHAT[0], {"role": "assistant", "content": None, "tool_calls": [call]}]
    text = template(tokenizer).render(messages, tools)
    assert '{"type": "function", "function": {"name": "add"}}' in text
    assert '{"name": "add", "arguments": {"a": [1, "é"]}}' in text


@pytest.mark.parametrize("name", ["chatml", "gemma", "llama3", "mistral", "plain"])
def test_built_in_chat_templates(tokenizer: Any, name: str) -> None:
    built_in = template(tokenizer, chat_template=name)
    assert built_in.chat is not None and built_in.chat.has_generation
    encoded = built_in.encode(CHAT)
    assert "one" not in learned_text(tokenizer, encoded) and "second" in learned_text(tokenizer, encoded)
    system = [{"role": "system", "content": "SYS"}, *CHAT]
    assert "SYS" in built_in.render(system)


def test_fingerprint_follows_what_changes_tokens(tokenizer: Any, tiny_model_dir: Path) -> None:
    prints = {
        template(tokenizer).fingerprint,
        template(tokenizer, loss_scale="all").fingerprint,
        template(tokenizer, system="x").fingerprint,
        template(tokenizer, chat_template="plain").fingerprint,
        template(tokenizer, pretraining=True).fingerprint,
    }
    assert len(prints) == 5
    assert template(tokenizer).fingerprint == load_template(tiny_model_dir, TemplateSection()).fingerprint


def test_unknown_chat_template(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="did you mean 'chatml'"):
        template(tokenizer, chat_template="chatlm")


def test_broken_chat_template(tokenizer: Any, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jinja"
    broken.write_text("{% for m in messages %}", encoding="utf-8")
    with pytest.raises(ModelError, match="not valid Jinja"):
        template(tokenizer, chat_template=str(broken))


def test_no_chat_template(tokenizer: Any) -> None:
    from copy import copy

    bare = copy(tokenizer)
    bare.chat_template = None
    with pytest.raises(ModelError, match="has no chat template"):
        template(bare)


def test_turns_that_cannot_be_told_apart_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed.jinja"
    mixed.write_text("{% for m in messages | reverse %}{{ m.content }}{% endfor %}", encoding="utf-8")
    with pytest.raises(DataError, match="cannot tell which part"):
        template(tokenizer, chat_template=str(mixed)).encode([*CHAT, {"role": "user", "content": "x"}])


def test_a_template_that_leaves_out_tool_calls_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    plain = tmp_path / "plain.jinja"
    plain.write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bonn"}}}
    messages = [CHAT[0], {"role": "assistant", "content": "", "tool_calls": [call]}]
    with pytest.raises(DataError, match="leaves out the tool call 'weather' of message 2"):
        template(tokenizer, chat_template=str(plain)).encode(messages)
    assert "weather" in learned_text(tokenizer, template(tokenizer, chat_template="chatml").encode(messages))
