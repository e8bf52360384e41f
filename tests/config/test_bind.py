"""Binding: every spelling, precedence, sources, lines of files, exact messages."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from swift.config.bind import resolve
from swift.config.schema import Resolved
from swift.core.errors import SwiftError

NEEDED = ("--model", "m", "--dataset", "d.jsonl")


def sft(*words: str, **keywords: bool) -> Resolved:
    return resolve("sft", [*NEEDED, *words], **keywords)


def message(command: str, *words: str, **keywords: bool) -> str:
    """The text a user sees; every usage error must exit with 2 and fit in two lines."""
    with pytest.raises(SwiftError) as caught:
        resolve(command, words, **keywords)
    assert caught.value.exit_code == 2
    text = caught.value.render()
    assert len(text.splitlines()) <= 2
    return text


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Write a file into the working directory and return its name."""
    monkeypatch.chdir(tmp_path)

    def write_file(name: str, text: str) -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return name

    return write_file


@pytest.mark.parametrize(
    "words",
    [
        ["--lora_rank", "16"],
        ["--lora_rank=16"],
        ["--lora-rank", "16"],
        ["--lora-rank=16"],
        ["--tuner.lora_rank", "16"],
        ["--tuner.lora-rank=16"],
        ["--lora_r", "16"],
        ["--lora_rank", "4", "--lora_rank", "16"],
    ],
)
def test_spellings_of_a_number(words: list[str]) -> None:
    resolved = sft(*words)
    assert resolved.config.tuner.lora_rank == 16
    assert resolved.sources["lora_rank"].kind == "flag"
    assert str(resolved.sources["lora_rank"]) == words[-1 if "=" in words[-1] else -2].partition("=")[0]


@pytest.mark.parametrize(
    ("words", "tuner"),
    [
        (["--use_lora", "True"], "lora"),
        (["--use_lora"], "lora"),
        (["--use-lora=true"], "lora"),
        (["--no_use_lora"], "full"),
        (["--no-use-lora"], "full"),
        (["--use_lora", "False"], "full"),
        (["--use_lora=0"], "full"),
    ],
)
def test_spellings_of_use_lora(words: list[str], tuner: str) -> None:
    resolved = sft(*words)
    assert resolved.config.tuner.tuner_type == tuner
    assert resolved.is_explicit("tuner_type")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--packing"], True),
        (["--packing", "true"], True),
        (["--packing=yes"], True),
        (["--packing", "False"], False),
        (["--no_packing"], False),
        (["--no-packing"], False),
        (["--no_packing", "false"], True),
        (["--data.packing", "on"], True),
    ],
)
def test_spellings_of_a_switch(words: list[str], expected: bool) -> None:
    assert sft(*words).config.data.packing is expected


@pytest.mark.parametrize(
    "words",
    [
        ["--dataset", "a.jsonl", "b.jsonl#500"],
        ["--dataset", "a.jsonl", "--dataset", "b.jsonl#500"],
        ["--dataset", '["a.jsonl", "b.jsonl#500"]'],
        ['--dataset=["a.jsonl", "b.jsonl#500"]'],
        ["--data.dataset", "a.jsonl", "b.jsonl#500"],
    ],
)
def test_spellings_of_a_list(words: list[str]) -> None:
    assert resolve("sft", ["--model", "m", *words]).config.data.dataset == ["a.jsonl", "b.jsonl#500"]


def test_values_of_all_kinds() -> None:
    resolved = sft(
        "--columns",
        '{"q": "query"}',
        "--max_steps",
        "-1",
        "--learning_rate",
        "2e-4",
        "--system",
        "-x",
        "--run_name",
        "no",
    )
    assert resolved.config.data.columns == {"q": "query"}
    assert resolved.config.training.max_steps == -1
    assert resolved.config.training.learning_rate == 2e-4
    assert resolved.config.template.system == "-x"
    assert resolved.config.checkpoint.run_name == "no"


@pytest.mark.parametrize("word", ["none", "null", "None"])
def test_none_takes_a_value_back(word: str, write) -> None:
    name = write("run.yaml", "learning_rate: 0.5\nwarmup_steps: 7\n")
    resolved = resolve("sft", [name, *NEEDED, "--learning_rate", word, "--warmup_steps", word])
    assert resolved.config.training.warmup_steps is None
    assert resolved.config.training.learning_rate == 1e-4
    assert str(resolved.sources["learning_rate"]) == "derived from tuner_type"
    assert resolved.sources["warmup_steps"].kind == "default"


