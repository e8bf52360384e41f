"""``swift data``: look at samples as the model sees them, or find every row that cannot be used."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from swift.cli.arguments import ArgumentParser
from swift.cli.table import COMMANDS
from swift.core.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from swift.data.formats import Sample
    from swift.data.registry import DatasetEntry
    from swift.data.rows import Row
    from swift.data.store import EncodedLike
    from swift.data.teaching import TeachingReport

_CHUNK_ROWS = 256


def run(argv: list[str]) -> int:
    """Run ``swift data {ls,show,check,build-cache}``."""
    if argv[:1] == ["build-cache"]:
        return _build_cache(argv[1:])
    arguments = _parser().parse(argv)
    action: Callable[[Namespace], int] = arguments.action
    return action(arguments)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="swift data", description=COMMANDS["data"].help)
    actions = parser.add_subparsers(required=True, metavar="{ls,show,check,build-cache}")
    listing = actions.add_parser("ls", help="list the data sets known by name")
    listing.add_argument(
        "pattern", nargs="?", metavar="PATTERN", help="part of a name, id or task, or a glob"
    )
    listing.add_argument("--json", action="store_true", help="print one JSON object")
    listing.set_defaults(action=_list)
    actions.add_parser(
        "build-cache", help="tokenise ahead: the data options of swift sft, and --pt for swift pt"
    )
    show = actions.add_parser("show", help="print samples as the model sees them, what is learned in colour")
    show.add_argument("--num_rows", type=int, default=3, metavar="N", help="samples to show (default: 3)")
    show.set_defaults(action=_show)
    check = actions.add_parser("check", help="print every row that cannot be used; exit 1 when there is one")
    check.set_defaults(action=_check)
    for action in (show, check):
        action.add_argument("files", nargs="+", metavar="FILE", help="files, folders, names, FILE#500")
        action.add_argument("--model", metavar="MODEL", help="tokenise with this model's template")
        action.add_argument("--columns", metavar="JSON", help="rename columns: {old: new}")
        action.add_argument("--max_length", type=int, metavar="N", help="with --model: tell longer samples")
        action.add_argument("--system", metavar="TEXT", help="system prompt for samples that have none")
        action.add_argument(
            "--chat_template", "--template", metavar="FILE", help="instead of the tokenizer's own"
        )
        action.add_argument("--loss_scale", choices=("default", "last_round", "all"), help="what is learned")
        action.add_argument("--use_loss_scale", action="store_true", help="read weights from the data")
        action.add_argument("--pt", action="store_true", help="as swift pt sees it: plain text, all learned")
        action.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _check(arguments: Namespace) -> int:
    from swift.data.teaching import TeachingReport

    bad: list[tuple[str, str]] = []
    num_rows = 0
    teaching = TeachingReport(all_learned=arguments.pt or arguments.loss_scale == "all")
    for part in _faults(arguments, teaching):
        count, faults = part
        num_rows += count
        bad.extend(faults)
        if not arguments.json:
            for location, reason in faults:
                print(f"{location}: {reason}")
    if arguments.json:
        faults_json = [{"location": location, "reason": reason} for location, reason in bad]
        report = {"num_rows": num_rows, "num_bad": len(bad), "bad": faults_json}
        print(json.dumps({**report, "warnings": teaching.sentences()}, ensure_ascii=False))
        return 1 if bad else 0
    if bad:
        print(f"{len(bad)} of {num_rows} rows cannot be used")
    else:
        print(f"{num_rows} rows, all of them {'readable' if teaching.sentences() else 'good'}")
    for sentence in teaching.sentences():
        print(f"warning: {sentence}")
    return 1 if bad else 0


def _faults(arguments: Namespace, teaching: TeachingReport) -> Iterator[tuple[int, list[tuple[str, str]]]]:
    """(rows looked at, faults) chunk by chunk: by reading alone or, with a model, by tokenising.

    ``teaching`` gets the rows that are no faults but need a word; with a model, rows without targets are faults.
    """
    from swift.data.formats import RowError, to_sample

    rows = _rows(arguments)
    if arguments.model is None:
        for row in rows:
            teaching.look_at_columns(row.values, row.location)
            try:
                teaching.look_at_sample(to_sample(row))
                yield 1, []
            except RowError as error:
                yield 1, [(error.location, error.reason)]
        return
    from swift.data.rows import location_of
    from swift.data.tokenise import Encoder, encode_rows

    encoder = Encoder(_template(arguments), arguments.max_length, "delete")
    while chunk := list(islice(rows, _CHUNK_ROWS)):
        for row in chunk:
            teaching.look_at_columns(row.values, row.location)
        report = encode_rows(chunk, encoder).report
        faults = dict(report.bad_rows)
        for places, reason in (
            (report.deleted, f"longer than max_length {arguments.max_length}"),
            (report.untargeted, "no token is learned"),
        ):
            for source, numbers in places.items():
                faults.update((location_of(source, number), reason) for number in numbers)
        yield len(chunk), [(row.location, faults[row.location]) for row in chunk if row.location in faults]


def _list(arguments: Namespace) -> int:
    from swift.data.registry import all_datasets

    entries = all_datasets(arguments.pattern)
    if arguments.json:
        print(json.dumps({"datasets": [entry.describe() for entry in entries]}, ensure_ascii=False))
        return 0
    rows = [
        (entry.name, entry.task, entry.hf or "", entry.ms or "", entry.licence or "")
        for entry in sorted(entries, key=lambda entry: (entry.task, entry.name))
    ]
    if not sys.stdout.isatty():  # for pipes: one line a data set, tabs between the columns
        print(*("\t".join(row) for row in rows), sep="\n")
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "task", "Hugging Face", "ModelScope", "licence", box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    Console(soft_wrap=True).print(table)
    print(f"{len(entries)} data sets")
    return 0


def _build_cache(argv: list[str]) -> int:
    """Tokenise the data of a training command into the token cache; the run then starts from it."""
    from swift.config.bind import resolve
    from swift.core.logging import quiet_libraries

    command = "pt" if "--pt" in argv else "sft"
    resolved = resolve(command, [word for word in argv if word != "--pt"])
    quiet_libraries()
    from swift.data.load import load_data
    from swift.data.mode import derive_max_length
    from swift.models.facts import ModelFacts
    from swift.models.load import load_template
    from swift.train.preflight import preflight

    folder = preflight(resolved)
    derive_max_length(resolved, ModelFacts.read(folder))
    template = load_template(folder, resolved.config.template, command == "pt")
    loaded = load_data(resolved, template, resolved.config.data.max_length)
    for note in loaded.notes:
        print(note)
    for name, dataset in (("training", loaded.train), ("validation", loaded.validation)):
        if dataset is not None:
            print(f"{name}: {len(dataset)} samples, {dataset.num_tokens} tokens in the cache")
    return 0


def _show(arguments: Namespace) -> int:
    from swift.data.formats import to_sample
    from swift.data.sources import parse_dataset_spec

    spec = parse_dataset_spec(arguments.files[0])
    if spec.entry is not None and not spec.is_local:
        return _show_entry(spec.entry, arguments.json)
    samples = [to_sample(row) for row in islice(_rows(arguments), arguments.num_rows)]
    encoded: list[Any] = [None] * len(samples)
    tokenizer = None
    if arguments.model is not None:
        template = _template(arguments)
        tokenizer = template.tokenizer
        encoded = template.encode_many([(sample.messages, sample.tools) for sample in samples])
    if arguments.json:
        shown = [_as_json(sample, one, tokenizer) for sample, one in zip(samples, encoded, strict=True)]
        print(json.dumps({"samples": shown}, ensure_ascii=False, default=str))
        return 0
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    for sample, one in zip(samples, encoded, strict=True):
        _print_sample(console, sample, one, tokenizer, arguments.max_length)
    if encoded and encoded[0] is not None:
        legend = "green: learned, dim: not learned" if console.is_terminal else "[[...]]: learned"
        console.print(legend, markup=False, style="dim")
    return 0


def _show_entry(entry: DatasetEntry, as_json: bool) -> int:
    """What the registry says about a data set that is not on this machine."""
    facts = {key: value for key, value in entry.describe().items() if value}
    if as_json:
        print(json.dumps(facts, ensure_ascii=False))
    else:
        for key, value in facts.items():
            print(f"{key}: {', '.join(value) if isinstance(value, list | tuple) else value}")
    return 0


def _rows(arguments: Namespace) -> Iterator[Row]:
    """All rows of all files; what is missing is told before anything is read."""
    from swift.data.samples import select
    from swift.data.sources import find_files, parse_dataset_spec

    columns = _columns(arguments.columns)
    specs = [parse_dataset_spec(text) for text in arguments.files]
    files = [find_files(spec) for spec in specs]
    return (
        row
        for spec, found in zip(specs, files, strict=True)
        for row in select(spec, found, seed=42).rows(columns)
    )


def _columns(text: str | None) -> dict[str, str]:
    if text is None:
        return {}
    try:
        columns = json.loads(text)
    except ValueError:
        columns = None
    if not isinstance(columns, dict) or not all(isinstance(name, str) for name in columns.values()):
        raise UsageError(
            "not a JSON object of names", where="--columns", fix="""--columns '{"old": "new"}'"""
        )
    return columns


def _template(arguments: Namespace) -> Any:
    from swift.config.sections.model import ModelSection
    from swift.config.sections.template import TemplateSection
    from swift.core.logging import quiet_libraries
    from swift.models.locate import locate_model

    quiet_libraries()
    from swift.models.load import load_template

    section = TemplateSection.model_validate(
        {
            "system": arguments.system,
            "chat_template": arguments.chat_template,
            "loss_scale": arguments.loss_scale or ("all" if arguments.pt else "default"),
            "use_loss_scale": arguments.use_loss_scale,
        }
    )
    return load_template(locate_model(ModelSection(model=arguments.model)).folder, section, arguments.pt)


def _segments(encoded: EncodedLike, tokenizer: Any) -> list[tuple[str, bool]]:
    """Runs of tokens that are learned, or are not, as text."""
    runs: list[tuple[list[int], bool]] = []
    for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
        learned = label != -100
        if not runs or runs[-1][1] is not learned:
            runs.append(([], learned))
        runs[-1][0].append(token)
    return [(tokenizer.decode(ids, skip_special_tokens=False), learned) for ids, learned in runs]


def _as_json(sample: Sample, encoded: EncodedLike | None, tokenizer: Any) -> dict[str, Any]:
    shown: dict[str, Any] = {"location": sample.location, "messages": sample.messages}
    if sample.tools is not None:
        shown["tools"] = sample.tools
    shown["extra"] = sample.extra
    if encoded is not None:
        shown["input_ids"] = encoded.input_ids
        shown["labels"] = encoded.labels
        shown["weights"] = encoded.weights
        shown["segments"] = [
            {"text": text, "learned": learned} for text, learned in _segments(encoded, tokenizer)
        ]
    return shown


def _print_sample(
    console: Console, sample: Sample, encoded: EncodedLike | None, tokenizer: Any, max_length: int | None
) -> None:
    from rich.text import Text

    head = sample.location
    if encoded is not None:
        targets = sum(label != -100 for label in encoded.labels[1:])
        head += f"   {len(encoded.input_ids)} tokens, {targets} learned"
        if max_length is not None and len(encoded.input_ids) > max_length:
            head += f", longer than max_length {max_length}"
    if sample.extra:
        head += f"   other columns: {', '.join(sample.extra)}"
    console.print(Text(head, style="bold"))
    if encoded is None:
        if sample.tools:
            console.print(Text(f"tools: {json.dumps(sample.tools, ensure_ascii=False)}", style="dim"))
        for message in sample.messages:
            console.print(Text.assemble((f"{message['role']}: ", "cyan"), _message_text(message)))
    else:
        parts = _segments(encoded, tokenizer)
        if console.is_terminal:
            styled = [(text, "green" if learned else "dim") for text, learned in parts]
            console.print(Text.assemble(*styled))
        else:
            console.print(Text("".join(f"[[{text}]]" if learned else text for text, learned in parts)))
    console.print()


def _message_text(message: dict[str, Any]) -> str:
    content = message["content"]
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    others = {key: value for key, value in message.items() if key not in ("role", "content")}
    return f"{text} {json.dumps(others, ensure_ascii=False, default=str)}" if others else text
