"""Which pair a rater sees next, and on which sides. Pure: the same state, rater and time give the same answer.

Order and first sides are keyed hashes, so neither tells a model; sides are then balanced per rater within one.
Knows nothing of files, links or the page.
"""

import hashlib
import hmac
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from qlora_core.evaluation.vote.pairs import Pair
from qlora_core.evaluation.vote.state import Decision, Occasion, Side, StudyState

MIN_GAP = 6
"""Decisions between an item and its repeat or self-pair, where the session is long enough."""
SHORT_SESSION = 4
"""Ratings from which on every rater gets at least one of each hidden check that is switched on."""


class StudySettings(BaseModel):
    """What is fixed when a study begins."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    salt: str
    raters_per_item: int = Field(default=3, ge=1)
    repeat_share: float = Field(default=0.1, ge=0, le=0.5)
    """Of a rater's ratings: shown again later with sides exchanged."""
    self_share: float = Field(default=0.05, ge=0, le=0.5)
    """Of a rater's ratings: one answer shown against itself."""
    reservation_s: float = Field(default=1800.0, gt=0)


class Draft(NamedTuple):
    """A task not yet reserved."""

    item: str
    occasion: Occasion
    left: Side


class Progress(NamedTuple):
    """Decisions a rater has taken and those still expected; the latter falls as others finish items."""

    done: int
    remaining: int


