"""The HTTP face of the experiment service. Everything but ``/health`` needs the token as a bearer token.

The interactive description is at ``/docs``, the machine-readable one at ``/openapi.json``.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Query, Request
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from pydantic import BaseModel, Field

from swift.core.errors import SwiftError, UsageError
from swift.experiments.engine import Engine
from swift.experiments.lookup import select_jobs
from swift.experiments.monitor import metrics_text
from swift.experiments.progress import OUTPUT_LOG, tail_start
from swift.experiments.store import StateConflict
from swift.experiments.types import ACTIVE, FINISHED, Job, JobSpec, State

__all__ = ["create_app"]

POLL_SECONDS = 0.3
_FOLLOW_BYTES = 65_536


class Submission(BaseModel):
    """Jobs to queue together, all or none. ``specs`` are immutable snapshots (``JobSpec.to_dict()``)."""

    name: str = Field(description="Name of the group; -2, -3... is added when it is taken.")
    source: str = Field("", description="What was submitted, as text, for the record.")
    specs: list[dict[str, Any]] = Field(default_factory=list)
    sweep: dict[str, str] | None = Field(
        None, description="text, shown and cwd of a file whose trials depend on results."
    )
    environment: dict[str, str] | None = Field(
        None, description="Variables of the submitting shell; kept private. None: the service's own."
    )


class Words(BaseModel):
    """Which jobs: ids, names, names of groups."""

    jobs: list[str]
    grace_seconds: float | None = Field(
        None, description="Time to save a checkpoint before SIGKILL; 0: kill at once."
    )


class Clone(BaseModel):
    """A job to run once more."""

    job: str
    name: str | None = Field(None, description="Name of the copy; default: NAME-2.")


class Priority(BaseModel):
    """Larger goes first."""

    jobs: list[str]
    priority: int


def create_app(engine: Engine, token: str, started: float | None = None) -> FastAPI:
    """The application around a running engine.

    Args:
        token: what clients must present; compared in constant time.
        started: wall clock, for ``/metrics``.
    """
    from importlib.metadata import version

    app = FastAPI(
        title="swift experiment service",
        version=version("swift-forge"),
        description="Queue, watch and control jobs. The token is in SWIFT_HOME/token (Authorization: Bearer TOKEN).",
    )

    def authorise(request: Request) -> None:
        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            raise HTTPException(401, "the token is missing or wrong (SWIFT_HOME/token)")

    @app.exception_handler(SwiftError)
    async def explain(request: Request, error: SwiftError) -> JSONResponse:
        code = 409 if isinstance(error, StateConflict) else 422 if isinstance(error, UsageError) else 500
        fields = ("message", "where", "why", "fix", "exit_code")
        return JSONResponse({name: getattr(error, name) for name in fields}, code)

    @app.get("/health", tags=["service"])
    def health() -> dict[str, Any]:
        """That the service lives, and which process it is."""
        return {"status": "ok", "pid": os.getpid(), "version": app.version}

    for routes in (_reading(engine), _changing(engine), _watching(engine, started or time.time())):
        app.include_router(routes, dependencies=[Depends(authorise)])
    return app


def _reading(engine: Engine) -> APIRouter:
    """What there is to know about jobs."""
    routes, store = APIRouter(tags=["jobs"]), engine.store

    @routes.get("/jobs")
    def jobs(
        state: Annotated[list[State] | None, Query()] = None,
        group: str | None = None,
        limit: Annotated[int | None, Query(ge=1, description="The newest so many.")] = None,
    ) -> dict[str, Any]:
        """Jobs in the order of submission."""
        found = store.jobs(states=state, group=group, limit=limit)
        return {"jobs": [job.to_dict() for job in found]}

    @routes.get("/jobs/{word}")
    def job(word: str) -> dict[str, Any]:
        """One job with its snapshot, by id or name."""
        found = store.job(word)
        return {**found.to_dict(), "spec": found.spec.to_dict(), "overrides": found.overrides}

    @routes.get("/jobs/{word}/why")
    def why(word: str) -> dict[str, Any]:
        """Why the job is where it is: its reason, what it needs, and every decision about it so far."""
        job = store.job(word)
        events = [event.to_dict() for event in store.events(job=job.id)]
        return {
            **job.to_dict(),
            "needs": asdict(job.spec.needs),
            "estimate": job.spec.estimate,
            "events": events,
        }

    @routes.get("/jobs/{word}/logs")
    def logs(word: str, tail: Annotated[int, Query(ge=0)] = 200, follow: bool = False) -> StreamingResponse:
        """The job's output as text; with ``follow`` until it ends."""
        found = store.job(word)
        path = engine.home.job_dir(found.id) / OUTPUT_LOG
        return StreamingResponse(
            _log(path, tail, follow, lambda: store.job(found.id).state in FINISHED), media_type="text/plain"
        )

    return routes


