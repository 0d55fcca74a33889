"""Training on packed rows: loss and gradients as row by row, no row felt by its neighbour, resumes bit-equal."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from qlora_core.data.dataset import TokenRow
from qlora_core.data.packing import PACKS_FILE, count_packs, pack_rows, read_packs, write_packs
from qlora_core.data.shards import shard_name
from qlora_core.errors import ModelError, TrainingError
from qlora_core.model.base import load_quantized
from qlora_core.model.loss import sequence_losses
from qlora_core.sweep.worker import SweepWorker
from qlora_core.training.adapter_config import lora_config
from qlora_core.training.batches import PackedRow, labels_of, pack, trained_tokens
from qlora_core.training.checkpoint import newest_checkpoint
from qlora_core.training.checkpointing import recomputed_activations
from qlora_core.training.pack.layout import Part, lay_out
from qlora_core.training.pack.pack import Pack
from qlora_core.training.preflight import packed_rows
from qlora_core.training.trainer import Trainer
from qlora_core.training.trial import Trial, TrialProgress

TOKENS = 48

Rows = Callable[..., list[TokenRow]]
Trials = Callable[..., Trial]


@pytest.fixture(scope="module", autouse=True)
def uncompiled() -> Iterator[None]:
    """bitsandbytes' fallback operators as they are: to compile them takes seconds for every shape."""
    with torch.compiler.set_stance("force_eager"):
        yield


def _packs(rows: list[TokenRow], folder: Path) -> list[list[str]]:
    """The rows' sequences, by way of the file that curation writes."""
    ids, lengths = [row.id for row in rows], np.array([len(row.input_ids) for row in rows])
    packs = pack_rows(ids, lengths, np.array([trained_tokens(row) for row in rows]), TOKENS)
    folder.mkdir(exist_ok=True)
    write_packs(folder / PACKS_FILE, packs, ids)
    found = read_packs(folder)
    assert found is not None
    return found


Adapted = tuple[Pack, int]


def _loss_and_gradients(
    adapted: Adapted, rows: list[TokenRow], size: int, *, checkpointing: bool = False
) -> tuple[float, dict[str, torch.Tensor]]:
    adapters, slot = adapted
    for parameter in adapters.weights(slot).flat().values():
        assert parameter.grad is not None
        parameter.grad.zero_()
    tokens = sum(trained_tokens(row) for row in rows)
    nats = 0.0
    with recomputed_activations(adapters.base, wanted=checkpointing):
        for start in range(0, len(rows), size):
            nats += adapters.backward([Part(slot, rows[start : start + size], start, 0)], [tokens]).item()
    return nats / tokens, {name: p.grad.clone() for name, p in adapters.weights(slot).named() if p.grad is not None}


def _adapted(base: PreTrainedModel, trial: Trial, *, end_to_end: bool = True) -> Adapted:
    adapters = Pack(base)
    adapters.end_to_end = adapters.end_to_end and end_to_end
    slot = adapters.fill(lora_config(base, trial.params), seed=1)
    generator = torch.Generator().manual_seed(0)
    for parameter in adapters.weights(slot).flat().values():
        parameter.data.normal_(std=0.1, generator=generator)
    return adapters, slot


@pytest.fixture
def adapter32(base: PreTrainedModel, trial: Trials) -> Adapted:
    return _adapted(base, trial(lora_dropout=0.0))


@pytest.fixture
def adapter64(base64: PreTrainedModel, trial: Trials) -> Adapted:
    return _adapted(base64, trial(lora_dropout=0.0))


@pytest.fixture
def padded64(base64: PreTrainedModel, trial: Trials) -> Adapted:
    """The way of bases whose attention cannot be told where documents end."""
    return _adapted(base64, trial(lora_dropout=0.0), end_to_end=False)


def _run(trainer: Trainer, trial: Trial, until_step: int | None = None) -> TrialProgress:
    (progress,) = trainer.run([trial], until_step)
    return progress


