"""What is read from outside is looked at before a run works for minutes."""

from pathlib import Path

import pytest

from qlora_core.config.load import load_config
from qlora_core.errors import DataError, QloraError
from qlora_core.pipeline.job import Job
from qlora_core.pipeline.run_record import RunRecord


def demo_config(folder: Path, sources: str) -> Path:
    path = folder / "pipeline.yaml"
    path.write_text(f"data: {{sources: [{sources}]}}\nbase: {{model: demo}}\n")
    return path


def test_missing_source_is_found_before_the_demo_base_is_made(tmp_path: Path) -> None:
    config = load_config(demo_config(tmp_path, "absent.json"))
    with pytest.raises(DataError, match=r"absent\.json"):
        Job(config).check_inputs()


def test_run_that_cannot_start_leaves_no_record(tmp_path: Path) -> None:
    config = load_config(demo_config(tmp_path, "absent.json"))
    with pytest.raises(QloraError):
        RunRecord.start(config)
    assert not (tmp_path / ".qlora" / "runs").exists()


def test_missing_template_is_found_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text("[]")
    config = load_config(demo_config(tmp_path, "rows.json"), ["data.chat_template=absent.jinja"])
    with pytest.raises(QloraError, match=r"absent\.jinja"):
        Job(config).check_inputs()


def test_missing_quality_text_is_found_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text("[]")
    config = load_config(demo_config(tmp_path, "rows.json"), ["quantize.quality_text=absent.txt"])
    with pytest.raises(QloraError, match=r"quantize\.quality_text: no such file .*absent\.txt"):
        Job(config).check_inputs()
