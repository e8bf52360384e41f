"""Exact match and ROUGE on numbers worked out by hand."""

from __future__ import annotations

import random

import pytest

from swift.evaluate.metrics import exact_match, rouge, rouge_tokens


@pytest.mark.parametrize(
    "answer,reference,expected",
    [
        ("Paris", "Paris", 1.0),
        ("  Paris\n", "Paris", 1.0),
        ("a  b\tc", "a b c", 1.0),
        ("paris", "Paris", 0.0),
        ("Paris.", "Paris", 0.0),
        ("", "", 1.0),
        ("", "x", 0.0),
    ],
)
def test_exact_match(answer: str, reference: str, expected: float) -> None:
    assert exact_match(answer, reference) == expected


def test_rouge_by_hand() -> None:
    # the cat sat on the mat / the cat lay on a mat: the, cat, on, mat in common of 6 and 6.
    # Bigrams in common: "the cat" of 5 and 5. Longest common subsequence: the cat on mat.
    scores = rouge("The cat sat on the mat.", "the cat lay on a mat")
    assert scores == {"rouge1": 4 / 6, "rouge2": 1 / 5, "rougeL": 4 / 6}


def test_rouge_with_unlike_lengths_and_repeats() -> None:
    # "b a b" against "a b": unigrams a and one b of 3 and 2; bigram "a b" of 2 and 1; subsequence a b.
    assert rouge("b a b", "a b") == pytest.approx({"rouge1": 0.8, "rouge2": 2 / 3, "rougeL": 0.8})
    # Order matters for rougeL only: c b a against a b c has a subsequence of one.
    assert rouge("c b a", "a b c") == pytest.approx({"rouge1": 1.0, "rouge2": 0.0, "rougeL": 1 / 3})


def test_rouge_of_nothing_is_zero() -> None:
    for answer, reference in (("", "a"), ("a", ""), ("", ""), ("...", "a")):
        assert set(rouge(answer, reference).values()) == {0.0}


def test_chinese_counts_characters() -> None:
    assert rouge_tokens("我爱 Python3,你呢?") == ["我", "爱", "python3", "你", "呢"]
    # 今天天气好 / 今天天气不好: 5 common of 5 and 6; bigrams 今天 天天 天气 of 4 and 5; subsequence of 5.
    assert rouge("今天天气好", "今天天气不好") == pytest.approx(
        {"rouge1": 10 / 11, "rouge2": 6 / 9, "rougeL": 10 / 11}
    )


def test_words_of_other_scripts_stay_whole() -> None:
    assert rouge_tokens("Привет, мир! naïve_test für") == ["привет", "мир", "naïve", "test", "für"]


def test_common_subsequence_equals_the_textbook_table() -> None:
    from swift.evaluate.metrics import _common_subsequence

    draw = random.Random(0)
    for _ in range(100):
        first, second = ([draw.choice("abcd") for _ in range(draw.randrange(0, 90))] for _ in range(2))
        table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
        for i, x in enumerate(first):
            for j, y in enumerate(second):
                table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
        assert _common_subsequence(first, second) == table[-1][-1]
