"""Rows of tasks over whole sequences: formats, bad rows, lengths, storage, layout."""

import numpy as np
import pytest

from swift.data.collate import collate
from swift.data.formats import RowError, to_sample
from swift.data.groups import RERANKER_INSTRUCTION, TaskFormat, encode_group, read_group
from swift.data.rows import Row
from swift.data.store import TokenStore
from swift.data.teaching import TeachingReport
from swift.data.tokenise import Encoder, encode_rows
from swift.data.tokens import TokenDataset


class LetterTemplate:
    """A text is its letters' code points; ``q`` is refused as an empty text."""

    fingerprint = "letters"

    def encode_many(self, samples):
        raise AssertionError("rows of tasks are encoded sequence by sequence")

    def encode_sequence(self, messages, tools=None, *, end_token=False):
        text = "|".join(message["content"] for message in messages)
        return [ord(letter) for letter in text if text != "q"] + ([1] if end_token else [])


def user(text):
    return [{"role": "user", "content": text}]


def task(kind, loss=None, problem=None, labels=1, positives=1, negatives=7):
    return TaskFormat(kind, loss, problem, labels, positives, negatives)


def group_of(values, form, number=1):
    return read_group(to_sample(Row(values, "rows.jsonl:", number)), form, number)


def texts(group):
    return ["|".join(f"{m['role'][0]}:{m['content']}" for m in one) for one in group.conversations]


ONE, MANY, NUMBERS = "single_label_classification", "multi_label_classification", "regression"


@pytest.mark.parametrize(
    ("label", "problem", "count", "expected"),
    [
        (2, ONE, 3, [2.0]),
        ("1", ONE, 3, [1.0]),  # CSV
        ([0, 2], MANY, 3, [1.0, 0.0, 1.0]),
        ([], MANY, 3, [0.0, 0.0, 0.0]),
        (1, MANY, 2, [0.0, 1.0]),
        (0.25, NUMBERS, 1, [0.25]),
        ([1.5, -2], NUMBERS, 2, [1.5, -2.0]),
    ],
)
def test_labels_of_classes(label, problem, count, expected):
    group = group_of({"messages": user("t"), "label": label}, task("seq_cls", None, problem, count))
    assert group.labels == expected
    assert texts(group) == ["u:t"]


@pytest.mark.parametrize(
    ("row", "form", "reason"),
    [
        ({}, task("seq_cls", None, ONE, 3), 'no "label"'),
        ({"label": 3}, task("seq_cls", None, ONE, 3), '"label" 3 is no class from 0 to 2 (num_labels 3)'),
        ({"label": 0.5}, task("seq_cls", None, ONE, 3), '"label" 0.5 is no class from 0 to 2 (num_labels 3)'),
        ({"label": "red"}, task("seq_cls", None, ONE, 3), "\"label\" 'red' is not a number"),
        (
            {"label": [1]},
            task("seq_cls", None, ONE, 3),
            '"label" is a list: several classes need problem_type multi_label_classification',
        ),
        ({"label": [1.0]}, task("seq_cls", None, NUMBERS, 2), '"label" has 1 values, num_labels is 2'),
        ({}, task("embedding", "infonce"), '"positive_messages" has 0 conversations; embedding takes one'),
        (
            {"positive": ["a", "b"]},
            task("embedding", "infonce"),
            '"positive_messages" has 2 conversations; embedding takes one',
        ),
        (
            {"positive": ["a"]},
            task("embedding", "cosine_similarity"),
            'no "label", which loss_type cosine_similarity learns',
        ),
        (
            {"positive": ["a"], "label": 0.5},
            task("embedding", "contrastive"),
            '"label" 0.5 is neither 0 nor 1, as loss_type contrastive needs',
        ),
        (
            {"positive": ["a"], "negative": ["b"], "label": 1},
            task("embedding", "contrastive"),
            '"negative_messages" are for loss_type infonce, not contrastive',
        ),
        ({"negative": ["b"]}, task("reranker"), 'no "positive_messages": no document is relevant'),
        ({"positive": "a"}, task("reranker"), '"positive" is not a list of conversations'),
        (
            {"positive_messages": [[{"role": "robot", "content": "x"}]]},
            task("reranker"),
            "\"positive_messages\" 1: message 1 has an unknown role 'robot'",
        ),
        ({"positive": ["q"], "negative": []}, task("embedding", "infonce"), None),  # the end token stays
        ({"label": 1}, task("seq_cls", None, ONE, 3), "text 1 is empty"),
    ],
)
def test_bad_rows_say_what_is_wrong(row, form, reason):
    values = {"messages": user("q" if reason == "text 1 is empty" else "t"), **row}
    if reason is None:
        encoded = encode_group(Row(values, "rows.jsonl:", 7), LetterTemplate(), form)
        assert [one.tolist() for one in encoded.sequences] == [[116, 1], [1]]
        return
    with pytest.raises(RowError) as caught:
        encode_group(Row(values, "rows.jsonl:", 7), LetterTemplate(), form)
    assert caught.value.location == "rows.jsonl:7"
    assert caught.value.reason.startswith(reason)


