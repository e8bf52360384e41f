"""Methods that PEFT carries out. Its import costs seconds, so it is imported only when one of them is used."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from swift.config.sections.tuner import TunerSection
from swift.core.errors import ConfigError, ModelError
from swift.tuners.adapter import OtherAdapter
from swift.tuners.peft_names import WEIGHTS_FILE
from swift.tuners.registry import Method

__all__ = ["PeftAdapter", "attach_with_peft", "load_with_peft"]


class PeftAdapter(OtherAdapter):
    """A PEFT model around ours. Ours is used as before: PEFT has put its layers into it.

    Args:
        peft_model: ``peft.PeftModel`` with one adapter, ``default``.
        method: its name, for messages.
    """

    def __init__(self, peft_model: Any, method: str) -> None:
        super().__init__(peft_model.get_base_model(), method)
        self.peft_model = peft_model

    def save(self, folder: Path, base_path: str | None) -> None:
        self.peft_model.peft_config["default"].base_model_name_or_path = base_path
        self.peft_model.save_pretrained(str(folder), save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # a template without content

    def restore(self, folder: Path) -> None:
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        tensors = load_file(folder / WEIGHTS_FILE)
        try:
            result = set_peft_model_state_dict(self.peft_model, tensors)
        except RuntimeError as error:
            raise ModelError(
                "the adapter has other shapes than the stored one", where=str(folder), why=str(error)
            ) from None
        if result.unexpected_keys:
            raise ModelError(
                "the adapter was set up with other modules than the stored one",
                where=str(folder),
                why=f"it has no {result.unexpected_keys[0]}",
                fix="keep the tuner options of the run that wrote it",
            )

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        with self.peft_model.disable_adapter():
            yield

    def merge(self) -> None:
        self.peft_model.merge_and_unload()
        self.detach()


class AdaLora(PeftAdapter):
    """AdaLoRA (arXiv 2303.10512): singular values are pruned while training goes on, by their importance.

    The importance is a moving average over steps that PEFT does not store; it is part of `state` here.
    """

    def __init__(self, peft_model: Any) -> None:
        super().__init__(peft_model, "adalora")
        self._config = peft_model.peft_config["default"]
        self._allocator = peft_model.base_model.rankallocator
        self._step = 0
        self._kept: dict[str, Any] = {}

    def _matrices(self) -> Iterator[Tensor]:
        for name, parameter in self.model.named_parameters():
            if "lora_A" in name:
                yield parameter
            elif "lora_B" in name:
                yield parameter.t()

    def penalty(self) -> Tensor:
        """Weight x mean over all P and Q of the Frobenius norm of (P P^T - 1) (equation 4)."""
        terms = [torch.linalg.norm(m @ m.t() - torch.eye(len(m), device=m.device)) for m in self._matrices()]
        return self._config.orth_reg_weight * torch.stack(terms).mean()

    def after_step(self) -> None:
        self._step += 1
        last = self._config.total_step - self._config.tfinal
        if self._step < last:
            self._allocator.update_and_allocate(self.model, self._step)
        elif self._step == last or not self._kept:
            _, self._kept = self._allocator.update_and_allocate(self.model, self._step, force_mask=True)
        else:
            self._allocator.mask_using_rank_pattern(self.model, self._kept)

    def _averages(self) -> dict[str, dict[str, Tensor]]:
        allocator = self._allocator
        return {
            "now": allocator.ipt,
            "sensitivity": allocator.exp_avg_ipt,
            "uncertainty": allocator.exp_avg_unc,
        }

    def state(self) -> dict[str, Tensor]:
        tensors = {"step": torch.tensor(self._step)}
        for kind, values in self._averages().items():
            tensors.update({f"{kind}/{name}": value.cpu() for name, value in values.items()})
        tensors.update({f"kept/{name}": torch.tensor(rows) for name, rows in self._kept.items()})
        return tensors

    def load_state(self, state: dict[str, Tensor]) -> None:
        self._step = int(state["step"])
        device = next(self.model.parameters()).device
        averages = self._averages()
        for key, value in state.items():
            kind, _, name = key.partition("/")
            if kind in averages:
                averages[kind][name] = value.to(device)
            elif kind == "kept":
                self._kept[name] = value.tolist()


def attach_with_peft(
    model: nn.Module,
    method: Method,
    section: TunerSection,
    targets: Sequence[str],
    *,
    seed: int,
    total_steps: int | None,
) -> PeftAdapter:
    """Freeze ``model`` and let PEFT put the adapter into it.

    Args:
        targets: names of the adapted modules, as PEFT takes them (it compares the ends of names).
        seed: of the adapter's start; the global generator is left as it was.
        total_steps: of the run, for AdaLoRA.

    Raises:
        ConfigError: PEFT refuses the options for this model.
    """
    import peft

    _check(section, total_steps)
    _check_quantised(model, method, section)
    values = {theirs: section_value(section, ours) for theirs, ours in method.options.items()}
    values |= {**method.fixed, "target_modules": list(targets), "task_type": "CAUSAL_LM"}
    if section.tuner_type == "ia3":
        feedforward = section.ia3_feedforward_modules
        values["feedforward_modules"] = [name for name in targets if name.rpartition(".")[2] in feedforward]
    elif section.tuner_type == "bone":
        values["init_weights"] = "bat" if section.init_weights == "bat" else True
    elif section.tuner_type == "lora":
        values["init_lora_weights"] = "gaussian" if section.init_weights == "gaussian" else True
    elif section.tuner_type == "adalora":
        values["total_step"] = total_steps or section.adalora_tinit + section.adalora_tfinal + 1
    model.requires_grad_(False)

    def build() -> Any:
        torch.manual_seed(seed)
        return peft.get_peft_model(model, getattr(peft, method.config)(**values))

    with torch.random.fork_rng():
        peft_model = _refusing(build, f"--tuner_type {section.tuner_type}")
    return _adapter(peft_model, section.tuner_type)


def section_value(section: TunerSection, name: str) -> Any:
    """The option, an empty list as None: PEFT's word for "not used"."""
    value = getattr(section, name)
    return None if value == [] else value


