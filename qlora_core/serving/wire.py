"""What may be asked in OpenAI's words, and what is refused by name. Nothing asked for is left out without a word.

Knows JSON; knows nothing of models, tokens or HTTP.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from qlora_core.serving.sampling import Sampling

R = TypeVar("R", bound="GenerationRequest")

# Settings this server has not, with the values at which they ask for nothing.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "echo": (False,),
    "suffix": ("",),
    "store": (False,),
}
# Who asks, for the provider's own records: there are none here.
WITHOUT_EFFECT = ("user",)
MAX_STOPS = 4


class ApiError(Exception):
    """An answer in OpenAI's error shape. `headers` go with it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        kind: str = "invalid_request_error",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


class _TextPart(_Strict):
    type: Literal["text"]
    text: str


class ChatMessage(_Strict):
    """One turn; `developer` is OpenAI's newer word for `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_TextPart]

    @property
    def text(self) -> str:
        """The content, its parts joined."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(_Strict):
    """`include_usage`: a last piece with the token counts."""

    include_usage: bool = False


class GenerationRequest(_Strict):
    """What chat and plain completions share."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, ge=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: list[str] = Field(default=[], max_length=MAX_STOPS)
    stream: bool = False
    stream_options: StreamOptions | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        value = [value] if isinstance(value, str) else value
        if isinstance(value, list) and not all(value):
            raise ValueError("a stop string must not be empty")
        return value

    @property
    def wanted_tokens(self) -> int | None:
        """The most tokens of the answer; None: as many as there is room for."""
        return self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        """How many alternatives to each token are told with their log-probabilities; None: nothing of the kind."""
        raise NotImplementedError

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen."""
        return Sampling(self.temperature, self.top_p, self.seed, self.wanted_logprobs)

    def conflict(self) -> tuple[str, str] | None:
        """Parameter and message where two settings contradict each other."""
        if self.stream_options is not None and not self.stream:
            return "stream_options", "stream_options is for streams; set stream to true or leave it out"
        return None


class ChatRequest(GenerationRequest):
    """The body of /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)

    @property
    def wanted_tokens(self) -> int | None:
        """By its newer name first."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        """`top_logprobs`, where `logprobs` is set."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def conflict(self) -> tuple[str, str] | None:
        """Also: alternatives without log-probabilities, two limits."""
        if self.top_logprobs is not None and not self.logprobs:
            return "top_logprobs", "top_logprobs needs logprobs: true"
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            return "max_tokens", "max_tokens and max_completion_tokens differ; give one of them"
        return super().conflict()


class CompletionRequest(GenerationRequest):
    """The body of /v1/completions: one prompt, text or token ids."""

    prompt: str | list[int] | Annotated[list[str], Field(min_length=1, max_length=1)]
    logprobs: int | None = Field(default=None, ge=0, le=20)

    @property
    def wanted_logprobs(self) -> int | None:
        """`logprobs` as it is."""
        return self.logprobs


def parse_request(kind: type[R], body: bytes) -> R:
    """The request in a body. Raises ApiError 400 that names the first setting that is wrong or not offered."""
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise ApiError(400, f"the body must be a JSON object, not {type(values).__name__}")
    given = {name: value for name, value in values.items() if value is not None and name not in WITHOUT_EFFECT}
    for name in NEUTRAL.keys() & given.keys():
        if name not in kind.model_fields:
            _check_neutral(name, given.pop(name))
    try:
        request = kind.model_validate_json(json.dumps(given))
    except ValidationError as error:
        raise _refusal(kind, error) from None
    if (conflict := request.conflict()) is not None:
        raise ApiError(400, conflict[1], param=conflict[0])
    return request


def _check_neutral(name: str, value: Any) -> None:
    if value not in NEUTRAL[name]:
        raise ApiError(
            400,
            f"{name}: {_short(value)} is not supported here; leave it out",
            param=name,
            code="unsupported",
        )


def _refusal(kind: type[GenerationRequest], error: ValidationError) -> ApiError:
    fault = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        known = ", ".join(kind.model_fields) if len(fault["loc"]) == 1 else "see the documentation"
        message = f"{where} is not supported by this server; supported: {known}"
        return ApiError(400, message, param=where, code="unsupported")
    if fault["type"] == "missing":
        return ApiError(400, f"{where} is missing", param=where)
    said = fault["msg"].removeprefix("Value error, ").replace("Input should", "must")
    return ApiError(400, f"{where}: {said}, not {_short(fault['input'])}", param=where)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 100 else text[:100] + "..."
