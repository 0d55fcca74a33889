"""Loading a pipeline config: strictness, messages, overrides, paths."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_core.config.evaluate import JudgeConfig
from qlora_core.config.load import load_config, parse_config, parse_section
from qlora_core.config.pipeline import PipelineConfig
from qlora_core.config.section import Section
from qlora_core.config.store import StoreConfig
from qlora_core.config.sweep import FloatRange
from qlora_core.config.train import TrainConfig
from qlora_core.errors import ConfigError

MINIMAL = "data: {sources: [rows.json]}\nbase: {model: demo}\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "pipeline.yaml"
    path.write_text(text)
    return path


def message(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(write(folder, text), overrides)
    return str(caught.value)


def test_minimal_config_has_the_papers_defaults(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL))
    # QLoRA paper, appendix B: r=64, alpha=16, 2e-4 constant, beta2 .999, clip .3, dropout .1 up to 13B, NF4 + DQ.
    train = config.train
    assert (train.lora_rank, train.lora_alpha, train.lora_dropout) == (64, 16, 0.1)
    assert (train.learning_rate, train.schedule, train.adam_beta2, train.max_grad_norm) == (
        2e-4,
        "constant",
        0.999,
        0.3,
    )
    assert (train.target_modules, train.optimizer, train.group_by_length) == ("all-linear", "paged_adamw_32bit", True)
    assert (config.quantize.type, config.quantize.double_quant, config.quantize.blocksize) == ("nf4", True, 64)


def test_unknown_key_names_its_line_and_the_nearest_key(tmp_path: Path) -> None:
    text = MINIMAL + "train:\n  lora_rank: 8\n  learing_rate: 1e-4\n"
    assert "pipeline.yaml:5: train.learing_rate: unknown key; did you mean 'learning_rate'?" in message(tmp_path, text)


def test_unknown_key_far_from_all_lists_what_is_allowed(tmp_path: Path) -> None:
    assert "pipeline.yaml:3: zzz: unknown key; allowed: data, base, quantize" in message(tmp_path, MINIMAL + "zzz: 1\n")


def test_nested_unknown_key_is_explained_by_its_own_section(tmp_path: Path) -> None:
    text = MINIMAL + "evaluate:\n  judge:\n    buget_usd: 3\n"
    assert "pipeline.yaml:5: evaluate.judge.buget_usd: unknown key; did you mean 'budget_usd'?" in message(
        tmp_path, text
    )


def test_all_mistakes_come_together(tmp_path: Path) -> None:
    text = "data: {sources: [], splt: 1}\ntrain: {lora_rank: 0, learning_rate: .nan}\n"
    told = message(tmp_path, text)
    assert told.startswith("5 mistakes in pipeline.yaml:")
    for part in ("base: missing", "data.sources", "data.splt", "train.lora_rank", "train.learning_rate"):
        assert part in told


def test_value_out_of_bounds_is_shown_with_the_bound(tmp_path: Path) -> None:
    assert "train.lora_rank: must be greater than or equal to 1, not 0" in message(
        tmp_path, MINIMAL + "train: {lora_rank: 0}\n"
    )


def test_key_given_twice_is_refused_with_both_lines(tmp_path: Path) -> None:
    told = message(tmp_path, MINIMAL + "train: {}\ntrain: {lora_rank: 8}\n")
    assert "pipeline.yaml:4: key 'train' stands twice, first on line 3" in told


@pytest.mark.parametrize("text", ["", "just text", "- a\n- b\n"])
def test_document_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    assert "must be a mapping of sections" in message(tmp_path, text)


def test_broken_yaml_names_line_and_column(tmp_path: Path) -> None:
    assert "line 2" in message(tmp_path, "data: {sources: [a]\nbase: x")


def test_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="qlora init"):
        load_config(tmp_path / "absent.yaml")


def test_number_in_exponent_form_without_a_dot_is_a_number(tmp_path: Path) -> None:
    # PyYAML follows YAML 1.1, in which 1e-4 is text: a sweep would then draw strings.
    config = load_config(write(tmp_path, MINIMAL + "sweep: {space: {learning_rate: [1e-4, 2e-3]}}\n"))
    assert config.sweep.space["learning_rate"] == [1e-4, 2e-3]


def test_override_wins_over_the_file_and_leaves_the_rest(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "train: {lora_rank: 8, learning_rate: 1e-3}\n")
    train = load_config(path, ["train.learning_rate=5e-4", "sweep.space.lora_rank=[4, 8]"]).train
    assert (train.learning_rate, train.lora_rank) == (5e-4, 8)


@pytest.mark.parametrize("override", ["train.learning_rate", "=3", "train..x=1", ""])
def test_malformed_override_shows_an_example(tmp_path: Path, override: str) -> None:
    assert "--set takes section.key=value" in message(tmp_path, MINIMAL, override)


def test_override_into_a_value_is_refused(tmp_path: Path) -> None:
    assert "base.model is the value 'demo'" in message(tmp_path, MINIMAL, "base.model.x=1")


def test_unknown_key_in_an_override_is_told_apart_from_the_file(tmp_path: Path) -> None:
    assert "--set: train.max_stps: unknown key; did you mean 'max_steps'?" in message(
        tmp_path, MINIMAL, "train.max_stps=3"
    )


def test_relative_paths_start_at_the_config_file(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL))
    assert config.path("rows.json") == tmp_path.resolve() / "rows.json"
    assert config.tracking_uri == f"sqlite:///{tmp_path.resolve()}/.qlora/mlflow.db"


def test_store_may_be_a_plain_string_in_the_file_and_in_an_override(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "store: s3://bucket/team\n")
    assert load_config(path).store.url == "s3://bucket/team"
    assert load_config(path, ["store=elsewhere"]).store.url == "elsewhere"
    assert load_config(path, ["store.cache_limit_gb=3"]).store == StoreConfig(url="s3://bucket/team", cache_limit_gb=3)


def test_resolved_config_gives_the_same_config_again(tmp_path: Path) -> None:
    text = MINIMAL + "sweep: {method: random, space: {learning_rate: {low: 1e-5, high: 1e-3, log: true}}}\n"
    config = load_config(write(tmp_path, text))
    again = parse_config(config.resolved(), folder=tmp_path)
    assert again == config
    assert isinstance(again.sweep.space["learning_rate"], FloatRange)


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ("sweep: {space: {learing_rate: [1]}}", "did you mean 'learning_rate'?"),
        ("sweep: {space: {lora_rank: []}}", "list of values for 'lora_rank' is empty"),
        ("sweep: {space: {learning_rate: {low: 1, high: 0}}}", "low (1.0) must be under high (0.0)"),
        ("sweep: {space: {learning_rate: {low: 0, high: 1, log: true}}}", "log range starts above 0"),
        ("sweep: {method: grid, space: {learning_rate: {low: 1, high: 2}}}", "use method: random"),
        ("quantize: {blocksize: 63}", "blocksize"),
        ("store: {kms_key_id: alias/team}", "kms_key_id needs encryption: aws:kms"),
    ],
)
def test_impossible_section_says_why(tmp_path: Path, section: str, told: str) -> None:
    assert told in message(tmp_path, MINIMAL + section + "\n")


def test_password_in_the_judges_address_is_refused_and_not_repeated(tmp_path: Path) -> None:
    told = message(tmp_path, MINIMAL + "evaluate: {judge: {base_url: 'http://me:hunter2@host/v1'}}\n")
    assert "evaluate.judge.base_url" in told
    assert "belongs in OPENAI_BASE_URL" in told
    assert "hunter2" not in told


def test_split_that_leaves_no_training_rows_is_refused(tmp_path: Path) -> None:
    text = "data: {sources: [a], split: {validation: 0.5, test: 0.5}}\nbase: {model: demo}\n"
    assert "leave nothing to train on" in message(tmp_path, text)


def test_options_of_a_command_are_checked_like_a_section() -> None:
    with pytest.raises(ConfigError, match="judge: budget_usd: must be greater than 0, not -1"):
        parse_section(JudgeConfig, {"budget_usd": -1}, "judge")


def test_every_setting_has_a_default_but_the_two_that_must_be_named() -> None:
    required = {
        f"{name}.{key}"
        for name, field in PipelineConfig.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
        for key, inner in field.annotation.model_fields.items()
        if inner.is_required()
    }
    assert required == {"data.sources", "base.model"}


@given(st.floats(min_value=1e-9, max_value=1, exclude_min=True))
def test_any_learning_rate_survives_the_override_syntax(rate: float) -> None:
    values = {"data": {"sources": ["a"]}, "base": {"model": "demo"}}
    config = parse_config(values, folder=Path(), overrides=[f"train.learning_rate={rate!r}"])
    assert config.train.learning_rate == rate == TrainConfig(learning_rate=rate).learning_rate
