"""A tiny random Qwen3 with a tokenizer of words ``w0 w1 ...``, for the smoke tests beside this file."""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

WORDS = 256


def make_model(folder: Path) -> Qwen3ForCausalLM:
    """Write model and tokenizer into ``folder``; returns the model."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=WORDS, hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, head_dim=32, tie_word_embeddings=False, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        max_position_embeddings=256,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).eval()
    model.save_pretrained(folder)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w2"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="w0", eos_token="w1", pad_token="w1", unk_token="w2"
    ).save_pretrained(folder)
    return model


def distance(after: torch.Tensor, before: torch.Tensor, limit: float) -> float:
    """Relative distance of logits. Raises ValueError when it is 0 (nothing was quantised) or above ``limit``."""
    moved = ((after.float() - before).norm() / before.norm()).item()
    if not 0 < moved < limit:
        raise ValueError(f"the logits moved by {moved:.3g}, expected more than 0 and less than {limit}")
    return round(moved, 5)
