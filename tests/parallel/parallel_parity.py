"""What parity tests of the dimensions share: tiny models of several families, batches, gradients of one process."""

from __future__ import annotations

import functools

import torch
from worker_pool import mesh_of, pool

from swift.config.sections.parallel import ParallelSection
from swift.data.collate import Batch
from swift.models.head import split_head
from swift.models.sharded import local
from swift.objectives.pooled import PooledObjective
from swift.objectives.preference.objective import PreferenceLoss
from swift.objectives.sft import SftObjective
from swift.parallel.answers import AnswerEngine
from swift.parallel.data_parallel import Ranks, ShardOptions
from swift.parallel.distribute import distribute
from swift.parallel.engine import ParameterSet
from swift.parallel.native import NativeEngine
from swift.parallel.world import World
from swift.tuners.apply import attach_adapter
from swift.tuners.lora import AdapterSpec, is_linear
from swift.tuners.lora_parameters import find_parameters

FAMILIES = {
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "llama": {"model_type": "llama", "tie_word_embeddings": True},
    "gemma": {"model_type": "gemma", "head_dim": 16, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "sliding_window": 16},
    "qwen2": {"model_type": "qwen2"},  # has biases
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
}
LIMITS = {torch.float64: 1e-10, torch.float32: 1e-5}


def tiny(
    family="qwen3",
    dtype=torch.float64,
    *,
    lora=False,
    layers=2,
    experts="eager",
    again=False,
    bound=False,
    **changes,
):
    """A model of random weights, the same in every process; with LoRA whose B is not zero.

    ``bound``: norms and MLPs compute with functions bound to each module, as liger's kernels are.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from swift.models.attention import VARLEN, register_varlen_attention

    register_varlen_attention()
    sizes = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
    }
    config = AutoConfig.for_model(**{**sizes, **FAMILIES.get(family, {"model_type": family}), **changes})
    torch.manual_seed(0)
    how = {"experts_implementation": experts} if "moe" in family else {}  # only eager has float64
    model = AutoModelForCausalLM.from_config(config, attn_implementation=VARLEN, dtype=dtype, **how)
    if again:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # biases and norms away from 0 and 1, so that nothing can hide in them
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
    if dtype == torch.float64:
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = functools.partial(exact_norm, module)
            elif type(module).__name__ == "Qwen3MoeTopKRouter":
                module.forward = functools.partial(exact_router, module)
    if bound:
        for module in model.modules():
            if isinstance(getattr(module, "act_fn", None), torch.nn.Module) and hasattr(module, "up_proj"):
                module.__dict__["forward"] = _bound_mlp.__get__(module, type(module))
            elif type(module).__name__.endswith("RMSNorm"):
                module.__dict__["forward"] = exact_norm.__get__(module, type(module))
    if lora:
        linear = [name for name, module in model.named_modules() if is_linear(module) and name != "lm_head"]
        spec = AdapterSpec(rank=4, alpha=8)
        fused = (
            find_parameters(model, ["experts.gate_up_proj", "experts.down_proj"]) if lora == "experts" else {}
        )
        parameters = {name: (spec, keys) for name, keys in fused.items()}
        attach_adapter(model, dict.fromkeys(linear, spec), parameters=parameters, dtype=dtype)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
    return model


def _bound_mlp(module, x):
    """liger's ``LigerSwiGLUMLP.forward`` without its kernel."""
    return module.down_proj(torch.nn.functional.silu(module.gate_proj(x)) * module.up_proj(x))


def exact_norm(module, states):
    """RMSNorm in the precision of its input: transformers' own rounds to float32, which may fall to either side."""
    epsilon = getattr(module, "variance_epsilon", None) or module.eps
    normed = states * torch.rsqrt(states.square().mean(-1, keepdim=True) + epsilon)
    return normed * (module.weight + ("Gemma" in type(module).__name__))


def exact_router(module, states):
    """Likewise."""
    logits = torch.nn.functional.linear(states.reshape(-1, module.hidden_dim), module.weight)
    scores, indices = logits.softmax(-1).topk(module.top_k, dim=-1)
    return logits, scores / scores.sum(-1, keepdim=True) if module.norm_topk_prob else scores, indices