@pytest.mark.parametrize(
    "text",
    [
        "lora_rank: 16\n",
        "lora-rank: 16\n",
        "tuner.lora_rank: 16\n",
        "tuner: {lora_rank: 16}\n",
        "tuner:\n  lora-rank: 16\n",
        "lora: {lora_r: 16}\n",
        "lora_rank: '16'\n",
    ],
)
def test_flat_dotted_and_nested_keys_are_the_same_option(text: str, write) -> None:
    resolved = resolve("sft", [write("run.yaml", text), *NEEDED])
    assert resolved.config.tuner.lora_rank == 16
    assert resolved.sources["lora_rank"].kind == "file"


def test_a_section_and_an_option_may_share_a_name(write) -> None:
    flat = write("flat.yaml", "model: path\n")
    nested = write("nested.yaml", "model:\n  model: path\n  device: cpu\n")
    for name in (flat, nested):
        assert resolve("sft", [name, "--dataset", "d"]).config.model.model == "path"
    assert str(resolve("sft", [nested, "--dataset", "d"]).sources["device"]) == "nested.yaml:3"


def test_later_files_win_and_flags_win_over_files(write) -> None:
    first = write("first.yaml", "lora_rank: 4\nseed: 1\nmax_steps: 5\nepochs: 2\n")
    second = write("second.json", '{"lora_rank": 8,\n\t"training": {\n"seed":\t2}}')
    resolved = resolve(
        "sft", [first, second, *NEEDED, "--lora_rank", "16"], values={"max_steps": 7, "save_steps": 3}
    )
    assert resolved.config.tuner.lora_rank == 16
    assert resolved.config.training.seed == 2
    assert resolved.config.training.max_steps == 7
    described = {
        name: str(resolved.sources[name]) for name in ("lora_rank", "seed", "max_steps", "num_train_epochs")
    }
    assert described == {
        "lora_rank": "--lora_rank",
        "seed": "second.json:3",
        "max_steps": "python",
        "num_train_epochs": "first.yaml:4",
    }
    assert str(resolved.sources["save_steps"]) == "python"
    assert str(resolved.sources["lora_alpha"]) == "default"
    assert resolved.files == ["first.yaml", "second.json"]


def test_files_may_stand_between_flags(write) -> None:
    name = write("run.yaml", "lora_rank: 4\n")
    assert resolve("sft", ["--packing", name, *NEEDED]).config.tuner.lora_rank == 4


def test_a_later_list_replaces_an_earlier_one(write) -> None:
    name = write("run.yaml", "dataset: [a, b]\n")
    assert resolve("sft", [name, "--model", "m", "--dataset", "c"]).config.data.dataset == ["c"]
    assert resolve("sft", [write("one.yaml", "dataset: a\n"), "--model", "m"]).config.data.dataset == ["a"]


def test_unquoted_yaml_words_stay_words(write) -> None:
    name = write(
        "run.yaml", "save_strategy: no\nrun_name: 2024\nlearning_rate: 1e-4\nmodules_to_save: [1, on]\n"
    )
    config = resolve("sft", [name, *NEEDED]).config
    assert config.checkpoint.save_strategy == "no"
    assert config.checkpoint.run_name == "2024"
    assert config.training.learning_rate == 1e-4
    assert config.tuner.modules_to_save == ["1", "on"]


def test_json_unicode_and_yaml_anchors(write) -> None:
    name = write("run.json", '{"system": "\\ud83d\\ude00 \\u4f60"}')
    assert resolve("sft", [name, *NEEDED]).config.template.system == "\U0001f600 你"
    merged = write("merge.yaml", "tuner: &base {lora_rank: 4, lora_alpha: 8}\nlora:\n  <<: *base\n")
    assert resolve("sft", [merged, *NEEDED]).config.tuner.lora_alpha == 8


