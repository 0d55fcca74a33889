"""Keys, tokens and passwords in a text, by the shapes their makers gave them. Values are never kept or logged.

Each pattern has literals without which it cannot match: a text without any of them costs a few substring searches. A
password written as prose ("my password is hunter two") is not seen.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qlora_core.data.tags.findings import Finding

# Real secrets are drawn at random: 16 random characters of base 62 have about 3.7 bits each, words and templates
# ("your_api_key_here1") about 3 or less over the same length.
_MIN_BITS = 3.0

_PRIVATE_KEY = (
    r"-----BEGIN (?:[A-Z0-9]{1,16} ){0,3}PRIVATE KEY(?: BLOCK)?-----"
    r"[\sA-Za-z0-9+/=:,.\\\-]{0,20000}?(?:-----END (?:[A-Z0-9]{1,16} ){0,3}PRIVATE KEY(?: BLOCK)?-----|\Z)"
)
_PRIVATE_KEY_HEAD = r"-----BEGIN (?:[A-Z0-9]{1,16} ){0,3}PRIVATE KEY(?: BLOCK)?-----[\sA-Za-z0-9+/=]{0,20000}"
_ASSIGNMENT = (
    r"(?i)(?<![a-z0-9])(?:password|passwd|pwd|secret|token|api[_-]?key|access[_-]?key|secret[_-]?key)"
    r"[\"'`]?[ \t]{0,4}(?:=>|:=|[:=])[ \t]{0,4}[\"'`]?(?P<value>[^\s\"'`<>,;(){}\[\]]{8,128})(?![^\s\"'`<>,;)}\]])"
)


@dataclass(frozen=True, slots=True)
class _Shape:
    kind: str
    literals: tuple[str, ...]
    pattern: re.Pattern[str]
    random: bool = False


def _shape(kind: str, literals: Sequence[str], pattern: str, *, random: bool = False) -> _Shape:
    return _Shape(kind, tuple(literals), re.compile(pattern), random)


# By a character that stands in every match.
_SHAPES: dict[str, tuple[_Shape, ...]] = {
    "-": (
        _shape("PRIVATE_KEY", ["-----BEGIN"], f"{_PRIVATE_KEY}|{_PRIVATE_KEY_HEAD}"),
        _shape("GITLAB_TOKEN", ["glpat-"], r"glpat-[A-Za-z0-9_-]{20,64}", random=True),
        _shape("SLACK_TOKEN", ["xox"], r"(?<![A-Za-z0-9])xox[abeoprs]-[A-Za-z0-9-]{10,255}", random=True),
        _shape("API_KEY", ["sk-"], r"(?<![A-Za-z0-9])sk-[A-Za-z0-9_-]{16,255}", random=True),
    ),
    "_": (
        _shape(
            "GITHUB_TOKEN",
            ["ghp_", "gho_", "ghu_", "ghs_", "ghr_"],
            r"(?<![A-Za-z0-9])gh[oprsu]_[A-Za-z0-9]{36,255}",
        ),
        _shape("GITHUB_TOKEN", ["github_pat_"], r"github_pat_[A-Za-z0-9_]{22,255}"),
        _shape("API_KEY", ["k_live_"], r"(?<![A-Za-z0-9])[sr]k_live_[A-Za-z0-9]{16,255}", random=True),
        _shape("API_KEY", ["hf_"], r"(?<![A-Za-z0-9_])hf_[A-Za-z]{34}(?![A-Za-z0-9])"),
        _shape("API_KEY", ["npm_"], r"(?<![A-Za-z0-9_])npm_[A-Za-z0-9]{36}(?![A-Za-z0-9])"),
    ),
    "A": (
        _shape("AWS_KEY", ["AKIA", "ASIA"], r"(?<![A-Za-z0-9])(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])"),
        _shape("API_KEY", ["AIza"], r"(?<![A-Za-z0-9])AIza[A-Za-z0-9_-]{35}(?![A-Za-z0-9])"),
    ),
    "J": (_shape("JWT", ["eyJ"], r"(?<![A-Za-z0-9])eyJ[\w-]{8,4096}\.eyJ[\w-]{8,4096}\.[\w-]{8,4096}"),),
    "@": (_shape("PASSWORD", ["://"], r"://[^\s/:@]{1,64}:(?P<value>[^\s/@:]{6,128})@[\w\[]", random=True),),
}
_ASSIGNED = _shape(
    "PASSWORD",
    ["password", "passwd", "pwd", "secret", "token", "api_key", "api-key", "apikey", "access_key", "access-key"],
    _ASSIGNMENT,
    random=True,
)


def find_secrets(text: str) -> Iterator[Finding]:
    """Keys, tokens and passwords in `text`: the value alone, without the name it is assigned to; may overlap."""
    for sign, shapes in _SHAPES.items():
        if sign in text:
            for shape in shapes:
                if any(literal in text for literal in shape.literals):
                    yield from _matches(shape, text)
    # Without = or : nothing is assigned.
    if "=" in text or ":" in text:
        folded = text.lower()
        if any(literal in folded for literal in _ASSIGNED.literals):
            yield from _matches(_ASSIGNED, text)


def bits_per_character(text: str) -> float:
    """Shannon's entropy of the text's own characters, -sum p log2 p; 0 for an empty text."""
    return -sum(n / len(text) * math.log2(n / len(text)) for n in Counter(text).values())


def _matches(shape: _Shape, text: str) -> Iterator[Finding]:
    for match in shape.pattern.finditer(text):
        group = "value" if "value" in shape.pattern.groupindex else 0
        if _is_example(match[group]) or (shape.random and not _looks_random(match[group])):
            continue
        yield Finding(match.start(group), match.end(group), shape.kind)


def _looks_random(value: str) -> bool:
    """Letters and digits mixed, and as varied as chance makes them."""
    mixed = any(c.isdigit() for c in value) and any(c.isalpha() for c in value)
    return mixed and bits_per_character(value) >= min(_MIN_BITS, math.log2(len(value)) - 0.5)


def _is_example(value: str) -> bool:
    """A value that says itself that it is none, as in makers' own manuals."""
    folded = value.casefold()
    return "example" in folded or "your" in folded or "xxxx" in folded or "placeholder" in folded
