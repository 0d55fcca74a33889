"""What ties rows together across a split: prompts, user turns, declared keys. Knows nothing of sides or of files.

Texts are held as 128-bit BLAKE2b digests. Equal digests stand for equal texts: at this length a chance match among
10 million keys has a probability under 1e-24, and none can be made on purpose within 2^64 tries.
"""

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qlora_core.data.row import Message
from qlora_core.data.text_form import folded
from qlora_core.errors import DataError

DIGEST_BYTES = 16
# What waits as Python texts takes twice what Arrow needs for it.
ID_CHUNK = 4096


class Kind(IntEnum):
    """Why two rows are related, the most telling first."""

    CONVERSATION = 0
    PROMPT = 1
    TURN = 2
    GROUP = 3
    NEAR_DUPLICATE = 4


@dataclass(frozen=True, slots=True)
class Relations:
    """Which row has which key: three arrays of one length, an entry per row and key.

    `row` (int32) is a position among the rows given, `key` (int32) counts distinct keys from 0, `kind` (int8) is a
    `Kind`. Two rows that have the same key are related unless both have it as a later turn: "Go on." in two
    conversations is no leak, but it is one if it is somewhere the prompt. `ids` are the rows' ids by position,
    `order` (int64) the positions sorted by id, `rank` (int32) a position's place in `order`.
    """

    row: np.ndarray
    key: np.ndarray
    kind: np.ndarray
    keys: int
    ids: pa.LargeStringArray
    order: np.ndarray
    rank: np.ndarray

    @property
    def strong(self) -> np.ndarray:
        """True where an entry relates its row to every other row that has the key."""
        return self.kind != Kind.TURN

    def repeated(self) -> np.ndarray:
        """The positions of rows whose id another row of lower position has too."""
        ordered = self.ids.take(pa.array(self.order))
        if len(ordered) < 2:
            return np.zeros(0, np.int64)
        same = pc.call_function("equal", [ordered[1:], ordered[:-1]]).to_numpy(zero_copy_only=False)
        return self.order[1:][same]

    def with_clusters(self, cluster_of: np.ndarray) -> "Relations":
        """The same and an entry for each row with `cluster_of[position] >= 0`; rows of one cluster are related.

        Raises DataError if `cluster_of` has not one number a row.
        """
        if cluster_of.shape != (len(self.ids),):
            raise DataError(
                f"cluster_of has shape {cluster_of.shape} for {len(self.ids)} rows; it must hold one number a row, "
                "-1 for a row without a cluster. This is a fault in curation; please report it"
            )
        members = np.flatnonzero(cluster_of >= 0).astype(np.int32)
        names, cluster = np.unique(cluster_of[members], return_inverse=True)
        return Relations(
            row=np.concatenate([self.row, members]),
            key=np.concatenate([self.key, (cluster + self.keys).astype(np.int32)]),
            kind=np.concatenate([self.kind, np.full(len(members), Kind.NEAR_DUPLICATE, np.int8)]),
            keys=self.keys + len(names),
            ids=self.ids,
            order=self.order,
            rank=self.rank,
        )


class RelationsBuilder:
    """Collects rows one by one: about 21 bytes a key and 72 a row, whatever the length of the texts."""

    def __init__(self) -> None:
        self._digests = bytearray()
        self._rows = array("i")
        self._kinds = array("b")
        self._ids: list[str] = []
        self._id_chunks: list[pa.LargeStringArray] = []
        self._count = 0

    def add(
        self, row_id: str, turns: Sequence[str], group_keys: Iterable[str] = (), conversation: str | None = None
    ) -> None:
        """Add the next row: its folded user turns in order, its declared keys and, to compare it, its whole text.

        Raises DataError for a row without a user turn.
        """
        if not turns:
            raise DataError(f"row {row_id} has no user turn; every row needs one. Curate the data again")
        self._enter("turn", turns[0], Kind.PROMPT)
        for turn in dict.fromkeys(turns[1:]):
            if turn != turns[0]:
                self._enter("turn", turn, Kind.TURN)
        for key in group_keys:
            self._enter("group", key, Kind.GROUP)
        if conversation is not None:
            self._enter("conversation", conversation, Kind.CONVERSATION)
        self._ids.append(row_id)
        self._count += 1
        if len(self._ids) == ID_CHUNK:
            self._flush_ids()

    def build(self) -> Relations:
        """The table of all rows added."""
        self._flush_ids()
        ids = pa.concat_arrays(self._id_chunks)
        order = pc.call_function("sort_indices", [ids]).to_numpy().astype(np.int64)
        rank = np.empty(self._count, np.int32)
        rank[order] = np.arange(self._count, dtype=np.int32)
        key, keys = _number(np.frombuffer(self._digests, np.uint64).reshape(-1, 2))
        return Relations(
            row=np.array(self._rows, np.int32),
            key=key,
            kind=np.array(self._kinds, np.int8),
            keys=keys,
            ids=ids,
            order=order,
            rank=rank,
        )

    def _enter(self, space: str, text: str, kind: Kind) -> None:
        self._digests += hashlib.blake2b(f"{space}\0{text}".encode(), digest_size=DIGEST_BYTES).digest()
        self._rows.append(self._count)
        self._kinds.append(kind)

    def _flush_ids(self) -> None:
        self._id_chunks.append(pa.array(self._ids, pa.large_string()))
        self._ids = []


def user_turns(messages: Iterable[Message]) -> list[str]:
    """The folded user turns, in order; the first is the prompt."""
    return [folded(message.content) for message in messages if message.role == "user"]


def _number(digests: np.ndarray) -> tuple[np.ndarray, int]:
    """Equal rows of `digests` (n x 2) get equal numbers from 0; and how many there are."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))
    ordered = digests[order]
    is_new = np.ones(len(digests), bool)
    is_new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    numbers = np.empty(len(digests), np.int32)
    numbers[order] = np.cumsum(is_new, dtype=np.int32) - 1
    return numbers, int(is_new.sum())