# --- the numbers


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize(("precision", "tolerance"), [("adapter32", 1e-5), ("adapter64", 1e-10), ("padded64", 1e-10)])
def test_packed_and_unpacked_rows_have_one_loss_and_one_gradient(
    request: pytest.FixtureRequest,
    rows: Rows,
    tmp_path: Path,
    precision: str,
    tolerance: float,
    gradient_checkpointing: bool,
) -> None:
    adapter: Adapted = request.getfixturevalue(precision)
    batch = rows(17, seed=3)
    sequences = packed_rows(batch, _packs(batch, tmp_path))
    assert 2 * len(sequences) < len(batch)
    loss, gradients = _loss_and_gradients(adapter, batch, 3)
    packed_loss, packed_gradients = _loss_and_gradients(
        adapter, list(sequences), 2, checkpointing=gradient_checkpointing
    )
    assert packed_loss == pytest.approx(loss, abs=tolerance)
    assert packed_gradients.keys() == gradients.keys() == dict(adapter[0].weights(adapter[1]).named()).keys()
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 50 * tolerance
        torch.testing.assert_close(packed_gradients[name], gradient, rtol=0, atol=tolerance)


def test_control_rows_that_see_each_other_have_another_loss_and_gradient(
    adapter64: Adapted, rows: Rows, tmp_path: Path
) -> None:
    batch = rows(17, seed=3)
    sequences = list(packed_rows(batch, _packs(batch, tmp_path)))
    joined = [TokenRow(row.id, row.input_ids, row.loss_mask) for row in sequences]
    loss, gradients = _loss_and_gradients(adapter64, sequences, 2)
    naive_loss, naive_gradients = _loss_and_gradients(adapter64, joined, 2)
    assert abs(naive_loss - loss) > 1e-3
    assert max((naive_gradients[name] - gradients[name]).abs().max().item() for name in gradients) > 1e-3


def test_another_row_in_the_sequence_changes_neither_loss_nor_gradient(adapter64: Adapted, rows: Rows) -> None:
    first, other, second = rows(3, seed=6, shortest=12, longest=12)

    def muted(row: TokenRow) -> TokenRow:
        return TokenRow(row.id, row.input_ids, [False] * 12)

    kept_loss, kept = _loss_and_gradients(adapter64, [pack([muted(first), second])], 1)
    loss, gradients = _loss_and_gradients(adapter64, [pack([muted(other), second])], 1)
    assert loss == kept_loss
    assert all(torch.equal(gradients[name], kept[name]) for name in kept)


def test_a_packed_loss_is_the_sum_of_its_rows_alone(adapter32: Adapted, rows: Rows) -> None:
    adapters, slot = adapter32
    batch = rows(5, seed=9, longest=12)
    with adapters.only(slot):
        expected = sum(nats for nats, _ in sequence_losses(adapters.base, batch, batch_size=1))
    found = adapters.backward([Part(slot, [pack(batch[:3]), pack(batch[3:])], 0, 0)], [9])
    assert found.item() == pytest.approx(expected, rel=1e-6)


# --- rows and batches


def test_a_rows_first_token_is_no_label_inside_a_sequence_either(base: PreTrainedModel) -> None:
    first = TokenRow("a", [5, 6, 7], [True, False, True])
    second, third = TokenRow("b", [8, 9], [True, True]), TokenRow("c", [3, 4], [False, True])
    joined = pack([first, second])
    assert (joined.row_ids, labels_of(joined), trained_tokens(joined)) == (("a", "b"), [(1, 7), (3, 9)], 2)
    parts = [Part(0, [joined], 0, 0), Part(1, [pack([third])], 4, 2)]
    flat = lay_out(parts, base, end_to_end=True)
    assert flat.inputs["input_ids"].tolist() == [[5, 6, 7, 8, 9, 3, 4]]
    assert flat.inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1]]
    assert flat.inputs["document_lengths"] == (3, 2, 2)
    assert (flat.kept.tolist(), flat.labels.tolist(), flat.bounds) == ([1, 3, 5], [7, 9, 4], ((0, 2), (2, 3)))
    assert [(span.slot, span.start, span.stop, span.step) for span in flat.spans] == [(0, 0, 5, 0), (1, 5, 7, 2)]
    assert (flat.spans[1].tokens.tolist(), flat.spans[1].rows.tolist()) == ([0, 1], [4, 4])
    padded = lay_out(parts, base, end_to_end=False)
    assert padded.inputs["input_ids"].tolist() == [[5, 6, 7, 8, 9], [3, 4, 0, 0, 0]]
    assert padded.inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]
    assert (padded.kept.tolist(), padded.labels.tolist(), padded.bounds) == ([1, 3, 5], [7, 9, 4], ((0, 2), (2, 3)))
    assert [(span.start, span.stop) for span in padded.spans] == [(0, 5), (5, 10)]


