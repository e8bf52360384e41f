"""The registry of public data sets: every entry's mapping is applied to a row of the columns it declares."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from swift.core.errors import DataError
from swift.data import registry
from swift.data.formats import Sample, to_sample
from swift.data.mapping import ColumnMapping
from swift.data.registry import KINDS, DatasetEntry, all_datasets, find_dataset, nearest_dataset
from swift.data.rows import Row

FOLDER = Path(registry.__file__).parent / "registry"
ENTRIES = all_datasets()
CALL = {"name": "add", "arguments": {"a": 1}}
TOOL = {"name": "add", "description": "adds", "parameters": {}}
MEDIA = ("image", "images", "audio", "audios", "video", "videos")


def value_of(name: str, kind: str) -> Any:
    """What a column of this kind holds in the published files."""
    ask, answer = f"{name} asks", f"{name} says"
    chat = [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]
    share = [{"from": "human", "value": ask}, {"from": "gpt", "value": answer}]
    return {
        "text": answer,
        "number": 1,
        "flag": True,
        "texts": [ask, answer],
        "image": "a.png",
        "tools": json.dumps([TOOL]),
        "calls": json.dumps([CALL]),
        "history": [[ask, answer]],
        "messages": chat,
        "question": chat[:1],
        "answer": chat[1:],
        "sharegpt": share,
        "sharegpt_open": share[:1],
        "turn": share[1],
        "turns_text": [{"role": "human", "text": ask}],
        "turn_text": {"role": "assistant", "text": answer},
        "pairs": [{"human": ask, "assistant": answer}],
        "exchanges": [{"input": ask, "output": answer}],
        "transcript": f"\n\nHuman: {ask}\n\nAssistant: {answer}",
        "hashes": f"### Human: {ask}### Assistant: {answer}",
        "glaive": f"USER: {ask} \n\n\nASSISTANT: {answer} <|endoftext|>",
    }[kind]


def row_of(entry: DatasetEntry) -> Row:
    values: dict[str, Any] = {}
    for column, kind in entry.columns.items():
        *path, last = column.split(".") if re.fullmatch(r"\w+(\.\w+)+", column) else [column]
        inside = values
        for part in path:
            inside = inside.setdefault(part, {})
        inside[last] = value_of(column, kind)
    return Row(values, "row:", 1)


def sample_of(entry: DatasetEntry) -> Sample:
    row = entry.mapping.apply(row_of(entry))
    assert row.error is None
    return to_sample(Row({k: v for k, v in row.values.items() if k not in MEDIA}, row.source, row.number))


def test_every_entry_makes_a_sample_of_its_declared_columns() -> None:
    faults = {}
    for entry in ENTRIES:  # one test: three hundred take longer to set up than to run
        try:
            check_entry(entry)
        except (AssertionError, DataError, KeyError) as fault:
            faults[entry.name] = repr(fault)
    assert faults == {}


def check_entry(entry: DatasetEntry) -> None:
    assert entry.columns and set(entry.columns.values()) <= set(KINDS)
    sample = sample_of(entry)
    answers = [
        m for m in sample.messages if m["role"] == "assistant" and (m["content"] or m.get("tool_calls"))
    ]
    extra = sample.extra
    if entry.task in ("embedding", "reranker"):
        assert sample.messages[0]["role"] == "user" and extra["positive_messages"][0][0]["content"]
    elif entry.task == "grpo":
        assert sample.messages[-1]["role"] == "user"
        assert extra.keys() & {"solution", "target", "verification_info"}
    elif "solution" in entry.mapping.targets:
        assert sample.messages[-1]["role"] == "user" and extra["solution"]
    else:
        assert answers, "nothing to learn"
    if entry.task == "pt":
        assert [m["role"] for m in sample.messages] == ["assistant"]
    if entry.task == "dpo":
        rejected = extra.get("rejected_response") or extra["rejected_messages"][-1].get("content") or "value"
        assert rejected and rejected != answers[-1]["content"]
    if entry.task == "kto":
        assert extra["label"] is True
    # What the mapping names comes out: in the messages or as a column of its own.
    text = json.dumps([sample.messages, extra, sample.tools], ensure_ascii=False)
    for column, kind in entry.columns.items():
        if kind == "text" and any(column in target for target in entry.mapping.targets.values()):
            assert f"{column} says" in text


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("name", "row", "messages"),
    [
        ("alpaca-en", {"instruction": "Add.", "input": "1 1", "output": "2"}, [user("Add.\n1 1"), assistant("2")]),
        ("dolly-15k", {"instruction": "Who?", "context": "Ann.", "response": "Ann", "category": "qa"},
         [user("Ann.\nWho?"), assistant("Ann")]),
        ("lima", {"conversations": ["a", "b", "c", "d"], "source": ""},
         [user("a"), assistant("b"), user("c"), assistant("d")]),
        ("capybara", {"conversation": [{"input": "a", "output": "b"}], "source": ""}, [user("a"), assistant("b")]),
        ("oasst1-guanaco", {"text": "### Human: a### Assistant: b\nc"}, [user("a"), assistant("b\nc")]),
        ("hh-rlhf", {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
         [user("a"), assistant("b")]),
        ("gsm8k", {"question": "1+1?", "answer": "1+1=2\n#### 2"}, [user("1+1?"), assistant("1+1=2\n#### 2")]),
        ("gsm8k-rl", {"question": "1+1?", "answer": "1+1=2\n#### 2"}, [user("1+1?")]),
        ("medmcqa", {"question": "Q", "opa": "w", "opb": "x", "opc": "y", "opd": "z", "cop": 2, "exp": None},
         [user("Q\nA. w\nB. x\nC. y\nD. z"), assistant("C")]),
        ("squad", {"id": "1", "title": "", "context": "C", "question": "Q", "answers": {"text": ["A", "B"]}},
         [user("C\nQ"), assistant("A")]),
        ("imdb", {"text": "good", "label": 1}, [user("good"), assistant("positive")]),
        ("wikipedia-zh", {"completion": "text", "source": "s"}, [assistant("text")]),
        ("dpo-mix-zh", {"conversations": [{"from": "human", "value": "a"}], "chosen": {"from": "gpt", "value": "b"},
                        "rejected": {"from": "gpt", "value": "c"}}, [user("a"), assistant("b")]),
    ],
)  # fmt: skip
def test_mappings_give_the_messages_worked_out_by_hand(
    name: str, row: dict[str, Any], messages: list[dict[str, str]]
) -> None:
    entry = find_dataset(name)
    assert entry is not None
    assert to_sample(entry.mapping.apply(Row(row, "r:", 1))).messages == messages


def test_tool_data_keep_their_calls_and_tools() -> None:
    xlam = find_dataset("xlam")
    assert xlam is not None
    row = {"id": 1, "query": "1+1?", "answers": json.dumps([CALL, CALL]), "tools": json.dumps([TOOL])}
    sample = to_sample(xlam.mapping.apply(Row(row, "r:", 1)))
    assert [call["function"] for call in sample.messages[1]["tool_calls"]] == [CALL, CALL]
    assert sample.tools == [{"type": "function", "function": TOOL}]
    glaive = find_dataset("glaive-function-calling-v2")
    assert glaive is not None
    text = (
        'USER: a\n\n\nASSISTANT: <functioncall> {"name": "add", "arguments": \'{"a": 1}\'} <|endoftext|>\n\n\n'
        'FUNCTION RESPONSE: {"sum": 2}\n\n\nASSISTANT: Two. <|endoftext|>'
    )
    messages = to_sample(glaive.mapping.apply(Row({"system": "S", "chat": text}, "r:", 1))).messages
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert messages[2]["tool_calls"][0]["function"] == CALL and messages[3]["content"] == '{"sum": 2}'


def test_there_are_at_least_150_data_sets_and_no_name_twice() -> None:
    assert len({(entry.hf or entry.ms) for entry in ENTRIES}) >= 150
    names = [
        line.split(":")[0]
        for file in FOLDER.glob("*.yaml")
        if file.name != "shapes.yaml"
        for line in file.read_text(encoding="utf-8").splitlines()
        if ": {" in line
    ]
    assert [name for name, count in Counter(names).items() if count > 1] == []
    spelled = [
        one for entry in ENTRIES for one in {registry._key(name) for name in (entry.name, *entry.aliases)}
    ]
    assert [name for name, count in Counter(spelled).items() if count > 1] == []
    for entry in ENTRIES:
        for one in (entry.hf, entry.ms):
            assert one is None or one == "clue" or re.fullmatch(r"[\w.-]+/[\w.-]+", one), entry.name


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("alpaca-en", "alpaca-en"),
        ("alpaca-gpt4-data-zh", "alpaca-zh"),
        ("AI-ModelScope/alpaca-gpt4-data-zh", "alpaca-zh"),
        ("MS::AI-ModelScope/alpaca-gpt4-data-zh", "alpaca-zh"),
        ("HF::AI-ModelScope/alpaca-gpt4-data-zh", None),
        ("HF::llm-wizard/alpaca-gpt4-data-zh", "alpaca-zh"),
        ("long-alpaca", "long-alpaca"),
        ("instruct-en", "instruct-en"),
        ("coco_vqa_zh", "coco-vqa-zh"),
        ("finance_qa_zh", "finance-qa-zh"),
        ("calibration_dataset", "pile-val-backup"),
        ("my_rlhf_data", None),
    ],
)
def test_lookup_by_name_alias_and_hub_id(name: str, found: str | None) -> None:
    entry = find_dataset(name)
    assert (entry.name if entry else None) == found


def test_near_names_and_patterns() -> None:
    assert nearest_dataset("alpaka-zh") == "alpaca-zh"
    assert {entry.task for entry in all_datasets("grpo")} >= {"grpo"}
    assert "gsm8k" in [entry.name for entry in all_datasets("gsm*")]


def test_own_entries_win_and_wrong_ones_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "datasets").mkdir()
    mine = tmp_path / "datasets" / "mine.yaml"
    mine.write_text(
        "task: dpo\nmy_rlhf_data: {path: /data/x.jsonl, shape: pair}\ngsm8k: {path: y, shape: qa}\n"
    )
    monkeypatch.setenv("SWIFT_HOME", str(tmp_path))
    entry = find_dataset("my-rlhf-data")
    assert entry is not None and (entry.path, entry.task) == ("/data/x.jsonl", "dpo")
    assert find_dataset("gsm8k").path == str(mine.parent / "y")  # type: ignore[union-attr]
    registry._index.cache_clear()
    mine.write_text("x: {path: y, colums: [a]}\n")
    with pytest.raises(DataError, match="not described rightly") as error:
        find_dataset("x")
    assert error.value.why == "unknown keys: colums" and error.value.where == str(mine)
    registry._index.cache_clear()


def test_other_columns_than_declared_are_an_error_of_the_row() -> None:
    mapping = ColumnMapping({"query": "question", "response": "answers.text.0"})
    row = mapping.apply(Row({"query": "x"}, "a.jsonl:", 7))
    assert row.error is not None and row.location == "a.jsonl:7"
    assert "no 'question'" in row.error and "found [query]" in row.error


def test_a_class_is_a_word_to_answer_with_and_a_number_to_classify_by() -> None:
    entry = find_dataset("sst2")
    assert entry is not None
    mapped = entry.mapping.apply(Row({"sentence": "so good", "label": 1}, "a", 1))
    assert (mapped.values["response"], mapped.values["label"]) == ("positive", 1)
    unlabelled = entry.mapping.apply(Row({"sentence": "so good", "label": -1}, "a", 2))
    assert unlabelled.error is not None and "label -1 names no class" in unlabelled.error
