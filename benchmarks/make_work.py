#!/usr/bin/env python3
"""The common work of the measurements: one tiny model and its data, the same bytes on every machine.

    python benchmarks/make_work.py OUT

writes ``OUT/models/qwen3-tiny`` (Qwen3, 6.8M random parameters, a tokenizer with 4,096 entries) and
``OUT/data/{sft,heldout,dpo,grpo}.jsonl`` (2,000 / 200 / 500 / 200 rows of word problems, conversions and
reversals with answers of very different length). Everything comes from fixed seeds; nothing is downloaded.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from measure import described_parser

Message = dict[str, str]

NAMES = (
    "Ada Bo Chen Dina Emil Fatou Gus Hana Ivo Jun Kira Leo Mei Nils Olga Pia Quin Rosa Sam Tao Uma Vik Wen "
    "Xia Yuri Zoe"
).split()
ITEMS = "apples pens books coins shells cards stamps marbles cups keys tiles plums seeds ropes bricks lamps".split()
FILL = (
    "The market was busy that morning and the square was full of people.",
    "It had rained the night before, so the paths were still wet.",
    "A small dog watched them from the steps of the old library.",
    "Nobody in the village could remember a warmer spring than this one.",
    "The bell of the station rang twice while they were talking.",
    "Their friends had promised to come later with bread and tea.",
    "On the table there was a map, a ruler and a broken clock.",
    "They wrote every number down in a blue notebook to be sure.",
)
SYSTEM = "You are a careful assistant. Think step by step and give a short answer."


def arithmetic(rng: random.Random) -> tuple[str, str, int]:
    """A story of gifts: question, worked answer, final number."""
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    count = rng.randint(2, 99)
    num_gifts = rng.choice([1, 1, 2, 2, 3, 4, 6, 8])
    story, working = [f"{name} has {count} {item}."], []
    for _ in range(num_gifts):
        gift = rng.randint(1, 60)
        operation = rng.choice("+-") if count > gift else "+"
        other = rng.choice(NAMES)
        if operation == "+":
            story.append(f"{other} gives {name} {gift} more {item}.")
            working.append(f"{count} + {gift} = {count + gift}.")
            count += gift
        else:
            story.append(f"{name} gives {gift} {item} to {other}.")
            working.append(f"{count} - {gift} = {count - gift}.")
            count -= gift
        if rng.random() < 0.55:
            story.append(rng.choice(FILL))
    story.append(f"How many {item} does {name} have now?")
    return " ".join(story), " ".join(working) + f" The answer is {count}.", count


def convert(rng: random.Random) -> tuple[str, str, int]:
    """A list to turn into JSON lines."""
    size = rng.choice([1, 2, 3, 4, 6, 8, 10])
    rows = [(rng.choice(NAMES), rng.choice(ITEMS), rng.randint(1, 99)) for _ in range(size)]
    question = "Convert to JSON lines: " + "; ".join(f"{name}, {item}, {count}" for name, item, count in rows)
    answer = "\n".join(json.dumps({"name": name, "item": item, "count": count}) for name, item, count in rows)
    return question, answer, size


def reverse(rng: random.Random) -> tuple[str, str, int]:
    """Words to say backwards."""
    words = [rng.choice(ITEMS) for _ in range(rng.randint(2, 24))]
    return "Reverse the order of the words: " + " ".join(words), " ".join(words[::-1]), len(words)


def question_and_answer(rng: random.Random) -> tuple[str, str, int]:
    task: Callable[[random.Random], tuple[str, str, int]]
    task = rng.choices([arithmetic, convert, reverse], [6, 2, 2])[0]
    return task(rng)


def turn(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def chat(rng: random.Random) -> list[Message]:
    """One conversation; about one in three has a system prompt, one in six a second turn."""
    question, answer, _ = question_and_answer(rng)
    messages = [{"role": "system", "content": SYSTEM}] if rng.random() < 0.3 else []
    messages += turn(question, answer)
    if rng.random() < 0.16:
        question, answer, _ = question_and_answer(rng)
        messages += turn(question, answer)
    return messages


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def make_data(folder: Path) -> None:
    """Write the four data sets into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(1)
    write_rows(folder / "sft.jsonl", [{"messages": chat(rng)} for _ in range(2000)])
    rng = random.Random(2)
    write_rows(folder / "heldout.jsonl", [{"messages": chat(rng)} for _ in range(200)])
    rng = random.Random(3)
    write_rows(folder / "dpo.jsonl", [preference_pair(rng) for _ in range(500)])
    rng = random.Random(4)
    write_rows(folder / "grpo.jsonl", [prompt_with_solution(rng) for _ in range(200)])


