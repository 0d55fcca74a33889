"""The judge behind an OpenAI-compatible endpoint: what is asked, what is already known, what it adds up to.

Knows neither HTTP (`client`), the prompt's text (`prompt`), nor how calls are made (`session`).
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from qlora_core.config.evaluate import EvaluateConfig, JudgeConfig
from qlora_core.digest import digest_json
from qlora_core.evaluation.judge.batch import BatchSession
from qlora_core.evaluation.judge.budget import Budget, estimate_cost_usd, judge_prices
from qlora_core.evaluation.judge.cache import Served, VerdictCache
from qlora_core.evaluation.judge.certificate import Certificate, certifies, read_certificate
from qlora_core.evaluation.judge.client import JudgeClient, Reply, custom_url, resolve_kind
from qlora_core.evaluation.judge.pacing import Emit, stream_from_loop
from qlora_core.evaluation.judge.probe import PROBE_VERSION, Capabilities, capabilities_of
from qlora_core.evaluation.judge.prompt import SYSTEM, form_of, render_messages, response_format
from qlora_core.evaluation.judge.session import Endpoint, Messages, Session
from qlora_core.evaluation.pairwise import Judgement, Question

logger = logging.getLogger(__name__)

CALLS_IN_FLIGHT: int = JudgeConfig.model_fields["calls_in_flight"].default
FIRST_BACKOFF_S = 0.5


class OpenAIJudge:
    """Asks an endpoint which of two answers is better; see `open_openai_judge`."""

    def __init__(self, endpoint: Endpoint, certificate: Certificate | None = None) -> None:
        config = endpoint.config
        self.name = f"openai:{config.model}"
        self.cost_usd = 0.0
        """What the questions of all its decisions have cost, failures, retries and earlier runs included."""
        self.capabilities: Capabilities | None = None
        """What the probe showed; None where nothing was probed."""
        self._endpoint = endpoint
        self._certificate = certificate
        self._form = form_of(config.mode, config.rubric)
        self._keys: set[str] = set()
        self._probe_usd = 0.0

    @property
    def snapshot(self) -> str | None:
        """The model the endpoint says it answers with; None before anything is known."""
        return self._endpoint.snapshot

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all that can change a verdict, the compared texts and the model's snapshot aside."""
        capabilities = None if self.capabilities is None else self.capabilities._asdict()
        asked = {"mode": self._endpoint.config.mode, "system": SYSTEM, "task": self._form.task}
        return digest_json({**self._settings(), **asked, "capabilities": capabilities})

    @property
    def certificate(self) -> Certificate | None:
        """The certificate it was given, whether or not it is of this judge."""
        return self._certificate

    @property
    def certified(self) -> bool:
        """Whether the given certificate passed and is of this judge: its settings, its endpoint, its snapshot."""
        return self._certificate is not None and certifies(self._certificate, self.fingerprint, self.snapshot)

    def check(self) -> None:
        """Reach the endpoint without paying; JudgeError where nothing answers there or the key is refused."""
        client = self._endpoint.client

        async def reach(emit: Emit, stop: asyncio.Event) -> None:
            async with client:
                await client.check()

        for _ in stream_from_loop(reach):
            pass

    def decide(self, questions: Sequence[Question], advance: Callable[[float], None]) -> list[Judgement]:
        """One judgement per question, in order. What the cache has scored is not asked; equal questions are asked once.

        The budget is one for all questions that this judge decides, however many times it is asked.

        Raises JudgeError where the very first call shows that no call can work: the endpoint is down, the key refused,
        the model unknown. Later on such faults, like all others, leave verdicts unscored with their reason.
        """
        if self._endpoint.config.structured_output and self.capabilities is None:
            self._probe(questions)
        messages = [self._messages(question) for question in questions]
        keys = [self._key(question, asked) for question, asked in zip(questions, messages, strict=True)]
        by_key = dict(zip(keys, questions, strict=True))
        repeats = Counter(keys)
        settled = self._known(by_key)
        counted = set(settled)
        advance(sum(repeats[key] for key in counted))
        self._keys |= set(keys)
        budget = Budget(self._endpoint.config.budget_usd, self._endpoint.cache.spent_usd(self._keys))
        with closing(self._asked(dict(zip(keys, messages, strict=True)), settled, budget)) as judged:
            for key, judgement in judged:
                settled[key] = judgement
                if key not in counted:
                    counted.add(key)
                    advance(repeats[key])
        self.cost_usd = self._probe_usd + budget.spent_usd
        return [settled[key] for key in keys]

    def _known(self, by_key: Mapping[str, Question]) -> dict[str, Judgement]:
        """What needs no call: cached verdicts of the snapshot in use, else of the one that gave most; the hopeless."""
        served = self._endpoint.cache.scored(by_key)
        given = Counter(each.model for found in served.values() for each in found)
        snapshot = self.snapshot or (given.most_common(1)[0][0] if given else None)
        settled = _of_snapshot(served, snapshot)
        if self._endpoint.config.mode == "reference":
            missing = Judgement(None, "no_reference: the prompt has no reference answer")
            settled |= {key: missing for key, question in by_key.items() if not question.reference}
        if len(settled) == len(by_key):
            self._endpoint.snapshot = snapshot
        return settled

    def _asked(
        self, by_key: Mapping[str, Messages], settled: Mapping[str, Judgement], budget: Budget
    ) -> Generator[tuple[str, Judgement], None, None]:
        """(key, judgement) of all that is asked, and again of what another snapshot than the endpoint's had settled."""
        wanted = {key: messages for key, messages in by_key.items() if key not in settled}
        if not wanted:
            return
        form = BatchSession if self._endpoint.config.batch else Session
        session = form(self._endpoint, budget, self._read, self._extra())

        async def judge(emit: Emit, stop: asyncio.Event) -> None:
            def heard(remaining: Sequence[str]) -> dict[str, Messages]:
                served = self._endpoint.cache.scored(by_key)
                valid = _of_snapshot(served, self.snapshot)
                stale = [key for key in settled if key in served and key not in valid]
                if stale:
                    logger.warning("%d cached verdicts are of another snapshot than %s", len(stale), self.snapshot)
                for key in set(remaining) & valid.keys():
                    emit((key, valid[key]))
                return {key: by_key[key] for key in (*remaining, *stale) if key not in valid}

            await session.judge(wanted, heard, emit, stop)

        yield from stream_from_loop(judge)

    def _probe(self, questions: Sequence[Question]) -> None:
        """Learn what the endpoint honours; what was recorded counts only where nothing remains to be asked."""
        key = digest_json({**self._settings(), "probe": PROBE_VERSION})
        self.capabilities = capabilities_of(self._endpoint.cache.last_reason(key))
        if self.capabilities is not None:
            by_key = {self._key(question, self._messages(question)): question for question in questions}
            if len(self._known(by_key)) == len(by_key):
                return
        budget = Budget(self._endpoint.config.budget_usd)
        session = Session(self._endpoint, budget, self._read, {})
        for text in stream_from_loop(lambda emit, stop: session.probe(key, emit)):
            self.capabilities = capabilities_of(text)
        self._probe_usd = budget.spent_usd
        self.cost_usd += budget.spent_usd
        logger.info("what the judge's endpoint honours: %s", self.capabilities)

    def _read(self, reply: Reply) -> Judgement:
        return judge_reply(reply, self._form.parse)

    def _messages(self, question: Question) -> Messages:
        return render_messages(question, self._form)

    def _extra(self) -> dict[str, Any]:
        honoured = self.capabilities is not None and self.capabilities.schema
        return {"response_format": response_format(self._form)} if honoured else {}

    def _settings(self) -> dict[str, Any]:
        config = self._endpoint.config
        return {
            "endpoint": self._endpoint.client.shown_url,
            "model": config.model,
            "temperature": config.temperature,
            "max_answer_tokens": config.max_answer_tokens,
            "parser": self._form.version,
        }

    def _key(self, question: Question, messages: Messages) -> str:
        asked = {"messages": messages, "order": question.order}
        return digest_json({**self._settings(), **asked, **self._extra()})


