"""Selection: shares against a slow reference, order-free choices, and a control of as many tokens."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_core.config.curation import SelectionConfig
from qlora_core.data.row import Draft, Message, Row, make_row
from qlora_core.data.selection import Selection, select_rows
from qlora_core.data.selection.choose import share_budget
from qlora_core.data.selection.prompt_clusters import cluster_prompts
from qlora_core.errors import ConfigError, DataError

TOPICS = {
    "cooking": "bake bread flour oven salt water knead dough",
    "sums": "add numbers plus minus total sum digits carry",
    "code": "python function list loop variable class return error",
    "travel": "train ticket city hotel map river mountain border",
}


def row(prompt: str, answer: str = "yes") -> Row:
    return make_row(Draft([Message("user", prompt), Message("assistant", answer, train=True)]), "rows.jsonl", 1)


def topic_rows(counts: dict[str, int], seed: int = 0) -> list[Row]:
    """Prompts of words of one topic each; the answer tells the topic."""
    rng = np.random.default_rng(seed)
    return [
        row(f"{' '.join(rng.choice(TOPICS[topic].split(), 7, replace=False))} {topic}{n}", topic)
        for topic, count in counts.items()
        for n in range(count)
    ]


def topics(rows: Sequence[Row], positions: np.ndarray) -> dict[str, int]:
    answers = [rows[p].messages[-1].content for p in positions.tolist()]
    return {topic: answers.count(topic) for topic in TOPICS}


def select(
    rows: Sequence[Row], tokens: np.ndarray, *, quality: np.ndarray | None = None, **values: object
) -> Selection:
    tags = {} if quality is None else {"score": quality}
    config = SelectionConfig.model_validate({"quality": "tokens" if quality is None else "score", **values})
    return select_rows(rows, tokens, tags, config)


def test_every_topic_gets_its_share_though_one_has_most_rows() -> None:
    rows = topic_rows({"cooking": 150, "sums": 60, "code": 60, "travel": 15})
    tokens = np.arange(len(rows)) % 7 + 3

    selection = select(rows, tokens, budget_rows=81, clusters=4)

    # 15 of travel are all there are; 66 are left for three topics.
    assert topics(rows, selection.chosen) == {"cooking": 22, "sums": 22, "code": 22, "travel": 15}
    assert [(c.rows, c.chosen) for c in selection.clusters] == [(150, 22), (60, 22), (60, 22), (15, 15)]
    assert sum(c.chosen_tokens for c in selection.clusters) == selection.chosen_tokens == tokens[selection.chosen].sum()
    assert not selection.whole_pool
    # A random control follows the pool.
    assert topics(rows, selection.control)["cooking"] > 30


@pytest.mark.parametrize("prefer", ["high", "low"])
def test_best_rows_of_a_cluster_are_taken_and_missing_scores_come_last(prefer: str) -> None:
    rows = topic_rows({"sums": 10})
    quality = np.array([5, np.nan, 1, 9, 3, np.nan, 7, 2, 8, 4], np.float64)

    selection = select(rows, np.ones(10, int), quality=quality, budget_rows=3, clusters=1, prefer=prefer)
    most = select(rows, np.ones(10, int), quality=quality, budget_rows=9, clusters=1, prefer=prefer)

    assert set(quality[selection.chosen]) == ({7, 8, 9} if prefer == "high" else {1, 2, 3})
    assert np.isnan(quality[most.chosen]).sum() == 1
    [missing] = [rows[p].id for p in most.chosen if np.isnan(quality[p])]
    assert missing == min(rows[1].id, rows[5].id)
    [cluster] = selection.clusters
    assert cluster.best_id == rows[3 if prefer == "high" else 2].id


@settings(max_examples=15, deadline=None)
@given(data=st.data(), seed=st.integers(0, 3), budget=st.integers(1, 39))
def test_choice_and_control_depend_on_the_rows_not_on_their_order(data: st.DataObject, seed: int, budget: int) -> None:
    rows = topic_rows({"cooking": 20, "code": 15, "travel": 5})
    tokens = np.array(data.draw(st.lists(st.integers(1, 50), min_size=40, max_size=40)))
    quality = np.array(data.draw(st.lists(st.integers(0, 3), min_size=40, max_size=40)), float)
    moved = np.array(data.draw(st.permutations(range(40))))

    one = select(rows, tokens, quality=quality, budget_rows=budget, clusters=5, seed=seed)
    other = select(
        [rows[p] for p in moved], tokens[moved], quality=quality[moved], budget_rows=budget, clusters=5, seed=seed
    )

    assert len(one.chosen) == budget == len(set(one.chosen.tolist()))
    assert [rows[p].id for p in one.chosen] == sorted(rows[p].id for p in one.chosen)
    for mine, theirs in ((one.chosen, other.chosen), (one.control, other.control)):
        assert mine.tolist() == moved[theirs].tolist()
    assert one.clusters == other.clusters
    assert one.control_tokens == tokens[one.control].sum()
    assert len(set(one.control.tolist())) == len(one.control)
    assert abs(one.control_tokens - one.chosen_tokens) * 2 <= one.control_slack_tokens <= tokens.max()


def test_another_seed_draws_another_control() -> None:
    rows = topic_rows({"cooking": 60})
    controls = [select(rows, np.ones(60, int), budget_rows=20, clusters=1, seed=seed).control for seed in (0, 1)]

    assert [len(control) for control in controls] == [20, 20]
    assert set(controls[0].tolist()) != set(controls[1].tolist())


@pytest.mark.parametrize("budget", [None, 6, 100])
def test_budget_of_all_rows_says_so(budget: int | None) -> None:
    rows = topic_rows({"sums": 6})

    selection = select(rows, np.full(6, 4), budget_rows=budget)

    assert selection.whole_pool
    assert sorted(selection.chosen.tolist()) == sorted(selection.control.tolist()) == list(range(6))
    assert (selection.chosen_tokens, selection.control_tokens) == (24, 24)


@pytest.mark.parametrize("prompts", [["?!", "...", "--"], ["same"] * 5, ["面包怎么做", "怎么做面包", "今天天气好"]])
def test_prompts_without_words_alike_or_without_blanks_are_no_fault(prompts: list[str]) -> None:
    rows = [row(prompt, str(n)) for n, prompt in enumerate(prompts)]

    assert len(select(rows, np.ones(len(rows), int), budget_rows=2, clusters=3).chosen) == 2


def test_words_of_scripts_without_blanks_are_told_apart() -> None:
    rows = [row(prompt) for prompt in ("面包怎么做好", "怎么做好面包", "今天天气冷吗", "天气今天冷吗")]
    order = np.argsort([r.id for r in rows])

    labels = cluster_prompts(rows, order, 2, 0)

    assert labels[0] == labels[1] != labels[2] == labels[3]


def test_unknown_quality_and_wrong_lengths_are_named() -> None:
    rows = topic_rows({"sums": 4})
    with pytest.raises(ConfigError, match=r"data.selection.quality is 'ifd'.*are score, tokens"):
        select_rows(rows, np.ones(4), {"score": np.ones(4)}, SelectionConfig(budget_rows=1, quality="ifd"))
    with pytest.raises(DataError, match=r"tag 'score' has shape \(3,\) for 4 rows"):
        select_rows(rows, np.ones(4), {"score": np.ones(3)}, SelectionConfig(budget_rows=1))


@given(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=8), budget=st.integers(0, 100))
def test_shares_are_those_of_dealing_rows_out_one_at_a_time(sizes: list[int], budget: int) -> None:
    dealt = [0] * len(sizes)
    by_size = sorted(range(len(sizes)), key=lambda g: (-sizes[g], g))
    for _ in range(min(budget, sum(sizes))):
        open_groups = [g for g in by_size if dealt[g] < sizes[g]]
        dealt[min(open_groups, key=lambda g: (dealt[g], by_size.index(g)))] += 1

    assert share_budget(np.array(sizes), np.arange(len(sizes)), budget).tolist() == dealt