def preference_pair(rng: random.Random) -> dict[str, Any]:
    question, answer, solution = arithmetic(rng)
    wrong = solution + rng.choice([-10, -3, -1, 1, 2, 10])
    rejected = answer.replace(f"The answer is {solution}.", f"The answer is {wrong}.")
    return {"messages": turn(question, answer), "rejected_response": rejected}


def prompt_with_solution(rng: random.Random) -> dict[str, Any]:
    question, _, solution = arithmetic(rng)
    return {"messages": [{"role": "user", "content": question}], "solution": str(solution)}


TEMPLATE = """{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}
{%- if message['role'] == 'system' %}{%- elif message['role'] == 'user' %}{{- '<|im_start|>user\\n' + message['content'] + '<|im_end|>\\n' }}
{%- elif message['role'] == 'assistant' %}{{- '<|im_start|>assistant\\n' }}{% generation %}{{- message['content'] + '<|im_end|>' }}{% endgeneration %}{{- '\\n' }}
{%- else %}{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""  # noqa: E501

SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
ADDED_TOKENS = [*SPECIAL_TOKENS, "<tool_call>", "</tool_call>", "<think>", "</think>"]


def tokenizer_corpus() -> list[str]:
    """6,000 conversations, and invented words that give the merges something to fill the vocabulary with."""
    rng = random.Random(7)
    corpus = [message["content"] for _ in range(6000) for message in chat(rng)]
    onsets = "b c d f g h k l m n p r s t v w z st tr pl".split()
    syllables = [onset + rhyme for onset in onsets for rhyme in "a e i o u an en in or al".split()]
    for _ in range(6000):
        words = ("".join(rng.choice(syllables) for _ in range(rng.randint(1, 4))) for _ in range(12))
        corpus.append(" ".join(words))
    return corpus


def make_tokenizer(folder: Path, vocab_size: int = 4096) -> dict[str, int]:
    """Train a byte-level BPE tokenizer, write it as Qwen2's; returns the ids of the added tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(ADDED_TOKENS),
        special_tokens=[],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(tokenizer_corpus(), trainer)
    content = json.loads(tokenizer.to_str())
    first_added = len(content["model"]["vocab"])
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    content["added_tokens"] = [
        {"id": first_added + i, "content": token, **flags, "special": token in SPECIAL_TOKENS}
        for i, token in enumerate(ADDED_TOKENS)
    ]
    settings = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "model_max_length": 4096,
        "errors": "replace",
        "split_special_tokens": False,
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "chat_template": TEMPLATE,
        "additional_special_tokens": SPECIAL_TOKENS[1:],
        "added_tokens_decoder": {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"}
            for token in content["added_tokens"]
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return {token: first_added + i for i, token in enumerate(ADDED_TOKENS)}


def make_model(folder: Path) -> None:
    """Write the tokenizer and a Qwen3 with random weights (seed 0)."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    ids = make_tokenizer(folder)
    config = Qwen3Config(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        rope_theta=1e6,
        tie_word_embeddings=False,
        bos_token_id=ids["<|endoftext|>"],
        eos_token_id=ids["<|im_end|>"],
        pad_token_id=ids["<|endoftext|>"],
        dtype="float32",
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config.eos_token_id = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    model.save_pretrained(folder)


def make_work(folder: Path) -> tuple[Path, Path]:
    """The model folder and the data folder, made unless they are there already."""
    model, data = folder / "models" / "qwen3-tiny", folder / "data"
    if not (data / "grpo.jsonl").exists():
        make_data(data)
    if not (model / "model.safetensors").exists():
        make_model(model)
    return model, data


if __name__ == "__main__":
    parser = described_parser(__doc__)
    parser.add_argument("out", type=Path)
    for made in make_work(parser.parse_args().out):
        print(made)
