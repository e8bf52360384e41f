"""The synchronous engine against transformers: tokens of `generate`, log-probabilities of a plain forward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from engine_models import lively, plain_logprobs, prompts

from swift.config.sections.engine import EngineSection
from swift.core.errors import ConfigError
from swift.inference.engines.base import EngineBusy, Request, SamplingOptions
from swift.inference.engines.embedded_core import EmbeddedCore
from swift.models.load import ModelBundle

GREEDY = SamplingOptions(max_tokens=20, temperature=0, logprobs=3)
TOGETHER = "all requests in one forward"
ALONE = "each request on its own, with its own cache"


def requests(texts: list[list[int]], sampling: SamplingOptions = GREEDY) -> list[Request]:
    return [Request(str(index), text, sampling) for index, text in enumerate(texts)]


@torch.no_grad()
def generated(model: object, prompt: list[int], count: int) -> list[int]:
    output = model.generate(  # type: ignore[attr-defined]
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return output[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("architecture", "config", "way"),
    [
        ("qwen3", {}, TOGETHER),
        ("llama", {}, TOGETHER),
        ("gemma2", {"sliding_window": 8}, TOGETHER),
        ("gemma3_text", {"sliding_window": 8}, TOGETHER),
        ("gpt_oss", {"sliding_window": 8}, TOGETHER),
        ("qwen3_moe", {}, TOGETHER),
        ("gpt2", {}, TOGETHER),
        ("mamba", {}, ALONE),
        ("bloom", {}, ALONE),
    ],
)
def test_batched_greedy_is_generate_alone_on_many_architectures(
    make_bundle: Callable[..., ModelBundle], architecture: str, config: dict[str, object], way: str
) -> None:
    bundle = make_bundle(architecture, config=config) if config else make_bundle(architecture)
    if architecture in ("qwen3", "llama"):
        lively(bundle)
    core = EmbeddedCore(bundle, EngineSection(max_num_seqs=4, prefill_chunk=16))
    assert core.way == way
    texts = prompts(7, core.vocab_size)
    for text, answer in zip(texts, core.generate(requests(texts)), strict=True):
        assert answer.tokens == generated(bundle.model, text, 20)
        assert answer.finish_reason == "length"
        expected = plain_logprobs(bundle.model, text + answer.tokens)[len(text) - 1 :]
        for info, token, row in zip(answer.infos, answer.tokens, expected, strict=True):
            assert info.token == token
            assert info.logprob == pytest.approx(row[token].item(), abs=1e-4)
            assert [value for _, value in info.top] == pytest.approx(row.topk(3)[0].tolist(), abs=1e-4)


def test_float32_weights_that_compute_in_bfloat16_are_asked_together(bundle: ModelBundle) -> None:
    """Full training in bfloat16 samples so: the proof allows the rounding of the computation, not of the weights."""
    lively(bundle)
    with torch.autocast("cpu", torch.bfloat16):
        assert EmbeddedCore(bundle, EngineSection(max_num_seqs=4)).way == TOGETHER


def test_answers_do_not_depend_on_slots_chunks_or_memory(bundle: ModelBundle) -> None:
    """One at a time, many together, prompts in pieces of 3, and a cache so small that requests are put back."""
    sampling = SamplingOptions(max_tokens=30, temperature=1.0, top_p=0.9, seed=7, presence_penalty=0.5)
    texts = prompts(9, 512)
    asked = [Request(str(i), text, sampling) for i, text in enumerate(texts)]
    alone = [answer.tokens for answer in EmbeddedCore(bundle, EngineSection(max_num_seqs=1)).generate(asked)]
    assert len({tuple(tokens) for tokens in alone}) == 9
    for options in (
        EngineSection(max_num_seqs=16),
        EngineSection(max_num_seqs=5, prefill_chunk=3),
        EngineSection(max_num_seqs=16, max_cache_tokens=150),
    ):
        assert [answer.tokens for answer in EmbeddedCore(bundle, options).generate(asked)] == alone


def test_a_small_cache_is_never_exceeded_and_everything_still_ends(bundle: ModelBundle) -> None:
    core = EmbeddedCore(bundle, EngineSection(max_num_seqs=8, max_cache_tokens=120, prefill_chunk=32))
    assert core.max_model_len == 120
    for request in requests(prompts(12, 512), SamplingOptions(max_tokens=60, temperature=0)):
        core.add(request)
    most = ended = 0
    while core.has_work:
        ended += sum(delta.finish_reason is not None for _, delta in core.step())
        most = max(most, core.cache.slots * core.cache.width)
        assert core.cache.slots * core.cache.width <= 120
    assert ended == 12 and most > 60 and core.cache.num_bytes == 0


def test_prompt_logprobs_are_those_of_a_plain_forward(bundle: ModelBundle) -> None:
    core = EmbeddedCore(bundle, EngineSection(prefill_chunk=7))
    sampling = SamplingOptions(max_tokens=2, prompt_logprobs=2, temperature=0.5, seed=1)
    texts = prompts(3, 512, seed=3)
    others = [Request(f"other{i}", text, GREEDY) for i, text in enumerate(texts)]
    for text, answer in zip(texts, core.generate([*requests(texts, sampling), *others])[:3], strict=True):
        expected = plain_logprobs(bundle.model, text)
        assert [info.token for info in answer.prompt_infos] == text[1:]
        for info, row in zip(answer.prompt_infos, expected, strict=True):
            assert info.logprob == pytest.approx(row[info.token].item(), abs=1e-4)
            assert [token for token, _ in info.top] == row.topk(2)[1].tolist()


def test_stop_tokens_end_and_min_tokens_hold_them_back(bundle: ModelBundle) -> None:
    core = EmbeddedCore(bundle)
    text = prompts(1, 512)[0]
    (whole,) = core.generate(requests([text]))
    stop = whole.tokens[6]
    first = whole.tokens.index(stop)
    (cut,) = core.generate(
        requests([text], SamplingOptions(max_tokens=20, temperature=0, stop_token_ids=(stop,)))
    )
    assert cut.tokens == whole.tokens[: first + 1] and cut.finish_reason == "stop"
    late = SamplingOptions(max_tokens=20, temperature=0, stop_token_ids=(stop,), min_tokens=12)
    (later,) = core.generate(requests([text], late))
    assert stop not in later.tokens[:12] and len(later.tokens) >= 12


def test_requests_that_cannot_be_answered_are_refused(bundle: ModelBundle) -> None:
    core = EmbeddedCore(bundle, EngineSection(max_model_len=50, max_num_seqs=1, max_waiting=1))
    for prompt, sampling, message in (
        ([], GREEDY, "no tokens"),
        ([5] * 50, GREEDY, "leaves no room"),
        ([512], GREEDY, "outside"),
        ([5], SamplingOptions(top_p=0), "top_p"),
        ([5], SamplingOptions(temperature=-1), "temperature"),
        ([5], SamplingOptions(logit_bias={600: 1.0}), "logit_bias"),
        ([5], SamplingOptions(max_tokens=0), "max_tokens"),
    ):
        with pytest.raises(ConfigError, match=message):
            core.add(Request("x", prompt, sampling))
    with pytest.raises(ConfigError, match="no adapter 'a'"):
        core.add(Request("x", [5], adapter="a"))
    core.add(Request("x", [5]))
    with pytest.raises(ConfigError, match="already"):
        core.add(Request("x", [5]))
    core.add(Request("y", [5]))
    with pytest.raises(EngineBusy):
        core.add(Request("z", [5]))
    assert core.stats().requests_total == 2
    (answer,) = EmbeddedCore(bundle, EngineSection(max_model_len=50)).generate(requests([[5] * 45]))
    assert len(answer.tokens) == 5 and answer.finish_reason == "length"


def test_an_aborted_request_frees_its_slot_and_leaves_the_others_alone(bundle: ModelBundle) -> None:
    core = EmbeddedCore(bundle, EngineSection(max_num_seqs=4))
    texts = prompts(6, 512)
    expected = [answer.tokens for answer in core.generate(requests(texts))]
    found: dict[str, list[int]] = {str(i): [] for i in range(6)}
    for request in requests(texts):
        core.add(request)
    steps = 0
    while core.has_work:
        for name, delta in core.step():
            found[name] += delta.tokens
        steps += 1
        if steps == 5:
            core.abort("1")
            core.abort("5")  # one that waits
    assert found["1"] == expected[1][: len(found["1"])] and 0 < len(found["1"]) < 20 and found["5"] == []
    assert [found[str(i)] for i in (0, 2, 3, 4)] == [expected[i] for i in (0, 2, 3, 4)]
    assert core.stats().running == core.stats().waiting == 0 and core.stats().aborted_total == 2


def test_a_step_that_fails_is_tried_with_fewer_requests(
    bundle: ModelBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than two requests at once run out of memory; one request fails whatever happens."""
    core = EmbeddedCore(bundle, EngineSection(max_num_seqs=8))
    texts = [[5 + i, 17, 30] for i in range(6)]
    expected = [answer.tokens for answer in core.generate(requests(texts))]
    run = core._runner.run

    def fragile(batch: object) -> object:
        if len(batch.slots) > 2:  # type: ignore[attr-defined]
            raise MemoryError("pretended")
        if 8 in batch.ids and 0 in batch.begins:  # type: ignore[attr-defined]
            raise RuntimeError("request 3 is cursed")
        return run(batch)  # type: ignore[arg-type]

    monkeypatch.setattr(core._runner, "run", fragile)
    answers = core.generate(requests(texts))
    assert answers[3].finish_reason == "error" and "cursed" in (answers[3].error or "")
    for index in (0, 1, 2, 4, 5):
        assert answers[index].tokens == expected[index]


