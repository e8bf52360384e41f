"""Runs inside a toolchain's environment, as a file: ``python inside.py SCRIPT REQUEST.json RESULT.json``.

Standard library only, and no import of swift: the environment does not have it. SCRIPT is a Python file, or the name
of a module of the environment, with ``main(payload: dict) -> dict``. What it prints is progress. It can import files
beside it, unless the environment has a module of that name.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import traceback
from typing import Any


def load(script: str) -> Any:
    """The module called ``script``, or made from the file of that path."""
    if not script.endswith(".py"):
        return importlib.import_module(script)
    sys.path.append(os.path.dirname(os.path.abspath(script)))  # noqa: PTH100, PTH120
    spec = importlib.util.spec_from_file_location("swift_toolchain_script", script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run(script: str, request: str, result: str) -> int:
    """Call ``main`` and write ``{"value": ...}`` or ``{"error": ...}`` in one step."""
    try:
        with open(request, encoding="utf-8") as file:  # noqa: PTH123
            payload = json.load(file)
        answer = json.dumps({"value": load(script).main(payload)})
        code = 0
    except Exception as error:
        lines = traceback.format_exception(error)
        answer = json.dumps(
            {"error": {"type": type(error).__name__, "message": str(error), "traceback": lines}}
        )
        code = 1
    with open(result + ".partial", "w", encoding="utf-8") as file:  # noqa: PTH123
        file.write(answer)
    os.replace(result + ".partial", result)  # noqa: PTH105
    return code


if __name__ == "__main__":
    sys.exit(run(*sys.argv[1:]))
