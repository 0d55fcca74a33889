"""The curation stage: dataset files in, a folder of split, tokenized and masked rows out, every row accounted for."""

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_core.config.data import DataConfig
from qlora_core.data.card import make_card
from qlora_core.data.chat_template import ChatTokenizer, load_chat_tokenizer
from qlora_core.data.deduplicate import drop_duplicates
from qlora_core.data.leak_gate import check_no_leaks
from qlora_core.data.ledger import Dropped, Funnel, make_funnel
from qlora_core.data.loss_mask import MAX_UNPROVEN_SHARE, MaskedRow, Refusal, check_template, mask_rows, text_parts
from qlora_core.data.reading import SourceReading, check_quarantine, read_sources
from qlora_core.data.row import Row
from qlora_core.data.source_files import list_source_files
from qlora_core.data.split import SIDES, Side, find_leaks, side_of
from qlora_core.data.tables import write_dropped, write_quarantine, write_rows
from qlora_core.data.window import fit
from qlora_core.digest import canonical_json
from qlora_core.errors import DataError
from qlora_core.progress import progress_bar

logger = logging.getLogger(__name__)

BATCH_ROWS = 256
SAMPLE_ROWS = 8
# The first batch may hold a clump of odd rows; a template that fails on half of it is wrong.
MAX_UNPROVEN_AT_FIRST = 0.5

Splits = Mapping[Side, Sequence[MaskedRow]]


def curate(
    config: DataConfig,
    sources: Sequence[Path],
    tokenizer_folder: Path,
    max_positions: int,
    out: Path,
    chat_template: Path | None = None,
) -> dict[str, Any]:
    """Curate `sources` for the tokenizer in `tokenizer_folder` into the folder `out`; returns what curation.json says.

    `max_positions` is the model's longest input in tokens; the window is the smaller of it and `config.max_tokens`.
    `sources` and `chat_template` replace the config's own paths, resolved by the caller. The result depends on the
    rows, the tokenizer and the config, not on paths, times or the order of lines in a file.

    Raises DataError for files and rows that cannot be used and for a split that ends up empty, MaskError for a chat
    template whose mask cannot be proven, ModelError for an unusable tokenizer.
    """
    readings = read_sources(list_source_files(sources, announce=True))
    check_quarantine(readings, config.max_quarantined_share)
    rows = [row for reading in readings for row in reading.rows]
    unique, duplicates = drop_duplicates(rows, {reading.name: place for place, reading in enumerate(readings)})
    _check_not_empty(unique, readings, duplicates)
    chat = load_chat_tokenizer(tokenizer_folder, chat_template)
    limit = min(config.max_tokens, max_positions)
    masked, unusable = _tokenize(chat, unique, limit, config)
    splits, leaks = _split(masked, config)
    dropped = [*duplicates, *unusable, *leaks]
    funnel = make_funnel(readings, [row.row.source for side in SIDES for row in splits[side]], dropped)
    logger.info("curation funnel:\n%s", funnel.table())
    _check_sides(splits, funnel, limit)
    curation = _summary(funnel, splits, chat, limit)
    _write(out, splits, dropped, readings, chat)
    check_no_leaks(out)
    card = make_card(curation, _licences(splits), config.model_dump())
    (out / "card.md").write_text(card, encoding="utf-8")
    (out / "curation.json").write_bytes(canonical_json(curation))
    return curation


def _tokenize(
    chat: ChatTokenizer, rows: Sequence[Row], limit: int, config: DataConfig
) -> tuple[list[MaskedRow], list[Dropped]]:
    kept: list[MaskedRow] = []
    dropped: list[Dropped] = []
    refusals: list[Refusal] = []
    with progress_bar("Tokenizing", len(rows)) as advance:
        for start in range(0, len(rows), BATCH_ROWS):
            batch = rows[start : start + BATCH_ROWS]
            for outcome in mask_rows(chat, batch):
                if isinstance(outcome, Refusal):
                    refusals.append(outcome)
                elif (fitted := fit(outcome, limit, config.over_long)) is not None:
                    kept.append(fitted)
                else:
                    dropped.append(_drop(outcome.row, "over_long", tokens=len(outcome.input_ids)))
            if start == 0:
                check_template(chat, len(batch), refusals, MAX_UNPROVEN_AT_FIRST)
            advance(len(batch))
    check_template(chat, len(rows), refusals, MAX_UNPROVEN_SHARE)
    _log_refusals(refusals)
    return kept, dropped + [_drop(refusal.row, refusal.rule) for refusal in refusals]


