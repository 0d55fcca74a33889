"""Preference pairs: the loss against its formula and against PEFT, packs against each trial alone, and refusals."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel

from qlora_core.config.sweep import SweepConfig
from qlora_core.config.train import TrainConfig
from qlora_core.data.dataset import PreferenceRow, TokenRow
from qlora_core.data.shards import shard_name
from qlora_core.errors import DataError, NumericError, TrainingError
from qlora_core.model.adapter import read_golden, verify_golden
from qlora_core.model.base import load_quantized
from qlora_core.sweep.memory_check import longest_rows
from qlora_core.sweep.trial_length import trained_rows
from qlora_core.sweep.worker import SweepWorker
from qlora_core.training.adapter_config import lora_config
from qlora_core.training.batches import labels_of
from qlora_core.training.checkpoint import newest_checkpoint
from qlora_core.training.examples import PairExamples
from qlora_core.training.guard import check_loss
from qlora_core.training.pack.pack import Pack
from qlora_core.training.preference import PairTerms, answers_of, pair_losses, reward_margins
from qlora_core.training.trainer import Trainer
from qlora_core.training.trial import Trial, TrialProgress

Rows = Callable[..., list[TokenRow]]
Pairs = Callable[..., list[PreferenceRow]]
Trials = Callable[..., Trial]

UNLIKE: list[dict[str, Any]] = [
    {"objective": "dpo", "lora_rank": 4},
    {"objective": "dpo", "lora_rank": 16, "dpo_beta": 0.5, "target_modules": ["q_proj", "down_proj"], "seed": 9},
    {"objective": "dpo", "lora_rank": 5, "dpo_label_smoothing": 0.2, "micro_batch_size": 1, "lora_dropout": 0.5},
    {"objective": "dpo", "lora_rank": 6, "use_dora": True, "gradient_accumulation_steps": 1, "max_grad_norm": 1e-2},
    {"objective": "dpo", "lora_rank": 3, "lora_init": "pissa", "optimizer": "sgd", "learning_rate": 0.1},
    {"lora_rank": 8, "lora_dropout": 0.2},
]


# --- the formula


def test_pair_losses_are_equation_7_with_smoothed_labels() -> None:
    generator = torch.Generator().manual_seed(0)
    log_probs, reference = (-50 * torch.rand((6, 2), generator=generator, dtype=torch.float64) for _ in range(2))
    for beta, smoothing in ((0.1, 0.0), (0.5, 0.0), (0.1, 0.3)):
        terms = PairTerms(reference, beta, smoothing)
        for place in range(6):
            # As TRL writes it: the difference of the policy's log-ratio and the reference's
            ratio = (log_probs[place, 0] - log_probs[place, 1]) - (reference[place, 0] - reference[place, 1])
            smoothed = -logsigmoid(beta * ratio) * (1 - smoothing) - logsigmoid(-beta * ratio) * smoothing
            assert pair_losses(log_probs, terms)[place].item() == pytest.approx(smoothed.item(), rel=1e-12)
            assert reward_margins(log_probs, terms)[place].item() == pytest.approx(beta * ratio.item(), rel=1e-12)
    assert pair_losses(reference, PairTerms(reference, 0.1, 0.2)).tolist() == pytest.approx([math.log(2)] * 6)


@pytest.mark.parametrize("end_to_end", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.25])
def test_loss_and_gradients_are_those_of_two_passes_of_peft(
    base64: PreTrainedModel, pairs: Pairs, trial: Trials, smoothing: float, end_to_end: bool
) -> None:
    params = trial(objective="dpo", dpo_beta=0.3, dpo_label_smoothing=smoothing, lora_dropout=0.0).params
    reference = get_peft_model(copy.deepcopy(base64), lora_config(base64, params)).double().eval()
    pack = Pack(base64)
    pack.end_to_end = end_to_end
    slot = pack.fill(lora_config(base64, params), seed=3)
    mine, theirs = dict(pack.weights(slot).named()), _peft_weights(reference)
    generator = torch.Generator().manual_seed(0)
    for name in mine:
        fresh = 0.1 * torch.randn(mine[name].shape, generator=generator, dtype=torch.float64)
        mine[name].data.copy_(fresh)
        theirs[name].data.copy_(fresh)
    batch = pairs(5, seed=4)
    examples = PairExamples(batch, pack)
    found = 0.0
    for first, places in ((0, [0, 1, 2]), (3, [3, 4])):
        (loss_sum,) = pack.backward([examples.part(places, slot, first, 0, params)], [examples.weight([0, 1, 2, 3, 4])])
        found += loss_sum.item() / 5
    expected = torch.stack([_peft_pair_loss(reference, pair, 0.3, smoothing) for pair in batch]).mean()
    expected.backward()
    # transformers keeps norms and rotary tables in float32, so different batches agree to about 1e-8
    assert found == pytest.approx(expected.item(), rel=1e-6)
    for name, value in mine.items():
        wanted = theirs[name].grad
        assert value.grad is not None and wanted is not None and wanted.norm() > 0
        assert (value.grad - wanted).norm() <= 1e-5 * wanted.norm()


def _peft_weights(model: Any) -> dict[str, torch.nn.Parameter]:
    return {name.replace(".default", ""): value for name, value in model.named_parameters() if value.requires_grad}


def _peft_pair_loss(model: Any, pair: PreferenceRow, beta: float, smoothing: float) -> torch.Tensor:
    better, worse = (_log_prob(model, answer) for answer in answers_of(pair))
    with model.disable_adapter(), torch.no_grad():
        base_better, base_worse = (_log_prob(model, answer) for answer in answers_of(pair))
    margin = beta * ((better - base_better) - (worse - base_worse))
    return -(1 - smoothing) * torch.log(torch.sigmoid(margin)) - smoothing * torch.log(torch.sigmoid(-margin))


def _log_prob(model: Any, row: TokenRow) -> torch.Tensor:
    places, labels = zip(*labels_of(row), strict=True)
    log_probs = model(input_ids=torch.tensor([row.input_ids])).logits[0].log_softmax(dim=-1)
    return log_probs[list(places), list(labels)].sum()


# --- packs


def _run(base: PreTrainedModel, pairs: Pairs, folder: Path, trials: list[Trial]) -> list[TrialProgress]:
    return Trainer(base, pairs(26, seed=1), pairs(5, seed=2), folder).run(trials, None)


def _weights(folder: Path, trial: Trial) -> dict[str, torch.Tensor]:
    newest = newest_checkpoint(folder / trial.id)
    assert newest is not None
    return newest.adapter()


def test_preference_and_example_trials_in_one_pack_equal_separate_runs_in_float64(
    base64: PreTrainedModel, pairs: Pairs, trial: Trials, tmp_path: Path
) -> None:
    trials = [trial(f"t{number}", max_steps=12, **own) for number, own in enumerate(UNLIKE)]
    together = _run(base64, pairs, tmp_path / "pack", trials)
    assert [progress.error for progress in together] == [None] * len(UNLIKE)
    for one, progress in zip(trials, together, strict=True):
        (alone,) = _run(base64, pairs, tmp_path / "alone", [one])
        packed, own = _weights(tmp_path / "pack", one), _weights(tmp_path / "alone", one)
        assert max((packed[name] - own[name]).abs().max().item() for name in own) < 1e-10
        assert max(abs(a["loss"] - b["loss"]) for a, b in zip(progress.curve, alone.curve, strict=True)) < 1e-10
        assert progress.curve[0]["loss"] != progress.curve[-1]["loss"]
        assert progress.reward_accuracy == alone.reward_accuracy
        assert (progress.reward_accuracy is None) == (one.params.objective == "sft")


def test_losses_in_float32_agree_within_rounding(
    base: PreTrainedModel, pairs: Pairs, trial: Trials, tmp_path: Path
) -> None:
    trials = [trial(f"t{number}", max_steps=6, **own) for number, own in enumerate(UNLIKE)]
    together = _run(base, pairs, tmp_path / "pack", trials)
    for one, progress in zip(trials, together, strict=True):
        (alone,) = _run(base, pairs, tmp_path / "alone", [one])
        assert max(abs(a["loss"] - b["loss"]) for a, b in zip(progress.curve, alone.curve, strict=True)) < 5e-5


# --- a trial


def test_training_starts_at_ln_2_and_learns_to_prefer(
    base: PreTrainedModel, pairs: Pairs, trial: Trials, tmp_path: Path
) -> None:
    trainer = Trainer(base, pairs(40, seed=1), pairs(12, seed=2), tmp_path)
    one = trial(objective="dpo", max_steps=30, checkpoint_every_steps=30, lora_dropout=0.0, dpo_beta=0.5)
    (progress,) = trainer.run([one], None)
    assert progress.curve[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert progress.validation_loss is not None and progress.validation_loss < 0.4
    assert progress.reward_accuracy == 1.0
    assert progress.tokens == sum(entry["tokens"] for entry in progress.curve)
    (untrained,) = Trainer(base, pairs(40, seed=1), pairs(12, seed=2), tmp_path / "none").run(
        [trial(objective="dpo", max_steps=1, learning_rate=1e-12)], None
    )
    assert untrained.validation_loss == pytest.approx(math.log(2), abs=1e-6)


def test_segments_are_one_run_bit_for_bit_and_export_to_stock_peft(
    base: PreTrainedModel, nf4_folder: Path, pairs: Pairs, trial: Trials, tmp_path: Path
) -> None:
    one = trial(objective="dpo", lora_dropout=0.3)
    whole = Trainer(base, pairs(26, seed=1), pairs(5, seed=2), tmp_path / "whole")
    whole.run([one], None)
    for until in (2, 5, None):  # a new trainer each time: what it knew of the reference is gone
        parts = Trainer(base, pairs(26, seed=1), pairs(5, seed=2), tmp_path / "parts")
        (progress,) = parts.run([one], until)
    assert progress.step == 8
    first, second = _weights(tmp_path / "whole", one), _weights(tmp_path / "parts", one)
    assert all(torch.equal(first[name], second[name]) for name in first)
    whole.export(one, tmp_path / "out")
    model = PeftModel.from_pretrained(load_quantized(nf4_folder), tmp_path / "out")
    assert verify_golden(model, tmp_path / "out", atol=1e-5) < 1e-5
    assert len(read_golden(tmp_path / "out").prompts) == 3


def test_the_base_is_asked_once_for_each_pair(
    base: PreTrainedModel, pairs: Pairs, trial: Trials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def count(pack: Pack, rows: tuple[TokenRow, ...]) -> torch.Tensor:
        asked.extend(row.id for row in rows)
        return real(pack, rows)

    real = Pack.base_log_probs
    monkeypatch.setattr(Pack, "base_log_probs", count)
    trials = [trial(f"t{number}", objective="dpo", max_steps=None, epochs=3, seed=number) for number in range(3)]
    Trainer(base, pairs(13, seed=1), pairs(2), tmp_path).run(trials, None)
    assert len(asked) == 2 * 13 and len(set(asked)) == 13


def _curated(folder: Path, train: list[PreferenceRow], validation: list[PreferenceRow]) -> Path:
    folder.mkdir()
    names = ("id", "input_ids", "loss_mask", "rejected_ids", "rejected_mask")
    for split, rows in (("train", train), ("validation", validation)):
        table = pa.table({name: [getattr(row, name) for row in rows] for name in names})
        pq.write_table(table, folder / shard_name(split, 0, 1))
    return folder


def test_a_sweeps_worker_trains_on_the_pairs_that_curation_wrote(
    nf4_folder: Path, base: PreTrainedModel, pairs: Pairs, trial: Trials, tmp_path: Path
) -> None:
    curated = _curated(tmp_path / "curated", pairs(9, seed=1), pairs(3, seed=2))
    worker = SweepWorker(str(nf4_folder), str(curated), str(tmp_path / "work"), "float32")
    worker.load()
    trials = [trial(f"t{number}", objective="dpo", max_steps=4, seed=number) for number in range(2)]
    found = worker.run([{"id": one.id, "params": one.params.model_dump()} for one in trials], [4, 4])
    expected = Trainer(base, pairs(9, seed=1), pairs(3, seed=2), tmp_path / "own").run(trials, None)
    assert [one["error"] for one in found] == [None, None]
    for one, own in zip(found, expected, strict=True):
        assert (one["validation_loss"], one["reward_accuracy"]) == (own.validation_loss, own.reward_accuracy)
    assert worker.export({"id": "t0", "params": trials[0].params.model_dump()}, str(tmp_path / "out"))


def test_a_sweep_counts_pairs_and_their_tokens(pairs: Pairs, tmp_path: Path) -> None:
    some = pairs(9, seed=1)
    curated = _curated(tmp_path / "curated", some, pairs(3, seed=2))
    assert trained_rows(curated, "dpo").count == trained_rows(curated, "sft").count == 9
    longest = max(len(pair.input_ids) + len(pair.rejected_ids) for pair in some)
    assert longest_rows(curated, pairs=True)[0] == longest > longest_rows(curated)[0]
    path = curated / shard_name("train", 0, 1)
    pq.write_table(pq.read_table(path).drop_columns(["rejected_ids", "rejected_mask"]), path)
    with pytest.raises(DataError, match=r"train\.objective dpo needs: curate again"):
        trained_rows(curated, "dpo")
    with pytest.raises(ValueError, match="losses of different objectives cannot be compared"):
        SweepConfig(space={"objective": ["sft", "dpo"]})


# --- refusals


def test_data_without_pairs_is_refused_and_other_trials_go_on(
    base: PreTrainedModel, rows: Rows, pairs: Pairs, trial: Trials, tmp_path: Path
) -> None:
    trials = [trial("pairs", objective="dpo"), trial("examples", max_steps=2)]
    refused, trained = Trainer(base, rows(6, seed=1), pairs(3), tmp_path / "a").run(trials, None)
    assert refused.error is not None and trained.error is None
    assert "none of the 6 training rows is a preference pair: the rejected answer is missing" in refused.error
    (refused,) = Trainer(base, pairs(6, seed=1), rows(3), tmp_path / "b").run(trials[:1], None)
    assert refused.error is not None and "none of the 3 validation rows" in refused.error


def test_rows_without_a_pair_are_left_out_and_counted(
    base: PreTrainedModel, rows: Rows, pairs: Pairs, trial: Trials, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    untrained = PreferenceRow("u", [1, 2, 3], [False, True, True], [1, 4], [False, False])
    mixed = [*pairs(5, seed=1), *rows(4, seed=3), untrained]
    (progress,) = Trainer(base, mixed, pairs(3), tmp_path).run(
        [trial(objective="dpo", max_steps=None, epochs=1, micro_batch_size=1, gradient_accumulation_steps=1)], None
    )
    assert (progress.error, progress.step) == (None, 5)
    assert "5 of 10 training rows are no preference pairs and are left out" in caplog.text


def test_a_worse_answer_that_the_base_cannot_take_is_refused(base: PreTrainedModel, tmp_path: Path) -> None:
    good = PreferenceRow("good", [1, 2, 3], [False, True, True], [1, 4], [False, True])
    for ids, said in (([1] * 49, "has 49 tokens, more than the base model's 48 positions"), ([1, 96], "ids 1 to 96")):
        bad = PreferenceRow("bad", [1, 2, 3], [False, True, True], ids, [False, *[True] * (len(ids) - 1)])
        with pytest.raises(TrainingError, match=said):
            Trainer(base, [good, bad], [good], tmp_path)


def test_other_worse_answers_are_other_training_data(
    base: PreTrainedModel, pairs: Pairs, trial: Trials, tmp_path: Path
) -> None:
    one, rows = trial(objective="dpo"), pairs(6, seed=1)
    Trainer(base, rows, pairs(2), tmp_path).run([one], 2)
    other = [PreferenceRow(row.id, row.input_ids, row.loss_mask, row.input_ids, row.loss_mask) for row in rows]
    (refused,) = Trainer(base, other, pairs(2), tmp_path).run([one], 4)
    assert refused.error is not None and "belongs to another training: training data is" in refused.error


def test_a_hard_batch_among_easy_pairs_is_no_spike_and_a_jump_is() -> None:
    easy, pairs, examples = [0.01] * 20, TrainConfig(objective="dpo"), TrainConfig()
    check_loss(0.5, easy, pairs, 21, ["row"])
    with pytest.raises(NumericError, match=r"more than train\.spike_factor"):
        check_loss(7.0, easy, pairs, 21, ["row"])
    with pytest.raises(NumericError, match=r"more than train\.spike_factor"):
        check_loss(0.5, easy, examples, 21, ["row"])
