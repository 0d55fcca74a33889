"""The dataset card: what a reader must know about a curated set, counted and not claimed; YAML head and Markdown.

It is written from `curation.json` alone, whose keys are (those marked * are always there, the others null or absent
where the part was off, and the card says so):

- rows*: {in, kept, dropped, quarantined}; splits*: {train, validation, test}, in rows
- by_source*: {source: {in, kept, dropped, quarantined, format, trimmed, rule?, rule_counts?, reasons?: {rule: rows},
  tokens?: {kept}}}
- reasons*: {rule: dropped rows}; quarantine_reasons*: {kind: records}; reason_tokens: {rule: tokens of those measured}
- tokens*: {total, trained} of the kept rows; max_tokens*: the window; digest*: the content digest
- chat_template*: {origin, stop_token, bos_added}; samples*: [{id, text_parts: [{text, trained}]}]
- licences: {source: {licence or "not stated": rows}}; generators, languages: {name: rows}; all of kept rows
- lengths: what `summarise_lengths` gives, of the kept rows in tokens
- personal_data: {counts: {type: matches}, rows, actions: {personal_data, secrets}}
- near_duplicates: {action, threshold, candidates, verified, dropped, largest: [{size, id, source, members: [id],
  text?}]}
- contamination: {action, sets: [{name, items, items_hit, rows_hit, rows_dropped}], hits: [{item, set, row, source,
  line, kind, coverage, item_span, row_span, text, dropped}]}: the first hits, spans in words
- tags: {name: {missing, flagged}}, {name: {missing, quantiles: {p50: value}}} or {name: {missing, values: {value:
  rows}}}; config*: the `data` section without its paths
- groups: {groups, largest}, of rows that must share a side
- packing: what `packing_summary` gives; selection: {budget_rows, rows, tokens, control_rows, control_tokens, quality}
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import yaml

QUANTILES = {"min": 0.0, "p10": 0.1, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p90": 0.9, "p99": 0.99, "max": 1.0}
HISTOGRAM_BINS = 24
SIZES = ((1e3, "n<1K"), (1e4, "1K<n<10K"), (1e5, "10K<n<100K"), (1e6, "100K<n<1M"), (1e7, "1M<n<10M"))
COUNTS = ("in", "kept", "dropped", "quarantined")
NOT_STATED = "not stated"


def summarise_lengths(tokens: np.ndarray) -> dict[str, Any]:
    """Rows, quantiles (an actual length each, no interpolation), mean and a histogram of lengths in tokens.

    `tokens` is int (rows,). Bins are equally wide, whole numbers, both ends included: {from, to, rows}. No rows give
    zero rows and nothing else.
    """
    if not len(tokens):
        return {"rows": 0, "mean": None, "quantiles": {}, "histogram": []}
    ordered = np.sort(tokens)
    quantiles = np.quantile(ordered, list(QUANTILES.values()), method="inverted_cdf")
    low, high = int(ordered[0]), int(ordered[-1])
    width = -(-(high - low + 1) // HISTOGRAM_BINS)
    starts = np.arange(low, high + 1, width)
    counts = np.diff(np.searchsorted(ordered, np.append(starts, high + 1)))
    return {
        "rows": len(ordered),
        "mean": round(float(ordered.mean()), 1),
        "quantiles": {name: int(value) for name, value in zip(QUANTILES, quantiles, strict=True)},
        "histogram": [
            {"from": int(start), "to": int(start + width - 1), "rows": int(count)}
            for start, count in zip(starts, counts, strict=True)
        ],
    }


def make_card(curation: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """The card's text, from `curation.json` and the config's `data` section. Equal inputs give equal texts."""
    sections = (
        _head,
        _summary,
        _sources,
        _left_out,
        _languages_and_lengths,
        _personal_data,
        _near_duplicates,
        _contamination,
        _split,
        _tokens_and_mask,
        _selection_and_packing,
        _tags,
        _gaps,
    )
    return "\n".join(line for section in sections for line in section(curation, config)) + "\n"


def _head(curation: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """The YAML that dataset hubs read."""
    stated = {name for counts in (curation.get("licences") or {}).values() for name in counts}
    languages = [code for code in curation.get("languages") or {} if len(code) == 2]
    kept = curation["rows"]["kept"]
    only = next(iter(stated)).lower().replace(" ", "-") if len(stated) == 1 and NOT_STATED not in stated else "other"
    head: dict[str, Any] = {
        "pretty_name": "Curated instruction data",
        "license": only if stated - {NOT_STATED} else "unknown",
        "task_categories": ["text-generation"],
        "tags": ["instruction-tuning", "conversational", "curated"],
        "size_categories": [next((name for limit, name in SIZES if kept < limit), "n>10M")],
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": side, "path": f"{side}-*.parquet"} for side in curation["splits"]],
            }
        ],
    }
    if languages:
        head["language"] = languages
    return ["---", yaml.safe_dump(head, sort_keys=True, allow_unicode=True).rstrip(), "---", ""]


def _summary(curation: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    rows, splits = curation["rows"], curation["splits"]
    sides = ", ".join(f"{side} {count}" for side, count in splits.items())
    return [
        "# Curated instruction data",
        "",
        f"{rows['kept']} conversations ({sides}) of {rows['in']} read. Content digest: `{curation['digest']}`.",
        "",
    ]


def _sources(curation: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    licences = curation.get("licences") or {}
    rows = [
        [name, counts["format"], *(counts[part] for part in COUNTS), _counted(licences.get(name))]
        for name, counts in curation["by_source"].items()
    ]
    rows.append(["all", "", *(curation["rows"][part] for part in COUNTS), ""])
    lines = ["## Sources", "", *_table(["source", "format", *COUNTS, "licences of kept rows"], rows, numbers=COUNTS)]
    for name, counts in curation["by_source"].items():
        if counts.get("rule"):
            lines.append(f"- {_cell(name)}: {_cell(counts['rule'])}; {_counted(counts.get('rule_counts'))}")
        if counts.get("trimmed"):
            lines.append(f"- {_cell(name)}: in {counts['trimmed']} rows the turns after the last answer were trimmed")
    generators = curation.get("generators")
    made = f"Who wrote the answers, by rows: {_counted(generators)}." if generators else "No row says who wrote it."
    return [*lines, "", made, ""]


def _left_out(curation: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    tokens = curation.get("reason_tokens") or {}
    rows = [[f"dropped: {rule}", count, tokens.get(rule, "-")] for rule, count in curation["reasons"].items()]
    rows += [[f"quarantined: {kind}", count, "-"] for kind, count in curation["quarantine_reasons"].items()]
    lines = ["## Left out", "", *_table(["why", "rows", "tokens"], rows, numbers=("rows", "tokens")), ""]
    by_source = [
        [name, rule, count]
        for name, counts in curation["by_source"].items()
        for rule, count in (counts.get("reasons") or {}).items()
    ]
    if by_source:
        lines += [*_table(["source", "rule", "rows"], by_source, numbers=("rows",)), ""]
    return [*lines, "Every one of them is in `dropped.parquet` or `quarantine.parquet`.", ""]


def _languages_and_lengths(curation: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    languages, lengths = curation.get("languages"), curation.get("lengths")
    lines = ["## Languages and lengths", ""]
    lines.append(
        f"Measured language, by kept rows (und: could not be told): {_counted(languages)}."
        if languages
        else "Languages were not measured."
    )
    if lengths and lengths["rows"]:
        names = list(lengths["quantiles"])
        values = [[lengths["quantiles"][name] for name in names] + [lengths["mean"]]]
        lines += ["", "Length of a kept row in tokens, after the template:", ""]
        lines += _table([*names, "mean"], values, numbers=[*names, "mean"])
    else:
        lines.append("Lengths were not summed up.")
    return [*lines, ""]


def _personal_data(curation: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    found = curation.get("personal_data")
    lines = ["## Personal data and secrets", ""]
    if not found:
        return [*lines, "They were not looked for.", ""]
    actions = _counted(found.get("actions"))
    if found["counts"]:
        rows = [[name, count] for name, count in found["counts"].items()]
        lines += _table(["type", "matches"], rows, numbers=("matches",))
        lines.append("")
    else:
        lines.append("No match.")
    return [
        *lines,
        f"In {found.get('rows', 0)} rows. Policy: {actions}. Found by patterns: names, places and whatever has no "
        "fixed form are not covered, and a year may pass for a phone number.",
        "",
    ]


def _near_duplicates(curation: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    found = curation.get("near_duplicates")
    lines = ["## Near-duplicates", ""]
    if not found or found.get("action") == "none":
        return [*lines, "They were not looked for.", ""]
    lines.append(
        f"Exact Jaccard similarity of word shingles from {found['threshold']:g}, action {found['action']}: "
        f"{found['candidates']} pairs compared, {found['verified']} verified, {found['dropped']} rows dropped."
    )
    if found["largest"]:
        rows = [[cluster["size"], cluster["id"], cluster["source"]] for cluster in found["largest"]]
        lines += ["", "The largest clusters:", "", *_table(["rows", "best row", "source"], rows, numbers=("rows",))]
    return [*lines, ""]


def _contamination(curation: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    found = curation.get("contamination")
    lines = ["## Overlap with evaluation sets", ""]
    if not found or not found["sets"]:
        return [*lines, "Compared with no set: `evaluate.prompt_sets` names none.", ""]
    names = ("name", "items", "items_hit", "rows_hit", "rows_dropped")
    lines += _table(names, [[one[name] for name in names] for one in found["sets"]], numbers=names[1:])
    return [
        *lines,
        "",
        "Translations and paraphrases are not seen. `curation.json` holds the first hits with their spans.",
        "",
    ]


def _split(curation: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    split, groups = config["split"], curation.get("groups")
    lines = [
        "## Split",
        "",
        *_table(["side", "rows"], [[side, count] for side, count in curation["splits"].items()], numbers=("rows",)),
        "",
        f"Side: stable hash of a row's group, salt `{split['salt']}`; held out: {split['validation']} for validation, "
        f"{split['test']} for test. The written files were read back and no side shares a conversation, prompt or "
        "group with another.",
    ]
    if groups:
        lines.append(f"Groups that must share a side: {_counted(groups)}.")
    return [*lines, ""]


def _tokens_and_mask(curation: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    tokens, template = curation["tokens"], curation["chat_template"]
    bos = "; its BOS was added, the template wrote none" if template.get("bos_added") else ""
    return [
        "## Tokens and loss mask",
        "",
        f"{tokens['total']} tokens, {tokens['trained']} of them trained. Window: {curation['max_tokens']} tokens; "
        f"longer rows: {config['over_long']}.",
        f"Chat template: {template['origin']}; stop token `{template['stop_token']}`{bos}.",
        "Proven on every row: its trained tokens decode to its trained answers with their stop tokens and to nothing "
        "else, the prompt's tokens open the row's, there is one BOS where the tokenizer wants one, and no character is "
        "lost.",
        "",
    ]


def _selection_and_packing(curation: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    selection, packing = curation.get("selection"), curation.get("packing")
    lines = ["## Selection and packing", ""]
    lines.append(f"Selection: {_counted(selection)}." if selection else "No selection: all kept rows are there.")
    if packing:
        lines.append(
            f"Packing: {packing['rows']} training rows in {packing['sequences']} sequences of "
            f"{packing['sequence_tokens']} tokens, {packing['fill']:.1%} full ({packing['fill_unpacked']:.1%} with one "
            f"row each); {packing['trained_share']:.1%} of the tokens are trained."
        )
    else:
        lines.append("Rows were not packed.")
    return [*lines, ""]


def _tags(curation: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    tags = curation.get("tags")
    if not tags:
        return ["## Tags", "", "Nothing was measured on the rows.", ""]
    rows = []
    for name, found in tags.items():
        known = found.get("quantiles") or found.get("values")
        said = f"flagged {found['flagged']}" if "flagged" in found else _counted(known)
        rows.append([name, said, found.get("missing", 0)])
    header = ["tag", "rows flagged, quantiles, or values", "rows without it"]
    return ["## Tags", "", *_table(header, rows, numbers=header[-1:]), ""]


def _gaps(curation: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    unseen = {
        "languages": "languages",
        "personal_data": "personal data and secrets",
        "near_duplicates": "near-duplicates",
        "contamination": "overlap with evaluation sets",
    }
    off = [name for key, name in unseen.items() if not curation.get(key) or curation[key].get("action") == "none"]
    licences = curation.get("licences")
    missing = sum(counts.get(NOT_STATED, 0) for counts in (licences or {}).values())
    unstated = "they were not counted" if licences is None else f"{missing} kept rows state none"
    lines = ["## Known gaps", "", f"- Not looked at: {', '.join([*off, 'whether answers are true'])}."]
    lines.append(f"- Licences are as the rows state them; {unstated}.")
    lines.append("- Names of people and places are not looked for; toxicity only where a plug-in scores it.")
    return lines


def _table(header: Sequence[str], rows: Sequence[Sequence[object]], numbers: Sequence[str] = ()) -> list[str]:
    if not rows:
        return ["Nothing."]
    rule = "|".join("---:" if name in numbers else "---" for name in header)
    body = [f"| {' | '.join(_cell(value) for value in row)} |" for row in rows]
    return [f"| {' | '.join(header)} |", f"|{rule}|", *body]


def _counted(counts: Mapping[str, Any] | None) -> str:
    """`name value, name value`, nested parts left out."""
    pairs = [(name, value) for name, value in (counts or {}).items() if not isinstance(value, (list, dict))]
    return ", ".join(f"{_cell(name)} {_cell(value)}" for name, value in pairs) or "-"


def _cell(value: object) -> str:
    """Text from data, harmless within Markdown: one line, no cell border, no HTML."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    for mark, safe in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("`", "'")):
        text = text.replace(mark, safe)
    return " ".join(text.split())
