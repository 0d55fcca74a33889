"""Slots dealt among sweeps: nobody starves while there are slots, and nothing is left lying."""

import pytest
from hypothesis import given
from hypothesis import strategies as some

from qlora_core.sweep.fair_share import fair_shares


@pytest.mark.parametrize(
    ("slots", "wanted", "shares"),
    [
        (4, {"a": 4, "b": 4}, {"a": 2, "b": 2}),
        (4, {"a": 4}, {"a": 4}),
        (5, {"b": 9, "a": 9}, {"a": 3, "b": 2}),
        (8, {"a": 1, "b": 9, "c": 9}, {"a": 1, "b": 4, "c": 3}),
        (1, {"a": 2, "b": 2}, {"a": 1, "b": 0}),
        (0, {"a": 2}, {"a": 0}),
        (9, {"a": 2, "b": 3}, {"a": 2, "b": 3}),
        (3, {}, {}),
    ],
)
def test_shares_of_a_few_sweeps(slots: int, wanted: dict[str, int], shares: dict[str, int]) -> None:
    assert fair_shares(slots, wanted) == shares


@given(some.integers(0, 40), some.dictionaries(some.text("abc", min_size=1, max_size=3), some.integers(0, 20)))
def test_no_slot_is_left_while_one_is_wanted_and_none_could_be_dealt_better(slots: int, wanted: dict[str, int]) -> None:
    shares = fair_shares(slots, wanted)
    assert sum(shares.values()) == min(slots, sum(wanted.values()))
    for name, share in shares.items():
        assert share <= wanted[name]
        if share < wanted[name]:
            # Whoever wants more than it has is at most one behind the largest.
            assert share >= max(shares.values()) - 1
