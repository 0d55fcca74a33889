"""Which rows stay, by their tags. Knows no text: another threshold needs no tagger.

A tag that a row does not have (null: not measurable, or its tagger failed) never drops it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from qlora_core.config.curation import PolicyConfig, ScoreRange
from qlora_core.data.ledger import Dropped
from qlora_core.data.row import Row
from qlora_core.data.row_store import RowStore, RowView
from qlora_core.data.tags.language import UNDETERMINED, check_language_codes
from qlora_core.data.tags.licence import ALLOWED
from qlora_core.data.tags.table import TagTable
from qlora_core.errors import ConfigError

# Its functions are made at import, where no type checker sees them.
pc: Any = pyarrow.compute

# Rules by a yes-or-no tag, in their order: the setting of data.policy, the rule's name, the column.
_MARKS = (
    ("injection", "injection", "injection"),
    ("truncated", "truncated", "truncated"),
    ("repeated_turns", "repeated_turns", "repeated_turns"),
    ("refusals", "refusal", "refusal"),
    ("placeholders", "placeholder", "placeholder"),
    ("mojibake", "mojibake", "mojibake"),
)
# Where a tag comes from that may be switched off.
_SWITCHES = {
    "language": "data.tags.language", "has_personal_data": "data.tags.personal_data",
    "has_secrets": "data.tags.personal_data", "perplexity": "data.tags.model_scores", "ifd": "data.tags.model_scores",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Rule:
    """`drops` (bool, n rows) says which rows go, `scores` (float, n rows, NaN for none) what was compared."""

    name: str
    drops: np.ndarray
    scores: np.ndarray | None = None


def decide(rows: Sequence[Row], tags: TagTable, config: PolicyConfig) -> tuple[np.ndarray, list[Dropped]]:
    """The positions of the rows that stay (int64, ascending), and the others in order with the rule that drops them.

    Of several rules the first counts, in this order: language, licence, personal_data, secret, injection, truncated,
    repeated_turns, refusal, placeholder, mojibake, then `score:<tag>` by tag name. `Dropped.score` is the confidence of
    the language, how many values of personal data or secrets were found, the score; else None.

    Raises ConfigError for a rule whose tag is not there, and for a language code that nothing can have.
    """
    if len(rows) != tags.table.num_rows:
        raise ValueError(f"{len(rows)} rows, but tags of {tags.table.num_rows}; they must be aligned")
    gone = np.zeros(len(rows), dtype=bool)
    verdicts: dict[int, tuple[str, float | None]] = {}
    for rule in _rules(tags, config):
        for position in np.flatnonzero(rule.drops & ~gone).tolist():
            score = np.nan if rule.scores is None else float(rule.scores[position])
            verdicts[position] = (rule.name, None if np.isnan(score) else score)
        gone |= rule.drops
    return np.flatnonzero(~gone), list(_dropped(rows, np.flatnonzero(gone), verdicts))


def check_score_names(config: PolicyConfig, names: Sequence[str]) -> None:
    """Raises ConfigError if `data.policy.scores` names a tag that is not among `names`, the numeric ones there are."""
    for tag in config.scores:
        if tag not in names:
            switch = f" ({_SWITCHES[tag]} is off)" if tag in _SWITCHES else ""
            raise ConfigError(
                f"data.policy.scores: there is no numeric tag {tag!r}{switch}; there are {', '.join(sorted(names))}"
            )


def _rules(tags: TagTable, config: PolicyConfig) -> Iterator[_Rule]:
    check_score_names(config, tags.numeric_names)
    check_language_codes(config.languages, "data.policy.languages")
    if config.languages or config.undetermined_language == "drop":
        yield _language(tags, config)
    if config.licence != "any":
        allowed = pa.array(sorted(ALLOWED[config.licence]))
        classes = _column(tags, "licence_class", "licence")
        yield _Rule("licence", _is_true(pc.invert(pc.is_in(classes, value_set=allowed))))
    for setting, name in (("personal_data", "personal_data"), ("secrets", "secret")):
        if getattr(config, setting) == "drop":
            found = _is_true(_column(tags, f"has_{setting}", setting))
            yield _Rule(name, found, _value_counts(tags.table.column(setting)))
    for setting, name, column in _MARKS:
        if getattr(config, setting) == "drop":
            yield _Rule(name, _is_true(_column(tags, column, setting)))
    for tag in sorted(config.scores):
        yield _score(tags, tag, config.scores[tag])


def _language(tags: TagTable, config: PolicyConfig) -> _Rule:
    # A row whose language could not be measured is as undetermined as one whose language is und.
    found = pc.fill_null(_column(tags, "language", "languages"), UNDETERMINED)
    undetermined = pc.equal(found, UNDETERMINED)
    wanted = [code.lower() for code in config.languages]
    foreign = pc.invert(pc.is_in(found, value_set=pa.array(wanted, type=pa.string()))) if wanted else None
    drops = undetermined if config.undetermined_language == "drop" else pc.and_(undetermined, pa.scalar(False))
    if foreign is not None:
        drops = pc.or_(drops, pc.and_(foreign, pc.invert(undetermined)))
    return _Rule("language", _is_true(drops), _numbers(tags.table.column("language_confidence")))


def _score(tags: TagTable, tag: str, limits: ScoreRange) -> _Rule:
    values = _numbers(tags.table.column(tag))
    drops = np.zeros(len(values), dtype=bool)
    # NaN is neither below nor above anything.
    if limits.min is not None:
        drops |= values < limits.min
    if limits.max is not None:
        drops |= values > limits.max
    return _Rule(f"score:{tag}", drops, values)


def _column(tags: TagTable, name: str, setting: str) -> Any:
    if name not in tags.names:
        raise ConfigError(
            f"data.policy.{setting} needs the tag {name!r}, which was not measured; set "
            f"{_SWITCHES.get(name, 'data.tags')} to true, or data.policy.{setting} back to its default"
        )
    return tags.table.column(name)


def _is_true(values: Any) -> np.ndarray:
    return np.asarray(pc.fill_null(values, False).to_numpy(zero_copy_only=False), dtype=bool)


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    return np.asarray(column.cast(pa.float64()).to_numpy(zero_copy_only=False), dtype=np.float64)


def _value_counts(column: pa.ChunkedArray) -> np.ndarray:
    """How many values each row's list of (type, count) stands for; n rows."""
    lists = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], type=column.type)
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    parents = np.repeat(np.arange(len(lengths)), lengths)
    values = np.asarray(lists.flatten().field("count").to_numpy(zero_copy_only=False), dtype=np.float64)
    return np.bincount(parents, weights=values, minlength=len(lengths))


def _dropped(
    rows: Sequence[Row], positions: np.ndarray, verdicts: dict[int, tuple[str, float | None]]
) -> Iterator[Dropped]:
    chosen = rows.select(positions) if isinstance(rows, RowStore | RowView) else [rows[p] for p in positions.tolist()]
    for position, row in zip(positions.tolist(), chosen, strict=True):
        rule, score = verdicts[position]
        yield Dropped(row.id, row.source, row.line, rule, score=score)
