"""The table of a running sweep: what it says, in which order, and that it is drawn on terminals only."""

import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from qlora_core.sweep.live_table import SweepView, live_table
from qlora_core.sweep.record import TrialRecord
from qlora_core.training.step_tail import STEP_LOG, StepTail


def record(number: int, state: str, loss: float | None, worker: str | None = None) -> TrialRecord:
    made = TrialRecord(f"t{number:03d}", {}, state=state, loss=loss, steps=4, total_steps=16, worker=worker)
    made.tokens, made.seconds = 1000, 10.0
    return made


def test_trials_at_work_come_first_then_the_best() -> None:
    view = SweepView(trials=4, expected_tokens=8000, price=3.6)
    for made in (
        record(0, "pruned", 2.0),
        record(1, "complete", 1.5),
        record(2, "waiting", 1.75, "worker-1"),
        record(3, "failed", None),
    ):
        view.take(made)
    assert [row[0] for row in view.rows()] == ["t002", "t001", "t000", "t003"]
    assert view.rows()[0] == ["t002", "training", "0", "4/16", "1.7500", "100", "", "worker-1"]
    # 4,000 tokens at 0.01 s each are 40 s, at 3.6 an hour 0.04; as much again is left.
    assert view.footer().startswith("3 of 4 trials finished; about ")
    assert view.footer().endswith("cost 0.04, about 0.04 to come")
    console = Console(record=True, width=100, file=sys.stderr)
    console.print(view.table())
    assert "worker-1" in console.export_text()


def test_a_trial_at_work_shows_its_step_its_pace_and_its_time_left(tmp_path: Path) -> None:
    diary = tmp_path / "t000" / STEP_LOG
    diary.parent.mkdir()

    def write(*steps: int) -> None:
        # Half a second a step by the clock, of which a quarter is the trial's own share of its pack's time.
        lines = [
            {"step": step, "total_steps": 1000, "time": 100 + step / 2, "seconds": 0.125, "tokens": 50}
            | {"trained_tokens": 50 * step}
            for step in steps
        ]
        with diary.open("a") as stream:
            stream.writelines(json.dumps(line) + "\n" for line in lines)

    view = SweepView(trials=2, expected_tokens=100_000, price=None, diaries=StepTail(tmp_path))
    made = TrialRecord("t000", {}, worker="worker-0")
    view.take(made)
    view.take(TrialRecord("t001", {}))
    assert view.rows()[0] == ["t000", "training", "0", "0/?", "", "", "", "worker-0"]
    write(*range(1, 41))
    assert view.rows()[0] == ["t000", "training", "0", "40/1000", "", "400", "8 min", "worker-0"]
    assert "min left" in view.footer()
    write(*range(41, 901))
    assert view.rows()[0][3:7] == ["900/1000", "", "400", "50 s"]
    # After a roll-back the pace is taken anew, and once it is finished the record counts.
    write(880)
    assert view.rows()[0][3:7] == ["880/1000", "", "400", ""]
    made.state, made.steps, made.total_steps = "complete", 1000, 1000
    assert view.rows()[1][3:7] == ["1000/1000", "", "", ""]


def test_nothing_is_known_before_the_first_report() -> None:
    assert SweepView(3, 100.0, None).footer() == "0 of 3 trials finished"


def test_nothing_is_drawn_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    view = SweepView(1, 100.0, None)
    with live_table(view) as show:
        show(record(0, "waiting", 1.0))
    assert capsys.readouterr() == ("", "")
    assert len(view.rows()) == 1
