"""Pairs, studies and raters for the tests of the vote page."""

import json
import random
import secrets
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_core.evaluation.vote.ballots import BallotBox
from qlora_core.evaluation.vote.pairs import Pair, read_pairs

MODELS = ("zephyr-alpha", "wizard-beta")


def pair_rows(count: int, gold: int = 0) -> list[dict]:
    """`count` rows; the first `gold` of them with gold "a". Which model is model_a changes from row to row."""
    rows = []
    for n in range(count):
        model_a, model_b = MODELS if n % 3 else MODELS[::-1]
        row = {
            "prompt_id": f"p{n}",
            "prompt": f"What is {n} and *why*?",
            "model_a": model_a,
            "answer_a": f"{n} by {model_a[0]}",
            "model_b": model_b,
            "answer_b": f"{n} by {model_b[0]}",
        }
        rows.append({**row, "gold": "a"} if n < gold else row)
    return rows


@pytest.fixture(scope="session")
def make_rows() -> Callable[..., list[dict]]:
    return pair_rows


@pytest.fixture
def write_pairs(tmp_path: Path) -> Callable[..., Path]:
    def write(count: int, gold: int = 0) -> Path:
        path = tmp_path / f"pairs-{count}-{gold}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in pair_rows(count, gold)))
        return path

    return write


@pytest.fixture
def make_box(tmp_path: Path, write_pairs: Callable[..., Path]) -> Callable[..., BallotBox]:
    def make(count: int, gold: int = 0, **settings: object) -> BallotBox:
        return BallotBox.create(
            tmp_path / f"{secrets.token_hex(4)}.sqlite", read_pairs(write_pairs(count, gold)), **settings
        )

    return make


@pytest.fixture(scope="session")
def play() -> Callable[..., int]:
    """A rater's session: random acts until nothing is left; gives the number of acts."""

    def run(box: BallotBox, rater: str, seed: int, *, skips: float = 0.0, undos: float = 0.0, limit: int = 400) -> int:
        draw = random.Random(seed)
        for act in range(limit):
            view = box.current(rater)
            if view.task is None:
                return act
            luck = draw.random()
            if luck < undos and view.can_undo:
                box.undo(rater, secrets.token_hex(16))
            elif luck < undos + skips:
                box.skip(rater, secrets.token_hex(16), view.task.task)
            else:
                choice = draw.choice(["left", "right", "tie", "both_bad"])
                box.vote(rater, secrets.token_hex(16), view.task.task, choice)  # type: ignore[arg-type]
        return limit

    return run


@pytest.fixture(scope="session")
def leading_left() -> Callable[..., bool]:
    """Whether the alphabetically first model was on the left of a decided task."""

    def tell(pair: Pair, left: str) -> bool:
        return (pair.model_a if left == "a" else pair.model_b) == min(pair.model_a, pair.model_b)

    return tell
