"""Decontamination: training rows that hold evaluation items, the evidence, and which of them are dropped.

Looks at every message of a row by itself, known wrappers taken off. It does not see translations or paraphrases, nor an
item that is spread over several turns. Of an item it looks for the prompts, not for the reference; of a row it reads
the messages, not the tools nor the rejected answer.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from qlora_core.config.curation import DecontaminateConfig
from qlora_core.data.decontamination.eval_sets import EvalSet
from qlora_core.data.decontamination.kernels import hash_ngrams
from qlora_core.data.decontamination.ngrams import (
    SHOWN_CHARACTERS,
    ItemTexts,
    NgramIndex,
    Suppressed,
    index_ngrams,
    item_texts,
)
from qlora_core.data.decontamination.overlaps import find_overlaps, stand_alone
from qlora_core.data.decontamination.words import Words, split_words
from qlora_core.data.ledger import Dropped
from qlora_core.data.row import Row
from qlora_core.data.text_form import folded
from qlora_core.data.wrappers import strip_wrappers
from qlora_core.progress import progress_bar

RULE = "contamination"
# Messages are taken together until they hold this many characters: some 30 bytes of arrays for each.
BATCH_CHARACTERS = 1 << 20

Kind = Literal["exact", "ngram", "short", "answer"]
KINDS: tuple[Kind, ...] = ("exact", "ngram", "short", "answer")


@dataclass(frozen=True, slots=True)
class Hit:
    """One row that holds (part of) one item: the strongest evidence for the pair.

    kind: `exact`, a prompt that is the item's; `ngram`, shared n-grams; `short`, an item shorter than an n-gram, whole
    inside a prompt; `answer`, shared n-grams in an assistant turn. coverage: the share (0 to 1) of the item's words
    inside shared n-grams. turn: which message of the row, from 0. item_words, row_words: first word and the one after
    the last of the longest equal stretch, counted in the item's prompt (or stem) and in the message, wrappers taken
    off; `text` shows it, cut to 200 characters. dropped: whether this evidence is enough to drop the row.
    """

    item_id: str
    set_name: str
    row_id: str
    source: str
    line: int
    turn: int
    kind: Kind
    coverage: float
    item_words: tuple[int, int]
    row_words: tuple[int, int]
    text: str
    dropped: bool


@dataclass(frozen=True, slots=True)
class SetCounts:
    """What was found of one set: its items, those with a hit, rows with a hit, rows dropped for it, headers ignored.

    A row that holds items of two sets counts in both.
    """

    items: int
    items_hit: int
    rows_hit: int
    rows_dropped: int
    suppressed: int


@dataclass(frozen=True, slots=True)
class Decontamination:
    """`kept`: int64 positions of the rows that stay, ascending; `dropped` the others, in their order.

    `hits` are ordered by set, item, row id, source and line; `sets` is keyed by set name; `suppressed` lists the words
    taken for headers, most frequent first within a set.
    """

    kept: np.ndarray
    dropped: list[Dropped]
    hits: list[Hit]
    sets: dict[str, SetCounts]
    suppressed: list[Suppressed]


@dataclass(slots=True)
class _Batch:
    """Messages of some rows, wrappers taken off; `place` says which row of `rows` each belongs to."""

    position: int
    rows: list[tuple[str, str, int]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    place: list[int] = field(default_factory=list)
    turn: list[int] = field(default_factory=list)
    answer: list[bool] = field(default_factory=list)
    characters: int = 0


@dataclass(frozen=True, slots=True)
class _Evidence:
    """A hit by its places: message of the batch, item text, word ranges; compared by `strength`."""

    message: int
    item_text: int
    kind: Kind
    coverage: float
    dropped: bool
    item_words: tuple[int, int]
    row_words: tuple[int, int]

    @property
    def strength(self) -> tuple[bool, float, int, int, int]:
        return (self.dropped, self.coverage, -KINDS.index(self.kind), -self.message, -self.item_text)


def decontaminate(rows: Sequence[Row], sets: Sequence[EvalSet], config: DecontaminateConfig) -> Decontamination:
    """Find the rows that hold items of `sets`; drop them unless `config.action` is `report`.

    Dropped is a row with a prompt equal to an item's first prompt (case, spacing, sentence marks and wrappers aside)
    of at least `min_exact_words` words; with `min_coverage` of an item's words in shared n-grams, in a prompt or an
    answer; with a short item of at least `min_exact_words` words as a sentence or more of its own in a prompt. Later
    turns and stems of multiple-choice questions ("Can you explain that again?") count alone only from `ngram_words`
    words on. Anything less is a hit that is reported. The score of a dropped row is the coverage, its `matched_id` the
    item's id; of several items the best covered is named, of equals the first.

    Without sets, every row is kept. Goes through `rows` once, in order; each row's fate is its own.
    """
    texts, suppressed = item_texts(sets, config)
    matcher = _Matcher(sets, texts, index_ngrams(texts, config), config)
    kept = np.ones(len(rows), bool)
    dropped: list[Dropped] = []
    hits: list[tuple[int, Hit]] = []
    with progress_bar("Decontaminating", len(rows)) as advance:
        for batch in _batches(rows) if matcher.ids else ():
            for place, found in matcher.match(batch):
                hits += found
                enough = [hit for _, hit in found if hit.dropped]
                if enough:
                    kept[batch.position + place] = False
                    dropped.append(_drop(max(enough, key=lambda hit: hit.coverage)))
            advance(len(batch.rows))
    hits.sort(key=lambda entry: (entry[0], entry[1].row_id, entry[1].source, entry[1].line))
    found_hits = [hit for _, hit in hits]
    return Decontamination(np.flatnonzero(kept), dropped, found_hits, _count(sets, found_hits, suppressed), suppressed)


class _Matcher:
    """Finds the evidence of one batch after the other."""

    def __init__(
        self, sets: Sequence[EvalSet], texts: ItemTexts, index: NgramIndex, config: DecontaminateConfig
    ) -> None:
        self._texts, self._index, self._config = texts, index, config
        self.ids = [(item.id, entry.name) for entry in sets for item in entry.items]
        hashes = _whole_hashes(texts.words)
        self._exact_order = np.argsort(hashes, kind="stable")
        self._exact_hashes = hashes[self._exact_order]
        self._shown: dict[tuple[int, int], str] = {}

    def match(self, batch: _Batch) -> Iterator[tuple[int, list[tuple[int, Hit]]]]:
        """Each row with evidence, by its place in the batch, in order: item numbers and hits."""
        words = split_words(batch.texts)
        best: dict[tuple[int, int], _Evidence] = {}
        for evidence in (*self._equal(batch, words), *self._overlapping(batch, words)):
            key = (batch.place[evidence.message], int(self._texts.item[evidence.item_text]))
            if key not in best or evidence.strength > best[key].strength:
                best[key] = evidence
        by_row: dict[int, list[tuple[int, Hit]]] = {}
        for (place, item), evidence in sorted(best.items()):
            by_row.setdefault(place, []).append((item, self._hit(batch, item, evidence)))
        yield from by_row.items()

    def _equal(self, batch: _Batch, words: Words) -> Iterator[_Evidence]:
        """Prompts that are an item's text."""
        hashes = _whole_hashes(words)
        low = np.searchsorted(self._exact_hashes, hashes, side="left")
        high = np.searchsorted(self._exact_hashes, hashes, side="right")
        low[np.array(batch.answer, bool)] = 0
        high[np.array(batch.answer, bool)] = 0
        for message in np.flatnonzero(high > low):
            form = folded(batch.texts[message])
            size = int(words.offsets[message + 1] - words.offsets[message])
            for item_text in self._exact_order[low[message] : high[message]]:
                if self._texts.folded[item_text] == form:
                    enough = self._exact_counts(item_text, size)
                    yield _Evidence(int(message), int(item_text), "exact", 1.0, enough, (0, size), (0, size))

    def _exact_counts(self, item_text: int, size: int) -> bool:
        least = self._config.min_exact_words if self._texts.whole[item_text] else self._config.ngram_words
        return self._config.action == "drop" and size >= least

    def _overlapping(self, batch: _Batch, words: Words) -> Iterator[_Evidence]:
        texts, config = self._texts, self._config
        found = find_overlaps(words, np.array(batch.answer, bool), config.ngram_words, texts, self._index)
        coverage = found.matched / np.maximum(texts.counted[found.item_text], 1)
        item_first = found.item_first - texts.words.offsets[found.item_text]
        row_first = found.row_first - words.offsets[found.text]
        short = texts.last[found.item_text] - texts.first[found.item_text] < config.ngram_words
        alone = stand_alone(words, found.text, found.row_first, found.length)
        for h in range(len(found.text)):
            message, item_text = int(found.text[h]), int(found.item_text[h])
            size = int(found.length[h])
            if short[h]:
                kind = "short"
                # One that goes on ("... for dogs?") asks another thing.
                enough = bool(texts.whole[item_text] and alone[h]) and self._same_signs(batch, message, item_text, size)
            else:
                kind = "answer" if batch.answer[message] else "ngram"
                enough = bool(coverage[h] >= config.min_coverage)
            yield _Evidence(
                message,
                item_text,
                kind,
                float(coverage[h]),
                enough and config.action == "drop",
                (int(item_first[h]), int(item_first[h]) + size),
                (int(row_first[h]), int(row_first[h]) + size),
            )

    def _same_signs(self, batch: _Batch, message: int, item_text: int, size: int) -> bool:
        """Whether a short item stands in a prompt with its operators: "3 - 4" has the words of "3 + 4"."""
        whole_text = size == self._texts.sizes[item_text]
        return not whole_text or self._texts.folded[item_text] in folded(batch.texts[message])

    def _hit(self, batch: _Batch, item: int, evidence: _Evidence) -> Hit:
        row_id, source, line = batch.rows[batch.place[evidence.message]]
        item_id, set_name = self.ids[item]
        first = int(self._texts.words.offsets[evidence.item_text])
        span = (first + evidence.item_words[0], first + evidence.item_words[1])
        if span not in self._shown:
            last = min(span[1], span[0] + SHOWN_CHARACTERS)  # more words could not be shown
            self._shown[span] = self._texts.words.text(span[0], last)[:SHOWN_CHARACTERS]
        return Hit(
            item_id, set_name, row_id, source, line, batch.turn[evidence.message], evidence.kind, evidence.coverage,
            evidence.item_words, evidence.row_words, self._shown[span], evidence.dropped,
        )  # fmt: skip


