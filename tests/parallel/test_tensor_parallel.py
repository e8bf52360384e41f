"""Tensor parallelism: a step of a model whose layers ranks share is that of one process."""

from dataclasses import replace

import parallel_parity as parity
import pytest
import torch
from parallel_parity import check
from worker_pool import pool, slow_but

from swift.models.sharded import local
from swift.parallel.accepted import TENSOR_FAMILIES
from swift.parallel.layout import Layout


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(
    "family", slow_but(["qwen3"], ["qwen3", "qwen2", "llama", "gemma", "mistral", "qwen3_moe"])
)
def test_families_on_two_ranks(family, lora, sequence):
    share = check(Layout(tp=2), family, lora=lora, sequence=sequence)
    assert share < (0.95 if family == "qwen3_moe" else 0.82)  # experts and embedding are not shared


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", sorted(set(TENSOR_FAMILIES) - {"qwen3", "qwen2", "llama", "gemma", "mistral", "qwen3_moe"})
)
def test_every_accepted_family(family):
    assert check(Layout(tp=2), family, lora=True, sequence=True) < 0.8


def vocabulary(rank, tied, wide):
    """Of the output matrix: how much this rank has. Values and entropies, and how far they lie from one process's."""
    layout = Layout(tp=2)
    changes = {"tie_word_embeddings": tied, "vocab_size": 97 if wide else 96}
    alone = parity.engine_of(parity.tiny("llama", **changes))
    engine = parity.distributed_engine(parity.tiny("llama", **changes), rank, layout)
    batch, pairs = parity.token_batch([[22], [17]], packed=False), []
    with torch.no_grad():
        likeliest = alone.model(input_ids=batch.input_ids).logits.argmax(-1)
    batch.targets = likeliest.where((batch.targets != -100) & (batch.targets % 2 == 0), batch.targets)
    for temperature in (1.0, 0.7):
        batch = replace(batch, temperature=temperature)
        found, wanted = engine.token_outputs(batch), alone.token_outputs(batch)
        assert torch.equal(found.is_argmax, wanted.is_argmax) and 0 < found.is_argmax.sum() < len(
            found.is_argmax
        )
        pairs += [
            (found.logprobs, wanted.logprobs),
            (engine.token_entropies(batch), alone.token_entropies(batch)),
        ]
    head = engine.model.get_output_embeddings().weight
    return local(head).shape[0], max(float((one - other).abs().max()) for one, other in pairs)


@pytest.mark.parametrize("case", ["own", "tied", "odd"])
def test_ranks_have_parts_of_the_vocabulary(case):
    """Of an output matrix of its own, in equal parts."""
    for rows, error in pool(2).run(vocabulary, case == "tied", case == "odd"):
        assert rows == {"own": 48, "tied": 96, "odd": 97}[case]
        assert error < 1e-6  # entropies are float32


@pytest.mark.parametrize("sequence", slow_but([False], [False, True]))
def test_more_ranks_than_key_value_heads(sequence):
    check(Layout(tp=4), "qwen2", lora=True, sequence=sequence)
    check(Layout(tp=4), "qwen3", task="dpo", packed=False, dtype=torch.float32, sequence=sequence)


@pytest.mark.slow
@pytest.mark.parametrize("sequence", [False, True])
def test_with_context_parallelism(sequence):
    check(Layout(cp=2, tp=2), lora=True, sequence=sequence)
    check(Layout(cp=2, tp=2), "qwen3_moe", sequence=sequence)


@pytest.mark.parametrize("sequence", slow_but([True], [False, True]))
@pytest.mark.parametrize("lora", slow_but([True], [False, True]))
def test_with_fsdp(lora, sequence):
    check(Layout(dp_shard=2, tp=2), lora=lora, sequence=sequence)
    check(Layout(dp_shard=2, tp=2), "gemma", task="dpo", lora=lora, sequence=sequence, dtype=torch.float32)