def test_scores_that_are_not_finite_end_only_their_request(
    bundle: ModelBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = EmbeddedCore(bundle)
    texts = prompts(3, 512)
    expected = [answer.tokens for answer in core.generate(requests(texts))]
    run = core._runner.run

    def poisoned(batch: object) -> torch.Tensor:
        logits: torch.Tensor = run(batch)  # type: ignore[arg-type]
        if len(logits) == 3:
            logits[1] = float("nan")
        return logits

    monkeypatch.setattr(core._runner, "run", poisoned)
    answers = core.generate(requests(texts))
    assert answers[1].finish_reason == "error" and "finite" in (answers[1].error or "")
    assert [answers[0].tokens, answers[2].tokens] == [expected[0], expected[2]]


def test_a_shared_prompt_is_computed_once_and_changes_no_answer(bundle: ModelBundle) -> None:
    """Three prompts, four seeds each, in few slots and in small pieces; one group has a prompt of one token."""
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(5, 200, (size,), generator=generator).tolist() for size in (40, 17, 1)]
    wanted = [
        Request(f"{seed}-{number}", prompt, SamplingOptions(max_tokens=6, seed=seed, logprobs=0))
        for seed in range(4)
        for number, prompt in enumerate(prompts)
    ]
    for options in (EngineSection(max_num_seqs=16), EngineSection(max_num_seqs=4, prefill_chunk=8)):
        plain = EmbeddedCore(bundle, options)
        shared = EmbeddedCore(bundle, options)
        shared.shares_prompts = True
        counted: list[int] = []
        run = shared._runner.run
        shared._runner.run = lambda batch, run=run, counted=counted: (
            counted.append(len(batch.ids)),
            run(batch),
        )[1]  # type: ignore[method-assign]
        answers = shared.generate(wanted)
        for one, other in zip(plain.generate(wanted), answers, strict=True):
            assert one.tokens == other.tokens
            pairs = zip(one.infos, other.infos, strict=True)
            assert all(abs(a.logprob - b.logprob) < 1e-4 for a, b in pairs)
        if (
            options.max_num_seqs == 16
        ):  # each prompt once, one token of it for each further answer, the answers
            assert sum(counted) == 40 + 17 + 1 + 3 * 3 + sum(len(one.tokens) - 1 for one in answers)
