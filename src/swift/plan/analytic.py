"""Memory and disk of a training run by formula: no torch, no weights, no trial.

The formulas follow what this program keeps (engine, LoRA layer and loss of ours), with the accounting of Korthikanti
et al. (arXiv 2205.05198, section 4) for transformer layers, adapted to RMS norms, gated feed-forward layers, grouped
keys and values, and fused attention, which keeps no [tokens, tokens] matrix. All results are bytes on one device.

The peak is the largest of four moments of a step, in which different things are there at once: the loss of a chunk, the
backward pass of the last layer, that of the first layer, and the update; policy optimisation also samples between
steps (`swift.plan.sampling`). What is there all the time is the table
``HELD``: another part of memory (a reference model, a cache) is one more entry in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from swift.models.counting import has_gate
from swift.models.facts import ModelFacts
from swift.plan.sampling import Sampling, sampling_moments

__all__ = [
    "COMING",
    "CONTEXT_BYTES",
    "DTYPE_BYTES",
    "HELD",
    "AdapterMemory",
    "LinearShape",
    "Setup",
    "checkpoint_bytes",
    "gathered_bytes",
    "kept_bytes_per_token",
    "memory_parts",
    "moments",
    "whole_bytes",
    "with_overhead",
]

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
CONTEXT_BYTES = {"cpu": 500 << 20, "cuda": 600 << 20}
"""Python, torch and transformers in memory (measured on Linux: 0.45-0.5 GiB resident); CUDA context and cuBLAS."""
RESERVE_SHARE = 0.05
"""What a caching allocator keeps beyond living tensors, as a share of what comes and goes. Not measured on a device."""

COMING = ("gradients", "activations", "logits", "temporary", "cache")
"""Parts that come and go."""
_ONLY_SAMPLING = ("sampler", "cache")


@dataclass(frozen=True)
class LinearShape:
    """One linear layer: full module name, inputs, outputs."""

    name: str
    inputs: int
    outputs: int


@dataclass(frozen=True)
class AdapterMemory:
    """What adapters change.

    Attributes:
        per_token: bytes that they keep of a token, over all layers.
        once: bytes that they keep however many tokens there are, over all layers.
        reads: which inputs of linear layers are kept for them: results of norms (``attention``, ``feed_forward``), of
            attention (``result``), and the feed-forward ``product``.
        frozen: bytes of frozen tensors that they bring along.
        resting: decoder layers before the first trained parameter, which keep nothing.
        first_norm_rests: nor does the first norm of the next one.
        trained_share: of the other layers this share is trained, where layers themselves are.
    """

    per_token: float = 0.0
    once: float = 0.0
    reads: frozenset[str] = frozenset(("attention", "result", "feed_forward", "product"))
    frozen: int = 0
    resting: int = 0
    first_norm_rests: bool = True
    trained_share: float = 1.0


@dataclass(frozen=True)
class Setup:
    """What, besides the model, decides memory.

    Attributes:
        compute: precision of the computation: float32, float16 or bfloat16.
        is_lora: adapters on a frozen model, else full training.
        trainable: trained parameters, adapters and modules_to_save included.
        trainable_bytes: bytes of one of them in storage (4: float32 master weights).
        saved_modules: parameters of the trained copies that modules_to_save makes.
        trains_head: the output matrix is trained.
        adapters: what adapters keep, and which layers keep nothing.
        updated: parameters that are trained at a time; None: all that are ever trained (LISA: fewer).
        tokens: tokens of a micro-batch, padding included.
        targets: tokens whose probabilities are read; None: all.
        copied: keys and values that attention over shared prompts makes once more, as a multiple of ``tokens``.
        documents: in each row; the CPU computes them one by one and joins the results.
        accumulates: a step has several micro-batches, so gradients are there while the next one is computed.
        checkpointing: activations are recomputed in the backward pass.
        recomputed: of the first so many layers only; None: of all.
        offloaded: activations wait in host memory.
        chunk: label positions whose logits exist at once; 0: no logits are made.
        device: kind of device.
        model_shares: devices that share the weights (tensor x pipeline parallel).
        sequence_shares: devices that share the activations (tensor x context parallel).
        shards: devices that share what a device would have of weights, gradients and optimizer (FSDP).
        keeps_gathered: a layer's gathered weights stay from its forward to its backward pass.
        states_in_host: shards lie in host memory.
        weights_bytes: frozen weights in memory when some are quantised; None: all in the compute precision.
        unpacked: numbers of the largest quantised layer, which is unpacked for each product.
        optimizer_bytes: what the optimizer keeps; None: AdamW's two numbers for each trained one.
        update_numbers: numbers that the update of a matrix needs for the time being, as a multiple of the matrix.
        eager_width: tokens of a row where attention keeps [heads, tokens, tokens] (attn_impl eager); else 0.
        judged_passes: passes without gradients in each micro-batch: of a reference, and over KTO's mismatched pairs.
        sampling: policy optimisation: what is asked of the engine that answers.
        merged: numbers of adapted weights that are there a second time, with the adapter added.
    """

    compute: str
    is_lora: bool
    trainable: int
    tokens: int
    trainable_bytes: int = 4
    saved_modules: int = 0
    trains_head: bool = False
    adapters: AdapterMemory = AdapterMemory()
    updated: int | None = None
    targets: int | None = None
    copied: float = 0.0
    documents: int = 1
    accumulates: bool = True
    checkpointing: bool = False
    recomputed: int | None = None
    offloaded: bool = False
    chunk: int = 1024
    device: str = "cpu"
    model_shares: int = 1
    sequence_shares: int = 1
    shards: int = 1
    keeps_gathered: bool = False
    states_in_host: bool = False
    weights_bytes: int | None = None
    unpacked: int = 0
    optimizer_bytes: int | None = None
    update_numbers: float = 0.0
    eager_width: int = 0
    judged_passes: int = 0
    sampling: Sampling | None = None
    merged: int = 0

    @property
    def compute_bytes(self) -> int:
        return DTYPE_BYTES[self.compute]

    @property
    def state_bytes(self) -> int:
        """What the optimizer keeps."""
        if self.optimizer_bytes is not None:
            return self.optimizer_bytes
        return 2 * self.num_updated * self.trainable_bytes

    @property
    def num_updated(self) -> int:
        """Parameters that have a gradient at a time."""
        return self.trainable if self.updated is None else self.updated

    @property
    def has_cast_copies(self) -> bool:
        """Master weights in float32 are cast for every pass (autocast), and the casts live until its backward."""
        return not self.is_lora and self.trainable_bytes > self.compute_bytes and self.shards == 1

    @property
    def resting_shares(self) -> float:
        """By how much weights, gradients and optimizer are divided between passes."""
        return math.inf if self.states_in_host else self.model_shares * self.shards


def kept_bytes_per_token(facts: ModelFacts, setup: Setup) -> float:
    """What one layer keeps of one token for its backward pass.

    With b the bytes of the compute precision, h hidden size, q = heads x head size, k = key heads x head size::

        norms        2 x (4 h + 4)    input in float32 and its size; four of them in Gemma 2 and 3
                     2 x b h          what the matrices take; with autocast a copy for each of the matrices q, k, v,
                                      gate and up; full training keeps the normalised input too (4 h with autocast)
        attention    2 b (q + k) + 4 heads    queries, keys, values, result; log-sum-exp; b q for joined results
        head norms   4 (q + k + heads + key heads)    Qwen3, Gemma 3; full training: b (q + k) more
        feed-forward `_feed_forward_bytes`

    Where nothing that is adapted takes the result of a norm, or the feed-forward product, that is not kept. What
    adapters keep themselves: `swift.plan.adapters`. Tensors were listed with autograd's hooks for saved tensors.
    """
    b, h = setup.compute_bytes, facts.hidden_size
    heads, key_heads = facts.num_attention_heads, facts.num_key_value_heads
    q, k = heads * facts.head_dim, key_heads * facts.head_dim
    norms = 4 if facts.model_type.startswith(("gemma2", "gemma3")) else 2
    total = norms * (4 * h + 4) + 2 * b * (q + k) + 4 * heads + _feed_forward_bytes(facts, setup)
    total += setup.copied * 2 * b * k
    if (
        setup.eager_width
    ):  # probabilities in float32 and as they are multiplied; keys and values for every head
        total += (4 if b == 4 else 4 + b) * heads * setup.eager_width + 2 * b * (q - k)
    if setup.documents > 1 and setup.device == "cpu" and "result" in setup.adapters.reads:
        total += b * q
    if setup.has_cast_copies:
        total += norms * 4 * h + (4 if facts.is_mixture_of_experts else 5) * b * h
    else:
        taken = len(setup.adapters.reads & {"attention", "feed_forward"})
        total += taken * b * h + (0 if setup.is_lora else norms * b * h)
    if facts.model_type.startswith(("qwen3", "gemma3")):
        total += 4 * (q + k + heads + key_heads) + (0 if setup.is_lora else b * (q + k))
    return total + setup.adapters.per_token / facts.num_layers


def _feed_forward_bytes(facts: ModelFacts, setup: Setup) -> float:
    """Gate, its activation, up, their product: 4 b f; without a gate b f for both sides of the activation.

    Of experts, k a token with f numbers each: gate and up 2 f, the gate's activation f and the result h, before it is
    weighted. Trained ones also keep their inputs (h, and the product f). Router: its probabilities in float32, and
    which tokens go where.
    """
    b, h = setup.compute_bytes, facts.hidden_size
    if not facts.is_mixture_of_experts:
        gated = 4 if has_gate(facts.model_type) else 2
        return (gated - ("product" not in setup.adapters.reads)) * b * facts.intermediate_size
    chosen = facts.num_experts_per_token
    inner = facts.config.get("moe_intermediate_size") or facts.intermediate_size
    shared = facts.config.get("shared_expert_intermediate_size") or 0
    shared += (facts.config.get("n_shared_experts") or 0) * inner
    experts = b * chosen * (3 * inner + h + (0 if setup.is_lora else inner + h))
    return experts + 4 * b * shared + 4 * facts.num_experts + 36 * chosen


def _feed_forward_size(facts: ModelFacts) -> int:
    """Width of the feed-forward layer that one token passes."""
    if not facts.is_mixture_of_experts:
        return facts.intermediate_size
    inner = facts.config.get("moe_intermediate_size") or facts.intermediate_size
    return int(inner * facts.num_experts_per_token)


def _head_numbers(facts: ModelFacts) -> int:
    return facts.vocab_size * facts.hidden_size


HELD: dict[str, Callable[[ModelFacts, Setup], float]] = {
    "weights": lambda facts, setup: (
        (setup.weights_bytes if setup.weights_bytes is not None else _frozen(facts, setup) * setup.compute_bytes)
        + setup.adapters.frozen
        + (0 if setup.is_lora else setup.trainable * setup.trainable_bytes)
    ) / setup.resting_shares,
    "adapters": lambda facts, setup: (
        setup.trainable * setup.trainable_bytes / setup.resting_shares if setup.is_lora else 0
    ),
    "optimizer": lambda facts, setup: setup.state_bytes / setup.resting_shares,
    "sampler": lambda facts, setup: 4 * setup.merged,
}  # fmt: skip
"""Part -> bytes that are there during the whole step:

