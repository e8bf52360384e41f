"""Chat templates: Jinja in the dialect transformers defines for them, with the ``{% generation %}`` tag.

The environment is the one of transformers' ``apply_chat_template`` (a test compares the two); having it
here saves that function's per-call copying and gives positions that are right also inside macros and ``{%
set %}`` blocks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from swift.core.errors import DataError, ModelError

__all__ = ["ChatTemplate", "Message"]

Message = Mapping[str, Any]

# Private-use characters: no tokenizer's training text has them, and a conversation that has them is refused.
_BEGIN, _END = "\U000ff000", "\U000ff001"


class _Generation(jinja2.ext.Extension):
    """``{% generation %}...{% endgeneration %}``: what the assistant writes."""

    tags = {"generation"}  # noqa: RUF012 - the attribute jinja2 reads
    marks = ("", "")

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_enclose"), [], [], body).set_lineno(line)

    def _enclose(self, caller: Any) -> str:
        return f"{self.marks[0]}{caller()}{self.marks[1]}"


class _MarkedGeneration(_Generation):
    marks = (_BEGIN, _END)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


@cache
def _environment(marked: bool) -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_MarkedGeneration if marked else _Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment


@cache
def _compile(source: str, marked: bool) -> jinja2.Template:
    return _environment(marked).from_string(source)


class ChatTemplate:
    """One chat template.

    Args:
        source: its Jinja text.
        variables: names every rendering sees (``bos_token``, ``enable_thinking``...).
        where: the file or folder it comes from, for errors.

    Raises:
        ModelError: the text is not valid Jinja.
    """

    def __init__(self, source: str, variables: Mapping[str, Any], where: str) -> None:
        self.source, self.variables, self.where = source, dict(variables), where
        try:
            self._plain, self._marked = _compile(source, False), _compile(source, True)
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(
                f"the chat template is not valid Jinja (line {error.lineno})", where=where, why=str(error)
            ) from error
        tree = _environment(False).parse(source)
        self.names = frozenset(jinja2.meta.find_undeclared_variables(tree))
        """The variables that the template reads."""
        calls = (node.node for node in tree.find_all(jinja2.nodes.Call))
        self.has_generation = any(
            isinstance(node, jinja2.nodes.ExtensionAttribute) and node.name == "_enclose" for node in calls
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # Compiled templates cannot be sent to another process; their text can.
        return ChatTemplate, (self.source, self.variables, self.where)

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a conversation; ``variables`` hold for this one.

        Raises DataError with the template's own words when it refuses.
        """
        return self._render(self._plain, messages, tools, add_generation_prompt, variables)

    def render_generation(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the character ranges the template encloses in ``{% generation %}``, in order."""
        marked = self._render(self._marked, messages, tools, False)
        pieces: list[str] = []
        ranges: list[tuple[int, int]] = []
        length = 0
        for number, block in enumerate(marked.split(_BEGIN)):
            inside, end, outside = block.partition(_END)
            if (number > 0) != bool(end) or _END in outside:
                raise DataError(
                    "the chat template's {% generation %} blocks are nested or torn apart",
                    where=self.where,
                    why="or the text contains the characters U+FF000 or U+FF001",
                )
            if number > 0:
                ranges.append((length, length + len(inside)))
            pieces += [inside, outside]
            length += len(inside) + len(outside)
        return "".join(pieces), ranges

    def _render(
        self,
        template: jinja2.Template,
        messages: Sequence[Message],
        tools: Any,
        add_generation_prompt: bool,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        try:
            return template.render(
                messages=messages,
                tools=tools or None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **{**self.variables, **(variables or {})},
            )
        except jinja2.TemplateError as error:
            raise DataError("the chat template refuses this conversation", why=str(error)) from error
        except (TypeError, KeyError, IndexError, AttributeError, ValueError) as error:
            # What a template's expressions raise on values they were not written for (None + "text").
            why = f"{type(error).__name__}: {error}"
            raise DataError("the chat template cannot render this conversation", why=why) from error
