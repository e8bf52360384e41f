"""The engine: gradients do not depend on how a step is split, nor on layout; a rehearsal changes nothing."""

import numpy as np
import pytest
import torch

from swift.data.batching import BatchSchedule
from swift.data.collate import Batch
from swift.models.load import load_model
from swift.objectives.sft import SftObjective
from swift.parallel.engine import ParameterSet
from swift.parallel.isolation import check_isolation
from swift.parallel.native import NativeEngine
from swift.parallel.offload import OffloadedActivations

DOCUMENTS = [7, 12, 5, 9, 16, 4]


def engine_of(model_dir, *, attention="auto"):
    model = load_model(model_dir, dtype=torch.float64, attention=attention)
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3)
    sets = [ParameterSet("default", parameters, optimizer, lambda step: 1e-3, 1.0)]
    return NativeEngine(model, sets, device=torch.device("cpu"), dtype=torch.float64, chunk_size=8)


def documents():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 300, (length,), generator=generator) for length in DOCUMENTS]


def padded(chosen):
    width = max(len(tokens) for tokens in chosen)
    ids = torch.zeros(len(chosen), width, dtype=torch.long)
    targets = torch.full((len(chosen), width), -100)
    weights = torch.zeros(len(chosen), width)
    for row, tokens in enumerate(chosen):
        ids[row, : len(tokens)] = tokens
        targets[row, 2 : len(tokens) - 1] = tokens[3:]
        weights[row, 2 : len(tokens) - 1] = torch.linspace(0.5, 2.0, len(tokens) - 3)
    positions = torch.arange(width).repeat(len(chosen), 1)
    count = int((targets != -100).sum())
    return Batch(
        ids,
        positions,
        targets,
        weights,
        None,
        sum(map(len, chosen)),
        count,
        list(range(len(chosen))),
        [1] * len(chosen),
    )


def packed(chosen):
    rows = [padded([tokens]) for tokens in chosen]
    joined = [
        torch.cat([getattr(row, name) for row in rows], 1)
        for name in ("input_ids", "position_ids", "targets", "weights")
    ]
    return Batch(
        *joined,
        [[len(tokens) for tokens in chosen]],
        sum(map(len, chosen)),
        sum(row.num_targets for row in rows),
        [],
        [len(chosen)],
    )


def gradients(engine, batches):
    engine.forward_backward(batches, SftObjective())
    found = {
        name: p.grad.clone()
        for name, p in engine.parameter_sets["default"].parameters.items()
        if p.grad is not None
    }
    engine.parameter_sets["default"].optimizer.zero_grad()
    return found


SPLITS = {
    "one batch": lambda docs: [padded(docs)],
    "each alone": lambda docs: [padded([tokens]) for tokens in docs],
    "grouped by length": lambda docs: [padded(sorted(docs, key=len)[:3]), padded(sorted(docs, key=len)[3:])],
    "packed": lambda docs: [packed(docs)],
    "packed in two rows": lambda docs: [packed(docs[:2]), packed(docs[2:])],
}


@pytest.mark.parametrize("name", list(SPLITS)[1:])
@pytest.mark.parametrize("attention", ["auto", "sdpa"])
def test_gradient_does_not_depend_on_the_split(tiny_model_dir, name, attention):
    engine = engine_of(tiny_model_dir, attention=attention)
    docs = documents()
    expected = gradients(engine, SPLITS["one batch"](docs))
    found = gradients(engine, SPLITS[name](docs))
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-10)


def test_schedule_splits_give_the_same_gradient(tiny_model_dir):
    """Grouping by length changes which samples share a micro-batch, not the gradient of the whole set."""
    engine = engine_of(tiny_model_dir)
    docs = documents()
    results = []
    for group_by_length in (False, True):
        schedule = BatchSchedule(
            np.array(DOCUMENTS), batch_size=2, group_by_length=group_by_length, shuffle=True, seed=3
        )
        batches = [padded([docs[row[0]] for row in batch]) for batch in schedule.micro_batches(0)]
        results.append(gradients(engine, batches))
    for key, value in results[0].items():
        torch.testing.assert_close(results[1][key], value, rtol=0, atol=1e-10)


def test_rehearsal_leaves_no_trace(tiny_model_dir):
    engine = engine_of(tiny_model_dir)
    before = {name: value.clone() for name, value in engine.gather().items()}
    engine.rehearse(padded(documents()), SftObjective())
    group = engine.parameter_sets["default"]
    assert all(p.grad is None for p in group.parameters.values())
    assert not group.optimizer.state
    assert all(torch.equal(before[name], value) for name, value in engine.gather().items())


def test_clip_and_rates(tiny_model_dir):
    engine = engine_of(tiny_model_dir)
    engine.forward_backward([padded(documents())], SftObjective())
    expected = torch.stack(
        [p.grad.norm() for p in engine.parameter_sets["default"].parameters.values()]
    ).norm()
    norm = engine.clip()["default"]
    torch.testing.assert_close(norm, expected)
    clipped = torch.stack(
        [p.grad.norm() for p in engine.parameter_sets["default"].parameters.values()]
    ).norm()
    assert clipped <= 1.0 + 1e-6
    assert engine.step(0) == {"default": 1e-3}


def test_isolation_is_proven_or_refused(tiny_model_dir):
    from swift.core.errors import ConfigError

    engine = engine_of(tiny_model_dir)
    check_isolation(engine)
    engine._takes_lengths = False  # as a model would behave that ignores document borders
    with pytest.raises(ConfigError, match="cannot keep packed documents apart"):
        check_isolation(engine)


def test_offloaded_activations_give_the_same_gradient(tiny_model_dir, monkeypatch):
    """The hooks on CPU: every large saved tensor is moved away and back, no parameter is."""
    monkeypatch.setattr("swift.parallel.offload._LEAST_BYTES", 64)
    engine = engine_of(tiny_model_dir)
    expected = gradients(engine, [padded(documents())])
    moved = []
    pack = OffloadedActivations._pack

    def counting(self, tensor):
        packed = pack(self, tensor)
        moved.append((not isinstance(packed, torch.Tensor), tensor.untyped_storage().data_ptr()))
        return packed

    monkeypatch.setattr(OffloadedActivations, "_pack", counting)
    engine._offload = True
    found = gradients(engine, [padded(documents())])
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert sum(away for away, _ in moved) > 20
    weights = {parameter.untyped_storage().data_ptr() for parameter in engine.model.parameters()}
    assert not weights & {place for away, place in moved if away}
