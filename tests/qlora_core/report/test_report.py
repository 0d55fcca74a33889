import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qlora_core.errors import EvaluationError
from qlora_core.report.report import write_report

SECTIONS = (
    "verdict", "summary", "evaluation", "slices", "disagreements", "answers", "curation", "sweep", "quantization",
    "lineage", "config",
)  # fmt: skip
ATTACK = "<script>alert('x')</script>"


class PageReader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.images: list[dict[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id" and value]
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "data") and value]
        if tag == "img":
            self.images.append(found)


def trial(number: int, rate: float, loss: float | None, state: str, error: str | None = None) -> dict[str, Any]:
    curve = [
        {"step": step, "loss": 3.0 / (1 + rate * step) + 0.1, "learning_rate": rate, "grad_norm": 0.2, "tokens": 90}
        for step in range(1, 120)
    ]
    return {
        "id": f"t{number:03d}",
        "params": {"learning_rate": rate, "lora_rank": 8 * (1 + number % 2), "epochs": 3.0},
        "state": state,
        "loss": loss,
        "steps": 119,
        "seconds": 12.5 + number,
        "error": error,
        "curve": curve if state != "failed" else [],
        "rungs": [{"step": 60, "loss": loss + 0.1}, {"step": 119, "loss": loss}] if loss else [],
    }


def lineage_of_three() -> dict[str, Any]:
    """Rows from outside, curated, trained on."""
    made = [("curate", "c" * 64), ("sweep", "5" * 64)]
    outside = {"id": "r" * 64, "kind": "external", "name": "sources/a.jsonl", "digest": "r" * 64}
    nodes = [{"id": key, "kind": "artifact", "stage": stage, "key": key, "digest": key} for stage, key in made]
    edges = [{"from": "r" * 64, "to": "c" * 64, "name": "sources/a.jsonl"},
             {"from": "c" * 64, "to": "5" * 64, "name": "curate"}]  # fmt: skip
    return {"nodes": [outside, *nodes], "edges": edges}


@pytest.fixture
def run(tmp_path: Path) -> dict[str, Any]:
    """Everything `write_report` takes, as small, believable figures; tests change what they are about."""
    curated, evaluated = tmp_path / "curated", tmp_path / "evaluated"
    curated.mkdir()
    evaluated.mkdir()
    rows = {"file": ["data/a.jsonl"], "line": [17], "reason": ["unknown role: 'narrator'"]}
    pq.write_table(pa.table(rows), curated / "quarantine.parquet")
    answers = [
        {
            "prompt_id": f"p{number}",
            "category": ("colour", "opposite", None)[number % 3],
            "question": f"What colour is thing {number}?",
            "reference": "red",
            "base": "The thing is a thing.",
            "adapter": "red" if number % 4 else "",
            "base_matches": False,
            "adapter_matches": bool(number % 4),
        }
        for number in range(24)
    ]
    write_answers(evaluated, answers)
    layers = [
        {"name": f"model.layers.{n}.{kind}", "shape": [64, 64], "relative_l2": 0.09 + n / 500, "max_error": 0.04}
        for n in range(4)
        for kind in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")
    ]
    return {
        "config": {"data": {"sources": ["data"]}, "base": {"model": "demo", "revision": None},
                   "registry": {"model_name": "assistant"}},
        "curation": {
            "rows": {"in": 120, "kept": 100, "dropped": 17, "quarantined": 3},
            "splits": {"train": 80, "validation": 10, "test": 10},
            "by_source": {"data/a.jsonl": {"in": 120, "kept": 100, "dropped": 17, "quarantined": 3,
                                           "format": "messages"}},
            "reasons": {"duplicate": 9, "leak": 5, "over_long": 3},
            "tokens": {"trained": 900, "total": 3000},
            "digest": "d" * 64,
            "chat_template": {"origin": "tokenizer", "stop_token": "<|end|>"},
            "max_tokens": 256,
            "samples": [{"id": "r1", "text_parts": [{"text": "<|user|> Colour?<|end|>", "trained": False},
                                                    {"text": " red<|end|>", "trained": True}]}],
        },
        "quantization": {"parameters": 500_000, "bits_per_parameter": 4.127, "relative_l2": 0.092, "layers": layers,
                         "kept": [], "type": "nf4", "blocksize": 64, "double_quant": True, "seconds": 1.0,
                         "peak_rss_bytes": 10**8},
        "sweep": {"method": "grid", "best": "t001", "trials": [
            trial(0, 0.001, 1.4, "complete"), trial(1, 0.01, 0.6, "complete"), trial(2, 0.003, 0.9, "pruned"),
            trial(3, 0.1, None, "failed", "loss is nan at step 3; lower learning_rate"),
        ]},
        "evaluation": {
            "metrics": {
                "heldout": {"rows": 274, "tokens": 1400, "base_loss": 6.1, "adapter_loss": 0.8, "gain": 5.3,
                            "gain_low": 5.1, "gain_high": 5.5, "confidence": 0.95},
                "exact_match": {"prompts": 24, "base": 0.0, "adapter": 0.75, "difference": 0.75, "low": 0.58,
                                "high": 0.92},
                "judge": {"kind": "offline", "model": "the quantized base", "certified": False, "win_rate": 0.81,
                          "low": 0.7, "high": 0.9, "scored": 46, "unscored": 2, "order_consistency": 0.93,
                          "cost_usd": 0.0, "warning": None},
            },
            "ratings": {}, "data_digest": "a" * 64, "quantized_base_digest": "b" * 64, "adapter_digest": None,
        },
        "decision": {"verdict": "PROMOTE", "reasons": ["The loss falls by 5.3 nats per token (5.1 to 5.5)."],
                     "champion": None, "comparison": None},
        "lineage": lineage_of_three(),
        "curated_folder": curated,
        "evaluation_folder": evaluated,
    }  # fmt: skip


