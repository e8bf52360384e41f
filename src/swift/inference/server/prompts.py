"""From requests to prompts: templates, tools, thinking, and grammars that hold for what comes behind the thinking."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from swift.inference.engines.base import JSON_SPACE, Grammar
from swift.inference.server.errors import ApiError, check_unicode
from swift.inference.server.limits import grammar_of
from swift.inference.server.reasoning import OPEN, ReasoningSplitter
from swift.inference.server.schemas import ChatRequest, Message, NamedTool, Tool
from swift.inference.server.service import ServedModel, Service
from swift.inference.server.tool_calls import ToolCallParser
from swift.inference.server.tool_formats import ToolFormat, call_rules

__all__ = ["ChatPlan", "encode_text", "messages_of", "plan_chat", "tools_of"]

_ENDING_TOKENS = 32
"""So many hold ``</think>`` and white space in any vocabulary."""


@dataclass(frozen=True)
class ChatPlan:
    """How a conversation is answered.

    Attributes:
        prompt: token ids.
        tool_format: calls are looked for in the answer; None: they are not.
        thinking: whether the answer begins with it: ``open`` (the prompt ends within it), ``possible`` or ``none``.
        shown_tokens: control tokens that belong to the format of calls.
    """

    prompt: list[int]
    grammar: Grammar | None
    tool_format: ToolFormat | None
    thinking: str
    shown_tokens: dict[int, str]

    def splitter(self) -> ReasoningSplitter | None:
        """For one answer."""
        return None if self.thinking == "none" else ReasoningSplitter(self.thinking == "open")

    def parser(self) -> ToolCallParser | None:
        """For one answer."""
        return None if self.tool_format is None else ToolCallParser(self.tool_format)


def messages_of(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """As templates read them."""
    return [message.model_dump(exclude_none=True) for message in messages]


def tools_of(tools: Sequence[Tool] | None) -> list[dict[str, Any]]:
    """As templates read them."""
    return [tool.model_dump(exclude_none=True) for tool in tools or ()]


async def plan_chat(service: Service, model: ServedModel, body: ChatRequest) -> ChatPlan:
    """Raises ApiError for what this model cannot do."""
    if model.task != "causal_lm":
        raise ApiError(400, f"{model.name} writes no text (its task: {model.task})", param="model")
    if not model.template.uses_chat_template:
        raise ApiError(400, f"{model.name} goes on with plain text; use /v1/completions", param="model")
    tools, choice = tools_of(body.tools), body.tool_choice or ("auto" if body.tools else "none")
    wanted = [] if choice == "none" else tools
    form = service.tool_format(model) if tools else None
    if choice != "none" and not tools:
        raise ApiError(400, "tool_choice needs tools", param="tool_choice")
    if wanted and form is None:
        raise ApiError(
            400,
            "this model's chat template knows no tools that can be read back; start the server with "
            "--agent_template hermes (or react, qwen), or --tool_parser",
            param="tools",
        )
    variables = _variables(model, body)
    messages = messages_of(body.messages)
    size = sum(len(str(message.get("content"))) for message in messages)
    check_unicode(json.dumps([messages, wanted, variables], ensure_ascii=False))
    prompt = await service.working(
        size, lambda: model.template.encode_prompt(messages, wanted or None, variables)
    )
    thinking = _thinking(service, model, body, prompt)
    form = form if wanted else None
    shown = _shown_tokens(service.tokenizer, form)
    grammar = grammar_of(body)
    chat = model.template.chat
    # A grammar leaves room for thinking where the template asks for it, not where it merely could write it.
    room = thinking if thinking == "open" or (chat and "enable_thinking" in chat.names) else "none"
    if wanted and choice != "auto":
        if grammar is not None:
            raise ApiError(
                400, "a call is required, and another form of the answer, too", param="tool_choice"
            )
        assert form is not None
        grammar = _call_grammar(form, wanted, choice, body.parallel_tool_calls, shown, room)
    elif grammar is not None and room != "none":
        grammar = _behind_thinking(grammar, room)
    return ChatPlan(prompt, grammar, form, thinking, shown)


async def encode_text(service: Service, model: ServedModel, text: str) -> list[int]:
    """Token ids of a plain text, with what the tokenizer puts in front (and without what it puts at the end)."""
    tokenizer = model.template.tokenizer
    check_unicode(text)

    def encode() -> list[int]:
        ids: list[int] = tokenizer.encode(text)
        if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token):
            ids.pop()
        return ids

    return await service.working(len(text), encode)


def _variables(model: ServedModel, body: ChatRequest) -> dict[str, Any]:
    """What the template is told beside the messages. Raises ApiError for a name it does not read."""
    given = dict(body.chat_template_kwargs or {})
    if body.enable_thinking is not None:
        given["enable_thinking"] = body.enable_thinking
    chat = model.template.chat
    assert chat is not None
    known = chat.names
    for name in given:
        if name in ("messages", "tools", "add_generation_prompt") or (
            name not in known and name != "enable_thinking"  # which clients send to any model
        ):
            raise ApiError(400, f"the chat template does not read {name!r}", param="chat_template_kwargs")
    return given


def _thinking(service: Service, model: ServedModel, body: ChatRequest, prompt: Sequence[int]) -> str:
    if not service.thinks(model):
        return "none"
    end = service.tokenizer.decode(list(prompt[-_ENDING_TOKENS:]), skip_special_tokens=False).rstrip()
    if end.endswith(OPEN):
        return "open"
    return "none" if end.endswith("</think>") else "possible"


def _shown_tokens(tokenizer: Any, form: ToolFormat | None) -> dict[int, str]:
    """Those marks of a format that are control tokens, which decoding leaves out."""
    if form is None:
        return {}
    special = {
        str(token): number for number, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    return {special[mark]: mark for mark in form.marks if mark in special}


def _call_grammar(
    form: ToolFormat,
    tools: Sequence[dict[str, Any]],
    choice: str | NamedTool,
    parallel: bool,
    shown: dict[int, str],
    thinking: str,
) -> Grammar:
    functions = [tool["function"] for tool in tools]
    if isinstance(choice, NamedTool):
        name = choice.function.name
        functions = [function for function in functions if function["name"] == name]
        parallel = False
        if not functions:
            raise ApiError(400, f"tool_choice: {name!r} is not among the tools", param="tool_choice")
    ids = {mark: number for number, mark in shown.items()}
    rules = call_rules(form, functions, parallel=parallel, token_ids=ids)
    return Grammar("lark", _start(thinking, "calls") + rules)


def _start(thinking: str, rule: str) -> str:
    """The first rule: thinking, where there is some, then ``rule``."""
    if thinking == "none":
        return f"start: {rule}\n"
    mark, again = ("", "") if thinking == "open" else ("<think>", "?")
    return (
        f"start: thinking{again} {rule}\nthinking: thought newlines?\n"
        f"thought[lazy]: /{mark}(.|\\n)*<\\/think>/\nnewlines: /\\n+/\n"
    )


def _behind_thinking(grammar: Grammar, thinking: str) -> Grammar:
    """A grammar for the whole answer out of one for its part behind the thinking."""
    start = _start(thinking, "answer")
    if grammar.kind == "json_schema":
        try:
            schema = json.loads(grammar.text)
        except ValueError as error:
            raise ApiError(400, f"the JSON Schema is not JSON: {error}", param="guided_json") from None
        if isinstance(schema, dict):
            schema = {"x-guidance": {"whitespace_pattern": JSON_SPACE}, **schema}
        return Grammar("lark", f"{start}answer: %json {json.dumps(schema)}\n")
    if grammar.kind == "regex":
        text = grammar.text.replace("\\/", "/").replace("/", "\\/")
        return Grammar("lark", f"{start}answer: /{text}/\n")
    return Grammar("lark", start + re.sub(r"(?m)^start(?=\s*:)", "answer", grammar.text))
