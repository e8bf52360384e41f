"""Options of the tasks: what follows from what, and what is refused."""

import pytest

from swift.config.bind import resolve
from swift.core.errors import ConfigError

NEEDED = ["--model", "m", "--dataset", "d"]


def resolved(*words, command="sft"):
    return resolve(command, [*NEEDED, *words], planning=command == "plan")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["--task_type", "seq_cls", "--num_labels", "3"],
            ("single_label_classification", 3, "cross_entropy"),
        ),
        (["--task_type", "seq_cls", "--num_labels", "1"], ("regression", 1, "mse")),
        (["--task_type", "seq_cls", "--problem_type", "regression"], ("regression", 1, "mse")),
        (
            ["--task_type", "seq_cls", "--num_labels", "4", "--problem_type", "multi_label_classification"],
            ("multi_label_classification", 4, None),
        ),
        (["--task_type", "reranker"], (None, 1, "pointwise_reranker")),
        (["--task_type", "generative_reranker"], (None, None, "pointwise_reranker")),
        (
            ["--task_type", "reranker", "--loss_type", "listwise_generative_reranker"],
            (None, 1, "listwise_reranker"),
        ),
        (["--task_type", "embedding"], (None, None, "infonce")),
        (["--task_type", "causal_lm"], (None, None, None)),
    ],
)
def test_what_follows_from_the_task(words, expected):
    task = resolved(*words).config.task
    assert (task.problem_type, task.num_labels, task.loss_type) == expected


def test_how_texts_are_written_follows_from_the_task():
    assert resolved("--task_type", "embedding").config.template.use_chat_template is False
    assert resolved("--task_type", "reranker").config.template.use_chat_template is True
    assert resolved("--task_type", "generative_reranker").config.template.enable_thinking is False
    assert resolved("--task_type", "reranker").config.template.enable_thinking is None


SEQ_CLS = ["--task_type", "seq_cls", "--num_labels", "2"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task_type", "seq_cls"], "how many classes"),
        ([*SEQ_CLS, "--loss_type", "infonce"], "infonce is no loss of task_type seq_cls"),
        (["--task_type", "embedding", "--loss_type", "mse"], "mse is no loss of task_type embedding"),
        (["--loss_type", "infonce"], "infonce is no loss of task_type causal_lm"),
        (
            [*SEQ_CLS, "--problem_type", "multi_label_classification", "--loss_type", "cross_entropy"],
            "cross_entropy is no loss",
        ),
        (
            ["--task_type", "seq_cls", "--num_labels", "1", "--problem_type", "single_label_classification"],
            "one class leaves nothing to decide",
        ),
        (["--num_labels", "2"], "has no effect with task_type causal_lm"),
        (["--task_type", "reranker", "--num_labels", "2"], "has no effect with task_type reranker"),
        (["--task_type", "embedding", "--packing"], "does not go together with task_type embedding"),
        (["--task_type", "reranker", "--packing"], "does not go together with task_type reranker"),
        (
            ["--task_type", "generative_reranker", "--truncation_strategy", "right"],
            "cuts off the end of the prompt",
        ),
        ([*SEQ_CLS, "--tuner_type", "vera"], "the score head of task_type seq_cls"),
        ([*SEQ_CLS, "--use_dora", "true"], "the score head of task_type seq_cls"),
        ([*SEQ_CLS, "--quant_bits", "4"], "does not go together with task_type seq_cls"),
        ([*SEQ_CLS, "--init_weights", "eva"], "measures the model on next tokens"),
        ([*SEQ_CLS, "--loss_scale", "last_round"], "has no effect with task_type seq_cls"),
        (["--task_type", "embedding", "--mrl_dims", "64", "0"], "sizes of vectors are at least 1"),
        (
            ["--task_type", "reranker", "--infonce_temperature", "0.5"],
            "has no effect with loss_type pointwise_reranker",
        ),
        (
            ["--task_type", "embedding", "--infonce_use_batch", "false", "--infonce_include_qq", "true"],
            "has no effect with infonce_use_batch false",
        ),
        (
            [*SEQ_CLS, "--val_dataset", "v", "--metric_for_best_model", "eval_perplexity"],
            "there is no metric 'eval_perplexity'",
        ),
        (["--loss_type", "sigmoid"], "that is a loss of swift rlhf"),
    ],
)
def test_what_does_not_go_together_is_refused(words, message):
    with pytest.raises(ConfigError) as caught:
        resolved(*words)
    assert message in caught.value.render()


def test_metrics_of_the_task_choose_the_best_checkpoint():
    words = [*SEQ_CLS, "--val_dataset", "v", "--metric_for_best_model", "eval_macro_f1"]
    assert resolved(*words).config.evaluation.greater_is_better is True
    words = ["--task_type", "reranker", "--val_dataset", "v", "--metric_for_best_model", "eval_mrr"]
    assert resolved(*words).config.evaluation.metric_for_best_model == "eval_mrr"


def test_a_lower_error_is_better():
    words = ["--task_type", "seq_cls", "--num_labels", "1", "--val_dataset", "v"]
    evaluation = resolved(*words, "--metric_for_best_model", "eval_mae").config.evaluation
    assert evaluation.greater_is_better is False


@pytest.mark.parametrize(
    ("words", "warns"),
    [
        (["--task_type", "embedding"], True),
        (["--task_type", "embedding", "--gradient_accumulation_steps", "1"], False),
        (["--task_type", "embedding", "--infonce_use_batch", "false"], False),
        (["--task_type", "embedding", "--loss_type", "online_contrastive"], True),
        (["--task_type", "embedding", "--loss_type", "contrastive"], False),
        (["--task_type", "reranker"], False),
    ],
)
def test_accumulation_that_splits_an_in_batch_loss_warns(words, warns):
    found = [warning for warning in resolved(*words).warnings if "of a micro-batch only" in warning]
    assert bool(found) is warns


def test_the_variables_of_ms_swift_set_the_options(monkeypatch):
    monkeypatch.setenv("INFONCE_TEMPERATURE", "0.02")
    monkeypatch.setenv("INFONCE_USE_BATCH", "False")
    monkeypatch.setenv("INFONCE_HARD_NEGATIVES", "3")
    found = resolved("--task_type", "embedding")
    task = found.config.task
    assert (task.infonce_temperature, task.infonce_use_batch, task.infonce_hard_negatives) == (0.02, False, 3)
    assert str(found.sources["infonce_temperature"]) == "derived from INFONCE_TEMPERATURE of the environment"
    typed = resolved("--task_type", "embedding", "--infonce_temperature", "0.5")
    assert typed.config.task.infonce_temperature == 0.5
    assert resolved().config.task.infonce_temperature == 0.1  # no business of other tasks
    monkeypatch.setenv("INFONCE_TEMPERATURE", "warm")
    with pytest.raises(ConfigError, match="'warm' is no value of infonce_temperature"):
        resolved("--task_type", "embedding")