def write_answers(folder: Path, answers: list[dict[str, Any]]) -> None:
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers), encoding="utf-8")


def page(tmp_path: Path, run: dict[str, Any]) -> str:
    write_report(tmp_path / "report.html", **run)
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def read(html: str) -> PageReader:
    reader = PageReader()
    reader.feed(html)
    return reader


def text_of(html: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL)).split())


PARTS = {
    "languages": {"en": 90, "de": 7, "und": 3},
    "lengths": {"rows": 100, "mean": 30.0, "quantiles": {"p50": 30},
                "histogram": [{"from": 10, "to": 29, "rows": 60}, {"from": 30, "to": 49, "rows": 40}]},
    "near_duplicates": {"action": "keep_one", "threshold": 0.8, "candidates": 5120, "verified": 31, "dropped": 27,
                        "largest": [{"size": 12, "id": "e" * 64, "source": "data/a.jsonl", "members": ["f" * 64],
                                     "text": "Name a colour."}]},
    "contamination": {
        "action": "drop",
        "sets": [{"name": "gsm8k", "items": 1319, "items_hit": 4, "rows_hit": 5, "rows_dropped": 2}],
        "hits": [{"item": "gsm8k/17", "set": "gsm8k", "row": "9" * 64, "source": "data/a.jsonl", "line": 405,
                  "kind": "ngram", "coverage": 0.76, "item_span": [3, 40], "row_span": [5, 42],
                  "text": "a farmer has nine hens", "dropped": True}],
    },
}  # fmt: skip


def test_report_holds_every_section_verdict_first(tmp_path: Path, run: dict[str, Any]) -> None:
    assert tuple(read(page(tmp_path, run)).ids) == SECTIONS


def test_report_loads_nothing_from_elsewhere(tmp_path: Path, run: dict[str, Any]) -> None:
    html = page(tmp_path, run)
    reader = read(html)
    assert reader.addresses
    assert all(address.startswith("data:image/svg+xml;base64,") for address in reader.addresses)
    assert not {"link", "script", "iframe", "object"} & set(reader.tags)
    assert "@import" not in html
    assert "url(" not in html


def test_every_figure_is_there_and_described(tmp_path: Path, run: dict[str, Any]) -> None:
    images = read(page(tmp_path, run)).images
    assert len(images) == 6
    assert all(len(image["alt"] or "") > 20 for image in images)


def test_report_shows_figures_with_their_intervals(tmp_path: Path, run: dict[str, Any]) -> None:
    text = text_of(page(tmp_path, run))
    assert "gain 5.300 (5.100 to 5.500) nats per token" in text
    assert "0% → 75%" in text
    assert "uncertified" in text
    assert "46" in text and "2" in text
    assert "loss is nan at step 3; lower learning_rate" in text
    assert "unknown role: 'narrator'" in text.replace("&#39;", "'")


