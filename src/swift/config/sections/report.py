"""What a run says while it runs."""

from __future__ import annotations

from typing import Literal

from swift.config.option import Section, option


class ReportSection(Section):
    """Logging, trackers, callbacks, inspection."""

    logging_steps: int = option(5, "Steps between metric lines.", unit="steps", ge=1, essential=True)
    report_to: list[Literal["none", "all", "tensorboard", "wandb", "swanlab", "trackio", "mlflow"]] = option(
        [], "Trackers that also receive the metrics; all: every one that is installed."
    )
    callbacks: list[str] = option([], "Your callbacks: FILE.py or FILE.py:Class.")
    debug_mode: bool = option(False, "Print the first batch: tokens beside labels, and embedding statistics.")
