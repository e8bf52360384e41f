"""The vLLM engine against a server that speaks as vLLM does; the real one is in tests/real_vllm."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import sysconfig
from pathlib import Path

import pytest
from tests.toolchains.fakes import bare_toolchain, exists

from swift.config.bind import resolve
from swift.config.sections.engine import EngineSection
from swift.config.sections.template import TemplateSection
from swift.config.sections.vllm import VllmSection
from swift.core.errors import ConfigError, ModelError, SwiftError
from swift.inference.context import InferenceContext
from swift.inference.engines.base import EngineBusy, EngineClosing, Grammar, Request, SamplingOptions
from swift.inference.engines.vllm import VllmEngine, make
from swift.inference.engines.vllm_server import Launch, check_weights, server_arguments, server_variables


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment in which the vLLM command line is the server beside this file."""
    monkeypatch.setenv("SWIFT_HOME", str(tmp_path))
    package = tmp_path / "modules" / "vllm" / "entrypoints" / "cli"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").touch()
    shutil.copy(Path(__file__).with_name("fake_vllm.py"), package / "main.py")
    bare_toolchain(tmp_path)
    return tmp_path


def make_adapter(folder: Path, **config: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"r": 8, **config}))
    return folder


def make_engine(place: Path, fake: str = "", default: Path | None = None, **settings: object) -> VllmEngine:
    path = os.pathsep.join([str(place / "modules"), sysconfig.get_paths()["purelib"]])
    variables = {"PYTHONPATH": path, "FAKE": fake}
    return VllmEngine(
        Launch(Path("/model"), variables=variables, **settings),
        log=place / "server.log",
        default_adapter=default,
    )


@contextlib.asynccontextmanager
async def running(place: Path, **settings: object):
    engine = make_engine(place, **settings)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


async def collect(engine: VllmEngine, prompt: list[int], adapter: str | None = None, **sampling: object):
    request = Request(f"r{prompt}", prompt, SamplingOptions(**sampling), adapter)
    return [delta async for delta in engine.submit(request)]


def tokens(deltas: list) -> list[int]:
    return [token for delta in deltas for token in delta.tokens]


async def speak(place: Path) -> None:
    loaded = make_adapter(place / "a")
    section = VllmSection(vllm_enable_lora=True)
    async with running(place, section=section) as engine:
        assert engine.max_model_len == 64
        # Many at once; streamed; reasons and log-probabilities.
        answers = await asyncio.gather(
            *(collect(engine, [n, n], max_tokens=3, logprobs=2) for n in range(1, 9))
        )
        for n, deltas in enumerate(answers, 1):
            assert tokens(deltas) == [n + 1, n + 2, n + 3]
            assert [delta.finish_reason for delta in deltas] == [None, None, "length"]
            (info,) = deltas[0].infos
            assert (info.token, info.logprob, info.top) == (n + 1, -2.0, ((1, -1.0), (2, -1.5)))
        (chosen,) = (await collect(engine, [4], max_tokens=1, logprobs=0))[0].infos
        assert (chosen.logprob, chosen.top) == (-2.0, ())
        # An answer never leaves the model's window.
        assert len(tokens(await collect(engine, [1] * 60, max_tokens=100))) == 4
        # The prompt's log-probabilities.
        (delta,) = await collect(engine, [3, 4, 8], max_tokens=2, prompt_logprobs=1)
        assert [(info.token, info.logprob, info.top) for info in delta.prompt_infos] == [
            (4, -0.5, ((4, -0.5),)),
            (8, -1.0, ((7, -0.5),)),
        ]
        assert (delta.tokens, delta.finish_reason) == ((9, 10), "length")
        # Adapters.
        await engine.load_adapter("tone", loaded)
        assert engine.adapters() == {"tone": loaded}
        assert tokens(await collect(engine, [5], "tone", max_tokens=1)) == [106]
        with pytest.raises(ConfigError, match="already"):
            await engine.load_adapter("tone", loaded)
        with pytest.raises(ModelError, match=r"rank 99[\s\S]*--vllm_max_lora_rank 99"):
            await engine.load_adapter("big", make_adapter(place / "big", r=99))
        with pytest.raises(ModelError, match="use_dora is set"):
            await engine.load_adapter("dora", make_adapter(place / "dora", use_dora=True))
        await engine.unload_adapter("tone")
        with pytest.raises(ConfigError, match="no adapter 'tone'"):
            await collect(engine, [5], "tone")
        # Refusals and failures.
        with pytest.raises(ConfigError, match="no such grammar"):
            await collect(engine, [5], grammar=Grammar("regex", "("))
        with pytest.raises(ConfigError, match="too hot"):
            await collect(engine, [5], temperature=3.0)
        with pytest.raises(ConfigError, match="64 tokens, prompt and answer may have 64"):
            await collect(engine, [5] * 64)
        with pytest.raises(ConfigError, match="at most 20 alternatives"):
            await collect(engine, [5], logprobs=21)
        with pytest.raises(ConfigError, match="write text"):
            await engine.pool([[1]])
        (failed,) = await collect(engine, [13])
        assert (failed.finish_reason, failed.error) == ("error", "vLLM: broke")
        # Closing an iterator early ends the request on the server too.
        stream = engine.submit(Request("long", [50]))
        assert (await anext(stream)).tokens == (51,)
        await stream.aclose()
        while (await engine._call("GET", "/v1/models"))["open_streams"]:
            await asyncio.sleep(0.01)
        while not engine.stats().cache_tokens:
            await asyncio.sleep(0.01)
        stats = engine.stats()
        assert (stats.running, stats.aborted_total, stats.cache_tokens, stats.cache_tokens_used) == (
            0,
            1,
            1600,
            400,
        )
        assert stats.generated_tokens_total == 8 * 3 + 1 + 4 + 2 + 1 + 1


