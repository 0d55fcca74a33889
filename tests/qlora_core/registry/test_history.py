"""The line of champions as the recorded moves tell it, including moves that died halfway."""

from typing import Literal

from qlora_core.registry.history import Move, champion_line

Action = Literal["promote", "rollback"]
State = Literal["started", "done", "abandoned"]


def moves(*steps: tuple[Action, str, str | None, State]) -> list[Move]:
    return [
        Move(number, action, version, previous, "why", "2026-01-01T00:00:00+00:00", state)
        for number, (action, version, previous, state) in enumerate(steps, start=1)
    ]


def test_promotions_line_up() -> None:
    done = moves(("promote", "1", None, "done"), ("promote", "4", "1", "done"))
    assert champion_line(done, "4") == ["1", "4"]


def test_no_champion_no_line() -> None:
    assert champion_line([], None) == []


def test_rollback_twice_goes_further_back_instead_of_toggling() -> None:
    promoted = moves(("promote", "1", None, "done"), ("promote", "2", "1", "done"), ("promote", "3", "2", "done"))
    once = [*promoted, *moves(("rollback", "2", "3", "done"))]
    assert champion_line(once, "2") == ["1", "2"]
    assert champion_line([*once, *moves(("rollback", "1", "2", "done"))], "1") == ["1"]


def test_move_that_died_before_the_alias_is_left_out() -> None:
    died = moves(("promote", "1", None, "done"), ("promote", "2", "1", "started"))
    assert champion_line(died, "1") == ["1"]


def test_move_that_died_after_the_alias_counts() -> None:
    died = moves(("promote", "1", None, "done"), ("promote", "2", "1", "started"))
    assert champion_line(died, "2") == ["1", "2"]


def test_champion_set_by_other_means_stands_in_the_line() -> None:
    by_hand = moves(("promote", "1", None, "done"), ("promote", "6", "5", "done"))
    assert champion_line(by_hand, "6") == ["1", "5", "6"]
    assert champion_line(by_hand, "9") == ["1", "5", "6", "9"]