def test_python_values_are_bound_like_a_file(tmp_path: Path) -> None:
    values = {
        "model": tmp_path,
        "data": {"dataset": [tmp_path / "a.jsonl"]},
        "tuner.lora_rank": 4,
        "use_lora": True,
    }
    resolved = resolve("sft", values=values)
    assert resolved.config.model.model == str(tmp_path)
    assert resolved.config.data.dataset == [str(tmp_path / "a.jsonl")]
    assert resolved.config.tuner.lora_rank == 4
    assert resolved.is_explicit("tuner_type")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--lora_rnk", "3"), "--lora_rnk: unknown option\n  fix: did you mean --lora_rank?"),
        (("--lora_ran", "3"), "--lora_ran: unknown option\n  fix: did you mean --lora_rank?"),
        (
            ("--tunr.lora_rank", "3"),
            "--tunr.lora_rank: no section 'tunr'\n  fix: did you mean --tuner.lora_rank?",
        ),
        (
            ("--data.lora_rank", "3"),
            "--data.lora_rank: is in section tuner, not in data\n  fix: write --tuner.lora_rank",
        ),
        (("--tuner", "3"), "--tuner: is a section, not an option\n  fix: write --tuner.NAME"),
        (("--lora_rank",), "--lora_rank: needs a value"),
        (("--lora_rank", "--packing"), "--lora_rank: needs a value"),
        (("--lora_rank", "x"), "--lora_rank: 'x' is not an integer"),
        (("--lora_rank", "1.5"), "--lora_rank: '1.5' is not an integer"),
        (("--lora_rank", "0"), "--lora_rank: must be at least 1, not 0"),
        (("--learning_rate", "0"), "--learning_rate: must be more than 0, not 0.0"),
        (("--learning_rate", "nan"), "--learning_rate: 'nan' is not a number"),
        (("--split_dataset_ratio", "1"), "--split_dataset_ratio: must be less than 1, not 1.0"),
        (("--warmup_ratio", "1.5"), "--warmup_ratio: must be at most 1, not 1.5"),
        (("--lora_rank", "8", "16"), "'16': one word too many after --lora_rank"),
        (("--packing=maybe",), "--packing: 'maybe' is not true or false"),
        (
            ("--save_strategy", "stepps"),
            "--save_strategy: 'stepps' is not one of steps, epoch, no\n  fix: did you mean steps?",
        ),
        (
            ("--columns", "{x"),
            "--columns: '{x' is not a JSON object: Expecting property name enclosed in double quotes",
        ),
        (
            ("--use_lora", "--tuner_type", "full"),
            "--tuner_type: contradicts --use_lora\n  cause: both set tuner_type: full and lora",
        ),
        (
            ("--bf16", "--fp16"),
            "--fp16: contradicts --bf16\n  cause: both set torch_dtype: float16 and bfloat16",
        ),
        (
            ("--lr", "1", "--learning_rate", "2"),
            "--learning_rate: contradicts --lr\n  cause: both set learning_rate: 2.0 and 1.0",
        ),
        (
            ("--temperature", "1"),
            "--temperature: not used by swift sft\n"
            "  fix: leave it out (temperature is an option of rlhf, infer, deploy, eval)",
        ),
    ],
)
def test_messages_of_flags(words: tuple[str, ...], expected: str) -> None:
    assert message("sft", *NEEDED, *words) == expected


def test_a_stray_word() -> None:
    assert message("sft", "alpaca") == (
        "'alpaca': neither a flag nor a configuration file\n"
        "  fix: flags start with --, configuration files end in .yaml, .yml or .json"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: m\nlora_rnk: 3\n", "run.yaml:2: lora_rnk: unknown option\n  fix: did you mean lora_rank?"),
        (
            "tuner:\n  lora_rank: 8\n  lora_alpa: 3\n",
            "run.yaml:3: tuner.lora_alpa: unknown option\n  fix: did you mean lora_alpha?",
        ),
        ("\n\nlora_rank: abc\n", "run.yaml:3: lora_rank: 'abc' is not an integer"),
        ("lora_rank: true\n", "run.yaml:1: lora_rank: True is not an integer"),
        ("lora_rank: [1, 2]\n", "run.yaml:1: lora_rank: takes one value, not 2"),
        (
            "lora_rank:\n",
            "run.yaml:1: lora_rank: has no value\n  fix: give one, or leave it out for the default",
        ),
        ("dataset: {a: 1}\n", "run.yaml:1: dataset: needs a list"),
        ("columns: 3\n", "run.yaml:1: columns: '3' is not a JSON object"),
        ("seed: 1\nseed: 2\n", "run.yaml:2: seed is set twice (first in line 1)"),
        (
            "lr: 1\nlearning_rate: 2\n",
            "run.yaml:2: learning_rate: contradicts run.yaml:1: lr\n  cause: both set learning_rate: 2.0 and 1.0",
        ),
        (
            "lora_rank: 4\ntuner:\n  lora-rank: 8\n",
            "run.yaml:3: tuner.lora-rank: contradicts run.yaml:1: lora_rank\n"
            "  cause: both set lora_rank: 8 and 4",
        ),
        ("a: &a [*a]\n", "run.yaml: is nested without end"),
        ("- a\n", "run.yaml:1: is not a mapping of options"),
        ("a: [1\nb: 2\n", "run.yaml:2: is not valid YAML: expected ',' or ']', but got ':'"),
        ("command: pt\n", "run.yaml:1: command: this file is for swift pt\n  fix: use swift pt"),
        (
            "training:\n  lora_rank: 3\n",
            "run.yaml:2: training.lora_rank: is in section tuner, not in training\n  fix: write tuner.lora_rank",
        ),
        ("ENV: 3\n", "run.yaml:1: ENV: needs a mapping of variables"),
    ],
)
def test_messages_of_files(text: str, expected: str, write) -> None:
    assert message("sft", write("run.yaml", text), *NEEDED) == expected


