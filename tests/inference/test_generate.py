"""Generation against transformers' own, batched against single, stop words, seeds, interruption."""

from __future__ import annotations

import io
import signal
from pathlib import Path

import pytest
import torch

from swift.config.sections.engine import EngineSection
from swift.config.sections.generation import GenerationSection
from swift.config.sections.template import TemplateSection
from swift.core.errors import DataError, SwiftError
from swift.inference.chat import Chat
from swift.inference.generate import Generator
from swift.inference.losses import answer_losses
from swift.inference.text import StopWords, decode
from swift.models.load import load_bundle
from swift.models.template import Encoded

QUESTIONS = [
    "Hi",
    "What is the capital of France?",
    "Reverse the letters: a b c d e. Then add numbers.",
    "1 + 2",
]
CONVERSATIONS = [[{"role": "user", "content": text}] for text in QUESTIONS]
GREEDY = GenerationSection(max_new_tokens=24)


@pytest.fixture(scope="module")
def generator(tiny_model_dir: Path) -> Generator:
    torch.manual_seed(0)
    bundle = load_bundle(tiny_model_dir, TemplateSection(), dtype=torch.float32, device="cpu")
    with torch.no_grad():  # small random layers repeat the last token; larger ones make lively answers
        for name, parameter in bundle.model.named_parameters():
            if "layers" in name and parameter.dim() > 1:
                parameter.mul_(12)
    return Generator(bundle)


def reference_ids(generator: Generator, prompt: list[int], count: int) -> list[int]:
    """Greedy decoding without a cache: the likeliest token of a full forward, again and again."""
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            logits = generator.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        ids.append(int(logits.argmax()))
        if ids[-1] in generator.template.stop_token_ids:
            break
    return ids[len(prompt) :]


def test_greedy_equals_transformers_token_by_token(generator: Generator) -> None:
    for messages in CONVERSATIONS:
        prompt = generator.template.encode_prompt(messages)
        (answer,) = generator.answers([prompt], GREEDY)
        theirs = generator.model.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=generator.template.stop_token_ids,
            pad_token_id=generator.tokenizer.pad_token_id,
        )
        assert answer.token_ids == theirs[0, len(prompt) :].tolist()
        assert answer.token_ids == reference_ids(generator, prompt, 24)
        assert len(set(answer.token_ids)) > 2


def test_a_batch_equals_single_answers_and_keeps_the_order(generator: Generator) -> None:
    single = [generator.batch([messages], GREEDY)[0] for messages in CONVERSATIONS]
    for size in (2, 3, 8):
        other = Generator(generator.bundle, options=EngineSection(max_num_seqs=size))
        assert other.batch(CONVERSATIONS, GREEDY) == single
    assert len(set(single)) == len(single)


def test_the_stream_is_the_batch_answer(generator: Generator) -> None:
    for messages in CONVERSATIONS:
        pieces = list(generator.stream(messages, GREEDY))
        assert "".join(pieces) == generator.batch([messages], GREEDY)[0]
        assert len(pieces) > 2 and all(pieces)


