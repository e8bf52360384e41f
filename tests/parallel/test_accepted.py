"""What is refused before a model is loaded, and into what its ranks are divided."""

import pytest

from swift.config.sections.parallel import ParallelSection
from swift.core.errors import ConfigError
from swift.parallel.accepted import Decoder, check_dimensions, split_degree

QWEN3 = Decoder("qwen3", 36, 32, 8, 12288)


@pytest.mark.parametrize(
    ("kind", "size", "heads", "degrees"),
    [
        ("ring", 4, (4, 2), (4, 1)),
        ("ulysses", 4, (4, 2), (1, 4)),  # key/value heads are fewer than ranks
        ("hybrid", 4, (2, 2), (2, 2)),
        ("hybrid", 6, (4, 2), (3, 2)),
        ("hybrid", 3, (4, 2), (3, 1)),
        ("hybrid", 4, (12, 3), (4, 1)),  # 3 heads and 2 or 4 ranks do not divide one another
    ],
)
def test_degrees(kind, size, heads, degrees):
    assert split_degree(kind, size, *heads) == degrees


def test_ulysses_refuses_what_does_not_divide():
    with pytest.raises(ConfigError, match="cannot share 4 heads"):
        split_degree("ulysses", 3, 4, 2)


@pytest.mark.parametrize(
    ("sizes", "decoder", "message"),
    [
        ({"tensor_parallel_size": 3}, QWEN3, "32 attention heads cannot be shared by 3"),
        ({"tensor_parallel_size": 2}, Decoder("phi3", 32, 32, 32, 8192), "phi3 models are not split"),
        ({"tensor_parallel_size": 4}, Decoder("llama", 2, 24, 6, 1024), "neither divides the other"),
        ({"pipeline_parallel_size": 2}, Decoder("gemma3n_text", 30, 8, 2, 8192), "not divided into stages"),
        ({"pipeline_parallel_size": 2, "pipeline_schedule": "zbv"}, Decoder("llama", 3, 4, 4, 8), "too few"),
        (
            {"context_parallel_size": 16, "sequence_parallel_method": "ring"},
            Decoder("mistral", 2, 32, 8, 8, window=4096),
            "no sliding window",
        ),
        ({"expert_parallel_size": 2}, QWEN3, "no experts"),
        (
            {"expert_parallel_size": 3},
            Decoder("qwen3_moe", 4, 4, 4, 8, 128),
            "128 experts cannot be shared by 3",
        ),
    ],
)
def test_refusals(sizes, decoder, message):
    with pytest.raises(ConfigError, match=message):
        check_dimensions(ParallelSection(**sizes), decoder, 8192)


def test_accepted():
    check_dimensions(ParallelSection(tensor_parallel_size=16, pipeline_parallel_size=4), QWEN3)
    check_dimensions(ParallelSection(context_parallel_size=8, tensor_parallel_size=8), QWEN3)


def test_sizes_of_a_decoder_inside_another_model():
    config = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "num_hidden_layers": 26}}
    assert Decoder.of(config).model_type == "gemma3_text"
    assert Decoder.of(config).num_layers == 26
    assert Decoder.of({"sliding_window": 4096, "use_sliding_window": False}).window is None
