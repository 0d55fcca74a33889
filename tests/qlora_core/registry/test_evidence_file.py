"""Evidence as a file of its own: decided again offline, explained, and refused where a byte was changed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from flows.cli.app import app
from qlora_core.config.gate import GateConfig
from qlora_core.errors import RegistryError
from qlora_core.registry.evidence import decide_again, read_evidence_file
from qlora_core.registry.gate.decide import minimum_detectable_gain
from qlora_core.registry.versions import RegisteredVersion


@pytest.fixture
def evidence_file(
    register: Callable[..., RegisteredVersion], better: dict[str, Any], client: Any, tmp_path: Path
) -> Path:
    """What the registry holds of a version, downloaded by hand."""
    version = register(1, better)
    found = client.download_artifacts(version.run_id, f"evidence/version-{version.version}.json", str(tmp_path))
    return Path(found)


Run = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """`qlora gate ... --json` in this process: its exit code, and the object on standard output."""

    def do(*arguments: object) -> tuple[int, dict[str, Any]]:
        result = CliRunner().invoke(app, ["gate", *map(str, arguments), "--json"])
        return result.exit_code, json.loads(capfd.readouterr().out)

    return do


def test_a_decision_is_made_again_without_the_registry(evidence_file: Path, run: Run) -> None:
    code, found = run(evidence_file)
    assert (code, found["verdict"], found["recorded_verdict"], found["champion"]) == (0, "PROMOTE", "PROMOTE", None)
    assert found["reasons"] == list(decide_again(read_evidence_file(evidence_file)).reasons)


@pytest.mark.parametrize("text", ["min_loss_gain: 0.45\n", "gate: {min_loss_gain: 0.45}\n"], ids=["section", "config"])
def test_another_policy_may_decide_otherwise(evidence_file: Path, tmp_path: Path, run: Run, text: str) -> None:
    policy = tmp_path / "stricter.yaml"
    policy.write_text(text)
    code, found = run(evidence_file, "--policy", policy)
    assert (code, found["verdict"], found["recorded_verdict"]) == (3, "HOLD", "PROMOTE")


def test_explain_names_every_check_and_what_could_have_been_shown(evidence_file: Path, run: Run) -> None:
    code, found = run("explain", evidence_file)
    assert code == 0
    assert [check["verdict"] for check in found["checks"]] == ["PROMOTE"] * len(found["reasons"])
    # An interval from .4 to .6 at 95 %: 2.8016 standard errors of .2 / (2 * 1.95996)
    assert found["detectable_gain"] == pytest.approx(2.8016 * 0.2 / (2 * 1.95996), rel=1e-4)


def test_the_detectable_gain_is_found_in_eight_of_ten_tries() -> None:
    error, confidence = 0.03, 0.9
    z = 1.6448536  # of 95 %, two sides of 5 %
    heldout = {"gain": 0.0, "gain_low": -z * error, "gain_high": z * error, "confidence": confidence, "rows": 100}
    least = minimum_detectable_gain({"metrics": {"heldout": heldout}}, None, GateConfig())
    assert least is not None
    drawn = np.random.default_rng(0).normal(least, error, 200_000)
    assert np.mean(drawn - z * error > 0) == pytest.approx(0.8, abs=0.005)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda text: text.replace("0.5", "0.9", 1), "was changed after the decision"),
        (lambda text: text[: len(text) // 2], "is not JSON"),
        (lambda text: "{}", "no evidence of a promotion"),
    ],
    ids=["edited", "cut", "other"],
)
def test_a_changed_file_is_refused(evidence_file: Path, run: Run, edit: Callable[[str], str], message: str) -> None:
    text = evidence_file.read_text()
    assert edit(text) != text
    evidence_file.write_text(edit(text))
    with pytest.raises(RegistryError, match=message):
        read_evidence_file(evidence_file)
    code, found = run(evidence_file)
    assert code == 1 and message in found["error"]["message"]


def test_another_policy_file_is_refused_with_what_is_allowed(evidence_file: Path, tmp_path: Path, run: Run) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("min_loss_gian: 1\n")
    code, found = run(evidence_file, "--policy", policy)
    assert code == 2 and "min_loss_gain" in found["error"]["message"]
    assert GateConfig().min_loss_gain == 0.0
