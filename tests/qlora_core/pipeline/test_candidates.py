"""Where the evaluate stage finds the adapters of a sweep's candidates."""

import json
from pathlib import Path

import pytest

from qlora_core.pipeline.stages import exported_candidates


@pytest.mark.parametrize(
    ("trials", "folders"),
    [(["t003"], ["adapter"]), (["t003", "t000", "t001"], ["adapter", "adapters/t000", "adapters/t001"])],
)
def test_the_best_is_the_adapter_and_the_others_follow_in_order(
    tmp_path: Path, trials: list[str], folders: list[str]
) -> None:
    (tmp_path / "sweep.json").write_text(json.dumps({"best": trials[0], "candidates": trials}))
    found = exported_candidates(tmp_path)
    assert found == [(trial, tmp_path / folder) for trial, folder in zip(trials, folders, strict=True)]
