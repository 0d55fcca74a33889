"""Weights learned for a task that is 60 % one adapter's and 40 % another's, beside a distractor and a copy."""

import json
from pathlib import Path
from shutil import copytree
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
import yaml

from qlora_core.adapters.adapter_folder import open_adapter
from qlora_core.adapters.compose import compose
from qlora_core.adapters.learn import closed_form, delta_cosines
from qlora_core.adapters.weighted_model import WeightedModel
from qlora_core.errors import DataError
from qlora_core.model.base import load_quantized
from qlora_core.model.perplexity import Window, score_text_file


class Library(NamedTuple):
    base: Path
    adapters: dict[str, Path]
    validation: Path
    test: Path


@pytest.fixture(scope="module")
def library(world: Any, small_world: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Library:
    folder = tmp_path_factory.mktemp("library")
    spoken = small_world.language(1)
    tasks = {name: spoken.mixed(small_world.language(seed), 0.6) for name, seed in (("a", 2), ("b", 3), ("c", 4))}
    made = {
        name: small_world.train_adapter(world.nf4, folder / name, task, steps=60, rate=3e-3)
        for name, task in tasks.items()
    }
    made["copy"] = copytree(made["a"], folder / "copy")
    target = tasks["a"].mixed(tasks["b"], 0.4)
    (folder / "validation.txt").write_text(target.text(120, 21))
    (folder / "test.txt").write_text(target.text(300, 22))
    return Library(world.nf4, made, folder / "validation.txt", folder / "test.txt")


def recipe(library: Library, folder: Path, names: list[str], **learn: Any) -> Path:
    hand = {"a": 0.6, "b": 0.4, "c": 0.0, "copy": 0.0}
    content = {
        "method": "learned",
        "base": str(library.base),
        "adapters": [{"path": str(library.adapters[name]), "weight": hand[name]} for name in names],
        "learn": {"validation": str(library.validation), "test": str(library.test), **learn},
    }
    folder.mkdir(exist_ok=True)
    (folder / "r.yaml").write_text(yaml.safe_dump(content))
    return folder / "r.yaml"


def test_learned_weights_beat_every_rival_on_rows_they_never_saw(library: Library, tmp_path: Path) -> None:
    result = compose(recipe(library, tmp_path / "r", ["a", "b", "c", "copy"]), tmp_path / "out")
    learned = result["learned"]
    against = learned["test"]["against"]
    assert set(against) == {
        "base", "only a", "only b", "only c", "only copy", "uniform sum", "uniform average", "by hand"
    }  # fmt: skip
    for name, rival in against.items():
        assert rival["gain_low"] > 0, (name, rival)  # the whole interval
    assert result["weights"]["c"] == result["weights"]["copy"] == 0
    assert "copy of a" in learned["dropped"]["copy"]
    assert "c" in learned["dropped"]
    assert result["weights"]["a"] > result["weights"]["b"] > 0.1
    assert learned["leave_one_out"]["a"]["gain_low"] > 0.02
    assert learned["leave_one_out"]["b"]["gain_low"] > 0.02
    assert learned["leave_one_out"]["c"]["gain"] == 0
    assert learned["seconds"] < 120
    # what is written is what was judged
    scored = score_text_file(library.base, library.test, tmp_path / "out").loss
    assert scored == pytest.approx(learned["test"]["loss"], abs=1e-5)
    kept = json.loads((tmp_path / "out" / "recipe.json").read_text())
    assert kept["result"]["weights"] == result["weights"]
    assert compose(tmp_path / "r" / "r.yaml", tmp_path / "out")["cached"]


def test_the_first_rung_alone_is_already_better_than_either_adapter(library: Library, tmp_path: Path) -> None:
    names = ["a", "b", "c"]
    result = compose(recipe(library, tmp_path / "r", names, level="closed_form"), tmp_path / "out")
    against = result["learned"]["test"]["against"]
    assert result["learned"]["level"] == "closed_form"
    assert all(against[name]["gain_low"] > 0 for name in ("only a", "only b", "uniform average", "uniform sum"))


def test_weights_per_module_are_kept_only_beyond_chance_and_are_what_is_written(
    library: Library, tmp_path: Path
) -> None:
    result = compose(recipe(library, tmp_path / "r", ["a", "b"], level="modules"), tmp_path / "out")
    learned = result["learned"]
    decided = learned["modules_against_scalars"]["gain_low"] > 0
    assert learned["level"] == ("modules" if decided else "scalars")
    assert (learned["by_module"] is not None) == decided
    scored = score_text_file(library.base, library.test, tmp_path / "out").loss
    assert scored == pytest.approx(learned["test"]["loss"], abs=1e-5)


def test_too_few_documents_are_refused(library: Library, tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text("w3 w4<|endoftext|>w5 w6")
    with pytest.raises(DataError, match="at least 6 validation"):
        compose(recipe(library, tmp_path / "r", ["a", "b"], validation=str(tmp_path / "few.txt")), tmp_path / "out")


def test_the_closed_form_is_the_newton_step_of_the_linearised_loss(library: Library) -> None:
    """Against autograd's gradient and Hessian in float64 of the cross-entropy of z + sum (w_k - 1/2) d_k."""
    adapters = [open_adapter(library.adapters[name]) for name in ("a", "b")]
    model = WeightedModel(load_quantized(library.base, device="cpu", residency="dense"), adapters)
    rows = [Window([5, 9, 30, 41, 7], [False, True, True, True, True]), Window([8, 50, 3], [False, True, True])]
    middle, targets = model.counted_logits(torch.tensor([0.5, 0.5]), rows)
    moves = [
        2 * (middle - model.counted_logits(each, rows)[0]) for each in (torch.tensor([0, 0.5]), torch.tensor([0.5, 0]))
    ]

    def loss(step: torch.Tensor) -> torch.Tensor:
        logits = middle + sum(weight * move for weight, move in zip(step, moves, strict=True))
        return torch.nn.functional.cross_entropy(logits, targets)

    zero = torch.zeros(2, dtype=torch.float64)
    gradient = torch.autograd.functional.jacobian(loss, zero)
    hessian: Any = torch.autograd.functional.hessian(loss, zero)
    hessian = hessian + 1e-3 * hessian.diagonal().mean() * torch.eye(2, dtype=torch.float64)
    expected = (0.5 - torch.linalg.solve(hessian, gradient)).clamp(0, 1.5)
    torch.testing.assert_close(closed_form(model, rows, torch.ones(2)).double(), expected, atol=1e-6, rtol=1e-5)
    alone = closed_form(model, rows, torch.tensor([0.0, 1.0]))
    assert alone[0] == 0
    assert len(targets) == 6


def test_cosines_are_those_of_the_whole_deltas(library: Library) -> None:
    adapters = [open_adapter(library.adapters[name]) for name in ("a", "b", "copy")]
    whole = [
        torch.cat([adapter.factors(module).dense().flatten().double() for module in adapter.modules])
        for adapter in adapters
    ]
    found = delta_cosines(adapters)
    for j in range(3):
        for k in range(3):
            assert found[j][k] == pytest.approx(torch.cosine_similarity(whole[j], whole[k], dim=0).item(), abs=1e-6)
