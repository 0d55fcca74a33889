"""`qlora quantize --quality`: the report beside the checkpoint, its path in the JSON, wrong use."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli.app import app

KEYS = {"parameters", "bits_per_parameter", "relative_l2", "seconds", "peak_rss_bytes", "quality"}


def quantize(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict]:
    result = CliRunner().invoke(app, ["quantize", *map(str, arguments), "--json"])
    return result.exit_code, json.loads(capfd.readouterr().out.splitlines()[-1])


def test_json_names_the_report_where_one_was_asked_for(
    tiny_base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, without = quantize(capfd, tiny_base, tmp_path / "without")
    assert (code, without.keys(), without["quality"]) == (0, KEYS, None)
    (tmp_path / "text.txt").write_text("The colour of the grass is green. " * 20)
    (tmp_path / "rows.jsonl").write_text('{"text": "The sky is blue."}\n')
    options = ("--quality", tmp_path / "text.txt", "--calibration", tmp_path / "rows.jsonl", "--type", "fp4")
    code, made = quantize(capfd, tiny_base, tmp_path / "out", *options)
    assert (code, made.keys()) == (0, KEYS)
    assert made["quality"] == str(tmp_path / "out" / "quality" / "quality.html")
    assert Path(made["quality"]).read_text().startswith("<!DOCTYPE html>")
    assert json.loads((tmp_path / "out" / "quality" / "quality.json").read_text())["calibration"]["rows"] == 1


def test_calibration_without_a_text_is_wrong_use(
    tiny_base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, said = quantize(capfd, tiny_base, tmp_path / "out", "--calibration", tmp_path / "rows.jsonl")
    assert (code, said["error"]["type"]) == (2, "ConfigError")
    assert "--quality TEXT" in said["error"]["message"]
    assert not (tmp_path / "out").exists()


def test_text_that_cannot_be_read_leaves_nothing_behind(
    tiny_base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, said = quantize(capfd, tiny_base, tmp_path / "out", "--quality", tmp_path / "missing.txt")
    assert (code, said["error"]["type"]) == (1, "DataError")
    assert list(tmp_path.iterdir()) == []
