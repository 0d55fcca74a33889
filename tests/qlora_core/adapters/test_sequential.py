"""An adapter trained on top of another: really trained, bound to its parent, fused, and asked what it forgot."""

import json
from pathlib import Path
from shutil import copytree
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from peft import PeftModel

from qlora_core.adapters.compose import compose
from qlora_core.adapters.lineage import record_parents
from qlora_core.adapters.on_base import attach_stack
from qlora_core.errors import ModelError
from qlora_core.model.adapter import attach_adapter
from qlora_core.model.adapter_set import NamedAdapter, attached_adapters
from qlora_core.model.base import load_quantized


class Sequence(NamedTuple):
    """`second` was trained over `first`, on another task; texts of both tasks."""

    base: Path
    first: Path
    second: Path
    texts: dict[str, Path]
    rows: torch.Tensor
    loss_on: Any


@pytest.fixture(scope="module")
def sequence(world: Any, small_world: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Sequence:
    folder = tmp_path_factory.mktemp("sequence")
    spoken = small_world.language(1)
    other = spoken.mixed(small_world.language(3), 0.9)
    first = world.adapters["mid"]
    second = small_world.train_adapter(world.nf4, folder / "second", other, steps=60, rate=3e-3, under=[first])
    record_parents(second, [first])
    (folder / "other.txt").write_text(other.text(60, 8))
    texts = {"first": world.test, "second": folder / "other.txt"}
    return Sequence(world.nf4, first, second, texts, other.rows(60, 8), small_world.loss_on)


def fuse(sequence: Sequence, folder: Path, **own: Any) -> dict[str, Any]:
    parents = [
        {"path": str(path), "name": name, "task": str(sequence.texts[name])}
        for name, path in (("first", sequence.first), ("second", sequence.second))
    ]
    content = {"method": "sequential", "base": str(sequence.base), "adapters": parents, **own}
    (folder / "r.yaml").write_text(yaml.safe_dump(content))
    return compose(folder / "r.yaml", folder / "fused")


def loaded(sequence: Sequence) -> Any:
    return load_quantized(sequence.base, device="cpu")


def test_a_sequence_fuses_to_what_the_stack_computes(sequence: Sequence, tmp_path: Path) -> None:
    result = fuse(sequence, tmp_path)
    tokens = sequence.rows[:8]
    with torch.inference_mode():
        stacked = attach_stack(loaded(sequence), [sequence.first, sequence.second])(input_ids=tokens).logits
        fused = attach_adapter(loaded(sequence), tmp_path / "fused")(input_ids=tokens).logits
        plain = loaded(sequence)(input_ids=tokens).logits
    assert (fused - stacked).abs().max() <= 1e-5  # float32 sums of other order; logits reach 10
    assert (stacked - plain).abs().max() > 1
    assert result["weights"] == {"first": 1.0, "second": 1.0}
    assert result["relative_error"] == 0


def test_what_is_forgotten_is_told_on_every_parents_task(sequence: Sequence, tmp_path: Path) -> None:
    told = {entry["name"]: entry for entry in fuse(sequence, tmp_path)["forgetting"]}
    first, second = told["first"], told["second"]
    assert first["before"] < first["base"]  # it had learned its task
    assert first["forgotten"] == pytest.approx(first["after"] - first["before"])
    assert 0.02 < first["forgotten_low"] <= first["forgotten"] <= first["forgotten_high"]
    assert second["after"] < second["base"] - 0.2
    assert second["forgotten"] == pytest.approx(0, abs=1e-5)  # the sequence is how it was finished
    assert second["after"] == pytest.approx(sequence.loss_on(
        attach_stack(loaded(sequence), [sequence.first, sequence.second]), sequence.rows), abs=1e-4)  # fmt: skip


def test_without_its_parent_it_is_refused_where_stock_peft_loads_another_model(
    sequence: Sequence, tmp_path: Path
) -> None:
    (tmp_path / "alone.yaml").write_text(yaml.safe_dump({"adapters": [{"path": str(sequence.second)}]}))
    for refuse in (
        lambda: attach_adapter(loaded(sequence), sequence.second),
        lambda: attached_adapters(loaded(sequence), [NamedAdapter("second", sequence.second)]).__enter__(),
        lambda: attach_stack(loaded(sequence), [sequence.second]),
        lambda: attach_stack(loaded(sequence), [sequence.second, sequence.first]),
        lambda: compose(tmp_path / "alone.yaml", tmp_path / "out"),
    ):
        with pytest.raises(ModelError, match="trained on top of"):
            refuse()
    whole = sequence.loss_on(attach_stack(loaded(sequence), [sequence.first, sequence.second]), sequence.rows)
    orphan = sequence.loss_on(PeftModel.from_pretrained(loaded(sequence), str(sequence.second)).eval(), sequence.rows)
    assert orphan > whole + 0.02  # negative control: it loads, and is worse


def test_a_parent_that_was_changed_is_not_its_parent(sequence: Sequence, tmp_path: Path) -> None:
    changed = copytree(sequence.first, tmp_path / "first")
    settings = json.loads((changed / "adapter_config.json").read_text())
    (changed / "adapter_config.json").write_text(json.dumps({**settings, "lora_alpha": 17}))
    with pytest.raises(ModelError, match="trained on top of"):
        attach_stack(loaded(sequence), [changed, sequence.second])
    (tmp_path / "r.yaml").write_text(
        yaml.safe_dump({"method": "sequential", "adapters": [{"path": str(changed)}, {"path": str(sequence.second)}]})
    )
    with pytest.raises(ModelError, match="does not stand before it"):
        compose(tmp_path / "r.yaml", tmp_path / "out")
