"""Which models a server has, and what they are called: ``--model``, and ``--adapters a=FOLDER b=FOLDER``."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, replace
from pathlib import Path

from swift.config.adapter_names import split_name
from swift.config.schema import Resolved
from swift.core.errors import ConfigError
from swift.inference.context import InferenceContext, find_context
from swift.tuners.peft_format import read_adapter_config

__all__ = ["Served", "context_of_adapter", "find_served"]

_CHECKPOINT = re.compile(r"(checkpoint|step|epoch)-\d+")


@dataclass(frozen=True)
class Served:
    """What the engine starts with, and the adapters that it loads.

    Attributes:
        name: of the base model, or of the one model there is.
        context: of what the engine starts with.
        adapters: name -> its context, on the same base model.
    """

    name: str
    context: InferenceContext
    adapters: dict[str, InferenceContext]

    @property
    def names(self) -> list[str]:
        """All of them, the base first."""
        return [self.name, *self.adapters]


def find_served(resolved: Resolved) -> Served:
    """Work out models and names.

    An adapter that only works as part of the model (a score head, LoftQ's rounded base, a method other than LoRA) is
    served alone: the engine starts with it.

    Raises:
        ModelError: a folder is neither a model, a run nor an adapter.
        ConfigError: adapters of different base models, one that must be alone beside others, two of one name.
    """
    section, asked = resolved.config.model, resolved.config.serving.served_model_name
    given = [split_name(entry) for entry in section.adapters]
    if given:
        contexts = [context_of_adapter(resolved, folder) for _, folder in given]
    else:
        contexts = [find_context(resolved)]
        if contexts[0].adapter is None:
            return Served(asked or _name_of(section.model, contexts[0].model), contexts[0], {})
        given = [(None, str(section.model))]  # a run of an adapter
    names = [name or _name_of(text, Path(text)) for name, text in given]
    first = contexts[0]
    if len(contexts) == 1 and not _can_be_added(first):
        return Served(given[0][0] or asked or names[0], first, {})
    for name, context in zip(names, contexts, strict=True):
        _check_together(name, context, names[0], first)
    named = section.model if section.adapters else None
    base = asked or _name_of(named, first.model)
    repeated = next((name for name in names if [base, *names].count(name) > 1), None)
    if repeated is not None:
        raise ConfigError(
            f"two models would be called {repeated}",
            where="--adapters",
            fix=f"--adapters first={given[0][1]} ..., or --served_model_name for the base",
        )
    # The base answers in the form of the adapters' run, without what that run told its model about itself.
    template = first.template.model_copy(update={"system": resolved.config.template.system})
    whole = replace(first, adapter=None, run=None, chosen_last=False, template=template)
    return Served(base, whole, dict(zip(names, contexts, strict=True)))


def context_of_adapter(resolved: Resolved, folder: str) -> InferenceContext:
    """What a run or folder of one adapter knows, with the options of the command line on top."""
    alone = copy.deepcopy(resolved)
    alone.config.model.adapters = [folder]
    return find_context(alone)


def _folder(context: InferenceContext) -> Path:
    assert context.adapter is not None
    return context.adapter


def _can_be_added(context: InferenceContext) -> bool:
    """Whether the engine can load it beside others, on a base in common."""
    config = read_adapter_config(_folder(context))
    more = config.get("use_dora") or config.get("target_parameters")
    plain = config.get("peft_type") == "LORA" and not more
    return plain and context.writes_text and not context.unpack


def _check_together(name: str, context: InferenceContext, first_name: str, first: InferenceContext) -> None:
    if not _can_be_added(context):
        raise ConfigError(
            f"{name} can only be served alone",
            where="--adapters",
            why="it is more than LoRA on a model that writes text",
            fix="a server of its own, or swift merge-lora and --model",
        )
    same = context.model.resolve() == first.model.resolve() and context.quantization == first.quantization
    if not same:
        raise ConfigError(
            f"{name} and {first_name} do not share a base model",
            where="--adapters",
            why=f"{context.model} and {first.model}, quantised as in their runs",
            fix="a server for each base",
        )


def _name_of(text: str | None, folder: Path) -> str:
    """What a model is called that was asked for as ``text`` (None: it was not named) and lies in ``folder``.

    ``RUN`` for a run, its last and best checkpoint and its merged model; ``RUN-checkpoint-10`` for another; a hub's
    name for what comes from there.
    """
    if text is not None:
        folder = Path(text).expanduser()
        if not folder.is_dir():
            return text
    if folder.is_symlink() or folder.name in ("merged", "last", "best"):
        return folder.absolute().parent.name
    folder = folder.resolve()
    if folder.parent.name == "snapshots":  # the cache of a hub: models--OWNER--NAME/snapshots/COMMIT
        return folder.parent.parent.name.removeprefix("models--").replace("--", "/")
    if _CHECKPOINT.fullmatch(folder.name):
        return f"{folder.parent.name}-{folder.name}"
    return folder.name
