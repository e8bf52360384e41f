"""Packed rows equal separate runs, in logits and gradients, and nothing leaks between documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from swift.models.attention import VARLEN, register_varlen_attention, supports_varlen, varlen_attention
from swift.models.load import load_model
from swift.models.tiny import make_tiny_model

LENGTHS = [[7, 13, 20], [40], [1, 38, 1]]
EXACT = [
    "llama",
    "mistral",
    "phi3",
    "glm",
    "gpt2",
    "gemma",
    "cohere",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "granite",
]
SLIDING = {
    "mistral": {"sliding_window": 6},
    "phi3": {"sliding_window": 6},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(architecture, config) -> model folder, made once."""
    made: dict[str, Path] = {}

    def make(architecture: str, **config: Any) -> Path:
        key = f"{architecture}{sorted(config.items())}"
        if key not in made:
            folder = tmp_path_factory.mktemp("models") / architecture
            made[key] = make_tiny_model(folder, architecture=architecture, hidden_size=32, config=config)
        return made[key]

    return make


def packed_inputs(lengths: list[list[int]]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    rows = len(lengths)
    return {
        "input_ids": torch.randint(5, 300, (rows, sum(lengths[0])), generator=generator),
        "position_ids": torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths]),
        "document_lengths": lengths,
    }


