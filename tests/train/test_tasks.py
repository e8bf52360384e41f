"""Training for tasks over whole sequences, from rows to a folder that others load."""

import json
import random

import pytest
import torch
from safetensors.torch import load_file
from test_resume import Kill, final_weights, metric_lines

from swift.core.errors import ConfigError, DataError, ModelError
from swift.runs.metrics import read_metrics

WORDS = {0: "red blue green".split(), 1: "cat dog bird".split(), 2: "runs sleeps sings".split()}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def text_of(generator, kind):
    return " ".join(generator.choice(WORDS[kind]) for _ in range(generator.randint(2, 6)))


def user(text):
    return [{"role": "user", "content": text}]


@pytest.fixture
def class_rows():
    """Texts of three kinds, which the words give away."""
    generator = random.Random(1)
    kinds = [generator.randrange(3) for _ in range(48)]
    return [{"messages": user(text_of(generator, kind)), "label": kind} for kind in kinds]


@pytest.fixture
def ranking_rows():
    """A query of one kind; documents of this kind are relevant, those of others are not."""
    generator = random.Random(2)
    rows = []
    for _ in range(24):
        kind = generator.randrange(3)
        others = [other for other in WORDS if other != kind]
        rows.append(
            {
                "messages": user(text_of(generator, kind)),
                "positive_messages": [user(text_of(generator, kind)) for _ in range(generator.randint(1, 2))],
                "negative_messages": [
                    user(text_of(generator, generator.choice(others))) for _ in range(generator.randint(1, 3))
                ],
            }
        )
    return rows


@pytest.fixture
def run_task(run_training, tmp_path):
    """Call with rows and options; the same rows validate."""

    def run(rows, **options):
        data = write_rows(tmp_path / "rows.jsonl", rows)
        return run_training(**{"dataset": data, "val_dataset": data, "eval_strategy": "epoch", **options})

    return run


def last_evaluation(run):
    return [line for line in read_metrics(run.folder / "metrics.jsonl") if "eval_loss" in line][-1]


LEARNS = {
    "lora": {},
    "full": {"tuner_type": "full"},
    "packed": {"packing": True, "per_device_train_batch_size": 1},
    "padded": {"group_by_length": True},
}


@pytest.mark.parametrize("name", LEARNS)
def test_classes_are_learned(run_task, class_rows, name):
    options = {
        "task_type": "seq_cls",
        "num_labels": 3,
        "max_steps": 30,
        "learning_rate": 3e-3,
        **LEARNS[name],
    }
    run = run_task(class_rows, **options)
    measured = last_evaluation(run)
    assert measured["eval_accuracy"] > 0.9
    assert measured["eval_macro_f1"] > 0.9
    assert measured["eval_micro_f1"] == pytest.approx(measured["eval_accuracy"])
    lines = [line for line in read_metrics(run.folder / "metrics.jsonl") if "loss" in line]
    assert "token_accuracy" not in lines[0]
    assert lines[-1]["accuracy"] > 0.7


def class_options(problem, **options):
    return {
        "task_type": "seq_cls",
        "num_labels": 3,
        "problem_type": problem,
        "max_steps": 20,
        "learning_rate": 3e-3,
        **options,
    }


def test_several_classes_a_text_are_learned(run_task):
    generator = random.Random(4)
    rows = []
    for _ in range(48):
        kinds = [kind for kind in WORDS if generator.random() < 0.5]
        words = [text_of(generator, kind) for kind in kinds] or ["nothing"]
        rows.append({"messages": user(" ".join(words)), "label": kinds})
    options = class_options("multi_label_classification", max_steps=60, per_device_train_batch_size=8)
    measured = last_evaluation(run_task(rows, **options))
    assert measured["eval_micro_f1"] > 0.9
    assert measured["eval_macro_f1"] > 0.9


def test_numbers_are_learned(run_task):
    generator = random.Random(5)
    counts = [generator.randint(0, 6) for _ in range(48)]
    rows = [{"messages": user("cat " * count + "dog"), "label": count / 2} for count in counts]
    options = {"task_type": "seq_cls", "num_labels": 1, "max_steps": 60, "learning_rate": 3e-3}
    run = run_task(rows, **options)
    measured = last_evaluation(run)
    assert measured["eval_pearson"] > 0.9
    assert measured["eval_spearman"] > 0.9
    assert measured["eval_mae"] < 0.4
    assert not any("accuracy" in line for line in read_metrics(run.folder / "metrics.jsonl"))


