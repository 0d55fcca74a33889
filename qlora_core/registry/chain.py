"""A chain of entries in which each names the digest of the one before: no edit, deletion or exchange goes unnoticed.

Knows entries and digests, not where they are kept or what they say. Whoever can rewrite every entry and the head can
forge the whole: note the head's digest elsewhere to see that, too.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_core.digest import canonical_json, digest_json


class BrokenChainError(ValueError):
    """The entries are not those that were written; the text says which one shows it."""


@dataclass(frozen=True)
class Link:
    """One entry: its place (from 1), the digest of the entry before (the first: of what came before the chain)."""

    number: int
    prior: str
    body: Mapping[str, Any]

    @property
    def sha256(self) -> str:
        """Digest of the whole entry, 64 hex digits."""
        return digest_json(self._content())

    def text(self) -> str:
        """The entry as canonical JSON."""
        return canonical_json(self._content()).decode()

    def _content(self) -> dict[str, Any]:
        return {"number": self.number, "prior": self.prior, "body": dict(self.body)}


def next_link(chain: Sequence[Link], body: Mapping[str, Any], *, origin: str) -> Link:
    """The entry that follows `chain`; `origin` is what the first one names as prior."""
    return Link(len(chain) + 1, chain[-1].sha256 if chain else origin, body)


def head_text(chain: Sequence[Link]) -> str:
    """The head of a chain that is not empty: how many entries there are and the last one's digest."""
    return canonical_json({"number": chain[-1].number, "sha256": chain[-1].sha256}).decode()


def read_chain(entries: Mapping[int, str], head: str | None, *, origin: str) -> list[Link]:
    """The chain, verified, from each place's text and the head's; no entries and no head are an empty chain.

    The head is written after its entry, so it may be one entry behind (a writer died in between), and no more. Raises
    BrokenChainError for a gap, an entry at another place, one that does not follow from the one before, and a head that
    names other entries.
    """
    chain: list[Link] = []
    for place in range(1, max(entries, default=0) + 1):
        if place not in entries:
            raise BrokenChainError(f"entry {place} is missing")
        link = _parse(entries[place], place)
        expected = chain[-1].sha256 if chain else origin
        if link.number != place:
            raise BrokenChainError(f"entry {link.number} stands in place {place}")
        if link.prior != expected:
            raise BrokenChainError(f"entry {place} does not follow from the one before it: that one was changed")
        chain.append(link)
    _check_head(chain, head)
    return chain


def _check_head(chain: Sequence[Link], head: str | None) -> None:
    if head is None:
        if len(chain) > 1:
            raise BrokenChainError(f"there are {len(chain)} entries and no head")
        return
    try:
        named = json.loads(head)
        number, sha256 = int(named["number"]), str(named["sha256"])
    except (TypeError, KeyError, ValueError) as error:
        raise BrokenChainError(f"the head cannot be read ({error})") from error
    if number not in (len(chain), len(chain) - 1) or number < 1:
        raise BrokenChainError(f"the head names {number} entries, and there are {len(chain)}")
    if chain[number - 1].sha256 != sha256:
        raise BrokenChainError(f"entry {number} is not the one the head names: it was changed")


def _parse(text: str, place: int) -> Link:
    try:
        content = json.loads(text)
        link = Link(content["number"], content["prior"], content["body"])
        if not isinstance(link.number, int) or not isinstance(link.prior, str) or not isinstance(link.body, dict):
            raise TypeError("not number, prior and body")
    except (TypeError, KeyError, ValueError) as error:
        raise BrokenChainError(f"entry {place} cannot be read ({error})") from error
    if text != link.text():
        raise BrokenChainError(f"entry {place} is not in the form it was written in")
    return link
