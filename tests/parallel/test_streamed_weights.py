"""Weights that ranks read by their own shards are those of the model that is loaded whole."""

import pytest
import torch
from test_data_parallel import LAYOUTS
from worker_pool import mesh_of, pool, slow_but

from swift.models.load import load_model
from swift.models.streamed import empty_model, fill, has_no_weights
from swift.models.tiny import make_tiny_model
from swift.tuners.lora import AdapterSpec
from swift.tuners.targets import decoder_layers


def read_in_shards(rank, folder, name, tuner):
    """All parameters, gathered, and buffers; how many bytes of weights this rank has read."""
    from swift.parallel.data_parallel import ShardOptions, shard_model, whole
    from swift.parallel.world import World
    from swift.tuners.apply import attach_adapter

    world = World(rank, LAYOUTS[name], mesh_of(LAYOUTS[name]))
    model = empty_model(folder, dtype=torch.float32)
    if tuner == "lora":
        names = [key for key, _ in model.named_modules() if key.endswith("_proj")]
        attach_adapter(model, dict.fromkeys(names, AdapterSpec(4, 8.0)))
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


def test_models_stored_in_another_form_are_loaded_whole(tmp_path):
    """Experts lie in the file one by one, in the model together."""
    folder = make_tiny_model(tmp_path / "moe", architecture="qwen3_moe", texts=["a b c d"] * 5)
    assert empty_model(folder, dtype=torch.float32) is None
