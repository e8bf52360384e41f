"""Tools as text (``agent_template``), and the built-in chat templates: exactly the assistant's words are learned."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import swift.models.template as module
from swift.config.sections.template import TemplateSection
from swift.core.errors import DataError
from swift.models.agents import AGENT_FORMATS, write_tools
from swift.models.template import Template
from swift.models.tiny import train_tokenizer

FOLDER = Path(module.__file__).parent / "chat_templates"
# name -> what ends a turn, as that format writes it; {eos}: the tokenizer's own end token
ENDS = {
    "chatml": "<|im_end|>",
    "deepseek": "{eos}",
    "gemma": "<end_of_turn>",
    "glm4": "",
    "llama3": "<|eot_id|>",
    "mistral": "{eos}",
    "phi3": "<|end|>",
    "phi4": "<|im_end|>",
    "plain": "{eos}",
    "vicuna": "{eos}",
    "zephyr": "{eos}",
}
EOS = "</s>"
TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "adds", "parameters": {"type": "object"}},
}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
ROW: list[dict[str, Any]] = [
    {"role": "user", "content": "one and one"},
    {"role": "assistant", "content": "let me see", "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "2"},
    {"role": "tool", "content": "two"},
    {"role": "assistant", "content": "It is 2"},
]
CALLS = {
    "hermes": '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>',
    "react": 'Action: add\nAction Input: {"a": 1}',
    "qwen": '✿FUNCTION✿: add\n✿ARGS✿: {"a": 1}',
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import PreTrainedTokenizerFast

    marks = sorted(
        {end for end in ENDS.values() if end.startswith("<")} | {"<s>", EOS, "<|user|>", "<|assistant|>"}
    )
    backend = train_tokenizer(["user assistant two plus four is"], 330, special_tokens=marks, bos_token="<s>")
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token=EOS)


def learned(template: Template, messages: list[dict[str, Any]], tools: Any = None) -> list[str]:
    encoded = template.encode(messages, tools)
    runs: list[list[int]] = []
    before = -100
    for label in encoded.labels:
        if label != -100:
            if before == -100:
                runs.append([])
            runs[-1].append(label)
        before = label
    return [template.tokenizer.decode(run) for run in runs]


def test_all_built_in_templates_are_listed() -> None:
    assert {file.stem for file in FOLDER.glob("*.jinja")} == set(ENDS)
    assert set(module._OTHER_NAMES.values()) <= set(ENDS)


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("tags", [True, False], ids=["tags", "found by comparing"])
def test_built_in_templates_learn_the_answers_and_their_end(
    tokenizer: Any, tmp_path: Path, name: str, tags: bool
) -> None:
    source = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    if not tags:
        source = re.sub(r"\{%(-?) (?:end)?generation (-?)%\}", r"{#\1 \2#}", source)
    (tmp_path / "x.jinja").write_text(source, encoding="utf-8")
    template = Template(tokenizer, TemplateSection(chat_template=str(tmp_path / "x.jinja")))
    messages = [
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "four"},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "is four"},
    ]
    end = ENDS[name].format(eos=EOS)
    last = end or EOS  # what nothing ends is ended by the tokenizer's token
    space = " " if name in ("mistral", "vicuna") and tags else ""
    found = learned(template, messages)
    assert [text.strip() for text in found] == [f"four{end}", f"is four{last}"]
    if space:
        assert found[0].startswith(space)


def test_other_names_of_templates(tokenizer: Any) -> None:
    ours, theirs = (
        Template(tokenizer, TemplateSection(chat_template=name)).render(ROW[:1])
        for name in ("chatml", "qwen2_5")
    )
    assert ours == theirs


@pytest.mark.parametrize("style", AGENT_FORMATS)
@pytest.mark.parametrize("name", ["gemma", "mistral", "llama3", "chatml"])
def test_calls_are_learned_and_results_are_not(tokenizer: Any, style: str, name: str) -> None:
    template = Template(tokenizer, TemplateSection(chat_template=name, agent_template=style))  # type: ignore[arg-type]
    end = ENDS[name].format(eos=EOS)
    space = " " if name == "mistral" else ""
    call = CALLS[style]
    assert learned(template, ROW, [TOOL]) == [
        f"{space}let me see\n{call}\n{call}{end}",
        f"{space}It is 2{end}",
    ]
    text = template.render(ROW, [TOOL])
    assert text.index("adds") < text.index("one and one") < text.index(call, text.index("let me see"))
    assert (
        text.index("let me see")
        < text.index("2", text.index("let me see") + len(call))
        < text.index("It is 2")
    )


def test_a_result_begins_no_new_round_and_weights_stay(tokenizer: Any) -> None:
    section = TemplateSection(chat_template="llama3", agent_template="hermes", loss_scale="last_round")
    assert len(learned(Template(tokenizer, section), ROW, [TOOL])) == 2
    silent = [ROW[0], {**ROW[1], "loss": False}, *ROW[2:]]
    section = TemplateSection(chat_template="llama3", agent_template="react")
    assert learned(Template(tokenizer, section), silent, [TOOL]) == ["It is 2<|eot_id|>"]


def test_without_an_agent_template_a_call_that_is_left_out_is_refused(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="leaves out the tool call 'add'") as error:
        Template(tokenizer, TemplateSection(chat_template="llama3")).encode([*ROW[:2], ROW[4]], [TOOL])
    assert "--agent_template hermes" in (error.value.fix or "")


def test_system_texts_stand_before_the_tools_and_rows_without_tools_stay() -> None:
    system = {"role": "system", "content": "Be brief."}
    (first, *_) = write_tools("hermes", [system, *ROW], [TOOL], "unused")
    assert first["content"].startswith("Be brief.\n\n# Tools")
    (first, *_) = write_tools("hermes", ROW, [TOOL], "Default.")
    assert first["content"].startswith("Default.\n\n# Tools")
    assert write_tools("react", ROW[:1], None, None) == ROW[:1]