def test_the_engine_speaks_with_its_server(place: Path) -> None:
    asyncio.run(asyncio.wait_for(speak(place), 100))


def test_closing_lets_requests_end_and_cancels_those_that_do_not(place: Path) -> None:
    async def body() -> None:
        engine = make_engine(place, options=EngineSection(max_num_seqs=1, max_waiting=1))
        await engine.start()
        assert engine._child is not None
        pid = engine._child.pid
        streams = [engine.submit(Request(str(n), [50])) for n in range(2)]
        with pytest.raises(EngineBusy, match="running and waiting"):
            engine.submit(Request("third", [50]))
        assert (engine.stats().running, engine.stats().waiting) == (1, 1)
        await anext(streams[0])
        await engine.close(drain_seconds=0.05)
        assert [delta.finish_reason async for delta in streams[0]] == ["abort"]
        with pytest.raises(EngineClosing):
            engine.submit(Request("late", [1]))
        assert not exists(pid)

    asyncio.run(asyncio.wait_for(body(), 100))


def test_a_server_that_does_not_start_says_why(place: Path) -> None:
    with pytest.raises(SwiftError, match=r"vLLM did not start[\s\S]*no such model"):
        asyncio.run(make_engine(place, fake="dies").start())
    slow = VllmSection(vllm_start_seconds=1)
    with pytest.raises(SwiftError, match=r"not ready after 1 s[\s\S]*--vllm_start_seconds"):
        asyncio.run(make_engine(place, fake="hangs", section=slow).start())


def test_requests_of_a_server_that_dies_end_with_its_log(place: Path) -> None:
    async def body() -> None:
        async with running(place) as engine:
            assert engine.is_alive
            (delta,) = await collect(engine, [99])
            assert delta.finish_reason == "error"
            assert delta.error is not None and delta.error.startswith("vLLM")
            while engine.is_alive:
                await asyncio.sleep(0.01)
            with pytest.raises(SwiftError, match="vLLM has ended"):
                engine.submit(Request("next", [1]))

    asyncio.run(asyncio.wait_for(body(), 100))


def test_the_adapter_of_the_model_answers_when_none_is_named(place: Path) -> None:
    async def body() -> None:
        async with running(place, default=make_adapter(place / "own")) as engine:
            assert engine.adapters() == {}
            assert tokens(await collect(engine, [5], max_tokens=1)) == [106]
            argv = (await engine._call("GET", "/v1/models"))["argv"]
            assert argv[argv.index("--lora-modules") + 1] == f"model-adapter={place / 'own'}"

    asyncio.run(asyncio.wait_for(body(), 100))