def _batches(rows: Sequence[Row]) -> Iterator[_Batch]:
    batch = _Batch(0)
    for position, row in enumerate(rows):
        for turn, message in enumerate(row.messages):
            answer = message.role == "assistant"
            batch.texts.append(message.content if answer else strip_wrappers(message.content))
            batch.place.append(len(batch.rows))
            batch.turn.append(turn)
            batch.answer.append(answer)
            batch.characters += len(batch.texts[-1])
        batch.rows.append((row.id, row.source, row.line))
        if batch.characters >= BATCH_CHARACTERS:
            yield batch
            batch = _Batch(position + 1)
    if batch.rows:
        yield batch


def _whole_hashes(words: Words) -> np.ndarray:
    """uint64 [T]: a hash of each text's words, all of them."""
    return hash_ngrams(words.prefix, words.offsets[:-1], np.diff(words.offsets))


def _drop(hit: Hit) -> Dropped:
    return Dropped(hit.row_id, hit.source, hit.line, RULE, matched_id=hit.item_id, score=hit.coverage)


def _count(sets: Sequence[EvalSet], hits: Sequence[Hit], suppressed: Sequence[Suppressed]) -> dict[str, SetCounts]:
    items: dict[str, set[str]] = {entry.name: set() for entry in sets}
    rows: dict[str, set[tuple[str, str, int]]] = {entry.name: set() for entry in sets}
    gone: dict[str, set[tuple[str, str, int]]] = {entry.name: set() for entry in sets}
    for hit in hits:
        row = (hit.row_id, hit.source, hit.line)
        items[hit.set_name].add(hit.item_id)
        rows[hit.set_name].add(row)
        if hit.dropped:
            gone[hit.set_name].add(row)
    ignored = Counter(entry.set_name for entry in suppressed)
    counts = {}
    for entry in sets:
        found = (items[entry.name], rows[entry.name], gone[entry.name])
        counts[entry.name] = SetCounts(len(entry.items), *map(len, found), suppressed=ignored[entry.name])
    return counts
