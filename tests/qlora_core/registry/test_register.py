"""The registration stage over a real NF4 base: a clean process must reproduce the golden logits before any alias moves."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_core.config.gate import GateConfig
from qlora_core.config.quantize import QuantizeConfig
from qlora_core.errors import RegistryError
from qlora_core.model.adapter import Golden, golden_logits, write_golden
from qlora_core.model.base import load_quantized
from qlora_core.quantization.quantize import quantize_checkpoint
from qlora_core.registry.aliases import alias_version
from qlora_core.registry.gate import decide
from qlora_core.registry.promotion import promote
from qlora_core.registry.register import RegistrationRequest, register_run
from qlora_core.registry.registration import REGISTRATION_TAG, find_registration

BASE_DIGEST = "b" * 64
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
    model.save_pretrained(folder)
    write_golden(folder, Golden(PROMPTS, golden_logits(model, PROMPTS)))
    (folder / "qlora.json").write_text(json.dumps({"quantized_base_digest": BASE_DIGEST, "precision": "float32"}))
    return folder


@pytest.fixture
def request_for(
    base: Path,
    adapter: Path,
    work_dir: Path,
    tracking_uri: str,
    model_name: str,
    sweep: dict[str, Any],
    better: dict[str, Any],
    tmp_path: Path,
) -> Callable[..., RegistrationRequest]:
    """A complete request; its evaluation beats the base, so the decision is PROMOTE."""

    def build(**changes: Any) -> RegistrationRequest:
        (adapter.parent / "sweep.json").write_text(json.dumps(sweep))
        (tmp_path / "evaluation.json").write_text(json.dumps(better))
        (tmp_path / "report.html").write_text("<html></html>")
        decision = decide(better, None, GateConfig())
        request = RegistrationRequest(
            tracking_uri=tracking_uri,
            model_name=model_name,
            experiment="tests",
            work_dir=work_dir,
            config={"gate": GateConfig().model_dump(mode="json")},
            sweep_folder=adapter.parent,
            evaluation_folder=tmp_path,
            quantized_folder=base,
            report=tmp_path / "report.html",
            decision={"verdict": decision.verdict, "reasons": list(decision.reasons), "comparison": None},
            lineage={
                "base_model": "tiny",
                "base_revision": "none",
                "quantized_base_digest": BASE_DIGEST,
                "data_digest": "d" * 64,
                "config_digest": "c" * 64,
            },
            run_key=f"{model_name}-key",
        )
        return replace(request, **changes)

    return build


def test_registration_checks_promotes_and_repeats_nothing(
    request_for: Callable[..., RegistrationRequest],
    client: MlflowClient,
    tracking_uri: str,
    model_name: str,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    request = request_for()
    registration = register_run(request, out)
    assert registration["verdict"] == "PROMOTE"
    assert (registration["version"], registration["champion_before"]) == ("1", None)
    assert registration["aliases"] == ["challenger", "champion"]
    assert json.loads((out / "registration.json").read_text()) == registration
    assert (out / registration["report"]).read_text() == "<html></html>"
    files = {file.path for file in client.list_artifacts(registration["run_id"])}
    assert {"config.json", "evaluation.json", "report.html", "evidence"} <= files

    assert find_registration(tracking_uri, model_name, request.run_key) == registration
    assert register_run(request, out) == registration
    assert len(client.search_model_versions(f"name = '{model_name}'")) == 1
    assert promote(tracking_uri, model_name)["champion"] == "1"

    _mark_started(client, model_name, registration)  # as if it had died between moving the alias and saying so
    assert find_registration(tracking_uri, model_name, request.run_key) == registration


def test_adapter_on_another_base_moves_no_alias(
    request_for: Callable[..., RegistrationRequest],
    client: MlflowClient,
    tracking_uri: str,
    model_name: str,
    tmp_path: Path,
) -> None:
    other = make_base(tmp_path, seed=7)
    with pytest.raises(RegistryError, match=r"no alias was moved: golden prompt 0 .* logits differ"):
        register_run(request_for(quantized_folder=other), tmp_path)
    assert alias_version(client, model_name, "challenger") is None
    assert alias_version(client, model_name, "champion") is None
    assert not (tmp_path / "registration.json").exists()
    assert find_registration(tracking_uri, model_name, f"{model_name}-key") is None
    with pytest.raises(RegistryError, match="load_check"):
        promote(tracking_uri, model_name, "1", force_reason="unproven is not forgiven")


def test_champion_changed_since_the_comparison_holds_and_is_not_recorded_as_done(
    request_for: Callable[..., RegistrationRequest],
    client: MlflowClient,
    tracking_uri: str,
    model_name: str,
    tmp_path: Path,
) -> None:
    client.create_registered_model(model_name)
    client.create_model_version(model_name, source=tmp_path.as_uri())
    client.set_registered_model_alias(model_name, "champion", "1")
    registration = register_run(request_for(), tmp_path)
    assert registration["verdict"] == "HOLD"
    assert "version 1 is champion now" in registration["reasons"][-1]
    assert (registration["version"], registration["champion_before"]) == ("2", "1")
    assert alias_version(client, model_name, "champion") == "1"
    assert find_registration(tracking_uri, model_name, f"{model_name}-key") is None


def test_decision_that_the_evidence_does_not_support_is_refused(
    request_for: Callable[..., RegistrationRequest], client: MlflowClient, model_name: str, tmp_path: Path
) -> None:
    with pytest.raises(RegistryError, match="REJECT.*PROMOTE"):
        register_run(request_for(decision={"verdict": "REJECT", "reasons": []}), tmp_path)
    assert alias_version(client, model_name, "challenger") is None


def test_incomplete_lineage_is_refused_before_a_version_exists(
    request_for: Callable[..., RegistrationRequest], client: MlflowClient, model_name: str, tmp_path: Path
) -> None:
    request = request_for()
    lineage = {key: value for key, value in request.lineage.items() if key != "config_digest"}
    with pytest.raises(RegistryError, match="config_digest"):
        register_run(replace(request, lineage=lineage), tmp_path)
    assert client.search_model_versions(f"name = '{model_name}'") == []


def _mark_started(client: MlflowClient, model_name: str, registration: dict[str, Any]) -> None:
    entry = {"state": "started", "registration": {**registration, "aliases": []}}
    client.set_model_version_tag(model_name, registration["version"], REGISTRATION_TAG, json.dumps(entry))
