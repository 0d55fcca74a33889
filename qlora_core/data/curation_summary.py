"""What curation.json says: counts and figures, no text but the samples and the evidence. Measures nothing itself."""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qlora_core.config.data import DataConfig
from qlora_core.data.card import QUANTILES, summarise_lengths
from qlora_core.data.chat_template import ChatTokenizer
from qlora_core.data.curated import Curated
from qlora_core.data.ledger import Funnel
from qlora_core.data.split import SIDES
from qlora_core.data.tags.personal_data import Recogniser
from qlora_core.data.tags.table import TagTable
from qlora_core.data.token_files import WrittenSide, show_samples

SHOWN_HITS = 50
SHOWN_VALUES = 10
SHOWN_CLUSTERS = 10


def summarize(
    found: Curated,
    funnel: Funnel,
    written: Mapping[str, WrittenSide],
    packing: Mapping[str, Any] | None,
    chat: ChatTokenizer,
    config: DataConfig,
) -> dict[str, Any]:
    """The document; `card.py` says what each key holds."""
    sides = [written[side] for side in SIDES]
    lengths = np.array([length for side in sides for length in side.lengths], np.int64)
    tags = found.remaining.tags.take(np.concatenate([found.sides[side] for side in SIDES]))
    # Labels come from the data too, and may hold what belongs in no report.
    mask = Recogniser(config.tags.allow).masked
    return {
        "config": config.model_dump(mode="json", exclude={"sources", "chat_template"}),
        "rows": dict(funnel.rows),
        "splits": {side: len(written[side].lengths) for side in SIDES},
        "by_source": _by_source(found, funnel, sides),
        "reasons": dict(funnel.reasons),
        "quarantine_reasons": dict(funnel.quarantine_reasons),
        "tokens": {"trained": sum(sum(side.trained) for side in sides), "total": int(lengths.sum())},
        "lengths": summarise_lengths(lengths),
        "digest": _content_digest(written),
        "chat_template": {"origin": chat.origin, "stop_token": chat.stop_token, "bos_added": chat.bos_added},
        "max_tokens": found.limit,
        "languages": _counts(tags, "language"),
        "licences": {source: _named(counts, mask) for source, counts in _licences(sides).items()},
        "generators": _named(sum((side.generators for side in sides), Counter()), mask),
        "reason_tokens": _reason_tokens(found),
        "personal_data": _personal_data(found, tags, config),
        "near_duplicates": {
            "action": config.near_duplicates.action,
            "threshold": config.near_duplicates.threshold,
            **found.near.summary(),
        },
        "contamination": _contamination(found, config),
        "tags": {name: _described(tags.table.column(name), mask) for name in written["train"].tags},
        "groups": {
            "groups": found.placement.groups,
            "largest": [asdict(group) for group in found.placement.largest_groups],
        },
        "packing": packing,
        "selection": _selection(found, config),
        "samples": show_samples(chat, written["train"].samples, config),
    }


def _by_source(found: Curated, funnel: Funnel, sides: list[WrittenSide]) -> dict[str, dict[str, Any]]:
    tokens = sum((side.tokens_by_source for side in sides), Counter())
    reasons: dict[str, Counter[str]] = {}
    for drop in found.remaining.dropped:
        reasons.setdefault(drop.source, Counter())[drop.rule] += 1
    return {
        name: {**counts, "tokens": {"kept": tokens[name]}, "reasons": _ranked(reasons.get(name, Counter()))}
        for name, counts in funnel.by_source.items()
    }


def _content_digest(written: Mapping[str, WrittenSide]) -> str:
    """SHA-256 over the sides' digests in a fixed order: their rows' messages, train flags and categories."""
    digest = hashlib.sha256()
    for side in SIDES:
        digest.update(f"{side} {written[side].digest.hexdigest()}\n".encode())
    return digest.hexdigest()


def _licences(sides: list[WrittenSide]) -> dict[str, Counter[str]]:
    counts: dict[str, Counter[str]] = {}
    for side in sides:
        for source, found in side.licences.items():
            counts.setdefault(source, Counter()).update(found)
    return dict(sorted(counts.items()))


