from pathlib import Path

from qlora_core.config.load import load_config
from qlora_core.config.pipeline import PipelineConfig
from qlora_core.demo.config_text import demo_config


def load(tmp_path: Path) -> PipelineConfig:
    path = tmp_path / "pipeline.yaml"
    path.write_text(demo_config(), encoding="utf-8")
    return load_config(path)


def test_demo_config_loads_with_a_sweep_of_four_trials(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert config.base.model == "demo"
    assert config.data.sources == ["data"]
    assert config.evaluate.judge.kind == "auto"
    trials = 1
    for values in config.sweep.space.values():
        assert isinstance(values, list)
        trials *= len(values)
    assert (config.sweep.method, trials) == ("grid", 4)


def test_demo_config_names_every_section(tmp_path: Path) -> None:
    assert load(tmp_path).model_fields_set == set(PipelineConfig.model_fields)


def test_every_setting_is_explained_by_a_comment() -> None:
    lines = demo_config().splitlines()
    assert all(len(line) <= 120 for line in lines)
    assert sum(line.lstrip().startswith("#") for line in lines) > 40
