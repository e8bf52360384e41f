"""``swift deploy``: names of models, defaults, and the real engine behind the real server."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from scripted import running

from swift.config.bind import resolve
from swift.core.errors import ConfigError
from swift.inference.engines.table import make_engine
from swift.inference.server.deploy import make_service
from swift.inference.server.names import find_served
from swift.inference.server.service import Service
from swift.runs.folder import COMPLETE_MARKER

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]


def write_adapter(folder: Path, base: Path, **config: Any) -> Path:
    """An adapter's folder as far as its name and base go."""
    folder.mkdir(parents=True)
    values = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": 8, **config}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    (folder / "adapter_model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    return folder


def names(*words: str) -> tuple[str, dict[str, str]]:
    served = find_served(resolve("deploy", list(words)))
    return served.name, {name: str(context.adapter) for name, context in served.adapters.items()}


def test_names(tmp_path: Path, tiny_model_dir: Path) -> None:
    model = str(tiny_model_dir)
    one, two = (write_adapter(tmp_path / f"run-{n}" / "checkpoint-20", tiny_model_dir) for n in "ab")
    for folder in (one, two):
        (folder / COMPLETE_MARKER).touch()
        (folder.parent / "last").symlink_to("checkpoint-20")
    run = str(one.parent)
    assert names("--model", model) == ("tiny", {})
    assert names("--model", model, "--served_model_name", "mine") == ("mine", {})
    assert names("--adapters", run) == ("tiny", {"run-a": str(one)})
    assert names("--model", run) == ("tiny", {"run-a": str(one)})
    assert names("--adapters", f"{run}/last", str(two))[1].keys() == {"run-a", "run-b-checkpoint-20"}
    assert names("--model", model, "--adapters", f"x={one}", f"y={two.parent}", "--served_model_name", "b") == (
        "b", {"x": str(one), "y": str(two)},
    )  # fmt: skip
    with pytest.raises(ConfigError, match="two models would be called run-a"):
        names("--adapters", run, f"{run}/last")
    with pytest.raises(ConfigError, match="two models would be called tiny"):
        names("--adapters", f"tiny={run}")


def test_adapters_that_do_not_go_together(tmp_path: Path, tiny_model_dir: Path) -> None:
    other = tmp_path / "other"
    other.symlink_to(tiny_model_dir)
    copied = tmp_path / "copied"
    copied.mkdir()
    for file in tiny_model_dir.iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    one = str(write_adapter(tmp_path / "a", tiny_model_dir))
    same = str(write_adapter(tmp_path / "b", other))
    foreign = str(write_adapter(tmp_path / "c", copied))
    dora = str(write_adapter(tmp_path / "d", tiny_model_dir, use_dora=True))
    assert len(names("--adapters", one, same)[1]) == 2
    with pytest.raises(ConfigError, match="c and a do not share a base model"):
        names("--adapters", one, foreign)
    with pytest.raises(ConfigError, match="d can only be served alone"):
        names("--adapters", one, dora)
    served = find_served(resolve("deploy", ["--adapters", dora]))
    assert served.name == "d" and served.context.adapter == Path(dora) and not served.adapters


def service_of(*words: str) -> Service:
    resolved = resolve("deploy", list(words))
    served = find_served(resolved)
    return make_service(served, make_engine(served.context, resolved), resolved)


def test_defaults_of_requests(tmp_path: Path, tiny_model_dir: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny_model_dir.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "generation_config.json").unlink(missing_ok=True)
    words = ["--model", str(folder)]
    plain = service_of(*words).defaults
    assert (plain.temperature, plain.top_p, plain.top_k, plain.max_tokens) == (1.0, 1.0, 0, None)
    stored = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.05}
    (folder / "generation_config.json").write_text(json.dumps(stored))
    found = service_of(*words, "--top_k", "5", "--max_new_tokens", "9", "--stop_words", "END").defaults
    assert (found.temperature, found.top_p, found.repetition_penalty) == (0.6, 0.95, 1.05)
    assert (found.top_k, found.max_tokens, found.stop) == (5, 9, ("END",))
    (folder / "generation_config.json").write_text(json.dumps({**stored, "do_sample": False}))
    assert service_of(*words).defaults.temperature == 1.0


def test_no_request_may_be_larger_than_the_queue(tiny_model_dir: Path) -> None:
    """It would be told to try again for ever."""
    words = ["--model", str(tiny_model_dir), "--max_num_seqs", "2"]
    assert service_of(*words, "--max_waiting", "3").limits.choices == 5
    assert service_of(*words, "--max_waiting", "3", "--max_choices", "4").limits.choices == 4


