import asyncio

import pytest

from qlora_core.config.evaluate import EvaluateConfig, JudgeConfig
from qlora_core.errors import ConfigError
from qlora_core.evaluation.judge.budget import Budget, Prices, estimate_cost_usd, judge_prices


def _judge(**settings: object) -> JudgeConfig:
    return JudgeConfig.model_validate(settings)


def test_judge_prices_known_model_has_its_list_price() -> None:
    assert judge_prices(_judge(), custom_endpoint=False) == Prices(2.0, 8.0)


def test_judge_prices_configured_prices_win() -> None:
    config = _judge(input_usd_per_million=0, output_usd_per_million=0)
    assert judge_prices(config, custom_endpoint=True) == Prices(0, 0)


@pytest.mark.parametrize(
    ("config", "custom"),
    [
        (_judge(model="gpt-99"), False),
        (_judge(), True),
        (_judge(input_usd_per_million=1), False),
        (_judge(output_usd_per_million=1), True),
    ],
)
def test_judge_prices_unknown_names_the_settings(config: JudgeConfig, custom: bool) -> None:
    with pytest.raises(ConfigError, match=r"input_usd_per_million.*output_usd_per_million"):
        judge_prices(config, custom_endpoint=custom)


def test_estimate_cost_grows_with_prompts_and_is_zero_without() -> None:
    prices = Prices(2.0, 8.0)
    one, ten = (estimate_cost_usd(EvaluateConfig.model_validate({"max_prompts": n}), prices) for n in (1, 10))
    assert ten == pytest.approx(10 * one)
    assert estimate_cost_usd(EvaluateConfig.model_validate({"max_prompts": 0}), prices) == 0


def test_budget_starts_no_call_once_it_is_spent() -> None:
    async def spend() -> list[bool]:
        budget = Budget(1.0)
        let_in = [await budget.reserve(5.0)]
        budget.settle(5.0, 1.0)
        return [*let_in, await budget.reserve(0.1), await Budget(1.0, spent_usd=1.0).reserve(0.1)]

    assert asyncio.run(spend()) == [True, False, False]


def test_budget_call_waits_for_those_in_flight_that_may_spend_it() -> None:
    async def spend() -> None:
        budget = Budget(1.0)
        assert await budget.reserve(1.0)
        waiting = asyncio.create_task(budget.reserve(0.5))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        budget.settle(1.0, 0.2)
        assert await asyncio.wait_for(waiting, 5)
        budget.settle(0.5, 0.5)
        assert budget.spent_usd == pytest.approx(0.7)

    asyncio.run(spend())
