"""How alike an answer and its reference are: exact match and ROUGE.

ROUGE is our own: the usual package (rouge-score) pulls in nltk and absl and drops every character outside a-z and
0-9, so that Chinese text has no tokens at all. For English text without stemming the numbers are those of
rouge-score: lower case, words of letters and digits, F1.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

__all__ = ["exact_match", "rouge", "rouge_tokens"]

_CJK = "぀-ヿ㐀-䶿一-鿿가-힯豈-﫿\U00020000-\U0003ffff"
# Each CJK character is a token of its own; elsewhere a run of letters, digits and combining marks is one.
_TOKEN = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")


def exact_match(answer: str, reference: str) -> float:
    """1.0 when both are the same text, else 0.0.

    White space at both ends does not count, and every run of white space inside counts as one space. Case and
    punctuation count.
    """
    return float(answer.split() == reference.split())


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
