"""The native engine: one device, or with `Ranks` one of several that share a step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from swift.core.errors import SwiftError
from swift.data.collate import Batch
from swift.models.attention import VARLEN
from swift.models.head import split_head
from swift.models.quantised import is_quantised_linear
from swift.models.sharded import local
from swift.objectives.base import Objective, TokenOutputs
from swift.objectives.logprobs import Vocabulary, entropies, linear_logprobs, module_logprobs
from swift.parallel.collectives import enter
from swift.parallel.engine import RANKS_FOLDER, ParameterSet, StepCounts, StepOutput, add_sums, count_step
from swift.parallel.offload import OffloadedActivations
from swift.parallel.pipelined import pipelined_outputs, pipelined_step
from swift.parallel.sequence.context import Shard
from swift.tuners.lora import LoraLinear, lora_layers
from swift.tuners.saved_module import SavedModule
from swift.tuners.switch import Draw

if TYPE_CHECKING:
    from swift.parallel.data_parallel import Ranks
    from swift.parallel.gathered import GatheredModel

__all__ = ["NativeEngine"]

OPTIMIZER_FILE = "optimizer.pt"


class NativeEngine:
    """Forward, backward and update of one model on one device.

    Args:
        model: the (tuned) causal language model.
        parameter_sets: what is trained, each with its optimizer.
        device: where batches go.
        dtype: compute precision. Weights stored in another precision are cast by autocast.
        chunk_size: target positions whose logits exist at the same time.
        compile_model: wrap the backbone in torch.compile.
        penalty: a term added to the loss once a step; it is not part of the loss that is reported.
        offload_activations: keep what the backward pass needs in host memory.
        split: tells backbone and head apart.
        ranks: the other processes of the run.
        gathered: of a model in parts, the whole for `evaluating`.
    """

    def __init__(
        self,
        model: nn.Module,
        parameter_sets: Sequence[ParameterSet],
        *,
        device: torch.device,
        dtype: torch.dtype,
        chunk_size: int = 1024,
        compile_model: bool = False,
        penalty: Callable[[], Tensor | None] | None = None,
        offload_activations: bool = False,
        split: Callable[[Any], tuple[nn.Module, nn.Module] | None] = split_head,
        ranks: Ranks | None = None,
        gathered: GatheredModel | None = None,
    ) -> None:
        self.model, self.ranks, self.gathered = model, ranks, gathered
        self.parameter_sets = {group.name: group for group in parameter_sets}
        self.device = device
        self.dtype = dtype
        self.chunk_size = chunk_size
        self._switch = next((layer.switch for layer in lora_layers(model).values()), None)
        self._penalty = penalty
        self._offload = offload_activations
        self._autocast = dtype in (torch.bfloat16, torch.float16) and any(
            parameter.dtype == torch.float32 for parameter in _plain_parameters(model)
        )
        with self.precision():
            self._split = split(model)
        self._forward: Callable[..., Any] = self._split[0] if self._split else model
        # Other attention functions tell documents apart by position ids alone.
        self._takes_lengths = model.config._attn_implementation == VARLEN  # type: ignore[union-attr]
        if compile_model:
            self._forward = torch.compile(self._forward)
        trainable = [p for group in parameter_sets for p in group.parameters.values()]
        self.scaler = torch.amp.GradScaler(device.type) if dtype == torch.float16 and trainable else None
        self.training_batch: Batch | None = None

    def forward_backward(
        self, batches: Sequence[Batch], objective: Objective, seed: int | None = None
    ) -> StepOutput:
        self.model.train()
        self.average(False)
        counts = self.count(objective, batches)
        if self.ranks is not None and self.ranks.pipeline is not None:
            return pipelined_step(self, batches, objective, counts, seed)
        losses: list[Tensor] = []
        metrics: dict[str, Tensor] = {}
        for number, batch in enumerate(batches):
            batch = batch.to(self.device)
            self.training_batch = batch
            if self.ranks is not None and number == len(batches) - 1 and self._penalty is None:
                self.ranks.before_last()
            with self.drawing(seed, self.ranks.number(number) if self.ranks else number):
                with OffloadedActivations(self.model) if self._offload else contextlib.nullcontext():
                    loss, sums = objective(self.objective_inputs(batch), batch, counts.denominators)
                (self.scaler.scale(loss) if self.scaler else loss).backward()
            losses.append(loss.detach())
            add_sums(metrics, sums)
            # What functions keep besides saved tensors (bitsandbytes' 8-bit inputs) lives as long as their graph.
            del loss, sums
        self.training_batch = None
        penalty = self._penalty() if self._penalty else None
        if penalty is not None:
            penalty = penalty / (self.ranks.world.layout.dp if self.ranks else 1)
            (self.scaler.scale(penalty) if self.scaler else penalty).backward()
        if self.ranks is not None:
            self.ranks.finish()
        return StepOutput(torch.stack(losses).sum(), metrics, counts)

    def count(self, objective: Objective, batches: Sequence[Batch]) -> StepCounts:
        """What the step holds, over all ranks."""
        if self.ranks is None:
            return count_step(objective, batches)
        # A rank that others have left without work passes over an empty micro-batch; it does not count as one.
        counts = count_step(objective, [batch for batch in batches if batch.num_tokens])
        return self.ranks.world.total(counts)

    def before_step(self, batches: Sequence[Batch]) -> list[Batch]:
        """The micro-batches with what has to be known of each before the model is in the midst of a step."""
        return list(batches)

    def drawing(self, seed: int | None, number: int) -> contextlib.AbstractContextManager[None]:
        """The dropout of the acting LoRA adapter, while the gradients of micro-batch ``number`` are computed."""
        if seed is None or self._switch is None or self._switch.active is None:
            return contextlib.nullcontext()
        return self._switch.drawing({self._switch.active: Draw(seed, number)})

    def rehearse(self, batch: Batch, objective: Objective) -> None:
        """One forward and backward pass that changes nothing, to see whether the largest batch fits.

        Raises SwiftError when the device runs out of memory: now, and not after an hour.
        """
        try:
            self.forward_backward([batch], objective)
        except torch.OutOfMemoryError as error:
            rows, width = batch.input_ids.shape
            raise SwiftError(
                f"the largest batch ({rows} x {width} tokens) does not fit into the device's memory",
                where=str(self.device),
                why=str(error).split(". ", 1)[0],
                fix="a smaller --per_device_train_batch_size or --max_length, or --gradient_checkpointing true",
            ) from error
        finally:
            for group in self.parameter_sets.values():
                group.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def evaluate(self, batch: Batch, objective: Objective) -> StepOutput:
        self.model.eval()
        self.average(True)
        batch = batch.to(self.device)
        loss, sums = objective(self.objective_inputs(batch), batch, objective.denominators([batch]))
        return StepOutput(loss, dict(sums))

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        self.model.eval()
        self.settle()
        found: contextlib.AbstractContextManager[nn.Module] = contextlib.nullcontext(self.model)
        if self.gathered is not None:
            found = self.gathered.filled(self.model, self.ranks.root if self.ranks else None)
        with self.precision(), found as model:
            yield model

    def clip(self) -> dict[str, Tensor]:
        norms = {}
        for name, group in self.parameter_sets.items():
            if self.scaler:
                self.scaler.unscale_(group.optimizer)
            parameters = [p for p in group.parameters.values() if p.grad is not None]
            limit = group.max_grad_norm or float("inf")
            foreach = self.device.type != "cpu"
            if self.ranks is None:
                norms[name] = nn.utils.clip_grad_norm_(parameters, limit, foreach=foreach)
            else:
                norms[name] = self.ranks.norm(group.parameters)
                nn.utils.clip_grads_with_norm_(parameters, limit, norms[name], foreach=foreach)
        return norms

    def step(self, step: int) -> dict[str, float]:
        rates = {}
        for name, group in self.parameter_sets.items():
            rates[name] = group.learning_rate(step)
            for options in group.optimizer.param_groups:
                options["lr"] = rates[name] * options.get("lr_ratio", 1.0)
            if self.scaler:
                self.scaler.step(group.optimizer)
            else:
                group.optimizer.step()
            group.optimizer.zero_grad(set_to_none=True)
        if self.scaler:
            self.scaler.update()
        return rates

    def settle(self) -> None:
        self.average(True)

    def average(self, wanted: bool) -> None:
        """Schedule-free optimizers take gradients at another point than the one that is kept and evaluated."""
        for group in self.parameter_sets.values():
            switch = getattr(group.optimizer, "eval" if wanted else "train", None)
            if switch is not None:
                switch()

    def begin_saving(self, folder: Path) -> Any:
        """Of several ranks: have all write their parts of the state; returns a future, see `swift.parallel.states`."""
        from swift.parallel.states import begin_saving, named_state

        assert self.ranks is not None
        if self.scaler is not None and self.ranks.world.is_main:
            with (folder / OPTIMIZER_FILE).open("wb") as file:
                torch.save({"optimizers": {}, "scaler": self.scaler.state_dict()}, file)
        return begin_saving(folder, named_state(self.parameter_sets), self.ranks.world.saving)

    def save(self, folder: Path) -> None:
        state = {
            "optimizers": {name: group.optimizer.state_dict() for name, group in self.parameter_sets.items()},
            "scaler": self.scaler.state_dict() if self.scaler else None,
        }
        # Through Python's file object a failed write is an OSError; torch's own writer raises various RuntimeErrors.
        with (folder / OPTIMIZER_FILE).open("wb") as file:
            torch.save(state, file)

    def load(self, folder: Path) -> None:
        file = folder / OPTIMIZER_FILE
        by_ranks = (folder / RANKS_FOLDER).is_dir()
        if by_ranks:
            from swift.parallel.states import load_state

            load_state(folder, self.parameter_sets)
        if not file.is_file() and not by_ranks:
            raise SwiftError(
                "this checkpoint has no optimizer state and cannot be resumed",
                where=str(folder),
                why="it was saved with save_only_model, or copied in part",
                fix=f"start a new run from its weights: --model or --adapters {folder}",
            )
        if not file.is_file():
            return
        state = torch.load(file, map_location="cpu", weights_only=True)
        if not by_ranks:
            self._load_optimizers(folder, state)
        if self.scaler and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])

    def _load_optimizers(self, folder: Path, state: dict[str, Any]) -> None:
        if set(state["optimizers"]) != set(self.parameter_sets):
            raise SwiftError(
                f"the checkpoint trains {sorted(state['optimizers'])}, this run {sorted(self.parameter_sets)}",
                where=str(folder),
            )
        for name, group in self.parameter_sets.items():
            if self.ranks is None:
                group.optimizer.load_state_dict(state["optimizers"][name])
            else:
                self.ranks.load_whole(group.optimizer, state["optimizers"][name])

    def gather(self) -> dict[str, Tensor]:
        groups = self.parameter_sets.values()
        return dict(
            self.collect({name: p.detach() for group in groups for name, p in group.parameters.items()})
        )

    def collect(self, tensors: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
        """Names and tensors with the parts of all ranks, which all must call this; rank 0 gets every stage's."""
        return tensors.items() if self.ranks is None else self.ranks.collect(tensors)

    @torch.no_grad()
    def values(self, batch: Batch) -> Tensor:
        """What the model says at the batch's targets, in the mode it is in: log-probabilities ``[n]``."""
        return self.token_outputs(batch).logprobs

    def _run(self, batch: Batch, attention: Any = None) -> Any:
        """The outputs of the backbone, or of the whole model when its head cannot be told apart.

        ``attention``: over tokens that are spread over ranks.
        """
        return self._forward(input_ids=batch.input_ids, use_cache=False, **self.inputs_of(batch, attention))

    def inputs_of(self, batch: Batch, attention: Any = None) -> dict[str, Any]:
        """What the backbone is told beside the tokens."""
        inputs: dict[str, Any] = {"position_ids": batch.position_ids}
        if attention is not None:
            inputs["context"] = attention
        elif batch.document_lengths is not None and self._takes_lengths:
            inputs["document_lengths"] = batch.document_lengths
            if batch.document_continues is not None:
                inputs["document_continues"] = batch.document_continues
        return inputs

    def objective_inputs(self, batch: Batch, tokens: TokenOutputs | None = None) -> Any:
        """What the objective reads; ``tokens``: what the model says of the targets, where it has been asked."""
        return self.token_outputs(batch) if tokens is None else tokens

    def token_outputs(self, batch: Batch) -> TokenOutputs:
        """Log-probabilities of the batch's targets, in row-major order."""
        if self.ranks is None:
            return self._token_outputs(batch)
        if self.ranks.pipeline is not None:
            return pipelined_outputs(self, batch)
        return TokenOutputs(*self.ranks.compute(lambda: self._fields(self._token_outputs(batch))))

    @staticmethod
    def _fields(outputs: TokenOutputs) -> tuple[Tensor, Tensor]:
        return outputs.logprobs, outputs.is_argmax

    def _token_outputs(self, batch: Batch) -> TokenOutputs:
        cut = self.ranks.cut(batch) if self.ranks else Shard(batch)
        with self.precision():
            return self.outputs_of(self.states(cut.batch, cut.attention), cut)

    def outputs_of(self, states: Tensor, cut: Shard) -> TokenOutputs:
        """Of the whole batch, by the `states` of this rank's targets."""
        targets = cut.batch.targets[cut.batch.targets != -100]
        outputs = self.of_states(states, targets, cut.batch.temperature)
        if self.ranks is None or self.ranks.context is None:
            return outputs
        return self.ranks.context.gather_outputs(outputs, cut)

    def states(self, batch: Batch, attention: Any = None) -> Tensor:
        """What the head reads of each target, ``[num_targets, size]``; its logits where there is no head apart."""
        outputs = self._run(batch, attention)
        found: Tensor = outputs.last_hidden_state if self._split else outputs.logits
        return found[batch.targets != -100]

    def of_states(self, states: Tensor, targets: Tensor, temperature: float = 1.0) -> TokenOutputs:
        """Log-probabilities of ``targets [num_targets]`` by their `states`, with the adapter that acts now."""
        head: Callable[..., Any] = self._split[1] if self._split else nn.Identity()
        weight = _output_matrix(head)
        if weight is not None:
            states = states if temperature == 1 else states / temperature
            vocabulary = self._vocabulary()
            if vocabulary.group is not None:
                states = enter(states, vocabulary.group, False)
            size = {"chunk_size": self.chunk_size}
            return TokenOutputs(
                *linear_logprobs(states, local(weight), targets, vocabulary=vocabulary, **size)
            )
        if self.has_own_head and self._switch is not None:
            head = self._switch.bound(head)  # it is run again by the backward pass, when others may act
        return TokenOutputs(
            *module_logprobs(states, _tempered(head, temperature), targets, chunk_size=self.chunk_size)
        )

    def _vocabulary(self) -> Vocabulary:
        """Which part of it this rank has an output matrix for."""
        tensor = self.ranks.tensor if self.ranks else None
        return Vocabulary() if tensor is None else tensor.vocabulary

    @property
    def has_own_head(self) -> bool:
        """Whether what comes behind `states` is another function for each adapter."""
        return self._split is not None and isinstance(self._split[1], (LoraLinear, SavedModule))

    @torch.no_grad()
    def token_entropies(self, batch: Batch) -> Tensor:
        """``[num_targets]`` float32: entropies (nats) of the distributions that the batch's targets come from."""
        if self.ranks is None:
            return self._token_entropies(batch)
        (found,) = self.ranks.compute(lambda: (self._token_entropies(batch),))
        return found

    def _token_entropies(self, batch: Batch) -> Tensor:
        cut = self.ranks.cut(batch) if self.ranks else Shard(batch)
        with self.precision():
            head: Callable[..., Any] = self._split[1] if self._split else nn.Identity()
            vocabulary, weight = self._vocabulary(), _output_matrix(head)
            if vocabulary.group is not None and weight is not None:
                head = partial(nn.functional.linear, weight=local(weight))
            parts = [
                entropies(head(part).float() / batch.temperature, vocabulary)
                for part in self.states(cut.batch, cut.attention).split(self.chunk_size)
            ]
        found = torch.cat(parts) if parts else torch.zeros(0, device=self.device)
        return self.of_batch(found, cut)

    def of_batch(self, values: Tensor, cut: Shard) -> Tensor:
        """``[targets, ...]`` of the whole batch, by this rank's part of it."""
        context = self.ranks.context if self.ranks else None
        return values if context is None else context.gather(values, cut)

    @contextlib.contextmanager
    def precision(self) -> Iterator[None]:
        with torch.autocast(self.device.type, self.dtype, enabled=self._autocast):
            yield


def _tempered(head: Callable[..., Any], temperature: float) -> Callable[[Tensor], Tensor]:
    return head if temperature == 1 else lambda hidden: head(hidden) / temperature


def _output_matrix(head: Any) -> Tensor | None:
    """The matrix of a head that is nothing but a matrix product."""
    if isinstance(head, (nn.Linear, SavedModule)) and head.bias is None and not is_quantised_linear(head):
        return head.weight
    return None


def _plain_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Weights used as they are stored. Adapters and saved modules cast themselves and call for no autocast."""
    for name, parameter in model.named_parameters():
        if (parameter.ndim >= 2 or parameter.requires_grad) and not {"lora_A", "lora_B", "copies"} & set(
            name.split(".")
        ):
            yield parameter
