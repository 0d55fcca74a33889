"""Judging through an endpoint's batches: cheaper, in hours and not seconds, and never paid for twice.

Takes the place of `session.Session` where the config asks for it: the same questions, cache and budget. A batch
is known again by what is in it: its metadata hold a digest of its keys, and each key is noted in the cache, so a run
that was killed while it waited finds its batches and waits on. Knows when to ask and what an answer means for the
cache, not HTTP (`client`).
"""

import asyncio
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from qlora_core.digest import digest_json
from qlora_core.errors import JudgeError, JudgeUnavailableError
from qlora_core.evaluation.judge.budget import Budget
from qlora_core.evaluation.judge.cache import Attempt
from qlora_core.evaluation.judge.client import Failure, Reply
from qlora_core.evaluation.judge.pacing import Emit
from qlora_core.evaluation.judge.session import Endpoint, Messages, recorded
from qlora_core.evaluation.pairwise import Judgement

logger = logging.getLogger(__name__)

MARK = "qlora_keys"
NOTE = "in batch "
ENDED = frozenset({"completed", "failed", "expired", "cancelled"})
MOST_REQUESTS = 50_000  # of one batch at OpenAI
LISTED = 100


class BatchSession:
    """Asks in batches on one event loop. Arguments are those of `Session`."""

    def __init__(
        self, endpoint: Endpoint, budget: Budget, read: Callable[[Reply], Judgement], extra: Mapping[str, Any]
    ) -> None:
        self._endpoint = endpoint
        self._budget = budget
        self._read = read
        self._extra = extra

    async def judge(
        self,
        wanted: Mapping[str, Messages],
        heard: Callable[[Sequence[str]], Mapping[str, Messages]],
        emit: Emit,
        stop: asyncio.Event,
    ) -> None:
        """Ask what is wanted by key and emit (key, judgement) of each, then what `heard` finds to be stale.

        Once `stop` is set the waiting ends; batches under way go on at the endpoint and are found again by a later run.
        Raises JudgeUnavailableError where the endpoint cannot take or give a batch.
        """
        async with self._endpoint.client:
            await self._judge(dict(wanted), emit, stop)
            if not stop.is_set():
                await self._judge(dict(heard([])), emit, stop)

    async def _judge(self, pending: dict[str, Messages], emit: Emit, stop: asyncio.Event) -> None:
        tries: Counter[str] = Counter()
        while pending and not stop.is_set():
            part = self._affordable(pending)
            if not part:
                unscored = Judgement(None, f"budget: {self._endpoint.config.budget_usd:g} USD are spent")
                for key in pending:
                    emit((key, unscored))
                return
            outcomes = await self._outcomes(part, stop)
            if outcomes is None:
                return
            tries.update(outcomes.keys())
            failures = [each for each in outcomes.values() if isinstance(each, Failure)]
            learned = any(self._endpoint.client.learns_from(failure) for failure in failures)
            for key, outcome in outcomes.items():
                again = isinstance(outcome, Failure) and (learned or outcome.retried)
                if not again or tries[key] > self._endpoint.config.max_retries:
                    emit((key, _given_up(outcome) if isinstance(outcome, Failure) else outcome))
                    del pending[key]

    def _affordable(self, pending: Mapping[str, Messages]) -> dict[str, Messages]:
        """As many of the first as the budget covers at their most: a batch cannot be stopped by what it has cost."""
        left_usd = self._endpoint.config.budget_usd - self._budget.spent_usd
        part: dict[str, Messages] = {}
        for key, messages in pending.items():
            left_usd -= self._most_usd(messages)
            if left_usd < 0 or len(part) == MOST_REQUESTS:
                break
            part[key] = messages
        return part

    def _most_usd(self, messages: Messages) -> float:
        return self._endpoint.most_usd(messages) * self._endpoint.config.batch_price

    async def _outcomes(
        self, part: Mapping[str, Messages], stop: asyncio.Event
    ) -> dict[str, Judgement | Failure] | None:
        """What came of each key; None where the waiting was stopped."""
        under_way = self._endpoint.cache.open_notes(part, NOTE)
        if under_way:
            batch_id, keys = next(iter(under_way.items()))
            asked = {key: part[key] for key in keys}
            logger.info("going on with batch %s, %d requests", batch_id, len(asked))
        else:
            asked = part
            batch_id = await self._create(asked)
        done = await self._wait(batch_id, stop)
        if done is None:
            return None
        replies: dict[str, Reply | Failure] = dict.fromkeys(asked, _missing(done))
        for name in ("error_file_id", "output_file_id"):
            replies |= {key: reply for key, reply in await self._lines(done.get(name)) if key in asked}
        return self._settle(asked, replies)

    async def _create(self, asked: Mapping[str, Messages]) -> str:
        """The batch of these keys: the one an earlier run made and died before noting, else a new one."""
        mark = digest_json([sorted(asked), self._endpoint.cache.attempts(asked)])
        listed = await self._get("GET", f"batches?limit={LISTED}")
        for batch in listed.get("data", []):
            if (batch.get("metadata") or {}).get(MARK) == mark:
                return self._note(asked, batch["id"])
        client = self._endpoint.client
        lines = [
            {
                "custom_id": key,
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": client.parameters(messages, self._extra),
            }
            for key, messages in asked.items()
        ]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        sent = await self._get("POST", "files", {"purpose": "batch"}, file=("questions.jsonl", text.encode()))
        settings = {"endpoint": "/v1/chat/completions", "completion_window": "24h", "metadata": {MARK: mark}}
        made = await self._get("POST", "batches", {"input_file_id": sent["id"], **settings})
        return self._note(asked, made["id"])

    def _note(self, asked: Mapping[str, Messages], batch_id: str) -> str:
        noted = Attempt(Judgement(None, f"{NOTE}{batch_id}"))
        self._endpoint.cache.record([(key, noted) for key in asked])
        logger.info("batch %s: %d requests; a run that is stopped now finds it again", batch_id, len(asked))
        return batch_id

    async def _wait(self, batch_id: str, stop: asyncio.Event) -> dict[str, Any] | None:
        while True:
            batch = await self._get("GET", f"batches/{batch_id}")
            if batch.get("status") in ENDED:
                return batch
            try:
                await asyncio.wait_for(stop.wait(), self._endpoint.config.batch_poll_s)
            except TimeoutError:
                continue
            return None

    async def _lines(self, file_id: str | None) -> list[tuple[str, Reply | Failure]]:
        if file_id is None:
            return []
        status, body = await self._endpoint.client.send("GET", f"files/{file_id}/content")
        if isinstance(body, Failure):
            raise JudgeUnavailableError(f"{body.advice} (HTTP {status}); the batch is kept: run the command again")
        return list(_read_lines(body, self._endpoint))

    async def _get(self, method: str, path: str, *arguments: Any, **named: Any) -> dict[str, Any]:
        """A call for an object, tried again while that can help."""
        for attempt in range(self._endpoint.config.max_retries + 1):
            status, body = await self._endpoint.client.send(method, path, *arguments, **named)
            if not isinstance(body, Failure):
                return _object(body, self._endpoint.client.shown_url, path)
            if not body.retried or attempt == self._endpoint.config.max_retries:
                hint = "; it may offer no batches: set evaluate.judge.batch: false" if status == 404 else ""
                raise (JudgeUnavailableError if body.retried else JudgeError)(f"{body.advice}{hint}")
            wait_s = self._endpoint.first_backoff_s * 2**attempt
            await asyncio.sleep(wait_s if body.retry_after_s is None else body.retry_after_s)
        raise JudgeError(f"max_retries is {self._endpoint.config.max_retries}; it must be 0 or more")

    def _settle(
        self, asked: Mapping[str, Messages], replies: Mapping[str, Reply | Failure]
    ) -> dict[str, Judgement | Failure]:
        """Record what came of all keys of a batch in one commit, with their costs."""
        endpoint = self._endpoint
        attempts: list[tuple[str, Attempt]] = []
        outcomes: dict[str, Judgement | Failure] = {}
        for key, reply in replies.items():
            if isinstance(reply, Failure):
                attempts.append((key, Attempt(Judgement(None, reply.reason), raw=reply.advice)))
                outcomes[key] = reply
                continue
            cost_usd = endpoint.cost_usd(reply, endpoint.most_usd(asked[key])) * endpoint.config.batch_price
            judgement = self._read(reply)
            attempts.append((key, recorded(reply, judgement, cost_usd, 0.0)))
            self._budget.add(cost_usd)
            endpoint.heard = True
            outcomes[key] = endpoint.of_one_snapshot(reply, judgement)
        endpoint.cache.record(attempts)
        return outcomes


