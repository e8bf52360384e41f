"""One way to run policy optimisation on a tiny model in this process."""

import pytest
import reward_samples

from swift.config.bind import resolve


@pytest.fixture
def run_policy(tiny_model_dir, tmp_path, monkeypatch):
    """Call with options; returns the RunResult. Four prompts with four answers of at most six tokens a step."""
    monkeypatch.setenv("SWIFT_HOME", str(tmp_path / "home"))
    from swift.rl.run import train

    def run(callbacks=(), **options):
        values = {
            "model": str(tiny_model_dir),
            "rlhf_type": "grpo",
            "dataset": "task:reverse#16",
            "output_dir": str(tmp_path / "output"),
            "num_generations": 4,
            "per_device_train_batch_size": 16,
            "gradient_accumulation_steps": 1,
            "max_completion_length": 6,
            "learning_rate": 1e-2,
            "max_steps": 2,
            "logging_steps": 1,
            **options,
        }
        if "replay" not in options and options.get("reward_funcs") != []:
            rewards = [f"{reward_samples.__file__}:length", "task"]
            values = {"reward_funcs": rewards, "reward_num_proc": 1, **values}
        return train(resolve("rlhf", values=values), callbacks=callbacks, say=lambda text: None)

    return run
