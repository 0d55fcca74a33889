"""Which setting re-runs which stages: every field of the config is listed, so that a new one cannot be forgotten."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from qlora_core.config.load import load_config
from qlora_core.config.pipeline import PipelineConfig
from qlora_core.config.section import Section
from qlora_core.errors import ConfigError
from qlora_core.evaluation.vote.ballots import BallotBox
from qlora_core.evaluation.vote.pairs import Pair
from qlora_core.pipeline.pipeline import Pipeline

# A field: another value for it, and the first stage that must run again (None: nothing does).
FIELDS: dict[str, tuple[Any, str | None]] = {
    "data.sources": (["other"], "curate"),
    "data.split.validation": (0.2, "curate"),
    "data.split.test": (0.2, "curate"),
    "data.split.salt": ("other", "curate"),
    "data.split.earlier": ("earlier", "curate"),
    "data.readers.oasst": ("best_replies", "curate"),
    "data.readers.max_row_mb": (1.0, "curate"),
    "data.tags.language": (False, "curate"),
    "data.tags.languages": (["en"], "curate"),
    "data.tags.min_language_letters": (9, "curate"),
    "data.tags.min_language_confidence": (0.5, "curate"),
    "data.tags.personal_data": (False, "curate"),
    "data.tags.allow": ([".*@example[.]org"], "curate"),
    "data.tags.model_scores": (True, "curate"),
    "data.tags.plugins": (["json:dumps"], "curate"),
    "data.policy.languages": (["en"], "curate"),
    "data.policy.undetermined_language": ("drop", "curate"),
    "data.policy.licence": ("commercial", "curate"),
    "data.policy.personal_data": ("redact", "curate"),
    "data.policy.secrets": ("keep", "curate"),
    "data.policy.injection": ("keep", "curate"),
    "data.policy.truncated": ("drop", "curate"),
    "data.policy.repeated_turns": ("drop", "curate"),
    "data.policy.refusals": ("drop", "curate"),
    "data.policy.placeholders": ("drop", "curate"),
    "data.policy.mojibake": ("drop", "curate"),
    "data.policy.scores": ({"answer_words": {"min": 2}}, "curate"),
    "data.near_duplicates.action": ("report", "curate"),
    "data.near_duplicates.threshold": (0.7, "curate"),
    "data.near_duplicates.shingle_words": (3, "curate"),
    "data.near_duplicates.permutations": (64, "curate"),
    "data.near_duplicates.seed": (1, "curate"),
    "data.decontaminate.action": ("report", "curate"),
    "data.decontaminate.ngram_words": (8, "curate"),
    "data.decontaminate.min_coverage": (0.5, "curate"),
    "data.decontaminate.max_ngram_items": (5, "curate"),
    "data.decontaminate.min_exact_words": (2, "curate"),
    "data.selection.budget_rows": (10, "curate"),
    "data.selection.clusters": (4, "curate"),
    "data.selection.quality": ("answer_words", "curate"),
    "data.selection.prefer": ("low", "curate"),
    "data.selection.train_on": ("control", "curate"),
    "data.selection.seed": (1, "curate"),
    "data.packing.enabled": (True, "curate"),
    "data.packing.tokens": (600, "curate"),
    "data.shard_rows": (50, "curate"),
    "data.chat_template": ("template.jinja", "curate"),
    "data.max_tokens": (64, "curate"),
    "data.over_long": ("cut", "curate"),
    "data.max_quarantined_share": (0.5, "curate"),
    "base.model": ("other-base", "curate"),
    "base.revision": ("0" * 40, None),
    "quantize.type": ("fp4", "quantize"),
    "quantize.blocksize": (128, "quantize"),
    "quantize.double_quant": (False, "quantize"),
    "quantize.skip_modules": (["lm_head", "q_proj"], "quantize"),
    "quantize.max_shard_bytes": (1_000_000_000, "quantize"),
    "quantize.quality_text": ("text.txt", "quantize"),
    "train.start_from": ("start", "sweep"),
    "train.start_as": ("parent", "sweep"),
    "train.lora_rank": (8, "sweep"),
    "train.lora_alpha": (32.0, "sweep"),
    "train.lora_dropout": (0.0, "sweep"),
    "train.target_modules": (["q_proj"], "sweep"),
    "train.learning_rate": (1e-4, "sweep"),
    "train.schedule": ("cosine", "sweep"),
    "train.warmup_ratio": (0.1, "sweep"),
    "train.epochs": (1.0, "sweep"),
    "train.max_steps": (7, "sweep"),
    "train.micro_batch_size": (2, "sweep"),
    "train.gradient_accumulation_steps": (2, "sweep"),
    "train.group_by_length": (False, "sweep"),
    "train.optimizer": ("adamw", "sweep"),
    "train.adam_beta1": (0.8, "sweep"),
    "train.adam_beta2": (0.99, "sweep"),
    "train.weight_decay": (0.1, "sweep"),
    "train.max_grad_norm": (1.0, "sweep"),
    "train.gradient_checkpointing": (True, "sweep"),
    "train.precision": ("bfloat16", "sweep"),
    "train.checkpoint_every_steps": (5, None),
    "train.seed": (1, "sweep"),
    "train.rank_pattern": ({"q_proj": 2}, "sweep"),
    "train.use_rslora": (True, "sweep"),
    "train.use_dora": (True, "sweep"),
    "train.lora_init": ("pissa", "sweep"),
    "train.lora_plus_ratio": (16.0, "sweep"),
    "train.objective": ("dpo", "sweep"),
    "train.dpo_beta": (0.5, "sweep"),
    "train.dpo_label_smoothing": (0.1, "sweep"),
    "train.sensitive_layers": (2, "sweep"),
    "train.spike_factor": (5.0, "sweep"),
    "compute.pack_size": (1, None),
    "sweep.method": ("random", "sweep"),
    "sweep.space": ({"lora_rank": [1, 2]}, "sweep"),
    "sweep.trials": (1, "sweep"),
    "sweep.pruning.enabled": (False, "sweep"),
    "sweep.pruning.min_steps": (3, "sweep"),
    "sweep.pruning.reduction_factor": (3, "sweep"),
    "sweep.seed": (1, "sweep"),
    "sweep.max_attempts": (1, None),
    "sweep.max_preemptions": (1, None),
    "sweep.storage": ("sqlite:////tmp/other-study.db", None),
    "sweep.objectives": (["loss", "tokens"], "sweep"),
    "sweep.loss_tolerance": (0.1, "sweep"),
    "sweep.finalists": ({"count": 1, "seeds": 2}, "sweep"),
    "sweep.candidates": (2, "sweep"),
    "sweep.pruning.method": ("asha", "sweep"),
    "sweep.pruning.hyperband": (True, "sweep"),
    "sweep.pruning.min_tokens": (9, "sweep"),
    "evaluate.prompt_sets": (["other"], "curate"),
    "evaluate.max_rows": (9, "evaluate"),
    "evaluate.max_prompts": (3, "evaluate"),
    "evaluate.max_new_tokens": (4, "evaluate"),
    "evaluate.exact_match_max_words": (3, "evaluate"),
    "evaluate.batch_size": (2, None),
    "evaluate.confidence": (0.9, "evaluate"),
    "evaluate.resamples": (300, "evaluate"),
    "evaluate.seed": (1, "evaluate"),
    "evaluate.general_text": ("text.txt", "evaluate"),
    "evaluate.latency_prompts": (2, "evaluate"),
    "evaluate.parity_certificate": ("text.txt", "evaluate"),
    "evaluate.votes": ("votes.sqlite", "evaluate"),
    "evaluate.judge.kind": ("none", "evaluate"),
    # The offline judge, which this config has, takes no settings.
    "evaluate.judge.model": ("other", None),
    "evaluate.judge.mode": ("score10", None),
    "evaluate.judge.rubric": ("Be brief.", None),
    "evaluate.judge.structured_output": (True, None),
    "evaluate.judge.batch": (True, None),
    "evaluate.judge.batch_price": (0.9, None),
    "evaluate.judge.batch_poll_s": (1.0, None),
    "evaluate.judge.calls_in_flight": (2, None),
    "evaluate.judge.certificate": ("text.txt", "evaluate"),
    "evaluate.judge.checks": ("text.txt", "evaluate"),
    "evaluate.judge.base_url": ("http://localhost:1/v1", None),
    "evaluate.judge.temperature": (0.0, None),
    "evaluate.judge.max_answer_tokens": (99, None),
    "evaluate.judge.timeout_s": (1.0, None),
    "evaluate.judge.max_retries": (0, None),
    "evaluate.judge.budget_usd": (1.0, None),
    "evaluate.judge.input_usd_per_million": (1.0, None),
    "evaluate.judge.output_usd_per_million": (1.0, None),
    # Gate and registry act after the stored stages: the gate's key and the registration are tested with them.
    "gate.min_loss_gain": (0.1, None),
    "gate.min_rows": (6, None),
    "gate.max_exact_match_loss": (0.1, None),
    "gate.max_unscored_share": (0.1, None),
    "gate.judge": ("require", None),
    "gate.primary.metric": ("judge", None),
    "gate.primary.rule": ("non_inferiority", None),
    "gate.primary.margin": (0.1, None),
    "gate.primary.min_gain": (0.1, None),
    "gate.primary.test": ("always_valid", None),
    "gate.primary.alpha": (0.1, None),
    "gate.slices.by": ("category", None),
    "gate.slices.margin": (0.1, None),
    "gate.slices.min_items": (9, None),
    "gate.slices.underpowered": ("pool", None),
    "gate.guards.max_perplexity_increase": (0.1, None),
    "gate.guards.length_ratio": ([0.5, 2.0], None),
    "gate.guards.max_refusal_increase": (0.1, None),
    "gate.guards.max_degenerate_share": (0.1, None),
    "gate.guards.max_format_loss": (0.1, None),
    "gate.guards.max_latency_ratio": (2.0, None),
    "gate.guards.max_adapter_bytes": (9, None),
    "gate.guards.base_digest": ("0" * 64, None),
    "gate.guards.parity": (True, None),
    "gate.humans.combine": ("ignore", None),
    "gate.humans.min_prompts": (9, None),
    "gate.humans.min_alpha": (0.4, None),
    "gate.approve": ("manual", None),
    "gate.shadow.period_s": (9.0, None),
    "gate.shadow.prompts": ("asked.jsonl", None),
    "gate.shadow.min_prompts": (9, None),
    "gate.shadow.max_degenerate_increase": (0.1, None),
    "gate.shadow.max_refusal_increase": (0.1, None),
    "gate.shadow.length_ratio": ([0.9, 1.1], None),
    "gate.shadow.alpha": (0.01, None),
    "gate.approve_timeout_s": (9.0, None),
    "registry.model_name": ("other", None),
    "registry.experiment": ("other", None),
    "registry.tracking_uri": ("sqlite:////tmp/other.db", None),
    "store.cache_limit_gb": (1.0, None),
    "store.encryption": ("AES256", None),
    "store.kms_key_id": ("key", None),
    "store.lease_ttl_s": (9.0, None),
    "compute.workers": (2, None),
    "compute.ray_address": ("auto", None),
    "compute.work_dir": ("elsewhere", None),
    "compute.residency": ("scratch", None),
    "compute.layer_residency": ({"*.q_proj": "dense"}, None),
    "compute.worker_start_timeout_s": (9.0, None),
    "compute.gpus": ("none", None),
    "compute.idle_worker_s": (9.0, None),
    "compute.sweeps_at_once": (2, None),
    "compute.price_per_gpu_hour": (2.5, None),
}
AFTER = {
    "curate": {"curate", "sweep", "evaluate"},
    "quantize": {"quantize", "sweep", "evaluate"},
    "sweep": {"sweep", "evaluate"},
    "evaluate": {"evaluate"},
    None: set(),
}
# Settings that are only allowed together with others.
TOGETHER = {
    "store.kms_key_id": ["store.encryption=aws:kms"],
    "evaluate.judge.rubric": ["evaluate.judge.mode=rubric"],
    "evaluate.judge.checks": ["evaluate.judge.kind=checks"],
    "train.start_from": ["gate.slices.by=category"],
    "train.start_as": ["gate.slices.by=category", "train.start_from=start"],
    "gate.shadow.period_s": ["gate.shadow.prompts=asked.jsonl"],
    "gate.primary.rule": ["gate.primary.margin=0.1"],
    "gate.primary.margin": ["gate.primary.rule=non_inferiority"],
}
# The base stands above both curation and quantization.
BOTH = {"base.model"}


def leaves(section: type[Section], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            yield from leaves(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def fill(pipeline: Pipeline) -> None:
    """Put a stand-in artifact under every stage's key, so that a plan says which keys a change leaves alone."""
    while missing := [planned for planned in pipeline.plan() if not planned.cached]:
        name, key = missing[0].name, missing[0].key
        assert key is not None
        pipeline.job.store.get_or_build(key, lambda out, text=name: _write(out, text))


