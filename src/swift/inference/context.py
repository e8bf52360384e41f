"""What a run folder knows about its model, and what the command line says instead.

``--adapters RUN`` and ``--model RUN`` are enough to use what a run has trained: base model, template and system
prompt come from the run's ``config.yaml``. Options set on the command line win.
"""

from __future__ import annotations

import shlex
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

from swift.config.bind import load_run_config
from swift.config.commands import COMMANDS
from swift.config.schema import Resolved
from swift.config.sections.model import ModelSection
from swift.config.sections.quantization import QuantizationSection
from swift.config.sections.task import TaskSection
from swift.config.sections.template import TemplateSection
from swift.core.errors import ConfigError, ModelError
from swift.hubs.names import is_repo_name
from swift.models.classifier import ClassifierHead, is_classifier_name
from swift.models.facts import read_model_config, read_safetensors_header
from swift.models.load import ModelBundle, load_bundle
from swift.models.locate import derive_chat_template, locate_model
from swift.runs.folder import RunFolder
from swift.tuners.merge import unpack_base
from swift.tuners.peft_format import adapter_folder, is_adapter_folder, load_adapter, read_adapter_config
from swift.tuners.peft_names import WEIGHTS_FILE, needs_rounded_base

__all__ = ["InferenceContext", "find_context", "load_context"]


@dataclass
class InferenceContext:
    """Which model is used, and how.

    Attributes:
        model: folder of the (base) model.
        adapter: folder of the adapter on top of it, or None.
        template: template options: the run's, with those of the command line on top.
        pretraining: True when the run was ``pt``: plain text unless ``use_chat_template`` says otherwise.
        run: the run folder that all this comes from, or None.
        quantization: how the base is quantised when loaded: as in the run, unless the command line says otherwise.
        head: the score head of a classifier, or of an adapter that was trained for one.
        task_options: what the run was for.
        chosen_last: True when a run folder was named, and its last checkpoint taken.
        unpack: the adapter belongs to a rounded base (LoftQ) that is wanted in full precision: it is quantised when
            loaded, and its rounded values are unpacked then.
    """

    model: Path
    adapter: Path | None
    template: TemplateSection
    pretraining: bool
    run: Path | None
    chosen_last: bool = False
    quantization: QuantizationSection = field(default_factory=QuantizationSection)
    unpack: bool = False
    head: ClassifierHead | None = None
    task_options: TaskSection = field(default_factory=TaskSection)

    @property
    def task(self) -> str:
        """What the model was trained for (``task_type``)."""
        return self.task_options.task_type

    @property
    def writes_text(self) -> bool:
        """False for models that score or embed texts."""
        return self.task == "causal_lm" and self.head is None

    def check_writes_text(self) -> None:
        """Raise ModelError for models that read texts and write none."""
        if not self.writes_text:
            raise ModelError(
                "this model scores or embeds texts; it writes none",
                where=str(self.adapter or self.model),
                why="it has a score head" if self.task == "causal_lm" else f"task_type {self.task}",
                fix="swift infer --val_dataset FILE gives the scores or vectors of its rows",
            )

    def describe(self) -> str:
        """Model, adapter and system prompt in one line."""
        parts = [f"model {self.model}"]
        if self.adapter is not None:
            parts.append(f"adapter {self.adapter}")
        system = " ".join(self.template.system.split()) if self.template.system else ""
        parts.append(f"system prompt: {textwrap.shorten(system, 60) or 'the default'}")
        return ", ".join(parts)

    def note(self) -> str | None:
        """A line when the last checkpoint of a run was taken though another one is better."""
        if not self.chosen_last or self.run is None:
            return None
        run = RunFolder(self.run)
        best, used = run.marked("best"), (self.adapter or self.model).resolve()
        if best is None or best.resolve() == used:
            return None
        flag = "--adapters" if self.adapter else "--model"
        return f"using last ({used.name}); best is {best.name}: {flag} {shlex.quote(str(self.run / 'best'))}"

    @property
    def home(self) -> Path:
        """Where results belong: the run folder, or the folder of the adapter or model."""
        return self.run or self.adapter or self.model


def find_context(resolved: Resolved) -> InferenceContext:
    """Work out model, adapter and template from ``--model`` and ``--adapters``, each a folder, run or checkpoint.

    Raises:
        ModelError: a folder does not exist, is not a model or adapter, or the base model cannot be found.
        ConfigError: several adapters were named.
    """
    section = resolved.config.model
    if len(section.adapters) > 1:
        raise ConfigError(
            "one adapter at a time", where="--adapters", fix=f"--adapters {section.adapters[0]}"
        )
    adapter = adapter_folder(section.adapters[0]) if section.adapters else None
    model: Path | None = None
    if section.model is not None:
        model = _model_folder(section)
        if is_adapter_folder(model):  # a LoRA run, or one of its checkpoints, given as the model
            if adapter is not None:
                raise ConfigError(
                    "this is an adapter, not a model",
                    where="--model",
                    fix="name the base model, or leave --model out: the adapter's run knows it",
                )
            model, adapter = None, model
    source = adapter or model
    if source is None:
        raise ConfigError(
            "neither a model nor an adapter is given", where="--model", fix="--adapters RUN/last"
        )
    recorded, run = _run_config(source)
    quantization, unpack = _quantization(resolved, recorded, adapter)
    if model is None:
        assert adapter is not None
        model = _base_model(adapter, recorded, section)
    elif section.model is not None and recorded is None:
        derive_chat_template(resolved, section.model, model)
    head = _score_head(adapter, recorded) if adapter else _stored_head(model)
    return InferenceContext(
        model=model,
        adapter=adapter,
        template=_template(resolved, recorded),
        pretraining=recorded is not None and recorded.command == "pt",
        run=run,
        chosen_last=run is not None and any(_is_run(name) for name in (*section.adapters, section.model)),
        quantization=quantization,
        unpack=unpack,
        head=head,
        task_options=recorded.config.task if recorded else TaskSection(),
    )


