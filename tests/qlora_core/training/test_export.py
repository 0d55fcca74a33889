"""The exported PEFT folder: stock PEFT reproduces the trained logits from it, and broken adapters are not exported."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from qlora_core.data.dataset import TokenRow
from qlora_core.errors import TrainingError
from qlora_core.model.adapter import attach_adapter, golden_logits, read_golden, verify_golden
from qlora_core.model.adapter_set import NamedAdapter, attached_adapters
from qlora_core.model.base import load_quantized
from qlora_core.training import export as module
from qlora_core.training.adapter_config import lora_config
from qlora_core.training.checkpoint import newest_checkpoint
from qlora_core.training.export import golden_prompts
from qlora_core.training.pack.pack import Pack
from qlora_core.training.trainer import Trainer
from qlora_core.training.trial import Trial


@pytest.fixture
def trained(
    base: PreTrainedModel,
    train_rows: list[TokenRow],
    validation_rows: list[TokenRow],
    trial: Callable[..., Trial],
    tmp_path: Path,
) -> tuple[Trainer, Trial]:
    trainer, one = Trainer(base, train_rows, validation_rows, tmp_path / "work"), trial(max_steps=6, lora_dropout=0.3)
    trainer.run([one], None)
    return trainer, one


def test_stock_peft_over_a_fresh_base_gives_the_trained_logits(
    trained: tuple[Trainer, Trial], nf4_folder: Path, tmp_path: Path, rows: Callable[..., list[TokenRow]]
) -> None:
    trainer, one = trained
    trainer.export(one, tmp_path / "out")
    newest = newest_checkpoint(tmp_path / "work" / one.id)
    assert newest is not None
    prompts = [row.input_ids for row in rows(4, seed=31)]
    trained_base = load_quantized(nf4_folder)
    pack = Pack(trained_base)
    slot = pack.fill(lora_config(trained_base, one.params), seed=0)
    for name, parameter in pack.weights(slot).named():
        parameter.data.copy_(newest.adapter()[name])
    with pack.only(slot):
        expected = golden_logits(trained_base, prompts)
    fresh = load_quantized(nf4_folder)
    without = golden_logits(fresh, prompts)
    found = golden_logits(PeftModel.from_pretrained(fresh, tmp_path / "out"), prompts)
    assert max((after - before).abs().max().item() for after, before in zip(found, expected, strict=True)) < 1e-5
    assert all((after - before).abs().max() > 1e-3 for after, before in zip(found, without, strict=True))


def test_folder_holds_what_its_readers_need(trained: tuple[Trainer, Trial], nf4_folder: Path, tmp_path: Path) -> None:
    trainer, one = trained
    trainer.export(one, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "golden.json",
        "golden.safetensors",
    ]
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["inference_mode"]) == (4, 8, True)
    assert settings["target_modules"] == sorted(settings["target_modules"])
    assert str(tmp_path) not in json.dumps(settings)
    golden = read_golden(tmp_path / "out")
    assert len(golden.prompts) == 3 and len({tuple(prompt) for prompt in golden.prompts}) == 3
    assert all(logits.shape == (96,) and logits.dtype == torch.float32 for logits in golden.logits)
    assert (
        verify_golden(attach_adapter(load_quantized(nf4_folder), tmp_path / "out"), tmp_path / "out", atol=1e-5) < 1e-5
    )


@pytest.mark.parametrize("settings", [{"lora_init": "pissa"}, {"lora_init": "olora", "use_rslora": True},
                                      {"lora_init": "orthogonal"}, {"rank_pattern": {"down_proj": 7}},
                                      {"lora_init": "pissa", "rank_pattern": {"down_proj": 7}}, {"use_dora": True},
                                      {"use_rslora": True, "lora_plus_ratio": 16.0}])  # fmt: skip
def test_every_variant_comes_back_from_stock_peft_over_the_stored_base(
    base: PreTrainedModel,
    nf4_folder: Path,
    rows: Callable[..., list[TokenRow]],
    trial: Callable[..., Trial],
    tmp_path: Path,
    settings: dict[str, object],
) -> None:
    trainer, one = Trainer(base, rows(8, seed=1), rows(2), tmp_path / "work"), trial(max_steps=2, **settings)
    (progress,) = trainer.run([one], None)
    assert progress.error is None
    trainer.export(one, tmp_path / "out")  # compares logits with what stock PEFT gives
    clean = load_quantized(nf4_folder)
    assert verify_golden(PeftModel.from_pretrained(clean, tmp_path / "out"), tmp_path / "out", atol=1e-4) < 1e-4
    # and so does the way in which evaluation puts several on one base
    golden, fresh = read_golden(tmp_path / "out"), load_quantized(nf4_folder)
    with attached_adapters(fresh, [NamedAdapter("x", tmp_path / "out")]) as adapters, adapters.rows(["x"]):
        found = golden_logits(fresh, golden.prompts)
    assert max((a - b).abs().max().item() for a, b in zip(found, golden.logits, strict=True)) < 1e-4
    stored = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert stored["r"] == (8 if settings.get("lora_init") in ("pissa", "olora") else 4)


def test_exporting_twice_writes_the_same_bytes_and_leaves_the_base_clean(
    trained: tuple[Trainer, Trial], base: PreTrainedModel, tmp_path: Path
) -> None:
    trainer, one = trained
    (tmp_path / "first").mkdir()  # an empty folder is as good as none
    trainer.export(one, tmp_path / "first")
    trainer.export(one, tmp_path / "second")
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()
    assert not any("lora" in name for name, _ in base.named_modules())
    assert not any(module.training for module in base.modules())


def test_the_best_of_several_trials_can_be_exported_later(
    trained: tuple[Trainer, Trial], trial: Callable[..., Trial], tmp_path: Path
) -> None:
    trainer, one = trained
    trainer.run([trial("later", lora_rank=2)], 2)
    trainer.export(one, tmp_path / "out")
    weights = load_file(tmp_path / "out" / "adapter_model.safetensors")
    newest = newest_checkpoint(tmp_path / "work" / one.id)
    assert newest is not None
    assert all(torch.equal(weights[name], tensor) for name, tensor in newest.adapter().items())


def test_an_adapter_that_does_not_come_back_as_trained_is_refused(
    trained: tuple[Trainer, Trial], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong_alpha(folder: Path, adapter: module.TrainedAdapter) -> None:
        real(folder, adapter)
        path = folder / "adapter_config.json"
        path.write_text(path.read_text().replace('"lora_alpha": 8', '"lora_alpha": 9'))

    real = module._write_peft_folder
    monkeypatch.setattr(module, "_write_peft_folder", wrong_alpha)
    trainer, one = trained
    with pytest.raises(TrainingError, match="does not reproduce the trained one: logits of golden prompt 0 differ"):
        trainer.export(one, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["work"]


def test_weights_lost_while_writing_are_noticed(
    trained: tuple[Trainer, Trial], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(tensors: dict[str, torch.Tensor], path: Path, **settings: dict[str, str]) -> None:
        save_file(dict(list(tensors.items())[::2]), path, **settings)

    monkeypatch.setattr(module, "save_file", half)
    trainer, one = trained
    with pytest.raises(TrainingError, match="bytes, but its weights alone are"):
        trainer.export(one, tmp_path / "out")


def test_a_trial_that_was_never_trained_is_refused(
    trained: tuple[Trainer, Trial], trial: Callable[..., Trial], tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match="trial other has no checkpoint"):
        trained[0].export(trial("other"), tmp_path / "out")


def test_an_adapter_that_learned_nothing_is_refused(
    base: PreTrainedModel, rows: Callable[..., list[TokenRow]], trial: Callable[..., Trial]
) -> None:
    pack = Pack(base)
    slot = pack.fill(lora_config(base, trial().params), seed=0)
    with pytest.raises(TrainingError, match="every lora_B matrix is zero"):
        module.capture(pack, slot, rows(3))


def test_a_folder_that_holds_something_is_not_overwritten(trained: tuple[Trainer, Trial], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "keep.txt").write_text("mine")
    with pytest.raises(TrainingError, match="is not empty"):
        trained[0].export(trained[1], tmp_path / "out")
    assert (tmp_path / "out" / "keep.txt").read_text() == "mine"


def test_golden_prompts_are_three_beginnings_or_as_different_as_rows_allow() -> None:
    rows = [TokenRow(str(n), [1, n, 9, 9], [False, False, True, True]) for n in (2, 2, 3, 4, 5)]
    assert golden_prompts(rows) == [[1, 2], [1, 3], [1, 4]]
    assert golden_prompts(rows[:2]) == [[1, 2], [1, 2, 9, 9], [1, 2, 9, 9]]
    assert golden_prompts([TokenRow("a", [7, 8], [True, True])]) == [[7], [7, 8], [7]]