def _write(out: Path, text: str) -> None:
    (out / "stage.json").write_text(json.dumps(text))


def stale(config: PipelineConfig) -> set[str]:
    return {planned.name for planned in Pipeline(config).plan() if not planned.cached}


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory, make_project: Callable[[Path], Path], tiny_base: Path) -> Path:
    config = make_project(tmp_path_factory.mktemp("keys") / "project")
    folder = config.parent
    (folder / "other").mkdir()
    (folder / "other" / "rows.json").write_text('[{"instruction": "a", "output": "b"}]')
    (folder / "earlier").mkdir()
    (folder / "earlier" / "curation.json").write_text('{"digest": "1"}')
    (folder / "start").mkdir()
    for name in ("adapter_config.json", "golden.json", "qlora.json"):
        (folder / "start" / name).write_text("{}")
    for name in ("adapter_model", "golden"):
        save_file({"lora_A.weight": np.zeros((2, 3), np.float32)}, folder / "start" / f"{name}.safetensors")
    (folder / "template.jinja").write_text("{{ messages }}")
    (folder / "text.txt").write_text("A text.")
    pair = Pair(prompt_id="p", prompt="?", model_a="adapter", answer_a="a", model_b="base", answer_b="b", item_id="p")
    BallotBox.create(folder / "votes.sqlite", [pair])
    shutil.copytree(tiny_base, folder / "other-base")
    other = json.loads((folder / "other-base" / "config.json").read_text())
    (folder / "other-base" / "config.json").write_text(json.dumps({**other, "rope_theta": 1.0}))
    fill(Pipeline(load_config(config)))
    return config


