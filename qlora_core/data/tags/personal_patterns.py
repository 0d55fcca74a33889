"""E-mail addresses, phone, card, account, social security numbers and IP addresses in a text, by presidio's patterns.

Presidio's recognisers are called one by one, without its engine, so that there is no language model and no network.
They take milliseconds a row and find years, decimals and version numbers as well; so a cheap look for candidates comes
first, each candidate must show some sign of being what it seems, and only its neighbourhood goes to presidio, which is
not even loaded where nothing is a candidate. Names and postal addresses need a language model and are not found.
"""

import functools
import ipaddress
import re
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from qlora_core.data.tags.findings import Finding

# What presidio may look at on both sides of a candidate.
_MARGIN = 24
_CONTEXT = 40
_MIN_SCORE = 0.3
_LONGEST_LOCAL_PART = 64

_LOCAL_PART = string.ascii_letters + string.digits + "._%+'!#$&*/=?^`{|}~-"
_DOMAIN = re.compile(r"@[\w-]{1,63}(?:\.[\w-]{1,63}){1,8}")
# RFC 2606 and 6761: names that belong to nobody.
_NOBODYS_DOMAIN = re.compile(r"[@.](?:example(?:\.(?:com|org|net|edu))?|test|invalid|localhost|local)$", re.I)
# Each pattern opens with a set of characters, and looks back only then: so the text is skimmed for that set.
_DIGITS = re.compile(r"[+(0-9](?<![\w.,/+-].)(?:[ ()./:–-]{0,2}[0-9]){6,24}(?!\w)")
_PHONE_SHAPE = re.compile(
    r"\+[\d ()./-]+|\(\d{2,5}\)[ .-]?\d[\d .-]+|\(?\d{3}\)?[-. ]\d{3}[-. ]\d{4}|0\d{2,4}[ /-]\d{5,8}"
)
_PHONE_WORDS = re.compile(
    r"\b(?:phone|telephone|tel|mobile|cell|call|dial|fax|whatsapp|sms|text me|telefon|handy|téléphone|móvil)\b", re.I
)
_DATES = re.compile(r"\d{1,4}[./-]\d{1,2}[./-]\d{1,4}|(?:1\d|20)\d\d ?[–-] ?(?:1\d|20)\d\d")
_CARD_SHAPE = re.compile(r"\d(?:[ -]?\d){12,18}")
_SSN_SHAPE = re.compile(r"\d{3}-\d{2}-\d{4}")
_IPV4 = re.compile(r"[0-9](?<![\w.-].)[0-9]{0,2}(?:\.[0-9]{1,3}){3}(?![\w-]|\.\d)")
_IPV6 = re.compile(r"[0-9A-Fa-f](?<![\w:.].)[0-9A-Fa-f]{0,3}(?::{1,2}[0-9A-Fa-f]{1,4}){3,7}(?![\w:])")
_IBAN = re.compile(r"[A-Z](?<![A-Z0-9].)[A-Z][0-9]{2}(?:[ -]?[A-Z0-9]{4}){2,7}(?:[ -]?[A-Z0-9]{1,3})?(?![A-Z0-9])")
# Public name servers: in a text they are instructions, nobody's address.
_KNOWN_SERVERS = frozenset(
    {"8.8.8.8", "8.8.4.4", "1.1.1.1", "1.0.0.1", "9.9.9.9", "149.112.112.112", "208.67.222.222", "208.67.220.220"}
)


@dataclass(frozen=True, slots=True)
class _Candidate:
    start: int
    end: int
    kind: str


def find_personal_data(text: str) -> Iterator[Finding]:
    """What presidio confirms of the candidates in `text`, by type, the surest types first; may overlap."""
    for candidate in _candidates(text):
        recogniser = _recognisers()[candidate.kind]
        low, high = max(0, candidate.start - _MARGIN), candidate.end + _MARGIN
        for found in recogniser.analyze(text[low:high], recogniser.supported_entities):
            start, end = low + found.start, low + found.end
            if found.score >= _MIN_SCORE and start < candidate.end and end > candidate.start:
                yield Finding(max(start, candidate.start), min(end, candidate.end), candidate.kind)


