"""One chat call to an OpenAI-compatible endpoint. The only home of the `openai` package and of HTTP in evaluation.

Knows transport: what a status, header or body means, and whether asking again can help. Knows no verdicts, prices or
cache and makes no retry of its own. The API key never leaves this module: it is cut out of every text that does.
"""

import email.utils
import logging
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, ValidationError

from qlora_core.config.evaluate import JudgeConfig
from qlora_core.errors import JudgeError

logger = logging.getLogger(__name__)

KEY_VARIABLE = "OPENAI_API_KEY"
URL_VARIABLE = "OPENAI_BASE_URL"
DEFAULT_URL = "https://api.openai.com/v1"
RETRIED_STATUSES = frozenset({408, 409, 425, 429})
MESSAGE_LENGTH = 300


class Reply(NamedTuple):
    """A completed call. Token counts are None where the server reported no usage; it may be billed all the same."""

    content: str | None
    refusal: str | None
    finish_reason: str | None
    model: str | None
    input_tokens: int | None
    output_tokens: int | None


class Failure(NamedTuple):
    """A call without a usable reply.

    `reason` goes into the verdict row; `advice` says what is wrong and the next step. `retried`: the same call may work
    later. `settled`: every further call would fail the same way (the endpoint is down, the key refused).
    """

    reason: str
    advice: str
    retried: bool = False
    settled: bool = False
    retry_after_s: float | None = None


class _Usage(BaseModel):
    model_config = ConfigDict(strict=True)
    prompt_tokens: int
    completion_tokens: int = 0


class _Message(BaseModel):
    model_config = ConfigDict(strict=True)
    content: str | None = None
    refusal: str | None = None


class _Choice(BaseModel):
    model_config = ConfigDict(strict=True)
    message: _Message
    finish_reason: str | None = None


class _Completion(BaseModel):
    model_config = ConfigDict(strict=True, protected_namespaces=())
    choices: list[_Choice]
    model: str | None = None
    usage: _Usage | None = None


def resolve_kind(config: JudgeConfig, environment: Mapping[str, str]) -> str:
    """Which judge a config means: openai, offline or none. auto: openai where OPENAI_API_KEY is set, else offline."""
    if config.kind != "auto":
        return config.kind
    return "openai" if environment.get(KEY_VARIABLE) else "offline"


def custom_url(config: JudgeConfig, environment: Mapping[str, str]) -> str | None:
    """The configured endpoint, else OPENAI_BASE_URL, else None for OpenAI's own."""
    return config.base_url or environment.get(URL_VARIABLE) or None


