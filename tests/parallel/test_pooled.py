"""What is read at the end of sequences: the same in every layout, and what transformers itself computes."""

import json

import pytest
import torch

from swift.config.bind import resolve
from swift.data.collate import collate
from swift.data.groups import task_format
from swift.data.rows import Row
from swift.data.tokenise import Encoder, encode_rows
from swift.data.tokens import TokenDataset
from swift.models.classifier import ClassifierHead
from swift.models.head import answer_difference, split_backbone, split_score
from swift.models.load import load_model, load_template
from swift.parallel.pooled import PooledEngine
from swift.train.tasks import engine_of, pooled_objective

TEXTS = [
    "red",
    "green blue red cat",
    "a bird sings and the dog runs away",
    "cat cat cat cat cat cat cat",
    "x",
]


def resolved_task(**options):
    values = {"model": "m", "dataset": "d", **options}
    return resolve("sft", values=values, planning=True)


def dataset_of(folder, rows, resolved):
    template = load_template(folder, resolved.config.template)
    encoder = Encoder(template, 512, "delete", task_format(resolved.config))
    store = encode_rows([Row(row, "rows:", number) for number, row in enumerate(rows, 1)], encoder)
    assert not store.report.bad_rows
    return TokenDataset([store]), template.tokenizer


def class_rows(labels):
    return [
        {"messages": [{"role": "user", "content": text}], "label": label}
        for text, label in zip(TEXTS, labels, strict=True)
    ]


def classifier(folder, head, dtype=torch.float32):
    model = load_model(folder, dtype=dtype, head=head)
    return model, PooledEngine(model, [], device=torch.device("cpu"), dtype=dtype, split=split_score)


def test_every_layout_reads_the_same(tiny_model_dir):
    resolved = resolved_task(task_type="seq_cls", num_labels=3)
    dataset, _ = dataset_of(tiny_model_dir, class_rows([0, 1, 2, 0, 1]), resolved)
    _, engine = classifier(tiny_model_dir, ClassifierHead(3))
    alone = torch.cat([engine.predict(collate(dataset, [[i]], "padded")).values for i in range(5)])
    padded = collate(dataset, [[i] for i in range(5)], "padded", 7)
    joined = collate(dataset, [[0, 1, 2, 3, 4]], "padding_free", 7)
    packed = collate(dataset, [[0, 1], [4], [2, 3]], "packed", 7)
    assert packed.groups == [1] * 5 and packed.num_targets == 5
    assert torch.allclose(engine.predict(padded).values, alone, atol=1e-6)
    assert torch.allclose(engine.predict(joined).values, alone, atol=1e-6)
    assert torch.allclose(engine.predict(packed).values, alone[[0, 1, 4, 2, 3]], atol=1e-6)
    assert packed.labels[:, 0].tolist() == [0, 1, 1, 2, 0]


CLASSES = {
    "single_label_classification": [0, 2, 1, 1, 0],
    "multi_label_classification": [[0], [1, 2], [], [0, 1, 2], [2]],
    "regression": [[0.5, -1, 2], [0, 0, 0.25], [1, 2, 3], [-4, 0.125, 1], [3, 3, -3]],
}


@pytest.mark.parametrize("problem", CLASSES)
def test_the_loss_is_that_of_transformers(tiny_model_dir, tmp_path, problem):
    """Oracle: AutoModelForSequenceClassification of the saved folder, on its own padded batch."""
    from transformers import AutoModelForSequenceClassification

    resolved = resolved_task(task_type="seq_cls", num_labels=3, problem_type=problem)
    dataset, tokenizer = dataset_of(tiny_model_dir, class_rows(CLASSES[problem]), resolved)
    model, engine = classifier(tiny_model_dir, ClassifierHead(3, problem))
    model.config.pad_token_id = tokenizer.pad_token_id
    with torch.no_grad():
        model.score.weight.mul_(20)  # scores of a size that a loss can tell apart
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [
        "Qwen3ForSequenceClassification"
    ]
    batch = collate(dataset, [[i] for i in range(5)], "padded", tokenizer.pad_token_id)
    objective = pooled_objective(resolved.config)
    loss, _ = objective(engine.predict(batch), batch, objective.denominators([batch]))
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path, attn_implementation="eager").eval()
    wanted = batch.labels if problem != "single_label_classification" else batch.labels[:, 0].long()
    lengths = torch.as_tensor(dataset.lengths)
    mask = (torch.arange(batch.input_ids.shape[1]) < lengths[:, None]).long()
    with torch.no_grad():
        output = theirs(input_ids=batch.input_ids, attention_mask=mask, labels=wanted)
    assert torch.allclose(engine.predict(batch).values, output.logits, atol=1e-5)
    assert float(loss) == pytest.approx(float(output.loss), abs=1e-5)


