"""Vectors and scores: batches against one plain forward for each text, and `swift infer` over a file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from swift.cli import infer as infer_command
from swift.config.bind import resolve
from swift.config.sections.task import TaskSection
from swift.config.sections.template import TemplateSection
from swift.core.errors import ConfigError, ModelError
from swift.data.sources import parse_dataset_spec
from swift.evaluate.values import read_rows_of_texts, value_texts
from swift.inference.context import find_context
from swift.inference.engines.base import Request
from swift.inference.engines.embedded_core import EmbeddedCore
from swift.models.classifier import ClassifierHead
from swift.models.load import ModelBundle, load_bundle, load_model

PROMPTS = [[7, 8, 9], [30] * 11, [5], [12, 13, 14, 15, 16, 17], list(range(10, 50))]


@pytest.fixture(scope="module")
def classifier_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier") / "model"
    model = load_model(tiny_model_dir, dtype=torch.float32, head=ClassifierHead(3))
    shutil.copytree(tiny_model_dir, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    model.config.pad_token_id = 0
    model.save_pretrained(folder)
    return folder


def bundle_of(folder: Path) -> ModelBundle:
    context = find_context(resolve("infer", values={"model": str(folder)}))
    return load_bundle(folder, TemplateSection(), dtype=torch.float32, device="cpu", head=context.head)


@torch.no_grad()
def test_scores_of_a_classifier_are_transformers_own(classifier_dir: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    core = EmbeddedCore(bundle_of(classifier_dir))
    model = AutoModelForSequenceClassification.from_pretrained(classifier_dir).eval()
    for prompt, scores in zip(PROMPTS, core.pool(PROMPTS), strict=True):
        torch.testing.assert_close(
            torch.tensor(scores), model(input_ids=torch.tensor([prompt])).logits[0], atol=1e-5, rtol=1e-4
        )
    with pytest.raises(ConfigError, match="it writes none"):
        core.add(Request("a", [5]))
    with pytest.raises(ConfigError, match="outside"):
        core.pool([[5], [99999]])


@pytest.mark.parametrize("pooling", ["last", "mean"])
@torch.no_grad()
def test_vectors_are_those_of_each_text_alone(tiny_model_dir: Path, pooling: str) -> None:
    bundle = bundle_of(tiny_model_dir)
    core = EmbeddedCore(bundle, task=TaskSection(task_type="embedding", embedding_pooling=pooling))
    for prompt, vector in zip(PROMPTS, core.pool(PROMPTS), strict=True):
        states = bundle.model.model(input_ids=torch.tensor([prompt]), use_cache=False).last_hidden_state[0]
        wanted = F.normalize(states[-1] if pooling == "last" else states.mean(0), dim=0)
        torch.testing.assert_close(torch.tensor(vector), wanted, atol=1e-5, rtol=1e-4)
    with pytest.raises(ConfigError, match="no vectors or scores"):
        EmbeddedCore(bundle).pool(PROMPTS)


@torch.no_grad()
def test_a_generative_reranker_scores_by_the_difference_of_two_answers(tiny_model_dir: Path) -> None:
    bundle = bundle_of(tiny_model_dir)
    words = {"generative_reranker_positive_token": "a", "generative_reranker_negative_token": "b"}
    core = EmbeddedCore(bundle, task=TaskSection(task_type="generative_reranker", **words))
    a, b = (bundle.tokenizer(word)["input_ids"][0] for word in "ab")
    for prompt, (score,) in zip(PROMPTS, core.pool(PROMPTS), strict=True):
        logits = bundle.model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0, -1]
        assert score == pytest.approx(float(logits[a] - logits[b]), abs=1e-4)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_infer_scores_the_rows_of_a_file_and_goes_on(
    classifier_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"messages": [{"role": "user", "content": f"number {n}"}], "label": n % 3} for n in range(5)]
    argv = [
        "--model",
        str(classifier_dir),
        "--device",
        "cpu",
        "--val_dataset",
        write(tmp_path / "r.jsonl", rows),
    ]
    path = tmp_path / "out.jsonl"
    argv += ["--result_path", str(path)]
    assert infer_command.run(argv) == 0
    results = [json.loads(line) for line in path.read_text().splitlines()]
    assert "num_rows        5" in capsys.readouterr().out
    bundle = bundle_of(classifier_dir)
    ids = [bundle.template.encode_sequence(row["messages"]) for row in rows]
    for result, scores in zip(results, EmbeddedCore(bundle).pool(ids), strict=True):
        assert result["scores"] == pytest.approx(scores, abs=1e-5)
        assert (
            result["class"] == scores.index(max(scores)) and result["extra"]["label"] == result["index"] % 3
        )
    whole = path.read_text()
    path.write_text("".join(line + "\n" for line in whole.splitlines()[:2]))
    assert infer_command.run(argv) == 0
    assert [json.loads(line)["class"] for line in path.read_text().splitlines()] == [
        r["class"] for r in results
    ]
    with pytest.raises(ModelError, match="scores or embeds texts; it writes none") as caught:
        infer_command.run(argv[:4])
    assert "--val_dataset" in (caught.value.fix or "")


def test_rows_of_rerankers_and_embeddings(tiny_model_dir: Path, tmp_path: Path) -> None:
    query = [{"role": "user", "content": "how tall?"}]
    rows = [
        {"messages": query, "positive_messages": ["It is 300 m."], "negative_messages": ["Red.", "No."]},
        {"messages": query},
    ]
    specs = [parse_dataset_spec(write(tmp_path / "r.jsonl", rows))]
    bundle = bundle_of(tiny_model_dir)
    good, bad = read_rows_of_texts(specs, {}, "embedding")
    assert [len(row.conversations) for row in good] == [4, 1] and not bad
    core = EmbeddedCore(bundle, task=TaskSection(task_type="embedding"))
    vectors = value_texts(core, bundle.template, good, "embedding", tmp_path / "v.jsonl")
    assert [len(result["vectors"]) for result in vectors] == [4, 1]
    assert vectors[0]["vectors"][0] == pytest.approx(vectors[1]["vectors"][0], abs=1e-5)
    good, bad = read_rows_of_texts(specs, {}, "reranker", "skip")
    assert [len(row.conversations) for row in good] == [3] and bad[0].endswith(
        'under "positive_messages" or "negative_messages"'
    )
    assert good[0].conversations[2] == [*query, {"role": "assistant", "content": "No."}]