def test_who_may_load_adapters(tiny_model_dir: Path) -> None:
    words = ["--model", str(tiny_model_dir)]
    assert service_of(*words).read_adapter is not None
    assert service_of(*words, "--host", "0.0.0.0").read_adapter is None
    assert service_of(*words, "--host", "0.0.0.0", "--runtime_adapters", "true").read_adapter is not None
    assert service_of(*words, "--runtime_adapters", "false").read_adapter is None


# The real engine


@pytest.fixture(scope="module")
def real(tiny_model_dir: Path) -> Iterator[tuple[str, Service]]:
    service = service_of("--model", str(tiny_model_dir), "--max_num_seqs", "16", "--device", "cpu")
    with running(service, start=True) as url:
        yield url, service


def test_a_reward_model_is_served_and_scores_as_transformers_does(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From ``swift rlhf --rlhf_type rm`` to ``/v1/score``: the sigmoid of its score."""
    import torch
    from peft import PeftModelForSequenceClassification
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from swift.runs.cards import end_card_lines
    from swift.train.run import train

    monkeypatch.setenv("SWIFT_HOME", str(tmp_path / "home"))
    rows = tmp_path / "pairs.jsonl"
    turns = [{"role": "user", "content": "tall?"}, {"role": "assistant", "content": "red blue"}]
    row = json.dumps({"messages": turns, "rejected_response": "cat dog"})
    rows.write_text(f"{row}\n" * 8)
    values = {"model": str(tiny_model_dir), "rlhf_type": "rm", "dataset": str(rows), "device": "cpu"}
    values |= {
        "output_dir": str(tmp_path / "out"),
        "max_steps": 6,
        "learning_rate": 1e-2,
        "lora_dropout": 0.0,
    }
    run = train(resolve("rlhf", values=values), say=lambda text: None)
    shown = [text for _, text in end_card_lines(run.folder, run.summary)]
    assert f"swift deploy --adapters {run.folder / 'last'}" in shown
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir, num_labels=1)
    model = PeftModelForSequenceClassification.from_pretrained(base, run.folder / "last").eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    model.config.pad_token_id = tokenizer.pad_token_id
    expected = []
    for answer in ("red blue", "cat dog"):
        text = tokenizer.apply_chat_template(
            [turns[0], {"role": "assistant", "content": answer}], tokenize=False
        )
        with torch.no_grad():
            logits = model(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).logits
        expected.append(float(logits.sigmoid()))
    service = service_of("--adapters", str(run.folder / "last"), "--device", "cpu")
    with running(service, start=True) as url:
        body = {"model": next(iter(service.models)), "text_1": "tall?", "text_2": ["red blue", "cat dog"]}
        found = httpx.post(f"{url}/v1/score", json=body).json()
        ranks = httpx.post(
            f"{url}/v1/rerank", json={"model": body["model"], "query": "tall?", "documents": body["text_2"]}
        ).json()
    assert [entry["score"] for entry in found["data"]] == pytest.approx(expected, abs=1e-4)
    assert expected[0] > expected[1] + 0.1
    assert [entry["index"] for entry in ranks["results"]] == [0, 1]


def idle(service: Service) -> bool:
    stats = service.engine.stats()
    return stats.running == stats.waiting == 0 and service.open_requests == 0


def test_an_answer_is_what_transformers_generates(real: tuple[str, Service], tiny_model_dir: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    url, service = real
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    prompt = service.models["tiny"].template.encode_prompt(HELLO)
    with torch.inference_mode():
        output = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
        logits = model(output).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    expected = output[0, len(prompt) :].tolist()
    with openai.OpenAI(base_url=f"{url}/v1", api_key="-") as client:
        answer = client.chat.completions.create(
            model="tiny", messages=HELLO, max_tokens=12, temperature=0, logprobs=True, top_logprobs=2
        )
        told = answer.choices[0].logprobs
        assert told is not None and told.content is not None
        assert answer.choices[0].message.content == service.tokenizer.decode(
            expected, skip_special_tokens=True
        )
        shown = [token for token in expected if token not in service.models["tiny"].template.stop_token_ids]
        for token, place, entry in zip(shown, logits, told.content, strict=True):
            assert entry.logprob == pytest.approx(place[token].item(), abs=1e-4)
            assert entry.top_logprobs[1].logprob == pytest.approx(place.topk(2).values[1].item(), abs=1e-4)
        parts = client.chat.completions.create(
            model="tiny", messages=HELLO, max_tokens=12, temperature=0, stream=True
        )
        assert (
            "".join(part.choices[0].delta.content or "" for part in parts)
            == answer.choices[0].message.content
        )


def test_forms_and_calls_hold_with_the_real_engine(real: tuple[str, Service]) -> None:
    url, _ = real
    schema = {"type": "object", "properties": {"a": {"enum": [1, 22]}}, "required": ["a"]}
    schema["additionalProperties"] = False
    tool = {"type": "function", "function": {"name": "pick", "parameters": schema}}
    with openai.OpenAI(base_url=f"{url}/v1", api_key="-") as client:
        form: Any = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
        answer = client.chat.completions.create(
            model="tiny", messages=HELLO, response_format=form, max_tokens=200, seed=1
        )
        assert json.loads(answer.choices[0].message.content or "")["a"] in (1, 22)
        called = client.chat.completions.create(
            model="tiny", messages=HELLO, tools=[tool], max_tokens=200, seed=1, parallel_tool_calls=False,  # type: ignore[list-item]
            tool_choice={"type": "function", "function": {"name": "pick"}},
        )  # fmt: skip
        call: Any = (called.choices[0].message.tool_calls or [])[0]
        assert called.choices[0].finish_reason == "tool_calls"
        assert call.function.name == "pick" and json.loads(call.function.arguments)["a"] in (1, 22)
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(
                model="tiny", messages=HELLO, stream=True, extra_body={"guided_regex": "("}
            )


def hammer(url: str, service: Service, count: int, threads: int, seed: int) -> dict[int, int]:
    """Mixed requests, some malformed, some whose clients leave early; returns how often each status came."""
    statuses: dict[int, int] = {}
    lock = threading.Lock()
    numbers = iter(range(count))

    def one(client: httpx.Client, draw: random.Random) -> int:
        body: dict[str, Any] = {
            "messages": HELLO,
            "max_tokens": draw.randint(1, 12),
            "seed": draw.randint(0, 9),
        }
        kind = draw.randint(0, 9)
        if kind == 0:
            headers = {"Content-Type": "application/json"}
            return client.post("/v1/chat/completions", content=b"{", headers=headers).status_code
        if kind == 1:
            return client.post("/v1/chat/completions", json={**body, "temperature": -1}).status_code
        if kind == 2:
            return client.post("/v1/chat/completions", json={**body, "model": "nobody"}).status_code
        if kind == 3:
            return client.post(
                "/v1/completions", json={"prompt": ["a", "b c"], "n": 2, "max_tokens": 3}
            ).status_code
        if kind == 4:
            return client.post(
                "/v1/chat/completions", json={**body, "stop": ["e"], "logprobs": True}
            ).status_code
        if kind == 5:
            return client.post("/v1/chat/completions", json={**body, "guided_regex": "[ab]{3}"}).status_code
        leaves = kind in (6, 7)
        body |= {"stream": True, "n": draw.randint(1, 2), "max_tokens": 40 if leaves else 6}
        with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            for line, _ in enumerate(answer.iter_lines()):
                if leaves and line > 2:
                    break
            return answer.status_code

    def work(number: int) -> None:
        draw = random.Random(seed * 1000 + number)
        with httpx.Client(base_url=url, timeout=120) as client:
            while True:
                with lock:
                    if next(numbers, None) is None:
                        return
                status = one(client, draw)
                with lock:
                    statuses[status] = statuses.get(status, 0) + 1

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return statuses


def settle(service: Service) -> None:
    from test_refusals import until

    until(lambda: idle(service))


def test_mixed_requests_leave_nothing_behind(real: tuple[str, Service]) -> None:
    url, service = real
    statuses = hammer(url, service, 150, 8, seed=1)
    settle(service)
    assert set(statuses) == {200, 400, 404, 422} and sum(statuses.values()) == 150
    assert service.engine.stats().cache_tokens_used == 0
    assert service.metrics.disconnects > 0


@pytest.mark.slow
def test_ten_thousand_mixed_requests(real: tuple[str, Service]) -> None:
    """No crash, no slot that leaks, memory that does not grow."""
    url, service = real
    hammer(url, service, 1000, 16, seed=2)  # caches fill
    settle(service)
    before = psutil.Process().memory_info().rss
    statuses = hammer(url, service, 10_000, 16, seed=3)
    settle(service)
    grown = psutil.Process().memory_info().rss / before - 1
    assert set(statuses) <= {200, 400, 404, 422, 429} and sum(statuses.values()) == 10_000
    assert service.engine.stats().cache_tokens_used == 0
    assert grown <= 0.05
    assert (
        httpx.post(f"{url}/v1/chat/completions", json={"messages": HELLO, "max_tokens": 2}).status_code == 200
    )
