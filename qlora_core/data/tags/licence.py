"""Licences under one spelling and in one class, and the terms of whoever's model wrote an answer.

A row is classed by what its data says; what nobody states is unknown. This is no legal advice: it sorts names.
"""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from qlora_core.data.row import Row
from qlora_core.data.tags.tagger import Tagged, fingerprint_of, tagged

LicenceClass = Literal["permissive", "share_alike", "non_commercial", "no_derivatives", "proprietary", "unknown"]

# From the freest to the strictest; where several licences meet, the strictest holds.
_STRICTNESS: tuple[LicenceClass, ...] = (
    "permissive", "share_alike", "unknown", "non_commercial", "no_derivatives", "proprietary",
)  # fmt: skip

# What each preset of data.policy.licence lets through.
ALLOWED: dict[str, frozenset[LicenceClass]] = {
    "research": frozenset({"permissive", "share_alike", "non_commercial", "no_derivatives", "unknown"}),
    "share_alike": frozenset({"permissive", "share_alike", "unknown"}),
    "commercial": frozenset({"permissive"}),
}

SCHEMA = pa.schema([("licence_id", pa.string()), ("licence_class", pa.string()), ("provider_terms", pa.string())])

_VERSION = 1
_JOINTS = re.compile(r"\s*(?:\+|&|;|\band\b|\bor\b)\s*", re.IGNORECASE)
_WORDS = re.compile(r"[a-z]+|\d+(?:\.\d+)?")
_CREATIVE_COMMONS = {
    "attribution": "by", "noncommercial": "nc", "sharealike": "sa", "noderivatives": "nd", "noderivs": "nd",
}  # fmt: skip
_FILLERS = frozenset({"the", "a", "under", "for", "use", "gnu", "license", "licence", "licensed", "version", "v"})
_JOINED = (
    (re.compile(r"creative\s*commons"), "cc"),
    (re.compile(r"non[\s_-]*commercial"), "noncommercial"),
    (re.compile(r"share[\s_-]*alike"), "sharealike"),
    (re.compile(r"no[\s_-]*deriv(?:ative)?s"), "noderivatives"),
    (re.compile(r"public[\s_-]*domain"), "publicdomain"),
)
_FAMILIES: tuple[tuple[re.Pattern[str], str, LicenceClass], ...] = (
    (re.compile(r"cc0|cczero|publicdomain|unlicense"), "CC0-1.0", "permissive"),
    (re.compile(r"apache"), "Apache-2.0", "permissive"),
    (re.compile(r"mit(?![a-z])"), "MIT", "permissive"),
    (re.compile(r"bsd"), "BSD", "permissive"),
    (re.compile(r"isc(?![a-z])"), "ISC", "permissive"),
    (re.compile(r"odcby"), "ODC-By-1.0", "permissive"),
    (re.compile(r"cdlapermissive"), "CDLA-Permissive", "permissive"),
    (re.compile(r"cdlasharing"), "CDLA-Sharing-1.0", "share_alike"),
    (re.compile(r"odbl"), "ODbL-1.0", "share_alike"),
    (re.compile(r"agpl|afferogeneralpublic"), "AGPL-3.0", "share_alike"),
    (re.compile(r"lgpl|lessergeneralpublic"), "LGPL", "share_alike"),
    (re.compile(r"gpl|generalpublic"), "GPL", "share_alike"),
    (re.compile(r"mpl|mozilla"), "MPL-2.0", "share_alike"),
    (re.compile(r".*(?:noncommercial|researchonly|academiconly)"), "non-commercial", "non_commercial"),
    (re.compile(r".*(?:proprietary|allrightsreserved)"), "proprietary", "proprietary"),
)
_PROVIDERS = (
    ("openai", re.compile(r"\bgpt-?[345]|\bgpt[345]|chatgpt|davinci|openai|\bo[134](?:-|\b)", re.IGNORECASE)),
    ("anthropic", re.compile(r"claude|anthropic", re.IGNORECASE)),
    ("google", re.compile(r"gemini|gemma|\bpalm\b|\bbard\b", re.IGNORECASE)),
    ("meta", re.compile(r"llama", re.IGNORECASE)),
)


@dataclass(frozen=True, slots=True)
class Licence:
    """A licence's one spelling, and what it allows; `id` is None where nothing was said or understood."""

    id: str | None
    kind: LicenceClass


UNKNOWN = Licence(None, "unknown")


class LicenceTagger:
    """Columns `licence_id`, `licence_class`, and `provider_terms`: whose model wrote the answers, if it is known.

    Never cached: rows of equal text may come under different licences. Provider terms bind apart from copyright, so
    they are a tag of their own, and hang on the row's generator.
    """

    name = "licence"
    cached = False
    schema = SCHEMA
    fingerprint = fingerprint_of(name, _VERSION, SCHEMA, None)

    def tag(self, rows: Sequence[Row]) -> Tagged:
        """Licence and provider of each row."""
        found = [normalise_licence(row.licence) for row in rows]
        providers = [provider_of(row.generator) for row in rows]
        return tagged(SCHEMA, [[one.id for one in found], [one.kind for one in found], providers])


@functools.lru_cache(maxsize=4096)
def normalise_licence(text: str | None) -> Licence:
    """The licence a text names: `CC BY-NC`, `cc-by-nc` and `Creative Commons Attribution-NonCommercial` are one.

    Of several, joined by `and`, `or`, `+`, `&` or `;`, the strictest holds, and all their names, sorted, are the id.
    Nothing or an unknown name is `UNKNOWN`, a name beside an unknown one keeps the known name.
    """
    parts = [_single(part) for part in _JOINTS.split(text or "") if part]
    if not parts:
        return UNKNOWN
    names = sorted({part.id for part in parts if part.id})
    strictest = max(parts, key=lambda part: _STRICTNESS.index(part.kind))
    return Licence(" AND ".join(names) or None, strictest.kind)


@functools.lru_cache(maxsize=4096)
def provider_of(generator: str | None) -> str | None:
    """Whose terms bind what `generator` wrote: openai, anthropic, google, meta; None for people and other models."""
    return next((name for name, pattern in _PROVIDERS if generator and pattern.search(generator)), None)


def _single(text: str) -> Licence:
    plain = text.casefold()
    for pattern, word in _JOINED:
        plain = pattern.sub(word, plain)
    words = [found[0] for found in _WORDS.finditer(plain)]
    parts = [_CREATIVE_COMMONS.get(word, word) for word in words]
    if "by" in parts and ("cc" in parts or parts[0] == "by"):
        return _creative_commons(parts)
    joined = "".join(word for word in words if (word.isalpha() and word not in _FILLERS) or word == "0")
    return next((Licence(name, kind) for pattern, name, kind in _FAMILIES if pattern.match(joined)), UNKNOWN)


def _creative_commons(words: Sequence[str]) -> Licence:
    parts = [part for part in ("nc", "nd", "sa") if part in words]
    number = next((word for word in words if word[0].isdigit()), None)
    name = "-".join(["CC-BY", *(part.upper() for part in parts), *([number] if number else [])])
    if "nd" in parts:
        return Licence(name, "no_derivatives")
    if "nc" in parts:
        return Licence(name, "non_commercial")
    return Licence(name, "share_alike" if "sa" in parts else "permissive")
