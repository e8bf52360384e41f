"""The engine behind the protocol: one event loop, many readers, adapters that come and go."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest
import torch
from engine_models import in_loop, lively, prompts

from swift.config.sections.engine import EngineSection
from swift.core.errors import ConfigError, ModelError
from swift.inference.engines.base import Delta, EngineBusy, EngineClosing, Grammar, Request, SamplingOptions
from swift.inference.engines.embedded import EmbeddedEngine
from swift.inference.engines.embedded_core import Completion, EmbeddedCore
from swift.models.load import ModelBundle
from swift.tuners.apply import attach_adapter, remove_adapter
from swift.tuners.lora import AdapterSpec
from swift.tuners.peft_format import save_adapter

GREEDY = SamplingOptions(max_tokens=16, temperature=0)


@asynccontextmanager
async def running(bundle: ModelBundle, options: EngineSection | None = None) -> AsyncIterator[EmbeddedEngine]:
    engine = EmbeddedEngine(lambda: bundle, options)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "swift-engine"]


async def read(stream: AsyncIterator[Delta]) -> Completion:
    answer = Completion()
    async for delta in stream:
        answer.add(delta)
    return answer


def write_adapters(bundle: ModelBundle, folder: Path, names: list[str]) -> dict[str, Path]:
    """Adapters that change the answers, as folders; the model is left without any."""
    modules = [
        name
        for name, module in bundle.model.named_modules()
        if isinstance(module, torch.nn.Linear) and "layers" in name
    ]
    for index, name in enumerate(names):
        spec = AdapterSpec(rank=2 + index, alpha=8)
        attach_adapter(
            bundle.model, dict.fromkeys(modules, spec), ["lm_head"] if index == 1 else [], name=name
        )
        generator = torch.Generator().manual_seed(index)
        with torch.no_grad():
            for key, parameter in bundle.model.named_parameters():
                if f"lora_B.{name}" in key:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
                if f"copies.{name}" in key:
                    parameter.mul_(1.5)
        save_adapter(bundle.model, folder / name, bundle.path, name=name)
    for name in names:
        remove_adapter(bundle.model, name)
    assert not any("lora_" in key for key, _ in bundle.model.named_parameters())
    return {name: folder / name for name in names}


@in_loop
async def test_many_readers_get_what_the_core_gives(bundle: ModelBundle) -> None:
    texts = prompts(20, 512)
    asked = [Request(str(i), text, GREEDY) for i, text in enumerate(texts)]
    expected = [answer.tokens for answer in EmbeddedCore(bundle).generate(asked)]
    async with running(bundle, EngineSection(max_num_seqs=6)) as engine:
        answers = await asyncio.gather(*(read(engine.submit(request)) for request in asked))
        assert [answer.tokens for answer in answers] == expected
        assert {answer.finish_reason for answer in answers} == {"length"}
        stats = engine.stats()
        assert (stats.running, stats.waiting, stats.requests_total) == (0, 0, 20)
        assert stats.generated_tokens_total == 20 * 16


@in_loop
async def test_leaving_early_frees_the_slot(bundle: ModelBundle) -> None:
    async with running(bundle, EngineSection(max_num_seqs=1, max_model_len=2000)) as engine:
        stream = engine.submit(Request("long", [5, 6], SamplingOptions(max_tokens=1900, temperature=0)))
        await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]
        other = await read(engine.submit(Request("next", [5, 6, 7], GREEDY)))
        assert len(other.tokens) == 16 and engine.stats().aborted_total == 1
        assert engine.stats().generated_tokens_total < 1000


@in_loop
async def test_a_full_queue_and_a_closing_engine_refuse(bundle: ModelBundle) -> None:
    async with running(bundle, EngineSection(max_num_seqs=1, max_waiting=2)) as engine:
        long = SamplingOptions(max_tokens=100, temperature=0)
        streams = []
        with pytest.raises(EngineBusy, match="waiting"):
            for index in range(9):
                streams.append(engine.submit(Request(str(index), [5], long)))
        assert len(streams) >= 3  # one that runs, two that wait, however fast they come
        with pytest.raises(ConfigError, match="already"):
            engine.submit(Request("0", [5], GREEDY))
        for stream in streams[1:]:
            await stream.aclose()  # type: ignore[attr-defined]
        assert len((await read(streams[0])).tokens) == 100
        closing = engine.submit(Request("last", [5], long))
        await anext(closing)
        await engine.close(drain_seconds=0.0)
        rest = await read(closing)
        assert rest.finish_reason == "abort"
        with pytest.raises(EngineClosing, match="shutting down"):
            engine.submit(Request("late", [5], GREEDY))
        with pytest.raises(EngineClosing, match="shutting down"):
            await engine.load_adapter("late", Path("nowhere"))


@in_loop
async def test_commands_that_a_closed_engine_has_not_come_to_are_told(bundle: ModelBundle) -> None:
    held = threading.Event()
    async with running(bundle) as engine:
        engine._inbox.put(lambda: held.wait(60))
        waiting = asyncio.create_task(engine.load_adapter("a", Path("nowhere")))
        closing = asyncio.create_task(engine.close())
        await asyncio.sleep(0)  # the command lies in the inbox, and the thread will find that it shall end
        held.set()
        await closing
        with pytest.raises(EngineClosing, match="shutting down"):
            await waiting


@in_loop
async def test_a_draining_engine_lets_running_requests_end(bundle: ModelBundle) -> None:
    async with running(bundle) as engine:
        reader = asyncio.create_task(
            read(engine.submit(Request("a", [5], SamplingOptions(max_tokens=200, temperature=0))))
        )
        await asyncio.sleep(0)
        await engine.close(drain_seconds=60)
        assert len((await reader).tokens) == 200


@in_loop
async def test_a_model_that_cannot_be_loaded_says_so_at_start() -> None:
    def load() -> ModelBundle:
        raise ModelError("no such model")

    with pytest.raises(ModelError, match="no such model"):
        await EmbeddedEngine(load).start()


@in_loop
async def test_adapters_mix_in_one_batch_and_come_and_go(
    make_bundle: Callable[..., ModelBundle], tmp_path: Path
) -> None:
    bundle = lively(make_bundle("qwen3", config={"tie_word_embeddings": False}))
    folders = write_adapters(bundle, tmp_path, ["one", "two", "three"])
    texts = prompts(12, 512, seed=5)
    names = [None, "one", "v2.5", "three"]
    paths = {"one": folders["one"], "v2.5": folders["two"], "three": folders["three"]}
    asked = [Request(str(i), text, GREEDY, adapter=names[i % 4]) for i, text in enumerate(texts)]
    core = EmbeddedCore(bundle)
    alone: list[list[int]] = []
    for request in asked:  # one adapter on the model at a time, one request at a time
        if request.adapter is not None:
            core.load_adapter(request.adapter, paths[request.adapter])
        alone.append(core.generate([request])[0].tokens)
        if request.adapter is not None:
            core.unload_adapter(request.adapter)
    plain = [answer.tokens for answer in core.generate([Request(r.id, r.prompt, GREEDY) for r in asked])]
    assert sum(one != other for one, other in zip(alone, plain, strict=True)) == 9
    async with running(bundle, EngineSection(max_num_seqs=8, prefill_chunk=16)) as engine:
        for name, folder in paths.items():
            await engine.load_adapter(name, folder)
        assert engine.adapters() == paths
        with pytest.raises(ConfigError, match="already"):
            await engine.load_adapter("one", folders["one"])
        answers = await asyncio.gather(*(read(engine.submit(request)) for request in asked))
        assert [answer.tokens for answer in answers] == alone
        # One leaves while it is in use: its request ends first, others go on, new ones are refused.
        long = SamplingOptions(max_tokens=200, temperature=0)
        using = asyncio.create_task(read(engine.submit(Request("using", [5], long, adapter="one"))))
        other = asyncio.create_task(read(engine.submit(Request("other", [5], long, adapter="three"))))
        await asyncio.sleep(0)
        await engine.unload_adapter("one")
        assert using.done() or len((await using).tokens) == 200
        assert set(engine.adapters()) == {"v2.5", "three"}
        with pytest.raises(ConfigError, match="no adapter 'one'"):
            engine.submit(Request("again", [5], GREEDY, adapter="one"))
        assert len((await other).tokens) == 200
        # Another one with nothing to do, and one whose last request is cancelled.
        await asyncio.wait_for(engine.unload_adapter("v2.5"), 60)
        last = engine.submit(Request("last", [5], long, adapter="three"))
        await anext(last)
        leaving = asyncio.create_task(engine.unload_adapter("three"))
        await last.aclose()
        await asyncio.wait_for(leaving, 60)
        assert engine.adapters() == {}
        # Who no longer waits does not stop the engine.
        await engine.load_adapter("one", folders["one"])
        using = asyncio.create_task(read(engine.submit(Request("once more", [5], long, adapter="one"))))
        await asyncio.sleep(0)
        leaving = asyncio.create_task(engine.unload_adapter("one"))
        while "one" in engine.adapters():
            await asyncio.sleep(0.001)
        leaving.cancel()  # mostly while it waits for the request; too late now and then, which must do no harm either
        assert (await asyncio.wait([leaving], timeout=60))[0]
        assert len((await using).tokens) == 200
        await asyncio.wait_for(engine.load_adapter("two", folders["two"]), 60)
        with pytest.raises(ModelError):
            await engine.load_adapter("nothing", tmp_path / "nothing")


@in_loop
async def test_grammars_hold_and_bad_ones_are_refused(bundle: ModelBundle) -> None:
    pytest.importorskip("llguidance")
    sampling = SamplingOptions(
        max_tokens=60, temperature=1.5, seed=1, grammar=Grammar("regex", "[a-c]{3}(1|22)")
    )
    bad = SamplingOptions(grammar=Grammar("regex", "(("))
    async with running(bundle) as engine:
        answers = await asyncio.gather(
            read(engine.submit(Request("a", [5, 6], sampling))),
            read(engine.submit(Request("b", [5, 6], SamplingOptions(max_tokens=5)))),
        )
        text = bundle.tokenizer.decode(answers[0].tokens, skip_special_tokens=True)
        assert len(text) in (4, 5) and set(text[:3]) <= set("abc") and text[3:] in ("1", "22")
        assert answers[0].finish_reason == "stop" and len(answers[1].tokens) == 5
        # JSON, whose white space has an end.
        (space,) = bundle.tokenizer.encode(" ", add_special_tokens=False)
        schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}
        wide = SamplingOptions(
            max_tokens=900,
            temperature=0,
            logit_bias={space: 100.0},
            grammar=Grammar("json_schema", json.dumps({**schema, "additionalProperties": False})),
        )
        answer = await read(engine.submit(Request("d", [5, 6], wide)))
        text = bundle.tokenizer.decode(answer.tokens, skip_special_tokens=True)
        assert json.loads(text) == {"a": 1} and 40 < len(text) <= 5 * 40 + 7
        with pytest.raises(ConfigError, match="not a usable regex"):
            await read(engine.submit(Request("c", [5], bad)))
        assert engine.stats().running == 0


async def hammer(bundle: ModelBundle, count: int) -> tuple[int, int]:
    """Mixed requests of 40 clients, every fifth left early; resident bytes after a tenth and at the end."""
    rng = random.Random(0)
    process, sizes = psutil.Process(), []
    left = iter(range(count))

    async def client(engine: EmbeddedEngine) -> None:
        for index in left:
            if index in (count // 10, count - 1):
                sizes.append(process.memory_info().rss)
            sampling = SamplingOptions(
                max_tokens=rng.randint(1, 12),
                temperature=rng.choice([0, 1.0]),
                top_p=rng.choice([1, 0.8]),
                frequency_penalty=rng.choice([0, 0.5]),
                logprobs=rng.choice([None, 2]),
                prompt_logprobs=rng.choice([None, None, None, 0]),
                seed=index,
            )
            prompt = [rng.randrange(5, 512) for _ in range(rng.choice([1, 5, 9, 60]))]
            if index % 7 == 0:
                with pytest.raises(ConfigError):
                    engine.submit(Request(f"bad{index}", [9999], sampling))
            stream = engine.submit(Request(str(index), prompt, sampling))
            if index % 5 == 0:
                if index % 2:
                    await anext(stream)
                await stream.aclose()  # type: ignore[attr-defined]
                continue
            answer = await read(stream)
            assert 0 < len(answer.tokens) <= sampling.max_tokens and answer.finish_reason == "length"
            assert len(answer.infos) == (0 if sampling.logprobs is None else len(answer.tokens))

    async with running(
        bundle, EngineSection(max_num_seqs=16, max_cache_tokens=700, prefill_chunk=40)
    ) as engine:
        await asyncio.gather(*(client(engine) for _ in range(40)))
        while engine.core.has_work:
            await asyncio.sleep(0.01)
        stats = engine.stats()
        assert (stats.running, stats.waiting, stats.cache_tokens_used) == (0, 0, 0)
        assert engine.core.cache.num_bytes == 0 and not engine._streams
    return sizes[0], sizes[-1]


@in_loop
async def test_two_thousand_mixed_requests_leave_nothing_behind(
    make_bundle: Callable[..., ModelBundle],
) -> None:
    before, after = await hammer(make_bundle("qwen3", hidden_size=32, num_layers=1), 2000)
    assert after < before * 1.05


@pytest.mark.slow
@in_loop
async def test_ten_thousand_mixed_requests_leave_nothing_behind(
    make_bundle: Callable[..., ModelBundle],
) -> None:
    before, after = await hammer(make_bundle("qwen3", hidden_size=32, num_layers=1), 10_000)
    assert after < before * 1.05