def test_options_become_words_of_vllm(tmp_path: Path) -> None:
    words = {
        "max_num_seqs": "8", "max_model_len": "99", "vllm_gpu_memory_utilization": "0.5", "vllm_quantization": "awq",
        "vllm_tensor_parallel_size": "4", "enforce_eager": "true", "vllm_enable_prefix_caching": "false",
        "vllm_speculative_config": '{"method": "ngram"}', "vllm_cpu_cache_gib": "1.5", "vllm_enable_lora": "true",
        "vllm_engine_kwargs": '{"max_num_batched_tokens": 4096, "async_scheduling": false}',
    }  # fmt: skip
    argv = [word for key, value in words.items() for word in (f"--{key}", value)]
    config = resolve("infer", ["--model", "m", "--infer_backend", "vllm", *argv]).config
    launch = Launch(
        Path("/m"), config.engine, config.vllm, adapters={"a": make_adapter(tmp_path / "a", r=20)}
    )
    found = server_arguments(launch, Path("/s"))
    assert found[:4] == ["-m", "vllm.entrypoints.cli.main", "serve", "/m"]
    after = {word: found[index + 1] for index, word in enumerate(found[:-1]) if word.startswith("--")}
    assert {
        "--max-num-seqs": "8", "--max-model-len": "99", "--gpu-memory-utilization": "0.5", "--quantization": "awq",
        "--tensor-parallel-size": "4", "--speculative-config": '{"method": "ngram"}', "--max-lora-rank": "32",
        "--max-num-batched-tokens": "4096", "--logprobs-mode": "processed_logprobs",
    }.items() <= after.items()  # fmt: skip
    assert {"--enforce-eager", "--enable-lora", "--no-enable-prefix-caching", "--no-async-scheduling"} <= set(
        found
    )
    assert server_variables(launch, "cpu")["VLLM_CPU_KVCACHE_SPACE"] == "2"
    assert "VLLM_CPU_KVCACHE_SPACE" not in server_variables(launch, "cuda")


def test_a_server_is_ready_for_the_adapters_it_will_get(place: Path) -> None:
    (place / "config.json").write_text("{}")
    adapter = make_adapter(place / "a", r=40)
    (adapter / "adapter_model.safetensors").touch()
    context = InferenceContext(place, None, TemplateSection(), False, None)
    head = ["--model", str(place), "--infer_backend", "vllm", "--num_threads", "3"]

    def launch(*argv: str) -> Launch:
        return make(context, resolve("deploy", [*head, *argv])).launch

    plain = launch()
    assert (plain.takes_adapters, plain.dtype, plain.variables) == (
        False,
        "float32",
        {"OMP_NUM_THREADS": "3"},
    )
    assert launch("--runtime_adapters", "true").max_lora_rank == 16
    named = launch("--adapters", f"x={adapter}", "--max_logprobs", "3", "--torch_dtype", "bfloat16")
    assert (named.takes_adapters, named.max_lora_rank, named.max_logprobs) == (True, 64, 3)
    assert named.dtype == "bfloat16"
    with pytest.raises(ConfigError, match="toolchain is built for cpu"):
        launch("--device", "cuda:1")
    context.quantization.quant_method, context.quantization.quant_bits = "bnb", 4
    with pytest.raises(ConfigError, match="swift export"):
        launch()


def test_some_weights_and_heads_need_a_cpu_that_vllm_has_a_kernel_for(tmp_path: Path) -> None:
    group = {"weights": {"num_bits": 4}}
    for quantised in ({"quant_method": "awq", "bits": 4}, {"config_groups": {"group_0": group}}):
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantised}))
        with pytest.raises(ModelError, match="need AVX-512"):
            check_weights(tmp_path, ["avx2"])
        check_weights(tmp_path, ["avx2", "avx512f"])
    for fine in ({}, {"quantization_config": {"quant_method": "fp8"}}, {"quantization_config": {"bits": 8}}):
        (tmp_path / "config.json").write_text(json.dumps(fine))
        check_weights(tmp_path, ["avx2"])
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 64, "num_attention_heads": 4}))
    with pytest.raises(ModelError, match="attention heads of 16"):
        check_weights(tmp_path, ["avx512f"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--vllm_quantization", "awq"], "has no effect with infer_backend transformers"),
        (["--infer_backend", "vllm", "--prefill_chunk", "64"], "has no effect with infer_backend vllm"),
    ],
)
def test_options_of_another_engine_are_refused(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve("infer", ["--model", "m", *argv])
