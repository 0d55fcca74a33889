"""Where every row goes: its side of the split, or the ledger if it would give a held-out row away.

A row's side is a salted hash of its own key (see `own_key`), so it depends on no other row. Related rows whose keys
differ may thus fall on two sides; then one of them is dropped. Which one cannot be decided without knowing which came
later: of rows `a` (train) and `b` (test) that are related, each alone is kept, so when both are there a rule that sees
only the rows drops `a` although it may have been there first. Hence two guarantees:

- without `earlier`, added rows move no row to another side and remove none from test, but may remove a row from
  validation or train that a new held-out row is related to;
- with `earlier`, the ids and sides of a set curated before, rows of that set stay and only new rows go.

Knows nothing of tokens, and of files only how to read the ids of an earlier set.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qlora_core.config.curation import SplitConfig
from qlora_core.data.ledger import Dropped
from qlora_core.data.relations import Kind, Relations, RelationsBuilder, user_turns
from qlora_core.data.row import Row
from qlora_core.data.split import PRECEDENCE, SIDES, Side, side_of
from qlora_core.data.split_columns import read_columns
from qlora_core.errors import DataError

SHOWN_GROUPS = 5


@dataclass(frozen=True, slots=True)
class RelatedGroup:
    """Rows that hang together: how many, how many of them were dropped as leaks, and the lowest id among them."""

    rows: int
    dropped: int
    first_id: str


@dataclass(frozen=True, slots=True)
class Placement:
    """`sides` holds the kept positions of each side (int64), ordered by row id; `dropped` the leaks, by row id.

    `groups` counts the sets of rows that hang together by a chain of relations, single rows included;
    `largest_groups` are the `SHOWN_GROUPS` largest with two rows or more.
    """

    sides: Mapping[Side, np.ndarray]
    dropped: list[Dropped]
    groups: int
    largest_groups: tuple[RelatedGroup, ...]


def own_key(turns: Sequence[str], group_keys: Sequence[str]) -> str:
    """What a row's side is the hash of: the lowest of its declared keys, else its folded prompt, `turns[0]`.

    The rows of a story or a tree have different prompts. Hashed by prompt they would scatter over the sides and most of
    them would be dropped as leaks of each other.
    """
    return min(group_keys) if group_keys else turns[0]


def place_rows(
    rows: Sequence[Row],
    config: SplitConfig,
    cluster_of: np.ndarray,
    earlier: Mapping[Side, pa.Array] | None = None,
) -> Placement:
    """Give every row its side and drop the rows that are related to a row on another side.

    Two rows are related if the prompt of one is a user turn of the other (case, spacing and punctuation aside), if they
    share a declared key, or if `cluster_of` (n integers, -1 for none) names the same near-duplicate cluster. Only
    direct relations to kept rows count: what is related to a dropped row alone stays. Test rows are kept; validation
    gives way to test, train to both; rows of `earlier` (ids by side, see `read_earlier`) keep their side and new rows
    give way to them.

    Two rows of `earlier` that share only a cluster both stay: they passed the gate of their own set, so what ties them
    is a chain through a new row, and that one goes. Two that are related otherwise (the rules have changed since) give
    way to each other like new rows.

    No rows give three empty sides. Raises DataError for an id that occurs twice.
    """
    builder = RelationsBuilder()
    side = np.empty(len(rows), np.int8)
    for position, row in enumerate(rows):
        turns = user_turns(row.messages)
        builder.add(row.id, turns, row.group_keys)
        side[position] = PRECEDENCE.index(side_of(own_key(turns, row.group_keys), config))
    relations = builder.build().with_clusters(cluster_of)
    _check_unique(relations)
    is_old = _keep_earlier(side, relations.ids, earlier or {})
    match = _matches(relations, side, is_old)
    kept = match < 0
    sides: dict[Side, np.ndarray] = {
        name: relations.order[((side == PRECEDENCE.index(name)) & kept)[relations.order]] for name in SIDES
    }
    gone = relations.order[~kept[relations.order]]
    groups, largest = _groups(relations, kept)
    return Placement(sides, _ledger(rows, gone, match, relations.ids), groups, largest)


def read_earlier(folder: Path) -> dict[Side, pa.Array]:
    """The ids of a curated folder by side, for `place_rows`. Raises DataError for a folder that is no curated set."""
    return {side: read_columns(folder, side, ["id"]).column("id").combine_chunks() for side in SIDES}


def _check_unique(relations: Relations) -> None:
    repeated = relations.repeated()
    if len(repeated):
        raise DataError(
            f"{len(repeated)} rows have the id of another row, the first {relations.ids[int(repeated[0])].as_py()}. "
            "Equal conversations have equal ids; drop exact duplicates before the split"
        )


def _keep_earlier(side: np.ndarray, ids: pa.LargeStringArray, earlier: Mapping[Side, pa.Array]) -> np.ndarray:
    """Set the sides of rows that were placed before; True for each of them."""
    is_old = np.zeros(len(side), bool)
    for name, old_ids in earlier.items():
        known = pc.call_function("is_in", [ids], pc.SetLookupOptions(value_set=old_ids.cast(pa.large_string())))
        found = known.to_numpy(zero_copy_only=False)
        side[found] = PRECEDENCE.index(name)
        is_old |= found
    return is_old


def _matches(relations: Relations, side: np.ndarray, is_old: np.ndarray) -> np.ndarray:
    """For each row the position of the kept row it gives way to, -1 if it stays.

    Rows are taken level by level, old before new and within them by precedence of the side, so the order of the rows
    does not matter. `holders[s]` has, for each key, the lowest rank of a kept row on side `s` that has the key at all,
    `prompts[s]` of one that has it as more than a later turn.
    """
    count = len(side)
    none = count
    holders = np.full((len(PRECEDENCE), relations.keys), none, np.int32)
    prompts = np.full((len(PRECEDENCE), relations.keys), none, np.int32)
    match = np.full(count, -1, np.int64)
    strong = relations.strong
    for old in (True, False):
        for own in range(len(PRECEDENCE)):
            entry = ((side == own) & (is_old == old))[relations.row]
            row, key, tie = relations.row[entry], relations.key[entry], strong[entry]
            best = np.full(count, none * len(PRECEDENCE), np.int64)
            for other in range(len(PRECEDENCE)):
                if other == own:
                    continue
                found = np.where(tie, holders[other][key], prompts[other][key])
                if old:
                    found[relations.kind[entry] == Kind.NEAR_DUPLICATE] = none
                hit = found < none
                np.minimum.at(best, row[hit], found[hit].astype(np.int64) + other * none)
            lost = best < none * len(PRECEDENCE)
            match[lost] = relations.order[best[lost] % max(none, 1)]
            stays = ~lost[row]
            np.minimum.at(holders[own], key[stays], relations.rank[row[stays]])
            stays &= tie
            np.minimum.at(prompts[own], key[stays], relations.rank[row[stays]])
    return match


def _groups(relations: Relations, kept: np.ndarray) -> tuple[int, tuple[RelatedGroup, ...]]:
    """Connected components of rows and the keys that relate them."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    count = len(kept)
    relates = np.bincount(relations.key, minlength=relations.keys) > 1
    relates &= np.bincount(relations.key[relations.strong], minlength=relations.keys) > 0
    entry = relates[relations.key]
    row, key = relations.row[entry], relations.key[entry].astype(np.int64) + count
    nodes = count + relations.keys
    graph = coo_array((np.ones(len(row), np.int8), (row, key)), shape=(nodes, nodes))
    _, label = connected_components(graph.tocsr(), directed=False)
    names, group = np.unique(label[:count], return_inverse=True)
    sizes = np.bincount(group, minlength=len(names))
    dropped = np.bincount(group[~kept], minlength=len(names))
    first = np.full(len(names), count, np.int64)
    np.minimum.at(first, group, relations.rank)
    top = np.lexsort((first, -sizes))[:SHOWN_GROUPS]
    largest = tuple(
        RelatedGroup(int(sizes[g]), int(dropped[g]), relations.ids[int(relations.order[first[g]])].as_py())
        for g in top
        if sizes[g] > 1
    )
    return len(names), largest


def _ledger(rows: Sequence[Row], gone: np.ndarray, match: np.ndarray, ids: pa.LargeStringArray) -> list[Dropped]:
    dropped = []
    for position in gone.tolist():
        row = rows[position]
        dropped.append(Dropped(row.id, row.source, row.line, "leak", matched_id=ids[int(match[position])].as_py()))
    return dropped
