"""Every built-in evaluator against numbers worked out by hand, or an independent library."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest

from swift.config.sections.generation import METRICS
from swift.core.errors import ConfigError
from swift.evaluate.evaluators import EVALUATORS, Case, find_evaluators
from swift.evaluate.metrics import last_number, normalised, pass_at_k, rouge, rouge_tokens
from swift.evaluate.questions import Question


def question(reference: str | None = "x", **fields: Any) -> Question:
    given = {"tools": None, "extra": {}, "messages": [{"role": "user", "content": "q"}], **fields}
    return Question(0, "f:1", reference=reference, **given)


def score(name: str, answer: str | list[str], reference: str | None = "x", **options: Any) -> dict[str, Any]:
    (evaluator,) = find_evaluators([name], {name: options} if options else {})
    answers = [answer] if isinstance(answer, str) else answer
    return evaluator.score([Case(question(reference), answers)])[0]


def test_the_table_and_the_option_name_the_same() -> None:
    assert set(EVALUATORS) == set(METRICS)
    measured = score("exact_match", "a") | score("rouge", "a") | score("numeric", "a") | score("chrf", "a")
    measured |= (
        score("bleu", "a")
        | score("json", "1", "1")
        | score("regex", "a", pattern="b")
        | score("math", "1", "1")
    )
    told = {name for names in METRICS.values() for name in names}
    assert set(measured) <= told


@pytest.mark.parametrize(
    ("options", "answer", "reference", "expected"),
    [
        ({}, "Paris", "paris", 0.0),
        ({"ignore_case": True}, "Paris", "PARIS", 1.0),
        ({"ignore_punctuation": True}, "It's Paris。", "Its Paris", 1.0),
        ({"ignore_articles": True, "ignore_case": True}, "The cat on a mat", "cat on mat", 1.0),
        ({"extract": r"answer is (\w+)"}, "The answer is A. No: the answer is B.", "B", 1.0),
        ({"extract": r"\d+"}, "between 3 and 17", "17", 1.0),
        ({"extract": r"\d+"}, "none", "17", 0.0),
    ],
)
def test_exact_match(options: dict[str, Any], answer: str, reference: str, expected: float) -> None:
    assert score("exact_match", answer, reference, **options) == {"exact_match": expected}


def test_normalisation_keeps_what_is_not_asked_away() -> None:
    assert normalised("  The  Cat's hat! ") == "The Cat's hat!"
    assert normalised("Straße, THE", case=False, punctuation=False, articles=False) == "strasse"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 1,234", 1234.0), ("It is -3.5.", -3.5), ("5 apples, so 2 left", 2.0), ("1e3", 1000.0), (".5", 0.5),
        ("none", None), ("", None), ("e9 .", 9.0), ("3 + 4 = 7.", 7.0), ("$1,000,000", 1e6),
    ],
)  # fmt: skip
def test_last_number(text: str, number: float | None) -> None:
    assert last_number(text) == number


def test_numeric() -> None:
    assert score("numeric", "so it is 42.0 in all", "#### 42") == {"numeric": 1.0}
    assert score("numeric", "41", "42") == {"numeric": 0.0}
    assert score("numeric", "41", "42", tolerance=0.03) == {"numeric": 1.0}
    assert score("numeric", "nothing", "42") == {"numeric": 0.0}


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        (r"The answer is $\frac{1}{2}$.", "0.5", 1.0),
        (r"\boxed{x^2 + 2x + 1}", "$(x+1)^2$", 1.0),
        ("so 12", r"\frac{24}{2}", 1.0),
        (r"$\{1, 2\}$", r"$\{2, 1\}$", 1.0),
        ("13", "12", 0.0),
        ("no idea", "12", 0.0),
    ],
)
def test_math(answer: str, reference: str, expected: float) -> None:
    assert score("math", answer, reference) == {"math": expected}


@pytest.mark.parametrize(
    ("answer", "reference", "options", "valid", "match"),
    [
        ('{"a": 1, "b": [2]}', '{"b": [2], "a": 1}', {}, 1.0, 1.0),
        ('Here:\n```json\n{"a": 2}\n```', '{"a": 1}', {}, 1.0, 0.0),
        ('{"a": 1', '{"a": 1}', {}, 0.0, 0.0),
        ('{"a": 1}', "no json", {"keys": ["a", "b"]}, 0.0, None),
        ("[1]", "no json", {}, 1.0, None),
    ],
)
def test_json(
    answer: str, reference: str, options: dict[str, Any], valid: float, match: float | None
) -> None:
    expected = {"json_valid": valid} | ({} if match is None else {"json_match": match})
    assert score("json", answer, reference, **options) == expected


def test_regex_and_means_over_samples() -> None:
    assert score("regex", " 12\n", pattern=r"\d+") == {"regex": 1.0}
    assert score("regex", "12 x", pattern=r"\d+") == {"regex": 0.0}
    assert score("regex", "12 x", pattern=r"\d+", full=False) == {"regex": 1.0}
    assert score("exact_match", ["x", "y", "x", "z"]) == {"exact_match": 0.5}


SENTENCES = [
    "the cat sat on the mat", "the cat lay on a mat", "a quick brown fox jumps over the lazy dog", "cat the the the",
    "今天天气不好", "今天天气好", "我爱 Python3", "", "...", "It costs 3.50 dollars, doesn't it?",
]  # fmt: skip


def test_rouge_is_that_of_rouge_score() -> None:
    """With its own tokens where the text is English, and with ours (CJK characters one by one) everywhere."""
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import Tokenizer

    class Ours(Tokenizer):
        def tokenize(self, text: str) -> list[str]:
            return rouge_tokens(text)

    kinds = ["rouge1", "rouge2", "rougeL"]
    theirs, ours = RougeScorer(kinds), RougeScorer(kinds, tokenizer=Ours())
    draw = random.Random(1)
    words = "the cat sat on a mat and ran 3 times it is".split()
    pairs = list(itertools.product(SENTENCES, SENTENCES))
    pairs += [(" ".join(draw.choices(words, k=30)), " ".join(draw.choices(words, k=20))) for _ in range(20)]
    for answer, reference in pairs:
        expected = {name: found.fmeasure for name, found in ours.score(reference, answer).items()}
        assert rouge(answer, reference) == pytest.approx(expected)
        if (answer + reference).isascii():
            expected = {name: found.fmeasure for name, found in theirs.score(reference, answer).items()}
            assert rouge(answer, reference) == pytest.approx(expected)
    assert theirs.score("今天天气不好", "今天天气好")["rouge1"].fmeasure == 0.0  # why the tokens are ours


def test_bleu_and_chrf_are_sacrebleus() -> None:
    import sacrebleu

    bleu, chrf = find_evaluators(["bleu", "chrf"], {"chrf": {"word_order": 2}})
    english, chinese = ("the cat sat on the mat", "the cat sat on a mat"), ("今天天气好", "今天天气不好")
    for answer, reference in (english, chinese):
        tokens = "zh" if answer == chinese[0] else "13a"
        case = [Case(question(reference), [answer])]
        assert bleu.score(case) == [
            {"bleu": sacrebleu.sentence_bleu(answer, [reference], tokenize=tokens).score}
        ]
        assert chrf.score(case) == [
            {"chrf": sacrebleu.sentence_chrf(answer, [reference], word_order=2).score}
        ]
    # 5 of 6 words, 3 of 5 pairs, 2 of 4 triples, 1 of 3 fours; equal lengths, so no penalty.
    assert bleu.score([Case(question(english[1]), [english[0]])])[0]["bleu"] == pytest.approx(
        100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25
    )
    corpus = bleu.row.corpus
    assert corpus is not None
    answers, references = [english[0], "it is"], [english[1], "it was"]
    assert corpus(answers, references) == {"corpus_bleu": sacrebleu.corpus_bleu(answers, [references]).score}


def test_pass_at_k_equals_the_mean_over_all_subsets() -> None:
    for samples in range(1, 8):
        for correct in range(samples + 1):
            outcomes = [True] * correct + [False] * (samples - correct)
            for k in range(1, samples + 1):
                chosen = list(itertools.combinations(outcomes, k))
                assert pass_at_k(samples, correct, k) == pytest.approx(sum(map(any, chosen)) / len(chosen))
    for wrong in ((3, 4, 1), (3, 1, 4), (3, 1, 0)):
        with pytest.raises(ValueError, match="samples"):
            pass_at_k(*wrong)


def test_a_metric_of_the_users(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "def shout(answer, question):\n    return answer.isupper() and question.reference == 'x'\n"
        "def two(answer, question):\n    return {'length': len(answer), 'vowels': sum(c in 'aeiou' for c in answer)}\n"
    )
    assert score(f"{file}:shout", "YES") == {"shout": 1.0}
    assert score(f"{file}:two", "meow") == {"length": 4.0, "vowels": 2.0}
    with pytest.raises(ConfigError, match="no function 'gone'"):
        find_evaluators([f"{file}:gone"], {})
    file.write_text("import nothing_of_this_name")
    with pytest.raises(ConfigError, match="cannot be imported"):
        find_evaluators([f"{file}:shout"], {})


@pytest.mark.parametrize(
    ("names", "options", "says"),
    [
        (["exact_mach"], {}, "did you mean exact_match"),
        (["exact_match"], {"exact_match": {"ignore_cases": True}}, "did you mean ignore_case"),
        (["regex"], {}, "regex needs pattern"),
        (["regex"], {"regex": {"pattern": "("}}, "not a regular expression"),
        (["rouge"], {"regex": {"pattern": "a"}}, "not among the metrics"),
        (["mine.py:f"], {}, "no such file"),
    ],
)
def test_what_is_refused(names: list[str], options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        find_evaluators(names, options)
    assert says in caught.value.render()