def unreadable(command: str, name: str) -> str:
    with pytest.raises(SwiftError) as caught:
        resolve(command, [name])
    assert caught.value.exit_code == 2
    return caught.value.render()


def test_messages_of_unreadable_files(write, tmp_path: Path) -> None:
    assert unreadable("sft", "no.yaml") == (
        "no.yaml: cannot be read\n  cause: No such file or directory\n"
        "  fix: give the path of a YAML or JSON file of options"
    )
    write("now.yaml", "")
    assert unreadable("sft", "no.yaml").endswith("fix: did you mean now.yaml?")
    assert message("sft", write("bad.json", '{"a": 1,\n}')).startswith("bad.json:2: is not valid JSON:")
    (tmp_path / "latin.yaml").write_bytes(b"system: caf\xe9\n")
    assert message("sft", "latin.yaml").startswith("latin.yaml: is not UTF-8 text")


def test_an_empty_file_says_nothing(write) -> None:
    assert resolve("sft", [write("run.yaml", "# nothing\n"), *NEEDED]).config.tuner.lora_rank == 8


def test_python_errors_name_the_key() -> None:
    with pytest.raises(SwiftError) as caught:
        resolve("sft", values={"lora_rnk": 3})
    assert caught.value.render() == "lora_rnk: unknown option\n  fix: did you mean lora_rank?"


def test_environment_variables(write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWIFT_TEST_KEPT", "mine")
    monkeypatch.setenv("SWIFT_TEST_SET", "x")
    monkeypatch.delenv("SWIFT_TEST_SET")
    name = write("run.yaml", "ENV:\n  SWIFT_TEST_SET: 0,1\n  SWIFT_TEST_KEPT: theirs\n")
    resolved = resolve("sft", [name, *NEEDED])
    assert os.environ["SWIFT_TEST_SET"] == "0,1"
    assert os.environ["SWIFT_TEST_KEPT"] == "mine"
    assert resolved.environment == {"SWIFT_TEST_SET": "0,1", "SWIFT_TEST_KEPT": "mine"}
    assert resolved.warnings == [
        "run.yaml:3: ENV.SWIFT_TEST_KEPT: the environment's own value 'mine' is kept"
    ]


def test_switches_are_no_options(write) -> None:
    assert sft("--dry_run").switches == {"dry_run"}
    assert sft("--dry-run", "--json").switches == {"dry_run", "json"}
    assert sft("--dry_run", "false").switches == frozenset()
    assert resolve("sft", [write("run.yaml", "dry_run: true\n"), *NEEDED]).switches == {"dry_run"}
    assert (
        message("infer", "--model", "m", "--dry_runn")
        == "--dry_runn: unknown option\n  fix: swift infer --help all lists the options"
    )


def test_commands_without_options_are_refused() -> None:
    with pytest.raises(SwiftError, match="not a command with options"):
        resolve("doctor")


def test_all_unknown_options_are_told_at_once(write) -> None:
    name = write("run.yaml", "traning:\n  max_steps: 3\nlora_rank: abc\n")
    with pytest.raises(SwiftError) as caught:
        resolve("sft", [name, *NEEDED, "--qqq", "--lora_rnk", "3", "4", "--cfg", "x.yaml"])
    assert caught.value.exit_code == 2
    assert caught.value.render().splitlines() == [
        "4 unknown options",
        "  --qqq: swift sft --help all lists the options",
        "  --lora_rnk: did you mean --lora_rank?",
        "  --cfg: a configuration file is given without a flag; swift sft FILE.yaml",
        "  run.yaml:1: traning: did you mean training?",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("traning: {max_steps: 3}\n", "run.yaml:1: traning: unknown option\n  fix: did you mean training?"),
        ("modell: {device: cpu}\n", "run.yaml:1: modell: unknown option\n  fix: did you mean model?"),
        (
            "wxyz: {device: cpu}\n",
            "run.yaml:1: wxyz: neither a section nor an option\n  fix: swift sft --help all lists the options",
        ),
        (
            "stage: sft\n",
            "run.yaml:1: stage: the command says what is done\n"
            "  fix: leave it out: stage sft is swift sft, "
            "stage pt is swift pt; dpo, kto, rm are swift rlhf --rlhf_type",
        ),
    ],
)
def test_sections_and_words_of_other_tools(text: str, expected: str, write) -> None:
    assert message("sft", write("run.yaml", text), *NEEDED) == expected


def test_a_file_behind_a_flag() -> None:
    assert message("pt", "--cfg", "run.yaml") == (
        "--cfg: a configuration file is given without a flag\n  fix: swift pt FILE.yaml"
    )
