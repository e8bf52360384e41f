"""What a run writes into config.yaml is what comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from swift.config.bind import command_of, dump, dump_text, load_run_config, resolve
from swift.config.commands import COMMANDS
from swift.config.kinds import Kind
from swift.config.schema import Option
from swift.core.errors import ConfigError, SwiftError

NEEDED = {"model": "m", "dataset": ["d.jsonl"]}

_TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12)


def values_of(option: Option) -> st.SearchStrategy[Any]:
    """Values an option accepts, within its limits."""
    limits = {
        key: getattr(limit, key)
        for limit in option.info.metadata
        for key in ("ge", "gt", "le", "lt")
        if hasattr(limit, key)
    }
    return _values(option.kind, limits)


def _values(kind: Kind, limits: dict[str, float]) -> st.SearchStrategy[Any]:
    if kind.base == "bool":
        return st.booleans()
    if kind.base == "choice":
        return st.sampled_from(kind.choices)
    if kind.base == "int":
        return st.integers(int(limits.get("ge", 0)), int(limits.get("ge", 0)) + 50)
    if kind.base == "float":
        low, high = limits.get("ge", limits.get("gt", 0)), limits.get("le", limits.get("lt", 10))
        return st.floats(low, high, exclude_min="gt" in limits, exclude_max="lt" in limits)
    if kind.item is not None and kind.base == "list":
        return st.lists(_values(kind.item, limits), max_size=3)
    if kind.base == "dict":
        return st.dictionaries(_TEXT, _TEXT, max_size=2)
    return _TEXT.filter(lambda text: text.lower() not in ("none", "null"))


@st.composite
def configurations(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A command and explicit values; about half of them contradict a rule and are thrown away by the test."""
    command = draw(st.sampled_from(["sft", "pt", "infer"]))
    taken = COMMANDS[command].options()
    recorded = sorted(set(taken) - {"hub_token"})  # a secret
    names = draw(st.lists(st.sampled_from(recorded), unique=True, max_size=8))
    return command, {name: draw(values_of(taken[name])) for name in names}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(configurations())
def test_round_trip(tmp_path: Path, configuration: tuple[str, dict[str, Any]]) -> None:
    command, values = configuration
    try:
        resolved = resolve(command, values=values, partial=True)
    except SwiftError:
        assume(False)
    (tmp_path / "config.yaml").write_text(dump_text(resolved), encoding="utf-8")
    back = load_run_config(tmp_path)
    assert back.command == command
    assert back.config == resolved.config
    assert dump(back) == dump(resolved)
    explicit = {
        name for name in resolved.sources if resolved.is_explicit(name) and resolved.value(name) is not None
    }
    assert {name for name in back.sources if back.is_explicit(name)} == explicit


def test_the_record_is_nested_and_names_what_was_typed() -> None:
    record = dump(resolve("sft", ["--lora_r", "4"], values=NEEDED))
    assert record["command"] == "sft"
    assert record["tuner"]["lora_rank"] == 4
    assert record["training"]["learning_rate"] == 1e-4
    assert "run_name" not in record["checkpoint"]
    assert record["explicit"] == ["model", "dataset", "lora_rank"]
    assert "generation" not in record


def test_the_text_says_how_to_run_again() -> None:
    text = dump_text(resolve("sft", values=NEEDED), "runs/v0/config.yaml")
    assert text.splitlines()[0] == "# All options of this run. Run it again: swift sft runs/v0/config.yaml"
    assert yaml.safe_load(text)["data"]["dataset"] == ["d.jsonl"]


def test_recorded_values_keep_their_meaning(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump_text(resolve("sft", ["--max_steps", "3"], values=NEEDED)))
    path = str(tmp_path / "config.yaml")
    again = resolve("sft", [path])
    assert again.sources["max_steps"].kind == "file"
    assert again.sources["learning_rate"].kind == "recorded"
    assert not again.is_explicit("warmup_ratio")
    # Nobody typed the ratio, so warmup_steps does not contradict it; the same for LoRA options and full training.
    assert resolve("sft", [path, "--warmup_steps", "2"]).value("warmup_steps") == 2
    full = resolve("sft", [path, "--tuner_type", "full"])
    assert full.value("learning_rate") == 1e-5
    assert str(full.sources["learning_rate"]) == "derived from tuner_type"


def test_a_recorded_value_outlives_a_change_of_the_defaults(tmp_path: Path) -> None:
    text = dump_text(resolve("sft", values=NEEDED)).replace("lora_rank: 8", "lora_rank: 4")
    (tmp_path / "config.yaml").write_text(text.replace("learning_rate: 0.0001", "learning_rate: 0.5"))
    back = load_run_config(tmp_path)
    assert (back.value("lora_rank"), back.value("learning_rate")) == (4, 0.5)


def test_secrets_are_not_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWIFT_TEST_API_KEY", "secret")
    monkeypatch.setenv("SWIFT_TEST_THREADS", "2")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    environment = {
        "SWIFT_TEST_API_KEY": "secret",
        "SWIFT_TEST_THREADS": "2",
        "TOKENIZERS_PARALLELISM": "false",
    }
    resolved = resolve("sft", values={**NEEDED, "ENV": environment})
    assert dump(resolved)["ENV"] == {"SWIFT_TEST_THREADS": "2", "TOKENIZERS_PARALLELISM": "false"}


def test_run_folders_and_checkpoints_lead_to_their_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump_text(resolve("pt", values=NEEDED)))
    (tmp_path / "checkpoint-5").mkdir()
    for path in (tmp_path, tmp_path / "config.yaml", tmp_path / "checkpoint-5"):
        assert load_run_config(path).command == "pt"


def test_messages(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run_config(tmp_path)
    assert caught.value.render() == (
        f"{tmp_path}: no config.yaml here\n  fix: give a run folder, or one of its checkpoints"
    )
    (tmp_path / "run.yaml").write_text("lora_rank: 3\n")
    with pytest.raises(ConfigError, match="does not say which command it is for"):
        command_of(tmp_path / "run.yaml")
    (tmp_path / "run.yaml").write_text("command: stf\n")
    with pytest.raises(ConfigError) as caught:
        command_of(tmp_path / "run.yaml", "run.yaml")
    assert caught.value.render() == "run.yaml:1: unknown command 'stf'\n  fix: did you mean sft?"