def token_batch(lengths, *, packed=True, seed=0, weighted=True):
    """Rows of documents of these lengths (a list for each row); targets behind the third token of each."""
    generator = torch.Generator().manual_seed(seed)
    width = max(map(sum, lengths))
    ids, positions, targets = (torch.zeros(len(lengths), width, dtype=torch.long) for _ in range(3))
    targets -= 100
    whole = [[*row, width - sum(row)] if width > sum(row) else list(row) for row in lengths]
    for row, documents in enumerate(lengths):
        start = 0
        for length in documents:
            tokens = torch.randint(3, 96, (length,), generator=generator)
            ids[row, start : start + length] = tokens
            positions[row, start : start + length] = torch.arange(length)
            targets[row, start + 2 : start + length - 1] = tokens[3:]
            start += length
        positions[row, start:] = torch.arange(width - start) + (0 if packed else start)
    weights = torch.rand(ids.shape, generator=generator) + 0.5
    return Batch(
        ids,
        positions,
        targets,
        torch.where(targets == -100, 0, weights) if weighted else None,
        whole if packed else None,
        sum(map(sum, lengths)),
        int((targets != -100).sum()),
        [],
        [],
    )


def preference_batch(lengths, *, packed=True, seed=0):
    """Documents 2i and 2i + 1 are a pair."""
    batch = token_batch(lengths, packed=packed, seed=seed, weighted=False)
    documents = [length for row in lengths for length in row]
    batch.target_counts = [length - 3 for length in documents]
    batch.groups = [2] * (len(documents) // 2)
    batch.labels = torch.zeros(len(documents) // 2, 1)
    batch.reference = -4.0 * torch.arange(1, len(documents) + 1)
    return batch


PACKED = [[[13, 9, 26]], [[5, 40]], [[31]], [[8, 8, 20]]]
ROWS = [[[17], [30]], [[23], [8]]]


def step_of(task, packed=True, rows=1):
    """Micro-batches of one step, and the objective; ``rows``: how many equal rows a packed micro-batch has."""
    if task == "dpo":
        lengths = [[[13, 9], [20, 11]], [[5, 17]]] if packed else [[[17], [30]], [[23], [8]]]
        batches = [preference_batch(part, packed=packed, seed=at) for at, part in enumerate(lengths)]
        return batches, PooledObjective(PreferenceLoss({"sigmoid": 1.0}, 0.1))
    lengths = [part * rows for part in PACKED] if packed else ROWS
    return [token_batch(part, packed=packed, seed=at) for at, part in enumerate(lengths)], SftObjective()


def engine_of(model, task="sft", *, clip=0.0, **options):
    """An engine over what of the model is trained."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.SGD(list(parameters.values()), lr=0.1)
    sets = [ParameterSet("default", parameters, optimizer, lambda step: 0.2, clip)]
    kind = AnswerEngine if task == "dpo" else NativeEngine
    dtype = next(model.parameters()).dtype
    return kind(model, sets, device=torch.device("cpu"), dtype=dtype, chunk_size=8, **options)


def distributed_engine(
    model, rank, layout, task="sft", ring=None, sequence=False, schedule="1f1b", **options
):
    """An engine over a model that the ranks of a layout share."""
    world = World(rank, layout, mesh_of(layout))
    method = "auto" if ring is None else "ring" if ring == layout.cp else "ulysses" if ring == 1 else "hybrid"
    section = ParallelSection(
        tensor_parallel_size=layout.tp,
        pipeline_parallel_size=layout.pp,
        context_parallel_size=layout.cp,
        expert_parallel_size=layout.ep,
        sequence_parallel=sequence,
        sequence_parallel_method=method,
        pipeline_schedule=schedule,
    )
    shards = ShardOptions() if layout.dp_shard > 1 else None
    divided = distribute(model, world, split_head(model), section, shards)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    ranks = Ranks(world, trained, **divided.parts)
    return engine_of(model, task, ranks=ranks, split=lambda _: divided.split, **options)


def compare(rank, layout, family, task, packed, dtype, lora, ring, sequence, schedule, layers, rows, changes):
    """In a rank: relative errors of loss, gradients (with the worst one's name) and norm; share of the weights."""
    changes = {**changes, "lora": lora, "layers": layers}
    wanted_loss, wanted = expected(tiny(family, dtype, **changes), task, packed, rows)
    norm = torch.stack([gradient.norm() for gradient in wanted.values()]).norm()
    model = tiny(family, dtype, **changes)
    total = sum(parameter.numel() for parameter in model.parameters())
    engine = distributed_engine(model, rank, layout, task, ring, sequence, schedule)
    batches, objective = step_of(task, packed, rows)
    world = engine.ranks.world
    output = engine.forward_backward(batches[world.data_rank :: layout.dp], objective)
    (loss,) = world.sums([float(output.loss)])
    parameters = engine.parameter_sets["default"].parameters
    found = {name: engine.ranks.whole(p.grad) for name, p in parameters.items()}
    if engine.ranks.pipeline:
        held = [None] * layout.pp
        torch.distributed.all_gather_object(held, set(found), group=engine.ranks.pipeline.group)
        assert set().union(*held) == wanted.keys()
        wanted = {name: wanted[name] for name in found}
    error, name = worst(found, wanted)
    return {
        "loss": abs(loss - wanted_loss) / abs(wanted_loss),
        "gradients": error,
        "worst": name,
        "norm": abs(float(engine.clip()["default"] / norm) - 1),
        "share": sum(local(parameter).numel() for parameter in model.parameters()) / total,
    }


def check(
    layout,
    family="qwen3",
    task="sft",
    packed=True,
    dtype=torch.float64,
    lora=False,
    ring=None,
    sequence=False,
    schedule="1f1b",
    layers=2,
    rows=1,
    **changes,
):
    """Assert that a step of the layout is that of one process; the largest share of the weights that a rank holds."""
    arguments = (layout, family, task, packed, dtype, lora, ring, sequence, schedule, layers, rows, changes)
    results = pool(layout.world_size).run(compare, *arguments)
    for result in results:
        for what in ("loss", "gradients", "norm"):
            assert result[what] < LIMITS[dtype], result
    return max(result["share"] for result in results)


STEPS = 20


def train(engine):
    """Losses and norms of clipped steps; then every trained parameter as a whole."""
    ranks, losses, norms = engine.ranks, [], []
    for step in range(STEPS):
        batches, objective = step_of("sft")
        own = batches[ranks.world.data_rank :: ranks.world.layout.dp] if ranks else batches
        loss = float(engine.forward_backward(own, objective).loss)
        losses += ranks.world.sums([loss]) if ranks else [loss]
        norms.append(float(engine.clip()["default"]))
        engine.step(step)
    parameters = engine.parameter_sets["default"].parameters
    return losses, norms, {name: ranks.whole(p) if ranks else p for name, p in parameters.items()}


def curve(rank, layout, family, lora, sequence, ring):
    """In a rank: the same steps in one process and in the layout; how far the ends lie apart on this rank."""
    with torch.no_grad():
        before = {name: p.clone() for name, p in tiny(family, lora=lora).named_parameters()}
    losses, norms, wanted = train(engine_of(tiny(family, lora=lora), clip=0.5))
    model = tiny(family, lora=lora)
    engine = distributed_engine(model, rank, layout, ring=ring, sequence=sequence, clip=0.5)
    found_losses, found_norms, found = train(engine)
    assert found.keys() == wanted.keys() or engine.ranks.pipeline
    # A gradient that stayed that of one rank would have led its parameter elsewhere.
    moved = min(float((wanted[name] - before[name]).abs().max()) for name in wanted)
    error, name = worst(found, {name: wanted[name] for name in found})
    return (losses, found_losses), (norms, found_norms), moved, error, name


def expected(model, task="sft", packed=True, rows=1):
    """(loss, name -> gradient) of a step in one process."""
    engine = engine_of(model, task)
    output = engine.forward_backward(*step_of(task, packed, rows))
    return float(output.loss), {
        name: p.grad for name, p in engine.parameter_sets["default"].parameters.items()
    }


def worst(found, wanted):
    """(relative error, name) of the gradient that differs most; they must be of the same parameters."""
    assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
    for name, gradient in wanted.items():
        assert found[name] is not None and found[name].shape == gradient.shape, name
    scale = max(float(gradient.abs().max()) for gradient in wanted.values())
    errors = {name: float((found[name] - wanted[name]).abs().max()) / scale for name in wanted}
    name = max(errors, key=lambda key: errors[key])
    return errors[name], name
