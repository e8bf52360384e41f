"""``swift rlhf`` from rows to a trained model."""

import json
import random
from pathlib import Path

import pytest
import torch

from resuming import train_and_resume
from swift.core.errors import ConfigError, DataError
from swift.runs.metrics import read_metrics

WORDS = {0: "red blue green".split(), 1: "cat dog bird".split()}


def text(generator, kind, length=None):
    return " ".join(generator.choice(WORDS[kind]) for _ in range(length or generator.randint(2, 8)))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def answered(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.fixture
def pairs(tmp_path):
    """Whatever is asked, answers of colours are better than those of animals; of one length."""
    generator = random.Random(0)
    rows = [
        {
            "messages": answered(text(generator, generator.randrange(2)), text(generator, 0, 4)),
            "rejected_response": text(generator, 1, 4),
        }
        for _ in range(48)
    ]
    return write(tmp_path / "pairs.jsonl", rows)


@pytest.fixture
def labelled(tmp_path):
    generator = random.Random(1)
    kinds = [generator.randrange(2) for _ in range(48)]
    rows = [
        {
            "messages": answered(text(generator, generator.randrange(2)), text(generator, kind)),
            "label": kind == 0,
        }
        for kind in kinds
    ]
    return write(tmp_path / "labelled.jsonl", rows)


@pytest.fixture
def prefer(run_training, pairs):
    """Call with options; the rows validate as well."""

    def run(dataset=pairs, **options):
        common = {
            "command": "rlhf",
            "dataset": dataset,
            "val_dataset": dataset,
            "eval_strategy": "steps",
            "eval_steps": 50,
            "per_device_train_batch_size": 8,
            "learning_rate": 5e-3,
            "num_train_epochs": 9,
            "max_steps": 15,
        }
        return run_training(**{**common, **options})

    return run


def lines(run):
    return read_metrics(run.folder / "metrics.jsonl")


def last_evaluation(run):
    return [line for line in lines(run) if "eval_loss" in line][-1]


@pytest.mark.parametrize(
    "options",
    [
        {"rlhf_type": "dpo"},
        {"rlhf_type": "dpo", "tuner_type": "full", "learning_rate": 2e-3},
        {"rlhf_type": "dpo", "packing": True, "per_device_train_batch_size": 4},
        {"rlhf_type": "dpo", "loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 0.1]},
        {
            "rlhf_type": "dpo",
            "quant_method": "bnb",
            "quant_bits": 4,
        },  # the reference is the base of four bits
        {"rlhf_type": "dpo", "streaming": True, "shuffle_buffer_size": 16},
        {"rlhf_type": "ipo", "group_by_length": True},
        {"rlhf_type": "simpo"},
        {"rlhf_type": "orpo", "beta": 1.0},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)
def test_pairs_are_told_apart(prefer, options):
    run = prefer(**options)
    measured = last_evaluation(run)
    assert measured["eval_rewards/accuracies"] > 0.9
    assert measured["eval_rewards/margins"] > 0
    training = [line for line in lines(run) if "loss" in line]
    assert training[-1]["rewards/accuracies"] > 0.9
    assert "accuracy" not in training[-1]
    if options["rlhf_type"] == "dpo" and "loss_type" not in options:
        assert training[0]["loss"] == pytest.approx(0.693147, abs=1e-5), "policy and reference begin alike"
        assert training[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)


def test_cpo_widens_the_margin(prefer):
    """Without a reference the sums begin with the lengths of the answers in tokens: only the change counts."""
    run = prefer(rlhf_type="cpo", beta=1.0)
    margins = [line["rewards/margins"] for line in lines(run) if "loss" in line]
    assert margins[-1] > margins[0] + 5


def test_kto_tells_answers_apart(prefer, labelled):
    run = prefer(labelled, rlhf_type="kto", metric_for_best_model="eval_rewards/margins", max_steps=20)
    measured = last_evaluation(run)
    assert measured["eval_rewards/chosen"] > 0 > measured["eval_rewards/rejected"]
    assert measured["eval_rewards/margins"] > 1
    assert measured["eval_kl"] >= 0
    assert run.summary["best_metric"] == measured["eval_rewards/margins"]
    training = [line for line in lines(run) if "loss" in line]
    assert training[-1]["rewards/margins"] == pytest.approx(
        training[-1]["rewards/chosen"] - training[-1]["rewards/rejected"]
    )


def test_a_reward_model_ranks_pairs_and_transformers_loads_it(prefer, tiny_model_dir):
    from peft import PeftModelForSequenceClassification
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    run = prefer(rlhf_type="rm", center_rewards_coefficient=0.01)
    measured = last_evaluation(run)
    assert measured["eval_accuracy"] > 0.9
    assert measured["eval_margin"] > 0.5
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir, num_labels=1)
    model = PeftModelForSequenceClassification.from_pretrained(base, run.folder / "last").eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    with torch.no_grad():
        scores = []
        for answer in ("red blue green", "cat dog bird"):
            ids = tokenizer.apply_chat_template(answered("cat red", answer), tokenize=False)
            inputs = tokenizer(ids, return_tensors="pt", add_special_tokens=False)
            model.config.pad_token_id = tokenizer.pad_token_id
            scores.append(model(**inputs).logits.item())
    assert scores[0] > scores[1] + 0.5


def losses(run):
    return [line["loss"] for line in lines(run) if "loss" in line]


def test_every_way_to_the_same_reference_gives_the_same_losses(prefer, tiny_model_dir):
    """LoRA switched off, the same model loaded once more, and numbers computed before (then from the cache)."""
    options = {"max_steps": 5, "run_name": None}
    switched_off = losses(prefer(**options))
    assert losses(prefer(**options, ref_model=str(tiny_model_dir))) == pytest.approx(switched_off, abs=2e-5)
    for _ in range(2):
        known = losses(prefer(**options, precompute_ref_log_probs=True))
        assert known == pytest.approx(switched_off, abs=2e-5)


def test_the_adapter_that_training_goes_on_from_is_the_reference(prefer):
    first = prefer(max_steps=8)
    second = prefer(adapters=str(first.folder / "last"), max_steps=2)
    training = [line for line in lines(second) if "loss" in line]
    assert training[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert training[0]["rewards/accuracies"] < 0.5


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"packing": True, "per_device_train_batch_size": 2},
        {"streaming": True, "shuffle_buffer_size": 16},
    ],
)
def test_resumed_runs_are_bit_equal(run_training, tmp_path, pairs, options):
    common = {"command": "rlhf", "dataset": pairs, "per_device_train_batch_size": 8, "learning_rate": 5e-3}
    train_and_resume(run_training, tmp_path, **{**common, **options})


