"""Secrets and personal data in rows, replaced by their types: `<AWS_KEY>`, `<EMAIL>`. Values are never logged.

It runs before rows are compared with each other, so that two rows that differ in a key alone are duplicates. What is
found, and what is not, is said in `qlora_core.data.tags.personal_patterns` and `.secret_patterns`.
"""

import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qlora_core.config.curation import PolicyConfig
from qlora_core.data.row import Row, row_id
from qlora_core.data.row_store import RowView
from qlora_core.data.tags.cache import TagCache
from qlora_core.data.tags.findings import Finding, replaced, without_overlaps
from qlora_core.data.tags.personal_data import PACKAGES, PERSONAL_DATA_VERSION, Recogniser
from qlora_core.data.tags.run import tag_rows
from qlora_core.data.tags.tagger import Tagged, fingerprint_of, tagged
from qlora_core.digest import canonical_json

LABELS = ("category", "licence", "generator", "language")
# Raise it whenever a text that was left as it is would be redacted.
REDACTION_VERSION = 1


class Redactor:
    """Redacts rows one by one and counts what it replaced: in turns, a rejected answer, tools, labels and group keys.

    Group keys that differ in a replaced value alone become one key, so their rows stay on one side of the split.

    `counts` has the replaced values by type, `rows` the rows that changed. `policy.secrets` and `policy.personal_data`
    each act only where they say `redact`; with neither, every row comes back as it is. Raises ConfigError for an entry
    of `allow` that is no regular expression.
    """

    def __init__(self, policy: PolicyConfig, allow: Sequence[str]) -> None:
        self._secrets = policy.secrets == "redact"
        self._personal_data = policy.personal_data == "redact"
        self._settings = {
            "secrets": self._secrets,
            "personal_data": self._personal_data,
            "allow": sorted(set(allow)),
            "patterns": PERSONAL_DATA_VERSION,
            "versions": [version(package) for package in PACKAGES],
        }
        self._recogniser = Recogniser(allow, personal_data=self._personal_data, secrets=self._secrets)
        self._label_findings = functools.lru_cache(maxsize=4096)(self._findings)
        self.counts: Counter[str] = Counter()
        self.rows = 0

    @property
    def acts(self) -> bool:
        """Whether anything is replaced at all."""
        return self._secrets or self._personal_data

    def suspects(self, rows: RowView, cache: TagCache | None = None) -> np.ndarray:
        """The positions (int64, rising) of the rows in which something is to be replaced; `cache` has what texts held.

        All others come back from `redact` as they are.
        """
        if not self.acts:
            return np.empty(0, np.int64)
        clean = tag_rows(rows, [_TextTagger(self, self._settings)], cache).table.column("text_clean")
        found = ~clean.to_numpy()
        for name in LABELS:
            labels = rows.column(name).cast(pa.string())
            held = [label for label in labels.unique().drop_null().to_pylist() if self._label_findings(label)]
            found |= pc.call_function("is_in", [labels], pc.SetLookupOptions(pa.array(held, pa.string()))).to_numpy()
        keys = rows.column("group_keys")
        lengths = pc.call_function("list_value_length", [keys]).to_numpy()
        if lengths.any():
            flags = [bool(self._findings(key)) for key in pc.call_function("list_flatten", [keys]).to_pylist()]
            found[np.repeat(np.arange(len(rows)), lengths)[flags]] = True
        return np.flatnonzero(found)

    def is_clean(self, row: Row) -> bool:
        """Whether nothing is to be replaced in what the row's id covers: its turns, a rejected answer, its tools."""
        texts = [*(message.content for message in row.messages), row.rejected or ""]
        tools = [] if row.tools is None else _strings_of(json.loads(row.tools))
        return not any(self._findings(text) for text in (*texts, *tools))

    def redact(self, row: Row) -> Row:
        """The row without such values, under the id of its new text; the very same object where there are none."""
        if not self.acts:
            return row
        contents = [self._clean(message.content) for message in row.messages]
        changes = self._changed_fields(row)
        same = all(content is message.content for content, message in zip(contents, row.messages, strict=True))
        if same and not changes:
            return row
        self.rows += 1
        messages = tuple(
            message if content is message.content else dataclasses.replace(message, content=content)
            for content, message in zip(contents, row.messages, strict=True)
        )
        made = dataclasses.replace(row, messages=messages, **changes)
        return dataclasses.replace(made, id=row_id(made.messages, made.tools, made.rejected))

    def _changed_fields(self, row: Row) -> dict[str, Any]:
        """What changes beside the turns."""
        cleaned: dict[str, Any] = {name: self._clean_label(getattr(row, name)) for name in LABELS}
        cleaned["rejected"] = None if row.rejected is None else self._clean(row.rejected)
        cleaned["tools"] = None if row.tools is None else self._clean_tools(row.tools)
        keys = tuple(dict.fromkeys(self._clean(key) for key in row.group_keys))
        cleaned["group_keys"] = row.group_keys if keys == row.group_keys else keys
        return {name: value for name, value in cleaned.items() if value is not getattr(row, name)}

    def _clean_label(self, label: str | None) -> str | None:
        # The same few labels come again in every row.
        if label is None or not self._label_findings(label):
            return label
        return self._clean(label)

    def _clean(self, text: str) -> str:
        """The text without what is to go; the same object if nothing is."""
        # Again, until nothing is left: what touched a replaced value may have been taken for a part of it.
        while findings := self._findings(text):
            self.counts.update(finding.kind for finding in findings)
            text = replaced(text, findings)
        return text

    def _findings(self, text: str) -> list[Finding]:
        secrets, personal = self._recogniser.find(text)
        return without_overlaps([*secrets, *personal])

    def _clean_tools(self, tools: str) -> str:
        """Inside its strings, so that it stays JSON."""
        document = json.loads(tools)
        before = self.counts.total()
        cleaned = self._clean_values(document)
        return tools if self.counts.total() == before else canonical_json(cleaned).decode()

    def _clean_values(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._clean(value)
        if isinstance(value, list):
            return [self._clean_values(one) for one in value]
        if isinstance(value, dict):
            return self._clean_object(value)
        return value

    def _clean_object(self, value: dict[str, Any]) -> dict[str, Any]:
        cleaned: dict[str, Any] = {}
        for name, one in value.items():
            new = placeholder = self._clean(name)
            # Two names may have become one; a number keeps both values.
            number = 2
            while new in cleaned or (new != name and new in value):
                new, number = f"{placeholder} {number}", number + 1
            cleaned[new] = self._clean_values(one)
        return cleaned


class _TextTagger:
    """Column `text_clean`: whether a redactor of these settings leaves all that a row's id covers as it is."""

    name = "text_clean"
    cached = True
    schema = pa.schema([pa.field("text_clean", pa.bool_())])

    def __init__(self, redactor: Redactor, settings: dict[str, Any]) -> None:
        self._redactor = redactor
        self.fingerprint = fingerprint_of(self.name, REDACTION_VERSION, self.schema, settings)

    def tag(self, rows: Sequence[Row]) -> Tagged:
        """Look through the rows one by one."""
        return tagged(self.schema, [[self._redactor.is_clean(row) for row in rows]])


def _strings_of(value: Any) -> Iterator[str]:
    """Every text and every name in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for one in value:
            yield from _strings_of(one)
    elif isinstance(value, dict):
        for name, one in value.items():
            yield name
            yield from _strings_of(one)