@contextmanager
def open_openai_judge(
    config: JudgeConfig,
    environment: Mapping[str, str],
    cache: VerdictCache | None,
    *,
    first_backoff_s: float = FIRST_BACKOFF_S,
) -> Iterator[OpenAIJudge]:
    """The configured endpoint's judge with its verdict cache (None: one in memory). Makes no call.

    Raises ConfigError where its price is unknown, JudgeError where the key is missing, EvaluationError where the
    configured certificate cannot be read.
    """
    prices = judge_prices(config, custom_endpoint=custom_url(config, environment) is not None)
    certificate = None if config.certificate is None else read_certificate(Path(config.certificate))
    opened = VerdictCache(None) if cache is None else nullcontext(cache)
    with opened as verdicts:
        endpoint = Endpoint(config, JudgeClient(config, environment), verdicts, prices, first_backoff_s)
        yield OpenAIJudge(endpoint, certificate)


def planned_cost_usd(config: EvaluateConfig, environment: Mapping[str, str]) -> float:
    """What the configured judge may cost before anything ran; 0 for a free kind. Raises as `judge_prices`."""
    if resolve_kind(config.judge, environment) != "openai":
        return 0.0
    is_custom = custom_url(config.judge, environment) is not None
    return estimate_cost_usd(config, judge_prices(config.judge, custom_endpoint=is_custom))


def judge_reply(reply: Reply, parse: Callable[[str], Judgement]) -> Judgement:
    """What a completed call says. Cut short, refused, filtered and empty replies are unscored, whatever they hold."""
    if reply.refusal:
        return Judgement(None, "refusal")
    if reply.finish_reason == "length":
        return Judgement(None, "truncated: raise evaluate.judge.max_answer_tokens")
    if reply.finish_reason == "content_filter":
        return Judgement(None, "content_filter")
    if not reply.content or not reply.content.strip():
        return Judgement(None, "empty")
    return parse(reply.content)


def _of_snapshot(served: Mapping[str, Sequence[Served]], snapshot: str | None) -> dict[str, Judgement]:
    """The judgement of each key that this snapshot gave; where a server names none, any counts."""
    matching = {key: [each for each in found if each.model in (snapshot, None)] for key, found in served.items()}
    return {key: found[0].judgement for key, found in matching.items() if found}