@pytest.mark.parametrize("tuner", ["lora", "full"])
def test_a_classifier_is_what_transformers_and_peft_load(run_task, class_rows, tiny_model_dir, tuner):
    """Oracle: AutoModelForSequenceClassification, with PEFT for LoRA, gives the loss of the run's evaluation."""
    from peft import PeftModelForSequenceClassification
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    options = class_options("single_label_classification", tuner_type=tuner)
    run = run_task(class_rows, **options)
    last = run.folder / "last"
    tokenizer = AutoTokenizer.from_pretrained(last)
    if tuner == "full":
        model = AutoModelForSequenceClassification.from_pretrained(last)
    else:
        stored = load_file(last / "adapter_model.safetensors")
        assert stored["base_model.model.score.weight"].shape == (3, 64)
        settings = json.loads((last / "adapter_config.json").read_text())
        assert (settings["task_type"], settings["modules_to_save"]) == ("SEQ_CLS", ["score"])
        base = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir, num_labels=3)
        base.config.pad_token_id = tokenizer.pad_token_id
        model = PeftModelForSequenceClassification.from_pretrained(base, last)
    model.eval()
    loss = 0.0
    for row in class_rows:
        ids = tokenizer.apply_chat_template(
            row["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        with torch.no_grad():
            loss += float(model(input_ids=ids, labels=torch.tensor([row["label"]])).loss)
    assert loss / len(class_rows) == pytest.approx(last_evaluation(run)["eval_loss"], abs=1e-5)


def test_training_goes_on_from_the_adapter_of_a_classifier(run_task, class_rows):
    first = run_task(class_rows, **class_options("single_label_classification"))
    options = class_options("single_label_classification", max_steps=1, learning_rate=1e-9)
    second = run_task(class_rows, adapters=[str(first.folder)], **options)
    assert last_evaluation(second)["eval_loss"] == pytest.approx(
        last_evaluation(first)["eval_loss"], abs=1e-5
    )


def test_an_adapter_without_a_score_head_is_refused(run_training, run_task, class_rows):
    causal = run_training(run_name="causal", max_steps=1)
    with pytest.raises(ConfigError, match="brings no score head"):
        run_task(class_rows, adapters=[str(causal.folder)], **class_options("single_label_classification"))


def test_a_metric_that_is_not_defined_is_never_the_best(run_task, class_rows):
    """The correlation with labels that are all alike."""
    rows = [{**row, "label": 1.0} for row in class_rows]
    run = run_task(
        rows, task_type="seq_cls", num_labels=1, problem_type="regression", max_steps=6, eval_strategy="steps",
        eval_steps=1, metric_for_best_model="eval_pearson", greater_is_better=True, early_stop_interval=2,
    )  # fmt: skip
    assert run.summary["steps"] == 6 and run.summary["best_step"] is None


def test_a_classifier_is_not_trained_as_a_text_model(run_task, run_training, class_rows):
    full = run_task(
        class_rows, tuner_type="full", **class_options("single_label_classification", max_steps=1)
    )
    with pytest.raises(ModelError, match="gives scores, not text"):
        run_training(model=str(full.folder / "last"), run_name="again")


def ranking_options(**options):
    return {"max_steps": 30, "learning_rate": 3e-3, **options}


RANKERS = {
    "pointwise": {"task_type": "reranker"},
    "listwise": {"task_type": "reranker", "loss_type": "listwise_reranker", "max_positive_samples": 2},
    "full": {"task_type": "reranker", "tuner_type": "full"},
    "generative": {"task_type": "generative_reranker"},
    "generative listwise": {"task_type": "generative_reranker", "loss_type": "listwise_reranker"},
}
ANSWERS = {"generative_reranker_positive_token": "a", "generative_reranker_negative_token": "b"}


@pytest.mark.parametrize("name", RANKERS)
def test_the_relevant_documents_come_first(run_task, ranking_rows, name):
    options = ranking_options(max_length=512, max_steps=60, **RANKERS[name])
    if options["task_type"] == "generative_reranker":
        options |= ANSWERS  # the tiny tokenizer knows no word "yes"
    run = run_task(ranking_rows, **options)
    lines = read_metrics(run.folder / "metrics.jsonl")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert sum(losses[-10:]) < sum(losses[:10])
    first = next(line for line in lines if "eval_loss" in line)
    last = last_evaluation(run)
    assert last["eval_loss"] < first["eval_loss"]
    assert last["eval_mrr"] > 0.7
    assert last["eval_ndcg_at_10"] > 0.75


EMBEDDERS = {
    "infonce": {"loss_type": "infonce"},
    "own negatives": {"infonce_use_batch": False, "infonce_hard_negatives": 2},
    "matryoshka": {"mrl_dims": [64, 16]},
    "full": {"tuner_type": "full"},
}


@pytest.mark.parametrize("name", EMBEDDERS)
def test_texts_of_a_kind_come_near(run_task, ranking_rows, name):
    rows = [{**row, "positive_messages": row["positive_messages"][:1]} for row in ranking_rows]
    options = {
        "task_type": "embedding",
        "learning_rate": 3e-3,
        "max_steps": 40,
        "per_device_train_batch_size": 6,
        **EMBEDDERS[name],
    }
    run = run_task(rows, **options)
    lines = [line for line in read_metrics(run.folder / "metrics.jsonl") if "eval_loss" in line]
    assert lines[-1]["eval_margin"] > lines[0]["eval_margin"]
    assert lines[-1]["eval_mean_positive"] > lines[-1]["eval_mean_negative"] + 0.3
    assert ("eval_margin_dim_16" in lines[-1]) == (name == "matryoshka")


@pytest.mark.parametrize("loss", ["cosine_similarity", "contrastive", "online_contrastive"])
def test_labelled_pairs_are_learned(run_task, loss):
    generator = random.Random(6)
    rows = []
    for _ in range(48):
        first, second = generator.randrange(3), generator.randrange(3)
        pair = text_of(generator, first), text_of(generator, second)
        rows.append(
            {"messages": user(pair[0]), "positive_messages": [user(pair[1])], "label": int(first == second)}
        )
    options = {
        "task_type": "embedding",
        "loss_type": loss,
        "max_steps": 60,
        "learning_rate": 3e-3,
        "per_device_train_batch_size": 8,
    }
    measured = last_evaluation(run_task(rows, **options))
    assert measured["eval_pearson"] > 0.8
    assert measured["eval_spearman"] > 0.7


def test_nothing_to_compare_with_is_refused(run_task):
    rows = [{"messages": user("a"), "positive_messages": [user("b")]} for _ in range(4)]
    with pytest.raises(ConfigError, match=r"nothing to compare a text with.* a micro-batch is one row"):
        run_task(rows, task_type="embedding", per_device_train_batch_size=1)
    with pytest.raises(ConfigError, match="those of a batch are not used"):
        run_task(rows, task_type="embedding", infonce_use_batch=False)
    options = {"infonce_hard_negatives": 0, "per_device_train_batch_size": 1}
    rows = [{**row, "negative_messages": [user("c")]} for row in rows]
    with pytest.raises(ConfigError, match="nothing to compare"):
        run_task(rows, task_type="embedding", **options)


def test_answers_of_several_tokens_and_too_long_vectors_are_refused(run_task, ranking_rows):
    with pytest.raises(ConfigError, match=r"'yes' is . tokens for this model"):
        run_task(ranking_rows, task_type="generative_reranker", max_length=512)
    rows = [{**row, "positive_messages": row["positive_messages"][:1]} for row in ranking_rows]
    with pytest.raises(ConfigError, match="vectors of this model have 64 numbers, not 65"):
        run_task(rows, task_type="embedding", mrl_dims=[65])


def test_bad_labels_name_the_line(run_task, class_rows):
    rows = [*class_rows[:3], {"messages": user("x"), "label": 9}]
    with pytest.raises(DataError) as caught:
        run_task(rows, **class_options("single_label_classification"))
    assert 'rows.jsonl:4: "label" 9 is no class from 0 to 2' in caught.value.render()


def test_a_smaller_micro_batch_is_refused_for_in_batch_losses(run_task, ranking_rows):
    """After memory ran out a job goes on with smaller micro-batches: here that would be another loss."""
    rows = [{**row, "positive_messages": row["positive_messages"][:1]} for row in ranking_rows]
    options = {"task_type": "embedding", "run_name": "r", "save_steps": 1}
    run_task(rows, max_steps=1, per_device_train_batch_size=4, **options)
    options |= {"max_steps": 2, "resume_from_checkpoint": "last", "gradient_accumulation_steps": 2}
    with pytest.raises(ConfigError, match="infonce compares the rows of a micro-batch"):
        run_task(rows, per_device_train_batch_size=2, **options)


def test_an_adapter_of_a_classifier_merges_and_cannot_chat(run_task, class_rows, tmp_path):
    from transformers import AutoModelForSequenceClassification

    from swift.api import infer
    from swift.cli.merge_lora import run as merge

    run = run_task(class_rows, **class_options("single_label_classification"))
    merged = tmp_path / "merged"
    assert merge(["--adapters", str(run.folder), "--output_dir", str(merged)]) == 0
    model = AutoModelForSequenceClassification.from_pretrained(merged)
    stored = load_file(run.folder / "last" / "adapter_model.safetensors")["base_model.model.score.weight"]
    assert torch.equal(model.score.weight, stored)
    assert model.config.problem_type == "single_label_classification"
    for options in ({"adapters": [str(run.folder)]}, {"model": str(merged)}):
        with pytest.raises(ModelError, match="scores or embeds texts; it writes none"):
            infer("hello", **options)


def test_streamed_rows_train_a_classifier(run_task, class_rows):
    options = class_options("single_label_classification", streaming=True, shuffle_buffer_size=16)
    options["eval_strategy"] = "steps"
    assert last_evaluation(run_task(class_rows, **options))["eval_accuracy"] > 0.6


def test_the_plan_counts_the_texts_of_a_row(ranking_rows, tiny_model_dir, tmp_path):
    from swift.config.bind import resolve
    from swift.plan.plan import make_plan

    data = write_rows(tmp_path / "rows.jsonl", ranking_rows)
    values = {"model": str(tiny_model_dir), "dataset": data, "task_type": "reranker", "max_length": 160}
    plan = make_plan(resolve("sft", values=values, planning=True))
    assert plan.warnings == []
    assert (plan.data["rows"], plan.data["tokens_exact"]) == (24, True)
    assert plan.data["tokens"] > 24 * 3 * 20  # three documents of 20 tokens and more
    assert plan.steps["total"] == 6


RESUMED = {
    "seq_cls": {"task_type": "seq_cls", "num_labels": 3, "lora_dropout": 0.2},
    "reranker full": {"task_type": "reranker", "tuner_type": "full", "loss_type": "listwise_reranker"},
    "embedding": {"task_type": "embedding", "lora_dropout": 0.2, "mrl_dims": [64, 8]},
}


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_equals_uninterrupted(run_task, class_rows, ranking_rows, name):
    rows = class_rows if name == "seq_cls" else ranking_rows
    if name == "embedding":
        rows = [{**row, "positive_messages": row["positive_messages"][:1]} for row in rows]
    options = {"save_steps": 2, "eval_steps": 2, "max_steps": 7, "eval_strategy": "steps", **RESUMED[name]}
    whole = run_task(rows, run_name="whole", **options)
    with pytest.raises(Kill.Killed):
        run_task(rows, callbacks=[Kill(5)], run_name="cut", **options)
    cut = run_task(rows, run_name="cut", resume_from_checkpoint="last", **options)
    assert cut.folder.name == "cut"
    assert metric_lines(cut.folder) == metric_lines(whole.folder)
    ours, theirs = final_weights(cut.folder), final_weights(whole.folder)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


OTHERS = {
    "qlora": {"quant_method": "bnb", "quant_bits": 4},
    "vera": {"tuner_type": "vera"},
    "dora": {"use_dora": True},
    "reft": {"tuner_type": "reft"},
    "workers": {"dataloader_num_workers": 2},
    "checkpointing": {"gradient_checkpointing": True, "torch_dtype": "bfloat16"},
}


@pytest.mark.parametrize("name", OTHERS)
def test_vectors_are_trained_in_every_way(run_task, ranking_rows, name):
    rows = [{**row, "positive_messages": row["positive_messages"][:1]} for row in ranking_rows]
    options = {"task_type": "embedding", "max_steps": 12, "per_device_train_batch_size": 6}
    run = run_task(rows, **{**options, "learning_rate": 3e-3, **OTHERS[name]})
    evaluations = [line for line in read_metrics(run.folder / "metrics.jsonl") if "eval_loss" in line]
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"]


def test_the_score_head_is_no_matrix_for_muon(tiny_model_dir):
    """Optimizers that treat matrices apart leave the head to AdamW, as they do for the head of a causal model."""
    from swift.models.classifier import ClassifierHead
    from swift.models.load import load_model
    from swift.tuners.targets import find_targets, output_head_name

    model = load_model(tiny_model_dir, dtype=torch.float32, head=ClassifierHead(3))
    assert output_head_name(model) == "score"
    assert "score" not in find_targets(model, ["all-linear"], None)
