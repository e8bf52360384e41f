"""Memory and disk of a training run by formula: no torch, no weights, no trial.

The formulas follow what this program keeps (engine, LoRA layer and loss of ours), with the accounting of Korthikanti
et al. (arXiv 2205.05198, section 4) for transformer layers, adapted to RMS norms, gated feed-forward layers, grouped
keys and values, and fused attention, which keeps no [tokens, tokens] matrix. All results are bytes on one device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from swift.config.schema import Config
from swift.config.sections.rlhf import DPO_TYPES
from swift.models.facts import ModelFacts

__all__ = [
    "DTYPE_BYTES",
    "LinearShape",
    "Setup",
    "activation_bytes_per_token",
    "checkpoint_bytes",
    "memory_parts",
    "reference_bytes",
]

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
FRAMEWORK_BYTES = {"cpu": 500 << 20, "cuda": 600 << 20}
"""Python, torch and transformers in memory (measured on Linux: 0.45-0.5 GiB resident); CUDA context and cuBLAS."""


@dataclass(frozen=True)
class LinearShape:
    """One linear layer: full module name, inputs, outputs."""

    name: str
    inputs: int
    outputs: int


@dataclass(frozen=True)
class Setup:
    """What, besides the model, decides memory.

    Attributes:
        compute: precision of the computation: float32, float16 or bfloat16.
        is_lora: adapters on a frozen model, else full training.
        trainable: trained parameters, adapters and modules_to_save included.
        trainable_bytes: bytes of one of them in storage (4: float32 master weights).
        saved_modules: parameters of the trained copies that modules_to_save makes.
        adapted: the linear layers that have an adapter.
        rank, dropout: of the adapters.
        tokens: tokens of a micro-batch, padding included.
        checkpointing: activations are recomputed in the backward pass.
        recomputed: of the first so many layers only; None: of all.
        offloaded: activations wait in host memory.
        chunk: label positions whose logits exist at once.
        device: kind of device.
        model_shares: devices that share the weights (tensor x pipeline parallel).
        sequence_shares: devices that share the activations (tensor x context parallel).
        weights_bytes: frozen weights in memory when some are quantised; None: all in the compute precision.
        unpacked: numbers of the largest quantised layer, which is unpacked for each product.
        optimizer_bytes: what the optimizer keeps; None: AdamW's two numbers for each trained one.
    """

    compute: str
    is_lora: bool
    trainable: int
    tokens: int
    trainable_bytes: int = 4
    saved_modules: int = 0
    adapted: Sequence[LinearShape] = ()
    rank: int = 0
    dropout: float = 0.0
    checkpointing: bool = False
    recomputed: int | None = None
    offloaded: bool = False
    chunk: int = 1024
    device: str = "cpu"
    model_shares: int = 1
    sequence_shares: int = 1
    weights_bytes: int | None = None
    unpacked: int = 0
    optimizer_bytes: int | None = None

    @property
    def compute_bytes(self) -> int:
        return DTYPE_BYTES[self.compute]

    @property
    def state_bytes(self) -> int:
        """What the optimizer keeps."""
        if self.optimizer_bytes is not None:
            return self.optimizer_bytes
        return 2 * self.trainable * self.trainable_bytes

    @property
    def has_cast_copies(self) -> bool:
        """Master weights in float32 are cast for every pass (autocast), and the casts live until its backward."""
        return not self.is_lora and self.trainable_bytes > self.compute_bytes


def activation_bytes_per_token(facts: ModelFacts, setup: Setup) -> float:
    """What one layer keeps of one token for its backward pass.

    With b the bytes of the compute precision, h hidden size, q = heads x head size, k = key heads x head size,
    f = feed-forward size (of the experts a token visits)::

        norms        2 x (4 h + b h)    input of the norm in float32; its result, the input of the matrices
        attention    b (q + 2 k) + 2 b q + 4 heads    queries, keys, values; result, once more as o_proj's input;
                                                      log-sum-exp
        feed-forward 4 b f              gate, its activation, up, and their product

    Full training also keeps the normalised input of each norm (for the norm's weight), 2 b h. Qwen3-like head norms
    add 4 (q + k). An adapter keeps its [rank] projection, and with dropout what was dropped: one byte an input
    element (two on the CPU).
    """
    b, h = setup.compute_bytes, facts.hidden_size
    q = facts.num_attention_heads * facts.head_dim
    k = facts.num_key_value_heads * facts.head_dim
    total = 2 * (4 * h + b * h) + b * (q + 2 * k) + 2 * b * q + 4 * facts.num_attention_heads
    total += 4 * b * _feed_forward_size(facts)
    if facts.model_type.startswith(("qwen3", "gemma3")):
        total += 4 * (q + k)
    if not setup.is_lora:
        return total + 2 * b * h
    mask = 0 if setup.dropout == 0 else 2 if setup.device == "cpu" else 1
    adapters = sum(b * setup.rank + mask * layer.inputs for layer in setup.adapted)
    return total + adapters / facts.num_layers


def _feed_forward_size(facts: ModelFacts) -> int:
    """Width of the feed-forward layer that one token passes."""
    if not facts.is_mixture_of_experts:
        return facts.intermediate_size
    inner = facts.config.get("moe_intermediate_size") or facts.intermediate_size
    shared = facts.config.get("shared_expert_intermediate_size") or 0
    shared += (facts.config.get("n_shared_experts") or 0) * inner
    return inner * facts.num_experts_per_token + shared


def _kept_of_layers(facts: ModelFacts, setup: Setup, layer: float) -> float:
    """Bytes of one token in all layers, ``layer`` being what one keeps that is not recomputed."""
    recomputed = 0
    if setup.checkpointing:
        recomputed = min(facts.num_layers, setup.recomputed or facts.num_layers)
    if setup.offloaded and setup.device != "cpu":
        return layer
    inputs = recomputed * setup.compute_bytes * facts.hidden_size
    return inputs + (facts.num_layers - recomputed + bool(recomputed)) * layer


def memory_parts(facts: ModelFacts, setup: Setup) -> dict[str, int]:
    """Bytes by part at the peak of a training step.

    - weights: frozen ones in the compute precision or as they are quantised, trained ones in their storage precision.
    - adapters: LoRA matrices and trained copies of modules.
    - gradients: one number for each trained parameter, in its storage precision.
    - optimizer: AdamW keeps two; others: `swift.train.optimizers.state_bytes`.
    - activations: layers x tokens x ``activation_bytes_per_token``; of recomputed layers their inputs and all of one
      layer; offloaded, all of one layer. The last norm's input and output come on top.
    - logits: of one chunk, in the compute precision and in float32.
    - temporary: the largest matrix's gradient before it is added, casts of master weights, and the largest quantised
      layer unpacked.
    - framework: the libraries, or the CUDA context.
    """
    b, h, tokens = setup.compute_bytes, facts.hidden_size, setup.tokens / setup.sequence_shares
    extra = setup.trainable if setup.is_lora else 0
    frozen = facts.num_parameters - (0 if setup.is_lora else setup.trainable)
    trained_base = 0 if setup.is_lora else setup.trainable
    shares = setup.model_shares
    layer = activation_bytes_per_token(facts, setup)
    layers = _kept_of_layers(facts, setup, layer)
    largest = max(facts.vocab_size, _feed_forward_size(facts)) * h
    trains_matrix = not setup.is_lora or setup.saved_modules > 0
    temporary = largest * setup.trainable_bytes if trains_matrix else 0
    if setup.has_cast_copies:
        temporary += trained_base * b
    temporary += setup.unpacked * b
    weights = frozen * b if setup.weights_bytes is None else setup.weights_bytes
    chunk = min(setup.chunk, setup.tokens)
    logits = chunk * facts.vocab_size * (4 if b == 4 else 2 * b + 4)
    return {
        "weights": (weights + trained_base * setup.trainable_bytes) // shares,
        "adapters": extra * setup.trainable_bytes // shares,
        "gradients": setup.trainable * setup.trainable_bytes // shares,
        "optimizer": setup.state_bytes // shares,
        "activations": round(tokens * (layers + (4 + 2 * b) * h)),
        "logits": logits,
        "temporary": temporary // shares,
        "framework": FRAMEWORK_BYTES["cpu" if setup.device == "cpu" else "cuda"],
    }


def reference_bytes(config: Config, facts: ModelFacts, setup: Setup) -> int:
    """What the reference of preference learning keeps beside the model (see `swift.train.reference`).

    Nothing where LoRA is switched off for it; a copy of the trained weights; or a model of its own, of this size.
    """
    rlhf = config.rlhf
    reads = rlhf.rlhf_type in (*DPO_TYPES, "kto") and not rlhf.reference_free
    if not reads or rlhf.precompute_ref_log_probs:
        return 0
    if rlhf.ref_model is not None or rlhf.ref_adapters:
        return facts.num_parameters * setup.compute_bytes
    copies = (
        not setup.is_lora or config.model.adapters or config.tuner.init_weights not in ("default", "gaussian")
    )
    return setup.trainable * setup.trainable_bytes if copies else 0


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
