"""The last part of the demo: the winner is merged, quantised, served, asked once, and the service stopped.

Every step is a public command; the demo only reads what they print and write.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from swift.config.bind import resolve
from swift.evaluate.backends import own_server
from swift.evaluate.endpoint import Endpoint
from swift.quantize.export import export

__all__ = ["ask_the_winner"]

READY_SECONDS = 120.0
ANSWER_SECONDS = 60.0
END_SECONDS = 60.0


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
    for old in (ready, log):
        old.unlink(missing_ok=True)
    argv = ["deploy", "--model", str(model), "--device", "cpu", "--port", "0", "--ready_file", str(ready)]
    say(f"\n$ swift {' '.join(argv)} &")
    with own_server(argv, ready, log, ready_seconds=READY_SECONDS, grace_seconds=END_SECONDS) as url:
        say(f"$ curl {url}/v1/chat/completions -d '{{\"messages\": [...]}}'    # {question}")
        messages = [{"role": "user", "content": question}]
        endpoint = Endpoint(url, deadline_seconds=ANSWER_SECONDS, key_variable="SWIFT_API_KEY")
        (response,) = endpoint.chat([{"messages": messages, "max_tokens": 8, "temperature": 0}])
        answer = response["choices"][0]["message"]["content"]
    is_right = answer == wanted
    say(
        f"   {question}  ->  {answer}  {'ok' if is_right else f'(wanted {wanted})'}    the service is stopped"
    )
    return 0 if is_right else 1


def _held_out_row(path: Path) -> tuple[str, str]:
    with path.open(encoding="utf-8") as file:
        question, answer = json.loads(file.readline())["messages"]
    return question["content"], answer["content"]
