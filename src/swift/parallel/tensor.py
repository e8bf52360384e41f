"""Tensor parallelism (arXiv 1909.08053) by transformers' own plans, for the model's weights and for our LoRA layers.

A decoder layer's blocks (attention, MLP) are parallel regions. Where one is entered all ranks have the same hidden
states; inside, every number is either a rank's own or the same everywhere *with a gradient that is a rank's share*;
what leaves are terms, and their sum is the block's output. Two rules follow, and nothing else is needed:

- entering adds up gradients, leaving adds up values;
- parameters that every rank has whole inside a region (norms of heads, LoRA's A beside columns and B beside rows,
  biases of rows) get their gradients added up over the ranks, once a step.

With ``sequence`` (arXiv 2205.05198) hidden states between regions are split along the sequence: entering gathers,
leaving scatters, and what lies between computes its own tokens only. Blocks that transformers' plan does not split
by columns and rows (mixtures of experts, fused gates) compute a share of the tokens with whole weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from swift.core.errors import ConfigError
from swift.models.sharded import ShardedLinear, Share, local
from swift.objectives.logprobs import Vocabulary
from swift.parallel.collectives import add_up, enter, gather, keep_own, leave
from swift.tuners.lora import LoraLinear
from swift.tuners.lora_function import mixed_seed
from swift.tuners.targets import decoder_layers

__all__ = ["TensorParallel", "apply_tensor_parallel", "final_norms", "split_output_matrix"]


@dataclass
class TensorParallel:
    """A model whose layers are shared by the ranks of a group.

    Attributes:
        sequence: hidden states between the regions are split along the sequence.
        splits_tokens: some blocks compute a share of the tokens.
        partial: names of the parameters whose gradients are shares, to be added up (`sum_gradients`).
        vocabulary: whose logits this rank computes.
    """

    group: dist.ProcessGroup
    sequence: bool
    splits_tokens: bool = False
    partial: set[str] = field(default_factory=set)
    vocabulary: Vocabulary = field(default_factory=Vocabulary)

    @property
    def multiple(self) -> int:
        """What widths of batches have to be a multiple of."""
        return self.group.size() if self.sequence or self.splits_tokens else 1

    def sum_gradients(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Make the gradients of `partial` parameters whole: once a step, before clipping."""
        found = [parameters[name].grad for name in sorted(self.partial & parameters.keys())]
        add_up([local(gradient) for gradient in found if gradient is not None], self.group)


def _plan(text: Any) -> dict[str, str]:
    """Pattern of a linear layer below ``layers.N`` -> colwise or rowwise, for whole blocks of them."""
    plan = {
        name.removeprefix("layers.*."): style
        for name, style in (getattr(text, "base_model_tp_plan", None) or {}).items()
        if name.startswith("layers.*.")
    }
    blocks: dict[str, set[str]] = {}
    for name, style in plan.items():
        blocks.setdefault(name.split(".")[0], set()).add(style)
    whole = {block for block, styles in blocks.items() if {"colwise", "rowwise"} <= styles}
    return {
        name: style
        for name, style in plan.items()
        if name.split(".")[0] in whole and style in ("colwise", "rowwise") and name.count(".") == 1
    }


def apply_tensor_parallel(model: Any, mesh: DeviceMesh, *, sequence: bool = False) -> TensorParallel:
    """Split a model (in place), adapters included, over the ranks of a one-dimensional mesh.

    Before `fully_shard`, after the adapters are attached. Parameters keep their names; those that are split become
    DTensors. Batches must have a width of a multiple of ``multiple``.

    Raises:
        ConfigError: a layer to be split is quantised, or transformers has no plan for the model.
    """
    state = TensorParallel(mesh.get_group(), sequence)
    plan = _plan(model.config.get_text_config())
    if not plan:
        raise ConfigError(
            f"transformers' plan for {type(model).__name__} splits neither attention nor MLP",
            where="--tensor_parallel_size",
            fix="--data_parallel_shard_size, which shards every model's weights",
        )
    name, layers = decoder_layers(model)
    for number, layer in enumerate(layers):
        for child, block in layer.named_children():
            _apply_block(f"{name}.{number}.{child}", block, child, plan, mesh, state)
    if sequence:
        group, base = state.group, getattr(model, model.base_model_prefix)
        model.get_input_embeddings().register_forward_hook(
            lambda module, args, output: keep_own(output, group)
        )
        for norm in final_norms(model):
            module = getattr(base, norm)
            module.register_forward_hook(lambda module, args, output: gather(output, group))
            state.partial.update(
                f"{model.base_model_prefix}.{norm}.{key}" for key, _ in module.named_parameters()
            )
    return state


def split_output_matrix(
    model: Any, head: nn.Module, mesh: DeviceMesh, state: TensorParallel, shards: int = 1
) -> None:
    """Let every rank have some rows of the output matrix, where it is nothing else (the embedding, an adapter's base)
    and the parts, each in ``shards``, are alike.

    What reads it has to know that (`TensorParallel.vocabulary`): the module itself no longer works.
    """
    if type(head) is not nn.Linear or head is not model.get_output_embeddings() or head.bias is not None:
        return
    if head.weight is model.get_input_embeddings().weight or head.out_features % (mesh.size() * shards):
        return
    _shard(head, "weight", 0, mesh)
    first = head.out_features // mesh.size() * mesh.get_local_rank()
    state.vocabulary = Vocabulary(first, mesh.get_group())


