"""The parts of near-duplicate removal: words, signatures, bands, blocks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_core.data.near_duplicates import kernels
from qlora_core.data.near_duplicates.candidates import find_candidates
from qlora_core.data.near_duplicates.shingles import Shingles, shingle, shingle_sets
from qlora_core.data.near_duplicates.signatures import choose_banding, hash_bands, sign
from qlora_core.data.near_duplicates.verification import compare, compare_bucket
from qlora_core.data.text_form import folded

# White space and marks of every kind, letters with and without case, a combining accent, code points of 1 to 4 bytes.
TEXTS = st.text(st.sampled_from(list(" \t\n\x1c\x85\xa0\u2028.,;:!?\"'`’…«。abABéßİǅ\u0301日😀+-#0")), max_size=40)


def reference(text: str, width: int) -> set[tuple[str, ...]]:
    words = folded(text).split()
    return {tuple(words[k : k + width]) for k in range(max(1, len(words) - width + 1))}


@settings(deadline=None, max_examples=200)
@given(texts=st.lists(TEXTS, min_size=2, max_size=6), width=st.integers(1, 4))
def test_hashed_sets_have_the_similarity_of_the_sets_of_words(texts: list[str], width: int) -> None:
    sets = shingle_sets(texts, width)
    parts = [sets.hashes[a:b] for a, b in zip(sets.offsets[:-1], sets.offsets[1:], strict=True)]
    expected = [reference(text, width) for text in texts]

    assert [len(part) for part in parts] == [len(one) for one in expected]
    for part, one in zip(parts, expected, strict=True):
        assert (np.diff(part.astype(object)) > 0).all()
        similarity = len(one & expected[0]) / len(one | expected[0])
        assert kernels.jaccard(part, parts[0]) == pytest.approx(similarity, abs=1e-12)


def pairs_of_sets(count: int, similarity: float, size: int) -> tuple[Shingles, float]:
    """`count` pairs of random sets, one after the other, and their exact similarity."""
    draw = np.random.default_rng(0)
    shared = round(2 * size * similarity / (1 + similarity))
    sets = []
    for _ in range(count):
        pool = draw.integers(0, 2**64, 2 * size - shared, dtype=np.uint64)
        sets += [pool[:size], np.append(pool[:shared], pool[size:])]
    offsets = np.arange(0, 2 * count * size + 1, size)
    return Shingles(np.concatenate(sets), offsets), shared / (2 * size - shared)


@pytest.mark.parametrize("similarity", [0.2, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("size", [20, 150])
def test_signatures_estimate_similarity_without_bias(similarity: float, size: int) -> None:
    shingles, exact = pairs_of_sets(500, similarity, size)

    signatures = sign(shingles, 128, 0)

    agree = (signatures[0::2] == signatures[1::2]).mean(axis=1)
    # Four standard errors of the mean of 500 estimates from 128 independent values each.
    assert abs(agree.mean() - exact) < 4 * np.sqrt(exact * (1 - exact) / 128 / 500)


def test_signatures_depend_on_the_set_and_the_seed_alone() -> None:
    text = "one two three four five six seven one two three four five six seven"
    hashes = shingle([text], 2).hashes
    backwards = np.append(hashes[::-1], hashes[:3])
    both = Shingles(np.append(hashes, backwards), np.array([0, len(hashes), len(hashes) + len(backwards)]))

    first, second = sign(both, 64, 7)

    assert (first == second).all()
    assert (sign(both, 64, 8)[0] != first).any()
    assert sign(Shingles(hashes[:0], np.zeros(1, np.int64)), 64, 7).shape == (0, 64)


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.9, 1.0])
@pytest.mark.parametrize("permutations", [16, 128, 512])
def test_banding_misses_under_one_percent_at_the_threshold(threshold: float, permutations: int) -> None:
    banding = choose_banding(threshold, permutations)

    assert banding.bands * banding.rows <= permutations
    if permutations >= 128:
        assert banding.chance(threshold) >= 0.99
        longer = type(banding)(permutations // (banding.rows + 1), banding.rows + 1)
        assert longer.bands == 0 or longer.chance(threshold) < 0.99


def test_bands_find_as_many_pairs_as_the_curve_says() -> None:
    shingles, exact = pairs_of_sets(2000, 0.5, 100)
    banding = choose_banding(0.8, 128)

    bands = hash_bands(sign(shingles, 128, 0), banding)
    found = (bands[:, 0::2] == bands[:, 1::2]).any(axis=0).mean()

    # rensa's values are a little less scattered than independent ones, so fewer pairs agree by luck.
    assert banding.chance(exact) - 0.1 < found < banding.chance(exact) + 0.05


def test_candidates_of_a_bucket_come_once_and_large_buckets_apart() -> None:
    bands = np.array([[7, 7, 1, 2, 3, 3], [5, 5, 5, 5, 9, 8], [7, 7, 0, 2, 3, 3]], np.uint32)
    ranks = np.array([0, 2, 3, 5, 8, 9])

    found = find_candidates(bands, ranks, max_bucket=3)

    assert list(zip(found.left.tolist(), found.right.tolist(), strict=True)) == [(0, 2), (8, 9)]
    assert [bucket.tolist() for bucket in found.large_buckets] == [[0, 2, 3, 5]]


@pytest.mark.parametrize("block", [1, 50, 1 << 20])
def test_similarity_does_not_depend_on_how_much_is_held_at_once(block: int) -> None:
    words = [f"w{number}" for number in range(40)]
    texts = [" ".join(words[start : start + 20]) for start in range(12)]
    left, right = (index.astype(np.int64) for index in np.triu_indices(12, 1))
    sizes = np.full(12, 20)

    def load(ranks: np.ndarray) -> Shingles:
        return shingle_sets([texts[rank] for rank in ranks], 3)

    edges = compare(left, right, sizes, load, block)

    for a, b, score in zip(edges.left, edges.right, edges.scores, strict=True):
        one, other = reference(texts[a], 3), reference(texts[b], 3)
        assert score == pytest.approx(len(one & other) / len(one | other), abs=1e-12)


@pytest.mark.parametrize("batch", [1, 7, 4096])
def test_a_large_bucket_is_compared_with_its_representatives_alone(batch: int) -> None:
    words = [f"w{number}" for number in range(400)]
    # Three families of ten and five rows that are like no other; two representatives are too few for all of them.
    texts = [" ".join([*words[family * 100 : family * 100 + 60], f"x{n}"]) for n in range(10) for family in range(3)]
    texts += [" ".join(words[300 + n : 320 + n]) for n in range(0, 100, 20)]
    members = np.arange(len(texts))

    def load(ranks: np.ndarray) -> Shingles:
        return shingle_sets([texts[rank] for rank in ranks], 3)

    edges, bucket = compare_bucket(members, load, 0.9, most=2, batch=batch)

    expected = [(family, n * 3 + family) for n in range(1, 10) for family in range(2)]
    assert list(zip(edges.left.tolist(), edges.right.tolist(), strict=True)) == expected
    for a, b, score in zip(edges.left, edges.right, edges.scores, strict=True):
        one, other = reference(texts[a], 3), reference(texts[b], 3)
        assert score == pytest.approx(len(one & other) / len(one | other), abs=1e-12)
    assert (bucket.members, bucket.matched, bucket.unmatched) == (35, 18, 15)
    assert bucket.compared == 1 + 33 * 2
