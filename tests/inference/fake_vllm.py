"""A server with the endpoints and words of vLLM that counts up from a prompt's last token; run as a module."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse

app = FastAPI()
adapters: dict[str, str] = {}
open_streams = 0
METRICS = (
    'vllm:kv_cache_usage_perc{engine="0"} 0.25\n'
    'vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="100"} 1.0\n'
)


@app.get("/health")
def health() -> PlainTextResponse:
    return PlainTextResponse("")


@app.get("/metrics")
def metrics() -> PlainTextResponse:
    return PlainTextResponse(METRICS)


@app.get("/v1/models")
def models() -> dict:
    return {"data": [{"id": "base", "max_model_len": 64}], "open_streams": open_streams, "argv": sys.argv}


@app.post("/v1/load_lora_adapter")
async def load(request: Request):
    body = await request.json()
    adapters[body["lora_name"]] = body["lora_path"]
    return PlainTextResponse("ok")


@app.post("/v1/unload_lora_adapter")
async def unload(request: Request):
    adapters.pop((await request.json())["lora_name"])
    return PlainTextResponse("ok")


@app.post("/v1/completions")
async def complete(request: Request):
    body = await request.json()
    if "structured_outputs" in body:  # vLLM has answered 200 when it finds out
        fault = json.dumps({"error": {"message": "no such grammar", "code": 400}})
        return StreamingResponse(
            iter([f"data: {fault}\n\n", "data: [DONE]\n\n"]), media_type="text/event-stream"
        )
    if body["temperature"] > 2:
        return JSONResponse({"error": {"message": "too hot"}}, 400)
    if body["prompt"][0] == 13:
        return JSONResponse({"error": {"message": "broke"}}, 500)
    if body["prompt"][0] == 99:
        os._exit(1)
    choices = [choice(body, number) for number in range(body["max_tokens"])]
    if not body["stream"]:
        whole = {"token_ids": [t for one in choices for t in one["token_ids"]], "finish_reason": "length"}
        whole["prompt_logprobs"] = [
            None,
            *({str(t): {"logprob": -t / 8}, "7": {"logprob": -0.5}} for t in body["prompt"][1:]),
        ]
        return {"choices": [whole]}
    return StreamingResponse(lines(body, choices), media_type="text/event-stream")


def choice(body: dict, number: int) -> dict:
    token = body["prompt"][-1] + 1 + number + (100 if body["model"] != "base" else 0)
    answer = {"token_ids": [token], "finish_reason": None, "logprobs": None}
    if body.get("logprobs") is not None:
        top = {f"token_id:{token}": -2.0, "token_id:1": -1.0, "token_id:2": -1.5}
        answer["logprobs"] = {
            "tokens": [f"token_id:{token}"],
            "token_logprobs": [-2.0],
            "top_logprobs": [top],
        }
    if number == body["max_tokens"] - 1:
        answer["finish_reason"] = "length"
    return answer


async def lines(body: dict, choices: list[dict]):
    global open_streams
    open_streams += 1
    try:
        for one in choices:
            yield f"data: {json.dumps({'choices': [one]})}\n\n"
            while body["prompt"][0] == 50:  # never ends
                await asyncio.sleep(0.02)
                yield ": waiting\n\n"
        yield "data: [DONE]\n\n"
    finally:
        open_streams -= 1


if __name__ == "__main__":
    if os.environ.get("FAKE") == "dies":
        sys.exit("no such model")
    if os.environ.get("FAKE") == "hangs":
        time.sleep(600)
    uvicorn.run(app, uds=sys.argv[sys.argv.index("--uds") + 1], log_level="warning")
