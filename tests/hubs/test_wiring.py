"""``--model`` and ``--dataset`` of the commands: paths, caches, hubs."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_hub import COMMIT, FakeHub

from swift.cli.main import main
from swift.config.bind import dump_text, resolve
from swift.config.sections.model import ModelSection
from swift.core.errors import ConfigError, DataError, HubError, ModelError, UsageError
from swift.data.hub import is_here, pin_datasets, with_hub
from swift.data.sources import find_files, parse_dataset_spec
from swift.hubs.clients import wants_hf
from swift.hubs.names import find_repo, is_local_name, is_repo_name
from swift.hubs.types import Repo
from swift.models.locate import find_model, locate_model, pin_model


@pytest.fixture(autouse=True)
def here(environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "here"
    (folder / "runs").mkdir(parents=True)
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "local", "on_hub"),
    [
        ("Qwen/Qwen3-0.6B", False, True),
        ("runs", True, False),
        ("runs/first", True, False),
        ("./a/b", True, False),
        ("/a/b", True, False),
        ("~/model", True, False),
        ("a/b/c", True, False),
        ("data/train.jsonl", True, False),
        ("qwen3-8b", False, False),
    ],
)
def test_paths_and_names(name: str, local: bool, on_hub: bool) -> None:
    assert (is_local_name(name), is_repo_name(name)) == (local, on_hub)


def test_addresses_of_pages_are_names() -> None:
    assert find_repo("https://huggingface.co/datasets/a/b", "model") == Repo("dataset", "a/b")
    assert find_repo("https://modelscope.cn/models/a/b.c", "model", "v1") == Repo("model", "a/b.c", "v1")
    with pytest.raises(UsageError, match="no such folder"):
        find_repo("./a", "model")


def test_which_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not wants_hf(None) and wants_hf(True)
    monkeypatch.setenv("USE_HF", "1")
    assert wants_hf(None) and not wants_hf(False)


def test_a_local_path_never_touches_the_network(fake: FakeHub, here: Path) -> None:
    (here / "mine").mkdir()
    assert locate_model(ModelSection(model="mine")).folder == Path("mine")
    for name in ("runs/none", "./none", "none.jsonl"):
        with pytest.raises(ModelError, match="no model folder"):
            locate_model(ModelSection(model=name))
    with pytest.raises(ConfigError, match="is a folder: it has no revision 'v1'"):
        locate_model(ModelSection(model="mine", model_revision="v1"))
    assert fake.log == []


def test_a_model_is_fetched_once_and_pinned(fake: FakeHub, hub_name: str) -> None:
    section = ModelSection(model="owner/tiny", use_hf=hub_name == "huggingface")
    assert find_model(section) is None and fake.log == []
    folder = pin_model(section)
    assert (section.model, section.model_revision) == (str(folder), COMMIT) and folder.name == COMMIT
    fake.log.clear()
    assert pin_model(section) == folder
    again = ModelSection(model="owner/tiny", use_hf=hub_name == "huggingface")
    assert pin_model(again) == folder and fake.log == []


def test_an_unknown_name_is_compared_with_the_registry() -> None:
    with pytest.raises(HubError, match=r"did you mean Qwen/Qwen3-8B\?"):
        locate_model(ModelSection(model="Qwem/Qwen3-8B", use_hf=True))
    with pytest.raises(ModelError, match="did you mean qwen3-8b"):
        locate_model(ModelSection(model="qwen3-8bb"))


def test_a_plan_never_downloads(fake: FakeHub, here: Path) -> None:
    from swift.plan.plan import make_plan

    (here / "data.jsonl").write_text('{"text": "a"}\n')
    plan = make_plan(
        resolve("pt", ["--model", "owner/tiny", "--dataset", "data.jsonl", "other/data"], planning=True)
    )
    assert any("owner/tiny is not on this machine; a run downloads it" in text for text in plan.warnings)
    assert any("other/data" in text for text in plan.warnings)
    assert fake.log == []


def test_tokens_are_not_recorded() -> None:
    resolved = resolve("sft", ["--model", "a/b", "--dataset", "c.jsonl", "--hub_token", "s3cret"])
    assert resolved.config.model.hub_token == "s3cret"
    assert "s3cret" not in dump_text(resolved) and "hub_token" not in dump_text(resolved)


def test_a_data_set_is_its_training_part(fake: FakeHub, hub_name: str) -> None:
    fake.files = {
        "README.md": b"#",
        "dataset_infos.json": b"{}",
        "data/train-0.jsonl": b'{"text": "a"}\n',
        "data/test-0.jsonl": b'{"text": "b"}\n',
    }
    use_hf = hub_name == "huggingface"
    prefix = "HF" if use_hf else "MS"
    words = ["--model", "m", "--use_hf", str(use_hf), "--dataset", "owner/tiny#5", "some.jsonl#3"]
    resolved = resolve("sft", words)
    spec = parse_dataset_spec(with_hub("owner/tiny#5", resolved.config.model))
    assert not is_here(spec) and fake.log == []
    with pytest.raises(DataError, match="not on this machine"):
        find_files(spec)
    pin_datasets(resolved)
    assert resolved.config.data.dataset == [f"{prefix}::owner/tiny#5", "some.jsonl#3"]
    spec = parse_dataset_spec(resolved.config.data.dataset[0])
    assert (spec.num_rows, spec.hub) == (5, prefix.lower())
    assert [file.read_bytes() for file in find_files(spec)] == [b'{"text": "a"}\n']
    fake.log.clear()
    pin_datasets(resolved)
    assert fake.log == []


def test_the_command(fake: FakeHub, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["download", "owner/tiny", "--use_hf", "true"]) == 0
    folder = Path(capsys.readouterr().out.strip())
    assert (folder / "config.json").is_file() and folder.name == COMMIT
    assert main(["download", "owner/tiny", "--use_hf", "--verify"]) == 0
    assert capsys.readouterr().out.startswith("4 files are as the hub has them")
    (folder / "config.json").resolve().write_bytes(b"x" * 22)
    assert main(["download", "owner/tiny", "--use_hf", "--verify"]) == 1
    shown = capsys.readouterr()
    assert "damaged, deleted: config.json" in shown.out and "fix: swift download" in shown.err
    assert (
        main(["download", "owner/tiny", "--local_dir", "flat", "--include", "*.json", "--max_workers", "1"])
        == 0
    )
    assert sorted(path.name for path in (here / "flat").glob("*.*")) == [
        ".cache",
        "config.json",
        "tokenizer.json",
    ]
    assert main(["download", "./owner/tiny/x"]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_training_with_model_and_data_of_a_hub(
    fake: FakeHub, here: Path, hub_name: str, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From two names to a trained adapter; the second run, and inference, ask the hub nothing."""
    rows = "".join(f'{{"query": "say {n}", "response": "it is {n}"}}\n' for n in range(8))
    fake.files = {path.name: path.read_bytes() for path in tiny_model_dir.iterdir()}
    fake.files["data/train-0.jsonl"] = rows.encode()
    use_hf = str(hub_name == "huggingface").lower()
    words = ["--model", "owner/tiny", "--dataset", "owner/tiny#6", "--use_hf", use_hf, "--max_steps", "1"]
    assert main(["sft", *words, "--run_name", "first"]) == 0
    notices = [line for line in capsys.readouterr().err.splitlines() if "to fetch" in line]
    assert [notice.split()[0] for notice in notices] == ["model", "dataset"] and fake.log
    fake.log.clear()
    assert main(["sft", *words, "--run_name", "second"]) == 0
    (here / "ask.jsonl").write_text(rows, encoding="utf-8")
    assert (
        main(
            [
                "infer",
                "--adapters",
                "output/first/last",
                "--val_dataset",
                "ask.jsonl",
                "--max_new_tokens",
                "2",
            ]
        )
        == 0
    )
    assert fake.log == []
    recorded = [Path("output", run, "config.yaml").read_text(encoding="utf-8") for run in ("first", "second")]
    assert all(COMMIT in text for text in recorded)
