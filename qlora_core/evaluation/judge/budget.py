"""Prices of judges and the budget of one evaluation. Knows money and tokens, not endpoints or verdicts."""

import asyncio
from collections.abc import Mapping
from typing import NamedTuple

from qlora_core.config.evaluate import EvaluateConfig, JudgeConfig
from qlora_core.errors import ConfigError

PROMPT_OVERHEAD_TOKENS = 320
"""What the judge's own instructions and markers take in `prompt`, rounded up."""

QUESTION_TOKENS = 256
"""A question's length where none is known yet: the estimate before a run."""


class Prices(NamedTuple):
    """US dollars per million tokens."""

    input_usd: float
    output_usd: float

    def cost_usd(self, input_tokens: int, output_tokens: int) -> float:
        """What a call with this usage costs."""
        return (input_tokens * self.input_usd + output_tokens * self.output_usd) / 1_000_000


# OpenAI's list prices for its own endpoint, without batch or cached-input discounts: costs are never understated.
# A snapshot is priced only where its price is known to be that of its name.
LIST_PRICES: Mapping[str, Prices] = {
    "gpt-4.1": Prices(2.00, 8.00),
    "gpt-4.1-2025-04-14": Prices(2.00, 8.00),
    "gpt-4.1-mini": Prices(0.40, 1.60),
    "gpt-4.1-mini-2025-04-14": Prices(0.40, 1.60),
    "gpt-4.1-nano": Prices(0.10, 0.40),
    "gpt-4o": Prices(2.50, 10.00),
    "gpt-4o-2024-08-06": Prices(2.50, 10.00),
    "gpt-4o-mini": Prices(0.15, 0.60),
    "gpt-4-turbo": Prices(10.00, 30.00),
    "gpt-4": Prices(30.00, 60.00),
    "gpt-4-0613": Prices(30.00, 60.00),
    "gpt-5": Prices(1.25, 10.00),
    "gpt-5-mini": Prices(0.25, 2.00),
    "gpt-5-nano": Prices(0.05, 0.40),
    "o3": Prices(2.00, 8.00),
    "o4-mini": Prices(1.10, 4.40),
}


def judge_prices(config: JudgeConfig, *, custom_endpoint: bool) -> Prices:
    """The configured prices, else the list price of a known model on OpenAI's own endpoint.

    A custom endpoint has no list price: its prices must be set, 0 where it is free. Raises ConfigError naming the two
    settings where a price is unknown or only one of them is set.
    """
    given = (config.input_usd_per_million, config.output_usd_per_million)
    if given[0] is not None and given[1] is not None:
        return Prices(given[0], given[1])
    advice = (
        "set both evaluate.judge.input_usd_per_million and evaluate.judge.output_usd_per_million "
        "(0 for a server that costs nothing), or evaluate.judge.kind: offline"
    )
    if given != (None, None):
        raise ConfigError(f"only one price of the judge {config.model!r} is set; {advice}")
    if custom_endpoint:
        raise ConfigError(f"the price of {config.model!r} at a custom endpoint is unknown; {advice}")
    if config.model not in LIST_PRICES:
        raise ConfigError(f"the price of the judge {config.model!r} is unknown; {advice}")
    return LIST_PRICES[config.model]


def estimate_cost_usd(config: EvaluateConfig, prices: Prices) -> float:
    """What judging every prompt in both orders may cost: answers and replies at full length, no retries."""
    calls = 2 * config.max_prompts
    input_tokens = PROMPT_OVERHEAD_TOKENS + QUESTION_TOKENS + 2 * config.max_new_tokens
    share = config.judge.batch_price if config.judge.batch else 1.0
    return calls * prices.cost_usd(input_tokens, config.judge.max_answer_tokens) * share


class Budget:
    """Money shared by concurrent calls: none starts once it is spent; calls in flight are reserved at their most.

    A call is let in while spent + reserved < limit, so the limit is exceeded by at most the last call let in. Belongs
    to one event loop.
    """

    def __init__(self, limit_usd: float, spent_usd: float = 0.0) -> None:
        self._limit_usd = limit_usd
        self._spent_usd = spent_usd
        self._reserved_usd = 0.0
        self._in_flight = 0
        self._waiting: list[asyncio.Future[None]] = []

    @property
    def spent_usd(self) -> float:
        """Settled so far, what was spent before this run included."""
        return self._spent_usd

    def add(self, cost_usd: float) -> None:
        """Count what was paid without a reservation."""
        self._spent_usd += cost_usd

    async def reserve(self, most_usd: float) -> bool:
        """Wait until the call may start; False once the budget is spent. Each True must be followed by one `settle`."""
        while True:
            if self._spent_usd >= self._limit_usd:
                return False
            if self._in_flight == 0 or self._spent_usd + self._reserved_usd < self._limit_usd:
                self._reserved_usd += most_usd
                self._in_flight += 1
                return True
            waiter = asyncio.get_running_loop().create_future()
            self._waiting.append(waiter)
            await waiter

    def settle(self, most_usd: float, cost_usd: float) -> None:
        """Replace a reservation by what the call did cost (0 where the server never answered)."""
        self._in_flight -= 1
        self._reserved_usd = max(0.0, self._reserved_usd - most_usd) if self._in_flight else 0.0
        self._spent_usd += cost_usd
        waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            if not waiter.done():
                waiter.set_result(None)
