"""The bodies of requests: OpenAI's names, with those of vLLM beside them.

An unknown field is refused: nothing that is asked for is left out silently. The fields in ``_Ignored`` are the client's
own book-keeping and change no answer anywhere.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "AdapterName",
    "AdapterPlace",
    "ChatRequest",
    "CompletionRequest",
    "DetokenizeRequest",
    "EmbeddingRequest",
    "Generation",
    "Message",
    "RerankRequest",
    "ScoreRequest",
    "TokenizeRequest",
    "Tool",
]

LARGEST_SEED = 2**63 - 1
Texts = Annotated[list[str], Field(min_length=1, max_length=2048)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=(), defer_build=True)

    model: str | None = Field(None, description="A name of /v1/models; none: the first of them.")
    user: str | None = Field(None, description="Changes nothing; accepted because clients send it.")


class _Ignored(_Body):
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class StreamOptions(BaseModel):
    """What a stream tells beside the answer."""

    model_config = ConfigDict(extra="forbid", defer_build=True)

    include_usage: bool = False
    include_obfuscation: bool = False


class StructuredOutputs(BaseModel):
    """vLLM's way to say what an answer must look like; one of them."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True, defer_build=True)

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: Texts | None = None
    grammar: str | None = Field(None, description="In llguidance's dialect of Lark.")


class Generation(_Ignored):
    """How an answer is chosen; a field that is not given has the server's default."""

    max_tokens: int | None = Field(None, ge=0)
    max_completion_tokens: int | None = Field(None, ge=0, description="The same as max_tokens.")
    max_completion_length: int | None = Field(None, ge=0, description="The same as max_tokens.")
    min_tokens: int = Field(0, ge=0)
    temperature: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    seed: int | None = Field(None, ge=-LARGEST_SEED - 1, le=LARGEST_SEED)
    stop: str | Annotated[list[str], Field(max_length=64)] | None = None
    stop_token_ids: list[Annotated[int, Field(ge=0)]] = Field(default_factory=list)
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    n: int = Field(1, ge=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Texts | None = None
    guided_grammar: str | None = None


class JsonSchema(BaseModel):
    """A named JSON Schema."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True, defer_build=True)

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """OpenAI's way to say what an answer must look like."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True, defer_build=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Function(BaseModel):
    """A function that the model may call."""

    model_config = ConfigDict(extra="allow", defer_build=True)

    name: str = Field(pattern=r"^[\w.-]{1,128}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(BaseModel):
    """A tool; only functions are known."""

    type: Literal["function"] = "function"
    function: Function


class NamedFunction(BaseModel):
    """Which function must be called."""

    name: str


class NamedTool(BaseModel):
    """Which tool must be called."""

    type: Literal["function"] = "function"
    function: NamedFunction


class Message(BaseModel):
    """One message; templates may read further keys."""

    model_config = ConfigDict(extra="allow", defer_build=True)

    role: str
    content: str | list[str | dict[str, Any]] | None = None
    tool_calls: list[ToolCall] | None = None


class ToolCall(BaseModel):
    """A call in an earlier answer."""

    model_config = ConfigDict(extra="allow", defer_build=True)

    function: CalledFunction


class CalledFunction(BaseModel):
    """Which function was called, and with what."""

    model_config = ConfigDict(extra="allow", defer_build=True)

    name: str
    arguments: str | dict[str, Any] = "{}"


Messages = Annotated[list[Message], Field(min_length=1)]


class ChatRequest(Generation):
    """A conversation to go on with."""

    messages: Messages
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0)
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool = True
    chat_template_kwargs: dict[str, Any] | None = None
    enable_thinking: bool | None = None


class CompletionRequest(Generation):
    """Texts, or their token ids, to go on with."""

    prompt: str | Texts | TokenIds | Annotated[list[TokenIds], Field(min_length=1, max_length=2048)]
    echo: bool = False
    logprobs: int | None = Field(None, ge=0)
    best_of: int | None = Field(None, ge=1)
    response_format: ResponseFormat | None = None


class EmbeddingRequest(_Ignored):
    """Texts, or their token ids, to make vectors of."""

    input: str | Texts | TokenIds | Annotated[list[TokenIds], Field(min_length=1, max_length=2048)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)


class ScoreRequest(_Body):
    """Pairs to score: one text against many, or two lists of the same length."""

    text_1: str | Texts
    text_2: str | Texts


class RerankRequest(_Body):
    """Documents to sort by how well they answer a query."""

    query: str
    documents: Texts
    top_n: int | None = Field(None, ge=1)
    return_documents: bool = True


class TokenizeRequest(_Body):
    """A text or a conversation whose tokens are asked for."""

    prompt: str | None = None
    messages: Messages | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(_Body):
    """Tokens whose text is asked for."""

    tokens: list[Annotated[int, Field(ge=0)]]


class AdapterPlace(BaseModel):
    """An adapter to load."""

    model_config = ConfigDict(extra="forbid", defer_build=True)

    lora_name: str = Field(pattern=r"^[\w.:@/+=-]{1,200}$")
    lora_path: str


class AdapterName(BaseModel):
    """An adapter to take away."""

    model_config = ConfigDict(extra="forbid", defer_build=True)

    lora_name: str
