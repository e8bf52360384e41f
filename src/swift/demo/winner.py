"""The last part of the demo: the winner is merged, quantised, served, asked once, and the service stopped.

Every step is a public command; the demo only reads what they print and write.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from swift.config.bind import resolve
from swift.core.errors import SwiftError
from swift.core.process import die_with_parent
from swift.quantize.export import export

__all__ = ["ask_the_winner"]

READY_SECONDS = 120.0
ANSWER_SECONDS = 60.0
END_SECONDS = 60.0
POLL_SECONDS = 0.1


def ask_the_winner(folder: Path, adapter: Path, heldout: Path, *, say: Callable[[str], None] = print) -> int:
    """Merge ``adapter``, quantise with bitsandbytes, serve the result, and ask it for a held-out word.

    Returns 0 when the answer is right, 1 when it is not, or when a model written is not what it should be.
    """
    merged, small = folder / "winner", folder / "winner-nf4"
    for made in (merged, small):
        shutil.rmtree(made, ignore_errors=True)
    checked = ["--parity_dataset", str(heldout), "--device", "cpu"]
    merge = ["--adapters", str(adapter), "--output_dir", str(merged), *checked]
    if code := _export("merge-lora", merge, say):
        return code
    if find_spec("bitsandbytes") is None:
        say("\nbitsandbytes is not here (pip install 'swift-forge[bnb]'): the winner is served as it is")
        return _serve_and_ask(folder, merged, heldout, say)
    quantise = ["--model", str(merged), "--quant_method", "bnb", "--quant_bits", "4"]
    quantise += ["--output_dir", str(small), *checked]
    return _export("export", quantise, say) or _serve_and_ask(folder, small, heldout, say)


def _export(command: str, argv: list[str], say: Callable[[str], None]) -> int:
    """What the command does, with its report; 1 when the result is past a limit."""
    say(f"\n$ swift {command} {' '.join(argv)}")
    target, report = export(resolve(command, argv), say)
    report.show(target)
    return 0 if report.passed else 1


def _serve_and_ask(folder: Path, model: Path, heldout: Path, say: Callable[[str], None]) -> int:
    question, wanted = _held_out_row(heldout)
    ready, log = folder / "serving.json", folder / "serving.log"
    ready.unlink(missing_ok=True)
    argv = ["deploy", "--model", str(model), "--device", "cpu", "--port", "0", "--ready_file", str(ready)]
    say(f"\n$ swift {' '.join(argv)} &")
    with log.open("wb") as output:
        # It ends with the demo, also with one that is killed.
        server = subprocess.Popen(
            [sys.executable, "-m", "swift", *argv],
            stdout=output,
            stderr=output,
            preexec_fn=partial(die_with_parent, os.getpid()),
        )
    try:
        url = _wait_until_ready(server, ready, log)
        say(f"$ curl {url}/v1/chat/completions -d '{{\"messages\": [...]}}'    # {question}")
        answer = _ask(url, question)
    finally:
        _stop(server)
    is_right = answer == wanted
    say(
        f"   {question}  ->  {answer}  {'ok' if is_right else f'(wanted {wanted})'}    the service is stopped"
    )
    return 0 if is_right else 1


def _held_out_row(path: Path) -> tuple[str, str]:
    with path.open(encoding="utf-8") as file:
        question, answer = json.loads(file.readline())["messages"]
    return question["content"], answer["content"]


def _wait_until_ready(server: subprocess.Popen[bytes], ready: Path, log: Path) -> str:
    """The server's address. Raises SwiftError when it ends, or is not ready in time, with the end of its log."""
    deadline = time.monotonic() + READY_SECONDS
    while not ready.exists():
        if server.poll() is not None or time.monotonic() > deadline:
            what = f"ended with code {server.returncode}" if server.returncode is not None else "is not ready"
            tail = log.read_text(encoding="utf-8", errors="replace")[-2000:]
            raise SwiftError(f"the server {what}", where=str(log), why=tail.strip() or "it printed nothing")
        time.sleep(POLL_SECONDS)
    url: str = json.loads(ready.read_text(encoding="utf-8"))["url"]
    return url


def _ask(url: str, question: str) -> str:
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 8,
        "temperature": 0,
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={
            "Content-Type": "application/json",
            "Authorization": f"Bearer {os.environ.get('SWIFT_API_KEY', '')}",
        },
    )
    with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as response:
        text: str = json.load(response)["choices"][0]["message"]["content"]
    return text


def _stop(server: subprocess.Popen[bytes]) -> None:
    """SIGTERM, as swift deploy wants it; SIGKILL to what does not end in time."""
    server.terminate()
    try:
        server.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
