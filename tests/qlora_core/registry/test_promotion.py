"""Versions, aliases, promotion and rollback on a real SQLite registry, with the faults they are there for."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow.artifacts
import pytest
from mlflow import MlflowClient

from qlora_core.errors import RegistryError
from qlora_core.registry.aliases import MoveOutcome, alias_version, move_champion, set_alias
from qlora_core.registry.champion import current_champion
from qlora_core.registry.connection import connect, registry_lock, without_credentials
from qlora_core.registry.history import read_moves
from qlora_core.registry.promotion import promote, rollback
from qlora_core.registry.versions import (
    ADAPTER_TAG,
    LINEAGE_TAGS,
    RegisteredVersion,
    download_version,
    register_adapter,
)

Register = Callable[..., RegisteredVersion]


def against(version: str, *, gain: float = 0.2) -> dict[str, Any]:
    heldout = {"gain": gain, "gain_low": gain - 0.1, "gain_high": gain + 0.1, "rows": 100}
    return {"version": version, "heldout": heldout, "exact_match": None}


def stored_weights(client: MlflowClient, version: RegisteredVersion) -> Path:
    uri = client.get_model_version_download_uri(version.name, version.version)
    return Path(uri.removeprefix("file://")) / "adapter_model.safetensors"


def overwrite(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_version_comes_back_byte_for_byte_with_its_lineage(
    client: MlflowClient, register: Register, better: dict[str, Any], tmp_path: Path
) -> None:
    version = register(1, better)
    assert version.version == "1"
    assert version.tags["base_revision"] == "r1" and version.tags["config_digest"] == "c" * 64
    folder = download_version(client, version, tmp_path / "download")
    original = tmp_path / "adapter-1"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in original.iterdir()
    }


def test_registering_again_gives_the_same_version(
    client: MlflowClient, register: Register, better: dict[str, Any], model_name: str, tmp_path: Path
) -> None:
    version = register(1, better)
    for _ in range(3):
        again = register_adapter(
            client,
            model_name,
            tmp_path / "adapter-1",
            run_id=version.run_id,
            run_key=f"{model_name}-1",
            lineage={key: version.tags[key] for key in LINEAGE_TAGS},
        )
        assert again.version == version.version
    assert len(client.search_model_versions(f"name = '{model_name}'")) == 1
    assert register(2, better).version == "2"  # other bytes are another version


def test_promote_first_champion_then_better_one_then_roll_back(
    client: MlflowClient, tracking_uri: str, register: Register, better: dict[str, Any], model_name: str, tmp_path: Path
) -> None:
    register(1, better)
    set_alias(client, model_name, "challenger", "1")
    answer = promote(tracking_uri, model_name)
    assert (answer["verdict"], answer["champion"], answer["previous"]) == ("PROMOTE", "1", None)
    register(2, better, against("1"))
    assert promote(tracking_uri, model_name, version="2")["champion"] == "2"
    assert alias_version(client, model_name, "previous_champion") == "1"

    champion = current_champion(tracking_uri, model_name, tmp_path / "cache")
    assert champion is not None
    assert (champion.version, champion.quantized_base_digest) == ("2", "b" * 64)
    assert (champion.folder / "adapter_config.json").is_file()

    undone = rollback(tracking_uri, model_name, None, "answers got rude")
    assert (undone["champion"], undone["previous"]) == ("1", "2")
    assert alias_version(client, model_name, "champion") == "1"
    assert alias_version(client, model_name, "previous_champion") is None
    last = read_moves(client, model_name)[-1]
    assert (last.action, last.reason, last.state) == ("rollback", "answers got rude", "done")
    with pytest.raises(RegistryError, match="first champion"):
        rollback(tracking_uri, model_name, None, "again")


def test_promoting_the_champion_again_moves_nothing(
    client: MlflowClient, tracking_uri: str, register: Register, better: dict[str, Any], model_name: str
) -> None:
    register(1, better)
    promote(tracking_uri, model_name, version="1")
    assert promote(tracking_uri, model_name, version="1")["verdict"] == "PROMOTE"
    assert len(read_moves(client, model_name)) == 1


def test_rejected_version_moves_only_by_force_with_a_reason(
    client: MlflowClient, tracking_uri: str, register: Register, better: dict[str, Any], model_name: str
) -> None:
    register(1, better)
    promote(tracking_uri, model_name, version="1")
    register(2, better, against("1", gain=-0.5))
    answer = promote(tracking_uri, model_name, version="2")
    assert (answer["verdict"], answer["champion"]) == ("REJECT", "1")
    with pytest.raises(RegistryError, match="reason"):
        promote(tracking_uri, model_name, version="2", force_reason=" ")
    answer = promote(tracking_uri, model_name, version="2", force_reason="legal asked for it")
    assert (answer["verdict"], answer["champion"], answer["forced"]) == ("REJECT", "2", True)
    assert read_moves(client, model_name)[-1].reason == "Forced: legal asked for it"


def test_evidence_against_a_former_champion_holds(
    tracking_uri: str, register: Register, better: dict[str, Any], model_name: str
) -> None:
    register(1, better)
    promote(tracking_uri, model_name, version="1")
    register(2, better, against("1"))
    register(3, better, against("1"))
    promote(tracking_uri, model_name, version="2")
    answer = promote(tracking_uri, model_name, version="3")
    assert (answer["verdict"], answer["champion"]) == ("HOLD", "2")
    assert "champion version 1" in answer["reasons"][-1] and "version 2" in answer["reasons"][-1]


def test_champion_moves_only_from_the_expected_version(
    client: MlflowClient, register: Register, better: dict[str, Any], model_name: str
) -> None:
    for seed in (1, 2):
        register(seed, better)
    assert move_champion(client, model_name, "1", expected=None, action="promote", reason="a") == MoveOutcome(True, "1")
    late = move_champion(client, model_name, "2", expected=None, action="promote", reason="b")
    assert late == MoveOutcome(False, "1")
    assert alias_version(client, model_name, "champion") == "1"


def test_overwritten_adapter_is_refused_everywhere_while_mlflow_serves_it(
    client: MlflowClient, tracking_uri: str, register: Register, better: dict[str, Any], model_name: str, tmp_path: Path
) -> None:
    version = register(1, better)
    weights = stored_weights(client, version)
    overwrite(weights)
    served = mlflow.artifacts.download_artifacts(
        artifact_uri=client.get_model_version_download_uri(model_name, "1"), dst_path=str(tmp_path / "plain")
    )
    assert (Path(served) / weights.name).read_bytes() == weights.read_bytes()  # MLflow itself notices nothing

    with pytest.raises(RegistryError, match=version.tag(ADAPTER_TAG)):
        download_version(client, version, tmp_path / "verified")
    with pytest.raises(RegistryError, match="does not hold the adapter"):
        promote(tracking_uri, model_name, version="1")
    with pytest.raises(RegistryError, match="does not hold the adapter"):
        promote(tracking_uri, model_name, version="1", force_reason="no excuse for other bytes")
    assert alias_version(client, model_name, "champion") is None


def test_rollback_refuses_an_overwritten_former_champion(
    client: MlflowClient, tracking_uri: str, register: Register, better: dict[str, Any], model_name: str
) -> None:
    first = register(1, better)
    promote(tracking_uri, model_name, version="1")
    register(2, better, against("1"))
    promote(tracking_uri, model_name, version="2")
    overwrite(stored_weights(client, first))
    with pytest.raises(RegistryError, match="does not hold the adapter"):
        rollback(tracking_uri, model_name, None, "try")
    assert alias_version(client, model_name, "champion") == "2"


def test_rollback_only_to_a_version_that_was_champion(
    client: MlflowClient, tracking_uri: str, register: Register, better: dict[str, Any], model_name: str
) -> None:
    register(1, better)
    register(2, better)
    with pytest.raises(RegistryError, match="no champion"):
        rollback(tracking_uri, model_name, None, "why")
    promote(tracking_uri, model_name, version="1")
    with pytest.raises(RegistryError, match="no earlier champion"):
        rollback(tracking_uri, model_name, "2", "why")
    assert alias_version(client, model_name, "champion") == "1"


def test_edited_evidence_is_refused(
    client: MlflowClient, tracking_uri: str, register: Register, better: dict[str, Any], model_name: str, tmp_path: Path
) -> None:
    worse = json.loads(json.dumps(better))
    worse["metrics"]["heldout"] |= {"gain": -0.5, "gain_low": -0.6, "gain_high": -0.4}
    version = register(1, worse)
    path = Path(client.download_artifacts(version.run_id, "evidence/version-1.json", str(tmp_path)))
    evidence = json.loads(path.read_text())
    evidence["evaluation"] = better
    path.write_text(json.dumps(evidence))
    client.log_artifact(version.run_id, str(path), "evidence")
    with pytest.raises(RegistryError, match="was changed after the decision"):
        promote(tracking_uri, model_name, version="1")


def test_damaged_cached_champion_is_fetched_again(
    tracking_uri: str, register: Register, better: dict[str, Any], model_name: str, tmp_path: Path
) -> None:
    register(1, better)
    promote(tracking_uri, model_name, version="1")
    first = current_champion(tracking_uri, model_name, tmp_path / "cache")
    assert first is not None
    original = (first.folder / "adapter_model.safetensors").read_bytes()
    overwrite(first.folder / "adapter_model.safetensors")
    again = current_champion(tracking_uri, model_name, tmp_path / "cache")
    assert again == first
    assert (first.folder / "adapter_model.safetensors").read_bytes() == original
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [first.adapter_sha256]


def test_no_registry_no_model_no_alias_is_no_champion(
    tracking_uri: str, register: Register, better: dict[str, Any], model_name: str, tmp_path: Path
) -> None:
    absent = tmp_path / "nowhere" / "mlflow.db"
    assert current_champion(f"sqlite:///{absent}", model_name, tmp_path / "cache") is None
    assert not absent.parent.exists()
    assert current_champion(tracking_uri, "never registered", tmp_path / "cache") is None
    register(1, better)
    assert current_champion(tracking_uri, model_name, tmp_path / "cache") is None
    with pytest.raises(RegistryError, match="no challenger"):
        promote(tracking_uri, model_name)
    with pytest.raises(RegistryError, match="no registry"):
        promote(f"sqlite:///{absent}", model_name)


def test_version_registered_by_something_else_is_refused(
    client: MlflowClient, tracking_uri: str, model_name: str, tmp_path: Path
) -> None:
    client.create_registered_model(model_name)
    client.create_model_version(model_name, source=tmp_path.as_uri())
    with pytest.raises(RegistryError, match="evidence_sha256"):
        promote(tracking_uri, model_name, version="1", force_reason="foreign")


def test_registry_held_by_another_process_is_said_after_the_timeout(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    code = (
        "import sys\nfrom qlora_core.registry.connection import registry_lock\n"
        "with registry_lock(sys.argv[1]):\n    print('held', flush=True)\n    sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, uri]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(RegistryError, match=r"mlflow\.db\.lock"), registry_lock(uri, timeout_s=0.2):
            pass
        holder.kill()
    with registry_lock(uri, timeout_s=5):
        assert not (tmp_path / "mlflow.db").exists()


def test_unreadable_database_is_a_registry_error(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"this is no database" * 100)
    with pytest.raises(RegistryError, match="opening sqlite"):
        connect(f"sqlite:///{tmp_path / 'mlflow.db'}")


def test_credentials_never_reach_a_message() -> None:
    assert without_credentials("at http://user:secret@host:5000/x") == "at http://host:5000/x"


def test_lost_files_are_a_registry_error(
    client: MlflowClient, register: Register, better: dict[str, Any], tmp_path: Path
) -> None:
    version = register(1, better)
    shutil.rmtree(stored_weights(client, version).parent)
    with pytest.raises(RegistryError):
        download_version(client, version, tmp_path / "download")