def test_packed_rows_are_a_sequence_of_sequences(rows: Rows, tmp_path: Path) -> None:
    batch = rows(9, seed=4)
    packs = _packs(batch, tmp_path)
    sequences = packed_rows(batch, packs)
    assert [list(row.row_ids) for row in sequences if isinstance(row, PackedRow)] == packs
    assert [row.row_ids for row in sequences[1:]] == [tuple(ids) for ids in packs[1:]]
    assert sequences[-1] == sequences[len(packs) - 1]
    with pytest.raises(IndexError):
        sequences[len(packs)]


@pytest.mark.parametrize(
    ("packs", "said"),
    [
        ([["0-0", "0-1"]], r"1 rows are in none or in several \(first: \['0-2'\]\)"),
        ([["0-0", "0-1"], ["0-1", "0-2"]], r"1 rows are in none or in several \(first: \['0-1'\]\)"),
        ([["0-0", "0-1", "0-2", "x"]], "1 ids are of no trainable row"),
        ([["0-0", "0-1", "0-2"], []], "1 sequences are empty"),
    ],
)
def test_sequences_of_other_rows_are_refused(rows: Rows, packs: list[list[str]], said: str) -> None:
    with pytest.raises(TrainingError, match=said):
        packed_rows(rows(3), packs)


# --- the trainer


