"""The `sweep` section: which settings are tried, and how hopeless trials are stopped early."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from qlora_core.config.section import Section
from qlora_core.config.train import TrainConfig

WITHOUT_EFFECT = frozenset({"max_attempts", "max_preemptions", "storage"})
"""Fields that change no result, only whether and how one is reached: no part of a key or of a study's identity."""


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
    method: Literal["halving", "asha"] = Field(
        default="halving",
        description="halving: who goes on depends on no worker's speed; asha: judged against those that have reported",
    )
    hyperband: bool = Field(default=False, description="divide trials among brackets with later and later first rungs")
    min_steps: int | None = Field(default=None, ge=1, description="first rung; default: a quarter of a trial's steps")
    min_tokens: int | None = Field(default=None, ge=1, description="first rung, in trained tokens instead of steps")
    reduction_factor: int = Field(default=2, ge=2)

    @model_validator(mode="after")
    def _one_first_rung(self) -> "PruningConfig":
        if self.min_steps is not None and self.min_tokens is not None:
            raise ValueError("min_steps and min_tokens both say where the first rung is; keep one of them")
        return self


OBJECTIVES = ("loss", "adapter_size", "tokens")


class FinalistsConfig(Section):
    """What is done with the best trials before one of them is the winner."""

    count: int = Field(default=2, ge=1, description="how many of the best complete trials are finalists")
    seeds: int = Field(default=3, ge=1, description="runs of each finalist, its own and others from the next seeds on")
    confidence: float = Field(default=0.95, gt=0, lt=1, description="of the interval of each finalist's mean loss")
    recheck: bool = Field(default=True, description="train the winner once more, alone, and compare its loss")


class SweepConfig(Section):
    """Search over the `train` section. Without a space there is one trial: the section as it stands."""

    method: Literal["grid", "random", "tpe", "cmaes"] = "grid"
    space: dict[str, list[Any] | FloatRange] = Field(default_factory=dict, description="train field: values or range")
    trials: int | None = Field(default=None, ge=1, description="how many to draw; default: the grid's size, else 8")
    pruning: PruningConfig = PruningConfig()
    seed: int = Field(default=0, ge=0)
    objectives: list[Literal["loss", "adapter_size", "tokens"]] = Field(
        default=["loss"], description="what is to be small; with more than one, the trials none beats in all are kept"
    )
    loss_tolerance: float = Field(
        default=0.0, ge=0, description="nats by which a smaller or cheaper trial of those may lag and still be the best"
    )
    finalists: FinalistsConfig | None = None
    candidates: int = Field(
        default=1, ge=1, description="how many of the best complete trials are evaluated; the gate sees the best alone"
    )
    max_attempts: int = Field(default=3, ge=1, description="how often a trial is started again after its worker died")
    max_preemptions: int = Field(
        default=20, ge=0, description="how often a trial is started again after its worker's node went away"
    )
    storage: str | None = Field(
        default=None, description="SQLAlchemy URL of the study, without a password; default: SQLite in the work folder"
    )

    @field_validator("space")
    @classmethod
    def _names_train_fields(cls, space: dict[str, Any]) -> dict[str, Any]:
        from difflib import get_close_matches

        for name, values in space.items():
            if name not in TrainConfig.model_fields:
                near = get_close_matches(name, TrainConfig.model_fields, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"{name!r} is not a field of the train section{hint}")
            if name == "objective":
                raise ValueError("losses of different objectives cannot be compared; set train.objective for all")
            if name in ("start_from", "start_as"):
                raise ValueError(f"all trials of a sweep begin alike; set train.{name} for all")
            if isinstance(values, list) and not values:
                raise ValueError(f"the list of values for {name!r} is empty; name at least one")
        return space

    @field_validator("objectives")
    @classmethod
    def _has_loss_once(cls, objectives: list[str]) -> list[str]:
        if "loss" not in objectives or len(set(objectives)) < len(objectives):
            raise ValueError(f"objectives are {objectives}; name loss, and each of {OBJECTIVES} at most once")
        return objectives

    @field_validator("storage")
    @classmethod
    def _holds_no_password(cls, storage: str | None) -> str | None:
        from urllib.parse import urlsplit

        if storage is None:
            return None
        if "://" not in storage:
            raise ValueError(f"{storage!r} is no SQLAlchemy URL; write for instance postgresql+psycopg://host/database")
        if urlsplit(storage).password is not None:
            raise ValueError("no password belongs in a config; give it as PGPASSWORD or in the driver's own file")
        return storage

    @model_validator(mode="after")
    def _learns_from_one_number(self) -> "SweepConfig":
        if self.method == "cmaes" and len(self.objectives) > 1:
            raise ValueError(f"cmaes takes one objective, not {self.objectives}; use method: tpe or random")
        if self.method == "cmaes" and not any(isinstance(values, FloatRange) for values in self.space.values()):
            raise ValueError("cmaes searches ranges; give at least one field of sweep.space a range, or use grid")
        if self.method == "cmaes" and self.pruning.method == "asha":
            raise ValueError("cmaes learns from whole generations; use pruning.method: halving, or method: tpe")
        return self

    @model_validator(mode="after")
    def _has_points_to_try(self) -> "SweepConfig":
        if not self.space and (self.method != "grid" or (self.trials or 1) > 1):
            raise ValueError(
                f"the search space is empty, so method: {self.method} with trials: {self.trials} has nothing to try; "
                "name fields of the train section in sweep.space"
            )
        return self

    @model_validator(mode="after")
    def _grid_needs_lists(self) -> "SweepConfig":
        ranges = [name for name, values in self.space.items() if isinstance(values, FloatRange)]
        if self.method == "grid" and ranges:
            raise ValueError(
                f"a grid needs lists of values, but {ranges} are ranges; list values or use method: random"
            )
        return self
