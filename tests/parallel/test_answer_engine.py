"""Preference steps: by hand with two padded forwards, in every layout, for any split of a step, against references."""

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from swift.config.bind import resolve
from swift.data.collate import collate
from swift.data.groups import task_format
from swift.data.rows import Row
from swift.data.tokenise import Encoder, encode_rows
from swift.data.tokens import TokenDataset
from swift.models.load import load_model, load_template
from swift.parallel.answers import AnswerEngine, other_weights
from swift.parallel.engine import ParameterSet
from swift.train.tasks import pooled_objective
from swift.tuners.apply import apply_tuner

ANSWERS = [
    ("what is it", "red blue", "cat"),
    ("and then", "a bird sings", "the dog runs away now"),
    ("who", "one two three", "x"),
    ("so it goes on and on", "cat", "green green green"),
    ("why", "blue", "dog bird"),
]


def preference(**options):
    return resolve("rlhf", values={"model": "m", "dataset": "d", **options}, planning=True)


def user_and_answer(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def rows_of(kind):
    if kind == "kto":
        return [
            {"messages": user_and_answer(q, good), "label": at % 2 == 0}
            for at, (q, good, _) in enumerate(ANSWERS)
        ]
    return [{"messages": user_and_answer(q, good), "rejected_response": bad} for q, good, bad in ANSWERS]


def dataset_of(folder, resolved, rows=None):
    template = load_template(folder, resolved.config.template)
    encoder = Encoder(template, 512, "delete", task_format(resolved.config))
    kind = resolved.config.rlhf.rlhf_type
    store = encode_rows(
        [Row(row, "rows:", number) for number, row in enumerate(rows or rows_of(kind), 1)], encoder
    )
    assert not store.report.bad_rows, store.report.bad_rows
    dataset = TokenDataset([store])
    dataset.mismatched = kind == "kto"
    return dataset, template.tokenizer


def engine_of(folder, resolved, *, tuner="full", dtype=torch.float64):
    """A model whose trained weights have moved away from their start, which is the reference."""
    model = load_model(folder, dtype=dtype)
    section = preference(tuner_type=tuner, lora_dropout=0.0).config.tuner
    tuned = apply_tuner(model, section, seed=1, param_dtype=dtype)
    parameters = tuned.named_trainable()
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
    sets = [ParameterSet("default", parameters, optimizer, lambda step: 0.1, 0.0)]
    reference = tuned.adapter_disabled if tuner == "lora" else partial(other_weights, parameters, start)
    engine = AnswerEngine(
        model,
        sets,
        device=torch.device("cpu"),
        dtype=dtype,
        chunk_size=7,
        reference=reference,
        ld_alpha=resolved.config.rlhf.ld_alpha,
        mismatched=resolved.config.rlhf.rlhf_type == "kto",
    )
    return engine, parameters, start


def by_hand(model, tokenizer, template, messages):
    """[tokens of the answer] log-probabilities, from a forward of this text alone and a log_softmax of all logits."""
    ids = tokenizer.apply_chat_template(messages, tokenize=False)
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    tokens = torch.tensor([tokenizer(ids, add_special_tokens=False)["input_ids"]])
    encoded = template.encode(messages)
    assert encoded.input_ids == tokens[0].tolist()
    learned = [at for at, label in enumerate(encoded.labels) if label != -100]
    assert learned[0] == len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    logits = model(input_ids=tokens, use_cache=False).logits.log_softmax(-1)
    return torch.stack([logits[0, at - 1, tokens[0, at]] for at in learned])


def gradients(parameters):
    return {name: parameter.grad.clone() for name, parameter in parameters.items()}


def clear(parameters):
    for parameter in parameters.values():
        parameter.grad = None


def assert_same(first, second, tolerance=1e-10):
    assert first.keys() == second.keys()
    worst = max((first[name] - second[name]).abs().max().item() for name in first)
    assert worst < tolerance, worst


def _smoothed_exo(x):
    exo = x.sigmoid() * (F.logsigmoid(x) - math.log(0.999)) + (-x).sigmoid() * (
        F.logsigmoid(-x) - math.log(1e-3)
    )
    return exo - F.logsigmoid(x)


LOSSES = {
    "dpo": ({}, lambda c, r: -F.logsigmoid(0.1 * ((c.sum() - c.ref) - (r.sum() - r.ref)))),
    "ipo": (
        {"rlhf_type": "ipo"},
        lambda c, r: ((c.sum() - c.ref) / len(c) - (r.sum() - r.ref) / len(r) - 5).square(),
    ),
    "rpo": (
        {"rpo_alpha": 0.3, "beta": 0.2},
        lambda c, r: -F.logsigmoid(0.2 * ((c.sum() - c.ref) - (r.sum() - r.ref))) - 0.3 * c.mean(),
    ),
    "mpo": (
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        lambda c, r: (
            -0.8 * F.logsigmoid(0.1 * ((c.sum() - c.ref) - (r.sum() - r.ref)))
            - 0.2 * (F.logsigmoid(0.1 * (c.sum() - c.ref)) + F.logsigmoid(-0.1 * (r.sum() - r.ref)))
            - c.mean()
        ),
    ),
    "a mixture in which only exo_pair is smoothed": (
        {"loss_type": ["sigmoid", "exo_pair"]},
        lambda c, r: _smoothed_exo(0.1 * ((c.sum() - c.ref) - (r.sum() - r.ref))),
    ),
    "simpo": (
        {"rlhf_type": "simpo"},
        lambda c, r: -F.logsigmoid(2 * (c.mean() - r.mean()) - 1),
    ),
    "cpo": (
        {"rlhf_type": "cpo"},
        lambda c, r: -F.logsigmoid(0.1 * (c.sum() - r.sum())) - c.mean(),
    ),
    "orpo": (
        {"rlhf_type": "orpo"},
        lambda c, r: (
            -c.mean()
            - 0.1
            * F.logsigmoid(
                (c.mean() - r.mean()) - (torch.log1p(-c.mean().exp()) - torch.log1p(-r.mean().exp()))
            )
        ),
    ),
    "reference_free": (
        {"reference_free": True},
        lambda c, r: -F.logsigmoid(0.1 * (c.sum() - r.sum())),
    ),
}


class Answer:
    """Log-probabilities by hand, and the sum of those of the reference."""

    def __init__(self, values, ref):
        self.values, self.ref = values, ref

    def sum(self):
        return self.values.sum()

    def mean(self):
        return self.values.mean()

    def __len__(self):
        return len(self.values)


@pytest.mark.parametrize("tuner", ["full", "lora"])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradients_by_hand(tiny_model_dir, name, tuner):
    options, formula = LOSSES[name]
    resolved = preference(**options)
    engine, parameters, start = engine_of(tiny_model_dir, resolved, tuner=tuner)
    dataset, tokenizer = dataset_of(tiny_model_dir, resolved)
    batch = collate(dataset, [[0, 1, 2, 3, 4]], "padding_free")
    objective = pooled_objective(resolved.config)
    output = engine.forward_backward([batch], objective)
    ours = gradients(parameters)
    clear(parameters)
    template = load_template(tiny_model_dir, resolved.config.template)
    read = partial(by_hand, engine.model, tokenizer, template)
    total = 0.0
    for question, good, bad in ANSWERS:
        answers = []
        for answer in (good, bad):
            messages = user_and_answer(question, answer)
            with torch.no_grad(), other_weights(parameters, start):
                ref = read(messages).sum()
            answers.append(Answer(read(messages), ref))
        total = total + formula(*answers) / len(ANSWERS)
    total.backward()
    assert output.loss.item() == pytest.approx(total.item(), abs=1e-10)
    assert_same(ours, gradients(parameters), 1e-10 if tuner == "full" else 1e-6)  # adapters are float32


def test_length_desensitised_by_hand(tiny_model_dir):
    resolved = preference(ld_alpha=0.4)
    engine, parameters, start = engine_of(tiny_model_dir, resolved)
    dataset, tokenizer = dataset_of(tiny_model_dir, resolved)
    output = engine.forward_backward(
        [collate(dataset, [[0], [1], [2], [3], [4]], "padded")], pooled_objective(resolved.config)
    )
    template = load_template(tiny_model_dir, resolved.config.template)
    losses = []
    for question, *pair in ANSWERS:
        texts = [user_and_answer(question, answer) for answer in pair]
        values = [by_hand(engine.model, tokenizer, template, text) for text in texts]
        with torch.no_grad(), other_weights(parameters, start):
            refs = [by_hand(engine.model, tokenizer, template, text) for text in texts]
        shared = min(map(len, values))
        c, r = (
            (value - ref)[:shared].sum() + 0.4 * (value - ref)[shared:].sum()
            for value, ref in zip(values, refs, strict=True)
        )
        losses.append(-F.logsigmoid(0.1 * (c - r)).item())
    assert output.loss.item() == pytest.approx(np.mean(losses), abs=1e-10)


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_every_layout_gives_the_same(tiny_model_dir, kind):
    resolved = preference(rlhf_type=kind, per_device_train_batch_size=5)
    engine, parameters, _ = engine_of(tiny_model_dir, resolved)
    dataset, _ = dataset_of(tiny_model_dir, resolved)
    objective = pooled_objective(resolved.config)
    found = []
    for rows, mode in (
        ([[0], [1], [2], [3], [4]], "padded"),
        ([[0, 1, 2, 3, 4]], "padding_free"),
        ([[0, 1], [2], [3, 4]], "packed"),
    ):
        output = engine.forward_backward([collate(dataset, rows, mode, 7)], objective)
        found.append((output.loss.item(), output.metrics["groups"], gradients(parameters)))
        clear(parameters)
    for loss, metrics, grads in found[1:]:
        assert loss == pytest.approx(found[0][0], abs=1e-12)
        assert torch.allclose(metrics, found[0][1], atol=1e-10)
        assert_same(grads, found[0][2])


def test_any_split_of_a_step_gives_the_same_gradients(tiny_model_dir):
    resolved = preference()
    engine, parameters, _ = engine_of(tiny_model_dir, resolved)
    dataset, _ = dataset_of(tiny_model_dir, resolved)
    objective = pooled_objective(resolved.config)
    found = []
    for split in ([[0, 1, 2, 3, 4]], [[0], [1, 2, 3], [4]], [[0, 1], [], [2, 3, 4]]):
        batches = [collate(dataset, [rows] if rows else [], "padding_free") for rows in split]
        loss = engine.forward_backward(batches, objective).loss.item()
        found.append((loss, gradients(parameters)))
        clear(parameters)
    for loss, grads in found[1:]:
        assert loss == pytest.approx(found[0][0], abs=1e-12)
        assert_same(grads, found[0][1])


def test_kto_by_hand(tiny_model_dir):
    options = {"rlhf_type": "kto", "per_device_train_batch_size": 5, "desirable_weight": 1.5}
    resolved = preference(**options)
    engine, parameters, start = engine_of(tiny_model_dir, resolved)
    dataset, tokenizer = dataset_of(tiny_model_dir, resolved)
    batch = collate(dataset, [[0, 1, 2, 3, 4]], "padding_free")
    output = engine.forward_backward([batch], pooled_objective(resolved.config))
    ours = gradients(parameters)
    clear(parameters)
    template = load_template(tiny_model_dir, resolved.config.template)
    read = partial(by_hand, engine.model, tokenizer, template)

    def ratio(question, answer):
        messages = user_and_answer(question, answer)
        with torch.no_grad(), other_weights(parameters, start):
            ref = read(messages).sum()
        return read(messages).sum() - ref

    with torch.no_grad():
        mixed = [ratio(ANSWERS[at][0], ANSWERS[(at + 1) % 5][1]) for at in range(5)]
        z0 = max(0.0, torch.stack(mixed).mean().item())
    losses = []
    for at, (question, answer, _) in enumerate(ANSWERS):
        r = ratio(question, answer)
        losses.append(
            1.5 * (1 - torch.sigmoid(0.1 * (r - z0))) if at % 2 == 0 else 1 - torch.sigmoid(0.1 * (z0 - r))
        )
    loss = torch.stack(losses).mean()
    loss.backward()
    assert output.loss.item() == pytest.approx(loss.item(), abs=1e-10)
    assert_same(ours, gradients(parameters))
    kl = output.metrics["groups"][:, -1]
    assert (kl[0] / kl[1]).item() == pytest.approx(z0, abs=1e-10)


def test_kto_with_one_row_has_nothing_to_compare(tiny_model_dir):
    resolved = preference(rlhf_type="kto", per_device_train_batch_size=5)
    engine, _, _ = engine_of(tiny_model_dir, resolved)
    dataset, _ = dataset_of(tiny_model_dir, resolved)
    values = engine.predict(collate(dataset, [[2]], "padding_free")).values
    assert values.shape == (1, 5)
    assert values[0, 4] == 0


def test_known_log_probabilities_stand_for_the_reference(tiny_model_dir):
    resolved = preference()
    engine, _, _ = engine_of(tiny_model_dir, resolved)
    dataset, _ = dataset_of(tiny_model_dir, resolved)
    batch = collate(dataset, [[3, 1]], "padding_free")
    sums = engine.reference_sums(batch)
    dataset.reference = np.zeros((5, 2))
    dataset.reference[[3, 1]] = sums.reshape(2, 2).numpy()
    engine.reference = None
    known = engine.predict(collate(dataset, [[3, 1]], "padding_free")).values
    assert torch.allclose(known[:, 1], sums, atol=1e-5)
    assert (known[:, 1] != 0).all()


def test_the_reference_leaves_the_weights_and_the_mode_alone(tiny_model_dir):
    engine, parameters, start = engine_of(tiny_model_dir, preference())
    before = {name: parameter.data_ptr() for name, parameter in parameters.items()}
    engine.model.train()
    dataset, _ = dataset_of(tiny_model_dir, preference())
    engine.reference_sums(collate(dataset, [[0]], "padding_free"))
    assert engine.model.training
    assert before == {name: parameter.data_ptr() for name, parameter in parameters.items()}
    with pytest.raises(RuntimeError), other_weights(parameters, start):
        raise RuntimeError
    assert before == {name: parameter.data_ptr() for name, parameter in parameters.items()}


def test_metrics_of_an_evaluation(tiny_model_dir):
    resolved = preference()
    engine, _, _ = engine_of(tiny_model_dir, resolved)
    dataset, _ = dataset_of(tiny_model_dir, resolved)
    batch = collate(dataset, [[0, 1, 2, 3, 4]], "padding_free")
    values = engine.predict(batch).values
    loss = pooled_objective(resolved.config).loss
    measured = loss.measure(values, batch.labels, batch.groups)
    rewards = 0.1 * (values[:, 0] - values[:, 1])
    assert measured["rewards/chosen"] == pytest.approx(rewards[0::2].mean().item())
    assert measured["rewards/margins"] == pytest.approx((rewards[0::2] - rewards[1::2]).mean().item())
    assert measured["rewards/accuracies"] == (rewards[0::2] > rewards[1::2]).double().mean().item()
    assert measured["logps/rejected"] == pytest.approx(values[1::2, 0].mean().item())
    sums = loss(values, batch.labels, batch.groups).metrics
    assert (sums[:, 0] / sums[:, 1]).tolist() == pytest.approx(list(measured.values()), rel=1e-6)
    assert math.isfinite(sum(measured.values()))