@pytest.mark.parametrize("problem", CLASSES)
def test_gradients_do_not_depend_on_how_a_step_is_split(tiny_model_dir, problem):
    resolved = resolved_task(task_type="seq_cls", num_labels=3, problem_type=problem)
    dataset, _ = dataset_of(tiny_model_dir, class_rows(CLASSES[problem]), resolved)
    objective = pooled_objective(resolved.config)

    def gradient(parts):
        model, engine = classifier(tiny_model_dir, ClassifierHead(3, problem), torch.float64)
        engine.forward_backward([collate(dataset, part, "padded") for part in parts], objective)
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    whole = gradient([[[i] for i in range(5)]])
    split = gradient([[[0], [1]], [], [[2]], [[3], [4]]])
    assert torch.allclose(whole, split, atol=1e-10)


def test_the_generative_score_is_the_log_odds_of_the_two_answers(tiny_model_dir):
    resolved = resolved_task(task_type="generative_reranker")
    row = {
        "messages": [{"role": "user", "content": "red"}],
        "positive": ["green"],
        "negative": ["cat", "dog"],
    }
    dataset, _ = dataset_of(tiny_model_dir, [row], resolved)
    model = load_model(tiny_model_dir, dtype=torch.float32)
    engine = PooledEngine(
        model, [], device=torch.device("cpu"), dtype=torch.float32, readout=answer_difference(40, 41)
    )
    values = engine.predict(collate(dataset, [[0]], "padding_free")).values
    for (sequence, _), value in zip(dataset.group(0)[0], values, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.as_tensor(sequence).long()[None]).logits[0, -1]
        assert float(value) == pytest.approx(float(logits[40] - logits[41]), abs=1e-5)


def test_vectors_are_the_last_hidden_states(tiny_model_dir):
    resolved = resolved_task(task_type="embedding")
    row = {
        "messages": [{"role": "user", "content": "red"}],
        "positive_messages": [[{"role": "user", "content": "a cat"}]],
    }
    dataset, tokenizer = dataset_of(tiny_model_dir, [row], resolved)
    pairs, labels = dataset.group(0)
    sequences = [ids for ids, _ in pairs]
    assert [tokenizer.decode(one) for one in sequences] == ["red<|im_end|>", "a cat<|im_end|>"]
    assert labels.tolist() == [1.0]
    model = load_model(tiny_model_dir, dtype=torch.float32)
    engine = PooledEngine(model, [], device=torch.device("cpu"), dtype=torch.float32, split=split_backbone)
    values = engine.predict(collate(dataset, [[0]], "padded")).values
    wanted = [model.model(torch.as_tensor(one).long()[None]).last_hidden_state[0, -1] for one in sequences]
    assert torch.allclose(values, torch.stack(wanted), atol=1e-5)


def test_mean_pooling_is_the_mean_over_the_tokens_of_each_text(tiny_model_dir):
    """By hand as sentence embeddings do it: hidden states times the attention mask of a padded batch."""
    resolved = resolved_task(task_type="embedding", embedding_pooling="mean")
    rows = [
        {"messages": [{"role": "user", "content": one}], "positive": [other], "negative": [TEXTS[4]]}
        for one, other in ((TEXTS[2], TEXTS[0]), (TEXTS[1], TEXTS[3]))
    ]
    dataset, tokenizer = dataset_of(tiny_model_dir, rows, resolved)
    model = load_model(tiny_model_dir, dtype=torch.float32)
    make = engine_of(resolved.config, model, tokenizer)
    engine = make(model, [], device=torch.device("cpu"), dtype=torch.float32)
    sequences = [torch.as_tensor(one).long() for i in range(2) for one, _ in dataset.group(i)[0]]
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    mask = torch.arange(ids.shape[1]) < torch.tensor([len(one) for one in sequences])[:, None]
    theirs = load_model(tiny_model_dir, dtype=torch.float32, attention="eager").model
    with torch.no_grad():
        hidden = theirs(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    wanted = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    for rows_of_batch, mode in (([[0], [1]], "padded"), ([[0, 1]], "padding_free")):
        values = engine.predict(collate(dataset, rows_of_batch, mode, 7)).values
        assert torch.allclose(values, wanted, atol=1e-5)
