"""vLLM as an engine: its server runs as a child process in its toolchain, and is spoken to over a Unix socket.

The socket lies in a folder of this user alone: nobody else on the machine reaches the server, no port is looked for.
Prompts go in and answers come out as token ids; text never takes part. One thing differs from our own engine: with
``top_p``, ``top_k`` or ``min_p``, log-probabilities that vLLM tells are of the distribution those have cut.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swift.config.schema import Config, Resolved
from swift.config.sections.vllm import VllmSection
from swift.core.devices import describe_cpu
from swift.core.errors import ConfigError, SwiftError, TransientError
from swift.inference.engines.base import Delta, EngineBusy, EngineClosing, EngineStats, Request
from swift.inference.engines.vllm_server import (
    BASE,
    Launch,
    check_adapter,
    check_weights,
    server_arguments,
    server_variables,
)
from swift.inference.engines.vllm_wire import error_text, parse_metrics, read_choice, read_line, request_body
from swift.toolchains.child import Child
from swift.toolchains.toolchain import Toolchain, find_toolchain, toolchain_folder
from swift.tuners.peft_format import adapter_folder

if TYPE_CHECKING:
    import httpx

    from swift.inference.context import InferenceContext

__all__ = ["VllmEngine", "make"]

DEFAULT_ADAPTER = "model-adapter"
"""What the adapter that belongs to the model is called inside the server."""

DRAIN_SECONDS = 20.0
"""Between SIGTERM and SIGKILL when the server ends: it may have several processes to stop."""
POLL_SECONDS = 0.25
METRICS_SECONDS = 5.0
ANSWER_SECONDS = 600.0
"""Longest silence within one answer."""
CALL_SECONDS = 120.0
"""Longest time for anything that is no answer: loading an adapter, a look at the metrics."""


class VllmEngine:
    """An ``InferenceEngine`` (see ``base.py``).

    Args:
        launch: the model, and how the server is started.
        log: file for the server's output.
        default_adapter: folder of an adapter that belongs to the model: requests that name none get it.
        toolchain: where vLLM is; default: the installed one.
    """

    def __init__(
        self,
        launch: Launch,
        *,
        log: Path,
        default_adapter: Path | None = None,
        toolchain: Toolchain | None = None,
    ) -> None:
        self._adapters = {name: Path(folder) for name, folder in launch.adapters.items()}
        self._default = BASE
        if default_adapter is not None:
            self._default = DEFAULT_ADAPTER
            launch = replace(launch, adapters={**launch.adapters, DEFAULT_ADAPTER: default_adapter})
        launch.check()
        self.launch, self.log = launch, log
        self.toolchain = toolchain or find_toolchain("vllm")
        self._child: Child | None = None
        self._client: httpx.AsyncClient | None = None
        self._folder: Path | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._max_model_len = 0
        self._closing = False
        self._answers: set[_Answer] = set()
        self._counts = {"requests": 0, "aborted": 0, "prompt": 0, "generated": 0}
        self._metrics: dict[str, float] = {}

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and answer together; known once the engine has started."""
        return self._max_model_len

    async def start(self) -> None:
        """Start the server and wait until it answers.

        Raises SwiftError with the end of the server's log when it dies, or is not ready in ``vllm_start_seconds``.
        """
        import httpx

        self._folder = Path(tempfile.mkdtemp(prefix="swift-vllm-"))  # readable by this user alone
        socket = self._folder / "socket"
        arguments = server_arguments(self.launch, socket)
        variables = server_variables(self.launch, self.toolchain.variant)
        self._client = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(uds=str(socket), limits=httpx.Limits(max_connections=None)),
            base_url="http://vllm",
            timeout=httpx.Timeout(CALL_SECONDS, pool=None),
        )
        try:
            self._child = self.toolchain.spawn(
                arguments, log=self.log, variables=variables, grace_seconds=DRAIN_SECONDS
            )
            await self._wait_until_ready()
            cards = (await self._call("GET", "/v1/models"))["data"]
            self._max_model_len = next(card["max_model_len"] for card in cards if card["id"] == BASE)
        except BaseException:
            await self.close()
            raise
        self._watcher = asyncio.create_task(self._watch())

    async def _wait_until_ready(self) -> None:
        import httpx

        assert self._child is not None and self._client is not None
        deadline = time.monotonic() + self.launch.section.vllm_start_seconds
        while time.monotonic() < deadline:
            self._check_alive("did not start")
            with contextlib.suppress(httpx.TransportError):
                if (await self._client.get("/health")).status_code == 200:
                    return
            await asyncio.sleep(POLL_SECONDS)
        raise SwiftError(
            f"vLLM was not ready after {self.launch.section.vllm_start_seconds:g} s",
            where=str(self.log),
            why=self._child.log_tail(),
            fix="--vllm_start_seconds allows more; --vllm_enforce_eager true starts sooner",
        )

    @property
    def is_alive(self) -> bool:
        return self._child is not None and self._child.poll() is None

    def _check_alive(self, what: str) -> None:
        if not self.is_alive:
            raise TransientError(
                f"vLLM {what}", where=str(self.log), why=self._child.log_tail() if self._child else None
            )

    async def _watch(self) -> None:
        """Keep the figures of ``stats`` fresh."""
        import httpx

        assert self._client is not None
        while True:
            with contextlib.suppress(httpx.TransportError):
                self._metrics = parse_metrics((await self._client.get("/metrics")).text)
            await asyncio.sleep(METRICS_SECONDS)

    def submit(self, request: Request) -> AsyncIterator[Delta]:
        """See the protocol. A grammar that vLLM refuses raises ConfigError from the iterator."""
        if self._closing:
            raise EngineClosing("the engine is shutting down")
        if len(self._answers) >= self.launch.options.max_num_seqs + self.launch.options.max_waiting:
            raise EngineBusy(f"{len(self._answers)} requests are running and waiting")
        self._check_alive("has ended")
        if len(request.prompt) + 1 > self.max_model_len:
            raise ConfigError(
                f"the prompt has {len(request.prompt)} tokens, prompt and answer may have {self.max_model_len}"
            )
        if request.adapter is not None and request.adapter not in self._adapters:
            raise ConfigError(f"there is no adapter {request.adapter!r}")
        for asked in (request.sampling.logprobs, request.sampling.prompt_logprobs):
            if asked is not None and asked > self.launch.max_logprobs:
                raise ConfigError(f"at most {self.launch.max_logprobs} alternatives are told, not {asked}")
        self._counts["requests"] += 1
        self._counts["prompt"] += len(request.prompt)
        answer = _Answer(self._deltas(request), request.adapter)
        self._answers.add(answer)
        answer.task.add_done_callback(lambda _: self._forget(answer))
        return answer

    def _forget(self, answer: _Answer) -> None:
        self._answers.discard(answer)
        self._counts["generated"] += answer.num_tokens
        self._counts["aborted"] += answer.task.cancelled()

    async def _deltas(self, request: Request) -> AsyncIterator[Delta]:
        """What the server streams, as deltas. Raises ConfigError for what it refuses."""
        import httpx

        assert self._client is not None
        body = request_body(request, request.adapter or self._default, self.max_model_len)
        try:
            async with self._client.stream(
                "POST", "/v1/completions", json=body, timeout=ANSWER_SECONDS
            ) as answer:
                if answer.status_code >= 400:
                    text = (await answer.aread()).decode(errors="replace")
                    if answer.status_code < 500:
                        raise ConfigError(f"vLLM refuses the request: {error_text(text)}")
                    yield Delta(finish_reason="error", error=f"vLLM: {error_text(text)}")
                elif not body["stream"]:
                    yield read_choice(json.loads(await answer.aread())["choices"][0], request)
                else:
                    async for line in answer.aiter_lines():
                        delta = read_line(line, request)
                        if delta is not None:
                            yield delta
        except httpx.HTTPError as error:
            dead = self._child is None or self._child.poll() is not None
            cause = f"vLLM has ended; its log: {self.log}" if dead else f"vLLM did not answer: {error!r}"
            yield Delta(finish_reason="error", error=cause)

    async def pool(
        self, prompts: Sequence[Sequence[int]], *, adapter: str | None = None
    ) -> list[list[float]]:
        """Refused: this engine runs vLLM for models that write text."""
        raise ConfigError(
            "vLLM is used here for models that write text",
            where="--infer_backend",
            fix="--infer_backend transformers for embeddings, scores and ranking",
        )

    async def load_adapter(self, name: str, folder: Path) -> None:
        """See the protocol. The rank must not be above the one the server was started with."""
        if name in self._adapters or name in (BASE, DEFAULT_ADAPTER):
            raise ConfigError(
                f"there is an adapter {name!r} already", fix="unload it, or choose another name"
            )
        if not self.launch.takes_adapters:
            raise ConfigError("vLLM was started without adapters", fix="--vllm_enable_lora true")
        check_adapter(folder, self.launch.max_lora_rank)
        await self._call("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        self._adapters[name] = folder

    async def unload_adapter(self, name: str) -> None:
        """See the protocol."""
        if name not in self._adapters:
            raise ConfigError(f"there is no adapter {name!r}")
        folder = self._adapters.pop(name)  # from here on no new request may name it
        try:
            tasks = [answer.task for answer in self._answers if answer.adapter == name]
            if tasks:
                await asyncio.wait(tasks)
            await self._call("POST", "/v1/unload_lora_adapter", {"lora_name": name})
        except BaseException:
            self._adapters[name] = folder
            raise

    def adapters(self) -> dict[str, Path]:
        """The loaded adapters."""
        return dict(self._adapters)

    def stats(self) -> EngineStats:
        """Requests as of now; the cache as of vLLM's last metrics."""
        at_once = self.launch.options.max_num_seqs
        capacity = int(self._metrics.get("cache_tokens", 0))
        return EngineStats(
            running=min(len(self._answers), at_once),
            waiting=max(0, len(self._answers) - at_once),
            max_running=at_once,
            cache_tokens_used=int(capacity * self._metrics.get("cache_usage", 0.0)),
            cache_tokens=capacity,
            requests_total=self._counts["requests"],
            aborted_total=self._counts["aborted"],
            prompt_tokens_total=self._counts["prompt"],
            generated_tokens_total=self._counts["generated"] + sum(a.num_tokens for a in self._answers),
        )

    async def close(self, *, drain_seconds: float = 0.0) -> None:
        """See the protocol. A second call does nothing."""
        self._closing = True
        tasks = [answer.task for answer in self._answers]
        if tasks and drain_seconds > 0:
            await asyncio.wait(tasks, timeout=drain_seconds)
        for task in [*tasks, *([self._watcher] if self._watcher else [])]:
            task.cancel()
        await asyncio.gather(*tasks, *([self._watcher] if self._watcher else []), return_exceptions=True)
        if self._client is not None:
            await self._client.aclose()
        if self._child is not None:
            await asyncio.to_thread(self._child.stop)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._watcher = self._client = self._child = self._folder = None

    async def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """One short exchange; its JSON, or its text. Raises SwiftError with what the server said."""
        import httpx

        assert self._client is not None
        try:
            answer = await self._client.request(method, path, json=body)
        except httpx.HTTPError as error:
            self._check_alive("has ended")
            raise TransientError(f"vLLM did not answer {path}: {error!r}", where=str(self.log)) from None
        if answer.status_code >= 400:
            raise SwiftError(f"vLLM refuses {path}: {error_text(answer.text)}", where=str(self.log))
        return answer.json() if "json" in answer.headers.get("content-type", "") else answer.text


class _Answer:
    """The deltas of one request, fetched from its submission on, whoever reads them."""

    def __init__(self, deltas: AsyncIterator[Delta], adapter: str | None) -> None:
        self.adapter = adapter
        self.num_tokens = 0
        self._queue: asyncio.Queue[Delta | Exception | None] = asyncio.Queue()
        self.task = asyncio.create_task(self._fetch(deltas))

    async def _fetch(self, deltas: AsyncIterator[Delta]) -> None:
        last: Delta | Exception | None = Delta(finish_reason="abort")
        try:
            async for delta in deltas:
                self.num_tokens += len(delta.tokens)
                self._queue.put_nowait(delta)
            last = None
        except Exception as error:  # the reader gets it
            last = error
        finally:
            self._queue.put_nowait(last)
            self._queue.put_nowait(None)

    def __aiter__(self) -> _Answer:
        return self

    async def __anext__(self) -> Delta:
        item = await self._queue.get()
        if isinstance(item, Exception):
            self._queue.put_nowait(None)
            raise item
        if item is None:
            self._queue.put_nowait(None)
            raise StopAsyncIteration
        return item

    async def aclose(self) -> None:
        """Cancel the request, if it still runs."""
        self.task.cancel()
        await asyncio.wait([self.task])


def make(context: InferenceContext, resolved: Resolved) -> VllmEngine:
    """For the table of engines: the model of a context.

    Raises ConfigError for what vLLM cannot do with it.
    """
    if context.quantization.is_active or context.unpack:
        raise ConfigError(
            "vLLM does not quantise while it loads as transformers does",
            where="--quant_method" if context.quantization.is_active else str(context.adapter),
            fix="swift export writes a quantised folder that vLLM loads; or --infer_backend transformers",
        )
    toolchain = find_toolchain("vllm")
    if toolchain.variant == "cpu":
        check_weights(context.model, describe_cpu()["features"])
    config = resolved.config
    kind, _, index = config.model.device.partition(":")
    if kind not in ("auto", toolchain.variant):
        raise ConfigError(
            f"the toolchain is built for {toolchain.variant}",
            where=f"--device {config.model.device}",
            fix=f"swift toolchain rm vllm && swift toolchain install vllm --variant {kind}",
        )
    variables = {"CUDA_VISIBLE_DEVICES": index} if index else {}
    if config.training.num_threads is not None:
        variables["OMP_NUM_THREADS"] = str(config.training.num_threads)
    dtype = config.model.torch_dtype
    launch = Launch(
        context.model,
        config.engine,
        _with_adapters(config),
        max_logprobs=config.serving.max_logprobs,
        # Here as everywhere in swift: float32 on a CPU unless something else is asked for.
        dtype="float32" if dtype == "auto" and toolchain.variant == "cpu" else dtype,
        trust_remote_code=config.model.trust_remote_code,
        variables=variables,
    )
    log = toolchain_folder("vllm") / "logs" / f"server-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    return VllmEngine(launch, log=log, default_adapter=context.adapter, toolchain=toolchain)


def _with_adapters(config: Config) -> VllmSection:
    """The options, ready for adapters that a server puts on once the engine has started."""
    section = config.vllm.model_copy()
    words = config.model.adapters
    if section.vllm_enable_lora is None and (words or config.serving.runtime_adapters):
        section.vllm_enable_lora = True
    if section.vllm_max_lora_rank is None and words:
        paths = [word if Path(word).exists() else word.partition("=")[2] for word in words]  # also NAME=PATH
        section.vllm_max_lora_rank = max(16, *(check_adapter(adapter_folder(path)) for path in paths))
    return section
