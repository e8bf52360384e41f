"""The Python face: as in the articles, and independent of what was imported before."""

import subprocess
import sys

import pytest

from swift.core.errors import ConfigError, UsageError


def test_importing_the_face_imports_nothing_heavy():
    code = (
        "import swift, sys; swift.SwiftTrainer; from swift import train, infer;"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"


def test_train_and_infer(tiny_model_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SWIFT_HOME", str(tmp_path / "home"))
    from swift import SwiftModel, SwiftTrainer, infer, train

    data = tmp_path / "data.jsonl"
    data.write_text('{"query": "1 + 2", "response": "3"}\n' * 8)
    config = {
        "model": str(tiny_model_dir),
        "dataset": str(data),
        "output_dir": str(tmp_path / "out"),
        "max_length": 64,
        "training": {"max_steps": 2},
    }
    result = SwiftTrainer(config, lora_rank=4).train()
    assert result.summary["steps"] == 2
    assert "step 2/2" in capsys.readouterr().out
    # After the package swift.train was imported, the name is still a function.
    again = train(config, run_name="again", lora_rank=4)
    assert again.summary["last_loss"] == result.summary["last_loss"]
    run = str(result.folder)
    answer = infer("1 + 2", adapters=[run], max_new_tokens=4)
    assert isinstance(answer, str)
    assert infer(["1 + 2", "2 + 2"], adapters=[run], max_new_tokens=4)[0] == answer
    assert infer([{"role": "user", "content": "1 + 2"}], adapters=[run], max_new_tokens=4) == answer
    model = SwiftModel.from_pretrained(tiny_model_dir, adapters=[run])
    assert not model.training
    assert any("lora_A" in name for name, _ in model.named_parameters())


def test_errors_are_immediate():
    from swift import SwiftTrainer

    with pytest.raises(ConfigError, match="lora_rank"):
        SwiftTrainer({"model": "m", "dataset": "d", "lora_rnk": 4})
    with pytest.raises(UsageError, match="sft, pt or rlhf"):
        SwiftTrainer({"command": "infer"})


def test_a_configuration_file_as_on_the_command_line(tmp_path):
    from swift import SwiftTrainer

    file = tmp_path / "exp.yaml"
    file.write_text("command: pt\nmodel: m\ndataset: d.jsonl\nlora_rank: 4\n")
    for config in (file, str(file)):
        trainer = SwiftTrainer(config, max_steps=3)
        assert trainer.resolved.command == "pt"
        assert trainer.resolved.config.tuner.lora_rank == 4
        assert str(trainer.resolved.sources["lora_rank"]) == f"{file}:4"
        assert trainer.resolved.config.training.max_steps == 3
    with pytest.raises(ConfigError, match="cannot be read"):
        SwiftTrainer("nofile.yaml")


def test_trainers_with_the_arguments_of_the_articles():
    from swift import GRPOTrainer, SwiftTrainer

    options = {
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 4,
        "num_train_epochs": 3,
        "learning_rate": 1e-6,
        "max_length": 2048,
        "beta": 0.1,
        "use_vllm_sampler": True,
        "vllm_config": {"tensor_parallel_size": 4},
    }
    rows = [{"query": "1 + 2"}]
    trainer = GRPOTrainer(
        model="Qwen3-7B", tokenizer=None, train_dataset=rows, reward_model="my_reward_model", **options
    )
    assert trainer.resolved.value("learning_rate") == 1e-6
    assert any("vLLM samplers comes with a later version" in text for text in trainer.resolved.warnings)
    with pytest.raises(ConfigError, match="leave it out: the embedded engine samples in this process"):
        trainer.train()
    assert GRPOTrainer(model="Qwen3-7B", train_dataset=rows).resolved.value("beta") == 0.1
    assert GRPOTrainer(model="Qwen3-7B", train_dataset=rows, rlhf_type="dapo").resolved.value("beta") is None
    with pytest.raises(ConfigError, match="unknown option"):
        GRPOTrainer(model="Qwen3-7B", train_dataset=rows, bata=0.1)
    trainer = SwiftTrainer({"model_type": "qwen3-omni-7b", "train_type": "dpo", "dataset": "mm.jsonl"})
    assert (trainer.resolved.command, trainer.resolved.value("rlhf_type")) == ("rlhf", "dpo")
