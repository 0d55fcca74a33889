"""Near-duplicate removal, end to end: rows in, positions kept and rows dropped out.

Keeps a hash per band of each row (`scan`); the texts of candidates are read and hashed again when they are
compared. Knows nothing of languages or meaning: a paraphrase is no near-duplicate.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from qlora_core.config.curation import NearDuplicatesConfig
from qlora_core.data.deduplicate import Survival
from qlora_core.data.ledger import Dropped
from qlora_core.data.near_duplicates.candidates import find_candidates, find_twins
from qlora_core.data.near_duplicates.clusters import Clusters, drop_all, keep_one
from qlora_core.data.near_duplicates.scan import NO_PREAMBLES, Scan, scan_rows, text_batches, told_apart
from qlora_core.data.near_duplicates.shingles import Shingles, join_sets, shingle_sets
from qlora_core.data.near_duplicates.signatures import Banding, choose_banding
from qlora_core.data.near_duplicates.verification import (
    CappedBucket,
    Edges,
    LoadSets,
    compare,
    compare_bucket,
    join_edges,
)
from qlora_core.data.positions import rows_at
from qlora_core.data.row import Row
from qlora_core.data.split import Side
from qlora_core.data.tags.cache import TagCache
from qlora_core.data.wrappers import Preambles, find_preambles

RULE = "near_duplicate"
SHOWN_CLUSTERS = 10
SHOWN_MEMBERS = 5


@dataclass(frozen=True, slots=True)
class NearDuplicates:
    """What was found and decided.

    `kept` holds the positions (int64) of the rows that stay, best first; `cluster_of` the cluster of every position,
    -1 for a row that matches no other. `candidates` counts the pairs compared, `verified` those at or above the
    threshold, `clusters` the groups they connect. `largest` and `capped` describe clusters and buckets for the report,
    by ids, without text.
    """

    kept: np.ndarray
    cluster_of: np.ndarray
    dropped: list[Dropped] = field(default_factory=list)
    candidates: int = 0
    verified: int = 0
    clusters: int = 0
    largest: list[dict[str, Any]] = field(default_factory=list)
    capped: list[dict[str, Any]] = field(default_factory=list)
    preambles: Preambles = NO_PREAMBLES
    banding: Banding | None = None

    @property
    def false_share(self) -> float:
        """The share of candidate pairs that the exact comparison refused; 0 without candidates."""
        return 1 - self.verified / self.candidates if self.candidates else 0.0

    def summary(self) -> dict[str, Any]:
        """The figures as JSON holds them."""
        banding = self.banding and {"bands": self.banding.bands, "rows": self.banding.rows}
        return {
            "candidates": self.candidates,
            "verified": self.verified,
            "false_share": self.false_share,
            "clusters": self.clusters,
            "dropped": len(self.dropped),
            "preambles": {"found": self.preambles.count, "rows": self.preambles.rows},
            "banding": banding,
            "largest": self.largest,
            "capped": self.capped,
        }


def drop_near_duplicates(
    rows: Sequence[Row],
    source_order: Mapping[str, int],
    config: NearDuplicatesConfig,
    preambles: Preambles | None = None,
    earlier: Mapping[Side, pa.Array] | None = None,
    cache: TagCache | None = None,
    by_content: np.ndarray | None = None,
) -> NearDuplicates:
    """Find rows that say nearly the same, prompt and answer together, and let all but one go.

    Rows are compared by the exact Jaccard similarity of their word shingles, all turns together, after wrappers, shared
    system prompts and preambles are taken off. Rows whose tools differ never match; tools are not part of the text,
    because long ones that rows share would make copies of rows that say different things. Survivors come in
    `Survival`'s order: rows of `earlier` (ids by side, see `placement.read_earlier`), then first source, lowest id.
    What `config.action` asks for:

    - `keep_one`: a row goes if it matches, itself, a row that stays. Every cluster keeps its best row.
    - `drop_all`: every row that matches another one goes, earlier ones too; no row of a cluster stays.
    - `report`: nothing goes; clusters and counts are told.
    - `none`: nothing is compared.

    `preambles` are those of a larger set of which `rows` are a part; by default they are learnt from `rows`. `cache`
    keeps the signatures by the rows' ids, but for rows of which `by_content` (see `scan_rows`) says that their id is
    that of another text; every likeness is told from the texts themselves.

    The result does not depend on the order of `rows`, except that `kept` and `cluster_of` are positions in it. MinHash
    may miss a pair (`Banding.chance`); it never makes one. No rows give an empty result.
    """
    if config.action == "none" or not len(rows):
        return NearDuplicates(np.arange(len(rows)), np.full(len(rows), -1, np.int64))
    banding = choose_banding(config.threshold, config.permutations)
    preambles = find_preambles(rows) if preambles is None else preambles
    survival = Survival(rows, source_order, earlier)
    scan = scan_rows(rows, config, banding, preambles, cache, by_content)
    order = survival.order()

    def load(ranks: np.ndarray) -> Shingles:
        chosen = rows_at(rows, order[ranks])
        batches = text_batches(chosen, preambles)
        return join_sets([told_apart(shingle_sets(texts, config.shingle_words), tools) for texts, tools in batches])

    search = _search(scan, order, load, config.threshold)
    decide = drop_all if config.action == "drop_all" else keep_one
    clusters = decide(search.edges, search.twins, len(rows))
    return _result(clusters, order, survival, config, search, preambles, banding)


@dataclass(frozen=True, slots=True)
class _Search:
    edges: Edges
    twins: Edges
    candidates: int
    verified: int
    capped: list[CappedBucket]


def _search(scan: Scan, order: np.ndarray, load: LoadSets, threshold: float) -> _Search:
    """Compare what MinHash proposes. Rows of the very same shingles are settled first; one of each goes on."""
    sizes = scan.sizes[order]
    first, other = find_twins(scan.fingerprints[order])
    same = compare(first, other, sizes, load)
    twins = same.at_least(1.0)
    alone = np.ones(len(order), bool)
    alone[twins.right] = False
    ranks = np.flatnonzero(alone)
    candidates = find_candidates((band[order[ranks]] for band in scan.bands), ranks)
    pairs = compare(candidates.left, candidates.right, sizes, load)
    buckets = [compare_bucket(members, load, threshold) for members in candidates.large_buckets]
    edges = join_edges([pairs.at_least(threshold), *(found for found, _ in buckets)])
    capped = [bucket for _, bucket in buckets]
    compared = len(first) + len(candidates.left) + sum(bucket.compared for bucket in capped)
    return _Search(edges, twins, compared, len(edges.left) + len(twins.left), capped)


def _result(
    clusters: Clusters,
    order: np.ndarray,
    survival: Survival,
    config: NearDuplicatesConfig,
    search: _Search,
    preambles: Preambles,
    banding: Banding,
) -> NearDuplicates:
    kept = np.arange(len(order)) if config.action == "report" else clusters.kept
    gone = np.setdiff1d(np.arange(len(order)), kept)
    cluster_of = np.empty(len(order), np.int64)
    cluster_of[order] = clusters.cluster
    dropped = [
        survival.dropped(int(order[rank]), RULE, int(order[clusters.survivor[rank]]), float(clusters.score[rank]))
        for rank in gone
    ]
    return NearDuplicates(
        kept=order[kept],
        cluster_of=cluster_of,
        dropped=dropped,
        candidates=search.candidates,
        verified=search.verified,
        clusters=int(clusters.cluster.max()) + 1,
        largest=_largest(clusters.cluster, order, survival),
        capped=[_capped(bucket, order, survival) for bucket in search.capped[:SHOWN_CLUSTERS]],
        preambles=preambles,
        banding=banding,
    )


def _largest(cluster: np.ndarray, order: np.ndarray, survival: Survival) -> list[dict[str, Any]]:
    """The largest clusters, of equal ones the better first: size, best row, a few of the others."""
    sizes = np.bincount(cluster[cluster >= 0])
    shown = []
    for number in np.argsort(-sizes, kind="stable")[:SHOWN_CLUSTERS].tolist():
        members = order[np.flatnonzero(cluster == number)].tolist()
        shown.append(
            {
                "size": len(members),
                "id": survival.id(members[0]),
                "source": survival.source(members[0]),
                "members": [survival.id(place) for place in members[1 : SHOWN_MEMBERS + 1]],
            }
        )
    return shown


def _capped(bucket: CappedBucket, order: np.ndarray, survival: Survival) -> dict[str, Any]:
    first = int(order[bucket.first])
    return {
        "size": bucket.members,
        "id": survival.id(first),
        "source": survival.source(first),
        "matched": bucket.matched,
        "unmatched": bucket.unmatched,
    }