def separate(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    rows = []
    for ids, lengths in zip(inputs["input_ids"], inputs["document_lengths"], strict=True):
        rows.append(torch.cat([model(input_ids=part[None]).logits for part in ids.split(lengths)], 1))
    return torch.cat(rows)


def gradients(model: Any, logits: torch.Tensor) -> list[torch.Tensor]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss = (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)).sum()
    return list(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("architecture", [*EXACT, *(f"{name} sliding" for name in SLIDING)])
def test_packed_equals_separate(
    folders: Any, architecture: str, dtype: torch.dtype, tolerance: float
) -> None:
    name, _, sliding = architecture.partition(" ")
    folder = folders(name, **(SLIDING[name] if sliding else {}))
    ours = load_model(folder, dtype=dtype, attention="varlen")
    # transformers' eager attention takes its softmax in float32, whatever the dtype.
    other = "sdpa" if dtype == torch.float64 else "eager"
    if name in ("gemma", "cohere"):
        tolerance = max(tolerance, 1e-6)  # Their norms do the same.
    reference = load_model(folder, dtype=dtype, attention=other)
    inputs = packed_inputs(LENGTHS)
    packed, expected = ours(**inputs).logits, separate(reference, inputs)
    assert ours.config._attn_implementation == VARLEN
    torch.testing.assert_close(packed, expected, rtol=0, atol=tolerance)
    pairs = zip(gradients(ours, packed), gradients(reference, expected), strict=True)
    for got, wanted in pairs:
        scale = max(1.0, float(wanted.abs().max()))
        torch.testing.assert_close(got / scale, wanted / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize("architecture", ["qwen3", "mistral sliding"])
def test_nothing_leaks_between_documents(folders: Any, architecture: str) -> None:
    name, _, sliding = architecture.partition(" ")
    model = load_model(folders(name, **(SLIDING[name] if sliding else {})), dtype=torch.float32)
    inputs = packed_inputs([[7, 13, 20]])
    before = model(**inputs).logits
    inputs["input_ids"][:, :7] = 3
    after = model(**inputs).logits
    assert not torch.equal(after[:, :7], before[:, :7])
    assert torch.equal(after[:, 7:], before[:, 7:])


def test_gradient_of_one_document_does_not_reach_another(tiny_model_dir: Path) -> None:
    model = load_model(tiny_model_dir, dtype=torch.float64)
    inputs = packed_inputs([[7, 13, 20]])
    embedded = model.get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, **inputs).logits
    (gradient,) = torch.autograd.grad(logits[:, 7:20].square().sum(), embedded)
    assert gradient[:, 7:20].abs().sum() > 0
    assert gradient[:, :7].abs().sum() == 0 and gradient[:, 20:].abs().sum() == 0


@pytest.mark.parametrize("architecture", ["qwen3", "gpt2", "mistral sliding"])
def test_documents_that_continue_another_are_what_they_are_with_it(folders: Any, architecture: str) -> None:
    """A root of 13 tokens with three ends, and a document of its own: logits and gradients of whole sequences."""
    name, _, sliding = architecture.partition(" ")
    folder = folders(name, **(SLIDING[name] if sliding else {}))
    model = load_model(folder, dtype=torch.float64, attention="varlen")
    lengths = [13, 9, 1, 20, 5]
    ids = torch.randint(5, 300, (sum(lengths),), generator=torch.Generator().manual_seed(2))
    root, *ends, alone = ids.split(lengths)
    positions = [torch.arange(13), *(torch.arange(13, 13 + len(end)) for end in ends), torch.arange(5)]
    branched = model(
        input_ids=ids[None],
        position_ids=torch.cat(positions)[None],
        document_lengths=[lengths],
        document_continues=[[False, True, True, True, False]],
    ).logits[0, 13:]
    whole = [model(input_ids=torch.cat([root, end])[None]).logits[0, 13:] for end in ends]
    expected = torch.cat([*whole, model(input_ids=alone[None]).logits[0]])
    torch.testing.assert_close(branched, expected, rtol=0, atol=1e-10)
    for got, wanted in zip(gradients(model, branched), gradients(model, expected), strict=True):
        # Norms are computed in float32 whatever the dtype, here on sums of several gradients.
        scale = max(1.0, float(wanted.abs().max()))
        torch.testing.assert_close(
            got / scale, wanted / scale, rtol=0, atol=1e-10 if name == "gpt2" else 1e-6
        )


def test_right_padding_needs_no_mask(tiny_model_dir: Path) -> None:
    model = load_model(tiny_model_dir, dtype=torch.float64)
    ids = packed_inputs([[12]])["input_ids"]
    padded = torch.cat([ids, torch.zeros(1, 9, dtype=torch.long)], 1)
    positions = torch.arange(21)[None]
    logits = model(input_ids=padded, position_ids=positions).logits[:, :12]
    torch.testing.assert_close(logits, model(input_ids=ids).logits, rtol=0, atol=1e-12)


def test_works_under_gradient_checkpointing(tiny_model_dir: Path) -> None:
    model = load_model(tiny_model_dir, dtype=torch.float64)
    inputs = packed_inputs(LENGTHS)
    plain = gradients(model, model(**inputs).logits)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    for one, other in zip(plain, gradients(model, model(**inputs).logits), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("architecture", ["qwen3", "mistral sliding", "gpt2"])
def test_generation_equals_that_of_sdpa(folders: Any, architecture: str) -> None:
    """With a cache and padding on the left: the mask must not be dropped."""
    name, _, sliding = architecture.partition(" ")
    folder = folders(name, **(SLIDING[name] if sliding else {}))
    ids = packed_inputs([[12], [12]])["input_ids"]
    mask = torch.ones_like(ids)
    ids[0, :5], mask[0, :5] = 0, 0
    answers = []
    for attention in ("varlen", "sdpa"):
        model = load_model(folder, dtype=torch.float64, attention=attention)
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=12,
            do_sample=False,
            use_cache=True,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=0,
            eos_token_id=-1,
        )
        answers.append(torch.stack(output.logits))
    torch.testing.assert_close(answers[0], answers[1], rtol=0, atol=1e-10)


def test_chunked_prefill_with_a_cache(tiny_model_dir: Path) -> None:
    model = load_model(tiny_model_dir, dtype=torch.float64)
    ids = packed_inputs([[12]])["input_ids"]
    whole = model(input_ids=ids).logits
    first = model(input_ids=ids[:, :5], use_cache=True)
    rest = model(input_ids=ids[:, 5:], past_key_values=first.past_key_values, use_cache=True).logits
    torch.testing.assert_close(rest, whole[:, 5:], rtol=0, atol=1e-12)


def test_documents_and_a_mask_exclude_each_other() -> None:
    module, x = torch.nn.Module(), torch.zeros(1, 2, 4, 8)
    with pytest.raises(ValueError, match="cannot be combined"):
        varlen_attention(module, x, x, x, torch.ones(1, 1, 4, 4, dtype=torch.bool), document_lengths=[[4]])
    with pytest.raises(ValueError, match="soft-capped"):
        varlen_attention(module, x, x, x, None, softcap=30.0)


def test_lengths_must_fill_the_row() -> None:
    x = torch.zeros(1, 2, 4, 8)
    with pytest.raises(RuntimeError, match="split_with_sizes"):
        varlen_attention(torch.nn.Module(), x, x, x, None, document_lengths=[[1, 2]])


def test_where_it_would_not_be_exact_it_is_not_used(folders: Any) -> None:
    import transformers

    register_varlen_attention()
    gemma2 = load_model(folders("gemma2"), dtype=torch.float32)
    assert gemma2.config._attn_implementation != VARLEN
    refused = [
        transformers.Gemma2Config(architectures=["Gemma2ForCausalLM"]),
        transformers.GptOssConfig(architectures=["GptOssForCausalLM"]),
        transformers.Llama4TextConfig(architectures=["Llama4ForCausalLM"]),
        transformers.Qwen3NextConfig(architectures=["Qwen3NextForCausalLM"]),
        transformers.JambaConfig(architectures=["JambaForCausalLM"]),
        transformers.MambaConfig(architectures=["MambaForCausalLM"]),
        transformers.FalconH1Config(architectures=["FalconH1ForCausalLM"]),
        transformers.Lfm2Config(architectures=["Lfm2ForCausalLM"]),
        transformers.BloomConfig(architectures=["BloomForCausalLM"]),
        transformers.T5Config(architectures=["T5ForConditionalGeneration"]),
    ]
    assert [type(config).__name__ for config in refused if supports_varlen(config)] == []
    accepted = [
        transformers.Qwen3Config(architectures=["Qwen3ForCausalLM"]),
        transformers.Gemma3TextConfig(architectures=["Gemma3ForCausalLM"]),
        transformers.DeepseekV3Config(architectures=["DeepseekV3ForCausalLM"]),
    ]
    assert all(supports_varlen(config) for config in accepted)
