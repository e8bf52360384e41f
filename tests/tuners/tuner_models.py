"""Models of a few thousand weights for the tuner tests."""

from __future__ import annotations

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM

VOCABULARY = 61


def tiny_qwen3(*, tied: bool = False, seed: int = 0) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=24,
        tie_word_embeddings=tied,
    )
    return Qwen3ForCausalLM(config).eval()


def tiny_gpt2(*, seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    return GPT2LMHeadModel(config).eval()


def tokens(rows: int = 2, width: int = 7, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (rows, width), generator=torch.Generator().manual_seed(seed))


def shake(parameters: dict[str, nn.Parameter], seed: int = 2, std: float = 0.2) -> None:
    """Random values, so that the adapters (zero at the start) do something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
