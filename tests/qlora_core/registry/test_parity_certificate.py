import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from qlora_core.adapters.adapter_folder import adapter_digest
from qlora_core.digest import digest_json
from qlora_core.errors import RegistryError
from qlora_core.registry.parity_certificate import certificate_tag, keep_certificate
from qlora_core.registry.versions import RegisteredVersion, get_version, register_adapter

LINEAGE = {
    "base_model": "demo", "base_revision": "r1", "quantized_base_digest": "b" * 64, "data_digest": "d" * 64,
    "config_digest": "c" * 64,
}  # fmt: skip
TAG = certificate_tag("16bit")
FIGURES = {"gain_retained": 0.9995, "kl": 3e-7, "top1_agreement": 1.0, "projection": 0.9999}


@pytest.fixture
def adapter(write_adapter: Callable[[int], Path]) -> Path:
    return write_adapter(1)


@pytest.fixture
def version(client: MlflowClient, experiment_id: str, model_name: str, adapter: Path) -> RegisteredVersion:
    run_id = client.create_run(experiment_id).info.run_id
    return register_adapter(client, model_name, adapter, run_id=run_id, run_key=model_name, lineage=LINEAGE)


def certificate(folder: Path, adapter: Path, **changes: Any) -> Path:
    candidates = [{"name": "other", **FIGURES, "kl": 1.0}, {"name": "dequantized", **FIGURES}]
    content = {"target": "16bit", "chosen": "dequantized", "candidates": candidates}
    content |= {"adapter_digest": adapter_digest(adapter)} | changes
    path = folder / "certificate.json"
    path.write_text(json.dumps(content))
    return path


def test_the_version_has_digest_and_figures_and_the_run_has_the_file(
    client: MlflowClient, version: RegisteredVersion, adapter: Path, tmp_path: Path
) -> None:
    file = certificate(tmp_path, adapter)
    digest = keep_certificate(client, version, adapter, file)
    assert keep_certificate(client, version, adapter, file) == digest
    version = get_version(client, version.name, version.version)
    assert keep_certificate(client, version, adapter, file) == digest
    tags = version.tags
    assert tags[TAG] == digest == digest_json(json.loads(file.read_text()))
    assert {name: float(tags[certificate_tag("16bit", name)]) for name in FIGURES} == FIGURES
    kept = client.list_artifacts(version.run_id, "certificates")
    assert len(kept) == 1
    found = Path(client.download_artifacts(version.run_id, kept[0].path, str(tmp_path)))
    assert json.loads(found.read_text()) == json.loads(file.read_text())


def test_each_target_has_tags_of_its_own_and_a_newer_certificate_takes_them_over(
    client: MlflowClient, version: RegisteredVersion, adapter: Path, tmp_path: Path
) -> None:
    def keep(**changes: Any) -> str:
        present = get_version(client, version.name, version.version)
        return keep_certificate(client, present, adapter, certificate(tmp_path, adapter, **changes))

    first, small = keep(), keep(target="nf4")
    other = [{"name": "dequantized", **FIGURES, "kl": 5e-7, "gain_retained": None}]
    newer = keep(candidates=other)
    tags = get_version(client, version.name, version.version).tags
    assert (tags[TAG], tags[certificate_tag("nf4")]) == (newer, small)
    assert float(tags[certificate_tag("16bit", "kl")]) == 5e-7
    assert certificate_tag("16bit", "gain_retained") not in tags  # the first one's, of another text
    assert float(tags[certificate_tag("nf4", "gain_retained")]) == FIGURES["gain_retained"]
    kept = [each.path for each in client.list_artifacts(version.run_id, "certificates")]
    assert all(any(digest[:12] in path for path in kept) for digest in (first, small, newer))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"adapter_digest": "0" * 64}, "is of adapter 000"),
        ({"chosen": None}, "certifies nothing"),
        ({"target": "int4"}, "of target .int4., known are"),
        ({"candidates": [{"name": "dequantized", **FIGURES, "kl": None}]}, "lacks kl"),
    ],
)
def test_what_certifies_something_else_is_refused_and_leaves_no_tag(
    client: MlflowClient, version: RegisteredVersion, adapter: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(RegistryError, match=said):
        keep_certificate(client, version, adapter, certificate(tmp_path, adapter, **changes))
    assert not [
        tag for tag in get_version(client, version.name, version.version).tags if tag.startswith("certificate_")
    ]
