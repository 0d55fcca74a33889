"""The calls of one judging: each asked until it is settled, within pace and budget, every attempt recorded.

Knows when to ask, ask again and stop. Knows neither HTTP (`client`) nor which questions are already answered.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_core.config.evaluate import JudgeConfig
from qlora_core.errors import JudgeError, JudgeUnavailableError
from qlora_core.evaluation.judge.budget import Budget, Prices
from qlora_core.evaluation.judge.cache import Attempt, VerdictCache
from qlora_core.evaluation.judge.client import Failure, JudgeClient, Reply
from qlora_core.evaluation.judge.pacing import Emit, Pace
from qlora_core.evaluation.judge.probe import (
    PROBE_MESSAGES,
    probe_parameters,
    read_capabilities,
    refused_parameter,
)
from qlora_core.evaluation.judge.writer import AttemptWriter
from qlora_core.evaluation.pairwise import Judgement

logger = logging.getLogger(__name__)

MAX_BACKOFF_S = 30.0
MAX_RETRY_AFTER_S = 120.0
FAILURES_IN_A_ROW = 5
COUNTED_REASONS = frozenset({"timeout", "connection", "rate_limit", "server_error", "rejected"})
TEMPLATE_TOKENS_PER_MESSAGE = 32
Messages = Sequence[Mapping[str, str]]


@dataclass
class Endpoint:
    """What is known of an endpoint from one judging to the next."""

    config: JudgeConfig
    client: JudgeClient
    cache: VerdictCache
    prices: Prices
    first_backoff_s: float
    snapshot: str | None = None
    heard: bool = False
    broken: str | None = None
    failures_in_a_row: int = 0

    def most_usd(self, messages: Messages) -> float:
        """The most one call with these messages can cost."""
        # A token is at least one byte of text, so bytes bound the count whatever the tokenizer
        input_tokens = sum(len(m["content"].encode()) + TEMPLATE_TOKENS_PER_MESSAGE for m in messages)
        return self.prices.cost_usd(input_tokens, self.config.max_answer_tokens)

    def cost_usd(self, reply: Reply, most_usd: float) -> float:
        """What a reply did cost by the usage it reports; without usage, the most it can have."""
        if reply.input_tokens is None or reply.output_tokens is None:
            if most_usd > 0:
                logger.warning("a reply came without usage; it is counted at its most, %.6f USD", most_usd)
            return most_usd
        return self.prices.cost_usd(reply.input_tokens, reply.output_tokens)

    def of_one_snapshot(self, reply: Reply, judgement: Judgement) -> Judgement:
        """The judgement, unscored where it is of another snapshot than the first one heard."""
        if self.snapshot is None:
            self.snapshot = reply.model
        if reply.model == self.snapshot or judgement.slot is None:
            return judgement
        # Two snapshots are two judges: what this one said is kept for a run that is all its own
        return Judgement(None, f"snapshot: the endpoint went from {self.snapshot} to {reply.model}; judge again")


class Session:
    """Asks on one event loop. `read` turns a completed reply into a judgement; `extra` are parameters of every call."""

    def __init__(
        self, endpoint: Endpoint, budget: Budget, read: Callable[[Reply], Judgement], extra: Mapping[str, Any]
    ) -> None:
        self._endpoint = endpoint
        self._budget = budget
        self._read = read
        self._extra = extra
        self._pace = Pace(endpoint.config.calls_in_flight)
        self._writer = AttemptWriter(endpoint.cache)
        self._tasks: list[asyncio.Task[tuple[str, Judgement]]] = []
        self._calling: set[asyncio.Task[Any] | None] = set()
        self._stopping = False

    async def judge(
        self,
        wanted: Mapping[str, Messages],
        heard: Callable[[Sequence[str]], Mapping[str, Messages]],
        emit: Emit,
        stop: asyncio.Event,
    ) -> None:
        """Ask what is wanted by key and emit (key, judgement) of each.

        Until the endpoint has answered once, one call at a time: a wrong key or address costs one call, not a storm.
        `heard` is then told the keys that remain and says what is to be asked now that the snapshot is known. Once
        `stop` is set, calls in flight end and are recorded, since they are paid for, and no other starts.
        """
        endpoint = self._endpoint
        async with endpoint.client, self._writer:
            watching = asyncio.create_task(self._watch(stop))
            try:
                remaining = list(wanted)
                while remaining and not endpoint.heard and endpoint.broken is None and not self._stopping:
                    emit(await self._settle(remaining[0], wanted[remaining.pop(0)]))
                asked = heard(remaining)
                self._tasks = [asyncio.create_task(self._settle(key, asked[key])) for key in asked]
                for done in asyncio.as_completed(self._tasks):
                    emit(await done)
            except asyncio.CancelledError:
                if not self._stopping:
                    raise
            finally:
                self._halt()
                watching.cancel()
                await asyncio.gather(watching, *self._tasks, return_exceptions=True)

    async def probe(self, key: str, emit: Emit) -> None:
        """Find out what the endpoint honours, by one call or, where it refuses a parameter by name, up to three."""
        async with self._endpoint.client, self._writer:
            refused: frozenset[str] = frozenset()
            while True:
                asked = probe_parameters(refused)
                most_usd = self._endpoint.most_usd(PROBE_MESSAGES)
                await self._budget.reserve(most_usd)
                outcome = await self._attempt(key, PROBE_MESSAGES, most_usd, asked, _probed)
                name = refused_parameter(outcome, asked) if isinstance(outcome, Failure) else None
                if name is None:
                    break
                refused |= {name}
            if isinstance(outcome, Failure):
                raise (JudgeUnavailableError if outcome.retried else JudgeError)(outcome.advice)
            emit(outcome.reason)

    async def _watch(self, stop: asyncio.Event) -> None:
        await stop.wait()
        self._halt()

    def _halt(self) -> None:
        self._stopping = True
        for task in self._tasks:
            if task not in self._calling:
                task.cancel()

    async def _settle(self, key: str, messages: Messages) -> tuple[str, Judgement]:
        endpoint, config = self._endpoint, self._endpoint.config
        most_usd = endpoint.most_usd(messages)
        failure: Failure | None = None
        for attempt in range(config.max_retries + 1):
            await self._pace.enter()
            try:
                if endpoint.broken is not None:
                    return key, Judgement(None, endpoint.broken)
                if self._stopping:
                    return key, Judgement(None, "stopped")
                if not await self._budget.reserve(most_usd):
                    return key, Judgement(None, f"budget: {config.budget_usd:g} USD are spent")
                outcome = await self._attempt(key, messages, most_usd, self._extra, self._read)
            finally:
                self._pace.leave()
            if isinstance(outcome, Judgement):
                return key, outcome
            failure = outcome
            if failure.reason == "rate_limit":
                # The limit is the account's, not the call's: all calls wait for it
                self._pace.slow_down(failure.retry_after_s)
            if not failure.retried or (failure.retry_after_s or 0.0) > MAX_RETRY_AFTER_S:
                break
            if attempt < config.max_retries and not self._stopping:
                await asyncio.sleep(self._backoff_s(attempt, failure))
        return key, self._give_up(failure)

    def _backoff_s(self, attempt: int, failure: Failure) -> float:
        backoff_s = min(self._endpoint.first_backoff_s * 2**attempt, MAX_BACKOFF_S) * random.uniform(0.5, 1.5)
        return backoff_s if failure.retry_after_s is None else failure.retry_after_s + backoff_s * 0.1

    async def _attempt(
        self,
        key: str,
        messages: Messages,
        most_usd: float,
        extra: Mapping[str, Any],
        read: Callable[[Reply], Judgement],
    ) -> Judgement | Failure:
        """One reserved call, recorded whatever comes of it; only a recorded judgement leaves here."""
        endpoint, task = self._endpoint, asyncio.current_task()
        self._calling.add(task)
        cost_usd, started_s = 0.0, time.monotonic()
        try:
            outcome = await endpoint.client.ask(messages, extra)
            latency_s = time.monotonic() - started_s
            if isinstance(outcome, Failure):
                unscored = Attempt(Judgement(None, outcome.reason), raw=outcome.advice, latency_s=latency_s)
                await self._writer.write(key, unscored)
                endpoint.heard = endpoint.heard or outcome.reason == "malformed"
                return outcome
            cost_usd = endpoint.cost_usd(outcome, most_usd)
            judgement = read(outcome)
            await self._writer.write(key, recorded(outcome, judgement, cost_usd, latency_s))
        finally:
            self._calling.discard(task)
            self._budget.settle(most_usd, cost_usd)
        self._pace.went_well()
        endpoint.heard, endpoint.failures_in_a_row = True, 0
        return endpoint.of_one_snapshot(outcome, judgement)

    def _give_up(self, failure: Failure | None) -> Judgement:
        endpoint = self._endpoint
        if failure is None:
            raise JudgeError(f"max_retries is {endpoint.config.max_retries}; it must be 0 or more")
        if failure.reason in COUNTED_REASONS:
            endpoint.failures_in_a_row += 1
        hopeless = endpoint.failures_in_a_row >= FAILURES_IN_A_ROW
        if not endpoint.heard and (failure.settled or (hopeless and failure.reason == "rejected")):
            raise (JudgeUnavailableError if failure.retried else JudgeError)(failure.advice)
        if endpoint.broken is None and (hopeless or (failure.settled and failure.reason not in COUNTED_REASONS)):
            endpoint.broken = f"{failure.reason}: not asked, earlier calls failed"
            logger.warning("the judge stops asking: %s", failure.advice)
        logger.info("a verdict stays unscored: %s", failure.advice)
        return Judgement(None, failure.reason)


def _probed(reply: Reply) -> Judgement:
    """What a probe showed, in the place of a reason: it is no verdict."""
    return Judgement(None, read_capabilities(reply).as_text())


def recorded(reply: Reply, judgement: Judgement, cost_usd: float, latency_s: float) -> Attempt:
    """A completed call as the cache keeps it."""
    return Attempt(
        judgement,
        raw=reply.content or reply.refusal,
        finish_reason=reply.finish_reason,
        model=reply.model,
        input_tokens=reply.input_tokens,
        output_tokens=reply.output_tokens,
        cost_usd=cost_usd,
        latency_s=latency_s,
    )
