"""200 judge calls, 64 in flight, against a loopback server that answers each in 200 ms: how near to the ideal.

The ideal is four waves of 0.2 s. The server is a process of its own; the judge has heard it once before the clock
starts, as it has after its first call. Verdicts go to a cache on disk, as in a run. In turn with each round a loop of
bare aiohttp sends as many requests of the same size and reads the replies: what this machine and server allow at all.
"""

import asyncio
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from qlora_core.config.evaluate import JudgeConfig
from qlora_core.evaluation.judge.cache import VerdictCache
from qlora_core.evaluation.judge.endpoint import open_openai_judge
from qlora_core.evaluation.pairwise import Question

CALLS = 200
IN_FLIGHT = 64
ANSWER_S = 0.2
LEAST_SHARE = 0.9

SERVER = """
import asyncio, sys
from aiohttp import web
async def answer(request):
    await request.read()
    await asyncio.sleep(float(sys.argv[1]))
    message = {"role": "assistant", "content": 'Reasons. {"verdict": "A"}'}
    return web.json_response({"model": "m", "choices": [{"message": message, "finish_reason": "stop"}],
                              "usage": {"prompt_tokens": 900, "completion_tokens": 60}})
async def main():
    app = web.Application()
    app.router.add_post("/v1/chat/completions", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, backlog=256)
    await site.start()
    print(site._server.sockets[0].getsockname()[1], flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


def measure(rounds: int = 5, calls: int = CALLS) -> dict[str, Any]:
    """Seconds of each round, and the share of the ideal throughput that the median round reaches."""
    with (
        subprocess.Popen([sys.executable, "-c", SERVER, str(ANSWER_S)], stdout=subprocess.PIPE, text=True) as server,
        tempfile.TemporaryDirectory() as folder,
    ):
        try:
            port = server.stdout.readline().strip() if server.stdout else ""
            seconds, bare_seconds = _rounds(f"http://127.0.0.1:{port}/v1", Path(folder), rounds, calls)
        finally:
            server.terminate()
    ideal_s = -(-calls // IN_FLIGHT) * ANSWER_S
    return {
        "calls": calls,
        "calls_in_flight": IN_FLIGHT,
        "answer_s": ANSWER_S,
        "ideal_s": ideal_s,
        "seconds": seconds,
        "share_of_ideal": ideal_s / statistics.median(seconds),
        "best_share_of_ideal": ideal_s / min(seconds),
        "bare_seconds": bare_seconds,
        "bare_share_of_ideal": ideal_s / statistics.median(bare_seconds),
        "share_of_bare": statistics.median(bare_seconds) / statistics.median(seconds),
        "least_share": LEAST_SHARE,
    }


def _rounds(url: str, folder: Path, rounds: int, calls: int) -> tuple[list[float], list[float]]:
    settings = {
        "model": "m", "base_url": url, "calls_in_flight": IN_FLIGHT, "budget_usd": 1000.0,
        "input_usd_per_million": 2.0, "output_usd_per_million": 8.0,
    }  # fmt: skip
    seconds, bare_seconds = [], []
    with (
        VerdictCache(folder / "verdicts.db") as cache,
        open_openai_judge(JudgeConfig.model_validate(settings), {}, cache) as judge,
    ):
        judge.decide([Question("warm", "warm", "x" * 800, "y", "ab")], lambda amount: None)
        for turn in range(rounds):
            asked = [Question(f"{turn}/{i}", f"question {turn} {i}", "x" * 800, "y" * 800, "ab") for i in range(calls)]
            started_s = time.perf_counter()
            judged = judge.decide(asked, lambda amount: None)
            seconds.append(time.perf_counter() - started_s)
            if any(judgement.slot != "first" for judgement in judged):
                raise SystemExit("a verdict is not the server's")
            started_s = time.perf_counter()
            asyncio.run(_bare(url, calls))
            bare_seconds.append(time.perf_counter() - started_s)
    return seconds, bare_seconds


async def _bare(url: str, calls: int) -> None:
    import aiohttp

    free = asyncio.Semaphore(IN_FLIGHT)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def ask() -> None:
            async with free, session.post(f"{url}/chat/completions", json={"text": "x" * 2400}) as response:
                await response.read()

        await asyncio.gather(*(ask() for _ in range(calls)))
