"""The two hubs through their own client libraries, which know addresses, tokens and pagination.

Bytes are not fetched by the libraries: see docs/decisions on hubs. Environment variables are those of the libraries
and are read at each call.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

from swift.core.errors import HubError
from swift.hubs.refusals import refused, unreachable
from swift.hubs.types import Hub, HubFile, Listing, Repo

__all__ = ["HuggingFace", "ModelScope", "find_hub", "is_offline", "wants_hf"]

_TRUE = {"1", "true", "yes", "on"}


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").strip().lower() in _TRUE


def is_offline() -> bool:
    """Whether the environment forbids the network (``HF_HUB_OFFLINE`` or ``TRANSFORMERS_OFFLINE``), for both hubs."""
    return _is_on("HF_HUB_OFFLINE") or _is_on("TRANSFORMERS_OFFLINE")


def wants_hf(use_hf: bool | None) -> bool:
    """Whether Hugging Face is meant: as the option says, else as ``USE_HF`` of the environment says."""
    return _is_on("USE_HF") if use_hf is None else use_hf


def find_hub(use_hf: bool | None, token: str | None = None) -> Hub:
    """ModelScope, or Hugging Face where it is meant."""
    return HuggingFace(token) if wants_hf(use_hf) else ModelScope(token)


def _folder(variable: str, default: Path) -> Path:
    return Path(os.path.expandvars(os.environ.get(variable) or default)).expanduser()


class HuggingFace:
    """huggingface.co or ``HF_ENDPOINT``."""

    title = "Hugging Face"
    cache_variable = "HF_HUB_CACHE"
    token_variable = "HF_TOKEN"
    default_revision = "main"

    def __init__(self, token: str | None = None) -> None:
        self.endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
        home = _folder("HF_HOME", _folder("XDG_CACHE_HOME", Path("~/.cache")) / "huggingface")
        self.cache = _folder("HF_HUB_CACHE", _folder("HUGGINGFACE_HUB_CACHE", home / "hub"))
        self._token = token or os.environ.get("HF_TOKEN") or None

    def load_client(self) -> None:
        importlib.import_module("huggingface_hub.hf_api")

    def storage(self, repo: Repo) -> Path:
        return self.cache / f"{repo.kind}s--{repo.name.replace('/', '--')}"

    def older_folders(self, repo: Repo) -> list[Path]:
        return []

    def page(self, repo: Repo) -> str:
        return f"{self.endpoint}/{'datasets/' if repo.kind == 'dataset' else ''}{repo.name}"

    def listing(self, repo: Repo) -> Listing:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
        from huggingface_hub.hf_api import RepoFile

        stage = "the list of files"
        # A token that was stored by `hf auth login` is found by the library: None asks for it.
        api = HfApi(endpoint=self.endpoint, token=self._token)
        try:
            info = api.repo_info(repo.name, repo_type=repo.kind, revision=repo.revision)
            tree = list(api.list_repo_tree(repo.name, repo_type=repo.kind, revision=info.sha, recursive=True))
        except HfHubHTTPError as error:
            raise refused(self, repo, error.response.status_code, stage, error.response.headers) from error
        except HFValidationError as error:
            raise HubError("not a name on a hub", where=repo.name, why=str(error)) from error
        except (OSError, ValueError) as error:
            raise unreachable(self, error, stage, 10) from error
        except Exception as error:
            if type(error).__module__.partition(".")[0] not in ("httpx", "httpx2", "httpcore", "httpcore2"):
                raise
            raise unreachable(self, error, stage, 10) from error
        files = [
            HubFile(entry.path, entry.lfs.size, sha256=entry.lfs.sha256)
            if entry.lfs
            else HubFile(entry.path, entry.size, git_sha1=entry.blob_id)
            for entry in tree
            if isinstance(entry, RepoFile)
        ]
        return Listing(str(info.sha), tuple(files))

    def request(self, repo: Repo, commit: str, path: str) -> tuple[str, dict[str, str]]:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        url = hf_hub_url(repo.name, path, repo_type=repo.kind, revision=commit, endpoint=self.endpoint)
        return url, build_hf_headers(token=self._token, library_name="swift-forge")


class ModelScope:
    """modelscope.cn or ``MODELSCOPE_ENDPOINT``."""

    title = "ModelScope"
    cache_variable = "MODELSCOPE_CACHE"
    token_variable = "MODELSCOPE_API_TOKEN"
    default_revision = "master"

    def __init__(self, token: str | None = None) -> None:
        domain = (
            os.environ.get("MODELSCOPE_ENDPOINT")
            or os.environ.get("MODELSCOPE_DOMAIN")
            or "https://modelscope.cn"
        )
        self.endpoint = (domain if "://" in domain else f"https://{domain}").rstrip("/")
        self.cache = _folder("MODELSCOPE_CACHE", Path("~/.cache/modelscope"))
        self._token = token
        self._legacy: Any = None

    def storage(self, repo: Repo) -> Path:
        return self.cache / f"{repo.kind}s" / repo.name.replace("/", "--")

    def older_folders(self, repo: Repo) -> list[Path]:
        # Up to 1.37: the owner as a folder of its own, and dots of the name written as ___.
        owner, _, name = repo.name.partition("/")
        inside = Path(f"{repo.kind}s") / owner / name.replace(".", "___")
        return [self.cache / inside, self.cache / "hub" / inside]

    def page(self, repo: Repo) -> str:
        return f"{self.endpoint}/{repo.kind}s/{repo.name}"

    def load_client(self) -> None:
        self._client()

    def _client(self) -> Any:
        if self._legacy is not None:
            return self._legacy
        try:
            from modelscope_hub import HubApi, HubConfig
        except ImportError as error:
            raise HubError(
                "the client library of ModelScope is not installed",
                where=self.endpoint,
                fix="pip install 'swift-forge[modelscope]'; or take Hugging Face: --use_hf true",
            ) from error
        self._legacy = HubApi(HubConfig(endpoint=self.endpoint, token=self._token)).legacy
        return self._legacy

    def listing(self, repo: Repo) -> Listing:
        client = self._client()
        from modelscope_hub.errors import APIError, NetworkError
        from modelscope_hub.errors import HubError as LibraryError

        stage = "the list of files"
        revision = repo.revision or self.default_revision
        try:
            entries = client.list_repo_files(repo.name, repo.kind, revision=revision)
        except NetworkError as error:
            raise unreachable(self, error, stage, 10) from error
        except APIError as error:
            raise refused(self, repo, error.status_code, stage) from error
        except LibraryError as error:
            raise HubError("ModelScope's client gave up", where=self.endpoint, why=str(error)) from error
        entries = [entry for entry in entries if entry.get("Type") != "tree"]
        files = [
            HubFile(entry["Path"], int(entry["Size"]), sha256=(entry.get("Sha256") or "").lower() or None)
            for entry in entries
        ]
        # The hub names no commit for the whole tree, but one for each file: the newest is the tree's.
        dated = [
            (entry["CommittedDate"], entry["Revision"])
            for entry in entries
            if isinstance(entry.get("CommittedDate"), int) and entry.get("Revision")
        ]
        return Listing(max(dated)[1] if dated else revision, tuple(files))

    def request(self, repo: Repo, commit: str, path: str) -> tuple[str, dict[str, str]]:
        client = self._client()
        headers = {"User-Agent": "swift-forge", "Accept-Encoding": "identity"}
        if client.token:
            headers |= {"Authorization": f"Bearer {client.token}", "Cookie": f"m_session_id={client.token}"}
        return client.get_download_url(repo.name, repo.kind, path, revision=commit), headers