def _split(rows: Sequence[MaskedRow], config: DataConfig) -> tuple[dict[Side, list[MaskedRow]], list[Dropped]]:
    """The sides, ordered by id and free of leaks, and the rows left out for it."""
    sides: dict[Side, list[MaskedRow]] = {side: [] for side in SIDES}
    for masked in sorted(rows, key=lambda masked: masked.row.id):
        sides[side_of(masked.row.group_key, config.split)].append(masked)
    train, validation, test = ([masked.row for masked in sides[side]] for side in SIDES)
    leaks = find_leaks(train, validation, test)
    leaking = {row.id for row, _ in leaks}
    clean: dict[Side, list[MaskedRow]] = {
        side: [masked for masked in sides[side] if masked.row.id not in leaking] for side in SIDES
    }
    return clean, [_drop(row, "leak", matched_id=match) for row, match in leaks]


def _drop(row: Row, rule: str, *, matched_id: str | None = None, tokens: int | None = None) -> Dropped:
    return Dropped(row.id, row.source, row.line, rule, matched_id, tokens)


def _check_not_empty(rows: Sequence[Row], readings: Sequence[SourceReading], dropped: Sequence[Dropped]) -> None:
    if not rows:
        funnel = make_funnel(readings, [], dropped)
        raise DataError(f"no row is left after curation.\n{funnel.table()}\nMend the quarantined rows, or add sources")


def _check_sides(splits: Splits, funnel: Funnel, limit: int) -> None:
    if not funnel.rows["kept"]:
        raise DataError(
            f"no row is left after curation (window: {limit} tokens).\n{funnel.table()}\n"
            "If rows are over_long, raise data.max_tokens or set data.over_long to cut; else add sources"
        )
    empty = [side for side in SIDES if not splits[side]]
    if empty:
        raise DataError(
            f"no row is left for {' and '.join(empty)}.\n{funnel.table()}\n"
            "Add rows with other prompts (equal prompts stay on one side), change the shares in data.split, or draw "
            "another split with data.split.salt"
        )


def _summary(funnel: Funnel, splits: Splits, chat: ChatTokenizer, limit: int) -> dict[str, Any]:
    rows = [masked for side in SIDES for masked in splits[side]]
    return {
        "rows": dict(funnel.rows),
        "splits": {side: len(splits[side]) for side in SIDES},
        "by_source": {name: dict(counts) for name, counts in funnel.by_source.items()},
        "reasons": dict(funnel.reasons),
        "quarantine_reasons": dict(funnel.quarantine_reasons),
        "tokens": {
            "trained": sum(sum(masked.loss_mask) for masked in rows),
            "total": sum(len(masked.input_ids) for masked in rows),
        },
        "digest": _content_digest(splits),
        "chat_template": {"origin": chat.origin, "stop_token": chat.stop_token, "bos_added": chat.bos_added},
        "max_tokens": limit,
        "samples": [_sample(chat, masked) for masked in splits["train"][:SAMPLE_ROWS]],
    }


def _content_digest(splits: Splits) -> str:
    """SHA-256 over the kept rows in a fixed order: their sides, messages, train flags and categories."""
    digest = hashlib.sha256()
    for side in SIDES:
        for masked in splits[side]:
            row = masked.row
            messages = [[message.role, message.content, message.train] for message in row.messages]
            digest.update(canonical_json([side, row.id, row.category, messages]) + b"\n")
    return digest.hexdigest()


def _sample(chat: ChatTokenizer, masked: MaskedRow) -> dict[str, Any]:
    parts = text_parts(chat, masked.input_ids, masked.loss_mask)
    return {"id": masked.row.id, "text_parts": [{"text": text, "trained": trained} for text, trained in parts]}


def _write(
    out: Path, splits: Splits, dropped: Sequence[Dropped], readings: Sequence[SourceReading], chat: ChatTokenizer
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for side in SIDES:
        write_rows(out / f"{side}.parquet", splits[side])
    write_dropped(out / "dropped.parquet", dropped)
    write_quarantine(out / "quarantine.parquet", [entry for reading in readings for entry in reading.quarantined])
    chat.tokenizer.save_pretrained(str(out / "tokenizer"))


def _licences(splits: Splits) -> dict[str, dict[str, int]]:
    counts: dict[str, Counter[str]] = {}
    for side in SIDES:
        for masked in splits[side]:
            counts.setdefault(masked.row.source, Counter())[masked.row.licence or "not stated"] += 1
    return {source: dict(sorted(found.items())) for source, found in sorted(counts.items())}


def _log_refusals(refusals: Sequence[Refusal]) -> None:
    for rule, count in sorted(Counter(refusal.rule for refusal in refusals).items()):
        first = next(refusal for refusal in refusals if refusal.rule == rule)
        logger.warning(
            "%d rows dropped by rule %s; the first: %s, line %d: %s",
            count, rule, first.row.source, first.row.line, first.detail,
        )  # fmt: skip
