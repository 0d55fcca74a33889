"""CMA-ES (Hansen 2016) over the ranges of a search space; fields with lists are drawn at random beside it.

A cohort of the sweep is a generation. The optimizer is built anew for every draw from the results on record, and so
needs no state of its own: Optuna's sampler would keep a pickle in the study, and unpickle what it finds there.
Generations are ranked, as CMA-ES does: a trial that came further through the rungs before one that was pruned earlier,
then by loss, a failed one last. Knows nothing of studies.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from cmaes import CMA

from qlora_core.config.sweep import FloatRange
from qlora_core.sweep.record import TrialRecord

START = 0.5
"""The middle of every range, on its own scale."""

SPREAD = 0.25
"""Of the first generation: a range is four of these, so that nearly all of it is within reach."""


def next_point(
    ranges: Mapping[str, FloatRange], seed: int, size: int, generations: Sequence[Sequence[TrialRecord]], place: int
) -> dict[str, float]:
    """The point at `place` (from 0) of the generation after `generations`, each `size` trials long.

    Values are not rounded: whole-number fields are the caller's.
    """
    names = sorted(ranges)
    unit = np.array([[0.0, 1.0]] * len(names))
    optimizer = CMA(np.full(len(names), START), SPREAD, bounds=unit, seed=seed, population_size=size)
    for generation in generations:
        for _ in range(size):  # its random numbers are drawn as they were
            optimizer.ask()
        ranked = sorted(generation, key=_rank)
        points = [np.array([_to_unit(record.params[name], ranges[name]) for name in names]) for record in ranked]
        optimizer.tell([(point, float(rank)) for rank, point in enumerate(points)])
    for _ in range(place):
        optimizer.ask()
    return {name: _from_unit(float(value), ranges[name]) for name, value in zip(names, optimizer.ask(), strict=True)}


def _rank(record: TrialRecord) -> tuple[int, float, str]:
    failed = record.state == "failed" or record.loss is None
    return (1 if failed else -len(record.rungs), math.inf if record.loss is None else record.loss, record.id)


def _to_unit(value: Any, span: FloatRange) -> float:
    low, high, value = (math.log(number) if span.log else float(number) for number in (span.low, span.high, value))
    return min(1.0, max(0.0, (value - low) / (high - low)))


def _from_unit(value: float, span: FloatRange) -> float:
    low, high = (math.log(number) if span.log else number for number in (span.low, span.high))
    found = low + min(1.0, max(0.0, value)) * (high - low)
    return min(span.high, max(span.low, math.exp(found) if span.log else found))