def test_an_epoch_of_sequences_trains_every_labelled_token_once(
    base: PreTrainedModel, train_rows: list[TokenRow], validation_rows: list[TokenRow], trial: Trials, tmp_path: Path
) -> None:
    packs = _packs(train_rows, tmp_path)
    one = trial(max_steps=None, epochs=1.0, micro_batch_size=2, gradient_accumulation_steps=1)
    progress = _run(Trainer(base, train_rows, validation_rows, tmp_path / "work", packs=packs), one)
    assert progress.total_steps == -(-len(packs) // 2)
    assert progress.tokens == sum(trained_tokens(row) for row in train_rows)


def test_one_step_over_all_rows_is_the_same_packed_or_not(
    base: PreTrainedModel, train_rows: list[TokenRow], validation_rows: list[TokenRow], trial: Trials, tmp_path: Path
) -> None:
    packs = _packs(train_rows, tmp_path)
    whole = {"max_steps": 1, "lora_dropout": 0.0, "gradient_accumulation_steps": 30, "micro_batch_size": 1}
    unpacked = _run(Trainer(base, train_rows, validation_rows, tmp_path / "a"), trial(**whole))
    packed = _run(Trainer(base, train_rows, validation_rows, tmp_path / "b", packs=packs), trial(**whole))
    assert packed.tokens == unpacked.tokens
    for name in ("loss", "grad_norm"):
        assert packed.curve[0][name] == pytest.approx(unpacked.curve[0][name], abs=1e-5)
    assert packed.validation_loss == pytest.approx(unpacked.validation_loss, abs=5e-5)


def test_packed_segments_add_up_to_one_run_bit_for_bit_and_export(
    nf4_folder: Path, train_rows: list[TokenRow], validation_rows: list[TokenRow], trial: Trials, tmp_path: Path
) -> None:
    packs, one = _packs(train_rows, tmp_path), trial(gradient_checkpointing=True, micro_batch_size=2)
    straight = _run(Trainer(load_quantized(nf4_folder), train_rows, validation_rows, tmp_path / "a", packs=packs), one)
    for until in (3, 5, None):
        trainer = Trainer(load_quantized(nf4_folder), train_rows, validation_rows, tmp_path / "b", packs=packs)
        parts = _run(trainer, one, until)
    assert parts.curve == straight.curve
    assert parts.validation_loss == straight.validation_loss
    weights = [newest_checkpoint(tmp_path / name / one.id) for name in ("a", "b")]
    first, second = (checkpoint.adapter() for checkpoint in weights if checkpoint is not None)
    assert all(torch.equal(first[name], second[name]) for name in first)
    trainer.export(one, tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()


def test_a_checkpoint_of_unpacked_training_is_not_taken_for_packed(
    base: PreTrainedModel, train_rows: list[TokenRow], validation_rows: list[TokenRow], trial: Trials, tmp_path: Path
) -> None:
    _run(Trainer(base, train_rows, validation_rows, tmp_path / "work"), trial(), 2)
    packed = Trainer(base, train_rows, validation_rows, tmp_path / "work", packs=_packs(train_rows, tmp_path))
    (progress,) = packed.run([trial()], None)
    assert progress.error is not None
    assert "belongs to another training: packed sequences is None there" in progress.error


def test_rows_without_a_trained_token_are_in_no_sequence(
    base: PreTrainedModel, rows: Rows, validation_rows: list[TokenRow], trial: Trials, tmp_path: Path
) -> None:
    train = [TokenRow("mute", [1, 2, 3], [True, False, False]), *rows(8, seed=1)]
    packs = _packs(train, tmp_path)
    assert "mute" not in {row_id for ids in packs for row_id in ids}
    assert _run(Trainer(base, train, validation_rows, tmp_path / "w", packs=packs), trial(max_steps=1)).step == 1


def test_a_sequence_may_be_longer_than_the_bases_positions_and_a_row_may_not(
    base: PreTrainedModel, rows: Rows, trial: Trials, tmp_path: Path
) -> None:
    fitting = rows(4, seed=1, shortest=30, longest=40)
    packs = [[row.id for row in fitting]]
    assert _run(Trainer(base, fitting, fitting, tmp_path / "a", packs=packs), trial(max_steps=2)).step == 2
    long = rows(2, seed=1, shortest=49, longest=60)
    with pytest.raises(TrainingError, match="more than the base model's 48 positions"):
        Trainer(base, long, fitting, tmp_path / "b", packs=[[row.id for row in long]])


def test_a_base_that_lets_rows_see_each_other_is_refused(rows: Rows, tmp_path: Path) -> None:
    class Deaf(LlamaForCausalLM):
        def forward(self, *inputs: Any, position_ids: Any = None, **options: Any) -> Any:
            ids = options["input_ids"]
            return super().forward(ids, attention_mask=torch.ones_like(ids), position_ids=position_ids)

    sizes: dict[str, Any] = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    base = Deaf(LlamaConfig(**sizes, num_attention_heads=4, initializer_range=0.2)).eval()
    train = rows(4)
    with pytest.raises(ModelError, match="Deaf lets rows that share a sequence see each other"):
        Trainer(base, train, train, tmp_path, packs=[[row.id for row in train]])
    Trainer(base, train, train, tmp_path)


def test_a_sweeps_worker_packs_where_curation_did(
    nf4_folder: Path, train_rows: list[TokenRow], validation_rows: list[TokenRow], trial: Trials, tmp_path: Path
) -> None:
    curated = tmp_path / "curated"
    _packs(train_rows, curated)
    for split, rows in (("train", train_rows), ("validation", validation_rows)):
        columns = {name: [getattr(row, name) for row in rows] for name in ("id", "input_ids", "loss_mask")}
        pq.write_table(pa.table(columns), curated / shard_name(split, 0, 1))
    one = trial(max_steps=None, epochs=1.0, micro_batch_size=1, gradient_accumulation_steps=2)
    order = {"id": one.id, "params": one.params.model_dump()}

    def epoch(name: str) -> dict[str, Any]:
        worker = SweepWorker(str(nf4_folder), str(curated), str(tmp_path / name), "float32")
        worker.load()
        (progress,) = worker.run([order], [1000])
        return progress

    sequences = count_packs(curated)
    assert sequences is not None and 2 * sequences < len(train_rows)
    packed = epoch("packed")
    (curated / PACKS_FILE).unlink()
    unpacked = epoch("unpacked")
    assert (packed["total_steps"], unpacked["total_steps"]) == (-(-sequences // 2), 13)
    assert packed["tokens"] == unpacked["tokens"]