def test_equal_inputs_give_equal_bytes(tmp_path: Path, run: dict[str, Any]) -> None:
    assert page(tmp_path, run) == page(tmp_path, run)


def test_digests_are_short_with_the_whole_in_the_title(tmp_path: Path, run: dict[str, Any]) -> None:
    html = page(tmp_path, run)
    assert f'title="{"a" * 64}">{"a" * 12}</code>' in html
    assert "not recorded" in text_of(html)


def test_text_from_data_is_escaped_everywhere(tmp_path: Path, run: dict[str, Any]) -> None:
    run["curation"]["samples"][0]["text_parts"][0]["text"] = ATTACK
    run["curation"]["by_source"][ATTACK] = run["curation"]["by_source"].pop("data/a.jsonl")
    run["config"]["base"]["model"] = ATTACK
    run["decision"]["reasons"] = [ATTACK]
    run["sweep"]["trials"][3]["error"] = ATTACK
    run["quantization"]["layers"][0]["name"] = ATTACK
    names = ("question", "base", "adapter", "reference", "category")
    write_answers(
        run["evaluation_folder"],
        [{"prompt_id": "p", "base_matches": False, "adapter_matches": True, **dict.fromkeys(names, ATTACK)}],
    )
    html = page(tmp_path, run)
    assert "<script" not in html
    assert html.count("&lt;script&gt;alert(") >= 11
    beside = (tmp_path / "disagreements.html").read_text(encoding="utf-8")
    assert "<script" not in beside
    assert "The judge against itself" in beside


@pytest.mark.parametrize("verdict", ["PROMOTE", "HOLD", "REJECT", "INVALID"])
def test_each_verdict_has_its_banner_and_sentence(tmp_path: Path, run: dict[str, Any], verdict: str) -> None:
    run["decision"]["verdict"] = verdict
    html = page(tmp_path, run)
    assert f'class="banner {verdict}"' in html
    assert f"<strong>{verdict}</strong>" in html


def test_the_sweep_is_shown_with_what_it_was_predicted_to_cost(tmp_path: Path, run: dict[str, Any]) -> None:
    assert 'id="sweep-cost"' not in page(tmp_path, run)
    spent = {"complete": {"trials": 2, "steps": 40, "tokens": 4000, "seconds": 30.0}}
    actual = {"steps": 40, "tokens": 4000, "busy_seconds": 36.0, "by_state": spent, "cost": 0.02}
    predicted = {"steps": 48, "tokens": 4800, "worker_seconds": 43.2, "cost": 0.03}
    run["sweep"]["cost"] = {"predicted": predicted, "actual": {**actual, "cost_per_promoted_adapter": 0.02}}
    html = page(tmp_path, run)
    table = text_of(html[html.index('id="sweep-cost"') : html.index("<h3>Loss curves</h3>")])
    for found in ("predicted", "48", "4,800", "43.2", "actual", "40", "36.0", "0.03", "0.02", "of it complete: 2"):
        assert found in table
    assert "charged to the one adapter that is kept" in table
    run["sweep"]["cost"]["actual"] |= {"cost": None, "cost_per_promoted_adapter": None}
    assert "compute.price_per_gpu_hour" in page(tmp_path, run)


def test_missing_pieces_are_said(tmp_path: Path, run: dict[str, Any]) -> None:
    run["evaluation"]["metrics"] |= {"judge": None, "exact_match": None}
    run["curation"]["samples"] = []
    run["quantization"]["layers"] = []
    run["sweep"]["trials"] = [trial(3, 0.1, None, "failed", "worker died") | {"params": {}}]
    run["sweep"]["best"] = None
    write_answers(run["evaluation_folder"], [])
    (run["curated_folder"] / "quarantine.parquet").unlink()
    html = page(tmp_path, run)
    text = text_of(html)
    for sentence in (
        "No judge compared answers",
        "Exact match was not measured",
        "No prompts were answered.",
        "No row was quarantined",
        "No sample rows were recorded.",
        "No trial recorded a loss curve.",
        "the sweep varied no setting",
        "No layer was quantized.",
        "There was no champion to compare with",
    ):
        assert sentence in text
    assert "None" not in text.replace("search", "")
    assert "nan" not in text


