"""The conversation: history, commands, interruption, several lines."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest

from swift.config.sections.generation import GenerationSection
from swift.core.errors import DataError
from swift.inference.chat import Chat, answer_lines, read_input


class Echo:
    """Stands for a Generator: answers with the last question, and remembers what it was asked."""

    def __init__(self, interrupt: bool = False) -> None:
        self.asked: list[list[dict[str, Any]]] = []
        self.seeds: list[int | None] = []
        self.interrupt = interrupt
        self.closed = False

    def stream(
        self, messages: list[dict[str, Any]], options: object, *, seed: int | None = None
    ) -> Iterator[str]:
        self.asked.append(list(messages))
        self.seeds.append(seed)
        try:
            for word in messages[-1]["content"].split():
                yield f"{word} "
                if self.interrupt:
                    raise KeyboardInterrupt
        finally:
            self.closed = True


def chat(echo: Any, **options: Any) -> tuple[Chat, io.StringIO]:
    out = io.StringIO()
    return Chat(echo, GenerationSection(**options), seed=5, out=out), out


def test_history_grows_and_can_be_forgotten() -> None:
    echo = Echo()
    talk, out = chat(echo)
    assert talk.handle("one two") and talk.handle("three")
    assert [m["content"] for m in echo.asked[1]] == ["one two", "one two ", "three"]
    assert echo.seeds == [5, 6]
    assert out.getvalue() == "one two \nthree \n"
    talk.handle("/clear")
    talk.handle("four")
    assert echo.asked[2] == [{"role": "user", "content": "four"}]


def test_system_prompt() -> None:
    echo = Echo()
    talk, _ = chat(echo)
    talk.handle("one")
    talk.handle("/system Be kind.")
    talk.handle("two")
    assert echo.asked[1] == [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "two"}]
    talk.handle("/system")
    talk.handle("three")
    assert echo.asked[2] == [{"role": "user", "content": "three"}]


def test_leaving_and_wrong_commands() -> None:
    echo = Echo()
    talk, out = chat(echo)
    assert talk.handle("") and talk.handle("/hepl") and "no command /hepl" in out.getvalue()
    assert not talk.handle("/exit")
    assert echo.asked == []
    talk.handle("/usr/bin is a path")
    assert len(echo.asked) == 1


def test_ctrl_c_stops_the_answer_only() -> None:
    echo = Echo(interrupt=True)
    talk, out = chat(echo)
    assert talk.handle("a b c")
    assert echo.closed and out.getvalue() == "a  … (stopped)\n"
    assert talk.messages[-1] == {"role": "assistant", "content": "a  …"}
    echo.interrupt = False
    assert talk.handle("next")
    assert len(echo.asked[1]) == 3


def test_an_error_leaves_the_conversation_as_it_was() -> None:
    class Full(Echo):
        def stream(self, *args: Any, **kwargs: Any) -> Iterator[str]:
            yield ""
            raise DataError("the prompt leaves no room", fix="/clear")

    talk, out = chat(Full())
    assert talk.handle("hello")
    assert "no room" in out.getvalue() and "fix: /clear" in out.getvalue() and talk.messages == []


def test_without_streaming_the_answer_comes_whole() -> None:
    talk, out = chat(Echo(), stream=False)
    talk.handle("a b")
    assert out.getvalue() == "a b \n"


def test_lines_of_a_file_are_answered_one_by_one() -> None:
    echo = Echo()
    talk, out = chat(echo)
    answer_lines(talk, iter(["one\n", "\n", "/clear\n", "two"]))
    assert [[m["content"] for m in asked] for asked in echo.asked] == [["one"], ["/clear"], ["two"]]
    assert out.getvalue().splitlines() == ["one ", "/clear ", "two "]


def test_ctrl_c_stops_all_lines_of_a_file() -> None:
    echo = Echo(interrupt=True)
    talk, _ = chat(echo)
    with pytest.raises(KeyboardInterrupt):
        answer_lines(talk, iter(["one\n", "two\n"]))
    assert len(echo.asked) == 1


@pytest.mark.parametrize(
    "typed,text",
    [
        (["hello"], "hello"),
        (['"""', "a", "  b", '"""'], "a\n  b"),
        (['"""a', 'b"""'], "a\nb"),
        (['"""a"""'], "a"),
    ],
)
def test_messages_of_several_lines(typed: list[str], text: str) -> None:
    lines = iter(typed)
    assert read_input(lambda prompt: next(lines)) == text
    assert next(lines, None) is None


def test_the_bare_words_of_ms_swift() -> None:
    echo = Echo()
    talk, _ = chat(echo)
    talk.handle("one")
    assert talk.handle("clear") and talk.messages == []
    assert not talk.handle("exit") and not talk.handle(" quit ")
    assert talk.handle("exit the room") and len(echo.asked) == 2
    typed = iter(["multi-line", "a", "b#"])
    assert read_input(lambda prompt: next(typed)) == "a\nb"