class Assigner:
    """Decides over a study's items; holds nothing that changes."""

    def __init__(self, settings: StudySettings, pairs: Mapping[str, Pair]) -> None:
        self.settings = settings
        self.pairs = pairs
        self._order = lru_cache(maxsize=256)(self._keyed_order)

    def task_id(self, rater: str, draft: Draft) -> str:
        """An opaque name, bound to the sides: a page left open in another tab can never vote with exchanged sides."""
        return self._hash(rater, draft.item, draft.occasion, draft.left, "task")[:20]

    def has_room(self, state: StudyState, rater: str, item: str, now: float) -> bool:
        """Whether one more rating of `item` by `rater` is wanted, reservations of others that still run included."""
        others = {name for name in state.voters[item] - state.excluded if name != rater}
        for name, task in state.open_tasks.items():
            if name != rater and task.item == item and task.occasion == "rating" and task.expires_at > now:
                others.add(name)
        return len(others) < self.settings.raters_per_item

    def next_draft(self, state: StudyState, rater: str, now: float) -> Draft | None:
        """The rater's next task, or None where nothing is left for them."""
        queue = self._queue(state, rater, now)
        repeats, selves = self._checks_wanted(state, rater, len(queue) - self._gold_in(queue))
        remaining = len(queue) + repeats + selves
        if not remaining:
            return None
        decisions = state.decisions[rater]
        draw = int(self._hash(rater, str(len(decisions)), "draw")[:12], 16) / 16**12 * remaining
        gap = MIN_GAP if queue else 0
        check = None
        if draw < repeats:
            check = self._repeat(decisions, gap)
        elif draw < repeats + selves:
            check = self._self_pair(rater, decisions, gap)
        if check is None and not queue:
            check = self._repeat(decisions, 0) if repeats else None
            check = check or (self._self_pair(rater, decisions, 0) if selves else None)
        if check is not None or not queue:
            return check
        item = queue[0]
        return Draft(item, "rating" if self.pairs[item].gold is None else "gold", self._side(rater, item, decisions))

    def progress(self, state: StudyState, rater: str, now: float) -> Progress:
        """How far a rater is. Whatever lies open in front of them counts as remaining."""
        queue = self._queue(state, rater, now)
        checks = self._checks_wanted(state, rater, len(queue) - self._gold_in(queue))
        return Progress(len(state.decisions[rater]), len(queue) + sum(checks))

    def _queue(self, state: StudyState, rater: str, now: float) -> list[str]:
        decided = state.decided(rater)
        imported = {vote.item for vote in state.imported if vote.rater == rater}
        return [
            item
            for item in self._order(rater)
            if item not in imported
            and (item, "rating") not in decided
            and (item, "gold") not in decided
            and (self.pairs[item].gold is not None or self.has_room(state, rater, item, now))
        ]

    def _gold_in(self, queue: list[str]) -> int:
        return sum(self.pairs[item].gold is not None for item in queue)

    def _checks_wanted(self, state: StudyState, rater: str, open_ratings: int) -> tuple[int, int]:
        """Repeats and self-pairs still to come."""
        decisions = state.decisions[rater]
        rated = sum(decision.task.occasion == "rating" and decision.choice is not None for decision in decisions)
        wanted = []
        for share, occasion in ((self.settings.repeat_share, "repeat"), (self.settings.self_share, "self")):
            least = int(share > 0 and rated + open_ratings >= SHORT_SESSION)
            given = sum(decision.task.occasion == occasion for decision in decisions)
            wanted.append(max(0, max(least, round(share * (rated + open_ratings))) - given))
        return wanted[0], wanted[1]

    def _repeat(self, decisions: list[Decision], gap: int) -> Draft | None:
        """The oldest rating whose exchanged sides keep the balance."""
        balance = self._balance(decisions)
        for task in _seen_once(decisions, gap):
            left: Side = "b" if task.left == "a" else "a"
            if balance == 0 or self._leading_left(task.item, left) == (balance < 0):
                return Draft(task.item, "repeat", left)
        return None

    def _self_pair(self, rater: str, decisions: list[Decision], gap: int) -> Draft | None:
        tasks = _seen_once(decisions, gap)
        if not tasks:
            return None
        item = min(tasks, key=lambda task: self._hash(rater, task.item, "self")).item
        return Draft(item, "self", "a" if int(self._hash(rater, item, "self-side")[:8], 16) % 2 else "b")

    def _side(self, rater: str, item: str, decisions: list[Decision]) -> Side:
        """The side that balances all of the rater's votes, else those on these two models, else a keyed coin."""
        models = self._models(item)
        balance = self._balance(decisions) or self._balance(
            [decision for decision in decisions if self._models(decision.task.item) == models]
        )
        leading = balance < 0 if balance else int(self._hash(rater, item, "side")[:8], 16) % 2 == 0
        return "a" if leading == (self.pairs[item].model_a == models[0]) else "b"

    def _balance(self, decisions: list[Decision]) -> int:
        """Votes with the alphabetically first model on the left, less those with it on the right."""
        sides = [
            self._leading_left(decision.task.item, decision.task.left)
            for decision in decisions
            if decision.choice is not None and decision.task.occasion != "self"
        ]
        return 2 * sum(sides) - len(sides)

    def _leading_left(self, item: str, left: Side) -> bool:
        pair = self.pairs[item]
        return (pair.model_a if left == "a" else pair.model_b) == self._models(item)[0]

    def _models(self, item: str) -> tuple[str, ...]:
        return tuple(sorted((self.pairs[item].model_a, self.pairs[item].model_b)))

    def _keyed_order(self, rater: str) -> tuple[str, ...]:
        return tuple(sorted(self.pairs, key=lambda item: self._hash(rater, item, "order")))

    def _hash(self, *parts: str) -> str:
        message = "\x1f".join(parts).encode()
        return hmac.new(self.settings.salt.encode(), message, hashlib.sha256).hexdigest()


def _seen_once(decisions: list[Decision], gap: int) -> list:
    """Tasks of ratings at least `gap` decisions ago that were neither repeated nor shown against themselves."""
    used = {decision.task.item for decision in decisions if decision.task.occasion in ("repeat", "self")}
    old = decisions[: max(0, len(decisions) - gap)]
    return [
        decision.task
        for decision in old
        if decision.task.occasion == "rating" and decision.choice is not None and decision.task.item not in used
    ]
