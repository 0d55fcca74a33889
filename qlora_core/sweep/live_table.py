"""A sweep's trials as a table that keeps itself up to date, on standard error and only on a terminal.

Knows records, and the step diaries for what is between two reports of a worker; nothing of how they come about.
"""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from qlora_core.sweep.cost import seconds_per_token
from qlora_core.sweep.record import TrialRecord
from qlora_core.training.step_tail import StepTail

if TYPE_CHECKING:
    from rich.table import Table

MOST_ROWS = 20
_REFRESH_PER_SECOND = 2


_RECENT_STEPS = 20


class SweepView:
    """What is known of a sweep while it runs. `expected_tokens`: of the whole sweep; `price` per worker and hour.

    With `diaries` (see `training.step_log`), trials at work show the step they are at, and not that of their last rung.
    """

    def __init__(
        self, trials: int, expected_tokens: float, price: float | None, diaries: StepTail | None = None
    ) -> None:
        self._trials = trials
        self._expected = expected_tokens
        self._price = price
        self._diaries = diaries
        self._records: dict[str, TrialRecord] = {}
        self._recent: dict[str, deque[dict[str, Any]]] = {}
        self._started = time.monotonic()

    def take(self, record: TrialRecord) -> None:
        """A trial changed."""
        self._records[record.id] = record

    def rows(self) -> list[list[str]]:
        """Trial, state, rungs, step, loss, tokens/s, time left, worker: those at work first, then the best of the rest.

        The time left is to the trial's last step, at the pace of its latest ones; a rung may end it before.
        """
        self._look()
        order = {"waiting": 0, "complete": 1, "pruned": 2, "failed": 3}

        def place(record: TrialRecord) -> tuple[int, bool, float, int]:
            idle = record.state == "waiting" and record.worker is None
            return order[record.state], idle, record.loss if record.loss is not None else float("inf"), record.number

        return [self._row(record) for record in sorted(self._records.values(), key=place)[:MOST_ROWS]]

    def _row(self, record: TrialRecord) -> list[str]:
        speed = f"{record.tokens / record.seconds:,.0f}" if record.seconds > 0 else ""
        step, total, left = record.steps, record.total_steps, ""
        recent = self._recent.get(record.id)
        if recent and record.state == "waiting" and recent[-1]["step"] >= step:
            step, total = recent[-1]["step"], recent[-1]["total_steps"]
            speed = f"{_pace(recent):,.0f}" if _pace(recent) else speed
            left = _time_left(recent)
        return [
            record.id if record.of is None else f"{record.id} ({record.role} of {record.of})",
            "training" if record.state == "waiting" and record.worker is not None else record.state,
            str(len(record.rungs)),
            f"{step}/{total or '?'}",
            "" if record.loss is None else f"{record.loss:.4f}",
            speed,
            left,
            record.worker or "",
        ]

    def _look(self) -> None:
        """Read what the workers have written since the last time, of trials that somebody has."""
        if self._diaries is None:
            return
        for record in list(self._records.values()):
            if record.state == "waiting" and record.worker is not None:
                recent = self._recent.setdefault(record.id, deque(maxlen=_RECENT_STEPS))
                recent.extend(self._diaries.steps(record.id))

    def _tokens(self, record: TrialRecord) -> int:
        recent = self._recent.get(record.id)
        return max(record.tokens, recent[-1]["trained_tokens"]) if recent else record.tokens

    def footer(self) -> str:
        """How many are finished, and what is left of time and money as far as it can be told."""
        records = list(self._records.values())
        done = sum(record.state != "waiting" for record in records)
        tokens, rate = sum(map(self._tokens, records)), seconds_per_token(records)
        parts = [f"{done} of {self._trials} trials finished"]
        if tokens:
            elapsed = time.monotonic() - self._started
            left = max(0.0, self._expected - tokens)
            parts.append(f"about {left / tokens * elapsed / 60:.0f} min left")
            if rate is not None and self._price is not None:
                spent, to_come = (amount * rate / 3600 * self._price for amount in (tokens, left))
                parts.append(f"cost {spent:.2f}, about {to_come:.2f} to come")
        return "; ".join(parts)

    def table(self) -> "Table":
        """All of it for a terminal."""
        from rich.table import Table

        rows = self.rows()
        table = Table(caption=self.footer(), caption_justify="left")
        for name in ("trial", "state", "rungs", "step", "loss", "tokens/s", "left", "worker"):
            table.add_column(name, justify="left" if name in ("trial", "state", "worker") else "right")
        for row in rows:
            table.add_row(*row)
        return table


def _pace(recent: Sequence[Mapping[str, Any]]) -> float:
    """Trained tokens per second of the trial's share of its pack's time; 0 where no time was measured."""
    seconds = sum(line["seconds"] for line in recent)
    return sum(line["tokens"] for line in recent) / seconds if seconds > 0 else 0.0


def _time_left(recent: Sequence[Mapping[str, Any]]) -> str:
    """By the clock, and so with what the neighbours in the pack take; nothing before the second step."""
    first, last = recent[0], recent[-1]
    steps = last["step"] - first["step"]
    if steps <= 0:
        return ""
    left_s = (last["total_steps"] - last["step"]) * (last["time"] - first["time"]) / steps
    return f"{left_s:.0f} s" if left_s < 100 else f"{left_s / 60:.0f} min"


@contextmanager
def live_table(view: SweepView) -> Iterator[Callable[[TrialRecord], None]]:
    """Show the view while the block runs; the block calls what it gets with every record that changed.

    Where standard error is no terminal (CI, a log, `--json` in a pipe) nothing is drawn.
    """
    if not sys.stderr.isatty():
        yield view.take
        return
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True)
    with Live(get_renderable=view.table, console=console, refresh_per_second=_REFRESH_PER_SECOND, transient=True):
        yield view.take
