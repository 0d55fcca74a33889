"""Each optimizer against AdamW written out in float64, and its state across a restore."""

import math
import warnings
from typing import Any

import pytest
import torch

from qlora_core.config.train import TrainConfig
from qlora_core.errors import TrainingError
from qlora_core.training.optimizer import OPTIMIZERS, TrialOptimizer

SHAPES = {"small": (4, 8), "large": (96, 64)}


def _config(optimizer: Any, **settings: Any) -> TrainConfig:
    return TrainConfig(optimizer=optimizer, learning_rate=1e-2, weight_decay=0.05, **settings)


def _parameters(dtype: torch.dtype = torch.float32) -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for name, shape in SHAPES.items()
    }


def _gradient(name: str, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * len(name) + step)
    return torch.randn(SHAPES[name], generator=generator, dtype=torch.float64)


def _train(optimizer: TrialOptimizer, parameters: dict[str, torch.nn.Parameter], steps: range) -> None:
    for step in steps:
        for name, parameter in parameters.items():
            parameter.grad = _gradient(name, step).to(parameter.dtype)
        optimizer.step(1e-2 / (1 + step))


def _adamw_by_hand(steps: int) -> dict[str, torch.Tensor]:
    """Loshchilov and Hutter 2019, algorithm 2, in float64 with a rate that changes every step."""
    result = {}
    for name, parameter in _parameters(torch.float64).items():
        weight = parameter.detach().clone()
        m, v = torch.zeros_like(weight), torch.zeros_like(weight)
        for step in range(steps):
            gradient, rate = _gradient(name, step), 1e-2 / (1 + step)
            m = 0.9 * m + 0.1 * gradient
            v = 0.999 * v + 0.001 * gradient**2
            corrected = (v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
            weight = weight * (1 - rate * 0.05) - rate * m / (1 - 0.9 ** (step + 1)) / corrected
        result[name] = weight
    return result


def test_adamw_in_float64_follows_the_algorithm() -> None:
    parameters = _parameters(torch.float64)
    _train(TrialOptimizer(parameters, _config("adamw")), parameters, range(20))
    for name, expected in _adamw_by_hand(20).items():
        torch.testing.assert_close(parameters[name].data, expected, rtol=1e-12, atol=1e-13)


# Float32 weights up to 4 have an ulp of 2.4e-7 or more and are rounded in 20 steps.
# 8-bit state rounds blocks of 256 values of tensors with 4096 elements or more; smaller tensors keep 32 bits
@pytest.mark.parametrize(
    ("optimizer", "name", "tolerance"),
    [
        ("adamw", "large", 3e-6),
        ("paged_adamw_32bit", "large", 3e-6),
        ("paged_adamw_32bit", "small", 3e-6),
        ("paged_adamw_8bit", "small", 3e-6),
        ("paged_adamw_8bit", "large", 1e-2),
    ],
)
def test_float32_optimizers_stay_near_the_float64_reference(optimizer: str, name: str, tolerance: float) -> None:
    parameters = _parameters()
    _train(TrialOptimizer(parameters, _config(optimizer)), parameters, range(20))
    assert (parameters[name].double() - _adamw_by_hand(20)[name]).abs().max().item() < tolerance


# Plain SGD has no state
STATEFUL = [name for name in OPTIMIZERS if name != "sgd"]


@pytest.mark.parametrize("optimizer", STATEFUL)
def test_restored_state_continues_bit_for_bit(optimizer: str) -> None:
    straight = _parameters()
    _train(TrialOptimizer(straight, _config(optimizer)), straight, range(7))

    first = _parameters()
    before = TrialOptimizer(first, _config(optimizer))
    _train(before, first, range(4))
    resumed = {name: torch.nn.Parameter(parameter.detach().clone()) for name, parameter in first.items()}
    after = TrialOptimizer(resumed, _config(optimizer))
    after.load_state_tensors(before.state_tensors())
    _train(after, resumed, range(4, 7))
    assert all(torch.equal(resumed[name], straight[name]) for name in SHAPES)

    forgetful = {name: torch.nn.Parameter(parameter.detach().clone()) for name, parameter in first.items()}
    _train(TrialOptimizer(forgetful, _config(optimizer)), forgetful, range(4, 7))
    assert not torch.equal(forgetful["large"], straight["large"])


@pytest.mark.parametrize("optimizer", STATEFUL)
def test_state_of_another_trial_is_refused(optimizer: str) -> None:
    parameters = _parameters()
    trained = TrialOptimizer(parameters, _config(optimizer))
    _train(trained, parameters, range(1))
    state = trained.state_tensors()
    with pytest.raises(TrainingError, match="first difference: large"):
        TrialOptimizer(_parameters(), _config(optimizer)).load_state_tensors(
            {name: tensor for name, tensor in state.items() if name.startswith("small")}
        )
    wrong = {name: tensor[..., :1] if tensor.dim() else tensor for name, tensor in state.items()}
    with pytest.raises(TrainingError, match=r"in the checkpoint, but .* here"):
        TrialOptimizer(_parameters(), _config(optimizer)).load_state_tensors(wrong)


def test_paged_optimizers_say_that_they_do_not_page_on_a_cpu() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parameters = _parameters()
        optimizer = TrialOptimizer(parameters, _config("paged_adamw_32bit"))
        _train(optimizer, parameters, range(1))
    assert optimizer.description.startswith("paged_adamw_32bit (not paged")
    assert TrialOptimizer(_parameters(), _config("adamw")).description == "adamw"


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(TrainingError, match="no parameters"):
        TrialOptimizer({}, _config("adamw"))


def test_the_hand_written_reference_moves_the_weights() -> None:
    moved = _adamw_by_hand(20)["small"] - _parameters(torch.float64)["small"].detach()
    assert math.sqrt(moved.square().mean().item()) > 1e-3


def test_b_factors_step_at_their_own_rate() -> None:
    parameters = {name: torch.nn.Parameter(torch.zeros(4)) for name in ("a", "b")}
    optimizer = TrialOptimizer(parameters, TrainConfig(optimizer="sgd", weight_decay=0.0, lora_plus_ratio=16.0))
    for parameter in parameters.values():
        parameter.grad = torch.ones(4)
    optimizer.step(1e-2)
    assert torch.allclose(parameters["a"].data, torch.full((4,), -1e-2))
    assert torch.allclose(parameters["b"].data, torch.full((4,), -16e-2))