@pytest.mark.parametrize("field", FIELDS)
def test_field_reruns_its_stages_and_no_others(filled: Path, field: str) -> None:
    value, first = FIELDS[field]
    changed = load_config(filled, [*TOGETHER.get(field, []), f"{field}={json.dumps(value)}"])
    assert changed != load_config(filled), "the other value is the one the config has: nothing would be tested"
    expected = AFTER["curate"] | AFTER["quantize"] if field in BOTH else AFTER[first]
    assert stale(changed) == expected


def test_a_parent_and_a_start_give_different_sweeps(filled: Path) -> None:
    def sweep_key(way: str) -> str | None:
        wanted = ["gate.slices.by=category", "train.start_from=start", f"train.start_as={way}"]
        (planned,) = (each for each in Pipeline(load_config(filled, wanted)).plan() if each.name == "sweep")
        return planned.key.key if planned.key is not None else None

    keys = {way: sweep_key(way) for way in ("weights", "parent")}
    assert all(keys.values()) and keys["weights"] != keys["parent"]


def test_unchanged_config_reruns_nothing(filled: Path) -> None:
    assert stale(load_config(filled)) == set()


def test_changed_training_row_reruns_curation_but_not_quantization(filled: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(filled.parent, moved)
    rows = json.loads((moved / "data" / "rows.json").read_text())
    rows[0]["output"] = "something else"
    (moved / "data" / "rows.json").write_text(json.dumps(rows))
    assert stale(load_config(moved / "pipeline.yaml")) == AFTER["curate"]


def test_quality_text_counts_by_content_and_not_by_name(filled: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(filled.parent, moved)
    (moved / "renamed.txt").write_text("A text.")
    config = load_config(moved / "pipeline.yaml", ["quantize.quality_text=text.txt"])
    fill(Pipeline(config))
    assert stale(load_config(moved / "pipeline.yaml", ["quantize.quality_text=renamed.txt"])) == set()
    (moved / "text.txt").write_text("Another text.")
    assert stale(config) == AFTER["quantize"]


def test_a_vote_reruns_evaluation_and_a_missing_file_is_told(filled: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(filled.parent, moved)
    config = load_config(moved / "pipeline.yaml", ["evaluate.votes=votes.sqlite"])
    fill(Pipeline(config))
    box = BallotBox(moved / "votes.sqlite")
    task = box.current("ann").task
    assert task is not None and stale(config) == set()  # a pair was shown, nothing decided
    box.vote("ann", "1", task.task, "left")
    assert stale(config) == AFTER["evaluate"]
    for name in ("general_text", "parity_certificate", "votes"):
        with pytest.raises(ConfigError, match=f"evaluate.{name}"):
            stale(load_config(moved / "pipeline.yaml", [f"evaluate.{name}=nowhere"]))


def test_order_of_sources_reruns_curation(filled: Path) -> None:
    both = load_config(filled, ['data.sources=["data", "other"]'])
    pipeline = Pipeline(both)
    fill(pipeline)
    assert stale(both) == set()
    assert stale(load_config(filled, ['data.sources=["other", "data"]'])) == AFTER["curate"]


def test_edited_plugin_reruns_curation(filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_scores_for_keys.py").write_text("def shortness(texts):\n    return [1.0 for _ in texts]\n")
    overrides = ['data.tags.plugins=["my_scores_for_keys:shortness"]']
    fill(Pipeline(load_config(filled, overrides)))
    assert stale(load_config(filled, overrides)) == set()
    (tmp_path / "my_scores_for_keys.py").write_text("def shortness(texts):\n    return [2.0 for _ in texts]\n")
    assert stale(load_config(filled, overrides)) == AFTER["curate"]


def test_moved_project_reruns_nothing(filled: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(filled.parent, moved)
    assert stale(load_config(moved / "pipeline.yaml")) == set()


def test_key_of_an_openai_judge_holds_what_changes_its_verdicts(filled: Path) -> None:
    config = load_config(filled, ["evaluate.judge.kind=openai"])
    pipeline = Pipeline(config)
    fill(pipeline)
    assert stale(load_config(filled, ["evaluate.judge.kind=openai", "evaluate.judge.model=other"])) == {"evaluate"}
    assert stale(load_config(filled, ["evaluate.judge.kind=openai", "evaluate.judge.timeout_s=1"])) == set()


def test_password_of_a_judge_reaches_no_key(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = Pipeline(load_config(filled, ["evaluate.judge.kind=openai"]))
    fill(pipeline)
    keys = []
    for password in ("hunter2", "changed"):
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://me:{password}@127.0.0.1:1/v1?key={password}")
        keys += [planned.key for planned in pipeline.plan() if planned.name == "evaluate"]
    assert keys[0] == keys[1]
    assert keys[0] is not None
    assert keys[0].config["judge"]["endpoint"] == "http://127.0.0.1:1/v1"


def test_every_field_of_the_config_is_listed() -> None:
    assert set(leaves(PipelineConfig)) - {"store.url"} == set(FIELDS)
