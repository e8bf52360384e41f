"""Vectors and scores of whole texts, for models that were trained for them (docs/en/tasks.md)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swift.config.sections.task import TaskSection
from swift.core.errors import ConfigError
from swift.models.classifier import is_classifier
from swift.models.head import answer_difference, split_backbone, split_head, split_score
from swift.models.load import ModelBundle

__all__ = ["Pooler", "make_pooler"]

_TOKENS = 8192
_ROWS = 64


class Pooler:
    """What a head makes of the hidden states of each text: of its last token, or of their mean.

    Args:
        model: the transformers model.
        parts: backbone and head of it; None: its logits are read.
        readout: from what the head gives, ``[texts, ...]``, to the values.
        mean: take the mean over the tokens.
    """

    def __init__(
        self,
        model: Any,
        parts: tuple[nn.Module, nn.Module] | None,
        readout: Callable[[Tensor], Tensor] = lambda values: values,
        *,
        mean: bool = False,
    ) -> None:
        self._model, self._parts, self._readout, self._mean = model, parts, readout, mean

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        """One list of numbers for each text, in order. Texts of similar length share a batch.

        Rows are padded on the right, which causal models never see.
        """
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        found: dict[int, list[float]] = {}
        while order:
            size = max(1, min(_ROWS, _TOKENS // len(prompts[order[-1]])))
            chosen, order = order[-size:], order[:-size]
            values = self._values([prompts[index] for index in chosen])
            found.update(zip(chosen, values.tolist(), strict=True))
        return [found[index] for index in range(len(prompts))]

    def _values(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        width, device = max(map(len, prompts)), self._model.device
        rows = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts], device=device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        run = self._model if self._parts is None else self._parts[0]
        output = run(input_ids=rows, use_cache=False)
        states = output.logits if self._parts is None else output.last_hidden_state
        if self._mean:
            inside = torch.arange(width, device=device) < lengths[:, None]
            states = (states.float() * inside[:, :, None]).sum(1) / lengths[:, None]
        else:
            states = states[torch.arange(len(prompts), device=device), lengths - 1]
        return self._readout((states if self._parts is None else self._parts[1](states)).float())


def make_pooler(bundle: ModelBundle, task: TaskSection) -> Pooler | None:
    """What reads values of a model of this task; None for one that only writes text.

    Raises ConfigError for a ``generative_reranker`` whose answers are not one token each.
    """
    model = bundle.model
    if is_classifier(model):
        return Pooler(model, split_score(model))
    if task.task_type == "embedding":
        unit = partial(F.normalize, dim=-1)
        return Pooler(model, split_backbone(model), unit, mean=task.embedding_pooling == "mean")
    if task.task_type == "generative_reranker":
        words = (task.generative_reranker_positive_token, task.generative_reranker_negative_token)
        ids = [bundle.tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
        if any(len(one) != 1 for one in ids):
            raise ConfigError(f"{words} are not one token each for this model")
        return Pooler(model, split_head(model), answer_difference(ids[0][0], ids[1][0]))
    return None