@pytest.mark.parametrize("start", ["adapter", "pissa"])
def test_adapters_resume_with_the_reference_they_began_with(run_training, tmp_path, pairs, start):
    options = {"command": "rlhf", "dataset": pairs, "per_device_train_batch_size": 8, "learning_rate": 5e-3}
    if start == "adapter":
        options["adapters"] = [str(run_training(run_name="before", max_steps=2).folder / "last")]
    else:
        options["init_weights"] = start
    train_and_resume(run_training, tmp_path, **options)


def test_full_training_resumes_with_the_reference_it_began_with(run_training, tmp_path, pairs):
    import shutil

    options = {
        "command": "rlhf",
        "dataset": pairs,
        "tuner_type": "full",
        "learning_rate": 2e-3,
        "max_steps": 6,
        "save_steps": 3,
        "num_train_epochs": 9,
    }
    whole = run_training(run_name="whole", **options)
    cut = tmp_path / "output" / "cut"
    shutil.copytree(whole.folder, cut, symlinks=True)
    again = run_training(run_name="cut", resume_from_checkpoint=str(cut / "checkpoint-3"), **options)
    assert losses(again) == losses(whole)


def test_forms_of_rows(run_training, tmp_path):
    """Five ways to write the same pairs are the same tokens."""
    generator = random.Random(4)
    pairs = [(text(generator, 0), text(generator, 0), text(generator, 1)) for _ in range(8)]

    def assistant(answer):
        return [{"role": "assistant", "content": answer}]

    forms = [
        lambda q, c, r: {"messages": answered(q, c), "rejected_response": r},
        lambda q, c, r: {"messages": answered(q, c), "rejected_messages": answered(q, r)},
        lambda q, c, r: {"chosen": answered(q, c), "rejected": answered(q, r)},
        lambda q, c, r: {"prompt": q, "chosen": c, "rejected": r},
        lambda q, c, r: {"prompt": answered(q, c)[:1], "chosen": assistant(c), "rejected": assistant(r)},
        lambda q, c, r: {"query": q, "response": c, "rejected_response": assistant(r)},
    ]
    found = []
    for number, form in enumerate(forms):
        file = write(tmp_path / f"form-{number}.jsonl", [form(*pair) for pair in pairs])
        run = run_training(
            command="rlhf", dataset=file, val_dataset=file, max_steps=1, num_train_epochs=9, seed=5
        )
        found.append((losses(run), last_evaluation(run)["eval_logps/rejected"]))
    assert all(one == found[0] for one in found)