def without_secrets(url: str) -> str:
    """An address without user name, password or query."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname or ''}{f':{parts.port}' if parts.port else ''}{parts.path}"


class JudgeClient:
    """Calls one endpoint; safe for several threads.

    Raises JudgeError where OpenAI's own endpoint is meant without OPENAI_API_KEY; a custom endpoint needs no key.
    """

    def __init__(self, config: JudgeConfig, environment: Mapping[str, str]) -> None:
        import openai

        self._openai = openai
        self._config = config
        self._key = environment.get(KEY_VARIABLE, "")
        url = custom_url(config, environment)
        if url is not None and urlsplit(url).scheme not in ("http", "https"):
            raise JudgeError(
                f"the judge's address {without_secrets(url)!r} is no http(s) address; give one like http://host:8000/v1"
            )
        if url is None and not self._key:
            raise JudgeError(
                f"the judge {config.model!r} needs {KEY_VARIABLE} in the environment; set it, "
                "or set evaluate.judge.base_url to a server without keys, or evaluate.judge.kind: offline"
            )
        self._url = url or DEFAULT_URL
        # Servers other than OpenAI's often know only the older name; which one holds is learned from the first refusal.
        self._limit_name = "max_tokens" if url is not None else "max_completion_tokens"
        self._client = openai.OpenAI(
            api_key=self._key or "none", base_url=self._url, timeout=config.timeout_s, max_retries=0
        )

    @property
    def shown_url(self) -> str:
        """The endpoint, fit for messages, artifacts and cache keys."""
        return without_secrets(self._url)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def redacted(self, text: str) -> str:
        """`text` without the API key: servers sometimes echo it."""
        return text.replace(self._key, "***") if self._key else text

    def ask(self, messages: Sequence[Mapping[str, str]]) -> Reply | Failure:
        """One call with the config's parameters, waiting at most `timeout_s`. Never raises on what a server does."""
        limit_name = self._limit_name
        outcome = self._call(messages, limit_name)
        if isinstance(outcome, Failure) and outcome.reason == "rejected" and _names_unknown(limit_name, outcome.advice):
            other = "max_tokens" if limit_name == "max_completion_tokens" else "max_completion_tokens"
            logger.info("the endpoint refuses %s; using %s", limit_name, other)
            self._limit_name = other
            outcome = self._call(messages, other)
        return outcome

    def check(self) -> None:
        """Reach the endpoint without paying: JudgeError where nothing answers there or the key is refused.

        Any other answer to the model list counts as reachable, since many servers do not offer it.
        """
        try:
            self._client.models.with_raw_response.list()
        except self._openai.APITimeoutError:
            logger.warning("%s did not list its models in %.0f s", self.shown_url, self._config.timeout_s)
        except self._openai.APIConnectionError as error:
            raise JudgeError(self._failure(error).advice) from None
        except (self._openai.AuthenticationError, self._openai.PermissionDeniedError) as error:
            raise JudgeError(self._failure(error).advice) from None
        except self._openai.APIStatusError as error:
            logger.info("%s answers %d to a list of models", self.shown_url, error.status_code)

    def _call(self, messages: Sequence[Mapping[str, str]], limit_name: str) -> Reply | Failure:
        parameters: dict[str, Any] = {
            "model": self._config.model,
            "messages": [dict(message) for message in messages],
            limit_name: self._config.max_answer_tokens,
        }
        if self._config.temperature is not None:
            parameters["temperature"] = self._config.temperature
        try:
            response = self._client.chat.completions.with_raw_response.create(**parameters)
            body = response.http_response.content
        except self._openai.APIError as error:
            # `from None` and no traceback: the request object inside carries the key
            return self._failure(error)
        return self._reply(body)

    def _reply(self, body: bytes) -> Reply | Failure:
        try:
            completion = _Completion.model_validate_json(body)
        except ValidationError as error:
            fault = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(key) for key in fault["loc"])
            return Failure("malformed", f"{self.shown_url} sent no chat completion ({where or 'body'}: {fault['msg']})")
        if not completion.choices:
            return Failure("malformed", f"{self.shown_url} sent a chat completion without choices")
        choice, usage = completion.choices[0], completion.usage
        return Reply(
            content=self.redacted(choice.message.content) if choice.message.content else None,
            refusal=self.redacted(choice.message.refusal) if choice.message.refusal else None,
            finish_reason=choice.finish_reason,
            model=completion.model,
            input_tokens=usage.prompt_tokens if usage else None,
            output_tokens=usage.completion_tokens if usage else None,
        )

    def _failure(self, error: Any) -> Failure:
        url = self.shown_url
        if isinstance(error, self._openai.APITimeoutError):
            advice = f"{url} did not answer in {self._config.timeout_s:g} s; raise evaluate.judge.timeout_s"
            return Failure("timeout", advice, retried=True)
        if isinstance(error, self._openai.APIConnectionError):
            cause = self.redacted(str(error.__cause__ or error))
            advice = (
                f"the judge's endpoint {url} cannot be reached ({cause}); start it, mend evaluate.judge.base_url, "
                "or set evaluate.judge.kind: offline"
            )
            return Failure("connection", advice, retried=True, settled=True)
        if isinstance(error, self._openai.APIStatusError):
            return self._status_failure(error)
        return Failure("malformed", f"{url} sent an answer that cannot be read ({type(error).__name__})")

    def _status_failure(self, error: Any) -> Failure:
        status, url, model = error.status_code, self.shown_url, self._config.model
        said = self.redacted(str(error.message))[:MESSAGE_LENGTH]
        if status in (401, 403):
            # The server's own words are left out: some quote the key, whole or in part
            advice = f"{url} refused the key (HTTP {status}); check {KEY_VARIABLE} and its rights to {model!r}"
            return Failure("unauthorized", advice, settled=True)
        if status == 404:
            advice = f"{url} does not know the model {model!r} or the path (HTTP 404); mend judge.model or base_url"
            return Failure("not_found", advice, settled=True)
        if status == 429 and error.code == "insufficient_quota":
            return Failure("quota", f"{url}: the account's quota is used up; add credit or wait", settled=True)
        if status in RETRIED_STATUSES or status >= 500:
            reason = {429: "rate_limit"}.get(status, "server_error" if status >= 500 else "timeout")
            after_s = retry_after_s(error.response.headers, time.time())
            return Failure(reason, f"{url} answers HTTP {status}: {said}", retried=True, retry_after_s=after_s)
        advice = f"{url} rejects the request (HTTP {status}): {said}"
        if "temperature" in said:
            return Failure("rejected", f"{advice}; set evaluate.judge.temperature: null", settled=True)
        return Failure("rejected", advice)


def _names_unknown(parameter: str, message: str) -> bool:
    return (
        parameter in message and re.search(r"support|unknown|unrecogni|extra|not permitted", message, re.I) is not None
    )


def retry_after_s(headers: Mapping[str, str], now_s: float) -> float | None:
    """Seconds a server asks to wait (`retry-after-ms`, else `retry-after` as seconds or HTTP date), or None."""
    for name, scale in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            return max(0.0, float(value) * scale)
        except ValueError:
            pass
        try:
            return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - now_s)
        except ValueError:
            logger.info("a server sent an unreadable %s: %.40r", name, value)
    return None
