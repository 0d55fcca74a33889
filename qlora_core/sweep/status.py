"""Where a sweep stands, read from its study while a driver may be writing to it. Neither Ray nor torch is needed.

Knows the study; that a sweep is finished, and its study gone, is known to whoever asks the store first.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_core.sweep.cost import actual_cost
from qlora_core.sweep.record import TrialRecord
from qlora_core.sweep.storage import close_study, file_url, read_study, shown
from qlora_core.sweep.study import read_records


def sweep_status(where: Path | str, name: str, price_per_gpu_hour: float | None) -> dict[str, Any]:
    """`state` (not begun | begun), `study`, `counts` by state, `trials` with their workers, `best` so far, `cost`.

    Raises SweepError where the database cannot be read.
    """
    url = file_url(where) if isinstance(where, Path) else where
    study = read_study(url, name)
    if study is None:
        return {"state": "not begun", "study": shown(url), "counts": {}, "trials": [], "best": None, "cost": None}
    try:
        records = read_records(study)
    finally:
        close_study(study)
    counts = {state: sum(r.state == state for r in records) for state in ("waiting", "complete", "pruned", "failed")}
    return {
        "state": "begun",
        "study": shown(url),
        "counts": counts,
        "trials": [_row(record) for record in records],
        "best": _leader(records),
        "cost": actual_cost(records, price_per_gpu_hour),
    }


def _row(record: TrialRecord) -> dict[str, Any]:
    kept = ("id", "params", "state", "loss", "steps", "total_steps", "seconds", "tokens", "error", "deaths", "of")
    row = record.row()
    return {name: row[name] for name in kept} | {
        "preemptions": record.preemptions,
        "rungs": record.rungs,
        "worker": record.worker,
    }


def _leader(records: Sequence[TrialRecord]) -> str | None:
    """The trial with the lowest loss at the deepest rung anybody has reached, so far."""
    known = [record for record in records if record.loss is not None and record.state != "failed"]
    return min(known, key=lambda record: (-len(record.rungs), record.loss, record.number)).id if known else None
