"""Verdict rows: one judged comparison of two systems' answers. Knows the row's form, not who judges or rates."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from qlora_core.evaluation.jsonl import read_rows, write_rows

UNSTATED = "unstated"


def _number_as_text(value: object) -> object:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Identifier = Annotated[str, BeforeValidator(_number_as_text), Field(min_length=1)]
"""A name in a row. Whole numbers are taken as their text, since many files number their items."""


class Verdict(BaseModel):
    """One judged comparison. `first` is the answer that was shown first; a null verdict is unscored and has a reason.

    Fields a file of other origin has beside these are ignored; a null verdict without a reason gets "unstated".
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", protected_namespaces=())

    prompt_id: Identifier
    model_a: Identifier
    model_b: Identifier
    verdict: Literal["a", "b", "tie"] | None
    first: Literal["a", "b"]
    judge: Identifier
    reason: str | None = None
    points: tuple[float, float] | None = Field(default=None, strict=False)
    """What a judge that scores gave to (a, b)."""

    @model_validator(mode="before")
    @classmethod
    def _unscored_has_a_reason(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("verdict", "") is None and not data.get("reason"):
            return {**data, "reason": UNSTATED}
        return data

    @model_validator(mode="after")
    def _compares_two_models(self) -> "Verdict":
        if self.model_a == self.model_b:
            raise ValueError(f"model_a and model_b are both {self.model_a!r}; a comparison needs two models")
        return self

    @model_serializer(mode="wrap")
    def _without_empty_fields(self, handler: SerializerFunctionWrapHandler) -> dict[str, object]:
        row = handler(self)
        return {name: value for name, value in row.items() if value is not None or name not in ("reason", "points")}

    @property
    def scored(self) -> bool:
        """Whether the judge decided, a tie included."""
        return self.verdict is not None

    @property
    def score_a(self) -> float:
        """1 where a won, 0 where b won, 0.5 for a tie. Raises ValueError on an unscored row: it is no number."""
        if self.verdict is None:
            raise ValueError(f"verdict on prompt {self.prompt_id!r} is unscored ({self.reason}); it has no score")
        return {"a": 1.0, "b": 0.0, "tie": 0.5}[self.verdict]


def read_verdicts(path: Path) -> list[Verdict]:
    """The verdicts of a JSON Lines file; EvaluationError names each bad line by number."""
    return read_rows(path, Verdict)


def write_verdicts(path: Path, verdicts: list[Verdict]) -> None:
    """Write verdicts as JSON Lines; `reason` only where there is one."""
    write_rows(path, verdicts)
