"""Data order and collation."""

from collections.abc import Callable

from qlora_core.data.dataset import TokenRow
from qlora_core.training.batches import BatchOrder, labels_of, trained_tokens

LENGTHS = [(7 * index) % 23 + 2 for index in range(101)]


def _epoch(order: BatchOrder, epoch: int) -> list[list[int]]:
    return [order.batch(epoch * order.steps_per_epoch + step) for step in range(order.steps_per_epoch)]


def test_each_epoch_visits_every_row_once_and_leaves_none_out() -> None:
    for group_by_length in (True, False):
        order = BatchOrder(LENGTHS, 8, seed=3, group_by_length=group_by_length)
        for epoch in range(3):
            batches = _epoch(order, epoch)
            assert sorted(row for batch in batches for row in batch) == list(range(101))
            assert sorted(len(batch) for batch in batches) == [5] + [8] * 12


def test_order_depends_on_seed_and_epoch_only() -> None:
    order = BatchOrder(LENGTHS, 8, seed=3, group_by_length=True)
    late_first = BatchOrder(LENGTHS, 8, seed=3, group_by_length=True)
    late = late_first.batch(30)
    assert _epoch(order, 0) == _epoch(late_first, 0)
    assert order.batch(30) == late
    assert _epoch(order, 0) != _epoch(order, 1)
    assert _epoch(order, 0) != _epoch(BatchOrder(LENGTHS, 8, seed=4, group_by_length=True), 0)


def test_grouping_by_length_pads_far_less_than_a_plain_shuffle() -> None:
    def padding(group_by_length: bool) -> int:
        batches = _epoch(BatchOrder(LENGTHS, 8, seed=0, group_by_length=group_by_length), 0)
        return sum(max(LENGTHS[row] for row in batch) * len(batch) for batch in batches) - sum(LENGTHS)

    assert padding(True) < 0.25 * padding(False)


def test_grouped_batches_do_not_come_in_order_of_length() -> None:
    batches = _epoch(BatchOrder(LENGTHS, 8, seed=0, group_by_length=True), 0)
    longest = [max(LENGTHS[row] for row in batch) for batch in batches]
    assert longest not in (sorted(longest), sorted(longest, reverse=True))


def test_fewer_rows_than_a_batch_are_one_batch() -> None:
    order = BatchOrder([4, 9, 6], 16, seed=0, group_by_length=True)
    assert order.steps_per_epoch == 1
    assert order.batch(5) == [1, 2, 0]


def test_labels_are_the_next_tokens_of_trained_positions() -> None:
    assert labels_of(TokenRow("a", [5, 6, 7, 8], [False, False, True, True])) == [(1, 7), (2, 8)]
    # The first token is marked as trained, but nothing comes before it to predict it from
    assert labels_of(TokenRow("b", [9, 3], [True, True])) == [(0, 3)]
    assert labels_of(TokenRow("c", [9, 3], [True, False])) == []


def test_trained_tokens_counts_the_labels(rows: Callable[..., list[TokenRow]]) -> None:
    for row in rows(9, seed=4):
        assert trained_tokens(row) == len(labels_of(row))
