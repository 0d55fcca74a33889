"""Takes off what many prompts have in common: known wrappers, shared system prompts, preambles learnt from the rows.

Rows that share a long preamble look alike by their n-grams and are not; two copies of a row of which one wears a
wrapper look different and are not. Decides about no row: it only says what of a text is its own.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import xxhash

from qlora_core.data.near_duplicates import kernels
from qlora_core.data.positions import rows_at
from qlora_core.data.row import Row
from qlora_core.data.text_form import ALPACA_OPENING, spaced, strip_alpaca_wrapper

# (what a prompt starts with, what it ends with): taken off only as a pair, from a text of a single turn.
PAIRS = (
    ("[INST]", "[/INST]"),
    ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant"),
    ("### Instruction:", "### Response:"),
    ("### Human:", "### Assistant:"),
    ("### Question:", "### Answer:"),
    ("Human:", "Assistant:"),
    ("User:", "Assistant:"),
    ("USER:", "ASSISTANT:"),
    ("Question:", "Answer:"),
    ("Q:", "A:"),
)
OPENINGS = tuple(opening for opening, _ in PAIRS)
# A text that begins with none of these, blanks aside, is in no wrapper.
WRAPPER_OPENINGS = (*OPENINGS, ALPACA_OPENING)
KNOWN_SYSTEM_PROMPTS = frozenset(
    {
        "you are a helpful assistant",
        "you are a helpful ai assistant",
        "below is an instruction that describes a task. write a response that appropriately completes the request",
        "a chat between a curious user and an artificial intelligence assistant. the assistant gives helpful, "
        "detailed, and polite answers to the user's questions",
    }
)
# Below these a shared opening is how people write ("What is the best way to ..."), not a form that was filled in.
MIN_WORDS = 8
MIN_CHARACTERS = 32
MIN_ROWS = 10
# A preamble ends where texts part: near-duplicates go on alike after every prefix they share.
MIN_CONTINUATIONS = 5
MAX_TOP_SHARE = 0.5
CONTINUATION_WORDS = 3
# How far into a text its preamble may reach.
MAX_PREFIX_CHARACTERS = 8192
# How many places a text may have where a preamble could end.
MOST_ENDS = 64
BATCH_TEXTS = 1024
PREFIX = np.dtype([("place", "u4"), ("end", "u4"), ("prefix", "u8"), ("following", "u8")])


def strip_wrappers(text: str) -> str:
    """What a known prompt format was wrapped around, without white space at its ends; other texts come back unchanged.

    Knows Alpaca's wrapper, with and without its first sentence, and the one-turn forms in `PAIRS`. A wrapper is taken
    off only as a whole, so a text that quotes one keeps it, and never down to an empty text.
    """
    inner = strip_alpaca_wrapper(text)
    if inner is not text:
        return inner or text
    bare = text.strip()
    if not bare.startswith(OPENINGS):
        return text
    for opening, closing in PAIRS:
        if bare.startswith(opening) and bare.endswith(closing) and len(bare) > len(opening) + len(closing):
            body = bare[len(opening) : -len(closing)].strip()
            return text if not body or opening in body or closing in body else body
    return text


@dataclass(frozen=True, slots=True)
class Preambles:
    """Openings that many texts share. `texts` holds each as it is written, the longest first.

    `systems` holds whole system prompts that many rows share, spacing evened out. `rows` counts the opening prompts and
    system prompts that began with a preamble. Empty for rows that share nothing.
    """

    texts: tuple[str, ...] = ()
    systems: frozenset[str] = frozenset()
    rows: int = 0
    _heads: frozenset[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_heads", frozenset(text[:MIN_CHARACTERS] for text in self.texts))

    @property
    def count(self) -> int:
        """How many preambles were found."""
        return len(self.texts)

    def strip(self, text: str) -> str:
        """`text` after the longest preamble it opens with; unchanged if it opens with none or is nothing else."""
        if text[:MIN_CHARACTERS] not in self._heads:
            return text
        for preamble in self.texts:
            if text.startswith(preamble) and text[len(preamble) : len(preamble) + 1].isspace():
                return text[len(preamble) :].strip() or text
        return text

    def strip_system(self, text: str) -> str:
        """A system prompt without what is not its own: empty if many rows share it or every chat format knows it.

        A system prompt that is the row's own (a document to answer about, say) comes back.
        """
        even = spaced(text)
        if even in self.systems or even.casefold().rstrip(".") in KNOWN_SYSTEM_PROMPTS:
            return ""
        return self.strip(text)


def find_preambles(rows: Sequence[Row]) -> Preambles:
    """Learn the long word prefixes that many rows' opening prompts or system prompts share, like a list of tools.

    A preamble has at least `MIN_WORDS` words and `MIN_CHARACTERS` characters, opens at least `MIN_ROWS` rows, ends with
    a sentence or line, and is followed by at least `MIN_CONTINUATIONS` different texts of which none makes up more than
    `MAX_TOP_SHARE`. Depends on the rows, not on their order. Goes through the rows once.
    """
    openings, system_prompts = _Prefixes(), _Prefixes()
    systems = np.zeros(len(rows), np.uint64)
    for place, row in enumerate(rows):
        openings.add(place, _opening(row))
        if system := _system(row):
            system_prompts.add(place, system)
            systems[place] = _hash(spaced(system))
    found = openings.preambles(lambda places: map(_opening, rows_at(rows, places)))
    among_systems = system_prompts.preambles(lambda places: map(_system, rows_at(rows, places)))
    values, examples, counts = np.unique(systems, return_index=True, return_counts=True)
    shared = examples[(values != 0) & (counts >= MIN_ROWS)]
    return Preambles(
        texts=_longest_first({*found.texts, *among_systems.texts}),
        systems=frozenset(spaced(_system(row)) for row in rows_at(rows, shared)),
        rows=found.rows + among_systems.rows,
    )


def find_text_preambles(texts: list[str]) -> Preambles:
    """`find_preambles` for bare texts: the items of an evaluation set, say."""
    prefixes = _Prefixes()
    for place, text in enumerate(texts):
        prefixes.add(place, text)
    return prefixes.preambles(lambda places: (texts[place] for place in places.tolist()))


class _Prefixes:
    """Of every text the places where a preamble could end, by hash: about 25 bytes each."""

    def __init__(self) -> None:
        self._waiting: list[bytes] = []
        self._places: list[int] = []
        self._tables: list[np.ndarray] = []

    def add(self, place: int, text: str) -> None:
        """Note the text of the row at a place."""
        if len(text) > MIN_CHARACTERS:
            self._waiting.append(text[:MAX_PREFIX_CHARACTERS].encode("utf-8", "surrogatepass"))
            self._places.append(place)
            if len(self._waiting) >= BATCH_TEXTS:
                self._hash()

    def preambles(self, texts_at: Callable[[np.ndarray], Iterable[str]]) -> Preambles:
        """What many of the texts have in common; `texts_at` gives the texts at some places anew."""
        self._hash()
        table = np.concatenate(self._tables) if self._tables else np.zeros(0, PREFIX)
        table = table[_parting(table)]
        # A text's prefixes lie together, shortest first. One that is no text's longest is part of a preamble only.
        longest = np.ones(len(table), bool)
        longest[:-1] = table["place"][1:] != table["place"][:-1]
        table = table[longest]
        examples = table[np.unique(table["prefix"], return_index=True)[1]]
        texts = [text.encode("utf-8", "surrogatepass") for text in texts_at(examples["place"].astype(np.int64))]
        ends = examples["end"].tolist()
        found = {text[:end].decode("utf-8", "surrogatepass") for text, end in zip(texts, ends, strict=True)}
        return Preambles(_longest_first(found), rows=len(table))

    def _hash(self) -> None:
        starts = np.zeros(len(self._waiting) + 1, np.int64)
        np.cumsum([len(text) for text in self._waiting], out=starts[1:])
        data = np.frombuffer(b"".join(self._waiting), np.uint8)
        text, end, prefix, following = kernels.hash_prefixes(
            data, starts, MIN_WORDS, MIN_CHARACTERS, CONTINUATION_WORDS, MOST_ENDS
        )
        table = np.zeros(len(text), PREFIX)
        table["place"] = np.array(self._places, np.uint32)[text]
        table["end"], table["prefix"], table["following"] = end, prefix, following
        self._tables.append(table)
        self._waiting, self._places = [], []


def _longest_first(texts: set[str]) -> tuple[str, ...]:
    return tuple(sorted(texts, key=lambda text: (-len(text), text)))


def _opening(row: Row) -> str:
    return strip_wrappers(row.opening)


def _system(row: Row) -> str:
    return row.messages[0].content if row.messages[0].role == "system" else ""


def _hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass")) or 1


def _parting(table: np.ndarray) -> np.ndarray:
    """Which rows of the table hold a prefix that many texts share and after which they part."""
    if not len(table):
        return np.zeros(0, bool)
    order = np.lexsort((table["following"], table["prefix"]))
    prefix, following = table["prefix"][order], table["following"][order]
    opens = np.append(True, prefix[1:] != prefix[:-1])
    differs = opens | np.append(True, following[1:] != following[:-1])
    counts = np.diff(np.append(np.flatnonzero(differs), len(table)))
    first = np.flatnonzero(opens[differs])
    texts, top = np.add.reduceat(counts, first), np.maximum.reduceat(counts, first)
    continuations = np.diff(np.append(first, len(counts)))
    good = (texts >= MIN_ROWS) & (continuations >= MIN_CONTINUATIONS) & (top <= MAX_TOP_SHARE * texts)
    chosen = np.zeros(len(table), bool)
    chosen[order] = good[np.cumsum(opens) - 1]
    return chosen
