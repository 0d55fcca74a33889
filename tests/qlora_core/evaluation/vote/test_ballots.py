"""Voting: nothing is lost or doubled, sides are balanced, pairs get the raters they need, checks are hidden."""

import secrets
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_core.errors import EvaluationError
from qlora_core.evaluation.vote.assignment import MIN_GAP
from qlora_core.evaluation.vote.ballots import BallotBox, BallotConflictError
from qlora_core.evaluation.vote.records import VoteRecord, counted, vote_records
from qlora_core.evaluation.vote.state import Task

MakeBox = Callable[..., BallotBox]


def key() -> str:
    return secrets.token_hex(16)


def shown(box: BallotBox, rater: str) -> Task:
    task = box.current(rater).task
    assert task is not None
    return task


def records_of(box: BallotBox) -> list[VoteRecord]:
    with box.state() as state:
        return vote_records(state, box.pairs)


def events(box: BallotBox, kind: str) -> int:
    return sum(event.kind == kind for event in box.journal.events_after(0))


@pytest.mark.parametrize("table", ["study", "items", "events"])
def test_the_file_takes_no_change_and_no_deletion(make_box: MakeBox, table: str) -> None:
    box = make_box(3)
    box.vote("ann", key(), shown(box, "ann").task, "left")
    connection = sqlite3.connect(box.journal.path)
    column = {"study": "value", "items": "pair", "events": "body"}[table]
    for statement in (f"DELETE FROM {table}", f"UPDATE {table} SET {column} = 'x'"):
        with pytest.raises(sqlite3.DatabaseError, match="append-only"):
            connection.execute(statement)
    connection.close()


def test_a_study_is_not_begun_over_another(make_box: MakeBox, tmp_path: Path) -> None:
    box = make_box(2)
    with pytest.raises(EvaluationError, match="exists"):
        BallotBox.create(box.journal.path, list(box.pairs.values()))
    other = tmp_path / "notes.txt"
    other.write_text("no database at all, but long enough to be taken for one" * 20)
    with pytest.raises(EvaluationError, match="not a study"):
        BallotBox(other)


def test_a_reload_shows_the_same_pair_on_the_same_sides(make_box: MakeBox) -> None:
    box = make_box(5)
    first = shown(box, "ann")
    assert shown(box, "ann") == first
    assert shown(BallotBox(box.journal.path), "ann") == first


def test_the_same_request_twice_is_one_vote(make_box: MakeBox) -> None:
    box = make_box(5)
    task, request = shown(box, "ann").task, key()
    box.vote("ann", request, task, "left")
    box.vote("ann", request, task, "left")
    box.vote("ann", key(), task, "left")  # a second tab, the same choice
    assert events(box, "vote") == 1


def test_a_late_repetition_does_not_bring_back_what_was_undone(make_box: MakeBox) -> None:
    box = make_box(5)
    task, request, undo = shown(box, "ann").task, key(), key()
    box.vote("ann", request, task, "left")
    box.undo("ann", undo)
    box.vote("ann", request, task, "left")
    box.undo("ann", undo)
    assert records_of(box) == []


def test_another_choice_on_a_decided_pair_is_refused(make_box: MakeBox) -> None:
    box = make_box(5)
    task = shown(box, "ann").task
    box.vote("ann", key(), task, "left")
    for act in (lambda: box.vote("ann", key(), task, "right"), lambda: box.skip("ann", key(), task)):
        with pytest.raises(BallotConflictError, match="another tab"):
            act()
    assert [record.choice for record in records_of(box)] == ["left"]


def test_a_pair_shown_to_another_rater_cannot_be_voted_on(make_box: MakeBox) -> None:
    box = make_box(5)
    task = shown(box, "ann").task
    for foreign in (task, "0" * 20):
        with pytest.raises(BallotConflictError, match="not shown to you"):
            box.vote("ben", key(), foreign, "left")


