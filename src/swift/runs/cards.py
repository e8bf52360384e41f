"""What a run says on the terminal: a card before (the plan) and one after (results, next commands).

Both are plain lines of label and text. On a terminal rich draws a frame and colours; in a pipe or a log file
the same lines come without either.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from swift.core.format import format_bytes, format_count, format_duration
from swift.runs.metrics import read_metrics

__all__ = ["end_card_lines", "plan_card_lines", "print_card", "print_end_card", "print_plan_card"]

Lines = list[tuple[str, str]]


def print_plan_card(plan: Mapping[str, Any], file: IO[str] | None = None) -> None:
    """Print the card of a plan, given as ``Plan.to_dict()``."""
    print_card(f"swift {plan['command']}", plan_card_lines(plan), file)


def print_end_card(folder: Path, summary: Mapping[str, Any], file: IO[str] | None = None) -> None:
    """Print the card of a run that has ended, given the contents of its summary.json."""
    stopped = summary.get("stop_reason")
    print_card(f"stopped early: {stopped}" if stopped else "done", end_card_lines(folder, summary), file)


def print_card(title: str, lines: Lines, file: IO[str] | None = None) -> None:
    """Print labelled lines; a frame and colours only where ``file`` (default stdout) is a terminal."""
    file = file or sys.stdout
    width = max((len(label) for label, _ in lines), default=0)
    if not file.isatty():
        print(f"-- {title}", file=file)
        for label, text in lines:
            print(f"   {label:<{width}}  {text}", file=file)
        file.flush()
        return
    from rich import box
    from rich.console import Console
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in lines:
        table.add_row(label, Text(text, style="yellow" if label == "warning" else ""))
    console = Console(file=file, highlight=False)
    console.print(
        Panel(table, title=Text(title, style="bold"), title_align="left", box=box.ROUNDED, expand=False)
    )


def plan_card_lines(plan: Mapping[str, Any]) -> Lines:
    """Label and text of what is about to happen, about ten lines."""
    model, data, steps, memory = plan["model"], plan["data"], plan["steps"], plan["memory"]
    lines: Lines = []
    if model:
        trainable = model.get("trainable_parameters")
        share = f", {format_count(trainable)} trained" if trainable else ""
        stored = f", base in {model['quantized']}" if model.get("quantized") else ""
        lines.append(
            (
                "model",
                f"{model['path'] or plan['config']['model']['model']}  ({model['architecture']},"
                f" {format_count(model['parameters'])} parameters{share}, {model['dtype']}{stored})",
            )
        )
    if data:
        lines += _data_lines(data)
    if steps:
        lines += _step_lines(steps)
    if plan.get("export"):
        lines += _export_lines(plan["export"])
    if plan.get("time"):
        lines.append(("time", _time_text(plan["time"])))
    if memory:
        lines.append(("memory", _memory_text(memory)))
        cache = memory.get("cache")
        if cache:
            lines.append(
                (
                    "cache",
                    f"{format_count(cache['tokens'])} tokens of {format_bytes(cache['bytes_per_token'])}:"
                    f" {cache['full_length_requests']:g} requests of {cache['max_model_len']} tokens at once",
                )
            )
        disk = memory.get("disk")
        if disk and "checkpoint_bytes" not in disk:
            free = format_bytes(disk["free_bytes"])
            lines.append(("disk", f"{format_bytes(disk['total_bytes'])} on the way ({free} free)"))
        elif disk:
            lines.append(
                (
                    "disk",
                    f"{format_bytes(disk['checkpoint_bytes'])} a checkpoint, at most {disk['checkpoints']}"
                    f" of them: {format_bytes(disk['total_bytes'])}"
                    f" ({format_bytes(disk['free_bytes'])} free)",
                )
            )
    if plan.get("solution"):
        lines += _solution_lines(plan["solution"])
    parallel = plan["parallel"]
    if parallel and parallel["devices_needed"] > 1:
        lines.append(("parallel", f"{parallel['devices_needed']} devices: {parallel['layout']}"))
    checkpoint = plan["config"].get("checkpoint", {})
    if plan.get("export"):
        explicit = "output_dir" in plan["config"].get("explicit", ())
        lines.append(("folder", checkpoint["output_dir"] if explicit else "beside the model"))
    elif "output_dir" in checkpoint:
        name = checkpoint.get("run_name") or "vN-DATE-TIME"
        lines.append(("folder", f"{checkpoint['output_dir']}/{name}"))
    return lines + [("warning", warning) for warning in plan["warnings"]]


def _export_lines(export: Mapping[str, Any]) -> Lines:
    text = export["method"]
    if export.get("bits"):
        text += f", {export['bits']} bits"
    if export.get("group_size"):
        text += f", groups of {export['group_size']}" if export["group_size"] > 0 else ", whole rows"
    lines = [
        (
            "export",
            f"{text}, for {export['output_format']}"
            + (", the adapter is merged first" if export["merges"] else ""),
        )
    ]
    if export.get("toolchain"):
        state = (
            "installed"
            if export["toolchain_installed"]
            else f"missing: swift toolchain install {export['toolchain']}"
        )
        lines.append(("toolchain", f"{export['toolchain']} ({state})"))
    if export.get("calibration_rows"):
        tokens = export.get("calibration_tokens")
        counted = f", about {format_count(tokens)} tokens" if tokens else ""
        lines.append(
            ("calibration", f"{export['calibration_rows']:,} rows{counted} of {export['calibration_from']}")
        )
    if "bytes_before" in export:
        before, after = format_bytes(export["bytes_before"]), format_bytes(export["bytes_after"])
        lines.append(
            (
                "weights",
                f"{before} -> {after}; {export['full_precision_share']:.1%} of the parameters stay as they are",
            )
        )
    return lines


def _data_lines(data: Mapping[str, Any]) -> Lines:
    text = f"{data['rows']:,} rows"
    if data.get("tokens"):
        how = "counted" if data["tokens_exact"] else f"estimated from {data['sampled_rows']:,} rows"
        if data.get("tokens_guessed"):
            how = "guessed by the size of the texts: the tokenizer is not on this disk"
        text += f", {format_count(data['tokens'])} tokens ({how})"
    if data.get("validation_rows"):
        text += f"; validation {data['validation_rows']:,} rows"
    return [("data", text)]


def _step_lines(steps: Mapping[str, Any]) -> Lines:
    about = "" if steps["exact"] else "about "
    batch = f"{steps['batch_size']} x {steps['accumulation']} {steps['unit']} a step, {steps['layout']}"
    rate = f"learning rate {steps['learning_rate']:g} ({steps['schedule']}, {steps['warmup_steps']} warm-up steps)"
    return [
        ("batch", f"{batch}, up to {steps['max_length']} tokens each"),
        (
            "steps",
            f"{about}{steps['total']:,} ({steps['epochs']:g} epochs of {steps['steps_per_epoch']:,}); {rate}",
        ),
    ]


def _memory_text(memory: Mapping[str, Any]) -> str:
    parts = sorted(memory["parts"].items(), key=lambda item: -item[1])
    shown = ", ".join(f"{name} {format_bytes(value)}" for name, value in parts if value)
    device = memory.get("device_bytes")
    verdict = {True: "fits", False: "does NOT fit", None: "not compared with a device"}[memory["fits"]]
    room = f" of {format_bytes(device)}" if device else ""
    traced = " (traced)" if memory.get("method") == "traced" else ""
    return f"about {format_bytes(memory['total'])}{room}{traced}, {verdict}: {shown}"


def _time_text(time: Mapping[str, Any]) -> str:
    flops = f"{time['flops_per_step'] / 1e12:.3g} TFLOP a step"
    if time["seconds"] is None:
        if not time.get("can_be_measured", True):
            return f"not known ({flops}): it is measured where the device is"
        return f"not known yet ({flops}): swift plan ... --exact measures this machine once, a first run does as well"
    return f"about {format_duration(time['seconds'])} by {time['source']} ({flops})"


def _solution_lines(solution: Mapping[str, Any]) -> Lines:
    """What fits by the formulas, and the cheapest changes that make the run fit."""
    largest = ", ".join(
        f"{name} {'does not help' if value is None else value}" for name, value in solution["largest"].items()
    )
    lines = [
        ("largest", f"{largest}; each with all else as it is, in {format_bytes(solution['limit_bytes'])}")
    ]
    changes = solution["changes"]
    steps = [
        (change["flags"], f"{change['flags']}  -> {format_bytes(change['total_bytes'])}")
        for change in changes
    ]
    lines += [("change" if place == 0 else "", text) for place, (_, text) in enumerate(steps)]
    if changes and solution["fits"]:
        lines.append(("fits with", solution["flags"]))
    elif not solution["fits"]:
        lines.append(("", "no change known here makes it fit: a smaller model, or more devices"))
    return lines


def end_card_lines(folder: Path, summary: Mapping[str, Any]) -> Lines:
    """Label and text of what came out, and the commands one would type next."""
    lines: Lines = []
    loss = [f"{summary[key]:.4f}" for key in ("first_loss", "last_loss") if summary.get(key) is not None]
    rewards = _rewards(folder)
    if rewards:  # a policy's loss says little
        lines.append(("reward", f"{rewards[0]:.4f} -> {rewards[-1]:.4f}"))
    elif loss:
        lines.append(("loss", " -> ".join(loss)))
    evaluation = summary.get("evaluation") or {}
    if evaluation:
        numbers = ", ".join(
            f"{name.removeprefix('eval_').replace('_', ' ')} {value:.4g}"
            for name, value in evaluation.items()
            if isinstance(value, (int, float)) and not name.endswith(("seconds", "per_second", "samples"))
        )
        best = summary.get("best_step")
        lines.append(("evaluation", numbers + (f"; best at step {best}" if best else "")))
    lines.append(("work", _work_text(summary)))
    if summary.get("peak_memory_gib") is not None:
        lines.append(("peak memory", f"{summary['peak_memory_gib']:.2f} GiB"))
    lines.append(("folder", str(folder)))
    names = [summary.get("last_checkpoint"), summary.get("best_checkpoint")]
    kept = [f"{kind} = {name}" for kind, name in zip(("last", "best"), names, strict=True) if name]
    if kept:
        lines.append(("checkpoints", ", ".join(kept)))
    return lines + _next_commands(folder, summary)


def _rewards(folder: Path) -> list[float]:
    """Of the sampled answers; none where nothing was sampled."""
    file = folder / "metrics.jsonl"
    if not (folder / "rollouts").is_dir() or not file.is_file():
        return []
    return [row["reward"] for row in read_metrics(file) if row.get("reward") is not None]


def _work_text(summary: Mapping[str, Any]) -> str:
    text = f"{summary['steps']:,} steps, {format_count(summary['num_tokens'])} tokens"
    if summary.get("train_seconds"):
        text += f" in {format_duration(summary['train_seconds'])}"
    if summary.get("tokens_per_second"):
        text += f" ({summary['tokens_per_second']:,.0f} tokens/s)"
    return text


def _next_commands(folder: Path, summary: Mapping[str, Any]) -> Lines:
    kind = "best" if summary.get("best_checkpoint") else "last"
    name = summary.get(f"{kind}_checkpoint")
    if not name:
        return []
    checkpoint = shlex.quote(str(folder / kind))
    adapter = folder / name / "adapter_config.json"
    if adapter.is_file():
        commands = [f"swift infer --adapters {checkpoint}", f"swift merge-lora --adapters {checkpoint}"]
        if str(json.loads(adapter.read_bytes()).get("peft_type")).startswith(
            "SWIFT_"
        ):  # no change of a weight (ReFT)
            commands.pop()
    else:
        commands = [f"swift infer --model {checkpoint}"]
    if summary.get("task_type"):  # it writes no text
        flag = "--adapters" if adapter.is_file() else "--model"
        commands[0] = f"swift deploy {flag} {checkpoint}"
    if (folder / "rollouts").is_dir():
        commands.append(f"swift rollouts show {shlex.quote(str(folder))}")
    if summary.get("stop_reason"):
        commands.append(f"swift resume {shlex.quote(str(folder))}")
    return [("next" if place == 0 else "", command) for place, command in enumerate(commands)]
