"""The sides of the split, and which one a key is on. Knows nothing of rows."""

import hashlib
from typing import Literal

from qlora_core.config.curation import SplitConfig

Side = Literal["train", "validation", "test"]
SIDES: tuple[Side, ...] = ("train", "validation", "test")
# Of two rows that must not be on different sides, the one on the side named first stays.
PRECEDENCE: tuple[Side, ...] = ("test", "validation", "train")


def side_of(group_key: str, config: SplitConfig) -> Side:
    """The side of a group: its salted hash as a number in [0, 1), test first, then validation, the rest is train.

    It depends on nothing but the key and the config, so added rows move nobody.
    """
    digest = hashlib.sha256(f"{config.salt}\0{group_key}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    if place < config.test:
        return "test"
    return "validation" if place < config.test + config.validation else "train"
