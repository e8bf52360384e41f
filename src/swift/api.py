"""Python entry points: the same options as the command line, as a dict or keywords."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swift.config.bind import command_of_train_type, resolve
from swift.config.read import read_file
from swift.config.schema import Resolved
from swift.core.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from swift.models.load import ModelBundle
    from swift.train.callbacks.base import Callback
    from swift.train.run import RunResult

__all__ = ["DPOTrainer", "GRPOTrainer", "SwiftModel", "SwiftTrainer", "infer", "run_experiments", "train"]


class SwiftTrainer:
    """Trains as ``swift sft`` does, or as another training command.

    Args:
        config: options, flat (``{"lora_rank": 8}``) or nested by section, in any spelling the command line takes;
            ``command`` (or ``train_type``: pt, dpo, kto...) may name another training command. Or a configuration
            file, as on the command line.
        callbacks: observers of the run, beside the progress line.
        options: further options, on top of ``config``.

    Raises:
        ConfigError: unknown options or wrong values, at once.
    """

    def __init__(
        self,
        config: Mapping[str, Any] | str | Path | None = None,
        *,
        callbacks: Sequence[Callback] = (),
        **options: Any,
    ) -> None:
        files: list[str] = []
        values = dict(options)
        if isinstance(config, str | Path):
            files.append(str(config))
            named = (read_file(Path(config), str(config)).items or {}).get("command")
            if named is not None:
                values.setdefault("command", named.value)
        else:
            values = {**(config or {}), **values}
        command = str(values.pop("command", command_of_train_type(files, values) or "sft"))
        if command not in ("sft", "pt", "rlhf"):
            raise UsageError(f"SwiftTrainer trains with sft, pt or rlhf, not {command!r}", where="command")
        self.resolved: Resolved = resolve(command, files, values=values)
        self.callbacks = callbacks

    def train(self) -> RunResult:
        """Run to the end; returns the run folder and the summary."""
        from swift.rl.run import train as run_training
        from swift.train.callbacks.progress import ProgressLine

        return run_training(self.resolved, callbacks=[ProgressLine(), *self.callbacks])


def train(
    config: Mapping[str, Any] | str | Path | None = None,
    *,
    callbacks: Sequence[Callback] = (),
    **options: Any,
) -> RunResult:
    """``SwiftTrainer(config, **options).train()``."""
    return SwiftTrainer(config, callbacks=callbacks, **options).train()


class _Rows:
    """Data that is given as rows: each data set becomes a file, named for what it holds."""

    def __init__(self) -> None:
        self._files: dict[Path, str] = {}

    def name(self, source: Any) -> str | None:
        """The name of a data set; that of rows is a file which `write` makes."""
        if source is None or isinstance(source, str | Path):
            return None if source is None else str(source)
        import hashlib
        import json

        from swift.core.home import swift_home

        text = "".join(json.dumps(dict(row), ensure_ascii=False, default=str) + "\n" for row in source)
        path = swift_home() / "rows" / f"{hashlib.blake2b(text.encode(), digest_size=10).hexdigest()}.jsonl"
        self._files[path] = text
        return str(path)

    def write(self) -> None:
        from swift.core.files import atomic_write_text

        for path, text in self._files.items():
            atomic_write_text(path, text)


class DPOTrainer(SwiftTrainer):
    """Learns from preferences, as ``swift rlhf`` does; ``rlhf_type`` may name another method than dpo.

    Args:
        model: a transformers model (the one of its folder is meant), or a name as on the command line.
        tokenizer: that of the model; it is read from the model's folder.
        train_dataset: a file, the name of a data set, or rows (dicts; also a data set of the library datasets).
        eval_dataset: as ``train_dataset``, to validate with.
        ref_model: the reference, as ``model``; default: the model as training begins.
        callbacks: observers of the run.
        options: further options of ``swift rlhf``, such as ``beta`` and ``loss_type``.

    Raises:
        ConfigError: unknown options or wrong values, at once.
    """

    def __init__(
        self,
        model: PreTrainedModel | str | Path,
        tokenizer: Any = None,
        train_dataset: Any = None,
        *,
        eval_dataset: Any = None,
        ref_model: PreTrainedModel | str | Path | None = None,
        callbacks: Sequence[Callback] = (),
        **options: Any,
    ) -> None:
        given = {"model": model, "ref_model": ref_model}
        names = {name: str(getattr(value, "name_or_path", value)) for name, value in given.items() if value}
        self._rows = _Rows()
        data = {"dataset": self._rows.name(train_dataset), "val_dataset": self._rows.name(eval_dataset)}
        files = {name: value for name, value in data.items() if value is not None}
        super().__init__({"command": "rlhf", **names, **files, **options}, callbacks=callbacks)

    def train(self) -> RunResult:
        """Run to the end; returns the run folder and the summary."""
        self._rows.write()
        return super().train()


class GRPOTrainer:
    """Learns from rewards of the model's own answers, as ``swift rlhf --rlhf_type grpo`` does.

    Args:
        model: a transformers model (the one of its folder is meant), or a name as on the command line.
        tokenizer: that of the model; it is read from the model's folder.
        train_dataset: a file, the name of a data set, or rows (dicts; also a data set of the library datasets).
        reward_model: a reward model (folder of a run of ``swift rlhf --rlhf_type rm``), or several.
        reward_funcs: rewards, by name or as functions or classes of a file, or several.
        eval_dataset: as ``train_dataset``, to validate with.
        beta: weight of the KL to the reference; default: 0.1, with another ``rlhf_type`` that of its paper.
        callbacks: observers of the run.
        options: further options of ``swift rlhf``, such as ``rlhf_type``, ``num_generations``, ``vllm_config``.

    Raises:
        ConfigError: unknown options or wrong values, at once; what can only be planned (``use_vllm_sampler``), when
            training begins.
    """

    def __init__(
        self,
        model: PreTrainedModel | str | Path,
        tokenizer: Any = None,
        train_dataset: Any = None,
        reward_model: str | Sequence[str] | None = None,
        *,
        reward_funcs: Any = None,
        eval_dataset: Any = None,
        beta: float | None = None,
        callbacks: Sequence[Callback] = (),
        **options: Any,
    ) -> None:
        if beta is None and {"rlhf_type", "algo"}.isdisjoint(options):
            beta = 0.1
        self._rows = _Rows()
        given: dict[str, Any] = {
            "model": str(getattr(model, "name_or_path", model)),
            "rlhf_type": "grpo",
            "dataset": self._rows.name(train_dataset),
            "val_dataset": self._rows.name(eval_dataset),
            "reward_model": [reward_model] if isinstance(reward_model, str) else reward_model,
            "reward_funcs": _reward_names(reward_funcs),
            "beta": beta,
        }
        self._values = {**{name: value for name, value in given.items() if value is not None}, **options}
        self.resolved: Resolved = resolve("rlhf", values=self._values, planning=True)
        self.tokenizer, self.train_dataset, self.callbacks = tokenizer, train_dataset, callbacks

    def train(self) -> RunResult:
        """Run to the end; returns the run folder and the summary. Raises ConfigError for what can only be planned."""
        from swift.rl.run import train as run_training
        from swift.train.callbacks.progress import ProgressLine

        self.resolved = resolve("rlhf", values=self._values)
        self._rows.write()
        return run_training(self.resolved, callbacks=[ProgressLine(), *self.callbacks])


def _reward_names(rewards: Any) -> list[str] | None:
    """Names of rewards; a function or class becomes ``FILE.py:name``."""
    if rewards is None:
        return None
    from swift.rl.reward_functions import reward_source

    several = rewards if isinstance(rewards, list | tuple) else [rewards]
    return [str(one) if isinstance(one, str | Path) else reward_source(one) for one in several]


class SwiftModel:
    """Loads models as the commands do."""

    @staticmethod
    def from_pretrained(
        model: str | Path, *, adapters: Sequence[str | Path] = (), **options: Any
    ) -> PreTrainedModel:
        """The transformers model at ``model``, with ``adapters`` on top, in evaluation mode.

        Args:
            model: model folder, or a run folder or checkpoint.
            adapters: adapter folder or run.
            options: of the section ``model`` (``torch_dtype``, ``device``, ``attn_impl``...).

        Raises:
            ModelError: the folder is not a model, or an adapter does not fit it.
        """
        return _load({"model": str(model), "adapters": [str(adapter) for adapter in adapters], **options})[
            0
        ].model


def run_experiments(
    experiments: str | Path | Mapping[str, Any], *, inline: bool = False, **settings: Any
) -> list[dict[str, Any]]:
    """Run a file of experiments, or its content as a dict, to the end; returns one row for each experiment.

    ``pandas.DataFrame(run_experiments("experiments.yaml"))`` gives a table. See
    `swift.experiments.results.run_experiments` for the settings and what a row holds.

    Args:
        inline: run them in this process instead of in the experiment service.
    """
    from swift.experiments import results

    return results.run_experiments(experiments, inline=inline, **settings)


def infer(prompts: str | Sequence[str] | Sequence[Mapping[str, Any]], **options: Any) -> str | list[str]:
    """Answer one prompt, several prompts, or one conversation.

    Args:
        prompts: a text or the messages of one conversation (returns a text), or several texts (returns a list).
        options: options of ``swift infer``: ``model``, ``adapters``, ``max_new_tokens``...
    """
    from swift.inference.generate import Generator

    bundle, resolved = _load(options)
    single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], Mapping))
    if isinstance(prompts, str):
        conversations = [[{"role": "user", "content": prompts}]]
    elif single:
        conversations = [[dict(message) for message in prompts if isinstance(message, Mapping)]]
    else:
        conversations = [[{"role": "user", "content": str(prompt)}] for prompt in prompts]
    answers = Generator(bundle, options=resolved.config.engine).batch(
        conversations, resolved.config.generation
    )
    return answers[0] if single else answers


def _load(options: Mapping[str, Any]) -> tuple[ModelBundle, Resolved]:
    from swift.inference.context import find_context, load_context

    resolved = resolve("infer", values=options)
    context = find_context(resolved)
    context.check_writes_text()
    return load_context(context, resolved), resolved