def _check(section: TunerSection, total_steps: int | None) -> None:
    if section.tuner_type == "adalora" and total_steps is not None:
        idle = section.adalora_tinit + section.adalora_tfinal
        if idle >= total_steps:
            raise ConfigError(
                f"of {total_steps} steps none is left to shrink the ranks in",
                where="--adalora_tinit",
                why=f"adalora_tinit and adalora_tfinal are {idle} steps together",
                fix=f"--adalora_tinit {total_steps // 10} --adalora_tfinal {total_steps // 4}",
            )
    if section.boft_n_butterfly_factor > 1 and not torch.cuda.is_available():
        raise ConfigError(
            "more than one butterfly factor needs PEFT's CUDA kernel",
            where=f"--boft_n_butterfly_factor {section.boft_n_butterfly_factor}",
            fix="leave it out",
        )


def _check_quantised(model: nn.Module, method: Method, section: TunerSection) -> None:
    kinds = {type(parameter).__name__ for parameter in model.parameters()}
    if "Params4bit" in kinds and not method.takes_packed:
        raise ConfigError(
            f"PEFT's {section.tuner_type} cannot sit on weights of 4 bits",
            where=f"--tuner_type {section.tuner_type}",
            why="it takes its sizes from the shape of the weight, which is packed",
            fix="--quant_bits 8, or --tuner_type lora",
        )
    if "Int8Params" in kinds and section.use_dora:
        raise ConfigError(
            "PEFT's DoRA cannot sit on weights of 8 bits",
            where="--use_dora",
            why="it unpacks the weight at every step, after which bitsandbytes has lost the scales",
            fix="--quant_bits 4, or leave --use_dora out",
        )


def _refusing(build: Callable[[], Any], where: str) -> Any:
    """``build()``, with what PEFT says against the options as an error for the user."""
    try:
        return build()
    except (ValueError, TypeError) as error:
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError("PEFT cannot set this up for the model", where=where, why=message) from error


def load_with_peft(model: nn.Module, folder: Path, config: dict[str, Any], *, trainable: bool) -> PeftAdapter:
    """Load an adapter folder of one of PEFT's methods.

    Raises:
        ModelError: the folder does not fit this model.
    """
    import peft

    try:
        peft_model = peft.PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ModelError(
            "the adapter does not fit this base model", where=str(folder), why=str(error).splitlines()[0]
        ) from error
    return _adapter(peft_model, str(config["peft_type"]).lower(), trainable=trainable)


def _adapter(peft_model: Any, method: str, *, trainable: bool = True) -> PeftAdapter:
    return AdaLora(peft_model) if method == "adalora" and trainable else PeftAdapter(peft_model, method)
