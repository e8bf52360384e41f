"""Load a model, its tokenizer and its template from a local folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swift.config.sections.quantization import QuantizationSection
from swift.config.sections.template import TemplateSection
from swift.core.errors import ModelError
from swift.core.logging import get_logger, quiet_libraries
from swift.core.registry import closest
from swift.models.classifier import ClassifierHead, classifier_of, start_head
from swift.models.facts import ModelFacts, check_model_folder, read_model_config
from swift.models.quantised import (
    check_loadable,
    check_packages,
    loading_config,
    prepare_stored,
    settle_layers,
)
from swift.models.template import Template

if TYPE_CHECKING:
    import torch

__all__ = [
    "ModelBundle",
    "choose_attention",
    "find_class",
    "isolates_documents",
    "load_bundle",
    "load_model",
    "load_template",
    "load_tokenizer",
    "load_unloaded",
    "loading_options",
]

logger = get_logger(__name__)


@dataclass
class ModelBundle:
    """Everything that belongs to one loaded model.

    Attributes:
        model: the transformers model, in evaluation mode.
        tokenizer: its tokenizer; ``pad_token_id`` is always set.
        template: messages to tokens.
        facts: sizes from config.json.
        path: the folder it comes from.
        attention: the attention implementation in use.
    """

    model: Any
    tokenizer: Any
    template: Template
    facts: ModelFacts
    path: Path
    attention: str


def load_bundle(
    path: Path | str,
    template_section: TemplateSection,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    attention: str = "auto",
    pretraining: bool = False,
    trust_remote_code: bool = False,
    quantization: QuantizationSection | None = None,
    head: ClassifierHead | None = None,
) -> ModelBundle:
    """Model, tokenizer and template of one folder, checked against each other."""
    folder = Path(path)
    check_model_folder(folder)
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    template = Template(tokenizer, template_section, pretraining)
    model = load_model(
        folder,
        dtype=dtype,
        device=device,
        attention=attention,
        trust_remote_code=trust_remote_code,
        quantization=quantization,
        head=head,
    )
    if head is not None:
        model.config.pad_token_id = tokenizer.pad_token_id
    check_vocabulary(model, tokenizer, folder)
    used = model.config._attn_implementation
    return ModelBundle(model, tokenizer, template, ModelFacts.read(folder), folder, used)


def load_tokenizer(path: Path | str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder. ``tokenizer.json`` is taken as it is where there is one (torch is not imported).

    ``pad_token`` is set where the folder has none: to the unknown token or another control token, and only when
    there is no other to the end token. Padding never reaches a label here, so no choice changes what is learned.

    Raises:
        ModelError: there is no usable tokenizer.
    """
    quiet_libraries()
    folder = Path(path)
    try:
        if (folder / "tokenizer.json").is_file():
            from transformers import PreTrainedTokenizerFast

            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        else:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=trust_remote_code
            )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError("cannot load the tokenizer", where=str(folder), why=_first_line(error)) from error
    except Exception as error:
        # The tokenizers library raises bare Exception for a damaged tokenizer.json.
        if type(error) is not Exception:
            raise
        raise ModelError(
            "tokenizer.json cannot be read", where=str(folder), why=_first_line(error), fix="copy it again"
        ) from error
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = _choose_pad_token(tokenizer)
        logger.info("the tokenizer has no padding token; %r is used", tokenizer.pad_token)
    return tokenizer


def load_template(
    path: Path | str,
    template_section: TemplateSection,
    pretraining: bool = False,
    *,
    trust_remote_code: bool = False,
) -> Template:
    """Tokenizer and template only; neither weights nor torch."""
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    return Template(tokenizer, template_section, pretraining)


