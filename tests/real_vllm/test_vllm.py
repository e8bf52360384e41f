"""The real vLLM, in its toolchain: what it answers, against transformers (``make test-vllm``, some minutes)."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from swift.config.sections.engine import EngineSection
from swift.config.sections.vllm import VllmSection
from swift.core.devices import describe_cpu
from swift.core.errors import ConfigError
from swift.inference.engines.base import Delta, Grammar, Request, SamplingOptions
from swift.inference.engines.vllm import VllmEngine
from swift.inference.engines.vllm_server import Launch
from swift.models.tiny import make_tiny_model
from swift.toolchains.child import Child
from swift.toolchains.toolchain import ToolchainError, find_toolchain

CLOSE = 5e-3
"""Largest difference of log-probabilities to transformers."""
PROMPTS = [[5, 9, 200, 31], [7] * 20, list(range(300, 340))]
START_SECONDS = 1800.0


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("vllm") / "model", config={"head_dim": 32})


def make_adapter(model_dir: Path, folder: Path, seed: int) -> Path:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    peft = get_peft_model(
        model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
    )
    peft.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(model_dir: Path) -> dict[str, Path]:
    return {name: make_adapter(model_dir, model_dir.parent / name, seed) for seed, name in enumerate("ab", 1)}


@torch.no_grad()
def reference(model_dir: Path, ids: list[int], adapter: Path | None = None) -> torch.Tensor:
    """Log-probabilities [seq, vocab] by transformers in float32."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    return torch.log_softmax(model.eval()(torch.tensor([ids])).logits[0], -1)


class Server:
    """A started engine and the loop it lives in."""

    def __init__(self, launch: Launch, log: Path) -> None:
        self.loop = asyncio.new_event_loop()
        self.engine = VllmEngine(launch, log=log)
        self.do(self.engine.start())

    def do(self, work: Any) -> Any:
        return self.loop.run_until_complete(work)

    def ask(self, *asked: tuple[list[int], str | None, SamplingOptions]) -> list[list[Delta]]:
        """The answers to requests made at once."""

        async def one(number: int) -> list[Delta]:
            prompt, adapter, sampling = asked[number]
            request = Request(f"{time.monotonic()}-{number}", prompt, sampling, adapter)
            return [delta async for delta in self.engine.submit(request)]

        async def everything() -> list[list[Delta]]:
            return await asyncio.gather(*(one(number) for number in range(len(asked))))

        return self.do(asyncio.wait_for(everything(), 600))


@pytest.fixture(scope="module")
def server(model_dir: Path, adapters: dict[str, Path]) -> Iterator[Server]:
    launch = Launch(
        model_dir,
        EngineSection(max_num_seqs=16, max_model_len=256),
        VllmSection(vllm_start_seconds=START_SECONDS, vllm_cpu_cache_gib=1, vllm_enforce_eager=True),
        adapters={"a": adapters["a"]},
        dtype="float32",
        variables={"OMP_NUM_THREADS": "1"},
    )
    started = Server(launch, model_dir.parent / "server.log")
    yield started
    started.do(started.engine.close())


def check_infos(deltas: list[Delta], logprobs: torch.Tensor, num_prompt: int) -> None:
    """Each token told is as likely as transformers finds it, and so are the alternatives."""
    infos = [info for delta in deltas for info in delta.infos]
    tokens = [token for delta in deltas for token in delta.tokens]
    assert [info.token for info in infos] == tokens
    for place, info in enumerate(infos, num_prompt - 1):
        for token, logprob in ((info.token, info.logprob), *info.top):
            assert abs(logprobs[place, token].item() - logprob) < CLOSE
        best = logprobs[place].topk(len(info.top)).values
        assert torch.allclose(best, torch.tensor([logprob for _, logprob in info.top]), atol=CLOSE)


def test_log_probabilities_are_those_of_transformers(server: Server, model_dir: Path) -> None:
    sampling = SamplingOptions(max_tokens=8, temperature=0, logprobs=5)
    for prompt, deltas in zip(PROMPTS, server.ask(*((p, None, sampling) for p in PROMPTS)), strict=True):
        tokens = [token for delta in deltas for token in delta.tokens]
        assert len(tokens) == 8
        assert deltas[-1].finish_reason == "length"
        check_infos(deltas, reference(model_dir, prompt + tokens), len(prompt))


def test_prompts_are_scored(server: Server, model_dir: Path) -> None:
    sampling = SamplingOptions(max_tokens=1, temperature=0, prompt_logprobs=2)
    ((delta,),) = server.ask((PROMPTS[2], None, sampling))
    logprobs = reference(model_dir, PROMPTS[2])
    told = [info.logprob for info in delta.prompt_infos]
    wanted = [logprobs[place, token].item() for place, token in enumerate(PROMPTS[2][1:])]
    assert max(abs(one - two) for one, two in zip(told, wanted, strict=True)) < CLOSE


def test_adapters_answer_side_by_side_also_those_loaded_later(
    server: Server, model_dir: Path, adapters: dict[str, Path]
) -> None:
    server.do(server.engine.load_adapter("b", adapters["b"]))
    sampling = SamplingOptions(max_tokens=3, temperature=0, logprobs=3)
    asked = [(PROMPTS[0], name, sampling) for name in (None, "a", "b") for _ in range(2)]
    first = []
    for (prompt, name, _), deltas in zip(asked, server.ask(*asked), strict=True):
        tokens = [token for delta in deltas for token in delta.tokens]
        check_infos(
            deltas, reference(model_dir, prompt + tokens, adapters[name] if name else None), len(prompt)
        )
        first.append(deltas[0].infos[0].logprob)
    assert len({round(value, 2) for value in first}) == 3, "base and adapters answer differently"
    server.do(server.engine.unload_adapter("b"))
    with pytest.raises(ConfigError, match="no adapter 'b'"):
        server.ask((PROMPTS[0], "b", sampling))


