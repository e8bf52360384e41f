"""Where a run leaves its files and from where it goes on."""

from __future__ import annotations

from typing import Literal

from swift.config.option import Section, option


class CheckpointSection(Section):
    """Run folder, saving, resuming."""

    output_dir: str = option("output", "Folder that receives run folders.", essential=True)
    run_name: str | None = option(
        None, "Name of the run folder; default: vN-YYYYMMDD-HHMMSS.", essential=True
    )
    save_strategy: Literal["steps", "epoch", "no"] = option(
        "steps",
        "When to save: every save_steps, after each epoch, or neither (no); besides, at the end and whenever an"
        " evaluation is the best so far.",
    )
    save_steps: int = option(500, "Steps between checkpoints.", unit="steps", essential=True, ge=1)
    save_total_limit: int | None = option(
        None, "Checkpoints kept besides best and last; older ones are deleted.", ge=1
    )
    save_only_model: bool = option(
        False, "Leave out optimizer and random state: smaller, but cannot be resumed."
    )
    resume_from_checkpoint: str | None = option(
        None,
        "Go on from this checkpoint or run folder; last: the newest one under output_dir.",
        essential=True,
    )
