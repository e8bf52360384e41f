"""Conversations in, texts out: templates and stop words around an engine, one answer streamed or many together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from swift.config.sections.engine import EngineSection
from swift.config.sections.generation import GenerationSection
from swift.core.errors import DataError, SwiftError
from swift.inference.engines.base import Delta, Request, SamplingOptions
from swift.inference.engines.blocking import Completion, Writer
from swift.inference.engines.embedded_core import EmbeddedCore
from swift.inference.text import IncrementalDecoder, StopWords, decode
from swift.models.load import ModelBundle

__all__ = ["Answer", "Generator", "Messages"]

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Answer:
    """One generated answer.

    Attributes:
        text: without control tokens and stop words.
        token_ids: as generated, the end token included.
        finish_reason: ``stop`` (end token or stop word) or ``length``.
    """

    text: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length"]


class Generator:
    """Generates with one model.

    Args:
        bundle: model, tokenizer and template; the adapter that is to act is active already.
        engine: what answers; default: an embedded engine for the bundle's model.
        options: limits of that embedded engine.
    """

    def __init__(
        self, bundle: ModelBundle, engine: Writer | None = None, *, options: EngineSection | None = None
    ) -> None:
        self.bundle = bundle
        self.model, self.tokenizer, self.template = bundle.model, bundle.tokenizer, bundle.template
        self.engine: Writer = engine if engine is not None else EmbeddedCore(bundle, options)

    def stream(
        self,
        messages: Messages,
        options: GenerationSection,
        *,
        tools: Sequence[Any] | None = None,
        seed: int | None = None,
    ) -> Iterator[str]:
        """The answer to one conversation, piece by piece, in whole characters.

        When the caller stops listening (Ctrl-C, ``break``, ``close``), generation has stopped.

        Raises:
            DataError: the prompt leaves no room for an answer.
        """
        prompt = self.template.encode_prompt(messages, tools)
        decoder, words = IncrementalDecoder(self.tokenizer), StopWords(options.stop_words)
        stops = set(self.template.stop_token_ids)
        deltas = self.engine.stream(self._request(prompt, options, seed, 0))
        try:
            for delta in deltas:
                _check(delta)
                text = words.push(decoder.push([token for token in delta.tokens if token not in stops]))
                if text:
                    yield text
                if words.found:
                    return
        finally:
            deltas.close()  # type: ignore[attr-defined]
        rest = words.push(decoder.flush()) + words.flush()
        if rest:
            yield rest

    def batch(
        self, conversations: Sequence[Messages], options: GenerationSection, *, seed: int | None = None
    ) -> list[str]:
        """The answers' texts, in the order of ``conversations``."""
        prompts = [self.template.encode_prompt(messages) for messages in conversations]
        return [answer.text for answer in self.answers(prompts, options, seed=seed)]

    def answers(
        self,
        prompts: Sequence[Sequence[int]],
        options: GenerationSection,
        *,
        seed: int | None = None,
        numbers: Sequence[int] | None = None,
        on_answer: Callable[[int, Answer], None] = lambda index, answer: None,
    ) -> list[Answer]:
        """Answers to encoded prompts, in their order.

        Args:
            seed: each answer depends on it, on its number and its prompt, not on the other prompts.
            numbers: of the prompts, for the seed; default: 0, 1, 2...
            on_answer: called with the place of an answer as soon as it is there.

        Raises:
            DataError: a prompt leaves no room for an answer.
        """
        numbers = numbers if numbers is not None else range(len(prompts))
        requests = [
            self._request(prompt, options, seed, number)
            for prompt, number in zip(prompts, numbers, strict=True)
        ]
        words = StopWords(options.stop_words)
        so_far = [Completion() for _ in requests]

        def watch(index: int, delta: Delta) -> None:
            _check(delta)
            completion = so_far[index]
            completion.add(delta)
            if delta.finish_reason is None and words and self._ends(completion.tokens, delta, words):
                self.engine.abort(requests[index].id)
            elif delta.finish_reason is not None:
                on_answer(index, self._answer(completion, words))

        self.engine.generate(requests, watch)
        return [self._answer(completion, words) for completion in so_far]

    def _ends(self, tokens: list[int], delta: Delta, words: StopWords) -> bool:
        """Whether a stop word stands at the end of an answer."""
        return words.ends(decode(self.tokenizer, tokens[-words.num_tokens - len(delta.tokens) + 1 :]))

    def _answer(self, completion: Completion, words: StopWords) -> Answer:
        ids, stops = completion.tokens, set(self.template.stop_token_ids)
        whole = decode(self.tokenizer, ids[:-1] if ids and ids[-1] in stops else ids)
        text = words.cut(whole)
        is_cut = completion.finish_reason == "length" and len(text) == len(whole)
        return Answer(text, ids, "length" if is_cut else "stop")

    def _request(
        self, prompt: Sequence[int], options: GenerationSection, seed: int | None, number: int
    ) -> Request:
        """All sampling options set explicitly: none is taken from the model's own defaults."""
        if not len(prompt):
            raise DataError("there is nothing to answer: the prompt has no tokens")
        if len(prompt) >= self.engine.max_model_len:
            raise DataError(
                f"the prompt has {len(prompt)} tokens and leaves no room for an answer",
                why=f"prompt and answer have at most {self.engine.max_model_len} tokens together",
                fix="shorten the prompt; in a chat, /clear forgets the history",
            )
        sampling = SamplingOptions(
            max_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=options.top_k,
            repetition_penalty=options.repetition_penalty,
            seed=None if seed is None else seed + number,
            stop_token_ids=tuple(self.template.stop_token_ids),
        )
        return Request(str(number), prompt, sampling)


def _check(delta: Delta) -> None:
    if delta.finish_reason == "error":
        raise SwiftError("the engine could not answer", why=delta.error)
