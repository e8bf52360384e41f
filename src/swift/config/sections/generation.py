"""How answers are generated."""

from __future__ import annotations

from typing import Any

from swift.config.option import Section, option

METRICS: dict[str, tuple[str, ...]] = {
    "exact_match": ("exact_match",),
    "rouge": ("rougeL", "rouge1", "rouge2"),
    "loss": ("loss", "perplexity"),
    "choice": ("choice", "choice_norm"),
    "numeric": ("numeric",),
    "math": ("math",),
    "bleu": ("corpus_bleu", "bleu"),
    "chrf": ("corpus_chrf", "chrf"),
    "json": ("json_valid", "json_match"),
    "regex": ("regex",),
    "pass_at_k": ("pass_at_{k}",),
    "judge": ("judge",),
}
"""Built-in evaluators and what each measures (what they do is in `swift.evaluate.evaluators`)."""


class GenerationSection(Section):
    """Sampling and batch inference."""

    max_new_tokens: int = option(
        512,
        "Longest answer. Batch inference with a model from a run folder, unless set: at most twice the longest "
        "reference answer and 16 tokens.",
        unit="tokens",
        essential=True,
        ge=1,
    )
    temperature: float = option(
        0.0, "Sampling temperature; 0 takes the likeliest token.", essential=True, ge=0
    )
    top_p: float = option(1.0, "Nucleus sampling: smallest set of tokens with this probability.", gt=0, le=1)
    top_k: int = option(0, "Sample among the k likeliest tokens; 0: all.", ge=0)
    repetition_penalty: float = option(1.0, "Divide the logits of tokens already used; 1: off.", gt=0)
    stop_words: list[str] = option([], "Texts that end an answer.")
    stream: bool = option(True, "Show an answer while it is generated (interactive chat).")
    result_path: str | None = option(
        None,
        "Batch inference: JSONL file for the answers; default: infer-TIME.jsonl beside the model or run.",
    )
    metric: list[str] = option(
        ["exact_match", "rouge"],
        f"What is measured against the data's own answers: {', '.join(METRICS)}; your own: FILE.py:function.",
        essential=True,
    )
    metric_args: dict[str, Any] = option({}, 'Options of metrics: JSON object {"NAME": {"option": value}}.')
    num_samples: int = option(
        1, "Batch inference: answers for each row (pass_at_k, means over samples).", ge=1
    )