def test_anchors_positives_and_negatives():
    row = {
        "messages": user("anchor"),
        "positive_messages": [user("near")],
        "negative_messages": [user("far"), [{"role": "system", "content": "s"}, *user("farther")]],
    }
    group = group_of(row, task("embedding", "infonce", negatives=None))
    assert texts(group) == ["u:anchor", "u:near", "u:far", "s:s|u:farther"]
    assert len(group_of(row, task("embedding", "infonce", negatives=1)).conversations) == 3
    pair = {"query": "one", "response": "two", "label": 0.5}  # the form of ms-swift 3
    group = group_of(pair, task("embedding", "cosine_similarity"))
    assert (texts(group), group.labels) == (["u:one", "u:two"], [0.5])


def test_documents_answer_the_query_or_are_judged():
    row = {
        "messages": [{"role": "system", "content": "find"}, *user("query")],
        "positive_messages": [[{"role": "assistant", "content": "yes it is"}], user("as well")],
        "negative_messages": [user("no")],
    }
    group = group_of(row, task("reranker", positives=2))
    assert group.labels == [2.0]
    assert texts(group) == [
        "s:find|u:query|a:yes it is",
        "s:find|u:query|a:as well",
        "s:find|u:query|a:no",
    ]
    judged = group_of(row, task("generative_reranker"))
    assert judged.labels == [1.0]
    assert len(judged.conversations) == 2
    assert judged.conversations[1][1]["content"] == "<Instruct>: find\n<Query>: query\n<Document>: no"
    row["messages"] = user("query")
    judged = group_of(row, task("generative_reranker"))
    assert judged.conversations[1][1]["content"].startswith(f"<Instruct>: {RERANKER_INSTRUCTION}\n")


def test_too_many_documents_are_drawn_the_same_way_every_time():
    row = {
        "messages": user("query"),
        "positive": [f"p{place}" for place in range(5)],
        "negative": [f"n{place}" for place in range(20)],
    }
    form = task("reranker", positives=2, negatives=4)
    drawn = [texts(group_of(row, form, number)) for number in (1, 2, 3, 1)]
    assert drawn[0] == drawn[3]
    assert len({tuple(one) for one in drawn}) == 3
    assert all(len(set(one)) == 6 for one in drawn)
    assert [text[8] for text in drawn[1]] == ["a"] * 6
    assert [text.rpartition(":")[2][0] for text in drawn[1]] == ["p"] * 2 + ["n"] * 4


ROWS = [
    {"messages": user("abc"), "positive": ["de"], "negative": ["f", "ghij"]},
    {"messages": user("k"), "positive": ["lm"], "negative": []},
    {"messages": user("n"), "positive": ["opqrstuv"], "negative": ["w"]},
]


