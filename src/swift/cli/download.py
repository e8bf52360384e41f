"""``swift download``: a model or data set comes from a hub to this machine, or what is here is checked."""

from __future__ import annotations

import sys
from argparse import ArgumentTypeError, Namespace
from dataclasses import replace
from pathlib import Path

from swift.cli.arguments import ArgumentParser
from swift.cli.table import COMMANDS
from swift.core.errors import UsageError
from swift.core.format import format_bytes


def run(argv: list[str]) -> int:
    """Print the folder, so that ``$(swift download X)`` names it. Exit 1 when ``--verify`` finds damage."""
    arguments = _parser().parse(argv)
    from swift.hubs.clients import find_hub
    from swift.hubs.fetch import Choice, fetch
    from swift.hubs.names import find_repo
    from swift.hubs.types import PATIENCE

    hub = find_hub(arguments.use_hf, arguments.hub_token)
    repo = find_repo(_hub_id(arguments), arguments.type, arguments.revision, "swift download")
    local_dir = Path(arguments.local_dir).expanduser() if arguments.local_dir else None
    choice = Choice(arguments.include, arguments.exclude, local_dir)
    patience = replace(PATIENCE, workers=arguments.max_workers)
    if arguments.verify:
        return _verify(arguments, hub, repo, choice)
    found = fetch(hub, repo, choice, patience)
    print(f"commit {found.commit}, {format_bytes(found.received)} received", file=sys.stderr)
    print(found.folder)
    return 0


def _hub_id(arguments: Namespace) -> str:
    """A short name's id on the hub that is meant; any other name as it is."""
    from swift.data.registry import find_dataset
    from swift.hubs.clients import wants_hf
    from swift.models.registry import find_entry, resolve

    name: str = arguments.name
    if arguments.type == "dataset":
        dataset = find_dataset(name)
        return (dataset and dataset.hub_id("hf" if wants_hf(arguments.use_hf) else "ms")) or name
    if find_entry(name) is None:
        return name
    return resolve(name, wants_hf(arguments.use_hf)).hub_id or name


def _verify(arguments: Namespace, hub: object, repo: object, choice: object) -> int:
    from swift.hubs.fetch import verify

    found, report = verify(hub, repo, choice)  # type: ignore[arg-type]
    for path in report.damaged:
        print(f"damaged, deleted: {path}")
    for path in report.missing:
        print(f"missing: {path}")
    print(f"{report.good} files are as the hub has them: {found.folder} (commit {found.commit})")
    if report.damaged or report.missing:
        print(f"  fix: swift download {arguments.name} fetches the others", file=sys.stderr)
        return 1
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="swift download", description=COMMANDS["download"].help)
    parser.add_argument("name", metavar="OWNER/NAME", help="name on the hub")
    parser.add_argument(
        "--type", choices=("model", "dataset"), default="model", help="what it is (default: model)"
    )
    parser.add_argument(
        "--revision", metavar="R", help="branch, tag or commit (default: the hub's main branch)"
    )
    parser.add_argument(
        "--use_hf", nargs="?", type=_truth, const=True, metavar="true|false",
        help="Hugging Face instead of ModelScope (default: USE_HF of the environment, else false)",
    )  # fmt: skip
    parser.add_argument("--hub_token", metavar="TOKEN", help="instead of HF_TOKEN or MODELSCOPE_API_TOKEN")
    parser.add_argument("--local_dir", metavar="FOLDER", help="a plain folder instead of the client's cache")
    parser.add_argument(
        "--include", nargs="+", default=[], metavar="PATTERN", help="only files like *.safetensors"
    )
    parser.add_argument("--exclude", nargs="+", default=[], metavar="PATTERN", help="without these files")
    parser.add_argument(
        "--max_workers", type=_workers, default=8, metavar="N", help="files at a time (default: 8)"
    )
    parser.add_argument("--verify", action="store_true", help="fetch nothing: check the files that are here")
    return parser


def _truth(text: str) -> bool:
    known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in known:
        raise ArgumentTypeError(f"{text!r} is neither true nor false")
    return known[text.lower()]


def _workers(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise UsageError("not a number of files", where="--max_workers", fix="--max_workers 4")
    return int(text)
