"""A composition recipe: which adapters, by what rule, with what weights. Knows neither files' contents nor tensors."""

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from qlora_core.config.section import Section
from qlora_core.config.yaml_text import Location, parse_document
from qlora_core.errors import ConfigError

Method = Literal["sum", "weighted", "cat", "negate", "sequential", "ties", "dare", "dare_ties", "learned"]
PRUNING_METHODS = ("ties", "dare", "dare_ties")


class Parent(Section):
    """One adapter of a composition."""

    path: str = Field(description="its PEFT folder; a relative path starts at the recipe's folder")
    weight: float | None = Field(
        default=None, description="factor of its delta, 1 by default; with `learned`, a rival set by hand"
    )
    digest: str | None = Field(default=None, pattern="^[0-9a-f]{64}$", description="refused where the folder differs")
    name: str | None = Field(default=None, description="how reports call it; default: the folder's name")
    task: str | None = Field(default=None, description="held-out text of its task: what is forgotten is told on it")


class LearnConfig(Section):
    """How weights are learned (method `learned`): on `validation`, judged on `test`."""

    validation: str = Field(description="UTF-8 text, documents apart by <|endoftext|>: weights are fitted on it")
    test: str = Field(description="another such text, looked at once: losses, interval, contributions")
    level: Literal["closed_form", "scalars", "modules"] = Field(
        default="scalars", description="the highest rung of the ladder to try; `modules` counts only beyond chance"
    )
    steps: int = Field(default=24, ge=1, description="Adam steps on the weights")
    learning_rate: float = Field(default=0.05, gt=0)
    l1: float = Field(default=1e-3, ge=0, description="nats per unit of weight; drives useless ones to zero")
    trust_radius: float = Field(default=1.0, gt=0, description="how far a weight may go from the closed form's")
    drop_below: float = Field(default=0.02, ge=0, description="nats of validation loss an adapter must be worth")


class RecipeConfig(Section):
    """What `qlora compose` reads. Every field that changes the result is part of the recipe's identity."""

    method: Method = "weighted"
    adapters: list[Parent] = Field(min_length=1)
    base: str | None = Field(default=None, description="the 4-bit base's folder: fit is checked, golden logits made")
    rank: int | None = Field(default=None, ge=1, description="compress the result to this rank by SVD; else exact")
    density: float = Field(default=0.5, gt=0, le=1, description="share of entries that TIES and DARE keep")
    seed: int = Field(default=0, ge=0, description="of DARE's drawing")
    learn: LearnConfig | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        weighted = [parent.path for parent in self.adapters if parent.weight is not None]
        if self.method == "negate" and len(self.adapters) != 1:
            raise ValueError(f"negate takes one adapter, not {len(self.adapters)}; use weighted with weights below 0")
        if self.method in ("sum", "negate", "sequential") and weighted:
            raise ValueError(f"{self.method} takes no weights, {weighted[0]!r} has one; use method weighted")
        if (self.learn is None) == (self.method == "learned"):
            raise ValueError("method learned and the section learn go together; give both or neither")
        if self.base is None and any(parent.task for parent in self.adapters):
            raise ValueError("a task needs base, the 4-bit folder that the losses are taken on")
        if self.method == "learned" and self.base is None:
            raise ValueError("method learned needs base, the 4-bit folder that the losses are taken on")
        return self


def load_recipe(path: Path) -> RecipeConfig:
    """The recipe in a YAML or JSON file.

    Raises:
        ConfigError: it cannot be read, or all its mistakes together, with their lines.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read recipe {str(path)!r}: {error}; name a YAML file") from error
    values, lines = parse_document(text, path.name)
    try:
        return RecipeConfig.model_validate(values)
    except ValidationError as error:
        faults = [_explain(fault, path.name, lines) for fault in error.errors()]
        head = f"{len(faults)} mistakes in {path.name}" if len(faults) > 1 else f"a mistake in {path.name}"
        raise ConfigError("\n  ".join([f"{head}:", *faults])) from None


def _explain(fault: Any, name: str, lines: Mapping[Location, int]) -> str:
    at: Location = tuple(fault["loc"])
    line = next((lines[at[:end]] for end in range(len(at), 0, -1) if at[:end] in lines), 1)
    where = f"{name}:{line}: {'.'.join(map(str, at)) or 'recipe'}"
    if fault["type"] != "extra_forbidden":
        return f"{where}: {fault['msg'].removeprefix('Value error, ')}"
    section = {"adapters": Parent, "learn": LearnConfig}.get(str(at[0]) if len(at) > 1 else "", RecipeConfig)
    near = get_close_matches(str(fault["loc"][-1]), section.model_fields, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(section.model_fields)}"
    return f"{where}: unknown key; {hint}"
