"""The registration stage over a real NF4 base: a clean process gives the golden logits before any alias moves."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from mlflow import MlflowClient
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_core.config.gate import GateConfig
from qlora_core.config.quantize import QuantizeConfig
from qlora_core.digest import digest_file
from qlora_core.errors import RegistryError
from qlora_core.model.adapter import Golden, golden_logits, write_golden
from qlora_core.model.base import load_quantized
from qlora_core.quantization.quantize import quantize_checkpoint
from qlora_core.registry.aliases import alias_version
from qlora_core.registry.gate.decide import decide
from qlora_core.registry.load_check import LOAD_CHECK_TAG, PASSED, check_in_this_process
from qlora_core.registry.promotion import promote
from qlora_core.registry.register import RegistrationRequest, register_run
from qlora_core.registry.registration import REGISTRATION_TAG, find_registration
from qlora_core.registry.versions import register_adapter

LINEAGE = {
    "base_model": "tiny",
    "base_revision": "none",
    "quantized_base_digest": "b" * 64,
    "data_digest": "d" * 64,
    "config_digest": "c" * 64,
}
PROMPTS = [[1, 5, 9], [2, 2, 40, 7], [60]]


def make_base(folder: Path, *, seed: int) -> Path:
    """A Llama of one layer with random weights, in NF4."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "plain")
    (folder / "plain" / "tokenizer.json").write_text("{}")
    quantize_checkpoint(folder / "plain", folder / "nf4", QuantizeConfig())
    return folder / "nf4"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"), seed=0)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with random B matrices and the logits it gives here and now."""
    folder = tmp_path_factory.mktemp("sweep") / "adapter"
    torch.manual_seed(1)
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    model = get_peft_model(load_quantized(base, precision="float32", device="cpu"), settings).eval()
    model.save_pretrained(str(folder))
    write_golden(folder, Golden(PROMPTS, golden_logits(model, PROMPTS)))
    (folder / "qlora.json").write_text(
        json.dumps({"quantized_base_digest": LINEAGE["quantized_base_digest"], "precision": "float32"})
    )
    return folder


@pytest.fixture(scope="module")
def request_for(
    base: Path, adapter: Path, work_dir: Path, tracking_uri: str, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], RegistrationRequest]:
    """A complete request per model name; its evaluation beats the base, so the decision is PROMOTE."""
    folder = tmp_path_factory.mktemp("evaluation")
    figures = {"rows": 100, "base_loss": 2.0, "adapter_loss": 1.5, "gain": 0.5, "gain_low": 0.4, "gain_high": 0.6}
    evaluation = {"metrics": {"heldout": figures, "exact_match": None, "judge": None}}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    (folder / "report.html").write_text("<html></html>")
    (adapter.parent / "sweep.json").write_text(json.dumps({"method": "grid", "best": "t000", "trials": []}))
    decision = decide(evaluation, None, GateConfig())

    def build(model_name: str) -> RegistrationRequest:
        return RegistrationRequest(
            tracking_uri=tracking_uri,
            model_name=model_name,
            experiment="tests",
            work_dir=work_dir,
            config={"gate": GateConfig().model_dump(mode="json")},
            sweep_folder=adapter.parent,
            evaluation_folder=folder,
            quantized_folder=base,
            report=folder / "report.html",
            decision={"verdict": decision.verdict, "reasons": list(decision.reasons), "comparison": None},
            lineage=LINEAGE,
            run_key=f"{model_name}-key",
            keep_evidence=lambda file: f"v1/stage/evidence/{digest_file(file)}",
        )

    return build


@pytest.fixture(scope="module")
def registered(
    request_for: Callable[[str], RegistrationRequest], tmp_path_factory: pytest.TempPathFactory
) -> tuple[RegistrationRequest, dict[str, Any]]:
    """One whole registration, clean process included, for the tests that look at it."""
    request = request_for("registered")
    out = tmp_path_factory.mktemp("out")
    registration = register_run(request, out)
    assert json.loads((out / "registration.json").read_text()) == registration
    assert (out / registration["report"]).read_text() == "<html></html>"
    return request, registration


def test_registration_checks_and_promotes(
    registered: tuple[RegistrationRequest, dict[str, Any]], client: MlflowClient
) -> None:
    _, registration = registered
    assert (registration["verdict"], registration["version"]) == ("PROMOTE", "1")
    assert registration["champion_before"] is None
    assert registration["aliases"] == ["challenger", "champion"]
    assert client.get_model_version("registered", "1").tags[LOAD_CHECK_TAG] == PASSED
    files = {file.path for file in client.list_artifacts(registration["run_id"])}
    assert {"config.json", "evaluation.json", "report.html", "evidence"} <= files
    tags = client.get_model_version("registered", "1").tags
    assert tags["evidence_address"] == f"v1/stage/evidence/{tags['evidence_sha256']}"


