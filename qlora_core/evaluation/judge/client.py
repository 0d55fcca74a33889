"""One chat call to an OpenAI-compatible endpoint. The only home of HTTP in evaluation.

Knows transport: what a status, header or body means, and whether asking again can help. Knows no verdicts, prices or
cache and makes no retry of its own. The API key never leaves this module: it is cut out of every text that does.
"""

import email.utils
import json
import logging
import re
import time
import urllib.request
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
    log_probabilities: bool = False
    """Whether the reply holds log-probabilities of its tokens."""


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
    logprobs: dict[str, Any] | None = None


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


def environment_proxy(url: str) -> str | None:
    """The proxy that HTTP_PROXY, HTTPS_PROXY and NO_PROXY name for an address; None where there is none.

    Looked up once: aiohttp's own `trust_env` asks the environment and ~/.netrc in two threads for every call, which
    cost a fifth of the processor time of a call.
    """
    parts = urlsplit(url)
    if urllib.request.proxy_bypass(parts.hostname or ""):
        return None
    return urllib.request.getproxies().get(parts.scheme)


def without_secrets(url: str) -> str:
    """An address without user name, password or query."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname or ''}{f':{parts.port}' if parts.port else ''}{parts.path}"


class JudgeClient:
    """Calls one endpoint from one event loop: `async with` it, then `ask`.

    aiohttp and not the endpoint's own client library: 64 calls in flight then cost a tenth of the processor time, which
    is what bounds throughput. Raises JudgeError where OpenAI's own endpoint is meant without OPENAI_API_KEY; a custom
    endpoint needs no key.
    """

    def __init__(self, config: JudgeConfig, environment: Mapping[str, str]) -> None:
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
        self._session: Any = None

    @property
    def shown_url(self) -> str:
        """The endpoint, fit for messages, artifacts and cache keys."""
        return without_secrets(self._url)

    async def __aenter__(self) -> "JudgeClient":
        import aiohttp

        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._session = aiohttp.ClientSession(
            headers=headers,
            proxy=environment_proxy(self._url),
            connector=aiohttp.TCPConnector(limit=0),  # the judge bounds its calls itself
            timeout=aiohttp.ClientTimeout(total=self._config.timeout_s),
        )
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._session.close()
        self._session = None

    def redacted(self, text: str) -> str:
        """`text` without the API key: servers sometimes echo it."""
        return text.replace(self._key, "***") if self._key else text

    async def ask(
        self, messages: Sequence[Mapping[str, str]], extra: Mapping[str, Any] | None = None
    ) -> Reply | Failure:
        """One call with the config's parameters and `extra` ones, in at most `timeout_s`. Never raises on a server."""
        outcome = await self._call(messages, extra or {})
        if isinstance(outcome, Failure) and self.learns_from(outcome):
            outcome = await self._call(messages, extra or {})
        return outcome

    def learns_from(self, failure: Failure) -> bool:
        """Whether a refusal shows that the endpoint has the other name for the token limit; it is used from then on."""
        if failure.reason != "rejected" or not _names_unknown(self._limit_name, failure.advice):
            return False
        other = "max_tokens" if self._limit_name == "max_completion_tokens" else "max_completion_tokens"
        logger.info("the endpoint refuses %s; using %s", self._limit_name, other)
        self._limit_name = other
        return True

    def parameters(self, messages: Sequence[Mapping[str, str]], extra: Mapping[str, Any]) -> dict[str, Any]:
        """The body of one chat call."""
        parameters: dict[str, Any] = {
            "model": self._config.model,
            "messages": [dict(message) for message in messages],
            self._limit_name: self._config.max_answer_tokens,
            **extra,
        }
        if self._config.temperature is not None:
            parameters["temperature"] = self._config.temperature
        return parameters

    def read(self, status: int, headers: Mapping[str, str], body: bytes) -> Reply | Failure:
        """What an answer to a chat call says."""
        return self._status_failure(status, headers, body) if status >= 400 else self._reply(body)

    async def send(
        self,
        method: str,
        path: str,
        parameters: Mapping[str, Any] | None = None,
        *,
        file: tuple[str, bytes] | None = None,
    ) -> tuple[int, bytes | Failure]:
        """A call to another path of the endpoint: status, and the body or the Failure that no answer or a refusal is.

        `file`: its name and content, sent as a form with the parameters as its other fields.
        """
        status, headers, body = await self._send(method, path, parameters, file)
        if isinstance(body, bytes) and status >= 400:
            return status, self._status_failure(status, headers, body)
        return status, body

    async def check(self) -> None:
        """Reach the endpoint without paying: JudgeError where nothing answers there or the key is refused.

        Any other answer to the model list counts as reachable, since many servers do not offer it.
        """
        status, _, body = await self._send("GET", "models", None)
        if isinstance(body, Failure):
            if body.reason != "timeout":
                raise JudgeError(body.advice)
            logger.warning("%s did not list its models in %.0f s", self.shown_url, self._config.timeout_s)
        elif status in (401, 403):
            raise JudgeError(self._status_failure(status, {}, body).advice)
        elif status >= 400:
            logger.info("%s answers %d to a list of models", self.shown_url, status)

    async def _call(self, messages: Sequence[Mapping[str, str]], extra: Mapping[str, Any]) -> Reply | Failure:
        status, headers, body = await self._send("POST", "chat/completions", self.parameters(messages, extra))
        return body if isinstance(body, Failure) else self.read(status, headers, body)

    async def _send(
        self,
        method: str,
        path: str,
        parameters: Mapping[str, Any] | None,
        file: tuple[str, bytes] | None = None,
    ) -> tuple[int, Mapping[str, str], bytes | Failure]:
        """Status, headers and body; a Failure in the body's place where no answer came."""
        import aiohttp

        url = self.shown_url
        parts = urlsplit(self._url)
        target = parts._replace(path=f"{parts.path.rstrip('/')}/{path}").geturl()
        sent: dict[str, Any] = {"json": parameters}
        if file is not None:
            form = aiohttp.FormData(dict(parameters or {}))
            form.add_field("file", file[1], filename=file[0], content_type="application/jsonl")
            sent = {"data": form}
        try:
            async with self._session.request(method, target, **sent, allow_redirects=False) as response:
                return response.status, response.headers, await response.read()
        except TimeoutError:
            advice = f"{url} did not answer in {self._config.timeout_s:g} s; raise evaluate.judge.timeout_s"
            return 0, {}, Failure("timeout", advice, retried=True)
        except aiohttp.ClientConnectorError as error:
            advice = (
                f"the judge's endpoint {url} cannot be reached ({self.redacted(str(error))}); start it, "
                "mend evaluate.judge.base_url, or set evaluate.judge.kind: offline"
            )
            return 0, {}, Failure("connection", advice, retried=True, settled=True)
        except aiohttp.ClientError as error:
            # The request may have been received and billed; its answer was cut off
            advice = (
                f"{url} broke the connection ({type(error).__name__}: {self.redacted(str(error))[:MESSAGE_LENGTH]})"
            )
            return 0, {}, Failure("connection", advice, retried=True)

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
            log_probabilities=bool((choice.logprobs or {}).get("content")),
        )

    def _status_failure(self, status: int, headers: Mapping[str, str], body: bytes) -> Failure:
        url, model = self.shown_url, self._config.model
        message, code = _error_of(body)
        said = self.redacted(message)[:MESSAGE_LENGTH]
        if status in (401, 403):
            # The server's own words are left out: some quote the key, whole or in part
            advice = f"{url} refused the key (HTTP {status}); check {KEY_VARIABLE} and its rights to {model!r}"
            return Failure("unauthorized", advice, settled=True)
        if status == 404:
            advice = f"{url} does not know the model {model!r} or the path (HTTP 404); mend judge.model or base_url"
            return Failure("not_found", advice, settled=True)
        if status == 429 and code == "insufficient_quota":
            return Failure("quota", f"{url}: the account's quota is used up; add credit or wait", settled=True)
        if status in RETRIED_STATUSES or status >= 500:
            reason = {429: "rate_limit"}.get(status, "server_error" if status >= 500 else "timeout")
            after_s = retry_after_s(headers, time.time())
            return Failure(reason, f"{url} answers HTTP {status}: {said}", retried=True, retry_after_s=after_s)
        advice = f"{url} rejects the request (HTTP {status}): {said}"
        if "temperature" in said:
            return Failure("rejected", f"{advice}; set evaluate.judge.temperature: null", settled=True)
        return Failure("rejected", advice)


def _error_of(body: bytes) -> tuple[str, str | None]:
    """Message and code of an error body; the start of the text where it is not the usual JSON."""
    try:
        error = json.loads(body)["error"]
        return str(error["message"]), error.get("code")
    except (ValueError, KeyError, TypeError, AttributeError):
        return body[:MESSAGE_LENGTH].decode(errors="replace"), None


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
