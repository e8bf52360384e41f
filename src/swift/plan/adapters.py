"""What a tuner adds to, or takes from, what a model keeps for its backward pass."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from swift.config.sections.tuner import WHOLE_MODEL, TunerSection
from swift.models.facts import ModelFacts
from swift.plan.analytic import AdapterMemory, LinearShape
from swift.plan.modules import frozen_names
from swift.tuners.registry import METHODS, kept_bytes, reads_input

__all__ = ["adapter_memory"]

_READS = {
    "attention": ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn", "wqkv"),
    "result": ("o_proj", "out_proj", "dense", "wo", "c_proj"),
    "feed_forward": ("gate_proj", "up_proj", "gate_up_proj", "fc1", "c_fc", "dense_h_to_4h", "w1", "w3"),
    "product": ("down_proj", "fc2", "dense_4h_to_h", "w2"),
}
"""What the linear layers of these names take: the result of a norm or of attention, or the feed-forward product."""
_NUMBER = re.compile(r"\.(\d+)\.")


def adapter_memory(
    facts: ModelFacts,
    shapes: Mapping[str, tuple[int, ...]],
    adapted: Sequence[LinearShape],
    tuner: TunerSection,
    size: int,
    on_device: bool,
) -> AdapterMemory:
    """What the tuner changes; ``size``: bytes of a computed number."""
    if tuner.tuner_type in WHOLE_MODEL:
        return _of_layers(facts, shapes, tuner)
    if tuner.tuner_type not in METHODS:
        return _of_blocks(facts, tuner)
    kept = [kept_bytes(one.name, one.inputs, one.outputs, tuner, size, on_device) for one in adapted]
    reads = {place for one in adapted if reads_input(one.name, tuner, size) for place in _places(one.name)}
    numbers = [int(found[1]) for one in adapted if (found := _NUMBER.search(one.name))]
    frozen = 0
    if tuner.tuner_type == "vera" and adapted:  # two random matrices, as large as the widest layers need
        widest = max(one.inputs for one in adapted) + max(one.outputs for one in adapted)
        frozen = 4 * tuner.vera_rank * widest
    return AdapterMemory(
        per_token=sum(token for token, _ in kept),
        once=sum(once for _, once in kept),
        reads=frozenset(reads),
        frozen=frozen,
        resting=0 if tuner.modules_to_save else min(numbers, default=0),
    )


def _places(name: str) -> list[str]:
    """What a linear layer reads; of an unknown one: everything."""
    last = name.rpartition(".")[2]
    return [place for place, names in _READS.items() if last in names] or list(_READS)


def _of_blocks(facts: ModelFacts, tuner: TunerSection) -> AdapterMemory:
    """ReFT and bottleneck adapters (`swift.tuners.blocks`) compute in float32 and keep what they take."""
    hidden = facts.hidden_size
    if tuner.tuner_type == "reft":
        numbers = sorted(set(tuner.reft_layers)) or list(range(facts.num_layers))
        each, once, resting = 4 * (hidden + tuner.reft_rank), 8 * tuner.reft_rank * hidden, numbers[0] + 1
    else:
        numbers = list(range(facts.num_layers))
        each, once, resting = 4 * (hidden + 2 * tuner.adapter_length), 0, 1
    count = len(numbers)
    return AdapterMemory(count * each, count * once, frozenset(), resting=resting, first_norm_rests=False)


def _of_layers(
    facts: ModelFacts, shapes: Mapping[str, tuple[int, ...]], tuner: TunerSection
) -> AdapterMemory:
    """Training of the model itself: which layers come before the first trained one, and how many are trained."""
    if tuner.tuner_type == "llamapro":  # see `swift.tuners.llamapro.new_positions`
        new = tuner.llamapro_num_new_blocks
        resting = facts.num_layers // (tuner.llamapro_num_groups or new)
        return AdapterMemory(resting=resting, trained_share=new / (facts.num_layers + new - resting))
    if tuner.lisa_activated_layers:
        return AdapterMemory(trained_share=min(1.0, tuner.lisa_activated_layers / facts.num_layers))
    frozen = frozen_names(facts, shapes, tuner)
    trained = [name for name in shapes if name not in frozen]
    if not frozen or any("embed" in name for name in trained):
        return AdapterMemory()
    numbers = [int(found[1]) for name in trained if (found := _NUMBER.search(name))]
    return AdapterMemory(resting=min(numbers, default=facts.num_layers))
