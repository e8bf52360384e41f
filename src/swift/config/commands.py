"""The one table of commands: which options a command takes, and where it stands.

It stands here and not in ``cli/`` because binding, help, completion and reference all read it; what runs a command
is named by a string and imported only when the command runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from swift.config.schema import SECTIONS, Option, options
from swift.config.sections.rlhf import LATER_TYPES, POLICY_TYPES, PREFERENCE_TYPES

__all__ = ["COMMANDS", "LATER_COMMANDS", "TRAIN_TYPES", "Command", "known_command"]


@dataclass(frozen=True)
class Command:
    """One command.

    Args:
        name: the word after ``swift``.
        help: one line.
        sections: sections whose options it takes.
        extra: single options from other sections.
        without: options of those sections that it does not take.
        required: groups of options; one of each group must be set.
        switches: words that choose how the command runs, not values of the run: name -> help.
        usage: what follows ``swift NAME`` in help.
        own_arguments: True when the command reads its words with a parser of its own.
        runs: the function ``run(argv) -> int`` of the command, as ``module:function`` under ``swift.cli``; by
            default ``run`` of the module of its name.
        instead: for a command that comes with a later version, and until then is planned only: what to do instead.
    """

    name: str
    help: str
    sections: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    required: tuple[tuple[str, ...], ...] = ()
    switches: dict[str, str] = field(default_factory=dict)
    usage: str = "[FILE.yaml ...] [--option value ...]"
    own_arguments: bool = False
    runs: str = ""
    instead: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "runs", self.runs or f"{self.name.replace('-', '_')}:run")

    def options(self) -> dict[str, Option]:
        """The options this command takes, in the order of the sections."""
        wanted = set(self.extra)
        for section in self.sections:
            wanted.update(SECTIONS[section].model_fields)
        wanted.difference_update(self.without)
        return {name: option for name, option in options().items() if name in wanted}


def _own(name: str, help: str, usage: str, runs: str = "") -> Command:
    """A command that reads its words with a parser of its own."""
    return Command(name, help, usage=usage, own_arguments=True, runs=runs)


_TRAINING = (
    "model",
    "data",
    "template",
    "tuner",
    "quantization",
    "training",
    "optimizer",
    "parallel",
    "checkpoint",
    "evaluation",
    "report",
)
_TRAINING_NEEDS = (("model", "resume_from_checkpoint"), ("dataset", "resume_from_checkpoint"))
_DRY_RUN = {
    "dry_run": "Show what the run will do and cost, then stop (the same as swift plan).",
    "json": "With dry_run: print the plan as one JSON object.",
}

_READING = (
    "columns",
    "on_bad_rows",
    "model_name",
    "model_author",
    "dataset_num_proc",
    "load_from_cache_file",
)
"""How the rows of data files are read."""

_OF_FULL_TRAINING = ("qat_bits", "qat_activation_bits", "qat_group_size", "fp8")

COMMANDS: dict[str, Command] = {
    command.name: command
    for command in (
        Command(
            "pt",
            "Pre-train on plain text.",
            sections=_TRAINING,
            required=_TRAINING_NEEDS,
            switches=_DRY_RUN,
            runs="training:pt",
        ),
        Command(
            "sft",
            "Fine-tune: answer, classify, rank, embed.",
            sections=(*_TRAINING, "task"),
            required=_TRAINING_NEEDS,
            switches=_DRY_RUN,
            runs="training:sft",
        ),
        Command(
            "rlhf",
            "Learn from preferences (dpo, kto, orpo...) or from rewards (grpo, dapo...), or train a reward model (rm).",
            sections=(*_TRAINING, "rlhf", "policy", "generation"),
            extra=("task_type", "num_labels", "max_num_seqs", "max_cache_tokens", "memory_utilization"),
            required=_TRAINING_NEEDS,
            switches=_DRY_RUN,
            runs="training:rlhf",
        ),
        _own(
            "fit",
            "Train; train_type says for what: sft (default), pt, or the name of a method.",
            "[--train_type sft] [FILE.yaml ...] [--option value ...]",
        ),
        Command(
            "infer",
            "Chat with a model, or answer the rows of a file.",
            sections=("model", "template", "quantization", "generation", "engine", "vllm"),
            extra=(
                "val_dataset",
                "columns",
                "on_bad_rows",
                "model_name",
                "model_author",
                "seed",
                "num_threads",
            ),
            without=("param_dtype", *_OF_FULL_TRAINING),
            required=(("model", "adapters"),),
        ),
        Command(
            "deploy",
            "Serve a model and adapters on it, as OpenAI's API does.",
            sections=("model", "template", "quantization", "generation", "engine", "vllm", "serving"),
            extra=("num_threads",),
            without=(
                "param_dtype",
                "stream",
                "result_path",
                "metric",
                "metric_args",
                "num_samples",
                *_OF_FULL_TRAINING,
            ),
            required=(("model", "adapters"),),
        ),
        Command(
            "eval",
            "Measure a model on data of yours or on benchmarks; show and compare results.",
            sections=("model", "template", "quantization", "generation", "engine", "vllm", "suite"),
            extra=(
                "val_dataset",
                "columns",
                "on_bad_rows",
                "model_name",
                "model_author",
                "seed",
                "num_threads",
                "eval_tasks",
            ),
            without=("param_dtype", "stream", "result_path", *_OF_FULL_TRAINING),
            required=(("model", "adapters", "eval_url"), ("val_dataset", "eval_tasks", "eval_dataset")),
            usage="[FILE.yaml ...] [--option value ...] | show RESULTS | compare A B",
        ),
        Command(
            "merge-lora",
            "Merge an adapter into its model and check the result.",
            extra=(
                "model",
                "model_revision",
                "use_hf",
                "hub_token",
                "adapters",
                "torch_dtype",
                "device",
                "trust_remote_code",
                "output_dir",
                "num_threads",
                "parity_dataset",
                "parity_tokens",
                "max_perplexity_increase",
                "max_kl",
                "min_agreement",
                *_READING,
            ),
            required=(("adapters",),),
        ),
        Command(
            "export",
            "Quantise a model (an adapter is merged first), and report what that costs.",
            sections=("model", "quantization", "template", "export"),
            extra=("dataset", "max_length", "output_dir", "seed", "num_threads", *_READING),
            without=("param_dtype", "attn_impl", *_OF_FULL_TRAINING),
            required=(("model", "adapters"),),
            switches=_DRY_RUN,
        ),
        _own(
            "plan",
            "Show what a command will do and cost, without doing it.",
            "COMMAND [FILE.yaml ...] [--option value ...] [--exact] [--solve] [--device_memory 24GiB] [--json]",
        ),
        _own(
            "data",
            "Look at data as the model sees it, check it, list known data sets, tokenise ahead.",
            "{ls,show,check,build-cache} [...]",
        ),
        _own(
            "models",
            "Short names of models; tiny models of any architecture; what trains here.",
            "{ls,show,tiny,verify} [...]",
        ),
        _own(
            "config",
            "Show resolved options, spellings, schema, reference, shell completion.",
            "{show,alias,schema,reference,completion} [...]",
        ),
        _own(
            "download",
            "Fetch a model or data set from a hub, checked, or check what is here.",
            "OWNER/NAME [--use_hf true] [--local_dir FOLDER] [--verify] [...]",
        ),
        _own("doctor", "Report devices, versions and what is missing for what.", "[--json]"),
        _own(
            "toolchain",
            "Install, list, test and delete environments of vLLM, GPTQModel, EvalScope...",
            "{install,ls,doctor,rm} [...]",
        ),
        _own("demo", "Train a tiny model here and now, and watch it learn.", "[...]"),
        _own("resume", "Go on with an interrupted run, or with a paused job.", "RUN|ID [...]"),
        _own(
            "run",
            "Run a file of experiments and follow it.",
            "FILE.yaml [--inline] [--wait] [--cold] [--new] [--fuse auto|always|never]",
        ),
        _own("fuse", "Train several LoRA runs at once on one base model, in this process.", "FILE.yaml ..."),
        _own("submit", "Queue experiments or one command, and return.", "FILE.yaml | -- COMMAND [...]"),
        _own("ps", "List jobs; with --why, explain one.", "[ID|NAME ...] [--all] [--json] [--why ID]"),
        _own("top", "Watch jobs: step, loss, speed, time to go, devices.", "[--once] [--json]"),
        _own("logs", "Show what a job printed.", "ID [-f] [-n LINES]"),
        _own(
            "stop",
            "Cancel jobs (running ones save a checkpoint).",
            "ID|NAME ... [--grace SECONDS]",
            runs="jobs:stop",
        ),
        _own(
            "pause",
            "Checkpoint jobs and set them aside until swift resume.",
            "ID|NAME ...",
            runs="jobs:pause",
        ),
        _own("retry", "Queue failed or cancelled jobs again.", "ID|NAME ...", runs="jobs:retry"),
        _own("clone", "Queue a copy of a job.", "ID [--name NAME]"),
        _own(
            "service",
            "Start, stop or look at the process that runs the queue.",
            "{start,stop,status,run} [--json]",
        ),
        _own(
            "rollouts",
            "Look at the answers that reinforcement learning sampled, and at their rewards.",
            "show RUN [--step N] [--worst N | --best N | --group N] [--steps] [--tokens] [--json]",
        ),
        _own(
            "compare",
            "Experiments side by side: losses, evaluation, cost, and which one won.",
            "[ID|NAME|FOLDER ...] [--metric M] [--json|--csv]",
        ),
        _own(
            "report",
            "The comparison as one HTML file: curves, parameters, answers.",
            "[NAME] [--output FILE.html]",
        ),
    )
}

_ANSWERING = ("model", "quantization", "data", "template", "generation")
_MODEL_NEEDS = (("model", "adapters"),)

LATER_COMMANDS: dict[str, Command] = {
    command.name: command
    for command in (
        *(
            Command(
                name,
                text,
                sections=_ANSWERING,
                extra=("output_dir", "tensor_parallel_size", "pipeline_parallel_size", "seed"),
                required=_MODEL_NEEDS,
                instead=instead,
            )
            for name, text, instead in (
                ("app", "Serve a model with a web page.", "use swift deploy"),
                ("rollout", "Serve samples for reinforcement learning.", "use swift infer"),
                ("sample", "Rejection sampling.", "use swift infer"),
            )
        ),
        Command("web-ui", "The web page.", instead="use the command line"),
    )
}
"""Commands of the articles and of ms-swift that this version does not have. Their options are read and planned as far
as they are known; running them is refused."""

TRAIN_TYPES: dict[str, str] = {
    "sft": "sft",
    "pt": "pt",
    "pretrain": "pt",
    **dict.fromkeys(
        ("rlhf", *PREFERENCE_TYPES, *POLICY_TYPES, *LATER_TYPES),
        "rlhf",
    ),
}
"""Words of ``train_type`` that say what is trained for, and so which command is meant; the others name a tuner."""


def known_command(name: str) -> Command | None:
    """The command of this name, also one that can only be planned yet."""
    return COMMANDS.get(name) or LATER_COMMANDS.get(name)
