"""From options to a running server."""

from __future__ import annotations

import asyncio
import gc
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from swift.config.schema import Resolved
from swift.core.errors import ConfigError, ModelError
from swift.inference.context import InferenceContext
from swift.inference.engines.base import InferenceEngine
from swift.inference.engines.table import make_engine
from swift.inference.server.limits import Defaults, Limits
from swift.inference.server.names import Served, context_of_adapter, find_served
from swift.inference.server.service import ServedModel, Service
from swift.models.facts import ModelFacts, read_json_object
from swift.models.load import load_tokenizer
from swift.models.template import Template

__all__ = ["deploy", "is_local", "make_service", "split_keys"]


def deploy(resolved: Resolved, say: Callable[[str], None]) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Args:
        say: hears one line when the server answers, and warnings before.

    Raises SwiftError when model, adapters, address or certificate cannot be used; the address is bound first.
    """
    from swift.inference.server.app import create_app
    from swift.inference.server.serve import Listening, bind, serve

    section = resolved.config.serving
    keys = split_keys(section.api_key or os.environ.get("SWIFT_API_KEY"))
    if (section.ssl_keyfile is None) != (section.ssl_certfile is None):
        raise ConfigError(
            "HTTPS needs a certificate and its key", where="--ssl_certfile", fix="--ssl_keyfile FILE, too"
        )
    if not is_local(section.host) and not keys:
        say(f"warning: {section.host} can be reached from elsewhere, and no --api_key is asked for")
    listening = Listening(
        host=section.host,
        port=section.port,
        ssl_keyfile=section.ssl_keyfile,
        ssl_certfile=section.ssl_certfile,
        drain_seconds=section.drain_seconds,
        log_interval_seconds=section.throughput_interval,
        ready_file=Path(section.ready_file).expanduser() if section.ready_file else None,
    )
    _check_ready_file(listening.ready_file)
    served = find_served(resolved)
    for context in (served.context, *served.adapters.values()):
        note = context.note()
        if note:
            say(note)
    listener = bind(listening)
    try:
        if (
            resolved.config.training.num_threads is not None
            and resolved.config.engine.infer_backend != "vllm"
        ):
            import torch

            torch.set_num_threads(resolved.config.training.num_threads)
        service = make_service(served, make_engine(served.context, resolved), resolved)
        app = create_app(service, keys=keys, verbose=section.verbose)

        async def start() -> None:
            await service.engine.start()
            for name, context in served.adapters.items():
                assert context.adapter is not None
                await service.engine.load_adapter(name, context.adapter)
            gc.freeze()  # what is loaded by now stays and need not be searched for garbage
            gc.enable()

        def ready(url: str) -> None:
            engine = resolved.config.engine
            say(
                f"serving {', '.join(service.models)} at {url} "
                f"({service.engine.max_model_len} tokens of prompt and answer, {engine.max_num_seqs} requests at once, "
                f"{engine.max_waiting} waiting; {'with' if keys else 'without'} API key)"
            )

        asyncio.run(serve(app, service, listening, listener, start, ready))
    finally:
        listener.close()


def _check_ready_file(file: Path | None) -> None:
    """Raise ConfigError where it could not be written once the model is loaded."""
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise ConfigError(
            "the file cannot be written", where=f"--ready_file {file}", why=error.strerror
        ) from error


def make_service(served: Served, engine: InferenceEngine, resolved: Resolved) -> Service:
    """The service of some models; the engine is not started."""
    section = resolved.config.serving
    trust = resolved.config.model.trust_remote_code
    tokenizer = load_tokenizer(served.context.model, trust_remote_code=trust)
    base = _model(served.name, served.context, tokenizer)
    models = {served.name: base}
    for name, context in served.adapters.items():
        models[name] = replace(_model(name, context, tokenizer), adapter=name, parent=served.name)

    def read_adapter(name: str, folder: Path) -> ServedModel:
        context = context_of_adapter(resolved, str(folder))
        if context.model.resolve() != served.context.model.resolve():
            raise ModelError(
                "the adapter is of another base model", where=str(folder), why=str(context.model)
            )
        return replace(_model(name, context, tokenizer), adapter=name, parent=served.name)

    allowed = section.runtime_adapters
    if allowed is None:
        allowed = is_local(section.host) and served.context.writes_text
    reasoning = section.reasoning_parser
    queue = resolved.config.engine.max_num_seqs + resolved.config.engine.max_waiting
    return Service(
        engine,
        models,
        limits=Limits(
            body_bytes=int(section.max_body_mib * 2**20),
            prompt_tokens=section.max_prompt_tokens,
            answer_tokens=section.max_answer_tokens,
            choices=min(section.max_choices, queue),  # more would wait for ever: it is all or none
            logprobs=section.max_logprobs,
            request_seconds=section.request_timeout_seconds,
            open_requests=section.max_open_requests,
        ),
        defaults=_defaults(resolved, served.context.model),
        owned_by=section.owned_by,
        tool_parser=section.tool_parser,
        reasoning=None if reasoning is None else reasoning == "think",
        read_adapter=read_adapter if allowed else None,
        vocab_size=ModelFacts.read(served.context.model).vocab_size,
    )


def _model(name: str, context: InferenceContext, tokenizer: Any) -> ServedModel:
    task = context.task if not context.writes_text and context.task != "causal_lm" else "causal_lm"
    if context.head is not None and task == "causal_lm":
        task = "seq_cls"
    template = Template(tokenizer, context.template, context.pretraining)
    return ServedModel(name, template, context.adapter or context.model, task=task)


def _defaults(resolved: Resolved, model: Path) -> Defaults:
    """What requests get that do not say: options that were set, else generation_config.json, else OpenAI's."""
    options = resolved.config.generation
    file = model / "generation_config.json"
    stored = read_json_object(file) if file.is_file() else {}
    if stored.get("do_sample") is False:  # its temperature has no effect in transformers either
        stored = {"repetition_penalty": stored.get("repetition_penalty")}

    def value(name: str, neutral: float) -> Any:
        if resolved.is_explicit(name):
            return getattr(options, name)
        found = stored.get(name)
        return neutral if found is None else found

    return Defaults(
        temperature=value("temperature", 1.0),
        top_p=value("top_p", 1.0),
        top_k=int(value("top_k", 0)),
        repetition_penalty=value("repetition_penalty", 1.0),
        max_tokens=options.max_new_tokens if resolved.is_explicit("max_new_tokens") else None,
        stop=tuple(options.stop_words),
    )


def is_local(host: str) -> bool:
    """Whether only this machine can reach a server there."""
    return host in ("localhost", "::1") or host.startswith("127.")


def split_keys(text: str | None) -> list[str]:
    """API keys, separated by commas."""
    return [key.strip() for key in (text or "").split(",") if key.strip()]
