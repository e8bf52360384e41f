"""Answers from a loaded model: streamed one at a time, or in batches. Sampling itself is transformers'."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from swift.config.sections.generation import GenerationSection
from swift.core.errors import DataError
from swift.inference.text import IncrementalDecoder, StopWords, decode
from swift.models.load import ModelBundle

__all__ = ["Answer", "Generator", "Messages"]

Messages = Sequence[Mapping[str, Any]]
_POLL_SECONDS = 0.5


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
    """

    def __init__(self, bundle: ModelBundle) -> None:
        self.bundle = bundle
        self.model, self.tokenizer, self.template = bundle.model, bundle.tokenizer, bundle.template

    def stream(
        self,
        messages: Messages,
        options: GenerationSection,
        *,
        tools: Sequence[Any] | None = None,
        seed: int | None = None,
    ) -> Iterator[str]:
        """The answer to one conversation, piece by piece, in whole characters.

        Generation runs in a thread of its own. When the caller stops listening (Ctrl-C, ``break``, ``close``), it
        stops at the next token.

        Raises:
            DataError: the prompt leaves no room for an answer.
        """
        prompt = self.template.encode_prompt(messages, tools)
        config = self._config([prompt], options)
        words = StopWords(options.stop_words)
        pieces = _Pieces()
        halt = threading.Event()
        criteria = StoppingCriteriaList([_Halt(halt), *self._criteria(words, len(prompt))])

        def work() -> None:
            try:
                self._generate([prompt], config, criteria, seed, streamer=pieces)
            except BaseException as error:  # handed over to the caller's thread, which raises it
                pieces.fail(error)

        worker = threading.Thread(target=work, name="swift-generate", daemon=True)
        worker.start()
        try:
            yield from self._texts(pieces, worker, words)
        finally:
            halt.set()
            worker.join()

    def _texts(self, pieces: _Pieces, worker: threading.Thread, words: StopWords) -> Iterator[str]:
        decoder = IncrementalDecoder(self.tokenizer)
        stops = set(self.template.stop_token_ids)
        while (ids := pieces.next(worker)) is not None:
            text = words.push(decoder.push([token for token in ids if token not in stops]))
            if text:
                yield text
            if words.found:
                return
        rest = words.push(decoder.flush()) + words.flush()
        if rest:
            yield rest

    def batch(
        self, conversations: Sequence[Messages], options: GenerationSection, *, seed: int | None = None
    ) -> list[str]:
        """The answers' texts, in the order of ``conversations``; at most ``max_batch_size`` at once."""
        prompts = [self.template.encode_prompt(messages) for messages in conversations]
        return [answer.text for answer in self.answers(prompts, options, seed=seed)]

    def answers(
        self, prompts: Sequence[Sequence[int]], options: GenerationSection, *, seed: int | None = None
    ) -> list[Answer]:
        """Answers to encoded prompts, in their order.

        Prompts of similar length go into one batch, padded on the left; at most ``max_batch_size`` at once.

        Raises:
            DataError: a prompt leaves no room for an answer.
        """
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        found: dict[int, Answer] = {}
        for start in range(0, len(order), options.max_batch_size):
            chosen = order[start : start + options.max_batch_size]
            answers = self._answer_batch([prompts[index] for index in chosen], options, seed)
            found.update(zip(chosen, answers, strict=True))
        return [found[index] for index in range(len(prompts))]

    def _answer_batch(
        self, prompts: Sequence[Sequence[int]], options: GenerationSection, seed: int | None
    ) -> list[Answer]:
        config = self._config(prompts, options)
        words = StopWords(options.stop_words)
        width = max(len(prompt) for prompt in prompts)
        criteria = StoppingCriteriaList(self._criteria(words, width))
        output = self._generate(prompts, config, criteria, seed)
        return [self._answer(row, words) for row in output[:, width:].tolist()]

    def _answer(self, ids: list[int], words: StopWords) -> Answer:
        stops = set(self.template.stop_token_ids)
        end = next((place for place, token in enumerate(ids) if token in stops), None)
        text = decode(self.tokenizer, ids[:end])
        cut = words.cut(text)
        stopped = end is not None or len(cut) < len(text)
        kept = ids if end is None else ids[: end + 1]
        if end is None and stopped:  # padding after the stop word
            kept = ids[: _first_end(self.tokenizer, ids, words)]
        return Answer(cut, kept, "stop" if stopped else "length")

    def _generate(
        self,
        prompts: Sequence[Sequence[int]],
        config: GenerationConfig,
        criteria: StoppingCriteriaList,
        seed: int | None,
        streamer: BaseStreamer | None = None,
    ) -> Tensor:
        """Token ids ``[rows, width + new]`` of prompts padded on the left to ``width``, and answers."""
        width = max(len(prompt) for prompt in prompts)
        pad = self.tokenizer.pad_token_id
        rows = [[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        masks = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        device = self.model.device
        with _seeded(seed, device), torch.inference_mode():
            output: Tensor = self.model.generate(
                input_ids=torch.tensor(rows, device=device),
                attention_mask=torch.tensor(masks, device=device),
                generation_config=config,
                stopping_criteria=criteria,
                streamer=streamer,
            )
        return output

    def _config(self, prompts: Sequence[Sequence[int]], options: GenerationSection) -> GenerationConfig:
        """All sampling options set explicitly, so that none is taken from the model's own defaults."""
        longest = max(len(prompt) for prompt in prompts)
        if min(len(prompt) for prompt in prompts) == 0:
            raise DataError("there is nothing to answer: the prompt has no tokens")
        limit = self.bundle.facts.max_position_embeddings
        if limit and longest >= limit:
            raise DataError(
                f"the prompt has {longest} tokens and leaves no room for an answer",
                why=f"the model handles {limit} positions",
                fix="shorten the prompt; in a chat, /clear forgets the history",
            )
        room = limit - longest if limit else options.max_new_tokens
        samples = options.temperature > 0
        return GenerationConfig(
            max_new_tokens=min(options.max_new_tokens, room),
            do_sample=samples,
            temperature=options.temperature if samples else 1.0,
            top_p=options.top_p if samples else 1.0,
            top_k=options.top_k if samples else 0,
            repetition_penalty=options.repetition_penalty,
            num_beams=1,
            eos_token_id=self.template.stop_token_ids or None,
            pad_token_id=self.tokenizer.pad_token_id,
            use_cache=True,
        )

    def _criteria(self, words: StopWords, prompt_width: int) -> list[StoppingCriteria]:
        return [_StopAtWords(self.tokenizer, words, prompt_width)] if words else []


def _first_end(tokenizer: Any, ids: Sequence[int], words: StopWords) -> int:
    """Number of tokens up to the one that completes a stop word."""
    size = next(size for size in range(1, len(ids) + 1) if words.ends(decode(tokenizer, ids[:size])))
    return size


@contextlib.contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Sampling from ``seed`` within the block; the generators go on afterwards as if nothing had happened."""
    if seed is None:
        yield
        return
    devices = [device] if device.type != "cpu" else []
    with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
        torch.manual_seed(seed)
        yield


class _Pieces(BaseStreamer):
    """Hands tokens from the generating thread to the reading one."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[list[int] | BaseException | None] = queue.SimpleQueue()
        self._is_prompt = True

    def put(self, value: Tensor) -> None:
        if self._is_prompt:  # transformers gives the prompt first
            self._is_prompt = False
            return
        self._queue.put(value.flatten().tolist())

    def end(self) -> None:
        self._queue.put(None)

    def fail(self, error: BaseException) -> None:
        self._queue.put(error)

    def next(self, worker: threading.Thread) -> list[int] | None:
        """The next tokens; None at the end. Raises what the worker raised, or RuntimeError when it is gone."""
        while True:
            try:
                item = self._queue.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                if worker.is_alive():
                    continue
                raise RuntimeError("the generating thread ended without a word") from None
            if isinstance(item, BaseException):
                raise item
            return item


class _Halt(StoppingCriteria):
    """Stops all rows when the event is set."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Any:
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)


class _StopAtWords(StoppingCriteria):
    """Stops a row when a stop word stands at its end."""

    def __init__(self, tokenizer: Any, words: StopWords, prompt_width: int) -> None:
        self.tokenizer, self.words, self.prompt_width = tokenizer, words, prompt_width

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Any:
        start = max(self.prompt_width, input_ids.shape[1] - self.words.num_tokens)
        tails = input_ids[:, start:].tolist()
        ended = [self.words.ends(decode(self.tokenizer, tail)) for tail in tails]
        return torch.tensor(ended, device=input_ids.device)
