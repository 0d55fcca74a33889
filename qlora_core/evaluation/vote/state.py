"""Where a study stands: a fold over its events. Pure; knows nothing of files, clocks, assignment or the page."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, cast

from qlora_core.evaluation.vote.journal import Event

Side = Literal["a", "b"]
Occasion = Literal["rating", "gold", "repeat", "self"]
Choice = Literal["left", "right", "tie", "both_bad"]
LabelName = Literal["a", "b", "tie", "both_bad"]


class Task(NamedTuple):
    """One showing of an item to a rater. `left` is the answer on the left; of a self-pair, the one on both sides."""

    task: str
    rater: str
    item: str
    occasion: Occasion
    left: Side
    shown_at: float
    expires_at: float


class Decision(NamedTuple):
    """What a rater did with a task and has not undone; `choice` null: skipped."""

    seq: int
    at: float
    task: Task
    choice: Choice | None
    note: str

    @property
    def label(self) -> LabelName | None:
        """The choice in terms of the pair's answers a and b; null where skipped.

        Of a self-pair, `left` and `right` both name the one answer that was shown.
        """
        if self.choice is None or self.choice in ("tie", "both_bad"):
            return cast("LabelName | None", self.choice)
        other: Side = "b" if self.task.left == "a" else "a"
        return self.task.left if self.choice == "left" or self.task.occasion == "self" else other


class ImportedVote(NamedTuple):
    """A vote cast elsewhere. `first` is null where the file does not say which answer was shown first."""

    at: float | None
    rater: str
    item: str
    label: LabelName
    first: Side | None


@dataclass
class StudyState:
    """All that raters did, as far as it stands. `seq` is the last event taken in."""

    seq: int = 0
    tasks: dict[str, Task] = field(default_factory=dict)
    open_tasks: dict[str, Task] = field(default_factory=dict)
    """rater -> the task in front of them"""
    decisions: defaultdict[str, list[Decision]] = field(default_factory=lambda: defaultdict(list))
    """rater -> decisions in order"""
    imported: list[ImportedVote] = field(default_factory=list)
    excluded: set[str] = field(default_factory=set)
    requests: set[tuple[str, str]] = field(default_factory=set)
    voters: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    """item -> raters whose rating of it stands"""

    def take_in(self, events: Iterable[Event]) -> None:
        """Go on from `seq` with later events, in order."""
        for event in events:
            body = event.body
            if event.request_id is not None:
                self.requests.add((event.rater, event.request_id))
            match event.kind:
                case "reserve":
                    task = Task(body["task"], event.rater, body["item"], body["occasion"], body["left"], event.at,
                                body["expires_at"])  # fmt: skip
                    self.tasks[task.task] = task
                    self.open_tasks[event.rater] = task
                case "vote" | "skip":
                    self._decide(event, body)
                case "undo":
                    self._undo(event.rater)
                case "exclude":
                    (self.excluded.add if body["excluded"] else self.excluded.discard)(event.rater)
                case "import":
                    self.imported.append(
                        ImportedVote(body["cast_at"], event.rater, body["item"], body["label"], body["first"])
                    )
                    self.voters[body["item"]].add(event.rater)
            self.seq = event.seq

    def decided(self, rater: str) -> set[tuple[str, Occasion]]:
        """The items a rater has done with, each with its occasion."""
        return {(decision.task.item, decision.task.occasion) for decision in self.decisions[rater]}

    def _decide(self, event: Event, body: Any) -> None:
        task = self.tasks[body["task"]]
        self.decisions[event.rater].append(
            Decision(event.seq, event.at, task, body.get("choice"), body.get("note", ""))
        )
        if self.open_tasks.get(event.rater) == task:
            del self.open_tasks[event.rater]
        if task.occasion == "rating" and event.kind == "vote":
            self.voters[task.item].add(event.rater)

    def _undo(self, rater: str) -> None:
        task = self.decisions[rater].pop().task
        if task.occasion == "rating":
            self.voters[task.item].discard(rater)