def _reason_tokens(found: Curated) -> dict[str, int]:
    """Tokens by rule, of the dropped rows whose length was why."""
    tokens = Counter[str]()
    for drop in found.remaining.dropped:
        tokens[drop.rule] += drop.tokens or 0
    return _ranked({rule: count for rule, count in tokens.items() if count})


def _personal_data(found: Curated, tags: TagTable, config: DataConfig) -> dict[str, Any] | None:
    """Values by type in the rows that stayed, and what was replaced in rows before; None where nobody looked."""
    actions = {"personal_data": config.policy.personal_data, "secrets": config.policy.secrets}
    if not config.tags.personal_data and "redact" not in actions.values():
        return None
    counts, rows = Counter[str](), 0
    if config.tags.personal_data:
        for name in actions:
            entries = tags.table.column(name).drop_null().to_pylist()
            rows += sum(bool(found_here) for found_here in entries)
            for found_here in entries:
                counts.update({one["type"]: one["count"] for one in found_here})
    redacted = {"rows": found.redactor.rows, "counts": _ranked(found.redactor.counts)}
    return {"actions": actions, "counts": _ranked(counts), "rows": rows, "redacted": redacted}


def _contamination(found: Curated, config: DataConfig) -> dict[str, Any]:
    hits = sorted(found.contamination.hits, key=lambda hit: (-hit.coverage, hit.item_id, hit.row_id))
    return {
        "action": config.decontaminate.action,
        "sets": [{"name": name, **asdict(counts)} for name, counts in found.contamination.sets.items()],
        "hits": [
            {
                "item": hit.item_id,
                "set": hit.set_name,
                "row": hit.row_id,
                "source": hit.source,
                "line": hit.line,
                "kind": hit.kind,
                "coverage": round(hit.coverage, 4),
                "item_span": list(hit.item_words),
                "row_span": list(hit.row_words),
                "text": hit.text,
                "dropped": hit.dropped,
            }
            for hit in hits[:SHOWN_HITS]
        ],
        "more_hits": max(0, len(hits) - SHOWN_HITS),
    }


def _described(column: pa.ChunkedArray, mask: Callable[[str], str]) -> dict[str, Any]:
    """How many rows lack the tag, and how many it flags, its quantiles, or its commonest values."""
    known: dict[str, Any] = {"missing": column.null_count}
    if pa.types.is_boolean(column.type):
        return {**known, "flagged": int(pc.call_function("sum", [column.cast(pa.int64())]).as_py() or 0)}
    values = column.drop_null()
    if pa.types.is_string(column.type):
        return {**known, "values": _named(dict(Counter(values.to_pylist()).most_common(SHOWN_VALUES)), mask)}
    numbers = values.cast(pa.float64()).to_numpy()
    quantiles = {name: float(np.quantile(numbers, share)) for name, share in QUANTILES.items() if len(numbers)}
    return {**known, "quantiles": {name: round(value, 6) for name, value in quantiles.items()}}


def _counts(tags: TagTable, name: str) -> dict[str, int]:
    if name not in tags.names:
        return {}
    return _ranked(Counter(tags.table.column(name).drop_null().to_pylist()))


def _selection(found: Curated, config: DataConfig) -> dict[str, Any] | None:
    selection = found.selection
    if selection is None:
        return None
    return {
        "budget_rows": config.selection.budget_rows,
        "train_on": config.selection.train_on,
        "quality": f"{config.selection.quality} ({config.selection.prefer} first)",
        "rows": len(selection.chosen),
        "tokens": selection.chosen_tokens,
        "control_rows": len(selection.control),
        "control_tokens": selection.control_tokens,
        "control_slack_tokens": selection.control_slack_tokens,
        "whole_pool": selection.whole_pool,
        "clusters": [asdict(cluster) for cluster in selection.clusters[:SHOWN_CLUSTERS]],
    }


def _named(counts: Mapping[str, int], mask: Callable[[str], str]) -> dict[str, int]:
    """The counts under names without secrets and personal data."""
    named = Counter[str]()
    for name, count in counts.items():
        named[mask(name)] += count
    return _ranked(named)


def _ranked(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
