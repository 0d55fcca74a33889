"""Personal data and secrets of a row: how many of which type. The values themselves are never kept."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version

import pyarrow as pa

from qlora_core.data.row import Row
from qlora_core.data.tags.findings import Finding, replaced, without_overlaps
from qlora_core.data.tags.personal_patterns import find_personal_data
from qlora_core.data.tags.secret_patterns import find_secrets
from qlora_core.data.tags.tagger import Tagged, fingerprint_of, tagged, texts_of
from qlora_core.errors import ConfigError

_COUNTS = pa.list_(pa.struct([("type", pa.string()), ("count", pa.int32())]))
SCHEMA = pa.schema(
    [
        ("personal_data", _COUNTS),
        ("secrets", _COUNTS),
        ("has_personal_data", pa.bool_()),
        ("has_secrets", pa.bool_()),
    ]
)
PERSONAL_DATA_VERSION = 1
PACKAGES = ("presidio-analyzer", "phonenumbers", "tldextract")


class Recogniser:
    """Finds personal data and secrets in texts, offline, by pattern.

    `allow` are regular expressions: a value that one of them fits in full is neither. Raises ConfigError for one that
    is no regular expression.
    """

    def __init__(self, allow: Sequence[str] = (), *, personal_data: bool = True, secrets: bool = True) -> None:
        self._personal_data = personal_data
        self._secrets = secrets
        self._allow = [_compiled(pattern) for pattern in allow]

    def find(self, text: str) -> tuple[list[Finding], list[Finding]]:
        """Secrets, then personal data, each in order of place; none overlaps another, and a secret wins."""
        secrets = without_overlaps(self._not_allowed(text, find_secrets(text))) if self._secrets else []
        if not self._personal_data:
            return secrets, []
        personal = list(self._not_allowed(text, find_personal_data(text)))
        if not personal:
            return secrets, []
        # What lies within a secret is part of it, even where only personal data is asked for next time.
        taken = set(secrets)
        return secrets, [finding for finding in without_overlaps([*secrets, *personal]) if finding not in taken]

    def masked(self, text: str) -> str:
        """The text with the type of every finding in its place; the same object where there is none."""
        secrets, personal = self.find(text)
        return replaced(text, sorted([*secrets, *personal], key=lambda one: one.start)) if secrets or personal else text

    def _not_allowed(self, text: str, findings: Iterable[Finding]) -> list[Finding]:
        return [
            finding
            for finding in findings
            if not any(pattern.fullmatch(text, finding.start, finding.end) for pattern in self._allow)
        ]


class PersonalDataTagger:
    """Columns `personal_data` and `secrets` (list of type and count, by type), `has_personal_data`, `has_secrets`."""

    name = "personal_data"
    cached = True
    schema = SCHEMA

    def __init__(self, allow: Sequence[str] = ()) -> None:
        self._recogniser = Recogniser(allow)
        versions = [version(package) for package in PACKAGES]
        self.fingerprint = fingerprint_of(
            self.name, PERSONAL_DATA_VERSION, SCHEMA, {"allow": sorted(set(allow)), "versions": versions}
        )

    def tag(self, rows: Sequence[Row]) -> Tagged:
        """Counts over all texts of each row."""
        personal, secrets = [], []
        for row in rows:
            row_personal: Counter[str] = Counter()
            row_secrets: Counter[str] = Counter()
            for text in texts_of(row):
                found_secrets, found_personal = self._recogniser.find(text)
                row_secrets.update(finding.kind for finding in found_secrets)
                row_personal.update(finding.kind for finding in found_personal)
            personal.append(_counts(row_personal))
            secrets.append(_counts(row_secrets))
        return tagged(SCHEMA, [personal, secrets, [bool(one) for one in personal], [bool(one) for one in secrets]])


def _counts(found: Mapping[str, int]) -> list[dict[str, str | int]]:
    return [{"type": kind, "count": found[kind]} for kind in sorted(found)]


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"data.tags.allow: {pattern!r} is no regular expression: {error}") from error