@pytest.mark.parametrize(
    ("row", "options", "reason"),
    [
        ({"messages": answered("q", "a")}, {}, "rejected_response"),
        (
            {"messages": answered("q", "a"), "rejected_response": "a"},
            {},
            "the rejected answer is the chosen one",
        ),
        ({"messages": answered("q", "a")[:1], "rejected_response": "b"}, {}, "nothing is chosen"),
        ({"messages": answered("q", "a")}, {"rlhf_type": "kto"}, "neither true nor false"),
        ({"messages": answered("q", "a"), "label": 3}, {"rlhf_type": "kto"}, "neither true nor false"),
        (
            {"messages": answered("q", "a"), "rejected_response": "b", "margin": "x"},
            {"rlhf_type": "rm"},
            "\"margin\" 'x' is not a number",
        ),
    ],
)
def test_bad_rows_say_what_is_wrong(prefer, tmp_path, row, options, reason):
    file = write(tmp_path / "bad.jsonl", [row] * 8)
    with pytest.raises(DataError, match=reason):
        prefer(file, **options)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"rlhf_type": "grpo"}, "which reward"),
        ({"rlhf_type": "ppo"}, "ppo comes with a later version"),
        ({"rlhf_type": "simpo", "ref_model": "m"}, "no effect with rlhf_type simpo"),
        ({"rlhf_type": "rm", "beta": 0.2}, "no effect with rlhf_type rm"),
        ({"rlhf_type": "kto", "per_device_train_batch_size": 1}, "there is only one"),
        ({"rlhf_type": "kto", "loss_type": "sigmoid"}, "sigmoid is no loss of rlhf_type kto"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "1 weights for 2 losses"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "no effect on hinge"),
        ({"loss_type": "apo_zero", "f_divergence_type": "forward_kl"}, "no form for forward_kl"),
        ({"temperature": 0.5}, "no effect with rlhf_type dpo"),
        ({"task_type": "embedding"}, "trains a model of task_type causal_lm"),
        ({"metric_for_best_model": "eval_accuracy"}, "there is no metric 'eval_accuracy'"),
    ],
)
def test_what_does_not_go_together_is_refused(prefer, options, reason):
    with pytest.raises(ConfigError, match=reason):
        prefer(**options)


def test_the_python_trainer(tiny_model_dir, pairs, tmp_path, monkeypatch):
    from swift import DPOTrainer, SwiftTrainer

    monkeypatch.setenv("SWIFT_HOME", str(tmp_path / "home"))
    options = {"output_dir": str(tmp_path / "out"), "max_steps": 2, "max_length": 160, "beta": 0.3}
    trainer = DPOTrainer(tiny_model_dir, train_dataset=pairs, loss_type="hinge", **options)
    assert trainer.resolved.value("rlhf_loss_type") == ["hinge"]
    from_file = trainer.train()
    assert from_file.summary["steps"] == 2
    rows = [json.loads(line) for line in Path(pairs).read_text().splitlines()]
    from_rows = DPOTrainer(tiny_model_dir, train_dataset=rows, loss_type="hinge", **options).train()
    assert losses(from_rows) == losses(from_file)
    config = {"model": str(tiny_model_dir), "train_type": "dpo", "dataset": pairs, **options}
    assert SwiftTrainer(config).resolved.value("beta") == 0.3


@pytest.mark.slow
def test_the_command_line(tiny_model_dir, pairs, tmp_path):
    import os
    import subprocess
    import sys

    command = [
        sys.executable,
        "-m",
        "swift.cli.main",
        "rlhf",
        "--rlhf_type",
        "dpo",
        "--model",
        str(tiny_model_dir),
    ]
    words = [
        "--dataset",
        pairs,
        "--output_dir",
        str(tmp_path / "out"),
        "--run_name",
        "run",
        "--max_steps",
        "15",
    ]
    more = [
        "--per_device_train_batch_size",
        "8",
        "--gradient_accumulation_steps",
        "1",
        "--learning_rate",
        "5e-3",
    ]
    env = {**os.environ, "SWIFT_HOME": str(tmp_path / "home")}
    subprocess.run([*command, *words, *more, "--max_length", "160"], check=True, env=env, timeout=280)
    last = read_metrics(tmp_path / "out" / "run" / "metrics.jsonl")[-1]
    assert last["rewards/accuracies"] > 0.9
