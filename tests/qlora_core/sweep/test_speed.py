"""Speeds kept beside the sweeps, and what is reckoned where there are none; work predicted before a sweep."""

from pathlib import Path
from typing import Any

import pytest

from qlora_core.config.sweep import FinalistsConfig, PruningConfig, SweepConfig
from qlora_core.sweep import speed
from qlora_core.sweep.prediction import predicted_work
from qlora_core.sweep.rungs import TrialLength


def test_the_last_speed_of_a_base_is_kept_and_others_beside_it(tmp_path: Path) -> None:
    small, large = speed.speed_key(1000, "cpu"), speed.speed_key(8_000_000_000, "cuda")
    assert speed.known_speed(tmp_path, small) is None
    speed.note_speed(tmp_path, small, 10.0, 1000)
    speed.note_speed(tmp_path, large, 1.0, 4000)
    speed.note_speed(tmp_path, small, 30.0, 1000)
    assert speed.known_speed(tmp_path, small) == pytest.approx(0.03)
    assert speed.known_speed(tmp_path, large) == pytest.approx(0.00025)
    assert speed.known_speed(tmp_path, speed.speed_key(1000, "cuda")) is None


@pytest.mark.parametrize("text", ["", "[1]", "{"])
def test_a_file_that_is_no_record_is_as_none(tmp_path: Path, text: str) -> None:
    (tmp_path / speed.SPEEDS).write_text(text)
    assert speed.known_speed(tmp_path, "a") is None
    speed.note_speed(tmp_path, "a", 1.0, 2)
    assert speed.known_speed(tmp_path, "a") == 0.5


def test_a_sweep_without_tokens_says_nothing_of_speed(tmp_path: Path) -> None:
    speed.note_speed(tmp_path, "a", 0.0, 0)
    assert list(tmp_path.iterdir()) == []


def test_the_estimate_grows_with_the_base_and_names_its_assumption() -> None:
    seconds, basis = speed.estimated_speed(1_000_000_000, "cpu")
    assert seconds is not None and 1e-3 < seconds < 10, "a core does between 1 and 10,000 billion operations a second"
    assert "25%" in basis


def test_a_gpu_is_known_by_its_name_and_an_unknown_one_is_not_guessed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho $GPU\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setenv("GPU", "NVIDIA H100 80GB HBM3")
    # 4 x 8e9 / (0.3 x 989e12)
    assert speed.estimated_speed(8_000_000_000, "cuda")[0] == pytest.approx(1.0785e-4, rel=1e-3)
    monkeypatch.setenv("GPU", "NVIDIA A10")
    assert speed.estimated_speed(8_000_000_000, "cuda")[0] == pytest.approx(4 * 8e9 / (0.3 * 125e12))
    monkeypatch.setenv("GPU", "Abacus 1")
    seconds, basis = speed.estimated_speed(8_000_000_000, "cuda")
    assert seconds is None
    assert "Abacus 1" in basis


def test_predicted_work_counts_rungs_and_the_runs_of_finalists() -> None:
    # Of 4 trials of 16 steps, halved at 4 and 8: 4 x 4 + 2 x 4 + 1 x 8 = 32; two finalists, 2 more seeds each, a check.
    space: dict[str, Any] = {"learning_rate": [0.1, 0.2, 0.3, 0.4]}
    plain = SweepConfig(space=space)
    assert predicted_work(plain, TrialLength(16, 0, 10.0)) == (32.0, 320.0)
    finals = SweepConfig(space=space, finalists=FinalistsConfig(count=2, seeds=3))
    assert predicted_work(finals, TrialLength(16, 0, 10.0)) == (32.0 + 5 * 16, 1120.0)
    unpruned = SweepConfig(space=space, pruning=PruningConfig(enabled=False))
    assert predicted_work(unpruned, TrialLength(16, 0, 10.0))[0] == 64.0
