"""The judge behind an OpenAI-compatible endpoint: retries, cache, budget, bounded concurrency.

Knows when to ask, ask again and stop. Knows neither HTTP (`judge_client`) nor the prompt's text (`judge_prompt`).
"""

import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import closing, contextmanager, nullcontext

from qlora_core.config.evaluate import EvaluateConfig, JudgeConfig
from qlora_core.digest import digest_json
from qlora_core.errors import JudgeError, JudgeUnavailableError
from qlora_core.evaluation.judge_budget import Budget, Prices, estimate_cost_usd, judge_prices
from qlora_core.evaluation.judge_cache import Attempt, VerdictCache
from qlora_core.evaluation.judge_client import Failure, JudgeClient, Reply, custom_url, resolve_kind
from qlora_core.evaluation.judge_prompt import PARSER_VERSION, parse_verdict, render_messages
from qlora_core.evaluation.pairwise import Judgement, Question

logger = logging.getLogger(__name__)

CALLS_IN_FLIGHT = 8
FIRST_BACKOFF_S = 0.5
MAX_BACKOFF_S = 30.0
MAX_RETRY_AFTER_S = 120.0
FAILURES_IN_A_ROW = 5
COUNTED_REASONS = frozenset({"timeout", "connection", "rate_limit", "server_error", "rejected"})
TEMPLATE_TOKENS_PER_MESSAGE = 32

GPT4_FAMILY = frozenset(
    {"gpt-4", "gpt-4-0613", "gpt-4-turbo", "gpt-4o", "gpt-4o-2024-08-06", "gpt-4.1", "gpt-4.1-2025-04-14"}
)
"""Taken as certified on OpenAI's own endpoint, on the family's published agreement with people; all else is not."""


class OpenAIJudge:
    """Asks an endpoint which of two answers is better; see `open_openai_judge`."""

    def __init__(
        self,
        config: JudgeConfig,
        client: JudgeClient,
        cache: VerdictCache,
        prices: Prices,
        *,
        certified: bool = False,
        first_backoff_s: float = FIRST_BACKOFF_S,
    ) -> None:
        self.name = f"openai:{config.model}"
        self.certified = certified
        self.cost_usd = 0.0
        """What the decided questions have cost, failures, retries and earlier interrupted runs included."""
        self._config = config
        self._client = client
        self._cache = cache
        self._prices = prices
        self._first_backoff_s = first_backoff_s
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._resume_at_s = 0.0
        self._failures_in_a_row = 0
        self._broken: str | None = None
        self._heard = False

    def check(self) -> None:
        """Reach the endpoint without paying; JudgeError where nothing answers there or the key is refused."""
        self._client.check()

    def decide(self, questions: Sequence[Question], advance: Callable[[float], None]) -> list[Judgement]:
        """One judgement per question, in order. What the cache has scored is not asked; equal questions are asked once.

        Raises JudgeError where the very first call shows that no call can work: the endpoint is down, the key refused,
        the model unknown. Later on such faults, like all others, leave verdicts unscored with their reason.
        """
        keys = [self._key(question) for question in questions]
        settled = self._cache.scored(keys)
        budget = Budget(self._config.budget_usd, self._cache.spent_usd(keys))
        advance(sum(key in settled for key in keys))
        open_questions = {key: question for key, question in zip(keys, questions, strict=True) if key not in settled}
        repeats = Counter(keys)
        with closing(self._ask_all(open_questions, budget)) as asked:
            for key, judgement in asked:
                settled[key] = judgement
                advance(repeats[key])
        self.cost_usd += budget.spent_usd
        return [settled[key] for key in keys]

    def _ask_all(
        self, questions: Mapping[str, Question], budget: Budget
    ) -> Generator[tuple[str, Judgement], None, None]:
        remaining = list(questions.items())
        while remaining and not self._heard and self._broken is None:
            # One call at a time until the endpoint is known to work: a wrong key or address costs one call, not a storm
            key, question = remaining.pop(0)
            yield key, self._settle(key, question, budget)
        pool = ThreadPoolExecutor(CALLS_IN_FLIGHT, thread_name_prefix="judge")
        try:
            futures: dict[Future[Judgement], str] = {
                pool.submit(self._settle, key, question, budget): key for key, question in remaining
            }
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            # On Ctrl-C calls in flight end and are recorded, since they are paid for; waiting ones are dropped
            self._stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            self._stop.clear()

    def _settle(self, key: str, question: Question, budget: Budget) -> Judgement:
        messages = render_messages(question)
        most_usd = self._most_usd(messages)
        failure: Failure | None = None
        for attempt in range(self._config.max_retries + 1):
            self._wait_for_turn()
            if self._broken is not None:
                return Judgement(None, self._broken)
            if self._stop.is_set():
                return Judgement(None, "stopped")
            if not budget.reserve(most_usd):
                return Judgement(None, f"budget: {self._config.budget_usd:g} USD are spent")
            outcome = self._attempt(key, messages, most_usd, budget)
            if isinstance(outcome, Judgement):
                return outcome
            failure = outcome
            if not failure.retried or (failure.retry_after_s or 0.0) > MAX_RETRY_AFTER_S:
                break
            if attempt < self._config.max_retries:
                self._pause(attempt, failure)
        return self._give_up(failure)

    def _attempt(
        self, key: str, messages: list[dict[str, str]], most_usd: float, budget: Budget
    ) -> Judgement | Failure:
        started_s = time.monotonic()
        cost_usd = 0.0
        try:
            outcome = self._client.ask(messages)
            latency_s = time.monotonic() - started_s
            if isinstance(outcome, Failure):
                self._cache.record(
                    key, Attempt(Judgement(None, outcome.reason), raw=outcome.advice, latency_s=latency_s)
                )
                self._heard = self._heard or outcome.reason == "malformed"
                return outcome
            cost_usd = self._cost_usd(outcome, most_usd)
            judgement = judge_reply(outcome)
            self._cache.record(
                key,
                Attempt(
                    judgement,
                    raw=outcome.content or outcome.refusal,
                    finish_reason=outcome.finish_reason,
                    model=outcome.model,
                    input_tokens=outcome.input_tokens,
                    output_tokens=outcome.output_tokens,
                    cost_usd=cost_usd,
                    latency_s=latency_s,
                ),
            )
        finally:
            budget.settle(most_usd, cost_usd)
        with self._lock:
            self._heard, self._failures_in_a_row = True, 0
        return judgement

    def _give_up(self, failure: Failure | None) -> Judgement:
        if failure is None:
            raise JudgeError(f"max_retries is {self._config.max_retries}; it must be 0 or more")
        with self._lock:
            if failure.reason in COUNTED_REASONS:
                self._failures_in_a_row += 1
            hopeless = self._failures_in_a_row >= FAILURES_IN_A_ROW
            if not self._heard and (failure.settled or (hopeless and failure.reason == "rejected")):
                raise (JudgeUnavailableError if failure.retried else JudgeError)(failure.advice)
            if self._broken is None and (hopeless or (failure.settled and failure.reason not in COUNTED_REASONS)):
                self._broken = f"{failure.reason}: not asked, earlier calls failed"
                logger.warning("the judge stops asking: %s", failure.advice)
        logger.info("a verdict stays unscored: %s", failure.advice)
        return Judgement(None, failure.reason)

    def _wait_for_turn(self) -> None:
        while not self._stop.is_set():
            with self._lock:
                wait_s = self._resume_at_s - time.monotonic()
            if wait_s <= 0:
                return
            self._stop.wait(wait_s)

    def _pause(self, attempt: int, failure: Failure) -> None:
        backoff_s = min(self._first_backoff_s * 2**attempt, MAX_BACKOFF_S) * random.uniform(0.5, 1.5)
        if failure.retry_after_s is not None:
            # The limit is the account's, not the call's: all calls wait for it
            with self._lock:
                self._resume_at_s = max(self._resume_at_s, time.monotonic() + failure.retry_after_s)
        self._stop.wait(backoff_s if failure.retry_after_s is None else backoff_s * 0.1)

    def _cost_usd(self, reply: Reply, most_usd: float) -> float:
        if reply.input_tokens is None or reply.output_tokens is None:
            if most_usd > 0:
                logger.warning("a reply came without usage; it is counted at its most, %.6f USD", most_usd)
            return most_usd
        return self._prices.cost_usd(reply.input_tokens, reply.output_tokens)

    def _most_usd(self, messages: Iterable[Mapping[str, str]]) -> float:
        # A token is at least one byte of text, so bytes bound the count whatever the tokenizer
        input_tokens = sum(len(m["content"].encode()) + TEMPLATE_TOKENS_PER_MESSAGE for m in messages)
        return self._prices.cost_usd(input_tokens, self._config.max_answer_tokens)

    def _key(self, question: Question) -> str:
        return digest_json(
            {
                "endpoint": self._client.shown_url,
                "model": self._config.model,
                "messages": render_messages(question),
                "order": question.order,
                "temperature": self._config.temperature,
                "max_answer_tokens": self._config.max_answer_tokens,
                "parser": PARSER_VERSION,
            }
        )


