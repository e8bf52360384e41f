"""Small models made on the spot: for tests, the demo and benchmarks. Nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from swift.core.errors import UsageError
from swift.core.files import atomic_directory
from swift.models.shrink import TinySizes, find_architecture, shrink_config

__all__ = ["make_tiny_model", "train_tokenizer"]

# Built-in chat template -> (begin of text, end of turn, further control tokens).
_CONTROL_TOKENS: dict[str, tuple[str | None, str, tuple[str, ...]]] = {
    "chatml": (None, "<|im_end|>", ("<|im_start|>",)),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>", ("<|start_header_id|>", "<|end_header_id|>")),
    "mistral": ("<s>", "</s>", ("[INST]", "[/INST]")),
    "gemma": ("<bos>", "<end_of_turn>", ("<start_of_turn>",)),
    "plain": (None, "</s>", ()),
}

_SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "A model learns from examples: a question, then an answer.",
    "What is two plus three? Two plus three is five.",
    "user: hello! assistant: Hello, how can I help you today?",
    "def add(a, b):\n    return a + b\n",
    "0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15",
    "Das ist ein kurzer Satz. Voici une phrase. 这是一个句子。",
)


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, *, special_tokens: Sequence[str] = (), bos_token: str | None = None
) -> Any:
    """A byte-level BPE `tokenizers.Tokenizer` that can encode every text.

    Args:
        texts: what the merges are learned from.
        vocab_size: entries at most, control tokens included; at least 256 + their number.
        special_tokens: control tokens; they get the first ids.
        bos_token: one of them that encoding with special tokens puts in front.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if bos_token is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos_token} $A",
            pair=f"{bos_token} $A {bos_token} $B",
            special_tokens=[(bos_token, tokenizer.token_to_id(bos_token))],
        )
    return tokenizer


def make_tiny_model(
    folder: Path | str,
    *,
    texts: Iterable[str] | None = None,
    vocab_size: int = 512,
    hidden_size: int = 64,
    num_layers: int = 2,
    architecture: str = "qwen3",
    chat_template: str = "chatml",
    seed: int = 0,
    max_position_embeddings: int = 2048,
    dtype: str = "float32",
    config: dict[str, Any] | None = None,
) -> Path:
    """Write a loadable Hugging Face folder: random weights, a BPE tokenizer, a chat template.

    Args:
        folder: replaced if it exists.
        texts: what the tokenizer learns its merges from; default: a few sentences.
        vocab_size: rows of the embedding (at least 256 + control tokens); the tokenizer may find fewer.
        hidden_size: a multiple of 16; heads have 16 channels, half as many key/value heads.
        num_layers: at least; an architecture with more kinds of layers gets one of each.
        architecture: a model type (``qwen3_moe``) or a class of transformers that generates text.
        chat_template: the name of a built-in chat template, or the text of one (chatml's control tokens).
        seed: of the weights; the same arguments give the same files.
        config: further keyword arguments of the config class; they win over what this function chooses.

    Returns:
        ``folder``. Raises UsageError for an unknown architecture.
    """
    import torch
    import transformers
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    if hidden_size < 16 or hidden_size % 16:
        raise UsageError(f"hidden_size {hidden_size} is not a multiple of 16", fix="hidden_size 64")
    model_type, class_name = find_architecture(architecture)
    bos_token, end_token, control = _CONTROL_TOKENS.get(chat_template, _CONTROL_TOKENS["chatml"])
    pad_token = "<|endoftext|>"
    special = [token for token in (pad_token, bos_token, end_token, *control) if token is not None]
    tokenizer = train_tokenizer(texts or _SENTENCES, vocab_size, special_tokens=special, bos_token=bos_token)

    ids = {
        "pad_token_id": tokenizer.token_to_id(pad_token),
        "bos_token_id": tokenizer.token_to_id(bos_token) if bos_token else None,
        "eos_token_id": tokenizer.token_to_id(end_token),
    }
    sizes = TinySizes(hidden_size, num_layers, vocab_size, max_position_embeddings)
    model_config = shrink_config(model_type, class_name, sizes, **ids, **(config or {}))
    model_class = getattr(transformers, class_name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(model_config)

    destination = Path(folder)
    with atomic_directory(destination) as partial:
        model.to(getattr(torch, dtype)).save_pretrained(partial)
        tokenizer.save(str(partial / "tokenizer.json"))
        tokens = {"pad_token": pad_token, "eos_token": end_token, "bos_token": bos_token}
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": max_position_embeddings,
            **tokens,
        }
        (partial / "tokenizer_config.json").write_text(
            json.dumps(settings, indent=2) + "\n", encoding="utf-8"
        )
        (partial / "chat_template.jinja").write_text(_template_text(chat_template), encoding="utf-8")
    return destination


def _template_text(chat_template: str) -> str:
    if "{" in chat_template:
        return chat_template
    path = Path(__file__).parent / "chat_templates" / f"{chat_template}.jinja"
    return path.read_text(encoding="utf-8")