def test_sampling_follows_its_options(server: Server, model_dir: Path) -> None:
    hot = SamplingOptions(max_tokens=6, temperature=2.0, seed=3, logprobs=1)
    one, two, other = server.ask(
        (PROMPTS[0], None, hot),
        (PROMPTS[0], None, hot),
        (PROMPTS[0], None, SamplingOptions(max_tokens=6, seed=4)),
    )
    tokens = [[token for delta in deltas for token in delta.tokens] for deltas in (one, two, other)]
    assert tokens[0] == tokens[1] != tokens[2]
    # Log-probabilities are those of what was sampled from: after the temperature.
    scaled = torch.log_softmax(reference(model_dir, PROMPTS[0] + tokens[0]) / 2, -1)
    check_infos(one, scaled, len(PROMPTS[0]))
    forced = SamplingOptions(
        max_tokens=9, temperature=0, logit_bias={42: 100.0}, stop_token_ids=(42,), min_tokens=2
    )
    ((*_, last),) = server.ask((PROMPTS[0], None, forced))
    assert (last.finish_reason, last.tokens[-1]) == ("stop", 42)


def test_a_grammar_holds(server: Server, model_dir: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    asked = {
        "regex": Grammar("regex", "(yes|no)"),
        "lark": Grammar("lark", 'start: "maybe" | "never"'),
        "json": Grammar("json_schema", json.dumps({"enum": ["x"]})),
    }
    end = (tokenizer.eos_token_id,)
    answers = server.ask(
        *(
            (PROMPTS[0], None, SamplingOptions(max_tokens=20, grammar=g, stop_token_ids=end))
            for g in asked.values()
        )
    )
    texts = [
        tokenizer.decode([t for d in deltas for t in d.tokens], skip_special_tokens=True)
        for deltas in answers
    ]
    assert texts[0] in ("yes", "no")
    assert texts[1] in ("maybe", "never")
    assert json.loads(texts[2]) == "x"
    with pytest.raises(ConfigError, match="vLLM refuses"):
        server.ask((PROMPTS[0], None, SamplingOptions(grammar=Grammar("regex", "("))))


def test_a_cancelled_request_frees_its_place(server: Server) -> None:
    async def body() -> None:
        stream = server.engine.submit(Request("long", PROMPTS[0], SamplingOptions(max_tokens=200)))
        await anext(stream)
        await stream.aclose()
        while "vllm:num_requests_running" not in (text := await server.engine._call("GET", "/metrics")) or (
            sum(
                float(line.split()[-1])
                for line in text.splitlines()
                if line.startswith("vllm:num_requests_running{")
            )
        ):
            await asyncio.sleep(0.05)

    server.do(asyncio.wait_for(body(), 120))
    assert server.engine.stats().running == 0


def test_awq_written_by_gptqmodel_is_served_by_the_articles_command(model_dir: Path, tmp_path: Path) -> None:
    """``python -m vllm.entrypoints.openai.api_server --model DIR --dtype half --quantization awq``."""
    try:
        quantiser = find_toolchain("gptqmodel")
    except ToolchainError:
        pytest.skip("swift toolchain install gptqmodel")
    big = make_tiny_model(tmp_path / "model", hidden_size=256, config={"head_dim": 64})
    folder = tmp_path / "awq"
    payload = {"model": str(big), "output": str(folder)}
    quantiser.run(Path(__file__).with_name("write_awq.py"), payload, deadline_seconds=1800)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [
        "--model",
        str(folder),
        "--dtype",
        "half",
        "--tensor_parallel_size",
        "1",
        "--quantization",
        "awq",
    ]
    variables = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    log = Path(os.environ.get("VLLM_TEST_LOG", tmp_path / "server.log"))
    child = find_toolchain("vllm").spawn(
        ["-m", "vllm.entrypoints.openai.api_server", *words, "--port", str(port), "--enforce-eager",
         "--max-model-len", "256", "--host", "127.0.0.1"],
        log=log, variables=variables,
    )  # fmt: skip
    with child:
        assert call(child, port, "GET", "/health")[0] == 200  # the weights are loaded
        if "avx512f" not in describe_cpu()["features"]:
            pytest.skip("it was loaded; to compute with 4 bits, vLLM's kernels for CPUs need AVX-512")
        body = {"model": str(folder), "prompt": PROMPTS[0], "max_tokens": 4, "temperature": 0, "logprobs": 1}
        status, text = call(child, port, "POST", "/v1/completions", json.dumps(body))
    assert status == 200, text
    choice = json.loads(text)["choices"][0]
    assert choice["finish_reason"] == "length"
    # Four bits move the log-probability of the likeliest first token a little, not a lot.
    best = reference(big, PROMPTS[0])[-1].max().item()
    assert abs(choice["logprobs"]["token_logprobs"][0] - best) < 0.5


def call(child: Child, port: int, method: str, path: str, body: str | None = None) -> tuple[int, str]:
    """Status and text of an answer, asked for again until the server listens."""
    end = time.monotonic() + START_SECONDS
    while True:
        assert child.poll() is None and time.monotonic() < end, child.log_tail()
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
            connection.request(method, path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        except ConnectionRefusedError:
            time.sleep(0.5)