def test_undo_again_and_again_takes_back_in_order(make_box: MakeBox) -> None:
    box = make_box(5, repeat_share=0.0, self_share=0.0)
    seen = []
    for choice in ("left", "tie", "right"):
        seen.append(shown(box, "ann"))
        box.vote("ann", key(), seen[-1].task, choice)
    box.undo("ann", key())
    assert shown(box, "ann").task == seen[2].task
    box.undo("ann", key())
    assert shown(box, "ann").task == seen[1].task
    box.vote("ann", key(), seen[1].task, "both_bad")
    assert [record.choice for record in records_of(box)] == ["left", "both_bad"]
    with pytest.raises(BallotConflictError, match="nothing to take back"):
        box.undo("ben", key())


def test_a_skipped_pair_comes_back_only_by_undo(make_box: MakeBox) -> None:
    box = make_box(3, repeat_share=0.0, self_share=0.0)
    task = shown(box, "ann")
    box.skip("ann", key(), task.task)
    assert shown(box, "ann").item != task.item
    box.undo("ann", key())
    assert shown(box, "ann").task == task.task


@pytest.mark.parametrize("seed", range(4))
def test_sides_stay_balanced_within_one_at_every_moment(
    make_box: MakeBox, play: Callable, leading_left: Callable, seed: int
) -> None:
    box = make_box(30, gold=4, repeat_share=0.2, self_share=0.1)
    play(box, "ann", seed, skips=0.15)
    balance, least, most = 0, 0, 0
    for record in records_of(box):
        if record.choice is not None and record.occasion != "self":
            balance += 1 if leading_left(box.pairs[record.item_id], str(record.first)) else -1
            least, most = min(least, balance), max(most, balance)
    assert -1 <= least <= most <= 1


@pytest.mark.parametrize("seed", range(3))
def test_undo_and_skip_in_any_order_keep_one_decision_per_pair(make_box: MakeBox, play: Callable, seed: int) -> None:
    box = make_box(12, gold=2, repeat_share=0.2, self_share=0.1)
    play(box, "ann", seed, skips=0.2, undos=0.25)
    done = Counter((record.item_id, record.occasion) for record in records_of(box))
    assert set(done.values()) == {1}
    assert sum(occasion in ("rating", "gold") for _, occasion in done) == 12
    assert box.current("ann").task is None


def test_every_pair_gets_its_raters_and_no_more(make_box: MakeBox, play: Callable) -> None:
    box = make_box(20, gold=2, raters_per_item=2)
    for rater in ("ann", "ben", "eve"):
        play(box, rater, seed=len(rater), limit=12 if rater == "ann" else 400)
    play(box, "ann", seed=9)
    raters = Counter(record.item_id for record in counted(records_of(box)))
    assert set(raters.values()) == {2} and len(raters) == 18
    gold = Counter(record.rater for record in records_of(box) if record.occasion == "gold")
    assert gold == {"ann": 2, "ben": 2, "eve": 2}


def test_a_reservation_holds_a_place_until_it_expires(make_box: MakeBox, monkeypatch: pytest.MonkeyPatch) -> None:
    box = make_box(1, raters_per_item=1, reservation_s=60.0)
    task = shown(box, "ann")
    assert box.current("ben").task is None
    monkeypatch.setattr("time.time", lambda: task.expires_at + 1)
    taken = shown(box, "ben")
    assert taken.item == task.item
    assert box.current("ann").task is None  # the place is ben's now
    box.vote("ann", key(), task.task, "left")  # she had it on her screen all the while: her work is kept
    assert [record.rater for record in counted(records_of(box))] == ["ann"]


