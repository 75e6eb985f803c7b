"""The shapes of answers, for the served OpenAPI document and the tests that hold answers to it."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Shape(BaseModel):
    """An answer, or a part of one, that has just these fields."""

    model_config = ConfigDict(extra="forbid")


class ErrorDetail(Shape):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(Shape):
    error: ErrorDetail


class PromptTokensDetails(Shape):
    cached_tokens: int


class Usage(Shape):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class BatonReport(Shape):
    """How a choice travelled: bytes, milliseconds, workers."""

    transport: str
    kv_bytes: int
    phases_ms: dict[str, float]
    prefill_worker: str
    decode_worker: str
    seed: int
    replays: int


class BatonReports(Shape):
    """Of an answer of several choices."""

    choices: list[BatonReport]


class LegacyLogprobs(Shape):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(Shape):
    index: int
    text: str
    logprobs: LegacyLogprobs | None
    finish_reason: Literal["stop", "length", "abort"] | None
    stop_reason: str | int | None
    token_ids: list[int] = []


class Completion(Shape):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage
    baton: BatonReport | BatonReports


class TokenLogprob(Shape):
    token: str
    logprob: float | None
    bytes: list[int] | None


class TokenLogprobs(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(Shape):
    content: list[TokenLogprobs]
    refusal: None


class ChatAnswerMessage(Shape):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(Shape):
    index: int
    message: ChatAnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "abort"] | None
    stop_reason: str | int | None
    token_ids: list[int] = []


class ChatCompletion(Shape):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    baton: BatonReport | BatonReports


class ModelCard(Shape):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    vocab_size: int


class ModelList(Shape):
    object: Literal["list"]
    data: list[ModelCard]


class Tokens(Shape):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Text(Shape):
    prompt: str


class Health(Shape):
    status: Literal["ok", "unavailable"]
    reason: str
    registry: str = Field(
        description="Why the list of workers is not up to date; empty while it is."
    )


class WorkerCard(Shape):
    id: str
    role: str
    address: str
    pid: int
    engine_pids: list[int]
    state: str
    reason: str
    transports: list[str]
    pages: dict[str, int]
    running: int
    waiting: int


class TargetGroup(Shape):
    targets: list[str]
    labels: dict[str, str]


MODELS: tuple[type[BaseModel], ...] = (
    Error,
    Completion,
    ChatCompletion,
    ModelCard,
    ModelList,
    Tokens,
    Text,
    Health,
    WorkerCard,
    TargetGroup,
)
