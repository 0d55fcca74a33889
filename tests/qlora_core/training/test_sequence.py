"""Training on top of a finished adapter: the parent stays as it is, the child is bound to it, the two fuse exactly."""

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from qlora_core.adapters.adapter_folder import adapter_digest
from qlora_core.adapters.on_base import attach_stack
from qlora_core.data.dataset import TokenRow
from qlora_core.errors import ModelError, TrainingError
from qlora_core.model.adapter import attach_adapter, verify_golden
from qlora_core.model.base import load_quantized
from qlora_core.training.frozen_parent import FrozenParent
from qlora_core.training.trainer import Trainer
from qlora_core.training.trial import Trial

Trials = Callable[..., Trial]
TOKENS = torch.tensor([[1, 2, 3, 4, 5, 40, 41, 42]])


def trainer(nf4: Path, work: Path, rows: list[TokenRow], validation: list[TokenRow], parent: Path | None) -> Trainer:
    return Trainer(load_quantized(nf4), rows, validation, work, parent=parent)


@pytest.fixture
def parent(
    nf4_folder: Path, train_rows: list[TokenRow], validation_rows: list[TokenRow], trial: Trials, tmp_path: Path
) -> tuple[Path, float]:
    """Rank 2 on the attention alone, whose layers the child does not have all to itself; and its validation loss."""
    own = trainer(nf4_folder, tmp_path / "parent-work", train_rows, validation_rows, None)
    one = trial("parent", lora_rank=2, target_modules=["q_proj", "v_proj"], learning_rate=1e-2)
    (progress,) = own.run([one], None)
    own.export(one, tmp_path / "parent")
    assert progress.validation_loss is not None
    return tmp_path / "parent", progress.validation_loss


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=TOKENS, use_cache=False).logits


def test_a_child_is_trained_over_its_parent_bound_to_it_and_fused_with_it(
    parent: tuple[Path, float], nf4_folder: Path, train_rows: list[TokenRow], validation_rows: list[TokenRow],
    trial: Trials, tmp_path: Path,
) -> None:  # fmt: skip
    folder, reached = parent
    still = trainer(nf4_folder, tmp_path / "still", train_rows, validation_rows, folder)
    (idle,) = still.run([trial("a", learning_rate=1e-12, max_steps=1, warmup_ratio=0.0)], None)
    assert idle.validation_loss == pytest.approx(reached, abs=1e-6)  # the parent answers, the child says nothing yet

    before = adapter_digest(folder)
    over = trainer(nf4_folder, tmp_path / "over", train_rows, validation_rows, folder)
    one = trial("child", target_modules=["q_proj", "down_proj"], learning_rate=1e-2)
    (progress,) = over.run([one], None)
    assert progress.validation_loss is not None and progress.validation_loss < reached - 0.01
    over.export(one, tmp_path / "fused")
    child = tmp_path / "fused" / "child"
    assert adapter_digest(folder) == before
    assert json.loads((child / "qlora.json").read_text())["parent_adapter_digests"] == [before]

    fused = logits(attach_adapter(load_quantized(nf4_folder), tmp_path / "fused"))
    stacked = logits(attach_stack(load_quantized(nf4_folder), [folder, child]))
    plain = logits(load_quantized(nf4_folder))
    assert (fused - stacked).abs().max() <= 1e-5 < 0.05 < (fused - plain).abs().max()  # float32 sums of other order
    stock = PeftModel.from_pretrained(load_quantized(nf4_folder), str(tmp_path / "fused")).eval()
    assert verify_golden(stock, tmp_path / "fused", atol=1e-5) <= 1e-5
    recipe = json.loads((tmp_path / "fused" / "recipe.json").read_text())["recipe"]
    assert [each["digest"] for each in recipe["parents"]] == [before, adapter_digest(child)]

    # the child alone: refused here; stock PEFT loads it, and it answers something else
    with pytest.raises(ModelError, match="trained on top of 1 other adapters"):
        attach_adapter(load_quantized(nf4_folder), child)
    orphan = logits(PeftModel.from_pretrained(load_quantized(nf4_folder), str(child)).eval())
    assert (orphan - stacked).abs().max() > 0.01


def test_packed_over_a_parent_equals_alone(
    parent: tuple[Path, float], nf4_folder: Path, train_rows: list[TokenRow], validation_rows: list[TokenRow],
    trial: Trials, tmp_path: Path,
) -> None:  # fmt: skip
    two = trainer(nf4_folder, tmp_path / "two", train_rows, validation_rows, parent[0])
    one = trainer(nf4_folder, tmp_path / "one", train_rows, validation_rows, parent[0])
    packed = two.run([trial("x"), trial("y", seed=8, learning_rate=1e-3)], None)
    (alone,) = one.run([trial("x")], None)
    assert packed[0].validation_loss == pytest.approx(alone.validation_loss, abs=5e-5)


def test_a_checkpoint_over_another_parent_is_not_taken_up(
    parent: tuple[Path, float], nf4_folder: Path, train_rows: list[TokenRow], validation_rows: list[TokenRow],
    trial: Trials, tmp_path: Path,
) -> None:  # fmt: skip
    trainer(nf4_folder, tmp_path / "work", train_rows, validation_rows, parent[0]).run([trial("x")], 2)
    other = copytree(parent[0], tmp_path / "other")
    settings = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**settings, "lora_alpha": settings["lora_alpha"] * 2}))
    (progress,) = trainer(nf4_folder, tmp_path / "work", train_rows, validation_rows, other).run([trial("x")], None)
    assert progress.error is not None and "parent" in progress.error


def test_a_parent_acts_in_the_base_alone_and_leaves_it_as_it_was(
    parent: tuple[Path, float], nf4_folder: Path, base: PreTrainedModel
) -> None:
    plain = logits(base)
    stock = logits(PeftModel.from_pretrained(load_quantized(nf4_folder), str(parent[0])).eval())
    under = FrozenParent(base, parent[0])
    torch.testing.assert_close(logits(base), stock, atol=1e-5, rtol=1e-5)
    with under.taken_off():
        assert torch.equal(logits(base), plain)
    torch.testing.assert_close(logits(base), stock, atol=1e-5, rtol=1e-5)
    assert "lora" not in "".join(name for name, _ in base.named_parameters())


def test_what_could_not_be_fused_is_refused(
    parent: tuple[Path, float], nf4_folder: Path, train_rows: list[TokenRow], validation_rows: list[TokenRow],
    trial: Trials, tmp_path: Path,
) -> None:  # fmt: skip
    over = trainer(nf4_folder, tmp_path / "work", train_rows, validation_rows, parent[0])
    (progress,) = over.run([trial("x", use_dora=True)], None)
    assert progress.error is not None and "use_dora over a parent" in progress.error
    orphan = copytree(parent[0], tmp_path / "orphan")
    (orphan / "qlora.json").write_text(json.dumps({"parent_adapter_digests": ["a" * 64]}))
    with pytest.raises(ModelError, match="trained on top of"):
        trainer(nf4_folder, tmp_path / "two", train_rows, validation_rows, orphan)
    magnitudes = trainer(nf4_folder, tmp_path / "three", train_rows, validation_rows, None)
    dora = trial("dora", use_dora=True)
    magnitudes.run([dora], None)
    magnitudes.export(dora, tmp_path / "dora")
    with pytest.raises(ModelError, match="DoRA"):
        trainer(nf4_folder, tmp_path / "four", train_rows, validation_rows, tmp_path / "dora")
    with pytest.raises(TrainingError, match="encoder"):
        FrozenParent(_t5(), parent[0])


def _t5() -> PreTrainedModel:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
