"""T5 as a family: packs over an encoder and a decoder against each adapter alone and against PEFT, and the export."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from peft import PeftModel, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import BitsAndBytesConfig, PreTrainedModel, T5Config, T5ForConditionalGeneration

from qlora_core.data.dataset import PreferenceRow, TokenRow
from qlora_core.errors import ModelError, TrainingError
from qlora_core.model.adapter import golden_logits, read_golden, verify_golden
from qlora_core.model.adapter_set import NamedAdapter, attached_adapters
from qlora_core.model.encoder_decoder import answer_start, encoder_decoder_inputs
from qlora_core.model.loss import sequence_losses
from qlora_core.training.adapter_config import lora_config
from qlora_core.training.batches import trained_tokens
from qlora_core.training.checkpoint import newest_checkpoint
from qlora_core.training.checkpointing import recomputed_activations
from qlora_core.training.pack.layout import Part
from qlora_core.training.pack.pack import Pack
from qlora_core.training.trainer import Trainer
from qlora_core.training.trial import Trial

Rows = Callable[..., list[TokenRow]]
Pairs = Callable[..., list[PreferenceRow]]
Trials = Callable[..., Trial]

KINDS: dict[str, dict[str, Any]] = {
    "t5": {},
    "t5 1.1, gated and untied": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}


def _t5(dtype: torch.dtype = torch.float64, **settings: Any) -> PreTrainedModel:
    sizes: dict[str, Any] = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    sizes |= {"decoder_start_token_id": 0, **settings}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = T5ForConditionalGeneration(T5Config(**sizes))
    return (model.double() if dtype == torch.float64 else model).eval().requires_grad_(False)


def _randomize(parameters: dict[str, torch.nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(10)
    for name in sorted(parameters):
        values = 0.1 * torch.randn(parameters[name].shape, generator=generator, dtype=torch.float64)
        parameters[name].data.copy_(values + ("magnitude" in name))


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None and parameter.grad.abs().max() > 0
    return parameter.grad.clone()


@pytest.mark.parametrize("kind", KINDS)
def test_a_pack_computes_what_each_adapter_alone_computes(kind: str, rows: Rows, trial: Trials) -> None:
    base = _t5(**KINDS[kind])
    settings: list[dict[str, Any]] = [{"lora_rank": 2}, {"lora_rank": 3, "lora_dropout": 0.4}, {"use_dora": True}]
    params = [trial(seed=number, **own).params for number, own in enumerate(settings)]
    parts = [Part(number, rows(2 + number, seed=number, shortest=5 + 4 * number), 0, 4) for number in range(3)]
    counts = [sum(trained_tokens(row) for row in part.rows) for part in parts]
    together = Pack(base)
    assert not together.end_to_end
    for own in params:
        _randomize(dict(together.weights(together.fill(lora_config(base, own), own.seed)).named()))
    sums = together.backward(parts, counts)
    found = [{n: _gradient(p) for n, p in together.weights(slot).flat().items()} for slot in range(3)]
    for slot in range(3):
        together.free(slot)
    for number, own in enumerate(params):
        alone = Pack(base)
        slot = alone.fill(lora_config(base, own), own.seed)
        _randomize(dict(alone.weights(slot).named()))
        # and row by row, so that nothing is padded
        expected = sum(
            alone.backward([Part(slot, [row], place, 4)], [counts[number]]).item()
            for place, row in enumerate(parts[number].rows)
        )
        assert sums[number].item() == pytest.approx(expected, rel=1e-6)  # norms are float32 inside transformers
        for name, parameter in alone.weights(slot).flat().items():
            assert (found[number][name] - _gradient(parameter)).norm() <= 1e-5 * _gradient(parameter).norm()
        alone.free(slot)


def test_prompts_of_one_length_and_answers_of_that_length_too_are_told_apart(trial: Trials) -> None:
    base, mask = _t5(), [False] * 4 + [True] * 4
    parts = [Part(slot, [TokenRow("r", [*range(9 + slot, 17 + slot)], mask)], 0, 0) for slot in range(2)]
    pack = Pack(base)
    slots = [pack.fill(lora_config(base, trial().params), seed) for seed in range(2)]
    for slot in slots:
        _randomize(dict(pack.weights(slot).named()))
    together = pack.backward(parts, [4, 4])
    alone = [pack.backward([part], [4]).item() for part in parts]
    assert together.tolist() == pytest.approx(alone, rel=1e-9)


@pytest.mark.parametrize("recompute", [False, True])
def test_loss_and_gradients_are_those_of_peft(rows: Rows, trial: Trials, recompute: bool) -> None:
    base = _t5()
    config = lora_config(base, trial(lora_dropout=0.0).params)
    assert config.task_type == "SEQ_2_SEQ_LM" and config.target_modules == {"k", "o", "q", "v", "wi", "wo"}
    reference = get_peft_model(copy.deepcopy(base), config).double().eval()
    pack = Pack(base)
    mine = dict(pack.weights(pack.fill(config, seed=3)).named())
    theirs = {n.replace(".default", ""): p for n, p in reference.named_parameters() if p.requires_grad}
    assert theirs.keys() == mine.keys()
    _randomize(mine)
    _randomize(theirs)
    batch = rows(4, seed=5)
    tokens = sum(trained_tokens(row) for row in batch)
    with recomputed_activations(base, wanted=recompute):
        (loss_sum,) = pack.backward([Part(0, batch, 0, 0)], [tokens])
    expected = torch.zeros((), dtype=torch.float64)
    for row in batch:
        start = row.loss_mask.index(True)
        prompt, answer = torch.tensor([row.input_ids[:start]]), torch.tensor([row.input_ids[start:]])
        logits = reference(input_ids=prompt, labels=answer).logits[0]  # shifted right by transformers
        expected = expected + cross_entropy(logits, answer[0], reduction="sum")
    (expected / tokens).backward()
    assert loss_sum.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, value in mine.items():
        assert (_gradient(value) - _gradient(theirs[name])).norm() <= 1e-5 * _gradient(theirs[name]).norm()


def test_later_turns_are_the_decoders_and_keep_their_masks() -> None:
    base = _t5()
    row = TokenRow("two turns", [5, 6, 7, 8, 9, 10, 11], [False, False, True, True, False, False, True])
    assert answer_start(row) == 2
    inputs = encoder_decoder_inputs(base, [row])
    assert inputs["input_ids"].tolist() == [[5, 6]]
    assert inputs["decoder_input_ids"].tolist() == [[0, 7, 8, 9, 10]]
    logits = base(**inputs).logits[0]
    expected = cross_entropy(logits[[0, 1, 4]], torch.tensor([7, 8, 11]), reduction="sum").item()
    pack = Pack(base)
    ((nats, tokens),) = sequence_losses(base, [row], batch_size=1)
    assert (nats, tokens) == (pytest.approx(expected, rel=1e-6), 3)
    assert -pack.base_log_probs([row])[0].item() == pytest.approx(expected, rel=1e-6)


def test_unlike_trials_in_one_pack_equal_separate_runs_and_come_back_from_stock_peft(
    rows: Rows, pairs: Pairs, trial: Trials, tmp_path: Path
) -> None:
    settings: list[dict[str, Any]] = [
        {"lora_rank": 4},
        {"lora_rank": 8, "target_modules": ["q", "wi"], "lora_dropout": 0.5, "micro_batch_size": 1},
        {"objective": "dpo", "seed": 9},
    ]
    trials = [trial(f"t{number}", **own) for number, own in enumerate(settings)]

    def run(folder: Path, some: list[Trial]) -> tuple[Trainer, dict[str, dict[str, torch.Tensor]]]:
        trainer = Trainer(_t5(), pairs(14, seed=1), pairs(5, seed=2), folder)
        for progress in trainer.run(some, None):
            assert progress.error is None
            assert progress.curve[-1]["loss"] < progress.curve[0]["loss"]
        newest = {one.id: newest_checkpoint(folder / one.id) for one in some}
        return trainer, {name: found.adapter() for name, found in newest.items() if found is not None}

    trainer, together = run(tmp_path / "pack", trials)
    for one in trials:
        _, alone = run(tmp_path / one.id, [one])
        assert max((together[one.id][name] - own).abs().max().item() for name, own in alone[one.id].items()) < 1e-10
        out = tmp_path / f"{one.id}-out"
        trainer.export(one, out)  # compares logits with what stock PEFT gives
        assert verify_golden(PeftModel.from_pretrained(_t5(), out), out, atol=1e-6) < 1e-6
        golden, fresh = read_golden(out), _t5()
        without = golden_logits(fresh, golden.prompts)
        with attached_adapters(fresh, [NamedAdapter("x", out)]) as adapters, adapters.rows(["x"]):
            found = golden_logits(fresh, golden.prompts)
        assert max((a - b).abs().max().item() for a, b in zip(found, golden.logits, strict=True)) < 1e-4
        assert all((a - b).abs().max() > 1e-3 for a, b in zip(found, without, strict=True))


def test_what_an_encoder_and_a_decoder_cannot_take_is_refused(rows: Rows, tmp_path: Path) -> None:
    base, train = _t5(), rows(4)
    with pytest.raises(TrainingError, match=r"T5ForConditionalGeneration has an encoder and a decoder.*data\.packing"):
        Trainer(base, train, train, tmp_path, packs=[[row.id for row in train]])
    unprompted = TokenRow("bare", [1, 2], [True, True])
    with pytest.raises(TrainingError, match="'bare' is trained from its first token on"):
        Trainer(base, [*train, unprompted], train, tmp_path)
    base.config.decoder_start_token_id = None
    with pytest.raises(ModelError, match="names no decoder_start_token_id"):
        Trainer(base, train, train, tmp_path)


def test_a_four_bit_t5_is_trained_and_exported(rows: Rows, trial: Trials, tmp_path: Path) -> None:
    _t5(torch.float32, d_model=64, d_kv=16, d_ff=128).save_pretrained(tmp_path / "plain")
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["lm_head", "wo"],  # T5 casts what it hands to wo to the dtype of its weight
    )
    base = T5ForConditionalGeneration.from_pretrained(
        tmp_path / "plain", quantization_config=settings, device_map={"": "cpu"}, dtype=torch.float32
    )
    assert sum(isinstance(module, Linear4bit) for module in base.modules()) == 2 * (4 + 1) + 2 * (8 + 1)
    trainer = Trainer(base.eval(), rows(14, seed=1), rows(4, seed=2), tmp_path / "work")
    (progress,) = trainer.run([one := trial()], None)
    assert progress.error is None and progress.curve[-1]["loss"] < progress.curve[0]["loss"]
    trainer.export(one, tmp_path / "out")  # compares logits with what stock PEFT gives