def test_judge_without_a_scored_pair_has_no_rate(tmp_path: Path, run: dict[str, Any]) -> None:
    run["evaluation"]["metrics"]["judge"] |= {
        "win_rate": None, "low": None, "high": None, "scored": 0, "unscored": 48, "order_consistency": None,
    }  # fmt: skip
    text = text_of(page(tmp_path, run))
    assert "No pair was scored in both orders" in text
    assert "48 unscored" in text


def test_champion_comparison_is_shown(tmp_path: Path, run: dict[str, Any]) -> None:
    run["decision"] |= {
        "champion": "4",
        "comparison": {
            "version": "4",
            "heldout": {"base_loss": 0.9, "adapter_loss": 0.8, "gain": 0.1, "gain_low": 0.05, "gain_high": 0.15},
            "exact_match": None,
        },
    }
    assert "a gain of 0.100 (0.050 to 0.150)" in text_of(page(tmp_path, run))
    run["decision"]["comparison"] = {"version": "4", "incomparable": "another base"}
    assert "Not comparable: another base." in text_of(page(tmp_path, run))


def test_missing_answers_file_names_it(tmp_path: Path, run: dict[str, Any]) -> None:
    (run["evaluation_folder"] / "answers.jsonl").unlink()
    with pytest.raises(EvaluationError, match=r"answers\.jsonl cannot be read .*evaluate again"):
        page(tmp_path, run)
    assert not (tmp_path / "report.html").exists()


def test_lineage_names_each_artifact_and_what_it_was_made_from(tmp_path: Path, run: dict[str, Any]) -> None:
    text = page(tmp_path, run)
    section = text[text.index('id="lineage"') : text.index('id="config"')]
    assert re.search(r"curate</td>.*?sources/a\.jsonl <code title=\"r{64}\">r{12}", section)
    assert re.search(r"sweep</td>.*?curate <code title=\"c{64}\">c{12}", section)


def curation_text(html: str) -> str:
    return text_of(html[html.index('<section id="curation">') : html.index('<section id="sweep">')])


def test_what_curation_found_is_shown_with_its_evidence(tmp_path: Path, run: dict[str, Any]) -> None:
    run["curation"] |= PARTS
    run["curation"]["by_source"]["data/a.jsonl"]["reasons"] = {"duplicate": 9, "leak": 5}

    html = page(tmp_path, run)
    text = curation_text(html)

    assert len(read(html).images) == 8
    assert "rule data/a.jsonl all duplicate 9 9 leak 5 5 over_long 0 3" in text
    assert "5,120 pairs compared, 31 verified by exact Jaccard similarity from 0.8, 27 rows dropped" in text
    assert "12 data/a.jsonl eeeeeeeeeeee Name a colour. ffffffffffff" in text
    assert "gsm8k 1,319 4 5 2" in text
    assert "gsm8k/17 999999999999 data/a.jsonl, line 405 ngram 76% 3–40 5–42 a farmer has nine hens" in text


def test_parts_of_curation_that_were_off_are_said_to_be(tmp_path: Path, run: dict[str, Any]) -> None:
    run["curation"]["near_duplicates"] = {"action": "none"}
    run["curation"]["contamination"] = None

    text = curation_text(page(tmp_path, run))

    for sentence in (
        "Languages were not measured.",
        "Lengths were not summed up.",
        "Near-duplicates were not looked for.",
        "compared with no evaluation set",
    ):
        assert sentence in text


def test_twenty_samples_are_there_with_their_trained_tokens_marked(tmp_path: Path, run: dict[str, Any]) -> None:
    sample = run["curation"]["samples"][0]
    run["curation"]["samples"] = [{**sample, "id": f"row {number}"} for number in range(20)]

    html = page(tmp_path, run)

    assert [f'title="row {number}"' in html for number in range(20)] == [True] * 20
    assert html.count("<mark> red&lt;|end|&gt;</mark>") == 20


def test_text_that_curation_found_is_escaped_and_drawn_as_it_stands(tmp_path: Path, run: dict[str, Any]) -> None:
    run["curation"] |= json.loads(json.dumps(PARTS).replace("Name a colour.", ATTACK).replace("a farmer", ATTACK))
    run["curation"]["languages"] = {"$x^{ATTACK": 3, "a\nb": 2}
    run["curation"]["reasons"][ATTACK] = 1

    html = page(tmp_path, run)

    assert "<script" not in html
    assert html.count("&lt;script&gt;alert(") >= 3


