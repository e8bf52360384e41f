"""What is evaluated: a model in this process, or one behind a server."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from swift.config.sections.generation import GenerationSection
from swift.core.errors import ConfigError
from swift.evaluate.endpoint import Endpoint, EndpointError
from swift.evaluate.questions import Question

if TYPE_CHECKING:
    from swift.inference.generate import Generator

__all__ = ["LocalModel", "Reply", "ServedModel", "Subject"]


@dataclass(frozen=True)
class Reply:
    """One generated answer; ``num_tokens`` is None where a server does not tell."""

    text: str
    finish_reason: str
    num_tokens: int | None


class Subject(Protocol):
    """A model that can be asked.

    Attributes:
        identity: what its answers depend on beside the options; part of every row's key.
        at_once: questions to hand over in one call.
    """

    identity: Sequence[str]
    at_once: int

    def answers(
        self, questions: Sequence[Question], options: GenerationSection, *, seed: int | None
    ) -> list[Reply]:
        """An answer to each question."""
        ...

    def losses(self, pairs: Sequence[tuple[Question, str]], *, end: bool) -> list[tuple[float, int]]:
        """For each (question, answer): minus the log-probability (nats) of the answer, and its number of tokens.

        ``end``: with the token that ends a turn. Raises ConfigError where that cannot be known.
        """
        ...


class LocalModel:
    """A model in this process.

    Args:
        generator: the model.
        identity: its folders.
        batch_size: texts in one forward pass.
    """

    def __init__(self, generator: Generator, identity: Sequence[str], batch_size: int) -> None:
        self.generator, self.at_once = generator, batch_size
        self.identity: Sequence[str] = list(identity)

    def answers(
        self, questions: Sequence[Question], options: GenerationSection, *, seed: int | None
    ) -> list[Reply]:
        template = self.generator.template
        prompts = [template.encode_prompt(question.messages, question.tools) for question in questions]
        answers = self.generator.answers(prompts, options, seed=seed)
        return [Reply(answer.text, answer.finish_reason, len(answer.token_ids)) for answer in answers]

    def losses(self, pairs: Sequence[tuple[Question, str]], *, end: bool) -> list[tuple[float, int]]:
        """Only the last turn counts; tokens of the question never do."""
        from swift.inference.losses import answer_losses

        template = self.generator.template
        samples = []
        for question, answer in pairs:
            turn = {"role": "assistant", "content": answer}
            sample = template.encode([*question.messages, turn], question.tools)
            size = len(template.encode_prompt(question.messages, question.tools))
            labels = [-100] * size + sample.labels[size:]
            if not end:
                stops = set(template.stop_token_ids)
                last = next((i for i in range(size, len(labels)) if labels[i] in stops), len(labels))
                labels[last:] = [-100] * (len(labels) - last)
            samples.append(dataclasses.replace(sample, labels=labels[: len(sample.input_ids)]))
        found = []
        for start in range(0, len(samples), self.at_once):
            batch = answer_losses(self.generator.bundle, samples[start : start + self.at_once])
            found += [(loss.total, loss.num_tokens) for loss in batch]
        return found


@dataclass
class ServedModel:
    """A model behind an OpenAI server.

    Attributes:
        template: writes a question as the text that its answer goes on; None: the messages, a line each.
    """

    endpoint: Endpoint
    template: Any = None
    identity: Sequence[str] = field(default_factory=list)
    at_once: int = 64

    def __post_init__(self) -> None:
        self.identity = [self.endpoint.url, self.endpoint.find_model()]
        self.at_once = 4 * self.endpoint.concurrency

    def answers(
        self, questions: Sequence[Question], options: GenerationSection, *, seed: int | None
    ) -> list[Reply]:
        shared: dict[str, Any] = {"max_tokens": options.max_new_tokens, "temperature": options.temperature}
        if options.temperature > 0:
            shared |= {"top_p": options.top_p}
            if options.top_k:
                shared["top_k"] = options.top_k
        if options.repetition_penalty != 1:
            shared["repetition_penalty"] = options.repetition_penalty
        if options.stop_words:
            shared["stop"] = options.stop_words
        bodies = []
        for number, question in enumerate(questions):
            body = {"messages": question.messages, **shared}
            if question.tools:
                body["tools"] = question.tools
            if seed is not None:  # several samples of a question must not be the same one
                body["seed"] = seed + number
            bodies.append(body)
        return [self._reply(response) for response in self.endpoint.chat(bodies)]

    def _reply(self, response: dict[str, Any]) -> Reply:
        try:
            choice = response["choices"][0]
            text = choice["message"].get("content") or ""
            count = (response.get("usage") or {}).get("completion_tokens")
            return Reply(text, choice.get("finish_reason") or "stop", count)
        except (KeyError, IndexError, TypeError, AttributeError):
            raise EndpointError("the server's answer has no message", where=self.endpoint.url) from None

    def losses(self, pairs: Sequence[tuple[Question, str]], *, end: bool) -> list[tuple[float, int]]:
        prompts = [self._prompt(question) for question, _ in pairs]
        bodies = [
            {"prompt": prompt + answer, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
            for prompt, (_, answer) in zip(prompts, pairs, strict=True)
        ]
        try:
            responses = self.endpoint.completions(bodies)
        except EndpointError as error:
            raise self._refusal(error.why or error.message) from error
        return [
            self._loss(response, len(prompt), len(prompt) + len(answer))
            for response, prompt, (_, answer) in zip(responses, prompts, pairs, strict=True)
        ]

    def _prompt(self, question: Question) -> str:
        if self.template is not None:
            return str(self.template.render(question.messages, question.tools, add_generation_prompt=True))
        return "".join(f"{message['content']}\n" for message in question.messages)

    def _loss(self, response: dict[str, Any], start: int, stop: int) -> tuple[float, int]:
        """The tokens whose text begins between two characters."""
        try:
            told = response["choices"][0]["logprobs"]
            rows = list(zip(told["text_offset"], told["token_logprobs"], strict=True))
        except (KeyError, IndexError, TypeError, ValueError):
            raise self._refusal("its answer holds no log-probabilities") from None
        chosen = [value for offset, value in rows if start <= offset < stop]
        if not chosen or any(value is None for value in chosen):
            raise self._refusal("it does not repeat the prompt with its log-probabilities (echo)")
        return -sum(chosen), len(chosen)

    def _refusal(self, why: str) -> ConfigError:
        return ConfigError(
            "this server does not tell the log-probabilities of given texts",
            where=f"{self.endpoint.url}/completions",
            why=why,
            fix="leave out the metrics choice and loss, or evaluate the model's folder with --model",
        )
