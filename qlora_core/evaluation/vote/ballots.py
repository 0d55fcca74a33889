"""What a rater may do: see the next pair, vote, skip, undo. Every act is one transaction and may be sent twice.

Knows the study's file and the rules of voting, not the web.
"""

import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import ValidationError

from qlora_core.digest import digest_json
from qlora_core.errors import EvaluationError
from qlora_core.evaluation.vote.assignment import Assigner, Draft, Progress, StudySettings
from qlora_core.evaluation.vote.journal import Journal, Transaction
from qlora_core.evaluation.vote.pairs import Pair
from qlora_core.evaluation.vote.state import Choice, ImportedVote, StudyState, Task


class BallotConflictError(EvaluationError):
    """The act does not fit where the study stands; the message is for the rater."""


class View(NamedTuple):
    """What a rater has in front of them. `task` null: nothing is left."""

    task: Task | None
    progress: Progress
    can_undo: bool


class BallotBox:
    """A study that is open for votes; safe for threads, and for other processes on the same file."""

    def __init__(self, path: Path) -> None:
        self.journal = Journal(path)
        facts, items = self.journal.read()
        self.study_id: str = facts["study_id"]
        self.pairs_digest: str = facts["pairs_digest"]
        try:
            self.settings = StudySettings.model_validate(facts["settings"])
            self.pairs = {item_id: Pair.model_validate(pair) for item_id, pair in items}
        except ValidationError as error:
            raise EvaluationError(f"{path} is not a study this version reads ({error}); begin a new one") from error
        self.assigner = Assigner(self.settings, self.pairs)
        self._lock = threading.Lock()
        self._state = StudyState()

    @classmethod
    def create(cls, path: Path, pairs: Sequence[Pair], **settings: Any) -> "BallotBox":
        """Begin a study over pairs with item ids. `settings` are those of StudySettings, less the salt."""
        chosen = StudySettings(salt=secrets.token_hex(16), **settings)
        facts = {
            "study_id": secrets.token_hex(8),
            "settings": chosen.model_dump(),
            "pairs_digest": digest_pairs(pairs),
            "begun": time.time(),
        }
        Journal.create(path, facts, [(str(pair.item_id), pair.model_dump()) for pair in pairs])
        return cls(path)

    @contextmanager
    def state(self) -> Iterator[StudyState]:
        """Where the study stands now, for reading within the block."""
        with self._lock:
            self._state.take_in(self.journal.events_after(self._state.seq))
            yield self._state

    def current(self, rater: str) -> View:
        """The rater's pair, reserved for them: the one they had, as after a reload, else the next."""
        with self._turn() as (transaction, state):
            now = time.time()
            if rater in state.excluded:
                return View(None, Progress(len(state.decisions[rater]), 0), False)
            self._reserve_next(transaction, state, rater, now)
            task = state.open_tasks.get(rater)
            progress = self.assigner.progress(state, rater, now) if task else Progress(len(state.decisions[rater]), 0)
            return View(task, progress, bool(state.decisions[rater]))

    def vote(self, rater: str, request_id: str, task_id: str, choice: Choice, note: str = "") -> None:
        """Record a choice. The same request again, or the same choice on the same task, changes nothing.

        Raises BallotConflictError for a pair the rater was not shown or has decided otherwise.
        """
        self._decide("vote", rater, request_id, task_id, choice, {"task": task_id, "choice": choice, "note": note})

    def skip(self, rater: str, request_id: str, task_id: str) -> None:
        """Pass a pair on to other raters; it is counted as skipped. Raises as `vote` does."""
        self._decide("skip", rater, request_id, task_id, None, {"task": task_id})

    def undo(self, rater: str, request_id: str) -> None:
        """Take the last standing decision back; its pair lies open again, sides as before. May be repeated.

        Raises BallotConflictError where there is nothing to take back.
        """
        with self._turn() as (transaction, state):
            if (rater, request_id) in state.requests:
                return
            _check_not_excluded(state, rater)
            if not state.decisions[rater]:
                raise BallotConflictError("There is nothing to take back.")
            last = state.decisions[rater][-1]
            transaction.append("undo", rater, {"undone": last.seq}, request_id)
            self._reserve(transaction, rater, Draft(last.task.item, last.task.occasion, last.task.left), time.time())

    def set_excluded(self, rater: str, excluded: bool, request_id: str) -> None:
        """Leave a rater's votes out of every count, or take them in again; nothing is deleted."""
        with self._turn() as (transaction, state):
            if (rater, request_id) not in state.requests and (rater in state.excluded) != excluded:
                transaction.append("exclude", rater, {"excluded": excluded}, request_id)

    def take_import(self, votes: Sequence[tuple[str, ImportedVote]]) -> int:
        """Add votes cast elsewhere, each with a key that tells it from all others; gives how many were new.

        A rater's second vote on an item raises EvaluationError and nothing is taken.
        """
        with self._turn() as (transaction, state):
            known = {(vote.rater, vote.item) for vote in state.imported}
            for rater, decisions in state.decisions.items():
                known |= {(rater, decision.task.item) for decision in decisions if decision.task.occasion == "rating"}
            added = 0
            for key, vote in votes:
                if (vote.rater, key) in state.requests:
                    continue
                if (vote.rater, vote.item) in known:
                    raise EvaluationError(
                        f"rater {vote.rater!r} has a vote on item {vote.item!r} already; remove one of them"
                    )
                known.add((vote.rater, vote.item))
                body = {"item": vote.item, "label": vote.label, "first": vote.first, "cast_at": vote.at}
                transaction.append("import", vote.rater, body, key)
                added += 1
            return added

    @contextmanager
    def _turn(self) -> Iterator[tuple[Transaction, StudyState]]:
        with self._lock:
            try:
                with self.journal.transaction() as transaction:
                    self._state.take_in(transaction.events_after(self._state.seq))
                    yield transaction, self._state
            except BaseException:
                self._state = StudyState()  # it may hold events that were rolled back
                raise

    def _decide(
        self,
        kind: Literal["vote", "skip"],
        rater: str,
        request_id: str,
        task_id: str,
        choice: Choice | None,
        body: dict[str, Any],
    ) -> None:
        with self._turn() as (transaction, state):
            if (rater, request_id) in state.requests:
                return
            _check_not_excluded(state, rater)
            task = state.tasks.get(task_id)
            if task is None or task.rater != rater:
                raise BallotConflictError("This pair was not shown to you; here is yours.")
            for decision in state.decisions[rater]:
                if (decision.task.item, decision.task.occasion) == (task.item, task.occasion):
                    if decision.task.task == task_id and decision.choice == choice:
                        return
                    raise BallotConflictError(
                        "You decided this pair before, in another tab perhaps. Undo takes it back."
                    )
            transaction.append(kind, rater, body, request_id)

    def _reserve_next(self, transaction: Transaction, state: StudyState, rater: str, now: float) -> None:
        task = state.open_tasks.get(rater)
        if task is not None:
            if task.expires_at - now > self.settings.reservation_s / 2:
                return
            if task.occasion != "rating" or self.assigner.has_room(state, rater, task.item, now):
                self._reserve(transaction, rater, Draft(task.item, task.occasion, task.left), now)
            else:
                del state.open_tasks[rater]  # others finished it meanwhile
                task = None
        if task is None:
            draft = self.assigner.next_draft(state, rater, now)
            if draft is not None:
                self._reserve(transaction, rater, draft, now)
        state.take_in(transaction.events_after(state.seq))

    def _reserve(self, transaction: Transaction, rater: str, draft: Draft, now: float) -> None:
        body = {
            "task": self.assigner.task_id(rater, draft),
            **draft._asdict(),
            "expires_at": now + self.settings.reservation_s,
        }
        transaction.append("reserve", rater, body)


def digest_pairs(pairs: Sequence[Pair]) -> str:
    """Identity of what is compared, in its order."""
    return digest_json([pair.model_dump() for pair in pairs])


def _check_not_excluded(state: StudyState, rater: str) -> None:
    if rater in state.excluded:
        raise BallotConflictError("Your session was closed. Thank you for your help.")
