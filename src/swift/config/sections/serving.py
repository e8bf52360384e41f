"""How a model is served over HTTP."""

from __future__ import annotations

from typing import Literal

from swift.config.option import Section, option


class ServingSection(Section):
    """The server: where it listens, who may ask, how much one request may ask for."""

    host: str = option(
        "127.0.0.1", "Address to listen on; 0.0.0.0 is every address of this machine.", essential=True
    )
    port: int = option(8000, "Port to listen on; 0 takes a free one.", essential=True, ge=0, le=65535)
    api_key: str | None = option(
        None,
        "Key that clients must present; several with commas. Never recorded. Default: SWIFT_API_KEY.",
        essential=True,
    )
    served_model_name: str | None = option(
        None, "Name of the (base) model; default: that of its run or folder.", essential=True
    )
    owned_by: str = option("swift", "Owner that /v1/models tells.")
    ssl_keyfile: str | None = option(None, "Private key (PEM): serve HTTPS, with ssl_certfile.")
    ssl_certfile: str | None = option(None, "Certificate (PEM), with those that vouch for it.")
    ready_file: str | None = option(
        None, "JSON file with url, pid and start time: written once the server answers, removed at its end."
    )
    verbose: bool = option(False, "Log every request.")
    throughput_interval: float = option(
        20.0, "Time between lines of throughput while there is any; 0: none.", unit="seconds", ge=0
    )
    tool_parser: Literal["hermes", "llama3", "mistral", "react", "qwen"] | None = option(
        None, "How the model writes tool calls; default: as its chat template or agent_template says."
    )
    reasoning_parser: Literal["think", "off"] | None = option(
        None, "Tell <think>...</think> apart as reasoning_content; default: when the chat template knows it."
    )
    runtime_adapters: bool | None = option(
        None,
        "Let clients load and unload adapters from folders of this machine; default: only where host is this machine.",
    )
    max_logprobs: int = option(20, "Most alternatives told beside each token.", ge=0)
    max_prompt_tokens: int | None = option(
        None, "Longest prompt; default: as the model allows.", unit="tokens", ge=1
    )
    max_answer_tokens: int | None = option(
        None, "Most that a request may set as max_tokens; default: as the model allows.", unit="tokens", ge=1
    )
    max_choices: int = option(
        128, "Most answers of one request: prompts times n; never more than run and wait together.", ge=1
    )
    max_body_mib: float = option(16.0, "Largest body of a request.", unit="MiB", gt=0)
    max_open_requests: int = option(1024, "HTTP requests in progress together.", ge=1)
    request_timeout_seconds: float = option(
        600.0, "Longest time for one request, from its arrival to its last token.", unit="seconds", gt=0
    )
    drain_seconds: float = option(
        20.0, "Time for running requests to end after SIGTERM or Ctrl-C.", unit="seconds", ge=0
    )
