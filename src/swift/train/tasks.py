"""What a task changes in a run: the head of the model, what the engine reads, the loss, the evaluation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from swift.config.schema import Config, Resolved
from swift.config.sections.rlhf import DPO_TYPES, RlhfSection
from swift.config.sections.task import TaskSection
from swift.config.sections.tuner import TunerSection
from swift.core.errors import ConfigError
from swift.data.tokens import TokenDataset
from swift.models.classifier import SCORE, ClassifierHead
from swift.models.head import answer_difference, split_backbone, split_score
from swift.objectives.classification import MultiLabelLoss, RegressionLoss, SingleLabelLoss
from swift.objectives.embedding import InfonceLoss, MatryoshkaLoss, PairLoss
from swift.objectives.knobs import knobs_of
from swift.objectives.pooled import PooledLoss, PooledObjective
from swift.objectives.preference.losses import PREFERENCE_LOSSES
from swift.objectives.preference.objective import KtoLoss, PreferenceLoss, RewardLoss
from swift.objectives.ranking import ListwiseLoss, PointwiseLoss
from swift.parallel.answers import AnswerEngine, PolicyEngine
from swift.parallel.native import NativeEngine
from swift.parallel.pooled import PooledEngine, mean_of_tokens

__all__ = ["check_negatives", "classifier_head", "engine_of", "pooled_objective", "tuner_of"]


def classifier_head(resolved: Resolved) -> ClassifierHead | None:
    """The score head of the model, None where it stays a causal model."""
    task = resolved.config.task
    if not task.has_score_head:
        return None
    return ClassifierHead(task.num_labels or 1, task.problem_type, resolved.config.training.seed)


def tuner_of(resolved: Resolved) -> TunerSection:
    """The tuner options; beside LoRA the score head is trained in full."""
    tuner = resolved.config.tuner
    if not resolved.config.task.has_score_head or tuner.trains_whole_model:
        return tuner
    return tuner.model_copy(update={"modules_to_save": [*tuner.modules_to_save, SCORE]})


def pooled_objective(config: Config) -> PooledObjective | None:
    """The loss of a task over whole sequences; None where every token is a target of its own."""
    if config.rlhf.is_policy:
        return None
    if config.rlhf.rlhf_type is not None:
        return PooledObjective(_preference_loss(config.rlhf))
    return None if config.task.task_type == "causal_lm" else PooledObjective(_loss_of(config.task))


def _preference_loss(rlhf: RlhfSection) -> PooledLoss:
    if rlhf.rlhf_type == "rm":
        return RewardLoss(rlhf.center_rewards_coefficient)
    assert rlhf.beta is not None
    kinds = rlhf.rlhf_loss_type
    if rlhf.rlhf_type == "kto":
        return KtoLoss(rlhf.beta, rlhf.desirable_weight, rlhf.undesirable_weight, kinds[0])
    options = {
        "label_smoothing": rlhf.label_smoothing or None,  # exo_pair in a mixture has a default of its own
        "discopop_tau": rlhf.discopop_tau,
        "cpo_alpha": rlhf.cpo_alpha,
        "simpo_gamma": rlhf.simpo_gamma,
    }
    return PreferenceLoss(
        kinds=dict(zip(kinds, rlhf.loss_weights or [1.0] * len(kinds), strict=True)),
        beta=rlhf.beta,
        knobs={
            kind: {
                name: options[name]
                for name in knobs_of(PREFERENCE_LOSSES[kind])
                if options.get(name) is not None
            }
            for kind in kinds
        },
        rpo_alpha=rlhf.rpo_alpha or 0.0,
        divergence=(rlhf.f_divergence_type, rlhf.f_alpha_divergence_coef),
        has_reference=rlhf.rlhf_type in DPO_TYPES and not rlhf.reference_free,
        average=rlhf.rlhf_type in ("orpo", "simpo"),
    )


def _loss_of(task: TaskSection) -> PooledLoss:
    if task.task_type == "seq_cls":
        if task.problem_type == "regression":
            return RegressionLoss()
        return MultiLabelLoss() if task.problem_type == "multi_label_classification" else SingleLabelLoss()
    if task.loss_type == "pointwise_reranker":
        return PointwiseLoss()
    if task.loss_type == "listwise_reranker":
        return ListwiseLoss(task.listwise_reranker_temperature, task.listwise_reranker_min_group_size)
    loss: PooledLoss
    if task.loss_type == "infonce":
        loss = InfonceLoss(
            temperature=task.infonce_temperature,
            in_batch=task.infonce_use_batch,
            fake_margin=task.infonce_fake_neg_margin if task.infonce_mask_fake_negative else None,
            include_qq=task.infonce_include_qq,
            include_dd=task.infonce_include_dd,
        )
    else:
        assert task.loss_type in ("cosine_similarity", "contrastive", "online_contrastive")
        loss = PairLoss(task.loss_type, task.contrastive_margin)
    return MatryoshkaLoss(loss, tuple(task.mrl_dims)) if task.mrl_dims else loss


def engine_of(config: Config, model: Any, tokenizer: Any) -> Callable[..., NativeEngine]:
    """The engine that reads what the task needs.

    Raises ConfigError for answers that are not one token each, and vectors shorter than ``mrl_dims``.
    """
    task, rlhf = config.task, config.rlhf
    if rlhf.is_policy:
        return PolicyEngine
    if rlhf.rlhf_type is not None and not task.has_score_head:
        return partial(AnswerEngine, ld_alpha=rlhf.ld_alpha, mismatched=rlhf.rlhf_type == "kto")
    if task.task_type == "causal_lm":
        return NativeEngine
    if task.has_score_head:
        return partial(PooledEngine, split=split_score)
    if task.task_type == "generative_reranker":
        answers = [
            _token(tokenizer, getattr(task, name), f"--{name}")
            for name in ("generative_reranker_positive_token", "generative_reranker_negative_token")
        ]
        return partial(PooledEngine, readout=answer_difference(*answers))
    size = model.config.get_text_config().hidden_size
    if task.mrl_dims and max(task.mrl_dims) > size:
        raise ConfigError(
            f"the vectors of this model have {size} numbers, not {max(task.mrl_dims)}",
            where="--mrl_dims",
            fix=f"--mrl_dims {size} {size // 2}",
        )
    pool = mean_of_tokens if task.embedding_pooling == "mean" else None
    return partial(PooledEngine, split=split_backbone, pool=pool)


def _token(tokenizer: Any, text: str, where: str) -> int:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise ConfigError(
            f"{text!r} is {len(ids)} tokens for this model; the answer is read as one",
            where=where,
            fix="name another word, such as Yes and No",
        )
    return int(ids[0])


def check_negatives(resolved: Resolved, dataset: TokenDataset) -> None:
    """Refuse InfoNCE that has nothing to compare with: one row a micro-batch, and no negatives in the rows."""
    task, training = resolved.config.task, resolved.config.training
    if task.loss_type != "infonce" or (task.infonce_use_batch and training.per_device_train_batch_size > 1):
        return
    if any((_num_sequences(store) > 2).any() for store in dataset.stores):
        return
    raise ConfigError(
        "there is nothing to compare a text with: the rows have no negatives,"
        + (
            " and a micro-batch is one row"
            if task.infonce_use_batch
            else " and those of a batch are not used"
        ),
        where="--loss_type infonce",
        fix="--per_device_train_batch_size 16 --gradient_accumulation_steps 1"
        if task.infonce_use_batch
        else "leave out --infonce_use_batch, or add negative_messages",
    )


def _num_sequences(store: Any) -> np.ndarray:
    """Sequences of each sample."""
    if not len(store):
        return np.zeros(0, np.int64)
    counts: np.ndarray = np.add.reduceat(store.learned, store.offsets[:-1], dtype=np.int64)
    return counts