def test_cost_of_four_bits_is_shown_where_it_was_measured(tmp_path: Path, run: dict[str, Any]) -> None:
    assert "What it costs" not in page(tmp_path, run)
    difference = {"value": 0.4231, "low": 0.3131, "high": 0.5415}
    row = {"type": "nf4", "label": "NF4", "double_quant": True, "stored": True, "bits_per_parameter": 4.127,
           "relative_l2": 0.09, "zeroed": 0.09, "perplexity": 3.9713, "perplexity_difference": difference}  # fmt: skip
    quality = {
        "text": {"file": ATTACK, "tokens": 1804},
        "full_precision": {"perplexity": 3.5482},
        "quantized": {"perplexity": 3.9713, "perplexity_difference": difference},
        "formats": [row, {**row, "label": "Int4", "stored": False}],
    }
    html = page(tmp_path, {**run, "quality": quality})
    assert "perplexity goes from 3.5482 to 3.9713: +0.4231 (0.3131 to 0.5415)" in text_of(html)
    assert "NF4 (stored)" in text_of(html)
    assert "script" not in read(html).tags


def candidate(trial: str, gain: float, slices: dict[str, Any]) -> dict[str, Any]:
    heldout = {"adapter_loss": 6.1 - gain, "gain": gain, "gain_low": gain - 0.25, "gain_high": gain + 0.25}
    return {"trial": trial, "heldout": heldout, "exact_match": {"adapter": 0.625}, "slices": slices}


def test_candidates_stand_in_the_table_of_trials_and_by_slice(tmp_path: Path, run: dict[str, Any]) -> None:
    alone = {"rows": 1, "heldout": None, "exact_match": None}
    first = candidate("t001", 5.3, {"category": {ATTACK: alone}, "language": {}})
    part = {name: value for name, value in candidate("t000", 4.25, {}).items() if name in alone} | {"rows": 77}
    second = candidate("t000", 4.5, {"category": {ATTACK: part}, "language": {}})
    run["evaluation"]["candidates"] = [first, second]
    html = page(tmp_path, run)
    words = text_of(html)
    assert "t001 (best) " in words
    assert "0.8000 5.3000 (5.0500 to 5.5500) 62.5% 119" in words
    assert "1.6000 4.5000 (4.2500 to 4.7500) 62.5% 119" in words
    assert "2 candidates were scored on the same test rows" in words
    assert ATTACK not in html
    escaped = "category: &lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;"
    assert f"{escaped} t001 1 – – – {escaped} t000 77 1.8500 4.2500 (4.0000 to 4.5000) 62.5%" in words


def test_one_candidate_is_the_adapter_of_the_whole_page(tmp_path: Path, run: dict[str, Any]) -> None:
    without = page(tmp_path, run)
    run["evaluation"]["candidates"] = [candidate("t001", 5.3, {"category": {}, "language": {}})]
    assert page(tmp_path, run) == without


def test_a_difference_of_two_shares_is_in_points(tmp_path: Path, run: dict[str, Any]) -> None:
    text = text_of(page(tmp_path, run))
    assert "difference +58 to +92 points, 24 prompts" in text
    assert "+75.0 points +58.0 to +92.0 points" in text


def test_promote_says_what_was_true_before_registration(tmp_path: Path, run: dict[str, Any]) -> None:
    text = text_of(page(tmp_path, run))
    assert "The gate lets it become champion; `qlora history` says whether and when it did." in text
    assert "may become" not in text


def test_an_empty_answer_among_the_worst_is_said_to_be_empty(tmp_path: Path, run: dict[str, Any]) -> None:
    said = {"loss": 2.5, "question": "Colour?", "reference": "red"}
    examples = [{**said, "answer": " \n"}, {**said, "answer": "green"}]
    run |= {"findings": ([], ["colour got worse"]), "diagnosis": {"slices": [
        {"by": "category", "value": "colour", "examples": examples}]}}  # fmt: skip
    weak = page(tmp_path, run).split('id="weak-slices"')[1].split("</section>")[0]
    assert weak.count("<em>(empty)</em>") == 1
    assert text_of(weak).count("Adapter (empty)") == 1 and "Adapter green" in text_of(weak)