def _changing(engine: Engine) -> APIRouter:
    """What can be asked of jobs."""
    routes, store = APIRouter(tags=["jobs"]), engine.store

    def submitted(group: str) -> dict[str, Any]:
        return {"group": group, "jobs": [job.to_dict() for job in store.jobs(group=group)]}

    def each(words: list[str], act: Callable[[Job], Job]) -> dict[str, Any]:
        return _each(engine, select_jobs(store, words), act)

    @routes.post("/submit", status_code=201)
    def submit(body: Submission) -> dict[str, Any]:
        """Queue jobs. The answer comes after they are safely recorded."""
        specs = [_spec(values) for values in body.specs]
        return submitted(engine.submit(body.name, body.source, specs, body.sweep, body.environment).name)

    @routes.post("/stop")
    def stop(body: Words) -> dict[str, Any]:
        """Cancel jobs; running ones save a checkpoint first. A group's sweep brings no more trials."""
        for word in body.jobs:
            engine.sweeps.stop(word)
        return each(body.jobs, lambda job: engine.stop(job.id, grace_seconds=body.grace_seconds))

    @routes.post("/pause")
    def pause(body: Words) -> dict[str, Any]:
        """Save a checkpoint and set aside until resumed."""
        return each(body.jobs, lambda job: engine.pause(job.id, grace_seconds=body.grace_seconds))

    @routes.post("/resume")
    def resume(body: Words) -> dict[str, Any]:
        """Back to the queue, from the last checkpoint."""
        return each(body.jobs, lambda job: engine.resume(job.id))

    @routes.post("/retry")
    def retry(body: Words) -> dict[str, Any]:
        """Queue failed or cancelled jobs again."""
        return each(body.jobs, lambda job: engine.retry(job.id))

    @routes.post("/priority")
    def priority(body: Priority) -> dict[str, Any]:
        """Change the priority of jobs; one that waits may then preempt jobs of a lower one."""
        return each(body.jobs, lambda job: engine.set_priority(job.id, body.priority))

    @routes.post("/clone", status_code=201)
    def clone(body: Clone) -> dict[str, Any]:
        """The same job once more, under another name."""
        return submitted(engine.clone(store.job(body.job).id, body.name).name)

    return routes


def _watching(engine: Engine, started: float) -> APIRouter:
    """The service and the machine."""
    routes, store = APIRouter(tags=["service"]), engine.store

    @routes.get("/events")
    async def events(
        request: Request,
        after: Annotated[int, Query(description="Number of the last event that is known already.")] = 0,
        follow: bool = True,
    ) -> StreamingResponse:
        """Server-sent events from number ``after`` on; ``id`` is the number to go on from after a break."""
        known = request.headers.get("last-event-id", "")
        stream = _events(engine, int(known) if known.isdigit() else after, follow)
        return StreamingResponse(stream, media_type="text/event-stream")

    @routes.get("/inventory")
    def inventory() -> dict[str, Any]:
        """Devices, cores and memory, as last looked at."""
        return asdict(engine.machine())

    @routes.get("/samples")
    def samples(since: float = 0.0, subject: str | None = None) -> dict[str, Any]:
        """Measurements of devices and host."""
        return {"samples": store.samples(since, subject)}

    @routes.get("/metrics", response_class=PlainTextResponse)
    def metrics() -> str:
        """For Prometheus."""
        return metrics_text(store.counts(), store.samples(time.time() - 60), started)

    return routes


async def _events(engine: Engine, at: int, follow: bool) -> AsyncIterator[str]:
    store = engine.store
    while True:
        for event in await asyncio.to_thread(store.events, at, None, 500):
            at = event.seq
            data = json.dumps(event.to_dict(), ensure_ascii=False)
            yield f"id: {event.seq}\nevent: {event.kind}\ndata: {data}\n\n"
        if store.last_event() > at:
            continue
        if not follow:
            return
        await asyncio.sleep(POLL_SECONDS)


def _spec(values: dict[str, Any]) -> JobSpec:
    try:
        return JobSpec.from_dict(values)
    except (KeyError, TypeError) as error:
        raise UsageError("not a job's snapshot", where="specs", why=str(error)) from None


def _each(engine: Engine, jobs: list[Job], act: Callable[[Job], Job]) -> dict[str, Any]:
    """Act on every job. One job's refusal is an error, several jobs' refusals are listed beside what was done.

    Those that wait or have ended are changed in one transaction. What has a process comes after it: a wish must be
    on the disk before the process is told.
    """
    done: dict[str, Job] = {}
    refused: dict[str, dict[str, str]] = {}

    def try_one(job: Job) -> None:
        try:
            done[job.id] = act(job)
        except UsageError as error:
            if len(jobs) == 1:
                raise
            refused[job.id] = {"id": job.id, "name": job.spec.name, "message": error.message}

    with engine.store.batch():
        now = {job.id: job.state for job in engine.store.jobs(ids=[job.id for job in jobs])}
        for job in jobs:
            if now[job.id] not in ACTIVE:
                try_one(job)
    engine.wake()  # woken within the transaction, it may have looked too early
    for job in jobs:
        if now[job.id] in ACTIVE:
            try_one(job)
    return {
        "jobs": [done[job.id].to_dict() for job in jobs if job.id in done],
        "refused": list(refused.values()),
    }


async def _log(path: Path, tail: int, follow: bool, ended: Callable[[], bool]) -> AsyncIterator[bytes]:
    position = tail_start(path, tail)
    while True:
        over = await asyncio.to_thread(ended)
        while path.exists():
            with path.open("rb") as file:
                file.seek(position)
                block = file.read(_FOLLOW_BYTES)
            if not block:
                break
            position += len(block)
            yield block
        if over or not follow:
            return
        await asyncio.sleep(POLL_SECONDS)
