"""Sentences for what goes wrong between us and a hub."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from urllib.parse import urlsplit

from swift.core.errors import HubError, NotOnHub
from swift.hubs.types import Hub, Repo

__all__ = ["refused", "unreachable"]


def refused(
    hub: Hub, repo: Repo, status: int | None, stage: str, headers: Mapping[str, str] | None = None
) -> HubError:
    """The error for an HTTP status, in the words of a user: token, licence, no such thing, or busy."""
    code = (headers or {}).get("X-Error-Code", "")
    page = hub.page(repo)
    where = f"{hub.title} ({hub.endpoint})"
    if status == 403 or code == "GatedRepo":
        return HubError(
            f"{repo.name} may not be read: its owner asks for consent first",
            where=where,
            why=f"HTTP {status} at {stage}",
            fix=f"accept the licence on {page}, then set {hub.token_variable} to a token of that account",
        )
    if status == 401 and code != "RepoNotFound":
        return HubError(
            f"{repo.name} needs a login",
            where=where,
            why=f"HTTP 401 at {stage}: there is no token, or it is not valid",
            fix=f"set {hub.token_variable} to a token of {hub.endpoint} (or --hub_token)",
        )
    if code == "RevisionNotFound":
        return HubError(
            f"{repo.name} has no revision {repo.revision!r}",
            where=where,
            fix=f"{page} lists branches and tags",
        )
    if status in (401, 404):
        other = (
            "leave out --use_hf true" if hub.title == "Hugging Face" else "--use_hf true asks Hugging Face"
        )
        return NotOnHub(
            f"there is no {repo.kind} {repo.name!r}",
            where=where,
            why=f"HTTP {status} at {stage}; a private one looks the same without a token",
            fix=f"check the spelling on {hub.endpoint}, or {other}",
        )
    return HubError(
        f"{hub.title} refuses {repo.name}" if status else f"{hub.title} gave an answer that cannot be read",
        where=where,
        why=f"HTTP {status} at {stage}" if status else f"at {stage}",
        fix="try again later; what was downloaded is kept",
    )


def unreachable(hub: Hub, error: BaseException, stage: str, seconds: float) -> HubError:
    """The error for a hub that cannot be spoken to, by cause: name, address, certificate or silence."""
    host = urlsplit(hub.endpoint).netloc
    text = str(error)
    lowered = text.lower()
    if isinstance(error, TimeoutError) or "timeout" in type(error).__name__.lower():
        why = f"no answer within {seconds:g} seconds"
    elif any(
        part in lowered
        for part in ("name or service", "name resolution", "nodename", "getaddrinfo", "no address")
    ):
        why = f"the name {host} cannot be resolved: no network, no DNS, or a wrong address"
    elif "refused" in lowered:
        why = f"{host} refuses the connection"
    elif "certificate" in lowered or "ssl" in lowered:
        why = f"the certificate of {host} is not accepted ({text})"
    else:
        why = f"{type(error).__name__}: {text}" if text else type(error).__name__
    proxy = next(
        (name for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "HTTP_PROXY") if os.environ.get(name)),
        None,
    )
    if proxy:
        why += f" (through {proxy}={shlex.quote(os.environ[proxy])})"
    if hub.title == "ModelScope":
        other = "--use_hf true takes Hugging Face"
    else:
        other = "HF_ENDPOINT=URL names a mirror, --use_hf false takes ModelScope"
    return HubError(
        f"{hub.title} cannot be reached",
        where=f"{hub.endpoint} at {stage}",
        why=why,
        fix=f"check the network or HTTPS_PROXY; {other}; or give a local folder",
    )
