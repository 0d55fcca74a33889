"""Data order and collation."""

from collections.abc import Callable

import torch

from qlora_core.data.dataset import TokenRow
from qlora_core.training.batches import IGNORE_INDEX, BatchOrder, collate

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


def test_collate_shifts_labels_and_masks_padding_on_the_right() -> None:
    long = TokenRow("a", [5, 6, 7, 8], [False, False, True, True])
    short = TokenRow("b", [9, 3], [True, True])
    batch = collate([long, short], torch.device("cpu"))
    assert batch.row_ids == ("a", "b")
    assert batch.input_ids_BT.tolist() == [[5, 6, 7, 8], [9, 3, 0, 0]]
    assert batch.attention_mask_BT.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    # Row b's first token is marked as trained, but nothing comes before it to predict it from
    assert batch.labels_BT.tolist() == [
        [IGNORE_INDEX, 7, 8, IGNORE_INDEX],
        [3, IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX],
    ]
    assert batch.trained_tokens == 3


def test_collate_counts_the_labels_it_makes(rows: Callable[..., list[TokenRow]]) -> None:
    batch = collate(rows(9, seed=4), torch.device("cpu"))
    assert batch.trained_tokens == int((batch.labels_BT != IGNORE_INDEX).sum())
