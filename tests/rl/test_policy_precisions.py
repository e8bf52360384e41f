"""Policy optimisation in half precision and on a quantised base, and on a CUDA device where one is at hand."""

import pytest
import torch

from swift.runs.metrics import read_metrics


@pytest.mark.parametrize(
    "options",
    [
        {"torch_dtype": "bfloat16"},
        {"torch_dtype": "bfloat16", "tuner_type": "full", "learning_rate": 1e-3},
        pytest.param({"quant_method": "bnb", "quant_bits": 4}, marks=pytest.mark.slow),
        {"rlhf_type": "dapo", "overlong_filter": False, "gradient_checkpointing": True},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_sampler_and_trainer_agree_in_every_precision(run_policy, options):
    run = run_policy(**options, probe_sequences=8)
    for line in read_metrics(run.folder / "metrics.jsonl"):
        if "loss" in line:
            assert abs(line["mismatch_kl"]) < 5e-3 and line["grad_norm"] > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rlhf_type", ["grpo", "gspo", "reinforce_pp"])
def test_on_a_device(run_policy, rlhf_type):
    run = run_policy(
        device="cuda", rlhf_type=rlhf_type, max_steps=4, probe_sequences=8, top_entropy_quantile=0.5
    )
    assert run.summary["steps"] == 4
