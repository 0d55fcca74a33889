"""The curation stage: dataset files in, a folder of split, tokenized and masked rows out, every row accounted for.

Tag first, decide by policy: every row is measured, then rows leave by rule. It knows the order of the steps, and
nothing of how one works.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from qlora_core.config.data import DataConfig
from qlora_core.data.card import make_card
from qlora_core.data.chat_template import ChatTokenizer, load_chat_tokenizer
from qlora_core.data.curated import Curated
from qlora_core.data.curation_summary import summarize
from qlora_core.data.decontamination.eval_sets import read_eval_sets
from qlora_core.data.decontamination.match import decontaminate
from qlora_core.data.deduplicate import drop_duplicates
from qlora_core.data.encodings import Encoder
from qlora_core.data.leak_gate import check_no_leaks
from qlora_core.data.ledger import Dropped, make_funnel
from qlora_core.data.loss_mask import encode_proven
from qlora_core.data.memory import arrow_on_system_memory, collecting_new_only
from qlora_core.data.near_duplicates.find import drop_near_duplicates
from qlora_core.data.packing import sequence_tokens
from qlora_core.data.placement import place_rows, read_earlier
from qlora_core.data.policy import check_score_names, decide
from qlora_core.data.proof_tags import check_proofs, is_over_long
from qlora_core.data.reading import SourceReading, check_quarantine, read_sources
from qlora_core.data.redaction import Redactor
from qlora_core.data.remaining import Remaining
from qlora_core.data.row import Row
from qlora_core.data.row_store import RowStore, RowView
from qlora_core.data.selection.choose import Selection, select_rows
from qlora_core.data.source_files import list_source_files
from qlora_core.data.split import SIDES, Side
from qlora_core.data.tables import write_dropped, write_quarantine
from qlora_core.data.tags.cache import TagCache
from qlora_core.data.tags.configured import configured_taggers
from qlora_core.data.tags.language import check_language_codes
from qlora_core.data.tags.proof import ProofTagger
from qlora_core.data.tags.run import tag_rows
from qlora_core.data.tags.tagger import Tagger
from qlora_core.data.token_files import write_packed, write_sides
from qlora_core.data.tokenizer_proof import check_tokenizer
from qlora_core.data.window import fit
from qlora_core.digest import canonical_json
from qlora_core.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

# The first rows may hold a clump of odd ones; a template that fails on half of them is wrong.
FIRST_ROWS = 256
BATCH_ROWS = 512
MAX_UNPROVEN_AT_FIRST = 0.5


@arrow_on_system_memory()
@collecting_new_only()
def curate(
    config: DataConfig,
    sources: Sequence[Path],
    tokenizer_folder: Path,
    max_positions: int,
    out: Path,
    chat_template: Path | None = None,
    *,
    prompt_sets: Sequence[Path] = (),
    earlier: Path | None = None,
    tag_cache: TagCache | None = None,
) -> dict[str, Any]:
    """Curate `sources` for the tokenizer in `tokenizer_folder` into the folder `out`; returns what curation.json says.

    `max_positions` is the model's longest input in tokens; the window is the smaller of it and `config.max_tokens`.
    `sources`, `chat_template`, `earlier` (a curated folder) and `prompt_sets` (items to keep out of the data) replace
    the config's own paths, resolved by the caller. With `data.tags.model_scores` the folder holds the base model too.
    The result depends on the rows, the tokenizer and the config, not on paths, times, the order of lines in a file, or
    on what `tag_cache` holds.

    Raises DataError for files and rows that cannot be used and for a split that ends up empty, MaskError for a chat
    template whose mask cannot be proven or a tokenizer that loses text, ModelError for an unusable tokenizer.
    """
    chat = load_chat_tokenizer(tokenizer_folder, chat_template)
    limit = min(config.max_tokens, max_positions)
    taggers = _taggers(config, chat, tokenizer_folder, max_positions)
    _check_settings(config, taggers, limit)
    earlier_ids = read_earlier(earlier) if earlier else None
    items = read_eval_sets(list_source_files(prompt_sets, setting="evaluate.prompt_sets")) if prompt_sets else []
    readings = read_sources(list_source_files(sources, announce=True), config.readers)
    check_quarantine(readings, config.max_quarantined_share)
    source_order = {reading.name: place for place, reading in enumerate(readings)}

    redactor = Redactor(config.policy, config.tags.allow)
    remaining = Remaining(RowStore.concatenate(reading.rows for reading in readings))
    # One holder of the texts, so that they can be let go of when they are written
    readings = [replace(reading, rows=RowStore()) for reading in readings]
    _redact(remaining, redactor, tag_cache)
    remaining.keep(*drop_duplicates(remaining.rows, source_order, earlier_ids, tag_cache))
    _check_not_empty(remaining, readings)
    _check_first_rows(chat, remaining.rows, taggers[0], tag_cache)
    remaining.in_order()
    remaining.tags = tag_rows(remaining.rows, taggers, tag_cache)
    _keep_provable(chat, remaining, limit, config)
    remaining.keep(*decide(remaining.rows, remaining.tags, config.policy))
    contamination = decontaminate(remaining.rows, items, config.decontaminate)
    remaining.keep(contamination.kept, contamination.dropped)
    # Rows that were cut keep the id of the whole text
    whole = remaining.numbers("tokens") <= limit
    near = drop_near_duplicates(
        remaining.rows, source_order, config.near_duplicates, None, earlier_ids, cache=tag_cache, by_content=whole
    )
    stay = np.sort(near.kept)
    remaining.keep(stay, near.dropped)
    placement = place_rows(remaining.rows, config.split, near.cluster_of[stay], earlier_ids)
    remaining.dropped += placement.dropped
    sides = {str(side): positions for side, positions in placement.sides.items()}
    selection = _select(remaining, sides, limit, config)

    found = Curated(readings, remaining, placement, sides, redactor, contamination, near, selection, limit)
    return _write(out, found, Encoder(chat, tokenizer_folder, tag_cache), config)


def _check_settings(config: DataConfig, taggers: Sequence[Tagger], limit: int) -> None:
    """What names a tag or a language is checked before anything is read. Raises ConfigError, DataError for packing."""
    numeric = [
        column.name
        for tagger in taggers
        for column in tagger.schema
        if pa.types.is_integer(column.type) or pa.types.is_floating(column.type)
    ]
    check_score_names(config.policy, numeric)
    check_language_codes(config.policy.languages, "data.policy.languages")
    if config.selection.budget_rows is not None and config.selection.quality not in numeric:
        raise ConfigError(
            f"data.selection.quality: there is no numeric tag {config.selection.quality!r}; there are "
            f"{', '.join(sorted(numeric))}"
        )
    if config.packing.enabled:
        sequence_tokens(config.packing.tokens, limit)


def _redact(remaining: Remaining, redactor: Redactor, cache: TagCache | None) -> None:
    """Replace the rows that hold what is to go; the others are not copied."""
    places = redactor.suspects(remaining.rows, cache)
    remaining.replace(places, map(redactor.redact, remaining.rows.select(places)))


def _check_not_empty(remaining: Remaining, readings: Sequence[SourceReading]) -> None:
    if not len(remaining.rows):
        funnel = make_funnel(readings, [], remaining.dropped)
        raise DataError(f"no row is left after curation.\n{funnel.table()}\nMend the quarantined rows, or add sources")


def _check_first_rows(chat: ChatTokenizer, rows: RowView, proof: Tagger, cache: TagCache | None) -> None:
    """A wrong template or tokenizer is told before a million rows are tagged."""
    check_tokenizer(chat, rows)
    first = rows[:FIRST_ROWS]
    proofs = tag_rows(first, [proof], cache).table
    check_proofs(chat, proofs, first, MAX_UNPROVEN_AT_FIRST, MAX_UNPROVEN_AT_FIRST)


def _taggers(config: DataConfig, chat: ChatTokenizer, folder: Path, max_positions: int) -> list[Tagger]:
    special_texts = chat.tokenizer.all_special_tokens
    taggers: list[Tagger] = [ProofTagger(chat, folder), *configured_taggers(config.tags, special_texts)]
    if config.tags.model_scores:
        from qlora_core.data.tags.model_scores import ModelScoresTagger
        from qlora_core.digest import digest_files
        from qlora_core.model.base import load_any

        files = {path.name: path for path in sorted(folder.iterdir()) if path.suffix in (".json", ".safetensors")}
        taggers.append(
            ModelScoresTagger(load_any(folder), chat, base_digest=digest_files(files), max_positions=max_positions)
        )
    return taggers


def _keep_provable(chat: ChatTokenizer, remaining: Remaining, limit: int, config: DataConfig) -> None:
    """Drop what the proof refuses and what is too long."""
    proofs = remaining.tags.table
    check_proofs(chat, proofs, remaining.rows)
    over_long = is_over_long(proofs, limit, config.over_long)
    rules = np.array(proofs.column("rule").to_pylist(), dtype=object)
    rules[over_long] = "over_long"
    gone = np.flatnonzero(rules != None)  # noqa: E711  compared element by element
    tokens = proofs.column("tokens").take(gone).to_pylist()
    dropped = [
        Dropped(row.id, row.source, row.line, rules[place], tokens=tokens[number])
        for number, (place, row) in enumerate(zip(gone.tolist(), remaining.rows.select(gone), strict=True))
    ]
    _log_refusals(proofs.column("detail").take(gone).to_pylist(), dropped)
    remaining.keep(np.flatnonzero(rules == None), dropped)  # noqa: E711
    long = np.flatnonzero(remaining.numbers("tokens") > limit)
    # What follows compares rows as they will be trained.
    remaining.replace(long, _cut_rows(chat, remaining.rows.select(long), limit))


def _cut_rows(chat: ChatTokenizer, rows: Sequence[Row], limit: int) -> Iterator[Row]:
    for start in range(0, len(rows), BATCH_ROWS):
        for masked in encode_proven(chat, rows[start : start + BATCH_ROWS]):
            fitted = fit(masked, limit, "cut")
            yield masked.row if fitted is None else fitted.row


def _log_refusals(details: Sequence[str | None], dropped: Sequence[Dropped]) -> None:
    for rule in sorted({drop.rule for drop in dropped} - {"over_long"}):
        of_rule = [number for number, drop in enumerate(dropped) if drop.rule == rule]
        first = dropped[of_rule[0]]
        logger.warning(
            "%d rows dropped by rule %s; the first: %s, line %d: %s",
            len(of_rule), rule, first.source, first.line, details[of_rule[0]],
        )  # fmt: skip


def _select(remaining: Remaining, sides: dict[str, np.ndarray], limit: int, config: DataConfig) -> Selection | None:
    """Replace the training side by the chosen rows, or the control; the other one becomes a side of its own."""
    if config.selection.budget_rows is None:
        return None
    train = sides["train"]
    selection = select_rows(
        remaining.rows.select(train),
        np.minimum(remaining.numbers("tokens")[train], limit).astype(np.int64),
        {name: remaining.numbers(name)[train] for name in remaining.tags.numeric_names},
        config.selection,
    )
    chosen, control = train[selection.chosen], train[selection.control]
    used, beside = (chosen, control) if config.selection.train_on == "chosen" else (control, chosen)
    sides["train"], sides["control"] = used, beside
    left_out = np.setdiff1d(train, used)
    remaining.dropped += [
        Dropped(row.id, row.source, row.line, "not_selected") for row in remaining.rows.select(left_out)
    ]
    return selection


def _write(out: Path, found: Curated, encoder: Encoder, config: DataConfig) -> dict[str, Any]:
    kept_sources = [row.source for side in SIDES for row in found.remaining.rows.select(found.sides[side])]
    funnel = make_funnel(found.readings, kept_sources, found.remaining.dropped)
    logger.info("curation funnel:\n%s", funnel.table())
    _check_sides(found.sides, funnel.table(), found.limit)
    out.mkdir(parents=True, exist_ok=True)
    written = write_sides(out, found.remaining, found.sides, encoder, found.limit, config)
    packing = write_packed(out, written["train"], found.limit, config.packing)
    write_dropped(out / "dropped.parquet", found.remaining.dropped)
    quarantined = [entry for reading in found.readings for entry in reading.quarantined]
    write_quarantine(out / "quarantine.parquet", quarantined)
    encoder.chat.tokenizer.save_pretrained(str(out / "tokenizer"))
    curation = summarize(found, funnel, written, packing, encoder.chat, config)
    # The gate reads the written rows anew; two copies of the texts would be the peak of the whole stage
    del written
    found.remaining.forget()
    check_no_leaks(out, lambda stored: _clusters(stored, found, config, encoder.cache))
    (out / "card.md").write_text(make_card(curation, config.model_dump(mode="json")), encoding="utf-8")
    (out / "curation.json").write_bytes(canonical_json(curation))
    return curation


def _clusters(stored: Sequence[Row], found: Curated, config: DataConfig, cache: TagCache | None) -> np.ndarray:
    """The near-duplicate clusters of the written rows, found anew; what is taken off them was learnt before."""
    places: dict[str, int] = {side: place for place, side in enumerate(SIDES)}
    settings = config.near_duplicates
    return drop_near_duplicates(stored, places, settings, found.near.preambles, cache=cache).cluster_of


def _check_sides(sides: dict[str, np.ndarray], funnel_table: str, limit: int) -> None:
    names: Sequence[Side] = SIDES
    empty = [side for side in names if not len(sides[side])]
    if len(empty) == len(names):
        raise DataError(
            f"no row is left after curation (window: {limit} tokens).\n{funnel_table}\n"
            "If rows are over_long, raise data.max_tokens or set data.over_long to cut; else add sources"
        )
    if empty:
        raise DataError(
            f"no row is left for {' and '.join(empty)}.\n{funnel_table}\n"
            "Add rows with other prompts (equal prompts stay on one side), change the shares in data.split, or draw "
            "another split with data.split.salt"
        )