def _missing(batch: Mapping[str, Any]) -> Failure:
    """What came of a key that a batch that ended has no line for."""
    status = batch.get("status")
    faults = (batch.get("errors") or {}).get("data") or [{}]
    said = f": {faults[0]['message']}" if faults[0].get("message") else ""
    advice = f"batch {batch.get('id')} ended as {status} without an answer{said}"
    return Failure("batch", advice, retried=status in ("completed", "expired"))


def _given_up(failure: Failure) -> Judgement:
    logger.info("a verdict stays unscored: %s", failure.advice)
    return Judgement(None, failure.reason)


def _read_lines(body: bytes, endpoint: Endpoint) -> Iterator[tuple[str, Reply | Failure]]:
    for number, line in enumerate(body.split(b"\n"), 1):
        if not line.strip():
            continue
        row = _object(line, endpoint.client.shown_url, f"a batch's results, line {number}")
        response, key = row.get("response"), str(row.get("custom_id"))
        if not isinstance(response, dict):
            said = str((row.get("error") or {}).get("message", "no response"))
            expired = (row.get("error") or {}).get("code") == "batch_expired"
            yield key, Failure("expired" if expired else "batch", endpoint.client.redacted(said), retried=expired)
        else:
            content = json.dumps(response.get("body")).encode()
            yield key, endpoint.client.read(int(response.get("status_code", 200)), {}, content)


def _object(body: bytes, url: str, what: str) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise JudgeError(f"{url} answered {what} with no JSON object; check evaluate.judge.base_url")
    return found
