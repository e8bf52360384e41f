"""Messages to tokens: which text a conversation becomes, and which of its tokens are learned.

The text comes from the tokenizer's own chat template. It is tokenised once, as a whole; learned character
ranges (see `swift.models.spans`) become learned tokens by one rule: **a token is learned when its first
character lies in a learned range**. So a token that begins in the generation prompt and runs into the
answer is not learned (when generating, the prompt's tokens are already fixed), and one that begins in the
answer is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from swift.config.sections.template import TemplateSection
from swift.core.errors import ConfigError, DataError, ModelError
from swift.core.registry import closest
from swift.models.agents import write_tools
from swift.models.encoding import TextEncoder, Tokens
from swift.models.jinja import ChatTemplate
from swift.models.messages import Conversation, read_conversation
from swift.models.spans import Turn, end_of_turn_token, find_turns, fit_end

__all__ = ["Encoded", "Template"]

_BUILT_IN = Path(__file__).parent / "chat_templates"
_OTHER_NAMES = {
    **dict.fromkeys(("qwen", "qwen2", "qwen2_5", "yi", "internlm2", "hermes", "smollm"), "chatml"),
    **dict.fromkeys(("llama3_1", "llama3_2", "llama3_3"), "llama3"),
    "gemma2": "gemma",
    "phi": "phi3",
    "phi3_5": "phi3",
    "chatglm4": "glm4",
    "deepseek_v2_5": "deepseek",
    "deepseek_v3": "deepseek",
    "deepseek_r1": "deepseek",
}
"""Names of other programs for formats that are the same as far as text without tools goes."""
_VERSION = 2
"""Raised when the same row gives other tokens or labels than before, or is refused, so that caches notice."""


class Span(NamedTuple):
    """Characters ``start`` to ``end`` are learned with ``weight``; a part refines the span before it."""

    start: int
    end: int
    weight: float
    is_part: bool = False


@dataclass
class Encoded:
    """One sample as the model sees it. All lists have the same length.

    Attributes:
        input_ids: token ids.
        labels: the token itself where it is learned, else -100; not shifted.
        weights: loss weight of each token as a label (0 where not learned); None when all are 1.
    """

    input_ids: list[int]
    labels: list[int]
    weights: list[float] | None = None


class Template:
    """Encodes conversations for one tokenizer.

    Args:
        tokenizer: a fast tokenizer of transformers.
        section: the template options.
        pretraining: True for ``pt``: plain text unless ``use_chat_template`` says otherwise.

    Raises:
        ModelError: the tokenizer gives no character offsets, or a chat template is needed and there is none.
        ConfigError: an option names a file or a built-in template that does not exist.
    """

    def __init__(self, tokenizer: Any, section: TemplateSection, pretraining: bool = False) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError(
                "the tokenizer cannot tell which characters a token stands for",
                where=str(tokenizer.name_or_path),
                fix="add a tokenizer.json to the model folder (AutoTokenizer...save_pretrained writes one)",
            )
        self.tokenizer, self.section, self.pretraining = tokenizer, section, pretraining
        self.uses_chat_template = (
            section.use_chat_template if section.use_chat_template is not None else not pretraining
        )
        self.system = _read_system(section.system)
        self.chat = _read_chat_template(tokenizer, section) if self.uses_chat_template else None
        self._encoder = TextEncoder(tokenizer.backend_tokenizer)
        self._folder = Path(str(tokenizer.name_or_path))
        self._end_tokens = self._find_end_tokens()
        ids = (tokenizer.convert_tokens_to_ids(token) for token in self._end_tokens)
        self.stop_token_ids: list[int] = list(dict.fromkeys(ids))
        """A generated answer is over at any of these tokens."""

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs to encode alike: not the tokenizer of transformers, which takes it a second."""
        names = ("name_or_path", "is_fast", "backend_tokenizer", "bos_token", "eos_token", "eos_token_id")
        kept = SimpleNamespace(**{name: getattr(self.tokenizer, name) for name in names})
        return {**self.__dict__, "tokenizer": kept}

    def encode(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None) -> Encoded:
        """Tokens and labels of one conversation. Raises DataError when the template refuses it."""
        return self.encode_many([(messages, tools)])[0]

    def encode_many(
        self, samples: Sequence[tuple[Sequence[Mapping[str, Any]], Sequence[Any] | None]]
    ) -> list[Encoded]:
        """``encode`` of many (messages, tools), faster."""
        written = [self._with_tools(messages, tools) for messages, tools in samples]
        prepared = [self._prepare(self._read(messages), tools) for messages, tools in written]
        if not prepared:
            return []
        special = [self.chat is None and not self._begins_with_bos(text) for text, _, _ in prepared]
        encodings: list[Any] = [None] * len(prepared)
        for add_special in set(special):
            chosen = [number for number, flag in enumerate(special) if flag is add_special]
            texts = [prepared[number][0] for number in chosen]
            for number, tokens in zip(chosen, self._encoder.encode(texts, add_special), strict=True):
                encodings[number] = tokens
        return [
            self._label(tokens, spans, open_end)
            for tokens, (_, spans, open_end) in zip(encodings, prepared, strict=True)
        ]

    def encode_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids up to where the assistant's answer begins; ``variables`` are for the chat template."""
        text = self.render(messages, tools, add_generation_prompt=True, variables=variables)
        add_special = self.chat is None and not self._begins_with_bos(text)
        ids = self._encoder.encode([text], add_special)[0].ids
        if add_special and ids and ids[-1] == self.tokenizer.eos_token_id:
            ids.pop()  # Some tokenizers close every text; this one goes on.
        return ids

    def encode_sequence(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None = None,
        *,
        end_token: bool = False,
    ) -> list[int]:
        """Token ids of a conversation that is read as a whole, at its last token.

        With a chat template, one that ends with a question goes on to where the answer would begin. Without,
        texts are joined by a space, with the control tokens that the tokenizer itself adds and, with ``end_token``,
        the end token where it adds none at the end.
        """
        if self.chat is not None:
            if messages[-1]["role"] != "assistant":
                return self.encode_prompt(messages, tools)
            return self._encoder.encode([self.render(messages, tools)], False)[0].ids
        contents = [message["content"] for message in messages]
        if self.system and messages[0]["role"] != "system":
            contents.insert(0, self.system)
        plain = [c if isinstance(c, str) else "".join(part["text"] for part in c) for c in contents]
        text = " ".join(part for part in plain if part)
        tokens = self._encoder.encode([text], not self._begins_with_bos(text))[0]
        ids = tokens.ids
        is_closed = len(ids) > 1 and tokens.stops[-1] == 0
        if end_token and not is_closed and self.tokenizer.eos_token_id is not None:
            ids.append(self.tokenizer.eos_token_id)
        return ids

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as text, as the model sees it."""
        messages, tools = self._with_tools(messages, tools)
        conversation = self._read(messages)
        if self.chat is None:
            return "".join(message["content"] for message in conversation.messages)
        return self.chat.render(conversation.messages, tools, add_generation_prompt, variables)

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides tokens and labels: chat template, tokenizer, options."""
        digest = hashlib.sha256()
        options = self.section.model_dump(exclude={"chat_template", "system"})
        facts = [_VERSION, self.uses_chat_template, self.system, options, self._end_tokens]
        digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
        if self.chat is not None:
            digest.update(json.dumps([self.chat.source, self.chat.variables], default=str).encode())
        file = self._folder / "tokenizer.json"
        digest.update(
            file.read_bytes() if file.is_file() else self.tokenizer.backend_tokenizer.to_str().encode()
        )
        return digest.hexdigest()

    # -- which characters are learned ------------------------------------------------------------------

    def _with_tools(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None
    ) -> tuple[Sequence[Mapping[str, Any]], Sequence[Any] | None]:
        """With ``agent_template``: the conversation with tools, calls and results as text, and no tools beside it."""
        style = self.section.agent_template
        if style is None or self.chat is None:
            return messages, tools
        return write_tools(style, messages, tools, self.system), None

    def _read(self, messages: Sequence[Mapping[str, Any]]) -> Conversation:
        return read_conversation(messages, system=self.system, use_part_weights=self.section.use_loss_scale)

    def _prepare(
        self, conversation: Conversation, tools: Sequence[Any] | None
    ) -> tuple[str, list[Span], bool]:
        """``_spans``; raises DataError when the text lacks a tool call: an empty answer would be learned."""
        prepared = self._spans(conversation, tools)
        for index, message in enumerate(conversation.messages):
            for call in message.get("tool_calls") or []:
                name = call.get("function", call).get("name") if isinstance(call, Mapping) else None
                if name and name not in prepared[0]:
                    raise DataError(
                        f"the chat template leaves out the tool call {name!r} of message {index + 1}",
                        why="this model's template knows no tools",
                        fix="--agent_template hermes (or react, qwen), or a Jinja file that writes tool calls",
                    )
        return prepared

    def _spans(self, conversation: Conversation, tools: Sequence[Any] | None) -> tuple[str, list[Span], bool]:
        """Text, learned ranges, and whether the last turn still needs a token that ends it."""
        strategy = self.section.loss_scale
        explicit = any(weight is not None for weight in conversation.weights)
        if self.chat is None:
            text, turns = _concatenate(conversation)
            open_end = self.pretraining or (bool(turns) and turns[-1].end == len(text))
        elif strategy == "all" and not explicit and not conversation.part_weights:
            return self.chat.render(conversation.messages, tools), [Span(0, _INFINITE, 1.0)], False
        else:
            text, turns = self._turns(conversation, tools)
            last = conversation.messages[-1]["role"] == "assistant"
            open_end = (
                last
                and bool(turns)
                and turns[-1].end == len(text)
                and not text.endswith(tuple(self._end_tokens))
            )
        spans: list[Span] = [Span(0, _INFINITE, 1.0)] if strategy == "all" else []
        for turn in turns:
            weight = conversation.weights[turn.index]
            if weight is None:
                weight = 1.0 if strategy != "last_round" or turn.index > conversation.last_question else 0.0
            spans.append(Span(turn.start, turn.end, weight))
            if turn.index in conversation.part_weights and weight > 0:
                spans += self._part_spans(conversation, turn, text)
        return text, spans, open_end

    def _turns(self, conversation: Conversation, tools: Sequence[Any] | None) -> tuple[str, list[Turn]]:
        chat = self.chat
        assert chat is not None
        messages = conversation.messages

        def render(part: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
            return chat.render(part, tools, add_generation_prompt)

        if not chat.has_generation:
            text = render(messages, False)
            return text, find_turns(render, messages, text, self._end_tokens)
        text, ranges = chat.render_generation(messages, tools)
        fitted = [(start, fit_end(text, start, end, self._end_tokens)) for start, end in ranges]
        assistants = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if len(fitted) == len(assistants):
            return text, [Turn(index, *place) for index, place in zip(assistants, fitted, strict=True)]
        # Several blocks for a turn, or turns left out: find out which block belongs to which message.
        turns = find_turns(render, messages, text, self._end_tokens)
        return text, [
            Turn(turn.index, max(start, turn.start), min(end, turn.end))
            for start, end in fitted
            for turn in turns
            if start < turn.end and turn.start < end
        ]

    def _part_spans(self, conversation: Conversation, turn: Turn, text: str) -> list[Span]:
        parts = conversation.part_weights[turn.index]
        whole = "".join(part for part, _ in parts)
        # Templates may cut white space at both ends, or thinking at the start.
        for kept in (whole, whole.strip(), whole.rpartition("</think>")[2].strip()):
            place = text.find(kept, turn.start, turn.end)
            if kept and place >= 0:
                break
        else:
            raise DataError(
                f"the parts of message {turn.index + 1} do not appear in the rendered text",
                why="their loss_scale cannot be applied: the chat template changes the content",
            )
        spans: list[Span] = []
        start = place - whole.find(kept)
        for part, weight in parts:
            spans.append(Span(max(start, turn.start), min(start + len(part), turn.end), weight, True))
            start += len(part)
        spans.append(Span(min(start, turn.end), turn.end, parts[-1][1], True))
        return spans

    # -- tokens -------------------------------------------------------------------------------------------

    def _label(self, tokens: Tokens, spans: list[Span], open_end: bool) -> Encoded:
        ids, starts, stops = tokens.ids, tokens.starts, tokens.stops
        eos = self.tokenizer.eos_token_id
        if len(ids) > 1 and stops[-1] == 0 and ids[-1] == eos:
            # The tokenizer closes every text itself; whether this one ends here is decided below.
            ids.pop()
            starts, stops = starts[:-1], stops[:-1]
        ranges: list[tuple[int, int, float]] = []
        outer = (0, len(ids))
        for span in spans:
            start, end = tokens.place(span.start), tokens.place(span.end)
            if span.is_part:  # a token belongs to the part in which it ends
                first = max(outer[0], int(np.searchsorted(stops, start, side="right")))
                last = max(first, min(outer[1], int(np.searchsorted(stops, end, side="right"))))
            else:
                outer = first, last = int(np.searchsorted(starts, start)), int(np.searchsorted(starts, end))
            ranges.append((first, last, span.weight))
        if open_end and ids[-1:] != [eos] and eos is not None:
            ids.append(eos)
            ranges.append((len(ids) - 1, len(ids), spans[-1].weight if spans else 0.0))
        labels = [-100] * len(ids)
        for first, last, weight in ranges:
            labels[first:last] = ids[first:last] if weight > 0 else [-100] * (last - first)
        if all(span.weight in (0.0, 1.0) for span in spans):
            return Encoded(ids, labels)
        weights = [0.0] * len(ids)
        for first, last, weight in ranges:
            weights[first:last] = [weight] * (last - first)
        return Encoded(ids, labels, weights)

    def _begins_with_bos(self, text: str) -> bool:
        bos = self.tokenizer.bos_token
        return bool(bos) and text.startswith(bos)

    def _find_end_tokens(self) -> list[str]:
        tokenizer, ends = self.tokenizer, []
        if self.chat is not None:
            chat = self.chat
            known = [token.content for token in tokenizer.added_tokens_decoder.values()]
            ends.append(
                end_of_turn_token(lambda messages, prompt: chat.render(messages, None, prompt), known)
            )
        ends.append(tokenizer.eos_token)
        for name in ("generation_config.json", "config.json"):
            file = self._folder / name
            if file.is_file():
                ids = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
                ids = ids if isinstance(ids, list) else [ids]
                ends += [tokenizer.convert_ids_to_tokens(token) for token in ids if token is not None]
        return list(dict.fromkeys(end for end in ends if end))


_INFINITE = 1 << 60


def _concatenate(conversation: Conversation) -> tuple[str, list[Turn]]:
    """Contents one after the other; every assistant message is a turn."""
    text, turns = "", []
    for index, message in enumerate(conversation.messages):
        start, text = len(text), text + message["content"]
        if message["role"] == "assistant":
            turns.append(Turn(index, start, len(text)))
    return text, turns


def _read_system(system: str | None) -> str | None:
    if system is None or not system.endswith(".txt"):
        return system
    try:
        return Path(system).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError("cannot read the system prompt", where=system, why=error.strerror) from error


def _read_chat_template(tokenizer: Any, section: TemplateSection) -> ChatTemplate:
    variables = dict(tokenizer.special_tokens_map)
    if section.enable_thinking is not None:
        variables["enable_thinking"] = section.enable_thinking
    name = section.chat_template
    if name is None:
        source = tokenizer.chat_template
        if isinstance(source, Mapping):  # Several named ones: transformers' rule is to take "default".
            source = source.get("default")
        if not source:
            raise ModelError(
                "the tokenizer has no chat template",
                where=str(tokenizer.name_or_path),
                fix="--chat_template chatml (or a Jinja file), or --use_chat_template false for plain text",
            )
        return ChatTemplate(source, variables, str(tokenizer.name_or_path))
    built_in = {file.stem: file for file in _BUILT_IN.glob("*.jinja")}
    file = built_in.get(_OTHER_NAMES.get(name, name), Path(name))
    if not file.is_file():
        near = closest(name, built_in)
        raise ConfigError(
            f"no chat template {name!r}",
            where="--chat_template",
            why=f"it is neither a file nor one of {', '.join(sorted(built_in))}",
            fix=f"did you mean {near!r}?" if near else None,
        )
    return ChatTemplate(file.read_text(encoding="utf-8"), variables, str(file))