def final_norms(model: Any) -> list[str]:
    """Names of the backbone's children that have weights and are neither layers nor embedding."""
    _, layers = decoder_layers(model)
    return [
        key
        for key, module in getattr(model, model.base_model_prefix).named_children()
        if module is not layers and module is not model.get_input_embeddings() and list(module.parameters())
    ]


def _apply_block(
    name: str, block: nn.Module, child: str, plan: Mapping[str, str], mesh: DeviceMesh, state: TensorParallel
) -> None:
    """Split one child of a decoder layer and put the region's borders round it."""
    group, parameters = state.group, [f"{name}.{key}" for key, _ in block.named_parameters()]
    styles = {
        key.removeprefix(f"{child}."): style for key, style in plan.items() if key.startswith(f"{child}.")
    }
    present = {key: style for key, style in styles.items() if _has(block, key)}
    if "rowwise" in present.values() and not _has(block, "experts"):
        for key, style in present.items():
            _split(f"{name}.{key}", block, key, style, mesh)
        if hasattr(block, "num_key_value_groups"):
            block.num_key_value_groups = _local_groups(block, mesh.size())  # type: ignore[assignment]
        _border(block, lambda x: enter(x, group, state.sequence), lambda y: leave(y, group, state.sequence))
        split = {key for key, parameter in block.named_parameters() if hasattr(parameter, "placements")}
        state.partial.update(key for key in parameters if key.removeprefix(f"{name}.") not in split)
    elif not list(block.children()):  # norms, dropout: token by token, on what there is of them
        state.partial.update(parameters if state.sequence else [])
    elif "attn" in child or "attention" in child or hasattr(block, "is_causal"):
        if state.sequence:
            _border(block, lambda x: gather(x, group), lambda y: keep_own(y, group))
    else:
        state.splits_tokens = True
        # Experts that lie on several ranks get the tokens of all of them.
        whole = {key for key, parameter in block.named_parameters() if not hasattr(parameter, "placements")}
        state.partial.update(f"{name}.{key}" for key in whole)
        if not state.sequence:
            _border(block, lambda x: keep_own(x, group), lambda y: gather(y, group))


def _split(name: str, block: nn.Module, key: str, style: str, mesh: DeviceMesh) -> None:
    """Let a linear layer, with adapters or without, hold this rank's share."""
    layer = block.get_submodule(key)
    linear = layer.base if isinstance(layer, LoraLinear) else layer
    if type(linear) is not nn.Linear:
        raise ConfigError(
            f"{name} ({type(linear).__name__}) cannot be split over devices",
            where="--tensor_parallel_size",
            why="plain linear layers can, quantised ones cannot",
            fix="--data_parallel_shard_size for a quantised base",
        )
    size = mesh.size()
    kind: Literal["column", "row"] = "column" if style == "colwise" else "row"
    rows = None
    if kind == "column" and re.search(r"\b[kv]_proj$", key) and _key_value_heads(block, linear) < size:
        heads = _key_value_heads(block, linear)
        width = linear.out_features // heads
        first = mesh.get_local_rank() * heads // size * width
        rows = slice(first, first + width)
    sharded = ShardedLinear(linear, Share(kind, size, rows))
    if rows is None:
        _shard(sharded, "weight", 0 if kind == "column" else 1, mesh)
        if sharded.bias is not None and kind == "column":
            _shard(sharded, "bias", 0, mesh)
    if not isinstance(layer, LoraLinear):
        block.set_submodule(key, sharded)
        return
    layer.base = sharded
    for adapter in layer.specs:
        if kind == "row":
            _shard(layer.lora_A, adapter, 1, mesh)
        elif rows is None:
            _shard(layer.lora_B, adapter, 0, mesh)
        if adapter in layer.starts:
            a, b = layer.starts[adapter]
            part = mesh.get_local_rank()
            layer.starts[adapter] = (
                (a.chunk(size, 1)[part], b)
                if kind == "row"
                else (a, b.chunk(size)[part] if rows is None else b)
            )
    if kind == "row":  # other inputs, other noise
        layer.key = mixed_seed(layer.key, 1 + mesh.get_local_rank())


def _shard(owner: Any, key: str, dim: int, mesh: DeviceMesh) -> None:
    whole = getattr(owner, key) if isinstance(owner, nn.Linear) else owner[key]
    parameter = nn.Parameter(
        distribute_tensor(whole.data, mesh, [Shard(dim)], src_data_rank=None),
        requires_grad=whole.requires_grad,
    )
    owner.register_parameter(key, parameter)


def _has(module: nn.Module, key: str) -> bool:
    try:
        module.get_submodule(key)
    except AttributeError:
        return False
    return True


def _key_value_heads(block: Any, linear: nn.Linear) -> int:
    return linear.out_features // block.head_dim


def _local_groups(block: Any, size: int) -> int:
    """How many query heads of a rank share one of its key/value heads."""
    config = block.config
    heads, shared = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    return (heads // size) // max(1, (shared or heads) // size)


def _border(block: nn.Module, on_entry: Any, on_exit: Any) -> None:
    """Change the hidden states that a block gets and gives."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if args:
            return (on_entry(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": on_entry(kwargs["hidden_states"])}

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        return on_exit(output) if isinstance(output, Tensor) else (on_exit(output[0]), *output[1:])

    block.register_forward_pre_hook(before, with_kwargs=True)
    block.register_forward_hook(after)
