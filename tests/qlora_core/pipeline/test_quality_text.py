"""The quality report as a part of the quantize stage's artifact."""

from pathlib import Path

from qlora_core.config.load import load_config
from qlora_core.model.base import load_quantized
from qlora_core.pipeline.pipeline import Pipeline


def test_quantize_stage_writes_the_report_of_its_text_and_only_then(tiny_project: Path) -> None:
    (tiny_project.parent / "text.txt").write_text("The colour of the grass is green. " * 20)
    plain = Pipeline(load_config(tiny_project)).run("quantize").artifact
    assert not (plain.path / "quality").exists()

    pipeline = Pipeline(load_config(tiny_project, ["quantize.quality_text=text.txt"]))
    artifact = pipeline.run("quantize").artifact
    assert {"quality/quality.html", "quality/quality.json"} < artifact.manifest.files.keys()
    quality = pipeline.document("quantize", "quality/quality.json")
    assert quality["text"]["file"] == "text.txt"
    assert [row["type"] for row in quality["formats"] if row["stored"]] == ["nf4"]
    assert load_quantized(artifact.path, device="cpu") is not None
    assert Pipeline(load_config(tiny_project, ["quantize.quality_text=text.txt"])).run("quantize").cached
