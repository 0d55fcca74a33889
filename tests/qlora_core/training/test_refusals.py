"""Bad input is refused before a step, naming the value: through the config file, the trainer, an adapter's folder."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from qlora_core.config.load import load_config
from qlora_core.data.dataset import TokenRow
from qlora_core.errors import ConfigError, ModelError
from qlora_core.model.adapter import PROVENANCE_FILE, attach_adapter
from qlora_core.training.trainer import Trainer
from qlora_core.training.trial import Trial

Rows = Callable[..., list[TokenRow]]
Trials = Callable[..., Trial]


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("lora_rank=0", "greater than or equal to 1"),
        ("lora_rank=-4", "greater than or equal to 1"),
        ("lora_alpha=0", "greater than 0"),
        ("learning_rate=0", "greater than 0"),
        ("learning_rate=-0.1", "greater than 0"),
        ("learning_rate=.nan", "finite"),
        ("learning_rate=.inf", "finite"),
        ("dpo_beta=0", "greater than 0"),
        ("dpo_beta=.nan", "finite"),
        ("dpo_label_smoothing=0.5", "less than 0.5"),
        ("sensitive_layers=0", "greater than or equal to 1"),
        ("objective=ppo", "'sft' or 'dpo'"),
        ("lora_init=random", "'loftq'"),
        ("micro_batch_size=0", "greater than or equal to 1"),
    ],
)
def test_settings_that_cannot_train_are_refused_with_the_field_and_the_value(
    tmp_path: Path, setting: str, said: str
) -> None:
    config = tmp_path / "pipeline.yaml"
    config.write_text("data: {sources: [rows.json]}\nbase: {model: demo}\n")
    load_config(config, ["train.learning_rate=1e-4"])  # the control
    with pytest.raises(ConfigError) as refused:
        load_config(config, [f"train.{setting}"])
    name, _, value = setting.partition("=")
    assert f"train.{name}" in str(refused.value) and said in str(refused.value)
    assert value.strip(".") in str(refused.value)


def test_targets_that_match_nothing_fail_their_trial_alone_and_list_what_exists(
    base: PreTrainedModel, rows: Rows, trial: Trials, tmp_path: Path
) -> None:
    trials = [trial("lost", target_modules=["query"]), trial("found", target_modules=["q_proj"], max_steps=1)]
    lost, found = Trainer(base, rows(8, seed=1), rows(2), tmp_path).run(trials, None)
    assert (lost.step, found.error) == (0, None)
    assert lost.error == (
        "target_modules ['query'] match no linear layer of the base model; it has down_proj, gate_proj, k_proj, "
        "o_proj, q_proj, up_proj, v_proj (or all-linear)"
    )


def test_a_set_smaller_than_a_batch_is_said_once_and_trained_whole(
    base: PreTrainedModel, rows: Rows, trial: Trials, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said = "has 4 training examples, fewer than its effective batch of 6"
    small = rows(4, seed=1)
    trainer = Trainer(base, small, rows(2), tmp_path / "small")
    trainer.run([trial("t000", max_steps=4)], 2)
    (progress,) = trainer.run([trial("t000", max_steps=4)], None)
    assert caplog.text.count(said) == 1 and "trial t000" in caplog.text
    assert {entry["tokens"] for entry in progress.curve} == {sum(sum(row.loss_mask[1:]) for row in small)}
    caplog.clear()
    Trainer(base, rows(6, seed=1), rows(2), tmp_path / "enough").run([trial(max_steps=1)], None)
    assert "fewer than" not in caplog.text


def test_an_exported_adapter_is_refused_on_another_base(
    base: PreTrainedModel, rows: Rows, trial: Trials, tmp_path: Path
) -> None:
    trainer = Trainer(base, rows(8, seed=1), rows(2), tmp_path / "work")
    trainer.run([one := trial(max_steps=2)], None)
    trainer.export(one, tmp_path / "out")
    (tmp_path / "out" / PROVENANCE_FILE).write_text(json.dumps({"quantized_base_digest": "b" * 64}))
    with pytest.raises(ModelError, match=f"was trained on base {'b' * 64}, the base in use is {'a' * 64}"):
        attach_adapter(base, tmp_path / "out", expected_base_digest="a" * 64)
    attach_adapter(base, tmp_path / "out", expected_base_digest="b" * 64).unload()
