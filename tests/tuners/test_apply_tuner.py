"""Which modules get adapters, what is frozen, and what the model is with the adapter off."""

from __future__ import annotations

import copy

import pytest
import torch
from tuner_models import shake, tiny_gpt2, tiny_qwen3, tokens

from swift.config.sections.tuner import TunerSection
from swift.core.errors import ConfigError, ModelError
from swift.tuners.apply import apply_tuner, remove_adapter, tuned_model
from swift.tuners.lora import lora_layers

LEAVES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def full(**options: object) -> TunerSection:
    return TunerSection(tuner_type="full", **options)


def test_all_linear_leaves_out_the_head() -> None:
    tuned = apply_tuner(tiny_qwen3(), TunerSection(lora_rank=4))
    leaves = [name.rpartition(".")[2] for name in lora_layers(tuned.model)]
    assert leaves == LEAVES * 2
    shapes = 4 * sum(a + b for a, b in [(16, 16), (16, 8), (16, 8), (16, 16), (16, 24), (16, 24), (24, 16)])
    assert tuned.num_trainable == 2 * shapes
    assert tuned.num_total == sum(p.numel() for p in tiny_qwen3().parameters()) + 2 * shapes
    assert all("lora_" in name for name in tuned.named_trainable())


def test_all_linear_on_gpt2_finds_conv1d() -> None:
    tuned = apply_tuner(tiny_gpt2(), TunerSection())
    leaves = [name.rpartition(".")[2] for name in lora_layers(tuned.model)]
    assert leaves == ["c_attn", "c_proj", "c_fc", "c_proj"] * 2


@pytest.mark.parametrize(
    "options,expected",
    [
        ({"target_modules": ["q_proj"]}, ["0.self_attn.q_proj", "1.self_attn.q_proj"]),
        (
            {"target_modules": ["1.self_attn.q_proj", "layers.0.mlp.up_proj"]},
            ["0.mlp.up_proj", "1.self_attn.q_proj"],
        ),
        (
            {"target_regex": r".*layers\.1\.self_attn\.[qk]_proj"},
            ["1.self_attn.q_proj", "1.self_attn.k_proj"],
        ),
    ],
)
def test_targets_by_name_and_expression(options: dict[str, object], expected: list[str]) -> None:
    tuned = apply_tuner(tiny_qwen3(), TunerSection(**options))
    assert [name.removeprefix("model.layers.") for name in lora_layers(tuned.model)] == expected


@pytest.mark.parametrize(
    "options,message,fix",
    [
        ({"target_modules": ["q_porj"]}, "no linear layer is called 'q_porj'", "--target_modules q_proj"),
        (
            {"target_modules": ["q_proj", "v_prj", "xyz"]},
            "no linear layer is called 'v_prj'",
            "--target_modules q_proj v_proj",
        ),
        ({"target_modules": ["embed_tokens"]}, "is not a linear layer", "--modules_to_save embed_tokens"),
        ({"target_regex": "q_proj"}, "matches no linear layer", "q_proj"),
        ({"target_regex": "("}, "not a regular expression", None),
        ({"modules_to_save": ["lm_haed"]}, "no module is called 'lm_haed'", "--modules_to_save lm_head"),
        ({"modules_to_save": ["rotary_emb"]}, "has no weights", None),
    ],
)
def test_wrong_names_are_explained(options: dict[str, object], message: str, fix: str | None) -> None:
    with pytest.raises(ConfigError) as caught:
        apply_tuner(tiny_qwen3(), TunerSection(**options))
    assert message in caught.value.message
    assert fix is None or fix in (caught.value.fix or "")


def test_tied_embeddings_are_refused_as_saved_modules() -> None:
    with pytest.raises(ConfigError, match="shares its weights with") as caught:
        apply_tuner(tiny_qwen3(tied=True), TunerSection(modules_to_save=["lm_head"]))
    assert "model.embed_tokens" in caught.value.message


def test_the_disabled_adapter_is_exactly_the_base() -> None:
    base = tiny_qwen3()
    expected = base(tokens()).logits
    tuned = apply_tuner(
        copy.deepcopy(base), TunerSection(modules_to_save=["lm_head", "embed_tokens", "norm"])
    )
    assert torch.equal(tuned.model(tokens()).logits, expected), "a fresh adapter changes nothing"
    shake(tuned.named_trainable())
    assert (tuned.model(tokens()).logits - expected).abs().max() > 0.1
    with tuned.adapter_disabled():
        assert torch.equal(tuned.model(tokens()).logits, expected)


def test_saved_modules_are_trained_in_float32_and_compute_in_the_models_precision() -> None:
    model = tiny_qwen3().to(torch.bfloat16)
    tuned = apply_tuner(model, TunerSection(modules_to_save=["lm_head", "norm"], target_modules=["q_proj"]))
    trained = tuned.named_trainable()
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert [name for name in trained if "copies" in name] == [
        "model.norm.copies.default.weight",
        "lm_head.copies.default.weight",
    ]
    logits = model(tokens()).logits
    assert logits.dtype == torch.bfloat16
    logits.float().pow(2).sum().backward()
    assert all(p.grad is not None for p in trained.values())
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.lm_head.base.weight.grad is None


def test_the_start_depends_on_seed_and_name_not_on_the_other_modules() -> None:
    def start(seed: int, **options: object) -> torch.Tensor:
        tuned = apply_tuner(tiny_qwen3(), TunerSection(**options), seed=seed)
        return tuned.model.get_parameter("model.layers.1.self_attn.k_proj.lora_A.default").detach()

    assert torch.equal(start(3), start(3, target_modules=["k_proj"]))
    assert not torch.equal(start(3), start(4))
    tuned = apply_tuner(tiny_qwen3(), TunerSection(target_modules=["k_proj"]))
    first, second = (layer.lora_A["default"] for layer in lora_layers(tuned.model).values())
    assert not torch.equal(first, second)


