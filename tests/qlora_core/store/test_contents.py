"""What a file is known by: its digest and those of its pieces, against hashing it in the plainest way."""

import hashlib
import random
from pathlib import Path

import pytest

from qlora_core.store.contents import fingerprint
from qlora_core.store.manifest import PIECE_BYTES


@pytest.mark.parametrize("size_bytes", [0, 1, PIECE_BYTES, PIECE_BYTES + 1, 2 * PIECE_BYTES])
def test_fingerprint_is_that_of_the_whole_and_of_each_piece(tmp_path: Path, size_bytes: int) -> None:
    data = random.Random(size_bytes).randbytes(size_bytes)
    (tmp_path / "weights.safetensors").write_bytes(data)

    entry = fingerprint(tmp_path / "weights.safetensors")

    assert (entry.size_bytes, entry.sha256) == (size_bytes, hashlib.sha256(data).hexdigest())
    pieces = [data[start : start + PIECE_BYTES] for start in range(0, size_bytes, PIECE_BYTES)]
    listed = [hashlib.sha256(piece).hexdigest() for piece in pieces] if len(pieces) > 1 else []
    assert list(entry.pieces) == listed