def test_registering_again_repeats_nothing(
    registered: tuple[RegistrationRequest, dict[str, Any]], client: MlflowClient, tmp_path: Path
) -> None:
    request, registration = registered
    assert find_registration(request.tracking_uri, "registered", request.run_key) == registration
    for _ in range(10):
        assert register_run(request, tmp_path) == registration
    assert len(client.search_model_versions("name = 'registered'")) == 1
    assert promote(request.tracking_uri, "registered")["champion"] == "1"


def test_registration_that_died_after_the_alias_moved_is_completed(
    registered: tuple[RegistrationRequest, dict[str, Any]], client: MlflowClient
) -> None:
    request, registration = registered
    entry = {"state": "started", "registration": {**registration, "aliases": []}}
    client.set_model_version_tag("registered", "1", REGISTRATION_TAG, json.dumps(entry))
    assert find_registration(request.tracking_uri, "registered", request.run_key) == registration


def test_champion_changed_since_the_comparison_holds_and_is_decided_on_again(
    registered: tuple[RegistrationRequest, dict[str, Any]], client: MlflowClient, tmp_path: Path
) -> None:
    request, _ = registered
    client.create_model_version("registered", source=tmp_path.as_uri())
    client.set_registered_model_alias("registered", "champion", "2")
    again = register_run(request, tmp_path)
    assert (again["verdict"], again["champion_before"]) == ("HOLD", "2")
    assert "version 2 is champion now" in again["reasons"][-1]
    assert alias_version(client, "registered", "champion") == "2"
    assert find_registration(request.tracking_uri, "registered", request.run_key) is None
    client.set_registered_model_alias("registered", "champion", "1")


def test_adapter_overwritten_before_the_check_moves_no_alias(
    request_for: Callable[[str], RegistrationRequest],
    client: MlflowClient,
    experiment_id: str,
    model_name: str,
    tmp_path: Path,
) -> None:
    request = request_for(model_name)
    run_id = client.create_run(experiment_id).info.run_id
    version = register_adapter(
        client,
        model_name,
        request.sweep_folder / "adapter",
        run_id=run_id,
        run_key=request.run_key,
        lineage=request.lineage,
    )
    source = client.get_model_version_download_uri(model_name, version.version)
    weights = Path(source.removeprefix("file://")) / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(RegistryError, match=r"no alias was moved: version 1 .* does not hold the adapter"):
        register_run(request, tmp_path)
    assert alias_version(client, model_name, "challenger") is None
    assert alias_version(client, model_name, "champion") is None
    assert not (tmp_path / "registration.json").exists()
    assert find_registration(request.tracking_uri, model_name, request.run_key) is None
    with pytest.raises(RegistryError, match="load_check"):
        promote(request.tracking_uri, model_name, "1", force_reason="unproven is not forgiven")


@pytest.fixture
def mlflow_globals(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The check sets MLflow's globals, and a variable, in its own process; here that is the tests' process."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    before = mlflow.get_tracking_uri(), mlflow.get_registry_uri()
    yield
    mlflow.set_tracking_uri(before[0])
    mlflow.set_registry_uri(before[1])


@pytest.mark.usefixtures("mlflow_globals")
def test_check_names_what_differs_on_another_base(
    registered: tuple[RegistrationRequest, dict[str, Any]], client: MlflowClient, tmp_path: Path
) -> None:
    request, _ = registered
    tags = client.get_model_version("registered", "1").tags
    question = {
        "tracking_uri": request.tracking_uri,
        "name": "registered",
        "version": "1",
        "adapter_sha256": tags["adapter_sha256"],
        "quantized_base_digest": tags["quantized_base_digest"],
        "quantized_folder": str(request.quantized_folder),
    }
    same = check_in_this_process(question, tmp_path / "same")
    assert same["ok"] and same["prompts"] == 3 and same["max_difference"] <= 1e-4

    other = make_base(tmp_path, seed=7)
    answer = check_in_this_process({**question, "quantized_folder": str(other)}, tmp_path / "other")
    assert not answer["ok"] and "logits differ" in answer["reason"]
    answer = check_in_this_process({**question, "quantized_base_digest": "e" * 64}, tmp_path / "digest")
    assert not answer["ok"] and "e" * 64 in answer["reason"]


def test_decision_that_the_evidence_does_not_support_is_refused(
    request_for: Callable[[str], RegistrationRequest], client: MlflowClient, model_name: str, tmp_path: Path
) -> None:
    with pytest.raises(RegistryError, match=r"REJECT.*PROMOTE"):
        register_run(replace(request_for(model_name), decision={"verdict": "REJECT", "reasons": []}), tmp_path)
    assert alias_version(client, model_name, "challenger") is None


def test_incomplete_lineage_is_refused_before_a_version_exists(
    request_for: Callable[[str], RegistrationRequest], client: MlflowClient, model_name: str, tmp_path: Path
) -> None:
    lineage = {key: value for key, value in LINEAGE.items() if key != "config_digest"}
    with pytest.raises(RegistryError, match="config_digest"):
        register_run(replace(request_for(model_name), lineage=lineage), tmp_path)
    assert client.search_model_versions(f"name = '{model_name}'") == []
