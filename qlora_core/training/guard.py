"""Tells a step that must not be taken: a loss or gradient that is not finite, or a loss that jumped.

Pure functions of numbers; knows nothing of what is done about it.
"""

import math
import statistics
from collections.abc import Sequence

from qlora_core.config.train import TrainConfig
from qlora_core.errors import NumericError

SPIKE_WINDOW = 50
_LEAST_HISTORY = 10


def check_loss(loss: float, before: Sequence[float], params: TrainConfig, step: int, rows: Sequence[str]) -> None:
    """Refuse the loss (nats per token or pair, before any update) of `step`; `before` are those of earlier steps.

    A spike is a loss above `spike_factor` times the median of the last 50 steps, told from 10 steps on; for dpo, that
    median counts as ln 2 at least.

    Raises:
        NumericError: naming the step, the value and the rows.
    """
    if not math.isfinite(loss):
        raise NumericError(
            f"the loss of step {step} is {loss} on rows {list(rows)}; the step was not taken. Look at these rows, "
            "lower train.learning_rate, or use train.precision: float32"
        )
    recent = before[-SPIKE_WINDOW:]
    if params.spike_factor is None or len(recent) < _LEAST_HISTORY:
        return
    # A good pair loss is near 0, and one hard batch among easy ones is no fault; ln 2 is that of an untrained adapter
    usual = max(statistics.median(recent), math.log(2) if params.objective == "dpo" else 0.0)
    if loss > params.spike_factor * usual:
        raise NumericError(
            f"the loss of step {step} is {loss:.4g} on rows {list(rows)}, more than train.spike_factor "
            f"{params.spike_factor:g} times the {usual:.4g} of the steps before; the step was not taken. Look at these "
            "rows, lower train.learning_rate, or set train.spike_factor to null"
        )


def check_norm(norm: float, step: int, rate: float, rows: Sequence[str]) -> None:
    """Refuse a gradient norm that is not finite.

    Raises:
        NumericError: naming the step, the value and the rows.
    """
    if not math.isfinite(norm):
        raise NumericError(
            f"the gradient norm of step {step} is {norm} at learning rate {rate:g} on rows {list(rows)}; the step was "
            "not taken. Look at these rows, lower train.learning_rate, or use train.precision: float32"
        )
