"""The evidence of a registration in the artifact store: there, whole, and kept by the version's reference."""

from pathlib import Path

from qlora_core.config.load import load_config
from qlora_core.pipeline.pipeline import Pipeline
from qlora_core.pipeline.promotion import Promotion
from qlora_core.store.refs import list_refs


def test_evidence_is_an_artifact_that_the_versions_reference_keeps(tiny_project: Path, tmp_path: Path) -> None:
    promotion = Promotion(Pipeline(load_config(tiny_project)))
    promotion.__dict__["run_key"] = "k" * 64  # else it would take a whole run to know
    file = tmp_path / "evidence.json"
    file.write_bytes(b'{"verdict":"PROMOTE"}')
    address = promotion.keep_evidence(file)
    assert promotion.keep_evidence(file) == address  # a retry finds it there
    store = promotion.job.store
    artifact = store.get_at(address)
    assert artifact is not None and (artifact.path / "evidence.json").read_bytes() == file.read_bytes()
    (reference,) = [ref for ref in list_refs(store.backend) if ref.kind == "model"]
    assert reference.name.endswith(f"/{'k' * 64}") and address in reference.addresses
    file.write_bytes(b'{"verdict":"REJECT"}')
    assert promotion.keep_evidence(file) != address
