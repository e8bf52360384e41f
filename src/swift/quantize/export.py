"""``swift export``: merge, quantise, compare, and only then let the folder appear.

The steps leave their results in a hidden folder beside the output, each complete or absent: the same command started
again after a kill goes on behind the last of them. One model is in memory at a time; the logits of the original wait on
disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from swift.config.export_rules import METHODS, Method
from swift.config.schema import Resolved
from swift.core.devices import describe_cpu
from swift.core.errors import ConfigError, ModelError, SwiftError
from swift.core.files import atomic_directory, atomic_write_json, free_bytes, remove_partial
from swift.core.format import format_bytes
from swift.evaluate.evaluation import set_threads
from swift.inference.context import InferenceContext, find_context
from swift.inference.engines.vllm_server import check_weights
from swift.models.facts import ModelFacts
from swift.models.quantised import check_loadable, check_packages, stored_method
from swift.quantize.merge import keep_stored_precision, merge, merge_context
from swift.quantize.parity import REPORT_FILE, Limits, ParityReport, kept_tensors, weights_size
from swift.quantize.texts import calibration_rows, held_out_probes, read_template
from swift.runs.lock import FolderLock
from swift.toolchains.toolchain import Toolchain, ToolchainError, find_toolchain

__all__ = ["check_before", "export"]

VLLM_DEADLINE_SECONDS = 900.0


def export(resolved: Resolved, say: Callable[[str], None] = print) -> tuple[Path, ParityReport]:
    """Quantise (or only merge) as the options say; returns the new folder and its report.

    Raises:
        ConfigError: something to add, or to choose otherwise, before anything is loaded.
        SwiftError: the disk is too full, a library failed, or a merged model is not what it should be.
    """
    if resolved.config.quantization.quant_method is None:
        return merge(resolved, say)
    toolchain = check_before(resolved)
    context = find_context(resolved)
    target = _target(resolved, context)
    method = _check_source(resolved, context, target)
    if note := context.note():
        say(note)
    keep_stored_precision(resolved, context.model)
    set_threads(resolved)
    from swift.quantize.layers import kept_layers

    options, trusted = resolved.config.export, resolved.config.model.trust_remote_code
    awq = options.group_size if resolved.config.quantization.quant_method == "awq" else None
    kept = kept_layers(context.model, options.quant_exclude, options.quantize_lm_head, trusted, awq)
    with _work_folder(target, _fingerprint(resolved, context), say) as work:
        flow = _Flow(resolved, context, work, method, toolchain, kept, say)
        report = flow.run(target)
    return target, report


def check_before(resolved: Resolved) -> Toolchain | None:
    """What can be refused before a model is looked for (and perhaps downloaded): programs that are missing."""
    name = resolved.config.quantization.quant_method
    method = METHODS[name or ""]
    if method.toolchain is not None:
        return find_toolchain(method.toolchain)
    check_packages(resolved.config.quantization)
    return None


def _target(resolved: Resolved, context: InferenceContext) -> Path:
    if resolved.is_explicit("output_dir"):
        folder = Path(resolved.config.checkpoint.output_dir).expanduser().absolute()
    else:
        section = resolved.config.quantization
        end = (
            section.quant_method
            if section.quant_method in ("fp8", "w8a8")
            else f"{section.quant_method}-int{section.quant_bits}"
        )
        real = (context.adapter or context.model).resolve()
        folder = real.with_name(f"{real.name}-{end}")
    if folder.exists():
        raise ConfigError(f"{folder} exists already", where="--output_dir", fix="--output_dir NEW_FOLDER")
    return folder


def _check_source(resolved: Resolved, context: InferenceContext, target: Path) -> Method:
    """Refuse what cannot be quantised, by config.json and the disk alone."""
    facts = ModelFacts.read(context.model)
    if (stored := stored_method(facts.config)) is not None and context.adapter is None:
        raise ConfigError(
            f"the model is quantised already ({stored})",
            where=str(context.model),
            fix="name the full-precision model",
        )
    if not context.writes_text:
        raise ModelError(
            "only models that write text can be quantised here",
            where=str(context.adapter or context.model),
            why="what a score head or an embedding loses shows in no logits",
            fix="swift merge-lora, and quantise while loading: --quant_method bnb",
        )
    if resolved.config.export.quantize_lm_head and facts.tie_word_embeddings:
        raise ConfigError(
            "the output head is the embedding, which stays in full precision",
            where="--quantize_lm_head",
            fix="leave it out",
        )
    size = facts.weights_bytes or 0
    logits = resolved.config.export.parity_tokens * facts.vocab_size * 4
    needed = logits + size * (2 if context.adapter is not None else 1)
    if needed > (free := free_bytes(target)):
        raise SwiftError(
            f"about {format_bytes(needed)} are needed on the way, {format_bytes(free)} are free",
            where=str(target),
            fix="--output_dir on another disk, or a smaller --parity_tokens",
        )
    return METHODS[resolved.config.quantization.quant_method or ""]


def _fingerprint(resolved: Resolved, context: InferenceContext) -> str:
    """What the results of the steps depend on."""
    from importlib import metadata

    def state(folder: Path | None) -> list[Any]:
        files = sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.json")) if folder else []
        return [
            str(folder and folder.resolve()),
            [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files],
        ]

    config = resolved.config
    parts = [
        state(context.model), state(context.adapter), config.quantization.model_dump(), config.data.model_dump(),
        context.template.model_dump(), config.model.torch_dtype, config.training.seed,
        config.export.model_dump(include={"group_size", "quant_n_samples", "quant_batch_size", "quant_exclude",
                                          "quantize_lm_head", "parity_dataset", "parity_tokens"}),
        metadata.version("transformers"),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


@contextlib.contextmanager
def _work_folder(target: Path, fingerprint: str, say: Callable[[str], None]) -> Iterator[Path]:
    """The hidden folder beside ``target``, locked; emptied when it belongs to other options, gone when all is done."""
    work = target.with_name(f".{target.name}.export")
    work.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(work)
    try:
        mark = work / "fingerprint"
        known = mark.read_text() if mark.exists() else None
        remove_partial(work)
        steps = [entry for entry in work.iterdir() if entry.name not in (lock.path.name, mark.name)]
        if known != fingerprint:
            for entry in steps:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            if known is not None:
                say(f"options or model have changed since {work.name} was left: starting anew")
            mark.write_text(fingerprint)
        yield work
        shutil.rmtree(work)
    except BaseException as error:
        done = [work / name for name in ("merged", "original", "quantised")]
        if not any(entry.exists() for entry in done):
            shutil.rmtree(work)
        else:
            say(f"what is done so far is in {work}; the same command goes on from there")
        if isinstance(error, (OSError, SafetensorError)):
            raise SwiftError(
                "a file cannot be written or read",
                where=str(getattr(error, "filename", None) or work),
                why=str(error),
                fix="free some space, or --output_dir elsewhere",
            ) from error
        raise
    finally:
        lock.release()


@dataclass
class _Flow:
    """The steps of one export. Each looks for its result in ``work`` first."""

    resolved: Resolved
    context: InferenceContext
    work: Path
    method: Method
    toolchain: Toolchain | None
    kept: Sequence[str]
    say: Callable[[str], None]
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self, target: Path) -> ParityReport:
        from swift.models.compare import compare, stored_logits

        texts = self._texts()
        source = self._source()
        if self.resolved.config.quantization.quant_method == "awq" and self._dtype == "float32":
            self._say("float16", "what AWQ leaves as it is; its layers are not made for float32")
        self._say("quantises", f"{source} to {self.resolved.config.quantization.quant_method}")
        self._logits_of_original(source, texts)
        job = self._job(source, texts["rows"])
        quantised = self._quantise(job)
        found = self._logits_of_result(job, quantised, texts)
        difference = compare(stored_logits(self.work / "original"), found, _probes(texts))
        report = self._report(source, quantised, texts, difference, job)
        report.write(quantised)
        quantised.rename(target)
        return report

    def _say(self, label: str, text: str) -> None:
        self.say(f"{label:<9} {text}")

    @contextlib.contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[step] = round(time.perf_counter() - start, 1)

    def _texts(self) -> dict[str, Any]:
        """Calibration rows and held-out texts as ids, written once."""
        path = self.work / "texts.json"
        if not path.exists():
            template = read_template(self.resolved, self.context)
            rows, rows_from = (
                calibration_rows(self.resolved, self.context, template)
                if self.method.calibrated
                else ([], "")
            )
            probes, probes_from = held_out_probes(self.resolved, self.context, template)
            texts = {
                "rows": rows, "rows_from": rows_from, "probes_from": probes_from,
                "ids": [probe.ids for probe in probes], "labels": [probe.labels for probe in probes],
            }  # fmt: skip
            atomic_write_json(path, texts, indent=None)
        texts = json.loads(path.read_text(encoding="utf-8"))
        if self.method.calibrated:
            tokens = sum(map(len, texts["rows"]))
            self._say("calibrate", f"{len(texts['rows'])} rows, {tokens:,} tokens of {texts['rows_from']}")
        self._say("held out", f"{sum(map(len, texts['ids'])):,} tokens of {texts['probes_from']}")
        return texts

    def _source(self) -> Path:
        """The full-precision model: the one given, or base and adapter merged."""
        if self.context.adapter is None:
            return self.context.model
        merged = self.work / "merged"
        if merged.exists():
            self._say("merged", "before the interruption")
        else:
            with self._timed("merge"):
                merge_context(self.resolved, self.context, merged, self.say)
        return merged

    def _logits_of_original(self, source: Path, texts: dict[str, Any]) -> None:
        from swift.models.compare import model_logits, store_logits

        folder = self.work / "original"
        if folder.exists():
            return
        with self._timed("logits of the original"), atomic_directory(folder) as aside:
            model = self._load(source)
            store_logits(model_logits(model, _probes(texts)), aside)
            del model
            if self._device.startswith("cuda"):
                import torch

                torch.cuda.empty_cache()  # a worker is another process and needs the room

    def _load(self, folder: Path) -> Any:
        import torch

        from swift.models.load import load_model

        model = self.resolved.config.model
        dtype, device = getattr(torch, self._dtype), self._device
        return load_model(folder, dtype=dtype, device=device, trust_remote_code=model.trust_remote_code)

    @property
    def _device(self) -> str:
        from swift.core.devices import pick_device

        return str(pick_device(self.resolved.config.model.device))

    @property
    def _dtype(self) -> str:
        from swift.core.devices import pick_device, pick_dtype

        section = self.resolved.config.model
        return str(pick_dtype(section.torch_dtype, pick_device(section.device))).removeprefix("torch.")

    def _job(self, source: Path, rows: Sequence[Sequence[int]]) -> Any:
        from swift.quantize.methods import Job

        config = self.resolved.config
        scratch = self.work / "scratch"
        scratch.mkdir(exist_ok=True)
        options = config.export
        return Job(
            source=source,
            section=config.quantization,
            rows=rows,
            kept=self.kept,
            dtype=self._dtype,
            device=self._device,
            group_size=options.group_size,
            batch_size=options.quant_batch_size,
            lm_head=options.quantize_lm_head,
            scratch=scratch,
            trust_remote_code=config.model.trust_remote_code,
            num_threads=config.training.num_threads,
            toolchain=self.toolchain,
        )

    def _quantise(self, job: Any) -> Path:
        """Weights, config, tokenizer and templates, in a folder that is complete or absent."""
        from swift.quantize.methods import quantise

        folder = self.work / "quantised"
        if folder.exists():
            self._say("quantised", "before the interruption")
            return folder
        with self._timed("quantise"), atomic_directory(folder) as aside:
            done = quantise(job, aside)
            _copy_companions(job.source, aside)
            self._store_tokenizer(aside)
            atomic_write_json(self.work / "done.json", done)
        return folder

    def _store_tokenizer(self, folder: Path) -> None:
        template = read_template(self.resolved, self.context)
        if self.context.template.chat_template is not None and template.chat is not None:
            template.tokenizer.chat_template = template.chat.source
        template.tokenizer.save_pretrained(folder)

    def _logits_of_result(self, job: Any, folder: Path, texts: dict[str, Any]) -> Any:
        """From the library that made the folder: only that rounds activations as well, where the method does."""
        from swift.models.compare import model_logits, stored_logits
        from swift.quantize.methods import run_worker

        if job.toolchain is None:
            return model_logits(self._load(folder), _probes(texts))
        output = self.work / "result"
        if not output.exists():
            loader = "gptqmodel" if job.toolchain.name == "gptqmodel" else "transformers"
            with self._timed("logits of the result"), atomic_directory(output) as aside:
                payload = {
                    "model": str(folder),
                    "probes": texts["ids"],
                    "output": str(aside),
                    "loader": loader,
                }
                run_worker(job, "forward.py", payload)
        return stored_logits(output)

    def _report(
        self, source: Path, folder: Path, texts: dict[str, Any], difference: Any, job: Any
    ) -> ParityReport:
        section, options = self.resolved.config.quantization, self.resolved.config.export
        name = section.quant_method or ""
        limits = Limits.of(self.resolved, self.method.max_perplexity_increase[section.quant_bits or 4])
        broken = limits.broken(difference)
        loads = self._loads(job, folder, texts)
        if options.output_format == "vllm":
            from swift.quantize.methods import check_for_vllm

            broken += check_for_vllm(folder)
            if loads["vllm"].startswith("no: "):
                broken.append(f"vLLM does not load it: {loads['vllm'].removeprefix('no: ')}")
        settings: dict[str, Any] = {"bits": section.quant_bits}
        if name == "bnb" and section.quant_bits == 4:
            settings |= {
                "type": section.bnb_4bit_quant_type,
                "double_quant": section.bnb_4bit_use_double_quant,
            }
        if self.method.grouped:
            settings["group_size"] = options.group_size
        if self.method.calibrated:
            settings |= {"rows": len(texts["rows"]), "calibration": texts["rows_from"]}
        merged = source / REPORT_FILE if self.context.adapter is not None else None
        done = json.loads((self.work / "done.json").read_text(encoding="utf-8"))
        settings |= {key: done[key] for key in ("peak_bytes", "resumable") if key in done}
        return ParityReport(
            method=name,
            settings=settings,
            original=f"{self.context.model} + {self.context.adapter}" if merged else str(source),
            text=texts["probes_from"],
            difference=difference,
            bytes_before=weights_size(source),
            bytes_after=weights_size(folder),
            kept=kept_tensors(source, folder),
            loads=loads,
            limits=limits,
            broken=broken,
            merge=json.loads(merged.read_text(encoding="utf-8"))["difference"] if merged else None,
            seconds=self.seconds,
        )

    def _loads(self, job: Any, folder: Path, texts: dict[str, Any]) -> dict[str, str]:
        """Load tests in the engines that are installed."""
        loads = {}
        if job.toolchain is not None:
            loads[f"toolchain {job.toolchain.name}"] = "yes"
        loads["transformers"] = "yes" if job.toolchain is None else self._load_here(folder)
        loads["vllm"] = self._load_in_vllm(folder, texts["ids"][0])
        return loads

    def _load_here(self, folder: Path) -> str:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        try:
            check_loadable(
                config, self._device.partition(":")[0], type(self.resolved.config.quantization)(), str(folder)
            )
        except ModelError as error:
            return f"not tried: {error.message} ({error.fix})"
        try:
            self._load(folder)
        except ModelError as error:
            return f"no: {error.message}; {error.why}"
        return "yes"

    def _load_in_vllm(self, folder: Path, ids: list[int]) -> str:
        if not self.method.vllm:
            return f"not tried: vLLM does not load {self.method.stored_as}"
        try:
            toolchain = find_toolchain("vllm")
        except ToolchainError as error:
            return f"not tried: {error.message} ({error.fix})"
        if toolchain.variant == "cpu":
            try:
                check_weights(folder, describe_cpu()["features"])
            except ModelError as error:
                return f"not tried: {error.message} ({error.why})"
        worker = Path(__file__).with_name("workers") / "vllm_load.py"
        payload = {"model": str(folder), "ids": ids[:16], "bytes": weights_size(folder)}
        try:
            toolchain.run(
                worker,
                payload,
                deadline_seconds=VLLM_DEADLINE_SECONDS,
                stage="loading in vLLM",
                log=self.work / "vllm.log",
            )
        except ToolchainError as error:
            return f"no: {_reason(error)}"
        return "yes"


def _reason(error: ToolchainError) -> str:
    """The message, and the last line of the cause that names an error (the others are a traceback)."""
    named = [line.strip() for line in (error.why or "").splitlines() if "Error:" in line]
    return f"{error.message}; {named[-1]}" if named and named[-1] not in error.message else error.message


def _probes(texts: dict[str, Any]) -> list[Any]:
    from swift.models.compare import Probe

    return [Probe(ids, labels) for ids, labels in zip(texts["ids"], texts["labels"], strict=True)]


def _copy_companions(source: Path, folder: Path) -> None:
    """Generation settings and Python code that belong to the model."""
    for file in [source / "generation_config.json", *source.glob("*.py")]:
        if file.is_file() and not (folder / file.name).exists():
            shutil.copy2(file, folder / file.name)
