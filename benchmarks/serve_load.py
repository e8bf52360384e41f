#!/usr/bin/env python3
"""``swift deploy`` under load, beside ``transformers serve --continuous-batching``, each on one thread and one core.

    python benchmarks/serve_load.py [--rounds 3] [--ms_swift PYTHON] [--write]

The 6.8M-parameter Qwen3 of make_work.py answers questions of its held-out data, 64 tokens each, as streams, for 32
clients that ask again as soon as they have their answer. The servers take turns in one run (whoever waits is stopped),
three times for ours: the base model alone, one request in three for each of three LoRA adapters, and whole answers
instead of streams. Figures are tokens per CPU second of the server's process, which a busy machine disturbs little;
ratios are medians of those within a round. ``--ms_swift`` names the Python of an environment with ms-swift: its server
joins in twice, as it comes (one request at a time) and with batches of as many requests as there are clients.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from engine_throughput import write_adapters
from make_work import make_work
from measure import described_parser, markdown_table, median, one_thread, write_results

NEW_TOKENS = 64
START_SECONDS = 400.0


@dataclass
class Load:
    """What one run of requests took."""

    tokens: int
    seconds: float
    cpu_seconds: float
    first_token_seconds: list[float]

    @property
    def tokens_per_cpu_second(self) -> float:
        return self.tokens / self.cpu_seconds


class Server:
    """A server of its own process on one core; stopped while others are measured."""

    def __init__(
        self, command: Sequence[str], port: int, log: Path, path: str, *, our_source: bool = True
    ) -> None:
        command = list(command)
        if shutil.which("taskset"):
            command = ["taskset", "-c", str(max(os.sched_getaffinity(0))), *command]
        env = {**one_thread(), "PYTHONPATH": os.environ.get("PYTHONPATH", "") if our_source else ""}
        env.pop("PYTHONDONTWRITEBYTECODE", None)  # a package that pip installed has its bytecode, too
        self.port, self.log = port, log
        self.popen = subprocess.Popen(command, env=env, stdout=log.open("wb"), stderr=subprocess.STDOUT)
        self.process = psutil.Process(self.popen.pid)
        deadline = time.monotonic() + START_SECONDS
        while not self._answers(path):
            if self.popen.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(
                    f"error: no answer from {command}\n{log.read_text(errors='replace')[-2000:]}"
                )
            time.sleep(0.2)
        self.ready_cpu_seconds = self.cpu_seconds()
        self.process.suspend()

    def _answers(self, path: str) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def cpu_seconds(self) -> float:
        times = self.process.cpu_times()
        return times.user + times.system

    def first_answer(self, body: dict[str, Any]) -> float:
        """CPU seconds from launch to the first token answered: some load their model only then."""
        with self.measured():
            asyncio.run(ask(self.port, {**body, "max_tokens": 1}))
            return self.cpu_seconds()

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        self.process.resume()
        try:
            yield
        finally:
            self.process.suspend()

    def stop(self) -> None:
        self.process.resume()
        self.popen.terminate()
        try:
            self.popen.wait(30)
        except subprocess.TimeoutExpired:
            self.popen.kill()


async def ask(port: int, body: dict[str, Any]) -> tuple[int, float]:
    """One request over a connection of its own; (tokens, seconds to the first). As little work as possible here."""
    content = json.dumps(body).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
    started, first, reason = time.monotonic(), 0.0, b""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**22)
    try:
        writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        if not body["stream"]:
            answer = json.loads((await reader.read()).partition(b"\r\n\r\n")[2])
            return answer["usage"]["completion_tokens"], time.monotonic() - started
        async for line in reader:
            if not line.startswith(b"data: "):
                if line.startswith(b"HTTP/1.1 ") and b" 200 " not in line:
                    raise SystemExit(f"error: {line!r}")
                continue
            if (
                not first
                and b'"content"' in line
                and b'"content": ""' not in line
                and b'"content":""' not in line
            ):
                first = time.monotonic() - started
            if b'"length"' in line:
                reason = b"length"
    finally:
        writer.close()
    if reason != b"length":
        raise SystemExit(f"error: an answer of port {port} ended before its length: {line!r}")
    return body["max_tokens"], first


async def load(server: Server, bodies: Sequence[dict[str, Any]], clients: int) -> Load:
    """All requests, ``clients`` at a time."""
    waiting = iter(bodies)
    found: list[tuple[int, float]] = []

    async def client() -> None:
        for body in waiting:
            found.append(await ask(server.port, body))

    with server.measured():
        cpu, started = server.cpu_seconds(), time.monotonic()
        await asyncio.gather(*(client() for _ in range(clients)))
        seconds, cpu = time.monotonic() - started, server.cpu_seconds() - cpu
    return Load(sum(tokens for tokens, _ in found), seconds, cpu, [first for _, first in found])


def forget_the_end(model: Path) -> None:
    """Take the end token out of the model's files, so that every answer has its full length."""
    for name in ("config.json", "generation_config.json"):
        file = model / name
        if file.is_file():
            values = json.loads(file.read_text())
            file.write_text(json.dumps({**values, "eos_token_id": None}))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def p95(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]


def main() -> None:
    parser = described_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--requests", type=int, default=96, help="in each round")
    parser.add_argument(
        "--ms_swift", metavar="PYTHON", help="of an environment with ms-swift: measure its server, too"
    )
    parser.add_argument("--write", action="store_true", help="write results/serve_load.{md,json}")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are stopped, too
    with tempfile.TemporaryDirectory() as scratch:
        text, values = measure(Path(scratch), arguments)
    if arguments.write:
        write_results("serve_load", text, values)
    else:
        print(text)