def load_context(context: InferenceContext, resolved: Resolved) -> ModelBundle:
    """Load model, tokenizer and template, and put the adapter on."""
    from swift.core.devices import pick_device, pick_dtype

    section = resolved.config.model
    device = pick_device(section.device)
    bundle = load_bundle(
        context.model,
        context.template,
        dtype=pick_dtype(section.torch_dtype, device),
        device=device,
        attention=section.attn_impl,
        pretraining=context.pretraining,
        trust_remote_code=section.trust_remote_code,
        quantization=context.quantization,
        head=context.head,
    )
    if context.adapter is not None:
        load_adapter(bundle.model, context.adapter)
        if context.unpack:
            unpack_base(bundle.model)
        bundle.model.eval()
    return bundle


def _score_head(adapter: Path, recorded: Resolved | None) -> ClassifierHead | None:
    """The score head that an adapter was trained with, None for adapters of a model that writes text."""
    config = read_adapter_config(adapter)
    if config.get("task_type") != "SEQ_CLS":
        return None
    header = read_safetensors_header(adapter / WEIGHTS_FILE)[0]
    shape = next((entry["shape"] for name, entry in header.items() if name.endswith("score.weight")), None)
    if shape is None:
        raise ModelError("the adapter of a classifier has no score.weight", where=str(adapter))
    return ClassifierHead(shape[0], recorded.config.task.problem_type if recorded else None)


def _stored_head(model: Path) -> ClassifierHead | None:
    """The score head of a whole model, None where it writes text."""
    config = read_model_config(model)
    if not any(map(is_classifier_name, config.get("architectures") or [])):
        return None
    num_labels = len(config.get("id2label") or {}) or config.get("num_labels", 2)  # transformers' default
    return ClassifierHead(num_labels, config.get("problem_type"))


def _is_run(name: str | None) -> bool:
    return name is not None and (Path(name).expanduser() / "last").is_symlink()


def _model_folder(section: ModelSection) -> Path:
    """A model folder; for a run folder its last checkpoint (which may hold an adapter)."""
    folder = locate_model(section).folder
    if (folder / "config.json").is_file() or is_adapter_folder(folder):
        return folder
    run = RunFolder(folder)
    checkpoint = run.marked("last") or run.latest_checkpoint()
    if checkpoint is not None:
        return checkpoint
    raise ModelError(
        "neither a model nor a run with a checkpoint",
        where=section.model,
        why="there is no config.json, no adapter_config.json and no checkpoint-N",
        fix="name a model folder, a run folder or one of its checkpoints",
    )


def _run_config(source: Path) -> tuple[Resolved | None, Path | None]:
    """Configuration and folder of the run that wrote ``source``; (None, None) for a folder that is no checkpoint."""
    real = source.resolve()
    for folder in (real, real.parent):
        if (folder / "config.yaml").is_file():
            run = real.parent if (real.parent / "config.yaml").is_file() else None
            return load_run_config(folder), run
    return None, None


def _base_model(adapter: Path, recorded: Resolved | None, section: ModelSection) -> Path:
    """The folder of the adapter's base: where it was, else (an adapter from elsewhere) by its name on a hub."""
    config = read_adapter_config(adapter)
    names = [recorded.config.model.model if recorded else None, config.get("base_model_name_or_path")]
    named = [name for name in dict.fromkeys(names) if name]
    for name in named:
        if (Path(name).expanduser() / "config.json").is_file():
            return Path(name).expanduser()
    on_hub = next((name for name in named if is_repo_name(name)), None)
    if on_hub is not None:
        return locate_model(section.model_copy(update={"model": on_hub})).folder
    raise ModelError(
        "the adapter's base model is not found",
        where=str(adapter),
        why=f"it was trained on {' or '.join(named)}, which is no folder here"
        if named
        else "it does not say",
        fix="--model DIR names it",
    )


def _template(resolved: Resolved, recorded: Resolved | None) -> TemplateSection:
    section = resolved.config.template.model_copy()
    if recorded is None:
        return section
    for name in TemplateSection.model_fields:
        if not resolved.is_explicit(name):
            setattr(section, name, getattr(recorded.config.template, name))
    return section


def _quantization(
    resolved: Resolved, recorded: Resolved | None, adapter: Path | None
) -> tuple[QuantizationSection, bool]:
    """How the base is quantised, and whether it is unpacked again.

    Commands that take no such options (merge-lora), or quantise themselves (export), want it in full precision.
    """
    asked = any(resolved.is_explicit(name) for name in ("quant_method", "quant_bits"))
    if resolved.command == "export" or "quant_method" not in COMMANDS[resolved.command].options():
        section = QuantizationSection()
    else:
        section = resolved.config.quantization if recorded is None or asked else recorded.config.quantization
    if section.is_active or adapter is None or not needs_rounded_base(read_adapter_config(adapter)):
        return section, False
    if recorded is None or not recorded.config.quantization.is_active:
        raise ModelError(
            "the adapter makes up for the rounding of a quantised base (LoftQ)",
            where=str(adapter),
            why="how that was quantised says the config.yaml of its run, which is not here",
            fix="name the run or one of its checkpoints",
        )
    return recorded.config.quantization, True
