"""What is evaluated: a model in this process, or one behind a server."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from swift.config.sections.generation import GenerationSection
from swift.core.errors import ConfigError
from swift.evaluate.endpoint import Endpoint, EndpointError
from swift.evaluate.questions import Question

if TYPE_CHECKING:
    from swift.inference.generate import Answer, Generator

__all__ = ["LocalModel", "OnReply", "Reply", "ServedModel", "Subject"]


_TEXTS = 8


@dataclass(frozen=True)
class Reply:
    """One generated answer; ``num_tokens`` is None where a server does not tell."""

    text: str
    finish_reason: str
    num_tokens: int | None


OnReply = Callable[[int, Reply], None]


class Subject(Protocol):
    """A model that can be asked.

    Attributes:
        identity: what its answers depend on beside the options; part of every row's key.
    """

    identity: Sequence[str]

    def answers(
        self,
        questions: Sequence[Question],
        options: GenerationSection,
        *,
        seed: int | None,
        numbers: Sequence[int],
        on_reply: OnReply,
    ) -> None:
        """Answer all questions; ``on_reply`` gets the place of each answer and the answer, as they come.

        What is sampled depends on the seed and the question's number, where the engine takes seeds.
        """
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
        batch_size: texts in one forward pass of `losses`.
    """

    def __init__(self, generator: Generator, identity: Sequence[str], batch_size: int = _TEXTS) -> None:
        self.generator, self.batch_size = generator, batch_size
        self.identity: Sequence[str] = list(identity)

    def answers(
        self,
        questions: Sequence[Question],
        options: GenerationSection,
        *,
        seed: int | None,
        numbers: Sequence[int],
        on_reply: OnReply,
    ) -> None:
        template = self.generator.template
        prompts = [template.encode_prompt(question.messages, question.tools) for question in questions]

        def keep(place: int, answer: Answer) -> None:
            on_reply(place, Reply(answer.text, answer.finish_reason, len(answer.token_ids)))

        self.generator.answers(prompts, options, seed=seed, numbers=numbers, on_answer=keep)

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
        for start in range(0, len(samples), self.batch_size):
            batch = answer_losses(self.generator.bundle, samples[start : start + self.batch_size])
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

    def __post_init__(self) -> None:
        self.identity = [self.endpoint.url, self.endpoint.find_model()]

    def answers(
        self,
        questions: Sequence[Question],
        options: GenerationSection,
        *,
        seed: int | None,
        numbers: Sequence[int],
        on_reply: OnReply,
    ) -> None:
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
        for number, question in zip(numbers, questions, strict=True):
            body = {"messages": question.messages, **shared}
            if question.tools:
                body["tools"] = question.tools
            if seed is not None:  # several samples of a question must not be the same one
                body["seed"] = seed + number
            bodies.append(body)
        together = 4 * self.endpoint.concurrency  # an interruption loses so many at most
        for start in range(0, len(bodies), together):
            responses = self.endpoint.chat(bodies[start : start + together])
            for place, response in enumerate(responses, start):
                on_reply(place, self._reply(response))

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
