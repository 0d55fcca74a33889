"""An adapter trained on top of another, as a person has it made: two sweeps' commands, the registry, and the recipe."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora_core.adapters.adapter_folder import adapter_digest
from qlora_core.config.load import load_config
from qlora_core.registry.model_address import resolve_address

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]
Qlora = Callable[..., "subprocess.CompletedProcess[str]"]
ANSWERS = {"red": "apple", "green": "leaf", "blue": "sky", "black": "night", "white": "snow"}


def write_rows(folder: Path, answers: dict[str, str]) -> Path:
    """Rows to train on, and the same as a text of documents beside them."""
    folder.mkdir(parents=True)
    rows = [
        {"instruction": f"Question {n}: name a thing that is {colour}.", "output": thing, "category": colour}
        for n in range(20)
        for colour, thing in answers.items()
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    text = folder.with_suffix(".txt")
    text.write_text("<|endoftext|>".join(f"{row['instruction']} {row['output']}" for row in rows[:20]))
    return text


def test_a_child_of_a_champion_is_fused_registered_and_asked_what_its_parent_forgot(
    tiny_project: Path, qlora: Qlora, prefect_server: dict[str, str], tmp_path: Path
) -> None:
    folder = tiny_project.parent
    first_text = write_rows(folder / "first", ANSWERS)
    second_text = write_rows(folder / "second", {colour: thing[::-1] for colour, thing in ANSWERS.items()})

    def run(command: str, *settings: str) -> dict[str, Any]:
        sets = [each for setting in ("sweep.space={}", *settings) for each in ("--set", setting)]
        done = qlora(command, tiny_project, *sets, "--json", env=prefect_server)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout)

    parent = Path(run("sweep", "data.sources=[first]", "train.learning_rate=1e-2")["adapter"])
    over = ("data.sources=[second]", f"train.start_from={parent}", "train.start_as=parent", "gate.slices.by=category")
    child_run = run("run", *over)
    assert not next(stage for stage in child_run["stages"] if stage["name"] == "sweep")["cached"]

    config = load_config(tiny_project)
    address = f"models:/{config.registry.model_name}/{child_run['model_version']}"
    fused = resolve_address(config.tracking_uri, address, tmp_path / "cache").folder
    recorded = json.loads((fused / "child" / "qlora.json").read_text())
    assert recorded["parent_adapter_digests"] == [adapter_digest(parent)]
    lineage = json.loads((fused / "recipe.json").read_text())["recipe"]
    assert lineage["method"] == "sequential"
    assert [each["digest"] for each in lineage["parents"]] == [adapter_digest(parent), adapter_digest(fused / "child")]

    (base,) = (
        path.parent for path in folder.glob(".qlora/v1/view/*/config.json") if "quantization" in path.read_text()
    )
    recipe = tmp_path / "recipe.yaml"
    parents = [
        {"path": str(parent), "name": "first", "task": str(first_text)},
        {"path": str(fused / "child"), "name": "second", "task": str(second_text)},
    ]
    recipe.write_text(yaml.safe_dump({"method": "sequential", "base": str(base), "adapters": parents}))
    made = qlora("compose", recipe, tmp_path / "again", "--json")
    assert made.returncode == 0, made.stderr[-3000:]
    told = {entry["name"]: entry for entry in json.loads(made.stdout)["forgetting"]}
    for entry in told.values():
        assert entry["forgotten_low"] <= entry["forgotten"] <= entry["forgotten_high"]
    assert told["second"]["forgotten"] == pytest.approx(0, abs=1e-5)  # the sequence is how it was finished
    assert told["first"]["forgotten"] != 0

    recipe.write_text(yaml.safe_dump({"adapters": [{"path": str(fused / "child")}]}))
    alone = qlora("compose", recipe, tmp_path / "alone", "--json")
    assert alone.returncode == 1 and "trained on top of" in json.loads(alone.stdout)["error"]["message"]
    difference = qlora("adapter", "diff", tmp_path / "again", fused, "--json")
    assert json.loads(difference.stdout)["relative_difference"] < 1e-6
