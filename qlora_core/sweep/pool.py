"""What the driver asks of the workers: the interface of `Cluster`, and how a call ends. Knows no Ray."""

from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Outcome:
    """How a call ended: with `result`, or with `error`. `died`: the worker is gone, and how far it came is unknown.

    `preempted`: it is gone because its node is, which is no fault of the work it had.
    """

    worker: str
    task: Any
    result: Any = None
    error: str | None = None
    died: bool = False
    preempted: bool = False


class WorkerPool(Protocol):
    """Workers by name, each with one call at a time."""

    def idle(self) -> list[str]:
        """Workers that wait for work, in the order started."""
        ...

    def submit(self, worker: str, task: Any, method: str, *arguments: Any) -> None:
        """Call a method of an idle worker; its end comes out of `wait` as an Outcome with `task`."""
        ...

    def wait(self, timeout_s: float) -> list[Outcome]:
        """What ended within `timeout_s`; empty when nothing did."""
        ...

    def recall(self, worker: str) -> None:
        """Ask a busy worker to end its call soon, with its trials kept where they are."""
        ...

    def expect(self, workers: int) -> None:
        """Say for how many workers there is work; those beyond may end once they have been idle for a while."""
        ...