def load_unloaded(
    path: Path | str, template_section: TemplateSection, pretraining: bool, *, trust_remote_code: bool = False
) -> ModelBundle:
    """A bundle whose ``model`` is None, for models that run elsewhere."""
    folder = Path(path)
    template = load_template(folder, template_section, pretraining, trust_remote_code=trust_remote_code)
    return ModelBundle(None, template.tokenizer, template, ModelFacts.read(folder), folder, "none")


def load_model(
    path: Path | str,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    attention: str = "auto",
    trust_remote_code: bool = False,
    quantization: QuantizationSection | None = None,
    head: ClassifierHead | None = None,
    kept_modules: Sequence[str] | None = None,
) -> Any:
    """The causal language model of a folder (with ``head``: its sequence classifier), in evaluation mode.

    It works without key/value cache by default.

    Args:
        dtype: of the weights in memory.
        quantization: how the linear layers are quantised while they are read; None leaves them as they are.
        attention: ``auto`` takes ``swift_varlen`` where it is exact for the architecture, else what transformers
            chooses; ``varlen`` insists on it; other names are transformers'.
        head: what the score head of a sequence classifier is like; one that the folder lacks is started.
        kept_modules: with bitsandbytes, the linear layers that stay as they are; default: the output head.

    Raises:
        ModelError: incomplete folder, unknown architecture, attention the model cannot use, or a quantised folder
            that cannot be loaded here.
    """
    quiet_libraries()
    folder = Path(path)
    check_model_folder(folder, need_tokenizer=False)
    model_class, config = find_class(folder, trust_remote_code)
    options = loading_options(attention, config, folder, dtype=dtype, device=str(device))
    if trust_remote_code:
        options["trust_remote_code"] = True
    if head is not None:
        model_class = classifier_of(model_class, config, head, folder)
    elif model_class.__name__.endswith("ForSequenceClassification"):
        raise ModelError(
            f"{model_class.__name__} gives scores, not text",
            where=str(folder),
            fix="--task_type seq_cls (or reranker) trains it",
        )
    quantization = quantization or QuantizationSection()
    check_packages(quantization)
    check_loadable(config.to_dict(), str(device).partition(":")[0], quantization, str(folder))
    settings = loading_config(quantization, dtype, kept_modules)
    if settings is not None:
        options["quantization_config"] = settings
    is_quantised = settings is not None or getattr(config, "quantization_config", None) is not None
    if is_quantised:
        options["device_map"] = {"": str(device)}  # quantised layers cannot be moved afterwards
        prepare_stored(config)
    model = _read(model_class, folder, head, config=config, dtype=dtype, **options)
    if is_quantised:
        settle_layers(model)
        if getattr(model.config, "quantization_config", None) is None:
            # Unpacked while it was read. Transformers would pack the weights again whenever they are stored, and
            # config.json would not say so; without the record of how they were read it stores them as they are.
            model._weight_conversions = None
    else:
        model.to(device)
    model.config.use_cache = False
    return model.eval()


