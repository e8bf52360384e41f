"""What the model learns from, and how samples become batches."""

from __future__ import annotations

from typing import Literal

from swift.config.option import Section, option


class DataSection(Section):
    """Data sets, mixing, tokenisation, batching."""

    dataset: list[str] = option(
        [],
        "Training data: files, folders, or names (swift data ls; owner/name of a hub, which HF:: or MS:: chooses);"
        " NAME:subset#500 takes 500 rows of a subset.",
        essential=True,
    )
    val_dataset: list[str] = option([], "Validation data (for infer: the rows to answer).", essential=True)
    split_dataset_ratio: float = option(
        0.0,
        "Share of the training rows set aside for validation when no val_dataset is given.",
        ge=0,
        lt=1,
        essential=True,
    )
    dataset_weights: list[float] = option(
        [], "Mixing weights, one per data set: rows are drawn in these proportions."
    )
    model_name: list[str] = option(
        [], "What the model calls itself in self-cognition data: one text, or a Chinese and an English one."
    )
    model_author: list[str] = option([], "Who made it, for self-cognition data: as model_name.")
    streaming: bool = option(
        False, "Read and tokenise the rows while training, without a token cache; needs max_steps."
    )
    shuffle_buffer_size: int = option(
        1000, "Streaming: rows that are held, shuffled and made into batches at a time.", unit="rows", ge=1
    )
    stopping_strategy: Literal["first_exhausted", "all_exhausted"] = option(
        "first_exhausted",
        "Streaming with dataset_weights: an epoch ends with the first data set, or when all are used up.",
    )
    columns: dict[str, str] = option({}, "Rename columns before reading: JSON object {old: new}.")
    on_bad_rows: Literal["error", "skip"] = option(
        "error", "Rows that cannot be read: stop with file and line, or skip them and report the count."
    )
    dataset_shuffle: bool = option(True, "Shuffle the training rows, anew in every epoch.")
    data_seed: int | None = option(None, "Seed of data order, sampling and splitting; default: seed.")
    dataset_num_proc: int | None = option(
        None, "Processes that tokenise; default: the cores at hand, for large data only.", ge=1
    )
    load_from_cache_file: bool = option(
        True, "Reuse tokens cached from the same data, template and tokenizer."
    )
    token_cache_gib: float = option(
        100.0,
        "What the token cache may take; data not used for longest is deleted from it (none of the last day).",
        unit="GiB",
        gt=0,
    )
    max_length: int | None = option(
        None,
        "Longest sample, and the row length when packing; default: what the model allows, 2048 at most.",
        unit="tokens",
        essential=True,
        ge=8,
    )
    truncation_strategy: Literal["delete", "left", "right", "split"] = option(
        "delete", "Samples longer than max_length: leave out, cut left, cut right, or (pt) split."
    )
    packing: bool = option(
        False, "Fill rows of max_length with several samples that cannot see each other.", essential=True
    )
    padding_free: bool | None = option(
        None,
        "Join the samples of a micro-batch in one row, without padding; default: where the model's attention can keep"
        " documents apart (else rows are padded).",
    )
    group_by_length: bool = option(
        True, "Padded rows: put samples of similar length into one micro-batch, so that little is padding."
    )
    dataloader_num_workers: int = option(0, "Processes that prepare batches ahead; 0: a thread.", ge=0)
