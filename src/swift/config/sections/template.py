"""How messages become text and which of it is learned."""

from __future__ import annotations

from typing import Literal

from swift.config.option import Section, option


class TemplateSection(Section):
    """Chat template and loss mask."""

    system: str | None = option(
        None, "System prompt for samples that have none (a text, or a file ending in .txt).", essential=True
    )
    chat_template: str | None = option(
        None, "Jinja file to use instead of the tokenizer's own chat template, or the name of a built-in one."
    )
    agent_template: Literal["react", "hermes", "qwen"] | None = option(
        None,
        "Write tools, calls and results as text in this form; default: as the chat template writes them.",
    )
    use_chat_template: bool | None = option(
        None, "Render messages with the chat template; default: yes, but plain text for pt."
    )
    loss_scale: Literal["default", "last_round", "all"] = option(
        "default", "What is learned: every assistant turn, the last one only, or all tokens (default of pt)."
    )
    use_loss_scale: bool = option(
        False, "Read weights per segment from the data (loss_scale of a message or of its content parts)."
    )
    enable_thinking: bool | None = option(None, "Passed to chat templates that know thinking mode.")