def measure(scratch: Path, arguments: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    import torch

    from swift.config.sections.template import TemplateSection
    from swift.models.load import load_bundle

    model, data = make_work(scratch)
    bundle = load_bundle(model, TemplateSection(), dtype=torch.float32, device="cpu")
    adapters = write_adapters(bundle, scratch)
    forget_the_end(model)
    ours_port, peer_port = free_port(), free_port()
    python = [sys.executable, "-m"]
    ours = Server(
        [*python, "swift", "deploy", "--model", str(model), "--served_model_name", str(model), "--port",
         str(ours_port), "--adapters", *(f"{name}={folder}" for name, folder in adapters.items())],
        ours_port, scratch / "ours.log", "/health",
    )  # fmt: skip
    alone = Server(
        [*python, "swift", "deploy", "--model", str(model), "--served_model_name", str(model), "--port",
         str(free := free_port())],
        free, scratch / "alone.log", "/health",
    )  # fmt: skip
    peer = Server(
        [str(Path(sys.executable).with_name("transformers")), "serve", "--continuous-batching", "--attn-implementation",
         "sdpa", "--device", "cpu", "--port", str(peer_port), "--host", "127.0.0.1"],
        peer_port, scratch / "peer.log", "/health",
    )  # fmt: skip
    others = {}
    if arguments.ms_swift:
        for name, batch in (("ms-swift deploy", 1), ("ms-swift deploy, batches", max(arguments.clients))):
            port = free_port()
            others[name] = Server(
                [arguments.ms_swift, "-m", "swift.cli.deploy", "--model", str(model), "--model_type", "qwen3",
                 "--template", "qwen3", "--infer_backend", "transformers", "--torch_dtype", "float32", "--attn_impl",
                 "sdpa", "--max_batch_size", str(batch), "--served_model_name", str(model), "--port", str(port),
                 "--host", "127.0.0.1"],
                port, scratch / f"ms_swift_{batch}.log", "/health", our_source=False,
            )  # fmt: skip
    rows = [json.loads(line) for line in (data / "heldout.jsonl").read_text().splitlines()]
    questions = [[next(m for m in row["messages"] if m["role"] == "user")] for row in rows]

    def bodies(names: Sequence[str], stream: bool = True, **more: Any) -> list[dict[str, Any]]:
        fixed = {"max_tokens": NEW_TOKENS, "temperature": 0, "stream": stream, **more}
        pairs = zip(
            range(arguments.requests), itertools.cycle(names), itertools.cycle(questions), strict=False
        )
        return [{"model": name, "messages": messages, **fixed} for _, name, messages in pairs]

    base = [str(model)]
    works = {
        "transformers serve": (peer, bodies(base)),
        **{name: (server, bodies(base)) for name, server in others.items()},
        "swift deploy": (ours, bodies(base, ignore_eos=True)),
        "swift deploy, 3 adapters mixed": (ours, bodies(list(adapters), ignore_eos=True)),
        "swift deploy, whole answers": (ours, bodies(base, stream=False, ignore_eos=True)),
    }
    loads: dict[str, list[Load]] = {}
    servers = {"swift deploy": alone, "transformers serve": peer, **others}
    started = {
        name: (one.ready_cpu_seconds, one.first_answer(works[name][1][0])) for name, one in servers.items()
    }
    alone.stop()
    try:
        for number in range(arguments.rounds + 1):
            for clients in arguments.clients:
                for name, (server, requests) in works.items():
                    one = asyncio.run(load(server, requests if number else requests[:clients], clients))
                    if number:  # before, one request of each client warms up
                        loads.setdefault(f"{name}, {clients} clients", []).append(one)
    finally:
        for server in (ours, peer, *others.values()):
            server.stop()
    return report(loads, arguments.clients, started)


def report(
    loads: dict[str, list[Load]], clients: Sequence[int], started: dict[str, tuple[float, float]]
) -> tuple[str, dict[str, Any]]:
    table = [
        (
            name,
            f"{median([one.tokens_per_cpu_second for one in runs]):,.0f}",
            f"{median([one.tokens / one.seconds for one in runs]):,.0f}",
            f"{1000 * median([p95(one.first_token_seconds) for one in runs]):,.0f}",
        )
        for name, runs in loads.items()
    ]
    header = ("server", "tokens per CPU second", "tokens/s", "p95 of first token, ms (whole: of the answer)")
    ratios = {}
    for count in clients:
        for one, other in (
            ("swift deploy", "transformers serve"),
            ("swift deploy, 3 adapters mixed", "swift deploy"),
            ("swift deploy", "swift deploy, whole answers"),
            ("swift deploy", "ms-swift deploy"),
            ("swift deploy", "ms-swift deploy, batches"),
        ):
            if f"{other}, {count} clients" not in loads:
                continue
            pairs = zip(loads[f"{one}, {count} clients"], loads[f"{other}, {count} clients"], strict=True)
            ratios[f"{one} / {other}, {count} clients"] = median(
                [first.tokens_per_cpu_second / second.tokens_per_cpu_second for first, second in pairs]
            )
    text = "# Servers under load\n\n" + markdown_table(header, table)
    text += "\n" + markdown_table(
        ("ratio of tokens per CPU second", "median"), [(n, f"{v:.2f}") for n, v in ratios.items()]
    )
    text += "\n" + markdown_table(
        ("server", "CPU seconds until /health answers", "until the first token is answered"),
        [(name, f"{ready:.1f}", f"{answered:.1f}") for name, (ready, answered) in started.items()],
    )
    values = {
        "ratios": ratios,
        "ready_cpu_seconds": {name: ready for name, (ready, _) in started.items()},
        "first_answer_cpu_seconds": {name: answered for name, (_, answered) in started.items()},
        "table": [dict(zip(header, row, strict=True)) for row in table],
    }
    return text, values


if __name__ == "__main__":
    main()
