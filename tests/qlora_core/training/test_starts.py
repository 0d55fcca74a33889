"""Where an adapter begins and which layers it is put on: LoftQ from the original base, layers by a gradient probe."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from qlora_core.data.dataset import PreferenceRow, TokenRow
from qlora_core.data.shards import shard_name
from qlora_core.errors import TrainingError
from qlora_core.model.adapter import read_golden, verify_golden
from qlora_core.model.adapter_set import NamedAdapter, attached_adapters
from qlora_core.model.base import load_quantized
from qlora_core.model.dense_weight import dense_weight
from qlora_core.sweep.worker import SweepWorker
from qlora_core.training.adapter_config import lora_config
from qlora_core.training.batches import labels_of, trained_tokens
from qlora_core.training.checkpoint import newest_checkpoint
from qlora_core.training.examples import TokenExamples
from qlora_core.training.original_weights import OriginalWeights
from qlora_core.training.pack.pack import Pack, linear_names
from qlora_core.training.sensitivity import PROBE_EXAMPLES, PROBE_RANK, sensitive_modules
from qlora_core.training.trainer import Trainer
from qlora_core.training.trial import Trial

Rows = Callable[..., list[TokenRow]]
Pairs = Callable[..., list[PreferenceRow]]
Trials = Callable[..., Trial]


@pytest.fixture(scope="session")
def original(nf4_folder: Path) -> Path:
    """The checkpoint that the NF4 base was made from, with the file of a tokenizer beside it."""
    folder = nf4_folder.parent / "plain"
    (folder / "tokenizer.json").write_text("{}")
    return folder


# --- LoftQ


def test_the_start_is_the_best_approximation_of_what_quantization_took(
    base: PreTrainedModel, original: Path, trial: Trials
) -> None:
    weights = load_file(original / "model.safetensors")
    params = trial(lora_init="loftq", lora_rank=6, lora_alpha=15.0, rank_pattern={"down_proj": 3}).params
    pack = Pack(base)
    slot = pack.fill(lora_config(base, params), seed=3, residuals=OriginalWeights(original))
    for name, factors in pack.weights(slot).factors.items():
        module = base.get_submodule(name).base_layer
        assert isinstance(module, torch.nn.Module)
        residual = (weights[f"{name}.weight"].double() - dense_weight(module).double()).float()
        u, s, vh = torch.linalg.svd(residual, full_matrices=False)
        rank = 3 if name.endswith("down_proj") else 6
        expected = u[:, :rank] @ torch.diag(s[:rank]) @ vh[:rank]
        delta = factors.scale * (factors.b @ factors.a)
        assert (delta - expected).norm() <= 1e-4 * expected.norm()
        assert (residual - delta).norm() < residual.norm()


def test_with_the_whole_rank_the_base_answers_as_before_it_was_quantized(
    base: PreTrainedModel, original: Path, trial: Trials
) -> None:
    plain, ids = LlamaForCausalLM.from_pretrained(original).eval(), torch.arange(20)[None]
    pack = Pack(base)
    params = trial(lora_init="loftq", lora_rank=64, lora_alpha=7.0).params
    slot = pack.fill(lora_config(base, params), seed=3, residuals=OriginalWeights(original))
    wanted, quantized = plain(input_ids=ids).logits, base(input_ids=ids).logits
    with pack.only(slot):
        begun = base(input_ids=ids).logits
    assert (quantized - wanted).norm() > 1e-2 * wanted.norm()
    assert (begun - wanted).norm() < 1e-4 * wanted.norm()


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "lora_alpha": 3.0}, {"use_dora": True}])
def test_an_adapter_that_began_so_is_plain_lora_over_the_stored_base(
    base: PreTrainedModel,
    nf4_folder: Path,
    original: Path,
    rows: Rows,
    trial: Trials,
    tmp_path: Path,
    settings: dict[str, Any],
) -> None:
    trainer = Trainer(base, rows(8, seed=1), rows(2), tmp_path / "work", original=original)
    one = trial(max_steps=2, lora_init="loftq", **settings)
    (progress,) = trainer.run([one], None)
    assert progress.error is None
    trainer.export(one, tmp_path / "out")
    stored = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (stored["r"], stored["init_lora_weights"], stored["loftq_config"]) == (4, True, {})
    clean = load_quantized(nf4_folder)
    assert verify_golden(PeftModel.from_pretrained(clean, tmp_path / "out"), tmp_path / "out", atol=1e-4) < 1e-4


def test_another_checkpoint_or_none_is_refused(
    base: PreTrainedModel, original: Path, rows: Rows, trial: Trials, tmp_path: Path
) -> None:
    config = LlamaConfig.from_pretrained(original)
    with torch.random.fork_rng():
        torch.manual_seed(99)
        LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
        config.hidden_size = 32
        LlamaForCausalLM(config).save_pretrained(tmp_path / "smaller")
    for folder in ("other", "smaller"):
        (tmp_path / folder / "tokenizer.json").write_text("{}")
    for folder, said in (
        (tmp_path / "other", "of its norm away from the base's, more than quantization does"),
        (tmp_path / "smaller", r"is \(.*\) in .*smaller and .* in the base"),
        (tmp_path / "nowhere", "train.lora_init loftq needs the unquantized base: .*nowhere"),
        (None, "train.lora_init loftq needs the unquantized weights"),
    ):
        trainer = Trainer(base, rows(8, seed=1), rows(2), tmp_path / "work", original=folder)
        refused, trained = trainer.run([trial("a", lora_init="loftq"), trial("b", max_steps=1)], None)
        assert refused.error is not None and trained.error is None
        with pytest.raises(TrainingError, match=said):
            trainer.export(trial("a", lora_init="loftq"), tmp_path / "out")


def test_a_sweeps_worker_finds_the_original_where_it_is_told(
    nf4_folder: Path, original: Path, rows: Rows, trial: Trials, tmp_path: Path
) -> None:
    for split, some in (("train", rows(8, seed=1)), ("validation", rows(2, seed=2))):
        columns = {name: [getattr(row, name) for row in some] for name in ("id", "input_ids", "loss_mask")}
        pq.write_table(pa.table(columns), tmp_path / shard_name(split, 0, 1))
    one = trial(max_steps=2, lora_init="loftq")
    errors = []
    for name, folder in (("with", str(original)), ("without", None)):
        worker = SweepWorker(str(nf4_folder), str(tmp_path), str(tmp_path / name), "float32", original_folder=folder)
        worker.load()
        (progress,) = worker.run([{"id": one.id, "params": one.params.model_dump()}], [2])
        errors.append(progress["error"])
    assert errors[0] is None and "needs the unquantized weights" in errors[1]


# --- layers by sensitivity


def test_the_probe_finds_the_layers_that_a_plain_backward_pass_finds(
    base64: PreTrainedModel, rows: Rows, trial: Trials
) -> None:
    batch = rows(5, seed=3)  # fewer than the probe takes, so it takes all
    params = trial(seed=4, sensitive_layers=5).params
    reference = get_peft_model(
        copy.deepcopy(base64), LoraConfig(r=PROBE_RANK, lora_alpha=PROBE_RANK, target_modules="all-linear")
    )
    pack = Pack(base64)
    slot = pack.fill(LoraConfig(r=PROBE_RANK, lora_alpha=PROBE_RANK, target_modules=["q_proj", "k_proj", "v_proj",
                     "o_proj", "up_proj", "gate_proj", "down_proj"]), params.seed)  # fmt: skip
    for name, factors in pack.weights(slot).factors.items():
        layer: Any = reference.get_submodule(f"base_model.model.{name}")
        layer.lora_A["default"].weight.data = factors.a.detach().clone()
        layer.lora_B["default"].weight.data = factors.b.detach().clone()
    pack.free(slot)
    total = torch.zeros((), dtype=torch.float64)
    for row in batch:
        places, labels = zip(*labels_of(row), strict=True)
        logits = reference(input_ids=torch.tensor([row.input_ids])).logits[0, list(places)]
        total = total + cross_entropy(logits, torch.tensor(labels), reduction="sum")
    (total / sum(trained_tokens(row) for row in batch)).backward()
    norms = {
        name.removeprefix("base_model.model.").removesuffix(".lora_B.default.weight"): value.grad.norm().item()
        for name, value in reference.named_parameters()
        if "lora_B" in name and value.grad is not None
    }
    expected = sorted(sorted(norms, key=lambda name: -norms[name])[:5])
    assert len(norms) == 14
    assert sensitive_modules(pack, params, TokenExamples(batch)) == expected


def test_the_choice_depends_on_the_seed_and_the_rows_and_on_no_neighbour(
    base64: PreTrainedModel, rows: Rows, trial: Trials
) -> None:
    examples = TokenExamples(rows(3 * PROBE_EXAMPLES, seed=3))
    pack = Pack(base64)
    params = trial(sensitive_layers=4, target_modules=["q_proj", "v_proj", "down_proj"]).params
    alone = sensitive_modules(pack, params, examples)
    assert len(alone) == 4 and set(alone) < set(linear_names(base64))
    assert all(name.endswith(("q_proj", "v_proj", "down_proj")) for name in alone)
    neighbour = pack.fill(lora_config(base64, trial().params), 1)
    pack.weights(neighbour).flat()["b"].data.fill_(0.3)
    other = params.model_copy(update={"lora_rank": 32, "lora_alpha": 99.0, "lora_dropout": 0.7, "micro_batch_size": 1})
    assert sensitive_modules(pack, other, examples) == alone
    gradient = pack.weights(neighbour).flat()["b"].grad
    assert gradient is not None and not gradient.any()
    pack.free(neighbour)
    assert not any("base_layer" in name for name, _ in base64.named_modules())
    wide = trial(sensitive_layers=7).params
    choices = {tuple(sensitive_modules(pack, wide.model_copy(update={"seed": seed}), examples)) for seed in range(12)}
    assert len(choices) > 1


def test_chosen_layers_are_trained_alone_named_in_the_export_and_kept_by_a_resume(
    base: PreTrainedModel,
    nf4_folder: Path,
    pairs: Pairs,
    trial: Trials,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    probes: list[int] = []

    def count(pack: Pack, params: Any, examples: Any) -> list[str]:
        probes.append(params.seed)
        return sensitive_modules(pack, params, examples)

    monkeypatch.setattr("qlora_core.training.trainer.sensitive_modules", count)
    trials = [
        trial("few", sensitive_layers=3, rank_pattern={"down_proj": 2}),
        trial("pairs", sensitive_layers=2, objective="dpo"),
        trial("all"),
    ]
    first = Trainer(base, pairs(26, seed=1), pairs(5, seed=2), tmp_path / "work")
    assert [progress.error for progress in first.run(trials, 3)] == [None] * 3
    second = Trainer(base, pairs(26, seed=1), pairs(5, seed=2), tmp_path / "work")
    assert [progress.step for progress in second.run(trials, None)] == [8] * 3
    assert len(probes) == 2
    for one in trials[:2]:
        second.export(one, tmp_path / one.id)
        newest = newest_checkpoint(tmp_path / "work" / one.id)
        assert newest is not None
        count_of = one.params.sensitive_layers or 0
        assert len(newest.adapter()) == 2 * count_of
        stored = json.loads((tmp_path / one.id / "adapter_config.json").read_text())
        assert len(stored["target_modules"]) == count_of
        assert set(stored["target_modules"]) < set(linear_names(base))
        golden = read_golden(tmp_path / one.id)
        fresh = load_quantized(nf4_folder)
        with attached_adapters(fresh, [NamedAdapter("x", tmp_path / one.id)]):
            pass
        model = PeftModel.from_pretrained(fresh, tmp_path / one.id)
        assert verify_golden(model, tmp_path / one.id, atol=1e-4) < 1e-4 and len(golden.prompts) == 3


def test_more_layers_than_there_are_is_refused(
    base: PreTrainedModel, rows: Rows, trial: Trials, tmp_path: Path
) -> None:
    (refused,) = Trainer(base, rows(8, seed=1), rows(2), tmp_path).run(
        [trial(sensitive_layers=5, target_modules=["q_proj", "v_proj"])], None
    )
    assert refused.error is not None
    assert "train.sensitive_layers is 5, but train.target_modules match 4 linear layers" in refused.error
