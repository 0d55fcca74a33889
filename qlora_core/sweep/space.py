"""The search space of a sweep as Optuna draws from it. Knows the `train` section's fields; nothing of studies, workers.

Every draw is a function of the sweep's seed, the trial's number and the results known when it is drawn. It does not
depend on how often the sweep was interrupted or on how many workers it had, so the same config always tries the same
points.
"""

import json
import math
import types
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Union, cast, get_args, get_origin

from pydantic import ValidationError

from qlora_core.config.sweep import FloatRange, SweepConfig
from qlora_core.config.train import TrainConfig
from qlora_core.digest import digest_json
from qlora_core.errors import SweepError
from qlora_core.sweep.record import TrialRecord

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution as Distribution
    from optuna.trial import FrozenTrial

DEFAULT_DRAWS = 8
"""Trials of a random or TPE sweep that names no number."""

LEARNING = ("tpe", "cmaes")
"""Methods whose draws depend on earlier results."""

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

    Grid and random draws need no results, so all trials are one cohort. TPE and CMA-ES learn between cohorts: a quarter
    of the trials, at least four. The size must not come from the number of workers, or the result would. Asynchronous
    halving has one cohort, drawn trial by trial as workers ask for more.
    """
    count = trial_count(sweep)
    if sweep.method not in LEARNING or (sweep.pruning.enabled and sweep.pruning.method == "asha"):
        return count
    return _cohort_of(count)


def _cohort_of(count: int) -> int:
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
    if sweep.method in ("random", "cmaes"):
        return optuna.samplers.RandomSampler(seed=seed)
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=_cohort_of(trial_count(sweep)), constant_liar=True)


def distribution_of(name: str, values: list[Any] | FloatRange) -> "Distribution":
    """What a field is drawn from, as Optuna stores it.

    Raises SweepError for a range over a field that holds no number, or holding no whole number where one is needed.
    """
    from optuna import distributions

    if isinstance(values, list):
        return distributions.CategoricalDistribution(_encoded_list(values))
    if _holds(name, int):
        low, high = math.ceil(values.low), math.floor(values.high)
        if low > high:
            raise SweepError(
                f"sweep.space.{name}: {values.low} to {values.high} holds no whole number, and {name} needs one"
            )
        return distributions.IntDistribution(low, high, log=values.log)
    if _holds(name, float):
        return distributions.FloatDistribution(values.low, values.high, log=values.log)
    raise SweepError(
        f"sweep.space.{name}: a range needs a field that holds a number; {name} does not: list its values instead"
    )


def suggest(trial: "optuna.Trial", name: str, values: list[Any] | FloatRange) -> None:
    """Draw one parameter into the trial, unless it has it already; raises as `distribution_of` does."""
    spec: Any = distribution_of(name, values)
    if isinstance(values, list):
        trial.suggest_categorical(name, _encoded_list(values))
    elif _holds(name, int):
        trial.suggest_int(name, int(spec.low), int(spec.high), log=values.log)
    else:
        trial.suggest_float(name, values.low, values.high, log=values.log)


class PointDrawer:
    """Draws points that depend on the seed, the number and whole earlier cohorts: every method but TPE."""

    def __init__(self, sweep: SweepConfig) -> None:
        self._sweep = sweep
        self._specs = {name: distribution_of(name, values) for name, values in sorted(sweep.space.items())}
        self._grid = make_sampler(sweep, 0) if sweep.method == "grid" and sweep.space else None

    def draw(self, number: int, earlier: Sequence[TrialRecord]) -> "FrozenTrial":
        """Trial `number` as Optuna stores it, still to be run. `earlier`: the trials before it, for CMA-ES alone."""
        from optuna.trial import TrialState, create_trial

        trial = create_trial(state=TrialState.RUNNING)
        trial.number = number
        if self._grid is not None:
            trial.system_attrs = {"grid_id": number}
        moved = self._moved(number, earlier) if self._sweep.method == "cmaes" else {}
        for name, spec in self._specs.items():
            trial.distributions[name] = spec
            trial.params[name] = moved[name] if name in moved else self._value(trial, name)
        trial.system_attrs = {}
        return trial

    def _value(self, trial: "FrozenTrial", name: str) -> Any:
        sampler = self._grid or make_sampler(self._sweep, trial.number, name)
        # Neither a grid nor a random draw looks at the study.
        return sampler.sample_independent(cast("optuna.Study", None), trial, name, self._specs[name])

    def _moved(self, number: int, earlier: Sequence[TrialRecord]) -> dict[str, Any]:
        from qlora_core.sweep.cma_es import next_point

        ranges = {name: values for name, values in self._sweep.space.items() if isinstance(values, FloatRange)}
        size = cohort_size(self._sweep)
        done = [earlier[first : first + size] for first in range(0, number - number % size, size)]
        seed = int(digest_json([self._sweep.seed, "cmaes"])[:8], 16)
        point = next_point(ranges, seed, size, done, number % size)
        return {name: self._fitted(name, value) for name, value in point.items()}

    def _fitted(self, name: str, value: float) -> float | int:
        spec: Any = self._specs[name]
        return min(int(spec.high), max(int(spec.low), round(value))) if _holds(name, int) else value


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
        point = dict(sorted(drawn.items()))  # the study gives them back in another order than they were drawn in
        raise SweepError(f"this point is no valid train section: {'; '.join(faults)} (drawn: {point})") from error


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
