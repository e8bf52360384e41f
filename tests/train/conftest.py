"""A tiny data set, and one way to run a training in this process."""

import json
import random

import pytest

from swift.config.bind import resolve


@pytest.fixture(scope="session")
def chat_file(tmp_path_factory):
    """60 short conversations of different lengths."""
    path = tmp_path_factory.mktemp("train-data") / "chat.jsonl"
    generator = random.Random(3)
    words = "one two three red blue green cat dog bird runs sleeps sings".split()

    def sentence(longest):
        return " ".join(generator.choice(words) for _ in range(generator.randint(1, longest)))

    with path.open("w") as file:
        for _ in range(60):
            messages = [
                {"role": "user", "content": sentence(8)},
                {"role": "assistant", "content": sentence(16)},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


@pytest.fixture
def run_training(tiny_model_dir, chat_file, tmp_path, monkeypatch):
    """Call with options; returns the RunResult. The token cache lies in the test's own folder."""
    monkeypatch.setenv("SWIFT_HOME", str(tmp_path / "home"))
    from swift.train.run import train

    def run(callbacks=(), command="sft", **options):
        values = {
            "model": str(tiny_model_dir),
            "dataset": str(chat_file),
            "output_dir": str(tmp_path / "output"),
            "max_length": 160,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "num_train_epochs": 1,
            "lora_dropout": 0.0,
            **options,
        }
        return train(resolve(command, values=values), callbacks=callbacks, say=lambda text: None)

    return run
