"""The dataset card: what a reader must know about a curated set, in Markdown. It is counted, not claimed."""

from collections.abc import Mapping
from typing import Any


def make_card(curation: Mapping[str, Any], licences: Mapping[str, Mapping[str, int]], config: Mapping[str, Any]) -> str:
    """The card's text. `licences` counts rows by stated licence ('not stated' included) for each source."""
    return "\n".join(
        [
            "# Curated instruction data",
            "",
            f"Content digest: `{curation['digest']}`",
            "",
            *_sources(curation, licences),
            *_left_out(curation),
            *_split_and_tokens(curation, config),
            *_rules(curation, config),
        ]
    )


def _sources(curation: Mapping[str, Any], licences: Mapping[str, Mapping[str, int]]) -> list[str]:
    lines = [
        "## Sources",
        "",
        "| source | format | in | kept | dropped | quarantined | licences of kept rows |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    for name, counts in curation["by_source"].items():
        stated = ", ".join(f"{licence} {n}" for licence, n in licences.get(name, {}).items()) or "-"
        numbers = " | ".join(str(counts[part]) for part in ("in", "kept", "dropped", "quarantined"))
        lines.append(f"| {name} | {counts['format']} | {numbers} | {stated} |")
    totals = " | ".join(str(curation["rows"][part]) for part in ("in", "kept", "dropped", "quarantined"))
    lines += [f"| all | | {totals} | |", ""]
    for name, counts in curation["by_source"].items():
        if counts.get("rule"):
            lines.append(f"- {name}: {counts['rule']}")
        if counts["trimmed"]:
            lines.append(f"- {name}: in {counts['trimmed']} rows the turns after the last answer were trimmed")
    return [*lines, ""]


def _left_out(curation: Mapping[str, Any]) -> list[str]:
    lines = ["## Left out", "", "| why | rows |", "|---|---:|"]
    lines += [f"| dropped: {rule} | {count} |" for rule, count in curation["reasons"].items()]
    lines += [f"| quarantined: {kind} | {count} |" for kind, count in curation["quarantine_reasons"].items()]
    return [*lines, "", "Every one of them is in `dropped.parquet` or `quarantine.parquet`.", ""]


def _split_and_tokens(curation: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    splits, tokens, template = curation["splits"], curation["tokens"], curation["chat_template"]
    return [
        "## Split and tokens",
        "",
        f"train {splits['train']}, validation {splits['validation']}, test {splits['test']} rows; "
        f"{tokens['total']} tokens, {tokens['trained']} of them trained.",
        f"Side: hash of the opening prompt, salt `{config['split']['salt']}`, held out: "
        f"{config['split']['validation']} for validation, {config['split']['test']} for test.",
        f"Chat template: {template['origin']}; stop token `{template['stop_token']}`. Window: {curation['max_tokens']} "
        f"tokens; longer rows: {config['over_long']}.",
        "",
    ]


def _rules(curation: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    return [
        "## Rules",
        "",
        "- Only assistant turns (weight 1) and their stop tokens are trained; each row's mask is proven on its tokens.",
        "- duplicate: the same conversation, spacing aside. Equal prompts with other answers are kept, on one side.",
        "- leak: a prompt equal to a held-out user turn, case, spacing and punctuation aside; the training row goes.",
        "- over_long: longer than the window"
        + (", and no answer begins within it." if config["over_long"] == "cut" else "."),
        "- special_token_text: a turn holds the text of a special token. not_round_trip: the tokenizer loses text.",
        "",
        "## Known gaps",
        "",
        "Near-duplicates, personal data, language, toxicity and overlap with public benchmarks were not looked at. "
        "Licences are as the rows state them.",
        "",
    ]
