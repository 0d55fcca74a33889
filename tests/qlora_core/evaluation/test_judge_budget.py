import threading

import pytest

from qlora_core.config.evaluate import EvaluateConfig, JudgeConfig
from qlora_core.errors import ConfigError
from qlora_core.evaluation.judge_budget import Budget, Prices, estimate_cost_usd, judge_prices


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
    budget = Budget(1.0)
    assert budget.reserve(5.0)
    budget.settle(5.0, 1.0)
    assert not budget.reserve(0.1)
    assert Budget(1.0, spent_usd=1.0).reserve(0.1) is False


def test_budget_call_waits_for_those_in_flight_that_may_spend_it() -> None:
    budget = Budget(1.0)
    assert budget.reserve(1.0)
    let_in: list[bool] = []
    waiting = threading.Thread(target=lambda: let_in.append(budget.reserve(0.5)))
    waiting.start()
    waiting.join(timeout=0.1)
    assert let_in == []
    budget.settle(1.0, 0.2)
    waiting.join(timeout=5)
    assert let_in == [True]
    budget.settle(0.5, 0.5)
    assert budget.spent_usd == pytest.approx(0.7)
