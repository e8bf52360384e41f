"""Weights that ranks read part by part are those of the model that is loaded whole."""

import pytest
import torch
from test_data_parallel import LAYOUTS
from worker_pool import layout_id, mesh_of, pool, slow_but

from swift.config.sections.parallel import ParallelSection
from swift.config.sections.quantization import QuantizationSection
from swift.models.head import split_head, split_like_small
from swift.models.load import load_model
from swift.models.sharded import local
from swift.models.streamed import empty_model, fill, has_no_weights
from swift.models.tiny import make_tiny_model
from swift.parallel.accepted import PIPELINE_FAMILIES, TENSOR_FAMILIES
from swift.parallel.layout import Layout
from swift.tuners.lora import AdapterSpec
from swift.tuners.targets import decoder_layers

FOUR_BITS = {"quant_method": "bnb", "quant_bits": 4}


def with_adapters(model, tuner):
    from swift.tuners.apply import attach_adapter

    if tuner == "lora":
        names = [key for key, _ in model.named_modules() if key.endswith("_proj")]
        attach_adapter(model, dict.fromkeys(names, AdapterSpec(4, 8.0)))
    return model


def read_in_shards(rank, folder, name, tuner, quantization=None):
    """All parameters, gathered, and buffers; how many bytes of weights this rank has read."""
    from swift.parallel.data_parallel import ShardOptions, shard_model, whole
    from swift.parallel.world import World

    world = World(rank, LAYOUTS[name], mesh_of(LAYOUTS[name]))
    section = QuantizationSection(**quantization or {})
    model = with_adapters(empty_model(folder, dtype=torch.float32, quantization=section), tuner)
    root = shard_model(model, decoder_layers(model)[1], world, ShardOptions())
    assert has_no_weights(model)
    fill(model, folder, torch.device("cpu"))
    assert not has_no_weights(model)
    held = sum(parameter.to_local().numel() for parameter in model.parameters())
    found = {key: whole(value.detach()) for key, value in model.named_parameters()}
    ids = torch.arange(12)[None]
    with torch.no_grad():
        logits = root(lambda: (model(input_ids=ids).logits,))[0]
    return found, dict(model.named_buffers()), logits, held


@pytest.mark.parametrize("tuner", slow_but(["lora"], ["full", "lora"]))
@pytest.mark.parametrize("name", slow_but(["shards"], ["shards", "copies of shards"]))
def test_shards_are_those_of_the_whole_model(tiny_model_dir, name, tuner):
    expected = load_model(tiny_model_dir, dtype=torch.float32)
    values, total = expected.state_dict(), sum(p.numel() for p in expected.parameters())
    with torch.no_grad():
        logits = expected(input_ids=torch.arange(12)[None]).logits
    results = pool(LAYOUTS[name].world_size).run(read_in_shards, tiny_model_dir, name, tuner)
    for found, buffers, computed, held in results:
        for key, value in found.items():
            if "lora_" not in key:
                assert torch.equal(value, values[key.replace(".base.", ".")]), key
        assert all(torch.equal(value, dict(expected.named_buffers())[key]) for key, value in buffers.items())
        torch.testing.assert_close(computed, logits)
        assert held < 0.65 * sum(value.numel() for value in found.values())
    assert total <= sum(value.numel() for value in results[0][0].values())


@pytest.mark.parametrize("double", slow_but([True], [True, False]))
def test_layers_of_four_bits_are_those_that_transformers_makes(tiny_model_dir, double):
    pytest.importorskip("bitsandbytes")
    from swift.models.quantised_shards import unwrap_quantised

    options = {**FOUR_BITS, "bnb_4bit_use_double_quant": double}
    expected = load_model(tiny_model_dir, dtype=torch.float32, quantization=QuantizationSection(**options))
    unwrap_quantised(expected)
    values, buffers = dict(expected.named_parameters()), dict(expected.named_buffers())
    results = pool(2).run(read_in_shards, tiny_model_dir, "shards", "full", options)
    for found, own_buffers, _, held in results:
        assert found.keys() == values.keys() and own_buffers.keys() == buffers.keys()
        assert all(torch.equal(value, values[name]) for name, value in found.items())
        assert all(torch.equal(value, buffers[name]) for name, value in own_buffers.items())
        assert held < 0.55 * sum(value.numel() for value in found.values())


