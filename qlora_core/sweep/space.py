"""The search space of a sweep as Optuna draws from it. Knows the `train` section's fields; nothing of studies, workers.

Every draw is a function of the sweep's seed, the trial's number and the results known when it is drawn. It does not
depend on how often the sweep was interrupted or on how many workers it had, so the same config always tries the same
points.
"""

import json
import math
import types
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin

from pydantic import ValidationError

from qlora_core.config.sweep import FloatRange, SweepConfig
from qlora_core.config.train import TrainConfig
from qlora_core.digest import digest_json
from qlora_core.errors import SweepError

if TYPE_CHECKING:
    import optuna

DEFAULT_DRAWS = 8
"""Trials of a random or TPE sweep that names no number."""

_SMALLEST_COHORT = 4
_ENCODED = "json:"


def grid_size(space: Mapping[str, list[Any] | FloatRange]) -> int | None:
    """How many different points the lists span; None when a range makes that endless. An empty space has one point."""
    if any(isinstance(values, FloatRange) for values in space.values()):
        return None
    return math.prod(len(_distinct(values)) for values in space.values() if isinstance(values, list))


def trial_count(sweep: SweepConfig) -> int:
    """How many trials the sweep draws. Never more than the space has points: a grid visits each once."""
    points = grid_size(sweep.space)
    if not sweep.space:
        return 1
    if sweep.method == "grid":
        return min(sweep.trials or points or 1, points or 1)
    return sweep.trials or DEFAULT_DRAWS


def cohort_size(sweep: SweepConfig) -> int:
    """How many trials are drawn together and halved against each other.

    Grid and random draws need no results, so all trials are one cohort. TPE learns between cohorts: a quarter of the
    trials, at least four. The size must not come from the number of workers, or the result would.
    """
    count = trial_count(sweep)
    if sweep.method != "tpe":
        return count
    return min(count, max(_SMALLEST_COHORT, math.ceil(count / 4)))


def make_sampler(sweep: SweepConfig, number: int, name: str = "") -> "optuna.samplers.BaseSampler":
    """The sampler that draws trial `number` (and, within it, the parameter `name`).

    A fresh one for each draw, seeded by what it draws: an interrupted draw goes on as if it had not been interrupted.
    """
    import optuna

    seed = int(digest_json([sweep.seed, number, name])[:8], 16)
    if sweep.method == "grid":
        # One order of the grid for the whole sweep: Optuna takes its points by trial number.
        return optuna.samplers.GridSampler(_encoded_lists(sweep.space), seed=sweep.seed)
    if sweep.method == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=cohort_size(sweep), constant_liar=True)


def suggest(trial: "optuna.Trial", name: str, values: list[Any] | FloatRange) -> None:
    """Draw one parameter into the trial, unless it has it already.

    Raises SweepError for a range over a field that holds no number, or holding no whole number where one is needed.
    """
    if isinstance(values, list):
        trial.suggest_categorical(name, _encoded_list(values))
    elif _holds(name, int):
        low, high = math.ceil(values.low), math.floor(values.high)
        if low > high:
            raise SweepError(
                f"sweep.space.{name}: {values.low} to {values.high} holds no whole number, and {name} needs one"
            )
        trial.suggest_int(name, low, high, log=values.log)
    elif _holds(name, float):
        trial.suggest_float(name, values.low, values.high, log=values.log)
    else:
        raise SweepError(
            f"sweep.space.{name}: a range needs a field that holds a number; {name} does not: list its values instead"
        )


def drawn_values(params: Mapping[str, Any]) -> dict[str, Any]:
    """An Optuna trial's parameters as values of the `train` section."""
    return {name: _decoded(value) for name, value in params.items()}


def trial_params(train: TrainConfig, drawn: Mapping[str, Any]) -> TrainConfig:
    """The `train` section with the drawn values in place, checked as if it had been written that way.

    Raises SweepError naming each refused value: such a point is a failed trial, not the end of the sweep.
    """
    try:
        return TrainConfig(**{**train.model_dump(), **drawn})
    except ValidationError as error:
        faults = (f"{'.'.join(map(str, fault['loc'])) or 'train'}: {fault['msg']}" for fault in error.errors())
        raise SweepError(f"this point is no valid train section: {'; '.join(faults)} (drawn: {dict(drawn)})") from error


def _holds(name: str, kind: type) -> bool:
    annotation = TrainConfig.model_fields[name].annotation
    members = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    return kind in members


def _distinct(values: list[Any]) -> list[Any]:
    kept: list[Any] = []
    for value in values:
        if value not in kept:
            kept.append(value)
    return kept


def _encoded_lists(space: Mapping[str, list[Any] | FloatRange]) -> dict[str, list[Any]]:
    return {name: _encoded_list(values) for name, values in space.items() if isinstance(values, list)}


def _encoded_list(values: list[Any]) -> list[Any]:
    # Optuna stores scalars only; a list of module names travels as JSON text.
    return [
        _ENCODED + json.dumps(value, sort_keys=True) if isinstance(value, list | dict) else value
        for value in _distinct(values)
    ]


def _decoded(value: Any) -> Any:
    if isinstance(value, str) and value.startswith(_ENCODED):
        return json.loads(value.removeprefix(_ENCODED))
    return value
