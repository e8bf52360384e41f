"""Both hubs, through their client libraries, against a server on this machine."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from fake_hub import COMMIT, WEIGHTS, FakeHub

from swift.core.errors import HubError
from swift.hubs.clients import HuggingFace, ModelScope, find_hub
from swift.hubs.fetch import Choice, fetch, find_cached, verify
from swift.hubs.types import Hub, Patience, Repo

SHARD = "model-00001-of-00002.safetensors"
REPO = Repo("model", "owner/tiny")
QUICK = Patience(reach=60, answer=60, stall=60, attempts=2, pause=0, workers=2)


@pytest.fixture
def hub(hub_name: str, environment: Path) -> Hub:
    return find_hub(hub_name == "huggingface")


def test_a_model_comes_whole_checked_and_without_its_other_formats(fake: FakeHub, hub: Hub) -> None:
    found = fetch(hub, REPO, patience=QUICK)
    names = {
        path.relative_to(found.folder).as_posix(): path.read_bytes() for path in found.folder.rglob("*.*")
    }
    wanted = {path: content for path, content in fake.files.items() if "model-0" in path or ".json" in path}
    assert names == wanted and len(wanted) == 4
    assert found.commit == COMMIT and found.folder.name == COMMIT
    assert found.received == sum(len(content) for content in wanted.values())


def test_the_second_time_nothing_is_asked(fake: FakeHub, hub: Hub) -> None:
    assert find_cached(hub, REPO) is None
    folder = fetch(hub, REPO, patience=QUICK).folder
    fake.log.clear()
    cached = find_cached(hub, REPO)
    assert cached is not None and cached.folder == folder and fake.log == []
    assert find_cached(hub, Repo("model", "owner/tiny", COMMIT)) == cached
    assert find_cached(hub, Repo("model", "owner/tiny", "v2")) is None
    assert find_cached(hub, Repo("dataset", "owner/tiny")) is None


def test_offline_is_respected(fake: FakeHub, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubError, match="forbids the network"):
        fetch(hub, REPO, patience=QUICK)
    assert fake.log == []


def test_one_line_says_what_comes_from_where_and_how_large(
    fake: FakeHub, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    found = fetch(hub, REPO, patience=QUICK)
    lines = capsys.readouterr().err.splitlines()
    size = "200.0 KiB"
    assert lines == [
        f"model owner/tiny from {hub.title} ({fake.url}): 4 files, {size}, {size} to fetch; {found.folder}"
    ]


def test_cut_connections_go_on_from_the_bytes_held(fake: FakeHub, hub: Hub) -> None:
    fake.cuts = {SHARD: [30_000, 20_000]}
    found = fetch(hub, REPO, patience=QUICK)
    assert fake.requests_for(SHARD) == [None, "bytes=30000-", "bytes=50000-"]
    assert (found.folder / SHARD).read_bytes() == WEIGHTS
    assert found.received == sum(
        len(fake.files[name]) for name in ("config.json", "tokenizer.json")
    ) + 2 * len(WEIGHTS)


def test_a_server_without_ranges_starts_anew(fake: FakeHub, hub: Hub) -> None:
    fake.cuts, fake.no_ranges = {SHARD: [30_000]}, True
    assert (fetch(hub, REPO, patience=QUICK).folder / SHARD).read_bytes() == WEIGHTS


def test_a_download_that_died_leaves_nothing_that_looks_complete_and_is_continued(
    fake: FakeHub, hub: Hub
) -> None:
    fake.cuts = {SHARD: [30_000] + [0] * 10}
    with pytest.raises(HubError, match="cannot be reached") as caught:
        fetch(hub, REPO, patience=QUICK)
    assert f"{SHARD}, after 29.3 KiB of 100.0 KiB" in str(caught.value)
    assert find_cached(hub, REPO) is None
    assert [path for path in hub.storage(REPO).rglob("*") if path.name in fake.files] == []
    fake.cuts.clear()
    fake.log.clear()
    found = fetch(hub, REPO, patience=QUICK)
    assert fake.requests_for(SHARD) == ["bytes=30000-"]
    assert found.received <= 2 * len(WEIGHTS) - 30_000 + 100
    assert verify(hub, REPO)[1].good == 4


def test_a_busy_server_is_asked_again(fake: FakeHub, hub: Hub) -> None:
    fake.busy = {"config.json": 1}
    fetch(hub, REPO, patience=QUICK)
    assert len(fake.requests_for("config.json")) == 2


def test_wrong_content_is_fetched_once_more(fake: FakeHub, hub: Hub) -> None:
    fake.wrong = {SHARD: 1}
    assert (fetch(hub, REPO, patience=QUICK).folder / SHARD).read_bytes() == WEIGHTS
    assert fake.requests_for(SHARD) == [None, None]


def test_content_that_stays_wrong_is_refused_and_deleted(fake: FakeHub, hub: Hub) -> None:
    fake.wrong = {SHARD: 9}
    with pytest.raises(HubError, match="came twice with content") as caught:
        fetch(hub, REPO, patience=QUICK)
    assert hashlib.sha256(WEIGHTS).hexdigest() in str(caught.value)
    assert len(fake.requests_for(SHARD)) == 2
    digest = hashlib.sha256(WEIGHTS).hexdigest()
    assert not list(hub.storage(REPO).rglob(f"{digest}*")) and find_cached(hub, REPO) is None


def test_git_hashes_are_checked_as_well(fake: FakeHub, environment: Path) -> None:
    fake.wrong = {"config.json": 9}
    with pytest.raises(HubError, match=r"config.json came twice"):
        fetch(HuggingFace(), REPO, patience=QUICK)


def test_verify_finds_and_removes_what_was_damaged_later(fake: FakeHub, hub: Hub) -> None:
    folder = fetch(hub, REPO, patience=QUICK).folder
    fake.log.clear()
    damaged = bytearray(WEIGHTS)
    damaged[5] ^= 1
    (folder / SHARD).resolve().write_bytes(damaged)
    (folder / "tokenizer.json").unlink()
    report = verify(hub, REPO)[1]
    assert (report.good, report.damaged, report.missing) == (2, [SHARD], ["tokenizer.json"])
    assert fake.log == [] and not (folder / SHARD).exists() and find_cached(hub, REPO) is None
    assert fetch(hub, REPO, patience=QUICK).received == len(WEIGHTS)
    assert verify(hub, REPO)[1].good == 4


def test_an_unknown_name_and_an_unknown_revision(hub: Hub) -> None:
    with pytest.raises(HubError, match="there is no model 'owner/tony'"):
        fetch(hub, Repo("model", "owner/tony"), patience=QUICK)
    with pytest.raises(HubError, match=r"no revision|there is no model"):
        fetch(hub, Repo("model", "owner/tiny", "v9"), patience=QUICK)


def test_a_login_is_asked_for_and_a_token_is_sent(
    fake: FakeHub, hub: Hub, hub_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.token = "t0ken"
    with pytest.raises(HubError, match=f"needs a login(.|\n)*set {hub.token_variable}"):
        fetch(hub, REPO, patience=QUICK)
    assert len(fetch(find_hub(hub_name == "huggingface", "t0ken"), REPO, patience=QUICK).commit) == 40
    monkeypatch.setenv(hub.token_variable, "t0ken")
    again = find_hub(hub_name == "huggingface")
    assert fetch(again, Repo("dataset", "owner/tiny"), patience=QUICK).commit == COMMIT


def test_a_gated_model_names_its_licence_page(fake: FakeHub, hub: Hub) -> None:
    fake.gated = True
    with pytest.raises(HubError, match="asks for consent") as caught:
        fetch(hub, REPO, patience=QUICK)
    assert hub.page(REPO) in str(caught.value) and hub.token_variable in str(caught.value)


@pytest.mark.parametrize(
    ("silent", "stage", "patience"),
    [
        ("list", "the list of files", replace(QUICK, answer=0.2)),
        (SHARD, SHARD, replace(QUICK, stall=0.2, attempts=1)),
    ],
)
def test_a_silent_server_is_named_with_the_stage(
    fake: FakeHub, hub: Hub, silent: str, stage: str, patience: Patience
) -> None:
    fake.silent = {silent}
    with pytest.raises(HubError) as caught:
        fetch(hub, REPO, patience=patience)
    assert f"at {stage}" in str(caught.value) and "no answer within 0.2 seconds" in str(caught.value)


def test_refused_connections_and_unknown_hosts_fail_at_once(
    hub_name: str, environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = socket.getaddrinfo

    def resolver(host: str, *rest: object, **more: object) -> object:
        if host.endswith(".invalid"):
            raise socket.gaierror(-2, "Name or service not known")
        return known(host, *rest, **more)  # type: ignore[arg-type]

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for url, cause in (
        (f"http://127.0.0.1:{port}", "refuses the connection"),
        ("http://no-such-host.invalid", "cannot be resolved"),
    ):
        monkeypatch.setattr("socket.getaddrinfo", resolver)
        monkeypatch.setenv("HF_ENDPOINT", url)
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", url)
        with pytest.raises(HubError, match=cause) as caught:
            fetch(find_hub(hub_name == "huggingface"), REPO, patience=QUICK)
        assert "the first contact" in str(caught.value) and "fix: " in str(caught.value)


def test_a_full_disk_is_told_before_anything_comes(
    fake: FakeHub, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swift.hubs.fetch.free_bytes", lambda _: 1000)
    with pytest.raises(HubError, match=r"200.0 KiB are to be fetched, 1000 B are free"):
        fetch(hub, REPO, patience=QUICK)
    assert fake.requests_for("config.json") == []


def test_patterns_choose_files(hub: Hub) -> None:
    found = fetch(hub, REPO, Choice(include=["*.json", "original/"], exclude=["tok*"]), QUICK)
    names = sorted(path.relative_to(found.folder).as_posix() for path in found.folder.rglob("*.*"))
    assert names == ["config.json", "original/consolidated.pth"]
    assert find_cached(hub, REPO) is None
    with pytest.raises(HubError, match="no file is left"):
        fetch(hub, REPO, Choice(include=["*.gguf"]), QUICK)


def test_a_plain_folder(fake: FakeHub, hub: Hub, tmp_path: Path) -> None:
    choice = Choice(local_dir=tmp_path / "here")
    found = fetch(hub, REPO, choice, QUICK)
    assert found.folder == tmp_path / "here" and not (found.folder / SHARD).is_symlink()
    assert (found.folder / SHARD).read_bytes() == WEIGHTS and (found.folder / SHARD).stat().st_nlink == 1
    assert fetch(hub, REPO, choice, QUICK).received == 0
    assert verify(hub, REPO, choice)[1].good == 4


def test_a_new_commit_brings_only_what_changed(fake: FakeHub, hub: Hub) -> None:
    first = fetch(hub, REPO, patience=QUICK)
    fake.files["config.json"], fake.commit = b"[]", "f" * 40
    second = fetch(hub, REPO, patience=QUICK)
    assert second.received == 2 and second.folder != first.folder
    assert (first.folder / "config.json").read_bytes() == b'{"model_type": "tiny"}'
    cached = find_cached(hub, REPO)
    assert cached is not None and cached.commit == "f" * 40


def test_two_at_a_time_share_one_download(fake: FakeHub, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swift.hubs.fetch.time.sleep", lambda _: threading.Event().wait(0.01))
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(fetch(hub, REPO, patience=QUICK))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2 and len(fake.requests_for(SHARD)) == 1


def test_names_that_leave_the_folder_are_refused(fake: FakeHub, hub: Hub) -> None:
    fake.files["../../evil"] = b"x"
    with pytest.raises(HubError, match="outside of the repository"):
        fetch(hub, REPO, patience=QUICK)


def test_caches_of_the_client_libraries_are_shared(fake: FakeHub, environment: Path) -> None:
    """What we fetch, Hugging Face's library finds offline; what it fetched, we need not fetch again."""
    from huggingface_hub import hf_hub_download

    hub = HuggingFace()
    ours = fetch(hub, REPO, patience=QUICK).folder
    theirs = hf_hub_download("owner/tiny", "config.json", cache_dir=hub.cache, local_files_only=True)
    assert Path(theirs) == ours / "config.json"
    dataset = Repo("dataset", "owner/tiny")
    os.environ["HF_HUB_DISABLE_XET"] = "1"
    hf_hub_download(
        "owner/tiny", SHARD, repo_type="dataset", revision=COMMIT, cache_dir=hub.cache, endpoint=fake.url
    )
    assert fetch(hub, dataset, Choice(include=[SHARD]), QUICK).received == 0


def test_folders_that_other_programs_downloaded_are_found(environment: Path) -> None:
    hub = ModelScope()
    for folder in (
        hub.cache / "hub" / "models" / "Qwen" / "Qwen3-0___6B",
        hub.cache / "models" / "Qwen--Qwen3-1.7B" / "snapshots" / "master",
    ):
        folder.mkdir(parents=True)
    old = find_cached(hub, Repo("model", "Qwen/Qwen3-0.6B"), usable=lambda _: True)
    new = find_cached(hub, Repo("model", "Qwen/Qwen3-1.7B"), usable=lambda _: True)
    assert old is not None and old.folder.name == "Qwen3-0___6B"
    assert new is not None and (new.folder.name, new.commit) == ("master", "master")
    assert find_cached(hub, Repo("model", "Qwen/Qwen3-1.7B"), usable=lambda _: False) is None
    assert find_cached(hub, Repo("model", "Qwen/Qwen3-1.7B")) is None