def test_stop_words_end_an_answer_in_both_ways(generator: Generator) -> None:
    messages = CONVERSATIONS[1]
    whole = generator.batch([messages], GREEDY)[0]
    word = whole[len(whole) // 2 :][:3]
    options = GREEDY.model_copy(update={"stop_words": ["never there", word]})
    expected = whole[: whole.index(word)]
    prompt = generator.template.encode_prompt(messages)
    other = generator.template.encode_prompt(CONVERSATIONS[2])
    answer, neighbour = generator.answers([prompt, other], options)
    assert answer.text == expected and answer.finish_reason == "stop"
    assert decode(generator.tokenizer, answer.token_ids).startswith(expected + word)
    assert len(answer.token_ids) < 24
    assert "".join(generator.stream(messages, options)) == expected
    assert neighbour.text == StopWords([word]).cut(generator.batch([CONVERSATIONS[2]], GREEDY)[0])


def test_stop_tokens_come_from_the_template(generator: Generator) -> None:
    messages = CONVERSATIONS[0]
    prompt = generator.template.encode_prompt(messages)
    (answer,) = generator.answers([prompt], GREEDY)
    end = answer.token_ids[4]
    first = answer.token_ids.index(end)
    before = generator.template.stop_token_ids
    generator.template.stop_token_ids = [*before, end]
    try:
        (stopped,) = generator.answers([prompt], GREEDY)
        streamed = "".join(generator.stream(messages, GREEDY))
    finally:
        generator.template.stop_token_ids = before
    assert stopped.token_ids == answer.token_ids[: first + 1]
    assert stopped.text == streamed == decode(generator.tokenizer, answer.token_ids[:first])
    assert stopped.finish_reason == "stop"


def test_sampling_follows_its_seed_and_leaves_the_generator_alone(generator: Generator) -> None:
    options = GREEDY.model_copy(update={"temperature": 1.5, "top_k": 40})
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = (generator.batch(CONVERSATIONS[:2], options, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), state)
    assert "".join(generator.stream(CONVERSATIONS[0], options, seed=3)) == "".join(
        generator.stream(CONVERSATIONS[0], options, seed=3)
    )


def test_options_reach_the_engine_and_nothing_comes_from_the_models_defaults(generator: Generator) -> None:
    defaults = generator.model.generation_config
    before = (defaults.repetition_penalty, defaults.top_k)
    expected = generator.batch(CONVERSATIONS[:1], GREEDY)
    defaults.repetition_penalty, defaults.top_k = 5.0, 3
    try:
        assert generator.batch(CONVERSATIONS[:1], GREEDY) == expected
    finally:
        defaults.repetition_penalty, defaults.top_k = before
    penalised = GREEDY.model_copy(update={"repetition_penalty": 5.0})
    assert generator.batch(CONVERSATIONS[:1], penalised) != expected
    narrow = GREEDY.model_copy(update={"temperature": 1.0, "top_k": 1})
    assert generator.batch(CONVERSATIONS[:1], narrow, seed=1) == expected


def test_seeds_belong_to_rows_not_to_batches(generator: Generator) -> None:
    """The same question with other numbers gets other answers, and each is the same in any company."""
    options = GREEDY.model_copy(update={"temperature": 1.5})
    prompt = generator.template.encode_prompt(CONVERSATIONS[1])
    three = generator.answers([prompt] * 3, options, seed=1)
    assert len({tuple(answer.token_ids) for answer in three}) == 3
    (again,) = generator.answers([prompt], options, seed=1, numbers=[2])
    assert again == three[2]


def test_leaving_a_stream_stops_generation(generator: Generator) -> None:
    stream = generator.stream(CONVERSATIONS[1], GREEDY.model_copy(update={"max_new_tokens": 400}))
    next(stream)
    before = generator.engine.stats()
    assert before.running == 1
    stream.close()
    after = generator.engine.stats()
    assert (after.running, after.waiting) == (0, 0)
    assert after.generated_tokens_total == before.generated_tokens_total < 400 + GREEDY.max_new_tokens * 100


def test_ctrl_c_stops_generation_and_reaches_the_caller(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 0
    step = generator.engine.step

    def step_or_interrupt() -> object:
        nonlocal count
        count += 1
        if count == 4:
            signal.raise_signal(signal.SIGINT)
        return step()

    monkeypatch.setattr(generator.engine, "step", step_or_interrupt)
    out = io.StringIO()
    chat = Chat(generator, GREEDY.model_copy(update={"max_new_tokens": 400}), out=out)
    # A test run in the background of a script has inherited an ignored SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert chat.handle("Reverse the letters: a b c d e.")
    finally:
        signal.signal(signal.SIGINT, before)
    assert out.getvalue().endswith(" … (stopped)\n") and count == 4
    assert generator.engine.stats().running == 0
    assert len(chat.messages) == 2


def test_an_error_of_the_engine_reaches_the_caller(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no logits today")

    monkeypatch.setattr(generator.engine._runner, "run", fail)
    with pytest.raises(SwiftError, match="could not answer") as caught:
        list(generator.stream(CONVERSATIONS[0], GREEDY))
    assert "no logits today" in (caught.value.why or "")
    with pytest.raises(SwiftError, match="could not answer"):
        generator.batch(CONVERSATIONS, GREEDY)


def test_answers_end_at_the_models_last_position(generator: Generator) -> None:
    limit = generator.bundle.facts.max_position_embeddings
    prompt = [5] * (limit - 3)
    (answer,) = generator.answers([prompt], GREEDY)
    assert len(answer.token_ids) <= 3
    with pytest.raises(DataError, match="leaves no room"):
        generator.answers([[5] * limit], GREEDY)
    with pytest.raises(DataError, match="nothing to answer"):
        generator.answers([[]], GREEDY)


def test_losses_are_those_of_each_sample_alone(generator: Generator) -> None:
    samples = [
        generator.template.encode([*m, {"role": "assistant", "content": "Paris."}]) for m in CONVERSATIONS
    ]
    losses = answer_losses(generator.bundle, samples)
    for sample, loss in zip(samples, losses, strict=True):
        with torch.no_grad():
            theirs = generator.model(
                input_ids=torch.tensor([sample.input_ids]),
                labels=torch.tensor([sample.labels]),
                use_cache=False,
            ).loss
        assert loss.num_tokens == sum(label != -100 for label in sample.labels) > 1
        assert loss.total / loss.num_tokens == pytest.approx(theirs.item(), rel=1e-5)
    nothing = answer_losses(generator.bundle, [Encoded([1, 2, 3], [-100] * 3)])
    assert (nothing[0].total, nothing[0].num_tokens) == (0.0, 0)