def dataset_of(rows=ROWS, **options):
    encoder = Encoder(LetterTemplate(), **{"max_length": None, **options}, task=task("embedding", "infonce"))
    return TokenDataset([encode_rows([Row(row, "r:", n) for n, row in enumerate(rows, 1)], encoder)])


def sequences_of(dataset, i):
    return [ids for ids, _ in dataset.group(i)[0]]


def words(sequence):
    return "".join(chr(token) for token in sequence if token > 1)


@pytest.mark.parametrize(
    ("truncation", "kept", "last"),
    [("delete", 2, None), ("right", 3, "opqr"), ("left", 3, "stuv")],
)
def test_max_length_holds_for_each_text_and_its_end_stays(truncation, kept, last):
    dataset = dataset_of(max_length=5, truncation=truncation)
    assert len(dataset) == kept
    if last:
        assert words(sequences_of(dataset, 2)[1]) == last
        assert all(sequence[-1] == 1 for i in range(kept) for sequence in sequences_of(dataset, i))
        assert dataset.report.truncated == {"r:": [3]}
    else:
        assert dataset.report.deleted == {"r:": [3]}


def test_groups_survive_the_disk_and_joining(tmp_path):
    parts = [dataset_of(ROWS[:1]).stores[0], dataset_of([]).stores[0], dataset_of(ROWS[1:]).stores[0]]
    TokenStore.write(tmp_path / "store", parts)
    opened = TokenDataset([TokenStore.open(tmp_path / "store")])
    for dataset in (opened, TokenDataset([TokenStore.join(parts)]), dataset_of()):
        assert [[words(one) for one in sequences_of(dataset, i)] for i in range(3)] == [
            ["abc", "de", "f", "ghij"],
            ["k", "lm"],
            ["n", "opqrstuv", "w"],
        ]
        assert [dataset.group(i)[1].tolist() for i in range(3)] == [[1.0]] * 3
    plain = TokenDataset([TokenStore.join([])])
    assert plain.num_labels == 0


@pytest.mark.parametrize("mode", ["padded", "padding_free", "packed"])
def test_the_sequences_of_a_row_stay_together_in_every_layout(mode):
    dataset = dataset_of()
    rows = [[0], [2]] if mode == "padded" else [[0, 2]]
    batch = collate(dataset, rows, mode)
    assert batch.groups == [4, 3]
    assert batch.labels.shape == (2, 1)
    assert batch.num_targets == 7
    ends = batch.targets != -100
    assert batch.input_ids[ends].tolist() == [1] * 7
    expected = [sequence for i in (0, 2) for sequence in sequences_of(dataset, i)]
    if mode == "padded":
        assert batch.input_ids.shape == (7, 9)
        assert batch.document_lengths is None
        for line, sequence in zip(batch.input_ids, expected, strict=True):
            assert np.array_equal(line[: len(sequence)].numpy(), sequence)
    else:
        assert batch.document_lengths == [[len(sequence) for sequence in expected]]
        assert np.array_equal(batch.input_ids[0].numpy(), np.concatenate(expected))
        assert batch.position_ids[0].tolist() == [i for one in expected for i in range(len(one))]


def test_an_empty_micro_batch():
    batch = collate(dataset_of(), [], "padding_free")
    assert (batch.groups, batch.labels.shape, batch.num_targets) == ([], (0, 1), 0)


def test_rows_of_tasks_are_told_from_unanswered_ones():
    report = TeachingReport()
    for number, row in enumerate([*ROWS, {"messages": user("t"), "label": 0}, {"messages": user("t")}], 1):
        report.look_at_sample(to_sample(Row(row, "r:", number)))
    assert report.sentences() == [
        "1 row has no assistant message: sft learns nothing from them (r:5)",
        "4 rows have a label or documents and no assistant message, so this is data for"
        " --task_type seq_cls, embedding or reranker (r:1, r:2, r:3, ...)",
    ]
