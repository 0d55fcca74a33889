"""Programmatic checks of prompts from a file: which check belongs to which prompt. Knows rows, not how answers pass.

A row is {"check": {"kind": ..., ...}} with at most one of `prompt_id`, `prompt` (the question's very text) and
`category`; without any it is for all prompts. The narrowest wins, in this order. An `exact_match` without `reference`
compares with the prompt's own reference.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from qlora_core.errors import EvaluationError
from qlora_core.evaluation.answer_book import Prompt
from qlora_core.evaluation.jsonl import read_rows
from qlora_core.evaluation.judge.checks import Check, read_check

SELECTORS = ("prompt_id", "prompt", "category")


class CheckRow(BaseModel):
    """One check and the prompts it is for."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    check: dict[str, Any]
    prompt_id: str | None = None
    prompt: str | None = None
    category: str | None = None

    @model_validator(mode="after")
    def _selects_once_and_is_a_check(self) -> "CheckRow":
        if sum(getattr(self, name) is not None for name in SELECTORS) > 1:
            raise ValueError(f"give at most one of {', '.join(SELECTORS)}")
        try:
            read_check(self.check | ({"reference": "any"} if _takes_reference(self.check) else {}))
        except EvaluationError as error:
            raise ValueError(str(error)) from error
        return self

    @property
    def selected(self) -> tuple[str, str | None]:
        """The selector's name and value; ("all", None) without one."""
        found = [(name, getattr(self, name)) for name in SELECTORS if getattr(self, name) is not None]
        return found[0] if found else ("all", None)


def read_check_rows(path: Path) -> list[CheckRow]:
    """The rows of a JSON Lines file of checks.

    Raises EvaluationError naming each bad line, for an empty file, and for two rows that select the same prompts.
    """
    rows = read_rows(path, CheckRow)
    if not rows:
        raise EvaluationError(f'{path} has no checks; give rows like {{"prompt_id": "...", "check": {{"kind": ...}}}}')
    seen: set[tuple[str, str | None]] = set()
    for row in rows:
        if row.selected in seen:
            name, value = row.selected
            raise EvaluationError(f"{path}: two rows are for {name} {value or ''}; keep one, or join their constraints")
        seen.add(row.selected)
    return rows


def checks_for(rows: list[CheckRow], prompts: Mapping[str, Prompt]) -> dict[str, Check]:
    """The check of each prompt that has one; prompts that no row selects, or whose reference is missing, have none."""
    by_selector = {row.selected: row.check for row in rows}
    found: dict[str, Check] = {}
    for prompt_id, prompt in prompts.items():
        places = (
            ("prompt_id", prompt_id),
            ("prompt", prompt.question),
            ("category", prompt.category),
            ("all", None),
        )
        data = next((by_selector[place] for place in places if place in by_selector), None)
        if data is None or (_takes_reference(data) and not prompt.reference):
            continue
        found[prompt_id] = read_check({**data, "reference": prompt.reference} if _takes_reference(data) else data)
    return found


def _takes_reference(data: Mapping[str, Any]) -> bool:
    return data.get("kind") == "exact_match" and "reference" not in data
