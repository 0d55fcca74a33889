"""Groups of like prompts: TF-IDF of hashed words, truncated SVD, k-means. Knows nothing of quality or budgets.

The map is learned on at most `SAMPLE_ROWS` rows, drawn by a seeded hash of their ids; every row is then assigned to the
nearest centre in batches, so memory does not grow with the rows but for the numbers that come back. This is latent
semantic analysis (Deerwester et al., 1990): it sees words, not meanings.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from qlora_core.data.row import Row

SAMPLE_ROWS = 20_000
BATCH_ROWS = 4096
COMPONENTS = 64
FEATURES = 2**18
STARTS = 3
# Scripts without blanks between words: each character is a word of its own, or a sentence would be one.
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
WORD = rf"[{UNSPACED}]|[^\W_{UNSPACED}]+"


def cluster_prompts(rows: Sequence[Row], order: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    """The number of each row's cluster (int32, by position): up to `clusters`, fewer if prompts are fewer or alike.

    `order` holds all positions sorted by row id. The result does not depend on the order of the rows or on the number
    of threads: the map is learned on one thread, from rows in the order of their ids. Prompts that share no word with
    others are alike in this. No rows give no numbers.
    """
    from threadpoolctl import threadpool_limits

    if not len(rows):
        return np.zeros(0, np.int32)
    with threadpool_limits(limits=1):
        assign = _learn(_sample(rows, order, seed), clusters, seed)
        return np.concatenate([assign(batch) for batch in _batches(row.opening for row in rows)]).astype(np.int32)


def seeded_places(ids: Iterable[str], seed: int) -> np.ndarray:
    """A number in [0, 2^64) for each id (uint64), as good as random and the same wherever the row stands."""
    hashes = (hashlib.blake2b(f"{seed}\0{row_id}".encode(), digest_size=8).digest() for row_id in ids)
    return np.frombuffer(b"".join(hashes), np.uint64)


def _sample(rows: Sequence[Row], order: np.ndarray, seed: int) -> list[str]:
    """The prompts of up to `SAMPLE_ROWS` rows, by id."""
    chosen = order
    if len(order) > SAMPLE_ROWS:
        places = seeded_places((row.id for row in rows), seed)
        chosen = order[places[order] <= np.partition(places, SAMPLE_ROWS - 1)[SAMPLE_ROWS - 1]]
    wanted = np.zeros(len(order), bool)
    wanted[chosen] = True
    prompts = {position: row.opening for position, row in enumerate(rows) if wanted[position]}
    return [prompts[position] for position in chosen.tolist()]


def _learn(prompts: Sequence[str], clusters: int, seed: int) -> Callable[[Sequence[str]], np.ndarray]:
    from sklearn.cluster import KMeans
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer

    # As a mapping, because scikit-learn's signatures are typed by their defaults alone.
    options: dict[str, Any] = {"norm": None, "dtype": np.float32, "token_pattern": WORD, "alternate_sign": False}
    hashing = HashingVectorizer(n_features=FEATURES, **options)
    counts: Any = hashing.transform(prompts)
    # A word of one prompt alone makes it like no other; without such words the decomposition is several times faster.
    shared = np.flatnonzero(np.bincount(counts.indices, minlength=FEATURES) > 1)
    if len(shared) < 2:
        return lambda batch: np.zeros(len(batch), np.int32)
    weighting = TfidfTransformer(sublinear_tf=True)
    weights = weighting.fit_transform(counts[:, shared])
    svd = TruncatedSVD(n_components=min(COMPONENTS, *weights.shape), random_state=seed)
    # Prompts that are all alike have no variance to share out among the components, which is no concern here.
    with np.errstate(invalid="ignore", divide="ignore"):
        points = _unit_length(svd.fit_transform(weights))
    distinct = len(np.unique(points.round(4), axis=0))
    start: dict[str, Any] = {"n_init": STARTS}
    kmeans = KMeans(n_clusters=min(clusters, distinct), random_state=seed, **start).fit(points)

    def assign(batch: Sequence[str]) -> np.ndarray:
        words: Any = hashing.transform(batch)
        embedded = svd.transform(weighting.transform(words[:, shared]))
        return np.asarray(kmeans.predict(_unit_length(embedded)))

    return assign


def _unit_length(points: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1 (float32), so that k-means compares directions; a prompt without words stays 0."""
    lengths = np.linalg.norm(points, axis=1, keepdims=True)
    return (points / np.where(lengths > 0, lengths, 1)).astype(np.float32)


def _batches(prompts: Iterator[str]) -> Iterator[list[str]]:
    while batch := list(islice(prompts, BATCH_ROWS)):
        yield batch