- weights: frozen ones in the compute precision or as they are quantised, trained ones in their storage precision.
- adapters: LoRA matrices and trained copies of modules.
- optimizer: AdamW keeps two numbers; others: `swift.train.optimizers.state_bytes`.
- sampler: adapted weights with the adapter added, float32.
"""


def whole_bytes(facts: ModelFacts, setup: Setup) -> float:
    """A model in shards, gathered: as it is stored, in full training in the computing precision."""
    if not setup.is_lora:
        return facts.num_parameters * min(setup.compute_bytes, setup.trainable_bytes)
    frozen = setup.weights_bytes
    frozen = facts.num_parameters * setup.compute_bytes if frozen is None else frozen
    return frozen + setup.adapters.frozen + setup.trainable * setup.trainable_bytes


def _frozen(facts: ModelFacts, setup: Setup) -> int:
    return facts.num_parameters - (0 if setup.is_lora else setup.trainable)


def moments(facts: ModelFacts, setup: Setup) -> dict[str, dict[str, float]]:
    """What comes and goes at the moments of a step, or of sampling, that can be the peak, by part."""
    b, h = setup.compute_bytes, facts.hidden_size
    tokens = setup.tokens / setup.sequence_shares
    all_gradients = setup.num_updated * setup.trainable_bytes / setup.resting_shares
    gathered = gathered_bytes(facts, setup)
    earlier = all_gradients if setup.accumulates else 0
    layer = _mean_layer(facts, setup)
    # Ids, targets and positions; rotations; the input of the last norm and its result.
    always = 8 * 3 + 2 * b * facts.head_dim + (4 + b) * h + (0 if setup.is_lora else b * h)
    kept = _kept_of_layers(facts, setup, layer) + always
    casts = facts.num_parameters * b / setup.model_shares if setup.has_cast_copies else 0
    late_casts = casts / facts.num_layers if setup.checkpointing else casts
    in_layer = _backward_bytes(facts, setup)
    head, loss = _loss_bytes(facts, setup)
    logits = head.pop("logits")
    first_of_full = 4 * _head_numbers(facts) if not (setup.is_lora or setup.adapters.resting) else 0
    matrix = max(_head_numbers(facts), _feed_forward_size(facts) * h) if not setup.is_lora else 0
    largest_update = max(matrix, setup.saved_modules) * setup.update_numbers * 4
    is_last_recomputed = setup.checkpointing and (setup.recomputed or facts.num_layers) >= facts.num_layers
    recomputing = layer if is_last_recomputed or setup.offloaded else 0
    if is_last_recomputed and b == 4:
        recomputing -= 4 * h  # the layer's input in float32 is the one that was kept
    unpacked = setup.unpacked * b / setup.model_shares
    once = setup.adapters.once / setup.model_shares
    whole_once = once / facts.num_layers if is_last_recomputed else once
    sampled: dict[str, dict[str, float]] = {}
    if setup.sampling is not None:
        sampled = sampling_moments(facts, setup.sampling, b, setup.device, _feed_forward_size(facts))
    return {
        **sampled,
        "loss": {
            "activations": tokens * kept + loss + (0 if is_last_recomputed else once), "logits": logits,
            "gradients": earlier, "temporary": casts + head["temporary"] + gathered,
        },
        "backward of the last layer": {
            "activations": tokens * (kept + recomputing) + whole_once, "gradients": max(earlier, head["gradients"]),
            "temporary": late_casts + tokens * in_layer + unpacked + gathered,
        },
        "backward of the first layer": {
            "activations": tokens * (layer + always), "gradients": all_gradients,
            "temporary": max(tokens * in_layer + unpacked, first_of_full / setup.model_shares) + gathered,
        },
        "update": {"gradients": all_gradients, "temporary": largest_update / setup.model_shares / setup.shards},
    }  # fmt: skip


def gathered_bytes(facts: ModelFacts, setup: Setup) -> float:
    """Of sharded weights what is whole at a time: embeddings and head; of the layers the one at work and the next, or
    all. In full training the gradients of a layer and of the root are whole too before they are scattered.
    """
    if setup.shards == 1:
        return 0.0
    stored = min(setup.trainable_bytes, setup.compute_bytes) if not setup.is_lora else setup.compute_bytes
    outer = sum(size for name, size in facts.parts.items() if name in ("embedding", "head"))
    layers = facts.num_parameters - outer
    at_once = layers if setup.keeps_gathered else 2 * layers / facts.num_layers
    whole = outer + at_once
    if not setup.is_lora:
        whole += outer + layers / facts.num_layers
    return whole * stored / setup.model_shares


def _mean_layer(facts: ModelFacts, setup: Setup) -> float:
    """`kept_bytes_per_token`; layers that are frozen among trained ones keep the results of norms for nobody."""
    layer, share = kept_bytes_per_token(facts, setup), setup.adapters.trained_share
    if share == 1:
        return layer
    frozen = replace(setup, is_lora=True, adapters=AdapterMemory(reads=frozenset()))
    return share * layer + (1 - share) * kept_bytes_per_token(facts, frozen)


def _kept_of_layers(facts: ModelFacts, setup: Setup, layer: float) -> float:
    """Bytes of one token in all layers; ``layer`` is what one keeps that is not recomputed.

    Nothing before the first adapter needs a gradient, so the first norm of a frozen model keeps nothing.
    """
    if setup.offloaded and setup.device != "cpu":
        return 0
    recomputed = min(facts.num_layers, setup.recomputed or facts.num_layers) if setup.checkpointing else 0
    stream = 4 if setup.has_cast_copies else setup.compute_bytes
    resting = min(setup.adapters.resting, facts.num_layers)
    whole = facts.num_layers - max(recomputed, resting)
    first = (
        4 * facts.hidden_size + 4
        if setup.is_lora and setup.adapters.first_norm_rests and not recomputed
        else 0
    )
    return max(0, recomputed - resting) * stream * facts.hidden_size + whole * layer - first


def _backward_bytes(facts: ModelFacts, setup: Setup) -> float:
    """Gradients of one token inside a layer: of the residual stream, and of both sides of the feed-forward product.

    In full training the product itself is gone by then; an adapter holds it until its own gradient is done.
    """
    h, f = facts.hidden_size, _feed_forward_size(facts)
    copied = 2 * setup.copied * facts.num_key_value_heads * facts.head_dim
    return setup.compute_bytes * max(copied, 3 * h + 2 * f if setup.is_lora else 2 * h + f)


def _loss_bytes(facts: ModelFacts, setup: Setup) -> tuple[dict[str, float], float]:
    """(parts of the loss, bytes of hidden states beside them).

    A chunk's logits exist in float32, and beside that in the compute precision when this is another one. A trained
    output matrix has its gradient summed in float32, and a chunk's share of it in the compute precision.
    """
    b, numbers = setup.compute_bytes, _head_numbers(facts)
    count = setup.tokens if setup.targets is None else setup.targets
    chunk, targets = min(setup.chunk, count), count / setup.sequence_shares
    wide = chunk * facts.vocab_size * (4 if b == 4 else 4 + b)
    parts = {"logits": float(wide), "gradients": 0.0, "temporary": 0.0}
    if not setup.chunk:
        return parts, 0.0
    if not setup.trains_head:
        # Hidden states of the targets, their Jacobian, and the rows that a chunk adds to it.
        return parts, (targets + chunk) * 2 * b * facts.hidden_size
    parts["temporary"] = numbers * (4 + b)
    parts["gradients"] = numbers * setup.trainable_bytes
    return parts, targets * b * facts.hidden_size


def memory_parts(facts: ModelFacts, setup: Setup) -> dict[str, int]:
    """Bytes of tensors by part at the peak of a training step.

    ``HELD``, and of the largest of the `moments`:

    - gradients: one number for each trained parameter, in its storage precision.
    - activations: of recomputed layers their inputs and all of one layer.
    - logits: of one chunk.
    - temporary: gradients inside a layer, the output matrix's gradient before it is added, casts of master weights, and
      the largest quantised layer unpacked; while sampling, the gathered model.
    - cache: keys and values of sampled answers.
    """
    at_peak = max(moments(facts, setup).values(), key=lambda parts: sum(parts.values()))
    parts = {name: term(facts, setup) for name, term in HELD.items()}
    for name in COMING:
        parts[name] = at_peak.get(name, 0.0)
    return {
        name: round(value) for name, value in parts.items() if setup.sampling or name not in _ONLY_SAMPLING
    }


def with_overhead(parts: Mapping[str, int], device: str) -> dict[str, int]:
    """The parts, and what the allocator and the process need on top: ``reserve`` and ``context``."""
    passing = sum(parts.get(name, 0) for name in COMING)
    on_device = device != "cpu"
    return {
        **parts,
        "reserve": round(RESERVE_SHARE * passing) if on_device else 0,
        "context": CONTEXT_BYTES["cuda" if on_device else "cpu"],
    }


def checkpoint_bytes(
    facts: ModelFacts, setup: Setup, *, only_model: bool, export_bytes: int | None = None
) -> int:
    """One checkpoint: the adapter, or the whole model in the precision it came in; two moments for each trained weight.

    ``export_bytes``: bytes of a stored parameter in full training; None: those of the compute precision.
    """
    state = 0 if only_model else setup.state_bytes
    if setup.is_lora:
        return setup.trainable * setup.trainable_bytes + state
    # The trained weights are kept in full precision as well, unless that is what is exported anyway.
    exported = export_bytes or setup.compute_bytes
    masters = (
        setup.trainable * setup.trainable_bytes if setup.trainable_bytes > exported and not only_model else 0
    )
    return facts.num_parameters * exported + masters + state
