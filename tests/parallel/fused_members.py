"""Runs for tests of fused training: the same member alone on a base of its own, or beside others on a shared one."""

from dataclasses import dataclass, field
from functools import partial

import torch

from swift.config.sections.tuner import TunerSection
from swift.data.collate import Batch
from swift.models.load import load_model
from swift.objectives.pooled import PooledObjective
from swift.objectives.preference.objective import PreferenceLoss
from swift.objectives.sft import SftObjective
from swift.parallel.answers import AnswerEngine
from swift.parallel.engine import ParameterSet
from swift.parallel.fused import MemberStep
from swift.parallel.native import NativeEngine
from swift.tuners.apply import apply_tuner

CPU = torch.device("cpu")


@dataclass
class Kind:
    """What makes one member differ from others."""

    name: str
    lengths: list[list[int]]  # documents of each micro-batch
    layout: str = "padded"
    tuner: dict = field(default_factory=dict)
    loss: str = "sft"
    seed: int = 1
    rate: float = 1e-2
    clip: float = 0.0

    def tuner_section(self):
        return TunerSection(**{"lora_rank": 4, "lora_dropout": 0.0, **self.tuner})


KINDS = [
    Kind("a", [[9, 5, 7]], tuner={"lora_rank": 2}),
    Kind("b", [[6, 11], [4, 13], [8]], "joined", {"lora_rank": 8, "lora_dropout": 0.3}, seed=2),
    Kind("c", [[12, 3, 5, 4], [10, 6]], "packed", {"target_modules": ["q_proj", "down_proj"]}, "dft", seed=3),
    Kind("d", [[7, 5, 6, 9], [5, 5]], "padded", {"lora_dropout": 0.5, "use_rslora": True}, "dpo", seed=4),
    Kind("e", [[5, 6]], "joined", {"target_modules": ["all-linear", "lm_head"], "lora_dropout": 0.1}, seed=5),
]


@dataclass
class Member:
    kind: Kind
    adapter: str
    engine: NativeEngine
    parameters: dict

    def step(self, number=0, kind=None):
        """Its optimizer step ``number`` as a whole: data and dropout are functions of that number."""
        kind = kind or self.kind
        batches = [batch_of(kind, lengths, 100 * number + at) for at, lengths in enumerate(kind.lengths)]
        return MemberStep(self.adapter, self.engine, batches, objective_of(kind), 1000 * kind.seed + number)

    def gradients(self):
        found = [parameter.grad.clone() for parameter in self.parameters.values()]
        self.clear()
        return found

    def clear(self):
        for parameter in self.parameters.values():
            parameter.grad = None

    def values(self):
        return [parameter.detach().clone() for parameter in self.parameters.values()]

    def update(self, number):
        """Clip and step, as the training loop does."""
        self.engine.clip()
        self.engine.step(number)


def base(model_dir, dtype=torch.float64, **options):
    return load_model(model_dir, dtype=dtype, **options)


def attach(model, kind, adapter, dtype=torch.float64, **options):
    """A member on ``model``, its adapter moved away from the zero update."""
    tuned = apply_tuner(model, kind.tuner_section(), seed=kind.seed, param_dtype=dtype, adapter_name=adapter)
    for layer in tuned.named_trainable().values():
        layer.data = layer.data.to(dtype)
    parameters = tuned.named_trainable()
    generator = torch.Generator().manual_seed(kind.seed)
    with torch.no_grad():
        for parameter in parameters.values():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += 0.05 * noise.to(parameter.dtype)
    optimizer = torch.optim.AdamW(parameters.values(), lr=kind.rate)
    sets = [ParameterSet("default", parameters, optimizer, lambda step: kind.rate, kind.clip)]
    make = NativeEngine
    if kind.loss == "dpo":
        make = partial(AnswerEngine, reference=tuned.adapter_disabled)
    return Member(
        kind, adapter, make(model, sets, device=CPU, dtype=dtype, chunk_size=8, **options), parameters
    )


def alone(member, number=0):
    """Gradients of the member's own engine, run by itself."""
    step = member.step(number)
    with member.engine._switch.use(member.adapter):
        output = member.engine.forward_backward(step.batches, step.objective, step.seed)
    return output


def objective_of(kind):
    if kind.loss == "dpo":
        return PooledObjective(
            PreferenceLoss(kinds={"sigmoid": 1.0}, beta=0.5, knobs={"sigmoid": {"label_smoothing": 0.0}})
        )
    return SftObjective(dynamic=kind.loss == "dft")


def batch_of(kind, lengths, number):
    """One micro-batch of random tokens; everything behind the first two of a document is learned."""
    generator = torch.Generator().manual_seed(7919 * kind.seed + number)
    documents = [torch.randint(3, 300, (length,), generator=generator) for length in lengths]
    rows = {
        "padded": [[one] for one in documents],
        "joined": [documents],
        "packed": [documents[0::2], documents[1::2]] if len(documents) > 1 else [documents],
    }[kind.layout]
    width = max(sum(map(len, row)) for row in rows)
    ids = torch.full((len(rows), width), 1)
    targets = torch.full((len(rows), width), -100)
    positions = torch.zeros(len(rows), width, dtype=torch.long)
    spans = []
    for at, row in enumerate(rows):
        start = 0
        for document in row:
            end = start + len(document)
            ids[at, start:end] = document
            targets[at, start + 1 : end - 1] = document[2:]
            positions[at, start:end] = torch.arange(len(document))
            start = end
        positions[at, start:] = torch.arange(width - start) + (start if kind.layout == "padded" else 0)
        spans.append([len(one) for one in row] + ([width - start] if start < width else []))
    batch = Batch(
        ids,
        positions,
        targets,
        None,
        None if kind.layout == "padded" else spans,
        sum(lengths),
        int((targets != -100).sum()),
        [],
        [],
    )
    if kind.loss == "dpo":
        batch.groups = [2] * (len(lengths) // 2)
        batch.labels = torch.zeros(len(lengths) // 2, 1)
        batch.target_counts = [len(one) - 2 for row in rows for one in row]
    return batch
