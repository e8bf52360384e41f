"""How good one answer is: pure functions of texts.

ROUGE is our own (docs/decisions/022-evaluators.md); rouge-score is the reference it is tested against.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

__all__ = [
    "exact_match",
    "is_cjk",
    "last_number",
    "normalised",
    "pass_at_k",
    "read_json",
    "rouge",
    "rouge_tokens",
]

_CJK = "぀-ヿ㐀-䶿一-鿿가-힯豈-﫿\U00020000-\U0003ffff"
# Each CJK character is a token of its own; elsewhere a run of letters, digits and combining marks is one.
_TOKEN = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")
_NUMBER = re.compile(r"[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")
_FENCE = re.compile(r"```[\w+-]*\n(.*?)```", re.DOTALL)
_ARTICLES = re.compile(r"\b(a|an|the)\b", re.IGNORECASE)


def exact_match(answer: str, reference: str) -> float:
    """1.0 when both are the same text, else 0.0.

    White space at both ends does not count, and every run of white space inside counts as one space. Case and
    punctuation count (`normalised` takes them away).
    """
    return float(answer.split() == reference.split())


def normalised(text: str, *, case: bool = True, punctuation: bool = True, articles: bool = True) -> str:
    """The text without what is False: differences of case, punctuation, English articles.

    With all three False this is the normalisation of SQuAD (Rajpurkar et al. 2016, arXiv 1606.05250), for punctuation
    of any script.
    """
    if not case:
        text = text.casefold()
    if not punctuation:
        text = "".join(char for char in text if not unicodedata.category(char).startswith("P"))
    if not articles:
        text = _ARTICLES.sub(" ", text)
    return " ".join(text.split())


def is_cjk(text: str) -> bool:
    """True when a character of it is Chinese, Japanese or Korean."""
    return re.search(rf"[{_CJK}]", text) is not None


def last_number(text: str) -> float | None:
    """The number that stands last in a text; ``1,234`` and ``1e3`` are one each. None without any."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def read_json(text: str) -> Any:
    """The JSON value that an answer is: the text itself, or its only block in backticks. ValueError for none."""
    blocks = _FENCE.findall(text)
    return json.loads(blocks[0] if len(blocks) == 1 else text)


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Chance that one of ``k`` samples passes, estimated without bias from ``num_samples`` >= k of which
    ``num_correct`` passed: 1 - C(n - c, k) / C(n, k) (Chen et al. 2021, arXiv 2107.03374, equation 1)."""
    if not 0 <= num_correct <= num_samples or not 1 <= k <= num_samples:
        raise ValueError(f"{num_correct} right of {num_samples} samples, k {k}")
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def rouge_tokens(text: str) -> list[str]:
    """The tokens ROUGE counts: lower-case words, CJK characters one by one."""
    return _TOKEN.findall(text.lower())


def rouge(answer: str, reference: str) -> dict[str, float]:
    """``rouge1``, ``rouge2`` and ``rougeL``: F1 between 0 and 1 (Lin 2004, aclanthology W04-1013).

    N-gram overlap (each n-gram counts at most as often as it stands in the other text) and longest common
    subsequence over the whole text. Where either text has no n-gram, the score is 0.
    """
    found, wanted = rouge_tokens(answer), rouge_tokens(reference)
    return {
        "rouge1": _ngram_f1(found, wanted, 1),
        "rouge2": _ngram_f1(found, wanted, 2),
        "rougeL": _f1(_common_subsequence(found, wanted), len(found), len(wanted)),
    }


def _f1(common: int, num_found: int, num_wanted: int) -> float:
    """Harmonic mean of precision ``common / num_found`` and recall ``common / num_wanted``."""
    return 2 * common / (num_found + num_wanted) if common else 0.0


def _ngram_f1(found: Sequence[str], wanted: Sequence[str], size: int) -> float:
    counts = [
        Counter(tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1))
        for tokens in (found, wanted)
    ]
    return _f1((counts[0] & counts[1]).total(), counts[0].total(), counts[1].total())


def _common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence, with bit-parallel rows (Hyyrö 2004): one integer step per token."""
    places: dict[str, int] = {}
    for index, token in enumerate(second):
        places[token] = places.get(token, 0) | 1 << index
    full = (1 << len(second)) - 1
    row = full
    for token in first:
        matches = row & places.get(token, 0)
        row = ((row + matches) | (row - matches)) & full
    return len(second) - row.bit_count()