def read_divided(rank, folder, layout, sequence, tuner):
    """As `distribute` divides it: parameters, gathered; bytes read, held of the base, and of its largest tensor."""
    from swift.parallel.data_parallel import ShardOptions, whole
    from swift.parallel.distribute import distribute
    from swift.parallel.world import World

    model = with_adapters(empty_model(folder, dtype=torch.float32), tuner)
    section = ParallelSection(
        tensor_parallel_size=layout.tp,
        pipeline_parallel_size=layout.pp,
        expert_parallel_size=layout.ep,
        sequence_parallel=sequence,
    )
    world = World(rank, layout, mesh_of(layout))
    shards = ShardOptions() if layout.dp_shard > 1 else None
    distribute(model, world, split_like_small(model), section, shards)
    count = fill(model, folder, torch.device("cpu"))
    base = {name: value for name, value in model.named_parameters() if "lora_" not in name}
    held = sum(local(value).numel() * value.element_size() for value in base.values())
    return {name: whole(value.detach()) for name, value in base.items()}, count, held


@pytest.mark.parametrize(
    ("layout", "family", "most"),
    [
        (Layout(tp=2), "qwen3", 0.75),  # embedding and head are on both ranks
        (Layout(pp=2, dp_shard=2), "qwen3", 0.45),
        (Layout(dp_shard=2, tp=2, ep=4), "qwen3_moe", 0.45),
        pytest.param(Layout(tp=4), "llama", 0.7, marks=pytest.mark.slow),  # fewer heads of keys than ranks
        pytest.param(Layout(pp=2), "gemma", 0.9, marks=pytest.mark.slow),  # a head that is the embedding
        pytest.param(Layout(dp_shard=2, tp=2), "llama", 0.4, marks=pytest.mark.slow),
        pytest.param(Layout(pp=2, dp_shard=2, tp=2), "qwen3", 0.3, marks=pytest.mark.slow),
        pytest.param(Layout(dp_shard=4, ep=2), "qwen3_moe", 0.3, marks=pytest.mark.slow),
    ],
    ids=layout_id,
)
@pytest.mark.parametrize("tuner", slow_but(["lora"], ["lora", "full"]))
def test_ranks_read_what_they_keep(tmp_path, layout, family, most, tuner):
    folder = make_tiny_model(tmp_path / family, architecture=family, texts=["a b c d"] * 5)
    expected = load_model(folder, dtype=torch.float32)
    values = dict(expected.named_parameters())
    total = sum(value.numel() * value.element_size() for value in values.values())
    seen = set()
    for found, count, held in pool(layout.world_size).run(read_divided, folder, layout, layout.tp > 1, tuner):
        for name, value in found.items():
            assert torch.equal(value, values[name.replace(".base.", ".")]), name
        seen |= {name.replace(".base.", ".") for name in found}
        assert count == held < most * total
    assert seen == values.keys()


@pytest.mark.parametrize("family", ["qwen3_moe", "gemma"])
def test_what_is_not_stored_as_it_is(tmp_path, family):
    """Experts lie in the files one by one; Gemma's embedding has a scale that lies in none."""
    folder = make_tiny_model(tmp_path / family, architecture=family, texts=["a b c d"] * 5)
    model = empty_model(folder, dtype=torch.float32)
    fill(model, folder, torch.device("cpu"))
    expected = load_model(folder, dtype=torch.float32)
    for tensors in ("named_parameters", "named_buffers"):
        values = dict(getattr(expected, tensors)())
        assert all(torch.equal(value, values[name]) for name, value in getattr(model, tensors)())


def test_models_stored_in_another_form_are_loaded_whole(tmp_path):
    """With names that transformers changes as it reads."""
    folder = make_tiny_model(tmp_path / "moe", architecture="mixtral", texts=["a b c d"] * 5)
    assert empty_model(folder, dtype=torch.float32) is None


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted({*TENSOR_FAMILIES, *PIPELINE_FAMILIES}))
def test_a_small_model_tells_where_the_head_is(tmp_path, family):
    folder = make_tiny_model(tmp_path / family, architecture=family, texts=["a b c d"] * 5)
    model, without = load_model(folder, dtype=torch.float32), empty_model(folder, dtype=torch.float32)
    one, other = split_head(model), split_like_small(without)
    names = [[name for name, module in whole.named_modules() if any(module is part for part in parts or ())]
             for whole, parts in ((model, one), (without, other))]  # fmt: skip
    assert names[0] == names[1]
    if family in PIPELINE_FAMILIES:
        assert one is not None


def test_a_scale_behind_the_head_is_seen_without_weights(tmp_path):
    folder = make_tiny_model(tmp_path / "granite", architecture="granite", texts=["a b c d"] * 5)
    model = empty_model(folder, dtype=torch.float32)
    assert split_like_small(model) is not None
    model.config.logits_scaling = 8.0
    assert split_like_small(model) is None
