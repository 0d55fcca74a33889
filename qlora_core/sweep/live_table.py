"""A sweep's trials as a table that keeps itself up to date, on standard error and only on a terminal.

Knows records; nothing of how they come about.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from qlora_core.sweep.cost import seconds_per_token
from qlora_core.sweep.record import TrialRecord

if TYPE_CHECKING:
    from rich.table import Table

MOST_ROWS = 20
_REFRESH_PER_SECOND = 2


class SweepView:
    """What is known of a sweep while it runs. `expected_tokens`: of the whole sweep; `price` per worker and hour."""

    def __init__(self, trials: int, expected_tokens: float, price: float | None) -> None:
        self._trials = trials
        self._expected = expected_tokens
        self._price = price
        self._records: dict[str, TrialRecord] = {}
        self._started = time.monotonic()

    def take(self, record: TrialRecord) -> None:
        """A trial changed."""
        self._records[record.id] = record

    def rows(self) -> list[list[str]]:
        """Trial, state, rungs, step, loss, tokens/s, worker: those at work first, then the best of the others."""
        order = {"waiting": 0, "complete": 1, "pruned": 2, "failed": 3}

        def place(record: TrialRecord) -> tuple[int, bool, float, int]:
            idle = record.state == "waiting" and record.worker is None
            return order[record.state], idle, record.loss if record.loss is not None else float("inf"), record.number

        return [self._row(record) for record in sorted(self._records.values(), key=place)[:MOST_ROWS]]

    def _row(self, record: TrialRecord) -> list[str]:
        speed = f"{record.tokens / record.seconds:,.0f}" if record.seconds > 0 else ""
        return [
            record.id if record.of is None else f"{record.id} ({record.role} of {record.of})",
            record.state,
            str(len(record.rungs)),
            f"{record.steps}/{record.total_steps or '?'}",
            "" if record.loss is None else f"{record.loss:.4f}",
            speed,
            record.worker or "",
        ]

    def footer(self) -> str:
        """How many are finished, and what is left of time and money as far as it can be told."""
        records = list(self._records.values())
        done = sum(record.state != "waiting" for record in records)
        tokens, rate = sum(record.tokens for record in records), seconds_per_token(records)
        parts = [f"{done} of {self._trials} trials finished"]
        if rate is not None:
            elapsed = time.monotonic() - self._started
            left = max(0.0, self._expected - tokens)
            parts.append(f"about {left / max(tokens, 1) * elapsed / 60:.0f} min left")
            if self._price is not None:
                spent, to_come = (amount * rate / 3600 * self._price for amount in (tokens, left))
                parts.append(f"cost {spent:.2f}, about {to_come:.2f} to come")
        return "; ".join(parts)

    def table(self) -> "Table":
        """All of it for a terminal."""
        from rich.table import Table

        table = Table(caption=self.footer(), caption_justify="left")
        for name in ("trial", "state", "rungs", "step", "loss", "tokens/s", "worker"):
            table.add_column(name, justify="left" if name in ("trial", "state", "worker") else "right")
        for row in self.rows():
            table.add_row(*row)
        return table


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
