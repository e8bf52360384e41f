"""Conversation in a terminal: streaming, history, a few commands."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from swift.config.sections.generation import GenerationSection
from swift.core.errors import SwiftError
from swift.inference.generate import Generator

__all__ = ["Chat", "answer_lines", "read_input"]

HELP = """/clear        forget the conversation (also: clear)
/system TEXT  set the system prompt (and forget the conversation)
/exit         leave (also: exit, quit, Ctrl-D)
\"\"\"           begin and end a message of several lines (also: multi-line, then a line that ends in #)
Ctrl-C        stop the answer; twice at the prompt: leave"""


_BARE = {"exit": "/exit", "quit": "/exit", "clear": "/clear"}
"""Words that ms-swift's chat knows without a slash; only when nothing else stands in the line."""


class Chat:
    """One conversation.

    Args:
        generator: the model.
        options: how to sample.
        seed: for sampling; every turn has its own.
        out: where answers go; default: standard output.
    """

    def __init__(
        self,
        generator: Generator,
        options: GenerationSection,
        *,
        seed: int | None = None,
        out: TextIO | None = None,
    ) -> None:
        self.generator, self.options, self.seed = generator, options, seed
        self.out = out or sys.stdout
        self.system: str | None = None
        self.messages: list[dict[str, Any]] = []
        self._turn = 0

    def handle(self, text: str) -> bool:
        """Answer one input or obey a command; False means leave."""
        word, _, rest = text.strip().partition(" ")
        word = _BARE.get(text.strip(), word)
        if not word:
            return True
        if word in ("/exit", "/quit"):
            return False
        if word == "/clear":
            self.messages.clear()
            self._say("(the conversation is forgotten)")
        elif word == "/system":
            self.system = rest.strip() or None
            self.messages.clear()
            self._say(f"(system prompt: {self.system or 'the default'})")
        elif word == "/help":
            self._say(HELP)
        elif word.startswith("/") and word[1:].isalpha() and not rest:
            self._say(f"(no command {word}; /help lists them)")
        else:
            self.answer(text)
        return True

    def answer(self, text: str) -> bool:
        """Answer one question and add both to the history; False when Ctrl-C cut the answer short."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        question = {"role": "user", "content": text}
        pieces: list[str] = []
        complete = True
        seed = None if self.seed is None else self.seed + self._turn
        stream = self.generator.stream([*system, *self.messages, question], self.options, seed=seed)
        try:
            for piece in stream:
                pieces.append(piece)
                if self.options.stream:
                    self.out.write(piece)
                    self.out.flush()
        except KeyboardInterrupt:
            stream.close()  # type: ignore[attr-defined]
            complete = False
            pieces.append(" …")
            if self.options.stream:
                self.out.write(" … (stopped)")
        except SwiftError as error:
            self._say(error.render())
            return True
        if not self.options.stream:
            self.out.write("".join(pieces))
        self.out.write("\n")
        self.out.flush()
        self._turn += 1
        self.messages += [question, {"role": "assistant", "content": "".join(pieces)}]
        return complete

    def _say(self, text: str) -> None:
        self.out.write(text + "\n")
        self.out.flush()


def read_input(ask: Callable[[str], str]) -> str:
    """One message from the keyboard, of several lines between three quotation marks. Raises EOFError.

    ``multi-line`` begins one too, as in ms-swift, which a line that ends in ``#`` ends.
    """
    line = ask(">>> ")
    if line.strip() == "multi-line":
        typed = [ask("... ")]
        while not typed[-1].rstrip().endswith("#"):
            typed.append(ask("... "))
        typed[-1] = typed[-1].rstrip()[:-1]
        return "\n".join(typed).strip("\n")
    if not line.lstrip().startswith('"""'):
        return line
    lines = [line.lstrip()[3:]]
    while not lines[-1].rstrip().endswith('"""'):
        lines.append(ask("... "))
    lines[-1] = lines[-1].rstrip()[:-3]
    return "\n".join(lines).strip("\n")


def answer_lines(chat: Chat, lines: Iterator[str]) -> None:
    """Answer every line on its own, without history (input that is not a terminal).

    Raises:
        KeyboardInterrupt: Ctrl-C during an answer stops all of them.
    """
    for line in lines:
        if line.strip():
            chat.messages.clear()
            if not chat.answer(line.rstrip("\n")):
                raise KeyboardInterrupt
