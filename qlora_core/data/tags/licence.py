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

_VERSION = 2
_URL = re.compile(r"https?://\S+", re.IGNORECASE)
# A comma before a version joins nothing: "Apache License, Version 2.0".
_JOINTS = re.compile(r"\s*(?:[+&;/]|,(?!\s*v?(?:ersion)?\s*\d)|\band\b|\bor\b)\s*", re.IGNORECASE)
_WORDS = re.compile(r"[a-z]+|\d+(?:\.\d+)*")
_CREATIVE_COMMONS = {
    "attribution": "by", "noncommercial": "nc", "sharealike": "sa", "noderivatives": "nd", "noderivs": "nd",
}  # fmt: skip
# What may stand beside a licence's name and changes nothing.
_UNDERSTOOD = frozenset((
    "the", "a", "an", "under", "for", "use", "only", "gnu", "license", "licence", "licensed", "licences",
    "licenses", "version", "v", "any", "later", "or", "new", "modified", "revised", "simplified", "clause",
    "software", "foundation", "universal", "dedication", "zero", "international", "unported", "generic",
    "public", "igo", "deed", "legalcode", "http", "https", "www", "org", "opensource", "html", "txt",
))  # fmt: skip
_JOINED = (
    (re.compile(r"creative[\s_-]*commons"), "cc"),
    (re.compile(r"non[\s_-]*commercial"), "noncommercial"),
    (re.compile(r"share[\s_-]*alike"), "sharealike"),
    (re.compile(r"no[\s_-]*deriv(?:ative)?s?"), "noderivatives"),
    (re.compile(r"public[\s_-]*domain"), "publicdomain"),
)
_PURPOSE = r"(?:research|academic|scientific|educational|education|personal|private|evaluation|non-?profit|teaching)"
_FEW_WORDS = r"[\W_]+(?:\w+[\W_]+){0,4}?"
# Wherever in a text they stand, and whatever licence is named beside them, these hold.
_RESTRICTIONS: tuple[tuple[re.Pattern[str], str, LicenceClass], ...] = (
    (
        re.compile(
            r"proprietary|all[\W_]*rights[\W_]*reserved|confidential|closed[\W_]*source|"
            r"\b(?:no|not)\b(?:[\W_]+for)?[\W_]+(?:re[\W_]*)?distribut|internal[\W_]+use"
        ),
        "proprietary",
        "proprietary",
    ),
    (
        re.compile(
            r"\b(?:no|non|not|without)[\W_]*deriv|(?<![a-z0-9])nd(?![a-z])|"
            r"\b(?:no|not|without)\b(?:[\W_]+be)?[\W_]+(?:modif|adapt|alter)"
        ),
        "no-derivatives",
        "no_derivatives",
    ),
    (
        re.compile(
            r"non[\W_]*comm|(?<![a-z0-9])nc(?![a-z])|commons[\W_]*clause|(?:not|non)[\W_]*(?:for[\W_]*)?profit|"
            rf"\b(?:no|not|never|without|except|excluding|prohibits?|forbids?|cannot)\b{_FEW_WORDS}commercial|"
            rf"commercial{_FEW_WORDS}(?:not|prohibited|forbidden|excluded|disallowed|restricted)\b|"
            rf"{_PURPOSE}{_FEW_WORDS}only|only{_FEW_WORDS}{_PURPOSE}|{_PURPOSE}[\W_]*(?:only|use|purpose)"
        ),
        "non-commercial",
        "non_commercial",
    ),
)
# Over words with one space between them; the longer name of two stands first.
_FAMILIES: tuple[tuple[re.Pattern[str], str, LicenceClass], ...] = (
    (re.compile(r"\b(?:cc 0|cc zero|cczero|cc publicdomain|publicdomain|unlicense)\b"), "CC0-1.0", "permissive"),
    (re.compile(r"\bapache\b"), "Apache-2.0", "permissive"),
    (re.compile(r"\bmit\b"), "MIT", "permissive"),
    (re.compile(r"\bbsd\b"), "BSD", "permissive"),
    (re.compile(r"\bisc\b"), "ISC", "permissive"),
    (re.compile(r"\b(?:odc|open data commons) (?:by|attribution)\b"), "ODC-By-1.0", "permissive"),
    (re.compile(r"\bcdla permissive\b"), "CDLA-Permissive", "permissive"),
    (re.compile(r"\bcdla sharing\b"), "CDLA-Sharing-1.0", "share_alike"),
    (re.compile(r"\b(?:odbl|(?:open data commons )?open database)\b"), "ODbL-1.0", "share_alike"),
    (re.compile(r"\b(?:agpl|affero general public)v?\b"), "AGPL-3.0", "share_alike"),
    (re.compile(r"\b(?:lgpl|lesser general public)v?\b"), "LGPL", "share_alike"),
    (re.compile(r"\b(?:gpl|general public)v?\b"), "GPL", "share_alike"),
    (re.compile(r"\b(?:mpl|mozilla public|mozilla)\b"), "MPL-2.0", "share_alike"),
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
    labels = ("licence", "generator")
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

    Of several, joined by `and`, `or`, `+`, `&`, `,`, `/` or `;`, the strictest holds, and all their names, sorted, are
    the id. A restriction (non-commercial, research only, no derivatives, proprietary) anywhere in the text binds all of
    it. Nothing or an unknown name is `UNKNOWN`; a known name beside words that are not understood is kept, as unknown.
    """
    plain = _URL.sub(lambda found: found[0].replace("/", " "), text or "").casefold()
    parts = [part for piece in _JOINTS.split(plain) if (part := _single(piece)) is not None]
    restrictions = [Licence(name, kind) for pattern, name, kind in _RESTRICTIONS if pattern.search(plain)]
    if not parts and not restrictions:
        return UNKNOWN
    names = {part.id for part in parts if part.id}
    # A Creative Commons licence says its own restrictions in its name.
    names |= {one.id for one in restrictions if one.id and not any(_says(name, one.kind) for name in names)}
    strictest = max([*parts, *restrictions], key=lambda part: _STRICTNESS.index(part.kind))
    return Licence(" AND ".join(sorted(names)) or None, strictest.kind)


@functools.lru_cache(maxsize=4096)
def provider_of(generator: str | None) -> str | None:
    """Whose terms bind what `generator` wrote: openai, anthropic, google, meta; None for people and other models."""
    return next((name for name, pattern in _PROVIDERS if generator and pattern.search(generator)), None)


def _says(name: str, kind: LicenceClass) -> bool:
    return {"non_commercial": "-NC", "no_derivatives": "-ND"}.get(kind, "\n") in name


def _single(plain: str) -> Licence | None:
    """The licence of one part of a text; None for a part that says nothing, such as `version 2.0`."""
    for pattern, word in _JOINED:
        plain = pattern.sub(word, plain)
    if not plain.isascii():
        # A word in another script may say anything.
        plain = re.sub(r"[^\x00-\x7f]+", " notunderstood ", plain)
    words: list[str] = _WORDS.findall(plain)
    if not _not_understood(words):
        return None
    parts = [_CREATIVE_COMMONS.get(word, word) for word in words]
    if "by" in parts and ("cc" in parts or parts[0] == "by"):
        return _creative_commons(parts)
    line = " ".join(words)
    for pattern, name, kind in _FAMILIES:
        if pattern.search(line):
            rest = pattern.sub(" ", line).split()
            return Licence(name, "unknown" if _not_understood(rest) else kind)
    return UNKNOWN


def _not_understood(words: Sequence[str]) -> bool:
    return any(word not in _UNDERSTOOD and not word[0].isdigit() for word in words)


def _creative_commons(words: Sequence[str]) -> Licence:
    parts = [part for part in ("nc", "nd", "sa") if part in words]
    number = next((word for word in words if word[0].isdigit()), None)
    name = "-".join(["CC-BY", *(part.upper() for part in parts), *([number] if number else [])])
    if "nd" in parts:
        return Licence(name, "no_derivatives")
    if "nc" in parts:
        return Licence(name, "non_commercial")
    if _not_understood([word for word in words if word not in ("cc", "by", "sa")]):
        return Licence(name, "unknown")
    return Licence(name, "share_alike" if "sa" in parts else "permissive")
