"""The one table of options: sections, their fields, and what a resolved configuration is."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any, cast

from pydantic import ConfigDict, Field
from pydantic.fields import FieldInfo

from swift.config.kinds import Kind, kind_of
from swift.config.option import Section
from swift.config.sections.checkpoint import CheckpointSection
from swift.config.sections.data import DataSection
from swift.config.sections.engine import EngineSection
from swift.config.sections.evaluation import EvaluationSection
from swift.config.sections.export import ExportSection
from swift.config.sections.generation import GenerationSection
from swift.config.sections.model import ModelSection
from swift.config.sections.optimizer import OptimizerSection
from swift.config.sections.parallel import ParallelSection
from swift.config.sections.policy import PolicySection
from swift.config.sections.quantization import QuantizationSection
from swift.config.sections.report import ReportSection
from swift.config.sections.rlhf import RlhfSection
from swift.config.sections.serving import ServingSection
from swift.config.sections.suite import SuiteSection
from swift.config.sections.task import TaskSection
from swift.config.sections.template import TemplateSection
from swift.config.sections.training import TrainingSection
from swift.config.sections.tuner import TunerSection
from swift.config.sections.vllm import VllmSection
from swift.core.errors import ConfigError

__all__ = ["SECTIONS", "Config", "Option", "Resolved", "Source", "options"]


class Config(Section):
    """All sections. Read values as ``config.training.learning_rate``."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, defer_build=True)

    model: ModelSection = Field(default_factory=ModelSection)
    data: DataSection = Field(default_factory=DataSection)
    task: TaskSection = Field(default_factory=TaskSection)
    rlhf: RlhfSection = Field(default_factory=RlhfSection)
    policy: PolicySection = Field(default_factory=PolicySection)
    template: TemplateSection = Field(default_factory=TemplateSection)
    tuner: TunerSection = Field(default_factory=TunerSection)
    quantization: QuantizationSection = Field(default_factory=QuantizationSection)
    training: TrainingSection = Field(default_factory=TrainingSection)
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection)
    parallel: ParallelSection = Field(default_factory=ParallelSection)
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection)
    report: ReportSection = Field(default_factory=ReportSection)
    generation: GenerationSection = Field(default_factory=GenerationSection)
    suite: SuiteSection = Field(default_factory=SuiteSection)
    engine: EngineSection = Field(default_factory=EngineSection)
    export: ExportSection = Field(default_factory=ExportSection)
    serving: ServingSection = Field(default_factory=ServingSection)
    vllm: VllmSection = Field(default_factory=VllmSection)


SECTIONS: dict[str, type[Section]] = {
    name: cast(type[Section], info.annotation) for name, info in Config.model_fields.items()
}


@dataclass(frozen=True)
class Option:
    """One row of the table. ``name`` is the flat name (unique over all sections)."""

    name: str
    section: str
    info: FieldInfo

    @property
    def help(self) -> str:
        return self.info.description or ""

    @property
    def default(self) -> Any:
        return self.info.get_default(call_default_factory=True)

    @property
    def unit(self) -> str | None:
        return self._extra.get("unit")

    @property
    def essential(self) -> bool:
        return bool(self._extra.get("essential"))

    @property
    def kind(self) -> Kind:
        """What its values look like."""
        return kind_of(self.info.annotation)

    @property
    def _extra(self) -> dict[str, Any]:
        extra = self.info.json_schema_extra
        return extra if isinstance(extra, dict) else {}


@cache
def options() -> dict[str, Option]:
    """Flat name -> option, in the order of the sections. Raises ValueError when two sections share a name."""
    table: dict[str, Option] = {}
    for section, model in SECTIONS.items():
        for name, info in model.model_fields.items():
            if name in table:
                raise ValueError(f"option {name!r} stands in {table[name].section} and in {section}")
            table[name] = Option(name, section, info)
    return table


@dataclass(frozen=True)
class Source:
    """Where a value comes from.

    ``kind`` is flag, file, python (the user set it), default, derived, or recorded (it stands in the
    config.yaml of a run, but nobody typed it: a default or derived value of that run).
    """

    kind: str
    detail: str = ""

    def __str__(self) -> str:
        return self.detail or self.kind


@dataclass
class Resolved:
    """A configuration whose every value knows its source.

    Attributes:
        command: ``sft``, ``pt``, ``infer``...
        config: all values, derived ones filled in.
        sources: flat option name -> source, for every option.
        warnings: sentences the user should read.
        switches: words that choose how the command runs (``dry_run``, ``json``), those that are on.
        environment: variables that the configuration's ``ENV`` asks for, with the values now in force.
        files: the configuration files read, as the user wrote them.
        planning: what a run refuses is only told (`refuse`).
    """

    command: str
    config: Config
    sources: dict[str, Source]
    warnings: list[str] = field(default_factory=list)
    switches: frozenset[str] = frozenset()
    environment: dict[str, str] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    planning: bool = False

    def value(self, name: str) -> Any:
        """The value of an option by its flat name."""
        return getattr(getattr(self.config, options()[name].section), name)

    def put(self, name: str, value: Any, source: Source) -> None:
        """Give an option a value, and say where it comes from. Raises ValidationError for one it cannot have."""
        setattr(getattr(self.config, options()[name].section), name, value)
        self.sources[name] = source

    def is_explicit(self, name: str) -> bool:
        """True when the user set this option (flag, file or Python)."""
        return self.sources[name].kind in ("flag", "file", "python")

    def place(self, name: str) -> str:
        """How the user finds an option: the flag as typed, ``run.yaml:3: name``, or its name; other words stay."""
        source = self.sources.get(name)
        if source is None or source.kind == "flag":
            return source.detail if source else name
        return f"{source.detail}: {name}" if source.kind == "file" else f"--{name}"

    def error(
        self, name: str, message: str, *, why: str | None = None, fix: str | None = None
    ) -> ConfigError:
        """The error about the value of an option, where the user set it."""
        return ConfigError(message, where=self.place(name), why=why, fix=fix)

    def refuse(self, name: str, message: str, *, why: str | None = None, fix: str | None = None) -> None:
        """Raise the `error`; a plan only warns of it."""
        if not self.planning:
            raise self.error(name, message, why=why, fix=fix)
        self.warnings.append(
            f"{self.place(name)}: {message}; a run refuses it" + (f" ({fix})" if fix else "")
        )

    def derive(self, name: str, value: Any, because: str) -> None:
        """Fill an option that nobody set, and remember why. An option with a value is left alone."""
        if self.value(name) is None:
            self.put(name, value, Source("derived", f"derived from {because}"))
