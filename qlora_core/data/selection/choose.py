"""Which rows a budget buys: an equal share for every group of like prompts, the best of each group first.

Knows nothing of how groups are found, and claims nothing: `control` is what the claim is tested against.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qlora_core.config.curation import SelectionConfig
from qlora_core.data.row import Row
from qlora_core.data.selection.prompt_clusters import cluster_prompts, seeded_places
from qlora_core.errors import ConfigError, DataError

TOKENS_TAG = "tokens"


@dataclass(frozen=True, slots=True)
class ClusterChoice:
    """One group of like prompts: its rows, those chosen, their tokens, and the id of the best row in it."""

    rows: int
    chosen: int
    chosen_tokens: int
    best_id: str


@dataclass(frozen=True, slots=True)
class Selection:
    """`chosen` and `control` are positions (int64), ordered by row id; tokens are sums over them.

    `control` is drawn at random from the same rows, the chosen ones among them. Its tokens differ from those of
    `chosen` by at most half of `control_slack_tokens`, the tokens of the last row drawn. `whole_pool` says that the
    budget was no less than the rows there are: then both are all rows and there is nothing to compare.
    """

    chosen: np.ndarray
    control: np.ndarray
    chosen_tokens: int
    control_tokens: int
    control_slack_tokens: int
    whole_pool: bool
    clusters: tuple[ClusterChoice, ...]


def select_rows(
    rows: Sequence[Row], tokens: np.ndarray, tags: Mapping[str, np.ndarray], config: SelectionConfig
) -> Selection:
    """Choose `config.budget_rows` of `rows` and draw a control of as many tokens.

    `tokens` holds the length of each row; `tags` numeric columns by name, NaN where a row has no such score (ranked
    last). Every group of like prompts gets an equal share of the budget; what a small group cannot use goes to the
    others, and of a remainder one row each to the largest. Ties are broken by row id, so the order of the rows does
    not matter. A budget of null or of at least the rows there are chooses all of them.

    Raises ConfigError for a quality that no tag has, DataError for a column of another length than the rows.
    """
    quality = _quality(len(rows), tokens, tags, config)
    ids = _ids(rows)
    order = pc.call_function("sort_indices", [ids]).to_numpy().astype(np.int64)
    rank = np.empty(len(rows), np.int64)
    rank[order] = np.arange(len(rows))
    if config.budget_rows is None or config.budget_rows >= len(rows):
        total = int(tokens.sum())
        return Selection(order, order.copy(), total, total, 0, whole_pool=True, clusters=())
    cluster = cluster_prompts(rows, order, config.clusters, config.seed)
    best_first = np.lexsort((rank, quality, cluster))
    starts = np.flatnonzero(np.diff(cluster[best_first], prepend=-1))
    sizes = np.diff(starts, append=len(rows))
    shares = share_budget(sizes, rank[best_first[starts]], config.budget_rows)
    place_in_cluster = np.arange(len(rows)) - np.repeat(starts, sizes)
    is_chosen = np.zeros(len(rows), bool)
    is_chosen[best_first[place_in_cluster < np.repeat(shares, sizes)]] = True
    chosen = order[is_chosen[order]]
    chosen_tokens = int(tokens[chosen].sum())
    control, slack = _draw_control(ids, tokens, rank, chosen_tokens, config.seed)
    choices = [
        ClusterChoice(size, share, int(tokens[best_first[start : start + share]].sum()), ids[best].as_py())
        for start, size, share, best in zip(
            starts.tolist(), sizes.tolist(), shares.tolist(), best_first[starts].tolist(), strict=True
        )
    ]
    choices.sort(key=lambda choice: (-choice.rows, choice.best_id))
    control_tokens = int(tokens[control].sum())
    return Selection(chosen, control, chosen_tokens, control_tokens, slack, whole_pool=False, clusters=tuple(choices))


def share_budget(sizes: np.ndarray, tie: np.ndarray, budget: int) -> np.ndarray:
    """Equal shares (int64) of `budget` that no group's size is under, `budget` in all (or all rows, if fewer).

    The level is the largest at which every group takes min(size, level) within the budget; the remainder goes one row
    each to the largest groups above the level, lowest `tie` first among equals.
    """
    low, high = 0, int(sizes.max(initial=0))
    while low < high:
        level = (low + high + 1) // 2
        if int(np.minimum(sizes, level).sum()) <= budget:
            low = level
        else:
            high = level - 1
    shares = np.minimum(sizes, low).astype(np.int64)
    by_size = np.lexsort((tie, -sizes))
    left = max(0, budget - int(shares.sum()))
    shares[by_size[sizes[by_size] > low][:left]] += 1
    return shares


def _quality(count: int, tokens: np.ndarray, tags: Mapping[str, np.ndarray], config: SelectionConfig) -> np.ndarray:
    """The chosen tag with its sign set so that lower is better; a missing score is worse than any."""
    columns = {TOKENS_TAG: tokens, **tags}
    for name, column in columns.items():
        if column.shape != (count,):
            raise DataError(
                f"tag {name!r} has shape {column.shape} for {count} rows; it must hold one number a row. "
                "This is a fault in curation; please report it"
            )
    if config.quality not in columns:
        raise ConfigError(
            f"data.selection.quality is {config.quality!r}, but the numeric tags are {', '.join(sorted(columns))}. "
            "Name one of these, or switch on the tagger that measures it in data.tags"
        )
    score = columns[config.quality].astype(np.float64)
    return np.where(np.isnan(score), np.inf, -score if config.prefer == "high" else score)


def _ids(rows: Sequence[Row]) -> pa.LargeStringArray:
    return pa.array((row.id for row in rows), pa.large_string(), size=len(rows))


def _draw_control(
    ids: pa.LargeStringArray, tokens: np.ndarray, rank: np.ndarray, wanted: int, seed: int
) -> tuple[np.ndarray, int]:
    """Rows in random order until their tokens come nearest to `wanted`, ordered by id; and the last row's tokens.

    The order is by a seeded hash of the ids. The last row is the one with which the sum reaches `wanted`; it is taken
    if that leaves the sum nearer than without it.
    """
    drawn = np.lexsort((rank, seeded_places((value.as_py() for value in ids), seed)))
    sums = np.cumsum(tokens[drawn].astype(np.int64))
    last = int(np.searchsorted(sums, wanted))
    before = int(sums[last - 1]) if last else 0
    taken = drawn[: last + 1] if sums[last] - wanted <= wanted - before else drawn[:last]
    return taken[np.argsort(rank[taken])].astype(np.int64), int(tokens[drawn[last]])
