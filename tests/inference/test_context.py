"""What a run folder knows, and that the command line wins."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from swift.config.bind import dump_text, resolve
from swift.config.sections.tuner import TunerSection
from swift.core.errors import ConfigError, ModelError
from swift.inference.context import find_context, load_context
from swift.models.load import load_model
from swift.tuners.apply import apply_tuner
from swift.tuners.peft_format import save_adapter

MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tiny_model_dir: Path, tmp_path: Path) -> MakeRun:
    """A run folder as training leaves it: configuration, checkpoint-3, checkpoint-7, last."""

    def make(command: str = "sft", full: bool = False, **options: object) -> Path:
        run = tmp_path / "run"
        values = {"model": str(tiny_model_dir), "dataset": ["data.jsonl"], **options}
        for step in (3, 7):
            folder = run / f"checkpoint-{step}"
            folder.mkdir(parents=True)
            model = load_model(tiny_model_dir, dtype=torch.float32)
            if full:
                model.save_pretrained(folder)
                for name in ("tokenizer.json", "tokenizer_config.json"):
                    (folder / name).write_bytes((tiny_model_dir / name).read_bytes())
            else:
                tuned = apply_tuner(model, TunerSection(lora_rank=2), seed=step)
                save_adapter(tuned.model, folder, tiny_model_dir)
            (folder / "state.json").write_text("{}")
        (run / "config.yaml").write_text(dump_text(resolve(command, values=values)), encoding="utf-8")
        (run / "last").symlink_to("checkpoint-7")
        return run

    return make


def test_an_adapter_brings_model_template_and_system(make_run: MakeRun, tiny_model_dir: Path) -> None:
    run = make_run(system="Be brief.", enable_thinking=False)
    for name, step in (("", 7), ("last", 7), ("checkpoint-3", 3)):
        context = find_context(resolve("infer", ["--adapters", str(run / name)]))
        assert context.adapter is not None and context.adapter.resolve().name == f"checkpoint-{step}"
        assert (context.model, context.run, context.pretraining) == (tiny_model_dir, run, False)
        assert context.template.system == "Be brief." and context.template.enable_thinking is False


def test_the_command_line_wins(make_run: MakeRun) -> None:
    run = make_run(system="Be brief.", loss_scale="all")
    context = find_context(resolve("infer", ["--adapters", str(run), "--system", "Sing."]))
    assert context.template.system == "Sing." and context.template.loss_scale == "all"


def test_a_lora_run_as_model_is_its_adapter(make_run: MakeRun, tiny_model_dir: Path) -> None:
    run = make_run()
    for name in ("", "checkpoint-7"):
        context = find_context(resolve("infer", ["--model", str(run / name)]))
        assert context.adapter is not None and context.model == tiny_model_dir
    with pytest.raises(ConfigError, match="an adapter, not a model"):
        find_context(resolve("infer", ["--model", str(run), "--adapters", str(run)]))


def test_a_full_run_is_a_model(make_run: MakeRun) -> None:
    run = make_run(full=True, tuner_type="full", command="pt")
    context = find_context(resolve("infer", ["--model", str(run)]))
    assert context.model.resolve() == (run / "checkpoint-7").resolve() and context.adapter is None
    assert context.pretraining and context.run == run
    with pytest.raises(ModelError, match="trained the whole model") as caught:
        find_context(resolve("infer", ["--adapters", str(run)]))
    assert caught.value.fix is not None and "checkpoint-7" in caught.value.fix


def test_a_plain_model_knows_nothing_else(tiny_model_dir: Path) -> None:
    context = find_context(resolve("infer", ["--model", str(tiny_model_dir)]))
    assert (context.model, context.adapter, context.run, context.pretraining) == (
        tiny_model_dir,
        None,
        None,
        False,
    )


def test_a_lost_base_model_is_named(make_run: MakeRun, tmp_path: Path, tiny_model_dir: Path) -> None:
    run = make_run()
    for file in (run / "config.yaml", run / "checkpoint-7" / "adapter_config.json"):
        file.write_text(file.read_text().replace(str(tiny_model_dir), str(tmp_path / "gone")))
    with pytest.raises(ModelError, match="base model is not found") as caught:
        find_context(resolve("infer", ["--adapters", str(run)]))
    assert str(tmp_path / "gone") in (caught.value.why or "") and "--model" in (caught.value.fix or "")
    context = find_context(resolve("infer", ["--adapters", str(run), "--model", str(tiny_model_dir)]))
    assert context.model == tiny_model_dir and context.adapter is not None


def test_what_is_neither_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="neither a model nor a run"):
        find_context(resolve("infer", ["--model", str(tmp_path)]))
    with pytest.raises(ConfigError, match="one adapter at a time"):
        find_context(resolve("infer", ["--adapters", "a", "b"]))


def test_loading_puts_the_adapter_on(make_run: MakeRun, tiny_model_dir: Path) -> None:
    resolved = resolve("infer", ["--adapters", str(make_run()), "--device", "cpu"])
    bundle = load_context(find_context(resolved), resolved)
    trained = [name for name, p in bundle.model.named_parameters() if "lora_" in name and not p.requires_grad]
    assert len(trained) == 2 * 7 * bundle.facts.num_layers
    assert not bundle.model.training


def test_a_run_whose_best_is_not_its_last_says_so(make_run: MakeRun) -> None:
    run = make_run(system="Be brief.")
    context = find_context(resolve("infer", ["--adapters", str(run)]))
    assert context.note() is None
    assert context.describe().endswith(f"adapter {run / 'checkpoint-7'}, system prompt: Be brief.")
    (run / "best").symlink_to("checkpoint-3")
    expected = f"using last (checkpoint-7); best is checkpoint-3: --adapters {run / 'best'}"
    for words in (["--adapters", str(run)], ["--model", str(run)]):
        assert find_context(resolve("infer", words)).note() == expected
    for name in ("last", "best", "checkpoint-7"):
        assert find_context(resolve("infer", ["--adapters", str(run / name)])).note() is None


def test_a_whole_model_given_as_adapter(make_run: MakeRun) -> None:
    run = make_run(full=True, tuner_type="full")
    for name, model in ((run, run / "checkpoint-7"), (run / "checkpoint-3", run / "checkpoint-3")):
        with pytest.raises(ModelError) as caught:
            find_context(resolve("infer", ["--adapters", str(name)]))
        assert caught.value.fix == f"--model {model}"
