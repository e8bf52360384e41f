"""``swift toolchain install|ls|doctor|rm``: own environments for programs whose versions conflict with ours."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from swift.cli.arguments import ArgumentParser
from swift.core.format import format_bytes


def run(argv: list[str]) -> int:
    """0; ``doctor``: 1 when something is wrong."""
    words, behind = argv, []
    if "--" in argv:
        words, behind = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    arguments = _parser().parse(words)
    arguments.behind = behind
    actions = {"install": _install, "ls": _list, "doctor": _doctor, "rm": _remove}
    return actions[arguments.action](arguments)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="swift toolchain",
        description="Environments of their own for programs whose versions conflict with ours.",
    )
    commands = parser.add_subparsers(dest="action", required=True)
    install = commands.add_parser("install", help="make one; what stands behind -- goes to pip install")
    install.add_argument("names", nargs="+", metavar="NAME")
    install.add_argument("--variant", choices=["cpu", "cuda"], help="default: what this machine has")
    install.add_argument(
        "--wheels", type=Path, metavar="DIR", help="take wheels from this folder, ask no index"
    )
    install.add_argument("--installer", choices=["uv", "pip"], help="default: uv when it is on PATH")
    install.add_argument("--deadline", type=float, metavar="SECONDS", help="for each step; default: 3600")
    listing = commands.add_parser("ls", help="what there is, what is installed, what each is for")
    listing.add_argument("--json", action="store_true")
    doctor = commands.add_parser("doctor", help="test installed ones again")
    doctor.add_argument("names", nargs="*", metavar="NAME")
    doctor.add_argument("--json", action="store_true")
    remove = commands.add_parser("rm", help="delete one")
    remove.add_argument("names", nargs="+", metavar="NAME")
    return parser


def _install(arguments: Namespace) -> int:
    from swift.toolchains.install import STAGE_SECONDS, Installation, install
    from swift.toolchains.toolchain import check_name

    for name in [check_name(name) for name in arguments.names]:
        toolchain = install(
            Installation(
                name,
                arguments.variant,
                arguments.wheels.expanduser().absolute() if arguments.wheels else None,
                tuple(arguments.behind),
                arguments.installer,
                arguments.deadline or STAGE_SECONDS,
                say=lambda line: print(line, file=sys.stderr, flush=True),
            )
        )
        smoke = toolchain.record["smoke"]
        print(
            f"{name}: {len(toolchain.versions)} packages, {format_bytes(toolchain.record['disk_bytes'])}, installed in "
            f"{toolchain.record['seconds']:.0f} s; smoke test passed in {smoke['seconds']:.0f} s: "
            f"{json.dumps(smoke['result'])}"
        )
    return 0


def _list(arguments: Namespace) -> int:
    from swift.toolchains.check import list_toolchains

    rows = list_toolchains()
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return 0
    for row in rows:
        print(f"{row['name']:<14} {_state(row):<34} {row['for']}")
    return 0


def _state(row: dict[str, Any]) -> str:
    if row["version"] is None:
        return row["problem"] or f"not installed ({format_bytes(row['disk_bytes'])})"
    return f"{row['version']} {row['variant']}, {format_bytes(row['disk_bytes'])}"


def _doctor(arguments: Namespace) -> int:
    from swift.toolchains.check import examine_toolchain
    from swift.toolchains.toolchain import check_name, installed_toolchains

    names = [check_name(name) for name in arguments.names] or list(installed_toolchains())
    reports = {name: examine_toolchain(name) for name in names}
    if arguments.json:
        print(json.dumps(reports, indent=2))
    elif not reports:
        print("no toolchain is installed: swift toolchain ls")
    else:
        for name, report in reports.items():
            _show(name, report)
    return 1 if any(report["problems"] for report in reports.values()) else 0


def _show(name: str, report: dict[str, Any]) -> None:
    smoke = report["smoke"]
    if smoke:
        print(f"{name}: smoke test passed in {smoke['seconds']:.0f} s: {json.dumps(smoke['result'])}")
    for kind in ("problems", "notes"):
        for text in report[kind]:
            print(f"{name}: {kind[:-1]}: {text}")


def _remove(arguments: Namespace) -> int:
    from swift.toolchains.install import remove

    for name in arguments.names:
        print(f"{name}: {format_bytes(remove(name))} freed")
    return 0
