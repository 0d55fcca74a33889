"""Secrets and personal data in rows, replaced by their types: `<AWS_KEY>`, `<EMAIL>`. Values are never logged.

It runs before rows are compared with each other, so that two rows that differ in a key alone are duplicates. What is
found, and what is not, is said in `qlora_core.data.tags.personal_patterns` and `.secret_patterns`.
"""

import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from qlora_core.config.curation import PolicyConfig
from qlora_core.data.row import Row, row_id
from qlora_core.data.tags.findings import Finding, replaced, without_overlaps
from qlora_core.data.tags.personal_data import Recogniser
from qlora_core.digest import canonical_json

LABELS = ("category", "licence", "generator", "language")


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
        self._recogniser = Recogniser(allow, personal_data=self._personal_data, secrets=self._secrets)
        self._label_findings = functools.lru_cache(maxsize=4096)(self._findings)
        self.counts: Counter[str] = Counter()
        self.rows = 0

    def redact(self, row: Row) -> Row:
        """The row without such values, under the id of its new text; the very same object where there are none."""
        if not (self._secrets or self._personal_data):
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
