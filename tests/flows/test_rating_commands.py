"""`qlora tournament` and `qlora agreement` from files of any origin."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli.app import app


def run(capfd: pytest.CaptureFixture[str], *arguments: object) -> dict:
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    (line,) = capfd.readouterr().out.splitlines()
    return json.loads(line)


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.mark.parametrize("method", ["elo", "bradley-terry"])
def test_tournament_rates_the_winner_higher_and_counts_the_unscored(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, method: str
) -> None:
    verdicts = ["a"] * 9 + ["b"] * 3 + ["tie", None]
    rows = [
        {
            "prompt_id": f"p{n}",
            "model_a": "new",
            "model_b": "old",
            "verdict": verdict,
            "first": "ab"[n % 2],
            "judge": "j",
        }
        for n, verdict in enumerate(verdicts)
    ]
    rated = run(capfd, "tournament", write(tmp_path / "v.jsonl", rows), "--method", method)
    assert {"ratings", "intervals", "matches", "unscored", "order_effect"} <= set(rated)
    assert rated["ratings"]["new"] > rated["ratings"]["old"]
    assert (rated["matches"], rated["unscored"]) == (13, 1)


def test_tournament_page_is_written_beside_the_ratings_with_texts_of_any_origin(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    named = {"model_a": "new", "model_b": "old", "judge": "j"}
    rows = [{**named, "prompt_id": f"p{n}", "verdict": "ab"[n % 3 == 0], "first": "ab"[n % 2]} for n in range(12)]
    pairs = [
        {**named, "prompt_id": f"p{n}", "prompt": f"question {n}", "answer_a": "<b>bold</b>", "answer_b": "plain",
         "category": "maths"}
        for n in range(12)
    ]  # fmt: skip
    page = tmp_path / "pages" / "page.html"
    verdicts = write(tmp_path / "v.jsonl", rows)
    rated = run(capfd, "tournament", verdicts, "--report", page, "--answers", write(tmp_path / "pairs.jsonl", pairs))
    assert rated["report"] == str(page)
    assert "played" not in rated
    html = page.read_text()
    assert "new leads 2 models" in html
    assert "question 3" in html  # old wins it against the ratings
    assert "&lt;b&gt;bold" in html and "<b>bold" not in html


def test_agreement_of_two_raters_is_cohens_kappa(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    # 2x2 table 20, 5, 10, 15: po = .7, pe = .5, so kappa = .4 (the worked example in Wikipedia's "Cohen's kappa").
    pairs = [("yes", "yes")] * 20 + [("yes", "no")] * 5 + [("no", "yes")] * 10 + [("no", "no")] * 15
    rows = [
        {"item_id": str(n), "rater_id": rater, "label": label}
        for n, pair in enumerate(pairs)
        for rater, label in zip("AB", pair, strict=True)
    ]
    measured = run(capfd, "agreement", write(tmp_path / "l.jsonl", rows))
    assert measured["raw"] == pytest.approx(0.7)
    assert measured["cohen_kappa"] == pytest.approx(0.4)
