"""How long a run will take: floating-point operations by formula, and what this machine was measured to do.

Measurements lie in ``SWIFT_HOME/speed.json``: the probe of `swift.train.speed` (once for each device, precision and
number of threads), and tokens per second of runs that ended, which count for more. Imports no torch.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from swift.config.schema import Resolved
from swift.core.devices import cpu_count, describe_cpu
from swift.core.files import atomic_write_json, read_json
from swift.core.home import swift_home
from swift.models.facts import ModelFacts
from swift.plan.analytic import Setup
from swift.plan.device import DeviceFacts
from swift.plan.modules import linear_layers

__all__ = [
    "Pace",
    "device_key",
    "measure_pace",
    "micro_batch_flops",
    "read_pace",
    "remember",
    "run_key",
    "time_of",
]


@dataclass(frozen=True)
class Pace:
    """What the probe found.

    Attributes:
        flops: floating-point operations a second in training.
        layer_seconds: what each layer takes in a forward and backward pass however small it is.
    """

    flops: float
    layer_seconds: float


def micro_batch_flops(facts: ModelFacts, setup: Setup, tokens: float, length: float, targets: float) -> float:
    """Operations of a forward and backward pass over ``tokens`` in documents of ``length``.

    Two for each weight and token; causal attention sees half of the pairs: ``2 q length`` a token and layer, and two
    and a half times that in the backward pass, which computes the scores again. The backward pass takes two for the
    input of each weight, and two for the gradient of a trained one: frozen matrices save a third. Recomputed layers
    run forward twice. The output matrix sees the targets only: twice in the forward pass where it is frozen, four times
    in both passes where it is trained (`swift.objectives.logprobs`). A reference runs forward only.
    """
    outer = facts.parts["embedding"] + facts.parts["head"] + facts.parts["norm"]
    linear = facts.num_active_parameters - outer
    adapters = setup.trainable - setup.saved_modules if setup.is_lora else 0
    attention = 2 * length * facts.num_attention_heads * facts.head_dim * facts.num_layers
    forward = 2 * linear + 2 * adapters + attention
    trained = adapters if setup.is_lora else linear * min(1.0, setup.trainable / facts.num_parameters)
    backward = 2 * linear + 2 * adapters + 2 * trained + 2.5 * attention
    again = 0.0
    if setup.checkpointing:
        again = forward * min(1.0, (setup.recomputed or facts.num_layers) / facts.num_layers)
    judged = setup.judged_passes
    numbers = facts.vocab_size * facts.hidden_size if setup.chunk else 0
    head = ((8 if setup.trains_head else 4) + 2 * judged) * numbers
    return tokens * (forward * (1 + judged) + backward + again) + targets * head


def time_of(
    resolved: Resolved, facts: ModelFacts, setup: Setup, device: DeviceFacts, steps: dict[str, Any]
) -> dict[str, Any]:
    """The time part of a plan: operations of a step; seconds and their source, None where nothing was measured."""
    tokens, accumulation = steps["tokens_per_step"], steps["accumulation"]
    length = tokens / max(1.0, steps["batch_size"] * accumulation * steps["samples_per_row"])
    # The tokens of a step without padding; padding is computed as well.
    computed = tokens / max(1e-6, 1 - steps["padding"])
    flops = micro_batch_flops(facts, setup, computed, length, tokens if setup.chunk > 1 else 0)
    known = read_json(_file())
    run = known.get("runs", {}).get(run_key(resolved, facts, setup, device))
    pace = read_pace(device, setup.compute, resolved)
    seconds, source = None, None
    if run is not None:
        seconds, source = steps["total"] * tokens / run["tokens_per_second"], "runs like it"
    elif pace is not None:
        passes = facts.num_layers * accumulation * (4 / 3 if setup.checkpointing else 1)
        seconds = steps["total"] * (flops / pace.flops + passes * pace.layer_seconds)
        source = "a probe of this machine"
    return {"flops_per_step": flops, "seconds": seconds, "source": source}


def _threads(resolved: Resolved) -> int:
    return resolved.config.training.num_threads or int(os.environ.get("OMP_NUM_THREADS") or cpu_count())


def device_key(device: DeviceFacts, resolved: Resolved) -> str:
    """The same device again."""
    if device.kind == "cpu":
        return f"{describe_cpu()['name']} x {_threads(resolved)}"
    return f"{device.kind} {device.memory_bytes}"


def run_key(resolved: Resolved, facts: ModelFacts, setup: Setup, device: DeviceFacts) -> str:
    """Runs with the same key are about as fast."""
    words = [resolved.command, resolved.config.tuner.tuner_type, facts.architecture, facts.num_parameters]
    words += [setup.compute, resolved.config.quantization.quant_bits or "", setup.checkpointing]
    words += [resolved.config.training.per_device_train_batch_size, resolved.config.data.max_length]
    return "/".join(map(str, [*words, device_key(device, resolved)]))


def read_pace(device: DeviceFacts, dtype: str, resolved: Resolved) -> Pace | None:
    """What the probe found for this device; None: it has not run."""
    found = read_json(_file()).get("probes", {}).get(f"{device_key(device, resolved)}/{dtype}")
    return Pace(**found) if found else None


def remember(kind: str, key: str, values: dict[str, float]) -> None:
    """Keep a measurement: ``probes`` or ``runs``. A home that cannot be written only means that nothing is kept."""
    known = read_json(_file())
    known.setdefault(kind, {})[key] = values
    try:
        _file().parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        atomic_write_json(_file(), known, durable=False)
    except OSError:
        return


def _file() -> Path:
    return swift_home() / "speed.json"


_SHAPE = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "head_dim": 64,
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
}
_SMALL = (
    {**_SHAPE, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "vocab_size": 256},
    32,
)
_LARGE = (
    {**_SHAPE, "hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "vocab_size": 4096}, 512,
)  # fmt: skip
_LARGE_ON_DEVICE = (
    {**_SHAPE, "hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32, "vocab_size": 32768}, 4096,
)  # fmt: skip


def measure_pace(resolved: Resolved, device: DeviceFacts, dtype: str) -> Pace:
    """Probe the device and keep what is found. Two equations: ``seconds = flops / pace + layers x layer_seconds``."""
    from swift.train.speed import PROBE_RANK, pass_seconds

    large = _LARGE if device.kind == "cpu" else _LARGE_ON_DEVICE
    found = []
    for config, tokens in (_SMALL, large):
        facts = ModelFacts.from_config(config, "the probe")
        adapted = linear_layers(facts, {})
        trainable = PROBE_RANK * sum(layer.inputs + layer.outputs for layer in adapted)
        setup = Setup(compute=dtype, is_lora=True, trainable=trainable, tokens=tokens)
        flops = micro_batch_flops(facts, setup, tokens, tokens, tokens)
        found.append((flops, facts.num_layers, pass_seconds(config, tokens, device.kind, dtype)))
    (few, layers, short), (many, _, long) = found
    rate = (many - few) / max(long - short, 1e-6)
    pace = Pace(rate, max(0.0, short - few / rate) / layers)
    remember("probes", f"{device_key(device, resolved)}/{dtype}", asdict(pace))
    return pace
