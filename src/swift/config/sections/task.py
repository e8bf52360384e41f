"""What is learned from a text: its next tokens, a class or score, or a vector."""

from __future__ import annotations

from typing import Literal

from swift.config.option import Section, option


class TaskSection(Section):
    """The task, and the options of its losses."""

    task_type: Literal["causal_lm", "seq_cls", "embedding", "reranker", "generative_reranker"] = option(
        "causal_lm",
        "What is learned: to write text, to classify it, to embed it, or to score documents for a query.",
    )
    num_labels: int | None = option(
        None, "seq_cls: classes, or values of a regression; default: 1 for a regression.", ge=1
    )
    problem_type: (
        Literal["single_label_classification", "multi_label_classification", "regression"] | None
    ) = option(None, "seq_cls: what a label is; default: one class, or with num_labels 1 a number.")
    loss_type: (
        Literal[
            "cross_entropy",
            "mse",
            "cosine_similarity",
            "contrastive",
            "online_contrastive",
            "infonce",
            "pointwise_reranker",
            "listwise_reranker",
        ]
        | None
    ) = option(
        None,
        "Loss of the task; default: by problem_type, infonce (embedding), pointwise_reranker (rerankers).",
    )
    infonce_temperature: float = option(0.1, "infonce: similarities are divided by this.", gt=0)
    infonce_use_batch: bool = option(
        True, "infonce: the texts of the other rows of the micro-batch are negatives as well."
    )
    infonce_hard_negatives: int | None = option(
        None, "infonce: negatives used of each row, the first ones; default: all.", ge=0
    )
    infonce_mask_fake_negative: bool = option(
        False, "infonce: leave out negatives that are more similar than the positive by the margin."
    )
    infonce_fake_neg_margin: float = option(0.1, "infonce: the margin of infonce_mask_fake_negative.", ge=0)
    infonce_include_qq: bool = option(False, "infonce: the other queries are negatives of a query.")
    infonce_include_dd: bool = option(False, "infonce: the other texts are negatives of the positive text.")
    contrastive_margin: float = option(
        0.5, "contrastive, online_contrastive: cosine distance that texts of label 0 should have.", gt=0
    )
    mrl_dims: list[int] = option(
        [],
        "embedding: the loss is the mean over vectors cut to these sizes (Matryoshka, arXiv 2205.13147).",
    )
    embedding_pooling: Literal["last", "mean"] = option(
        "last",
        "embedding: a text's vector is the hidden state of its last token, or the mean over its tokens.",
    )
    max_positive_samples: int = option(1, "Rerankers: relevant documents used of each row.", ge=1)
    max_negative_samples: int = option(7, "Rerankers: other documents used of each row.", ge=0)
    listwise_reranker_temperature: float = option(1.0, "listwise_reranker: scores are divided by this.", gt=0)
    listwise_reranker_min_group_size: int = option(
        2, "listwise_reranker: smallest list of a relevant and other documents that counts.", ge=2
    )
    generative_reranker_positive_token: str = option("yes", "generative_reranker: answer for relevant.")
    generative_reranker_negative_token: str = option("no", "generative_reranker: answer for irrelevant.")

    @property
    def has_score_head(self) -> bool:
        """The model is a ``*ForSequenceClassification`` whose head is trained."""
        return self.task_type in ("seq_cls", "reranker")

    @property
    def is_in_batch(self) -> bool:
        """The loss compares the rows of a micro-batch with one another."""
        return self.loss_type == "online_contrastive" or (
            self.loss_type == "infonce" and self.infonce_use_batch
        )