@contextmanager
def open_openai_judge(
    config: JudgeConfig,
    environment: Mapping[str, str],
    cache: VerdictCache | None,
    *,
    first_backoff_s: float = FIRST_BACKOFF_S,
) -> Iterator[OpenAIJudge]:
    """The configured endpoint's judge with its verdict cache (None: one in memory). Makes no call.

    Raises ConfigError where its price is unknown, JudgeError where the key is missing.
    """
    is_custom = custom_url(config, environment) is not None
    prices = judge_prices(config, custom_endpoint=is_custom)
    opened = VerdictCache(None) if cache is None else nullcontext(cache)
    with closing(JudgeClient(config, environment)) as client, opened as verdicts:
        certified = not is_custom and config.model in GPT4_FAMILY
        yield OpenAIJudge(config, client, verdicts, prices, certified=certified, first_backoff_s=first_backoff_s)


def planned_cost_usd(config: EvaluateConfig, environment: Mapping[str, str]) -> float:
    """What the configured judge may cost before anything ran; 0 for a free kind. Raises as `judge_prices`."""
    if resolve_kind(config.judge, environment) != "openai":
        return 0.0
    is_custom = custom_url(config.judge, environment) is not None
    return estimate_cost_usd(config, judge_prices(config.judge, custom_endpoint=is_custom))


def judge_reply(reply: Reply) -> Judgement:
    """What a completed call says. Cut short, refused, filtered and empty replies are unscored, whatever they hold."""
    if reply.refusal:
        return Judgement(None, "refusal")
    if reply.finish_reason == "length":
        return Judgement(None, "truncated: raise evaluate.judge.max_answer_tokens")
    if reply.finish_reason == "content_filter":
        return Judgement(None, "content_filter")
    if not reply.content or not reply.content.strip():
        return Judgement(None, "empty")
    return parse_verdict(reply.content)
