"""``swift models``: the table of short names, tiny models of any architecture, and which architectures train."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from swift.cli.arguments import ArgumentParser
from swift.cli.table import COMMANDS
from swift.core.errors import UsageError

__all__ = ["run"]


def run(argv: list[str]) -> int:
    """Run ``swift models {ls,show,tiny,verify} ...``."""
    arguments = _parser().parse(argv)
    action: Callable[[Namespace], int] = arguments.action
    return action(arguments)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="swift models", description=COMMANDS["models"].help)
    actions = parser.add_subparsers(required=True, metavar="{ls,show,tiny,verify}")
    ls = actions.add_parser("ls", help="list the models that have a short name")
    ls.add_argument("pattern", nargs="?", default="", metavar="PATTERN", help="part of a name, or a glob")
    ls.add_argument("--json", action="store_true", help="print one JSON array")
    ls.set_defaults(action=_list)
    show = actions.add_parser("show", help="everything known about one model")
    show.add_argument("name", metavar="NAME", help="a short name, an id, or a folder")
    show.add_argument("--json", action="store_true", help="print one JSON object")
    show.set_defaults(action=_show)
    tiny = actions.add_parser("tiny", help="write a small random model and its tokenizer")
    tiny.add_argument("architecture", metavar="ARCH", help="qwen3_moe, or a class of transformers")
    tiny.add_argument("folder", metavar="DIR", help="where to write it")
    for name, default in (("hidden_size", 64), ("num_layers", 2), ("vocab_size", 512), ("seed", 0)):
        tiny.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"default: {default}")
    tiny.add_argument("--chat_template", default="chatml", help="a built-in one (default: chatml)")
    tiny.add_argument("--config", metavar="JSON", help="further keys of config.json, over the small ones")
    tiny.add_argument("--overwrite", action="store_true", help="replace DIR when it exists")
    tiny.set_defaults(action=_tiny)
    verify = actions.add_parser("verify", help="one LoRA step, save and reload of every architecture")
    verify.add_argument("--only", default="*", metavar="PATTERN", help="model types, such as 'qwen*'")
    verify.add_argument("--out", metavar="FILE", help="write the table as Markdown")
    verify.add_argument(
        "--deadline", type=float, default=300, metavar="S", help="seconds for one (default: 300)"
    )
    verify.add_argument("--json", action="store_true", help="print one JSON array")
    verify.set_defaults(action=_verify)
    return parser


def _list(arguments: Namespace) -> int:
    from swift.models.registry import model_entries, own_models

    wanted = arguments.pattern.lower()
    glob = wanted if any(sign in wanted for sign in "*?[") else f"*{wanted}*"
    found = [
        entry
        for name, entry in model_entries().items()
        if any(fnmatch(word.lower(), glob) for word in (name, entry.hf_id, entry.family, *entry.aliases))
    ]
    own = {name: str(folder) for name, folder in own_models().items() if fnmatch(name.lower(), glob)}
    if arguments.json:
        mine = [{"name": name, "folder": folder} for name, folder in own.items()]
        print(json.dumps([*mine, *(_facts(entry) for entry in found)], ensure_ascii=False))
        return 0
    for name, folder in own.items():
        print(f"{name}\t{folder}")
    if not found:
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "parameters", "context", "Hugging Face", "ModelScope", "licence", box=None)
    for entry in found:
        context = entry.config.get("max_position_embeddings")
        gated = ", gated" if entry.gated else ""
        table.add_row(
            "\n".join((entry.name, *(f"  = {alias}" for alias in entry.aliases))),
            _size(entry),
            "" if context is None else f"{context:,}",
            entry.hf_id,
            "same" if entry.ms_id == entry.hf_id else entry.ms_id or "-",
            f"{entry.licence or '?'}{gated}",
        )
    console = Console(highlight=False)
    console.print(table if console.is_terminal else _plain(found), markup=False, soft_wrap=True)
    return 0


def _plain(entries: list[Any]) -> str:
    """One line a model, tabs between the columns: for pipes."""
    rows = [
        (entry.name, _size(entry), entry.hf_id, entry.ms_id or "-", entry.licence or "?") for entry in entries
    ]
    return "\n".join("\t".join(row) for row in rows)


def _size(entry: Any) -> str:
    if entry.size is None:
        return "?"
    active = f" ({entry.active:g} active)" if entry.active else ""
    return f"{entry.size:g} B{active}"


def _facts(entry: Any) -> dict[str, Any]:
    return {**asdict(entry), "aliases": dict(entry.aliases), "config": dict(entry.config)}


def _show(arguments: Namespace) -> int:
    from swift.models.registry import find_entry, nearest_name, own_folder

    folder = Path(arguments.name) if Path(arguments.name).is_dir() else own_folder(arguments.name)
    if folder is not None:
        return _show_folder(folder, arguments.json)
    entry = find_entry(arguments.name)
    if entry is None:
        near = nearest_name(arguments.name)
        raise UsageError(
            f"no model is called {arguments.name!r}",
            fix=f"did you mean {near}?" if near else "swift models ls lists them",
        )
    if arguments.json:
        print(json.dumps(_facts(entry), ensure_ascii=False, indent=2))
        return 0
    lines = {
        "name": ", ".join((entry.name, *entry.aliases)),
        "Hugging Face": entry.hf_id + (" (its terms must be accepted there first)" if entry.gated else ""),
        "ModelScope": entry.ms_id or "not known there",
        "architecture": (entry.architecture or "?") + (" (code of its own)" if entry.remote_code else ""),
        "template": "the tokenizer's own" if entry.template == "own" else f"{entry.template} (built in)",
        "licence": entry.licence or "?",
        "parameters": _size(entry),
        **{key: str(value) for key, value in entry.config.items() if key != "architectures"},
        "note": "; ".join(entry.notes(arguments.name)),
    }
    _print_lines(lines)
    return 0


def _show_folder(folder: Path, as_json: bool) -> int:
    from swift.models.facts import ModelFacts

    facts = ModelFacts.read(folder)
    if as_json:
        print(json.dumps({"folder": str(folder), "config": facts.config}, ensure_ascii=False, indent=2))
        return 0
    sizes = {key: str(value) for key, value in facts.config.items() if isinstance(value, int | str)}
    _print_lines(
        {
            "folder": str(folder),
            "architecture": facts.architecture,
            "parameters": f"{facts.num_parameters:,}",
            **sizes,
        }
    )
    return 0


def _print_lines(lines: Mapping[str, str]) -> None:
    width = max(map(len, lines))
    print("\n".join(f"{key:<{width}}  {value}" for key, value in lines.items() if value))


def _tiny(arguments: Namespace) -> int:
    from swift.models.tiny import make_tiny_model

    try:
        config = json.loads(arguments.config or "{}")
    except ValueError as error:
        raise UsageError("not JSON", where="--config", why=str(error)) from None
    if Path(arguments.folder).exists() and not arguments.overwrite:
        raise UsageError(f"{arguments.folder} exists", fix="another folder, or --overwrite to replace it")
    folder = make_tiny_model(
        arguments.folder,
        architecture=arguments.architecture,
        hidden_size=arguments.hidden_size,
        num_layers=arguments.num_layers,
        vocab_size=arguments.vocab_size,
        chat_template=arguments.chat_template,
        seed=arguments.seed,
        config=config,
    )
    from swift.models.facts import ModelFacts

    facts = ModelFacts.read(folder)
    print(f"{folder}: {facts.architecture}, {facts.num_parameters:,} parameters, random weights")
    return 0


def _verify(arguments: Namespace) -> int:
    from swift.evaluate.architectures import verify_architectures, write_table

    results = verify_architectures(
        arguments.only, deadline_seconds=arguments.deadline, say=_say(arguments.json)
    )
    if arguments.out:
        write_table(results, arguments.out)
    if arguments.json:
        print(json.dumps([asdict(result) for result in results]))
    trained = sum(result.trained for result in results)
    seconds = sum(result.cpu_seconds for result in results)
    _say(arguments.json)(f"{trained} of {len(results)} architectures train here; {seconds:.0f} CPU seconds")
    return 0 if trained == len(results) else 1


def _say(quiet: bool) -> Callable[[str], None]:
    return (lambda line: None) if quiet else (lambda line: print(line, flush=True))
