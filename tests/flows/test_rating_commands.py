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