def _read(model_class: Any, folder: Path, head: ClassifierHead | None, **options: Any) -> Any:
    """The model with all its weights; a score head that the folder lacks is started. Raises ModelError."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    try:
        model, report = model_class.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, **options
        )
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        raise ModelError("cannot load the model", where=str(folder), why=_first_line(error)) from error
    missing = sorted(start_head(model, report["missing_keys"], head) if head else report["missing_keys"])
    if missing:
        # transformers would go on with random values.
        raise ModelError(
            f"{len(missing)} weights of {type(model).__name__} are not in the folder",
            where=str(folder),
            why=", ".join(missing[:3]) + (", ..." if len(missing) > 3 else ""),
            fix="check that config.json and the weights belong together",
        )
    return model


def loading_options(
    attention: str, config: Any, folder: Path, *, dtype: torch.dtype, device: str
) -> dict[str, Any]:
    """Which functions of transformers compute attention and experts."""
    implementation = choose_attention(attention, config, folder)
    options: dict[str, Any] = {"attn_implementation": implementation} if implementation else {}
    if device.startswith("cpu") and str(dtype) != "torch.float32":
        # transformers' default for experts, grouped_mm, is 2.6x slower in bf16 on CPU, and knows no float64.
        options["experts_implementation"] = "eager"
    return options


def isolates_documents(path: Path | str, attention: str = "auto", *, trust_remote_code: bool = False) -> bool:
    """Whether a model loaded with this attention option will use ``swift_varlen``. Reads no weights."""
    from swift.models.attention import VARLEN

    folder = Path(path)
    _, config = find_class(folder, trust_remote_code)
    return choose_attention(attention, config, folder) == VARLEN


def check_vocabulary(model: Any, tokenizer: Any, folder: Path) -> None:
    """Raise ModelError when the tokenizer knows ids for which the embedding has no row."""
    rows, tokens = model.get_input_embeddings().weight.shape[0], len(tokenizer)
    if tokens > rows:
        raise ModelError(
            f"the tokenizer has {tokens} tokens, but the embedding has only {rows} rows",
            where=str(folder),
            why="the tokenizer belongs to another model, or tokens were added without resizing the embedding",
            fix="model.resize_token_embeddings(len(tokenizer)), then save the model again",
        )


def find_class(folder: Path, trust_remote_code: bool) -> tuple[Any, Any]:
    """Model class and config: by name where transformers has it, which avoids importing the Auto classes."""
    import transformers

    raw = read_model_config(folder)
    remote = trust_remote_code and "AutoModelForCausalLM" in raw.get("auto_map", {})
    architectures = raw.get("architectures") or []
    if not remote:
        for name in architectures:
            found = getattr(transformers, name, None)
            if found is not None and getattr(found, "config_class", None) is not None:
                return found, found.config_class.from_pretrained(folder, local_files_only=True)
    if remote or not architectures:
        config = _auto_config(folder, raw, trust_remote_code)
        return transformers.AutoModelForCausalLM, config
    name = architectures[0]
    if "auto_map" in raw:
        raise ModelError(
            f"{name} comes with Python code of its own", where=str(folder), fix="--trust_remote_code true"
        )
    known = [entry for entry in dir(transformers) if entry.endswith("ForCausalLM")]
    near = closest(name, known)
    raise ModelError(
        f"transformers {transformers.__version__} does not know the architecture {name!r}",
        where=str(folder / "config.json"),
        why=f"the nearest it knows is {near}" if near else None,
        fix="pip install -U transformers (a newer one may know it)",
    )


def _auto_config(folder: Path, raw: dict[str, Any], trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError) as error:
        raise ModelError(
            f"unknown model type {raw.get('model_type')!r}",
            where=str(folder / "config.json"),
            why=_first_line(error),
            fix="pip install -U transformers (a newer one may know it)",
        ) from error


def choose_attention(attention: str, config: Any, folder: Path) -> str | None:
    """The implementation that an option means for a configuration; None: what transformers chooses itself."""
    from swift.models.attention import VARLEN, register_varlen_attention, supports_varlen

    if attention not in ("auto", "varlen"):
        return attention
    if supports_varlen(config):
        register_varlen_attention()
        return VARLEN
    if attention == "varlen":
        raise ModelError(
            f"varlen attention is not exact for {config.model_type}",
            where=str(folder),
            fix="--attn_impl auto",
        )
    return None


def _choose_pad_token(tokenizer: Any) -> str:
    if tokenizer.unk_token is not None:
        return tokenizer.unk_token
    others = [
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.special and token.content not in (tokenizer.eos_token, tokenizer.bos_token)
    ]
    named = [token for token in others if "pad" in token.lower() or "endoftext" in token.lower()]
    chosen = next(iter(named or others), tokenizer.eos_token)
    if chosen is None:
        raise ModelError(
            "the tokenizer has neither a padding nor an end token", where=str(tokenizer.name_or_path)
        )
    return chosen


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0] or type(error).__name__
