"""The table of short names: resolvable, consistent, and with sizes that add up."""

from __future__ import annotations

from pathlib import Path

import pytest

from swift.core.errors import ModelError
from swift.models.registry import find_entry, model_entries, resolve, short_names


@pytest.mark.parametrize(
    ("name", "hf_id"),
    [
        ("qwen3-8b", "Qwen/Qwen3-8B"),
        ("QWEN2_5-7b-Instruct", "Qwen/Qwen2.5-7B-Instruct"),
        ("qwen3-7b-chat", "Qwen/Qwen3-8B"),
        ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B"),
    ],
)
def test_resolve(name: str, hf_id: str) -> None:
    source = resolve(name, use_hf=True)
    assert (source.hf_id, source.hub_id, source.path) == (hf_id, hf_id, None)
    assert source.entry is find_entry(name)
    assert source.kind == ("hub" if "/" in name else "name")


def test_a_folder_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "qwen3-8b").mkdir()
    source = resolve("qwen3-8b")
    assert (source.kind, source.path, source.hub_id) == ("folder", Path("qwen3-8b"), None)


def test_an_unknown_id_goes_to_the_hub_that_is_asked_for() -> None:
    source = resolve("someone/model-of-theirs", use_hf=False)
    assert (source.kind, source.hub_id, source.entry) == ("hub", "someone/model-of-theirs", None)


def test_unknown_name() -> None:
    with pytest.raises(ModelError, match="did you mean qwen3-8b-base"):
        resolve("qwen3-8b-bse")


def test_names_are_unique_and_ids_well_formed() -> None:
    names = short_names()
    assert len(names) == len(set(names))
    for entry in model_entries().values():
        for hub_id in filter(None, (entry.hf_id, entry.ms_id)):
            owner, name = hub_id.split("/")
            assert owner and name and " " not in hub_id, entry.name


def test_the_articles_names() -> None:
    wanted = {
        "qwen3-7b-chat": "Qwen/Qwen3-8B",
        "qwen3-7b": "Qwen/Qwen3-8B",
        "llama3-70b": "meta-llama/Meta-Llama-3-70B",
        "llama-7b": "huggyllama/llama-7b",
        "qwen-vl-chat": "Qwen/Qwen-VL-Chat",
    }
    entries = {name: find_entry(name) for name in wanted}
    assert {name: entry.hf_id for name, entry in entries.items() if entry} == wanted
    entry = entries["qwen3-7b"]
    assert entry is not None and "Qwen3 has no 7B" in entry.notes("qwen3-7b")[0]
    assert entry.notes("qwen3-8b") == []


def test_a_model_that_is_not_on_modelscope() -> None:
    assert resolve("llama-7b", use_hf=True).hub_id == "huggyllama/llama-7b"
    with pytest.raises(ModelError, match="not known to be on ModelScope"):
        resolve("llama-7b", use_hf=False)


def test_there_are_enough_of_them() -> None:
    entries = model_entries()
    assert len(entries) >= 150
    assert sum(entry.ms_id is not None for entry in entries.values()) >= 150
    assert all(entry.licence for entry in entries.values() if entry.config)


@pytest.mark.parametrize("name", [name for name, entry in model_entries().items() if entry.config])
def test_sizes_give_the_stated_parameters(name: str) -> None:
    """The shape of every model, counted, is within 3 % of what its authors state."""
    entry = model_entries()[name]
    facts = entry.facts()
    assert entry.size is not None
    assert facts.num_parameters / 1e9 == pytest.approx(entry.size, rel=0.03)
    assert facts.architecture == entry.architecture
    if entry.active is not None:
        assert facts.num_active_parameters / 1e9 == pytest.approx(entry.active, rel=0.25)


def test_templates_are_there() -> None:
    folder = Path(__import__("swift").__path__[0]) / "models" / "chat_templates"
    built_in = {path.stem for path in folder.glob("*.jinja")}
    assert {entry.template for entry in model_entries().values()} <= {"own", *built_in}
