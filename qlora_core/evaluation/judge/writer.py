"""Writes attempts of one event loop to the verdict cache, those that end together in one commit. Knows no calls."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

from qlora_core.errors import JudgeError
from qlora_core.evaluation.judge.cache import Attempt, VerdictCache

LINGER_S = 0.002


class AttemptWriter:
    """`await write(...)` returns once the attempt is on disk; the loop goes on meanwhile."""

    def __init__(self, cache: VerdictCache) -> None:
        self._cache = cache
        self._pending: list[tuple[str, Attempt, asyncio.Future[None]]] = []
        self._draining: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="verdicts")

    async def __aenter__(self) -> "AttemptWriter":
        return self

    async def __aexit__(self, *error: object) -> None:
        if self._draining is not None:
            await self._draining
        self._thread.shutdown()

    async def write(self, key: str, attempt: Attempt) -> None:
        """Append the attempt. Raises JudgeError where the cache cannot be written."""
        written = asyncio.get_running_loop().create_future()
        self._pending.append((key, attempt, written))
        if self._draining is None or self._draining.done():
            self._draining = asyncio.create_task(self._drain())
        await written

    async def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        while self._pending:
            await asyncio.sleep(LINGER_S)  # what ends together is committed together
            batch, self._pending = self._pending, []
            try:
                await loop.run_in_executor(self._thread, self._cache.record, [(key, each) for key, each, _ in batch])
            except JudgeError as error:
                for _, _, written in batch:
                    written.set_exception(error)
            else:
                for _, _, written in batch:
                    written.set_result(None)
