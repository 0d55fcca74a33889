"""The `sweep` section: which settings are tried, and how hopeless trials are stopped early."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from qlora_core.config.section import Section
from qlora_core.config.train import TrainConfig


class FloatRange(Section):
    """A range of numbers to draw from; `log: true` draws evenly over orders of magnitude."""

    low: float
    high: float
    log: bool = False

    @model_validator(mode="after")
    def _is_a_range(self) -> "FloatRange":
        if not self.low < self.high:
            raise ValueError(f"low ({self.low}) must be under high ({self.high})")
        if self.log and self.low <= 0:
            raise ValueError(f"a log range starts above 0, not at {self.low}")
        return self


class PruningConfig(Section):
    """Successive halving (Jamieson and Talwalkar 2016): at each rung only the best 1/reduction_factor go on."""

    enabled: bool = True
    min_steps: int | None = Field(default=None, ge=1, description="first rung; default: a quarter of a trial's steps")
    reduction_factor: int = Field(default=2, ge=2)


class SweepConfig(Section):
    """Search over the `train` section. Without a space there is one trial: the section as it stands."""

    method: Literal["grid", "random", "tpe"] = "grid"
    space: dict[str, list[Any] | FloatRange] = Field(default_factory=dict, description="train field: values or range")
    trials: int | None = Field(default=None, ge=1, description="how many to draw; default: the grid's size, else 8")
    pruning: PruningConfig = PruningConfig()
    seed: int = Field(default=0, ge=0)
    max_attempts: int = Field(default=3, ge=1, description="how often a trial is started again after its worker died")

    @field_validator("space")
    @classmethod
    def _names_train_fields(cls, space: dict[str, Any]) -> dict[str, Any]:
        from difflib import get_close_matches

        for name, values in space.items():
            if name not in TrainConfig.model_fields:
                near = get_close_matches(name, TrainConfig.model_fields, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"{name!r} is not a field of the train section{hint}")
            if isinstance(values, list) and not values:
                raise ValueError(f"the list of values for {name!r} is empty; name at least one")
        return space

    @model_validator(mode="after")
    def _grid_needs_lists(self) -> "SweepConfig":
        ranges = [name for name, values in self.space.items() if isinstance(values, FloatRange)]
        if self.method == "grid" and ranges:
            raise ValueError(
                f"a grid needs lists of values, but {ranges} are ranges; list values or use method: random"
            )
        return self