def test_one_parameter_set_per_adapter() -> None:
    model = tiny_qwen3()
    first = apply_tuner(model, TunerSection(lora_rank=2), adapter_name="a", seed=1)
    second = apply_tuner(
        model, TunerSection(lora_rank=4, target_modules=["q_proj"]), adapter_name="b", seed=1
    )
    tuned = tuned_model(model)
    sets = tuned.parameter_sets()
    assert first.parameter_sets() == {"default": sets["a"]} and second.parameter_sets() == {
        "default": sets["b"]
    }
    assert list(sets) == ["a", "b"]
    assert len(sets["a"]) == 28 and len(sets["b"]) == 4
    assert sets["a"].keys().isdisjoint(sets["b"])
    assert sum(len(one) for one in sets.values()) == len(tuned.named_trainable())


def test_mixed_rows_through_a_whole_model_equal_separate_runs() -> None:
    model = tiny_qwen3()
    apply_tuner(model, TunerSection(lora_rank=2, modules_to_save=["lm_head"]), adapter_name="a")
    tuned = apply_tuner(model, TunerSection(lora_rank=4), adapter_name="b")
    shake(tuned.named_trainable())
    assert tuned.switch is not None
    ids = tokens(3)
    with tuned.switch.mixed([("a", 1), ("b", 2)]):
        mixed = model(ids).logits
    with tuned.switch.use("a"):
        alone = model(ids[:1]).logits
    with tuned.switch.use("b"):
        other = model(ids[1:]).logits
    torch.testing.assert_close(mixed, torch.cat([alone, other]), atol=1e-6, rtol=1e-5)
    assert (alone - other[:1]).abs().max() > 0.01


def test_a_removed_adapter_is_gone_and_the_last_one_leaves_the_plain_model() -> None:
    model = tiny_qwen3()
    ids = tokens(2)
    plain, names = model(ids).logits, set(model.state_dict())
    apply_tuner(model, TunerSection(lora_rank=2, modules_to_save=["lm_head"]), adapter_name="a")
    tuned = apply_tuner(model, TunerSection(lora_rank=4), adapter_name="b")
    shake(tuned.named_trainable())
    assert tuned.switch is not None
    with tuned.switch.use("b"):
        expected = model(ids).logits
    remove_adapter(model, "a")
    assert tuned.adapter_names == ["b"] and not any(".a" in name for name in model.state_dict())
    with tuned.switch.use("b"):
        assert torch.equal(model(ids).logits, expected)
    with pytest.raises(ModelError, match="no adapter 'a' to remove"):
        remove_adapter(model, "a")
    remove_adapter(model, "b")
    assert torch.equal(model(ids).logits, plain) and set(model.state_dict()) == names


# -- full training ---------------------------------------------------------------------------------------


def trained(section: TunerSection) -> set[str]:
    tuned = apply_tuner(tiny_qwen3(), section)
    return set(tuned.named_trainable())


EVERYTHING = {name for name, _ in tiny_qwen3().named_parameters()}


def test_freezing_by_start_and_expression() -> None:
    assert trained(full()) == EVERYTHING
    assert trained(full(freeze_parameters=["model.layers.0", "lm_head"])) == {
        name for name in EVERYTHING if not name.startswith(("model.layers.0", "lm_head"))
    }
    assert trained(full(freeze_parameters_regex="_proj")) == {n for n in EVERYTHING if "_proj" not in n}
    kept = trained(full(freeze_parameters=["model"], trainable_parameters=["model.norm"]))
    assert kept == {"model.norm.weight", "lm_head.weight"}
    kept = trained(full(freeze_parameters_ratio=1.0, trainable_parameters_regex=r"layers\.1\.mlp"))
    assert kept == {f"model.layers.1.mlp.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")}


def test_freezing_a_share_goes_from_the_input_and_stays_within_it() -> None:
    model = tiny_qwen3()
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    tuned = apply_tuner(model, full(freeze_parameters_ratio=0.5))
    frozen = [name for name in sizes if name not in tuned.named_trainable()]
    assert frozen == list(sizes)[: len(frozen)]
    total = sum(sizes.values())
    assert sum(sizes[name] for name in frozen) <= total / 2
    assert sum(sizes[name] for name in list(sizes)[: len(frozen) + 1]) > total / 2


def test_freezing_everything_or_nothing_that_exists_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing to train"):
        apply_tuner(tiny_qwen3(), full(freeze_parameters_ratio=1.0))
    with pytest.raises(ConfigError, match=r"starts with 'modle.layers'") as caught:
        apply_tuner(tiny_qwen3(), full(freeze_parameters=["modle.layers"]))
    assert caught.value.fix == "--freeze_parameters model.layers"
    with pytest.raises(ConfigError, match="matches no parameter"):
        apply_tuner(tiny_qwen3(), full(freeze_parameters_regex="nothing"))


def test_full_training_stores_trained_weights_in_float32_and_frozen_ones_as_they_are() -> None:
    model = tiny_qwen3().to(torch.bfloat16)
    apply_tuner(model, full(freeze_parameters=["model.layers.0"]))
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if "layers.0" in name} == {torch.bfloat16}
    assert {dtype for name, dtype in dtypes.items() if "layers.0" not in name} == {torch.float32}


def test_full_training_has_no_base_to_go_back_to() -> None:
    tuned = apply_tuner(tiny_qwen3(), full())
    assert list(tuned.parameter_sets()) == ["default"]
    with pytest.raises(ModelError, match="no base model"), tuned.adapter_disabled():
        pass
