"""Vectors and scores of whole texts, for models that were trained for them (docs/en/tasks.md)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swift.core.errors import ConfigError
from swift.models.classifier import is_classifier
from swift.models.head import split_head
from swift.models.load import ModelBundle
from swift.parallel.pooled import answer_difference, split_backbone, split_score

__all__ = ["Pooler", "make_pooler"]

_TOKENS = 8192
_ROWS = 64


class Pooler:
    """What a head makes of the hidden state at the last token of each text.

    Args:
        model: the transformers model.
        parts: backbone and head of it; None: its logits are read.
        readout: from what the head gives, ``[texts, ...]``, to the values.
    """

    def __init__(
        self, model: Any, parts: tuple[nn.Module, nn.Module] | None, readout: Callable[[Tensor], Tensor]
    ) -> None:
        self._model, self._parts, self._readout = model, parts, readout

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        """One list of numbers for each text, in order. Texts of similar length share a batch.

        Rows are padded on the right, which causal models never see.
        """
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        found: dict[int, list[float]] = {}
        while order:
            width = len(prompts[order[-1]])
            size = max(1, min(_ROWS, _TOKENS // width))
            chosen, order = order[-size:], order[:-size]
            values = self._values([prompts[index] for index in chosen])
            found.update(zip(chosen, values.tolist(), strict=True))
        return [found[index] for index in range(len(prompts))]

    def _values(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        width = max(map(len, prompts))
        rows = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts])
        rows = rows.to(self._model.device)
        ends = torch.tensor([len(prompt) - 1 for prompt in prompts], device=rows.device)
        places = torch.arange(len(prompts), device=rows.device)
        if self._parts is None:
            values = self._model(input_ids=rows, use_cache=False).logits[places, ends]
        else:
            backbone, head = self._parts
            values = head(backbone(input_ids=rows, use_cache=False).last_hidden_state[places, ends])
        return self._readout(values.float())


def make_pooler(bundle: ModelBundle, task: str, answers: tuple[str, str]) -> Pooler | None:
    """What reads values of a model of this task; None for one that only writes text.

    Args:
        answers: the words whose difference is the score of a ``generative_reranker``.
    """
    model = bundle.model
    if is_classifier(model):
        return Pooler(model, split_score(model), lambda values: values)
    if task == "embedding":
        return Pooler(model, split_backbone(model), lambda values: F.normalize(values, dim=-1))
    if task == "generative_reranker":
        ids = [bundle.tokenizer(word, add_special_tokens=False)["input_ids"] for word in answers]
        if any(len(one) != 1 for one in ids):
            raise ConfigError(f"{answers} are not one token each for this model")
        return Pooler(model, split_head(model), answer_difference(ids[0][0], ids[1][0]))
    return None
