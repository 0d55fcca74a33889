"""Training that begins from another adapter: its very weights, alone or packed, and refused where they do not fit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from qlora_core.data.dataset import TokenRow
from qlora_core.errors import TrainingError
from qlora_core.model.base import load_quantized
from qlora_core.training.adapter_config import lora_config
from qlora_core.training.pack.pack import Pack
from qlora_core.training.trainer import Trainer
from qlora_core.training.trial import Trial
from qlora_core.training.warm_start import start_from

Trials = Callable[..., Trial]


@pytest.fixture
def champion(
    base: PreTrainedModel, train_rows: list[TokenRow], validation_rows: list[TokenRow], trial: Trials, tmp_path: Path
) -> tuple[Path, float]:
    """A trained adapter and its validation loss."""
    trainer, one = Trainer(base, train_rows, validation_rows, tmp_path / "champion-work"), trial("champion")
    (progress,) = trainer.run([one], None)
    trainer.export(one, tmp_path / "champion")
    assert progress.validation_loss is not None
    return tmp_path / "champion", progress.validation_loss


def test_slot_holds_the_very_weights(champion: tuple[Path, float], nf4_folder: Path, trial: Trials) -> None:
    base = load_quantized(nf4_folder)
    pack = Pack(base)
    slot = pack.fill(lora_config(base, trial().params), seed=9)
    start_from(pack.weights(slot), champion[0], trial().params)
    stored = load_file(champion[0] / "adapter_model.safetensors")
    named = dict(pack.weights(slot).named())
    assert named.keys() == stored.keys()
    assert all(torch.equal(named[name], stored[name]) for name in stored)
    # The flat buffers that the optimizer steps are what was written into.
    assert pack.weights(slot).b.values.abs().sum() > 0


def test_training_goes_on_from_the_start_and_packed_equals_alone(
    champion: tuple[Path, float],
    nf4_folder: Path,
    train_rows: list[TokenRow],
    validation_rows: list[TokenRow],
    trial: Trials,
    tmp_path: Path,
) -> None:
    folder, reached = champion
    # A rate of nearly nothing: what is scored afterwards is the start.
    still: dict[str, Any] = {"learning_rate": 1e-12, "max_steps": 1, "warmup_ratio": 0.0}
    warm = Trainer(load_quantized(nf4_folder), train_rows, validation_rows, tmp_path / "warm", start=folder)
    (alone,) = warm.run([trial("a", **still)], None)
    assert alone.validation_loss == pytest.approx(reached, abs=1e-6)
    cold = Trainer(load_quantized(nf4_folder), train_rows, validation_rows, tmp_path / "cold")
    (fresh,) = cold.run([trial("a", **still)], None)
    assert fresh.validation_loss is not None and fresh.validation_loss > reached + 0.05
    two = Trainer(load_quantized(nf4_folder), train_rows, validation_rows, tmp_path / "two", start=folder)
    one = Trainer(load_quantized(nf4_folder), train_rows, validation_rows, tmp_path / "one", start=folder)
    packed = two.run([trial("x"), trial("y", seed=8, learning_rate=1e-3)], None)
    (single,) = one.run([trial("x")], None)
    assert packed[0].validation_loss == pytest.approx(single.validation_loss, abs=5e-5)
    assert single.validation_loss is not None and single.validation_loss < reached


def test_checkpoint_of_another_start_is_not_taken_up(
    champion: tuple[Path, float],
    nf4_folder: Path,
    train_rows: list[TokenRow],
    validation_rows: list[TokenRow],
    trial: Trials,
    tmp_path: Path,
) -> None:
    work = tmp_path / "work"
    cold = Trainer(load_quantized(nf4_folder), train_rows, validation_rows, work)
    cold.run([trial("a")], [3])
    warm = Trainer(load_quantized(nf4_folder), train_rows, validation_rows, work, start=champion[0])
    (refused,) = warm.run([trial("a")], [3])
    assert refused.error is not None and "belongs to another training: start is None there" in refused.error


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lora_rank": 8}, "train.lora_rank"),
        ({"lora_alpha": 16.0}, "train.lora_alpha"),
        ({"use_rslora": True}, "use_rslora"),
        ({"target_modules": ["q_proj"]}, "train.target_modules"),
        ({"use_dora": True}, "it lacks .*lora_magnitude_vector"),
        ({"lora_init": "gaussian"}, "two beginnings"),
    ],
)
def test_adapter_of_another_shape_or_meaning_is_refused(
    champion: tuple[Path, float], nf4_folder: Path, trial: Trials, settings: dict[str, Any], said: str
) -> None:
    base, params = load_quantized(nf4_folder), trial(**settings).params
    pack = Pack(base)
    slot = pack.fill(lora_config(base, params), seed=9)
    with pytest.raises(TrainingError, match=said):
        start_from(pack.weights(slot), champion[0], params)


def test_start_that_is_not_finite_is_refused(champion: tuple[Path, float], nf4_folder: Path, trial: Trials) -> None:
    path = champion[0] / "adapter_model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name][0, 0] = float("nan")
    save_file(tensors, path)
    base = load_quantized(nf4_folder)
    pack = Pack(base)
    slot = pack.fill(lora_config(base, trial().params), seed=9)
    with pytest.raises(TrainingError, match="not finite"):
        start_from(pack.weights(slot), champion[0], trial().params)