def _candidates(text: str) -> Iterator[_Candidate]:
    if "@" in text:
        yield from _emails(text)
    if not _has_digit(text):
        return
    for kind, pattern, sign, is_sound in _SHAPES:
        if text.count(sign) < _MIN_SIGNS:
            continue
        for match in pattern.finditer(text):
            if is_sound(match[0]):
                yield _Candidate(match.start(), match.end(), kind)
    for match in _IBAN.finditer(text):
        yield _Candidate(match.start(), match.end(), "IBAN")
    for match in _DIGITS.finditer(text):
        kind = _kind_of_digits(match[0], text[max(0, match.start() - _CONTEXT) : match.start()])
        if kind is not None:
            yield _Candidate(match.start(), match.end(), kind)


_has_digit = re.compile(r"[0-9]").search


def _emails(text: str) -> Iterator[_Candidate]:
    at = text.find("@")
    while at >= 0:
        # From each @ outwards, so that a long text without blanks costs no more than its length.
        domain = _DOMAIN.match(text, at)
        if domain is not None and not _NOBODYS_DOMAIN.search(domain[0]):
            before = text[max(0, at - _LONGEST_LOCAL_PART) : at]
            length = len(before) - len(before.rstrip(_LOCAL_PART))
            if length:
                yield _Candidate(at - length, domain.end(), "EMAIL")
        at = text.find("@", at + 1)


def _kind_of_digits(digits: str, before: str) -> str | None:
    """What a run of digits with separators may be; None for dates, years, decimals and bare numbers."""
    if _SSN_SHAPE.fullmatch(digits):
        return "US_SSN"
    if _CARD_SHAPE.fullmatch(digits):
        return "CREDIT_CARD"
    if _DATES.fullmatch(digits) or ":" in digits:
        return None
    return "PHONE" if _PHONE_SHAPE.fullmatch(digits) or _PHONE_WORDS.search(before) else None


def _is_somebodys_ip(text: str) -> bool:
    """Whether an address may lead to a person: public, no known server, and no version or section number."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    if address.version == 4 and all(int(part) < 20 for part in text.split(".")):
        return False
    return address.is_global and text not in _KNOWN_SERVERS


# By the sign that stands in each three times or more.
_MIN_SIGNS = 3
_SHAPES: tuple[tuple[str, re.Pattern[str], str, Callable[[str], bool]], ...] = (
    ("IP_ADDRESS", _IPV4, ".", _is_somebodys_ip),
    ("IP_ADDRESS", _IPV6, ":", _is_somebodys_ip),
)


@functools.cache
def _recognisers() -> dict[str, Any]:
    """Presidio's own recognisers, by our types; made once a process. Importing presidio takes seconds."""
    from presidio_analyzer.predefined_recognizers import (
        CreditCardRecognizer,
        EmailRecognizer,
        IbanRecognizer,
        IpRecognizer,
        PhoneRecognizer,
        UsSsnRecognizer,
    )
    from tldextract import TLDExtract

    # The list of suffixes that comes with it; as given, tldextract fetches the newest from the network.
    suffixes = TLDExtract(suffix_list_urls=(), cache_dir=None)

    class OfflineEmailRecognizer(EmailRecognizer):
        def validate_result(self, pattern_text: str) -> bool:
            return suffixes(pattern_text).fqdn != ""

    return {
        "EMAIL": OfflineEmailRecognizer(),
        "IBAN": IbanRecognizer(),
        "CREDIT_CARD": CreditCardRecognizer(),
        "US_SSN": UsSsnRecognizer(),
        "PHONE": PhoneRecognizer(),
        "IP_ADDRESS": IpRecognizer(),
    }