def test_repeats_are_hidden_swapped_and_apart_and_self_pairs_show_one_answer(make_box: MakeBox, play: Callable) -> None:
    box = make_box(40, repeat_share=0.1, self_share=0.05)
    play(box, "ann", seed=1)
    records = records_of(box)
    occasions = Counter(record.occasion for record in records)
    assert occasions == {"rating": 40, "repeat": 4, "self": 2}
    place = {(record.item_id, record.occasion): n for n, record in enumerate(records)}
    last_rating = max(n for n, record in enumerate(records) if record.occasion == "rating")
    checks = [(n, record) for n, record in enumerate(records) if record.occasion != "rating"]
    for n, record in checks:
        since = n - place[record.item_id, "rating"]
        assert since > MIN_GAP or n > last_rating
        if record.occasion == "repeat":
            assert record.first != records[n - since].first
    assert any(n < last_rating for n, _ in checks), "all checks came last, where raters would know them"


def test_progress_ends_where_it_said(make_box: MakeBox) -> None:
    box = make_box(20, gold=2)
    total = None
    while (view := box.current("ann")).task is not None:
        total = total or view.progress.done + view.progress.remaining
        assert view.progress.done + view.progress.remaining == total
        box.vote("ann", key(), view.task.task, "tie")
    assert view.progress == (total, 0)


def test_orders_and_sides_differ_between_raters_and_studies(make_box: MakeBox) -> None:
    box, other = make_box(12), make_box(12)
    orders = [box.assigner._order("ann"), box.assigner._order("ben"), other.assigner._order("ann")]
    assert len(set(orders)) == 3


def test_an_excluded_rater_counts_nowhere_and_is_not_deleted(make_box: MakeBox, play: Callable) -> None:
    box = make_box(6, raters_per_item=1)
    play(box, "ann", seed=0)
    box.set_excluded("ann", True, key())
    assert counted(records_of(box)) == [] and len(records_of(box)) >= 6
    assert box.current("ann").task is None
    with pytest.raises(BallotConflictError, match="closed"):
        box.undo("ann", key())
    assert box.current("ben").task is not None  # the pairs are free again
    box.set_excluded("ann", False, key())
    assert len(counted(records_of(box))) == 6


def test_a_failed_transaction_leaves_no_trace(make_box: MakeBox, monkeypatch: pytest.MonkeyPatch) -> None:
    box = make_box(3)
    task = shown(box, "ann").task
    with pytest.raises(RuntimeError), box._turn() as (transaction, state):
        transaction.append("vote", "ann", {"task": task, "choice": "left", "note": ""}, key())
        state.take_in(transaction.events_after(state.seq))
        raise RuntimeError("the machine lost power")
    assert records_of(box) == []
    box.vote("ann", key(), task, "right")
    assert [record.choice for record in records_of(box)] == ["right"]


def test_threads_sending_one_vote_at_once_leave_one(make_box: MakeBox) -> None:
    box = make_box(3)
    task, request = shown(box, "ann").task, key()
    threads = [threading.Thread(target=box.vote, args=("ann", request, task, "left")) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert events(box, "vote") == 1


RATE_ALL = """
import secrets, sys
from pathlib import Path
from qlora_core.evaluation.vote.ballots import BallotBox
box = BallotBox(Path(sys.argv[1]))
while (task := box.current(sys.argv[2]).task) is not None:
    box.vote(sys.argv[2], secrets.token_hex(16), task.task, "left")
"""


def test_processes_on_one_file_do_not_overfill_a_pair(make_box: MakeBox, play: Callable) -> None:
    box = make_box(8, raters_per_item=2, repeat_share=0.0, self_share=0.0)
    command = [sys.executable, "-c", RATE_ALL, str(box.journal.path)]
    workers = [subprocess.Popen([*command, rater]) for rater in ("ann", "ben", "eve")]
    assert [worker.wait(120) for worker in workers] == [0, 0, 0]
    for rater in ("ann", "ben", "eve"):  # whoever stopped while another held the last place
        play(box, rater, seed=0)
    raters = Counter(record.item_id for record in counted(records_of(box)))
    assert set(raters.values()) == {2} and len(raters) == 8
