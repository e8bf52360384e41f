"""Bytes of quantised weights by hand, and against the tensors that bitsandbytes really holds."""

from __future__ import annotations

import pytest

from swift.config.sections.optimizer import OptimizerSection
from swift.config.sections.quantization import QuantizationSection
from swift.plan.analytic import LinearShape
from swift.plan.quantised import layer_bytes
from swift.train.optimizers import state_bytes

DOUBLE = QuantizationSection(quant_method="bnb", quant_bits=4)
SINGLE = QuantizationSection(quant_method="bnb", quant_bits=4, bnb_4bit_use_double_quant=False)
INT8 = QuantizationSection(quant_method="bnb", quant_bits=8)


def test_a_matrix_of_llama_7b() -> None:
    """4096 x 4096 = 16,777,216 numbers: 262,144 scales, in 1,024 groups of 256."""
    layer = LinearShape("q_proj", 4096, 4096)
    assert layer_bytes(layer, SINGLE) == 8_388_608 + 64 + 4 * 262_144
    assert layer_bytes(layer, DOUBLE) == 8_388_608 + 64 + 262_144 + 4 * 1_024 + 1_024 + 4
    assert layer_bytes(layer, INT8) == 16_777_216 + 4 * 4096
    assert layer_bytes(layer, DOUBLE) / 4096**2 == pytest.approx(0.5 + 1 / 64 + 4 / (64 * 256), rel=2e-4)


@pytest.mark.parametrize("section", [SINGLE, DOUBLE, INT8], ids=["nf4", "double", "int8"])
def test_against_the_tensors_of_a_model(section: QuantizationSection, tiny_model_dir) -> None:
    import torch

    from swift.models.load import load_model
    from swift.models.quantised import is_quantised_linear

    model = load_model(tiny_model_dir, dtype=torch.float32, quantization=section)
    layers = {name: one for name, one in model.named_modules() if is_quantised_linear(one)}
    assert len(layers) == 14
    for name, layer in layers.items():
        tensors = [layer.weight]
        if section.quant_bits == 8:
            tensors.append(layer.state.SCB if layer.state.SCB is not None else layer.weight.SCB)
        else:
            state = layer.weight.quant_state
            tensors += [state.absmax, state.code]
            if state.nested:
                tensors += [state.state2.absmax, state.state2.code, state.offset]
        real = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        assert layer_bytes(LinearShape(name, layer.in_features, layer.out_features), section) == real


def test_optimizer_states_by_hand() -> None:
    """1,000 numbers, of which a 20 x 40 matrix is projected to rank 4: 4 x 40 twice in float32, projection 4 x 20."""
    matrices = [(20, 40)]

    def of(optim: str, **options: object) -> int:
        return state_bytes(OptimizerSection(optim=optim, **options), 1000, 4, matrices)  # type: ignore[arg-type]

    assert of("adamw") == 8000
    assert of("lion") == 4000
    assert of("adamw_8bit") == round(1000 * (2 + 8 / 256))
    assert of("muon") == 200 * 8 + 800 * 4
    assert of("galore_adamw", galore_rank=4) == 200 * 8 + 2 * 4 * 160 + 4 * 80
    assert of("apollo_adamw", galore_rank=4) == 200 * 8 + 2 * 4 * 160


LLAMA_7B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "num_hidden_layers": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "dtype": "float16",
}


def test_where_the_nine_gigabytes_of_a_7b_qlora_go(tmp_path) -> None:
    """The table of docs/en/memory.md: rank 64 on all linear layers, one row of 2,048 tokens, AdamW in 32 bits."""
    import json

    from swift.config.bind import resolve
    from swift.plan.plan import make_plan

    (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B))
    words = [
        "--model",
        str(tmp_path),
        "--device",
        "cuda",
        "--torch_dtype",
        "bfloat16",
        "--max_length",
        "2048",
    ]
    words += ["--per_device_train_batch_size", "1", "--lora_rank", "64", "--quantization_bit", "4"]
    plan = make_plan(resolve("sft", words, planning=True))
    parts = plan.memory["parts"]
    attention, mlp = 8_655_940, 22_544_384 + 704_512 + 4 * 2_752 + 64 + 1_028  # a matrix of each, by hand
    rest = 6_738_415_616 - 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert parts["weights"] == 32 * (4 * attention + 3 * mlp) + 2 * rest
    trained = 64 * 32 * (4 * 2 * 4096 + 3 * (4096 + 11008))
    assert parts["adapters"] == parts["gradients"] == 4 * trained
    assert parts["optimizer"] == 8 * trained
    # While the last layer is computed again: its largest matrix unpacked, and gradients inside it (3 h + 2 f).
    assert parts["temporary"] == 2 * 4096 * 11008 + 2048 * 2 * (3 * 4096 + 2 * 11008)
    assert parts["logits"] == 0
    assert plan.memory["total"] / 1e9 == pytest.approx(8.37, abs=0.05)
