"""The Kubernetes manifests fit the API's schemas, and keep what they promise: no root, probes, limits, no secret."""

import copy
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

KUBERNETES = Path(__file__).parents[2] / "infra" / "kubernetes"
FILES = sorted(KUBERNETES.glob("*.yaml"))
API_VERSION = "1.33"
WORKLOADS = ("Deployment", "StatefulSet")


def objects(*paths: Path) -> list[dict[str, Any]]:
    return [item for path in paths or FILES for item in yaml.safe_load(path.read_text())["items"]]


def workloads() -> list[dict[str, Any]]:
    return [item for item in objects() if item["kind"] in WORKLOADS]


def pod(item: dict[str, Any]) -> dict[str, Any]:
    return item["spec"]["template"]["spec"]


def named(item: dict[str, Any]) -> str:
    return f"{item['kind']}/{item['metadata']['name']}"


@pytest.mark.parametrize("item", objects(), ids=named)
def test_object_fits_the_schema(item: dict[str, Any]) -> None:
    kubernetes_validate.validate(item, API_VERSION, strict=True)


@pytest.mark.parametrize("change", [{"replica": 1}, {"replicas": "one"}, {"selector": "prefect"}], ids=str)
def test_the_schema_sees_a_mistake(change: dict[str, Any]) -> None:
    item = copy.deepcopy(workloads()[0])
    item["spec"] |= change
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(item, API_VERSION, strict=True)


@pytest.mark.parametrize("item", workloads(), ids=named)
def test_pod_is_contained_probed_and_limited(item: dict[str, Any]) -> None:
    security = pod(item)["securityContext"]
    assert security["runAsNonRoot"] is True and security["runAsUser"] > 0
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in pod(item)["containers"]:
        inner = container["securityContext"]
        assert inner["allowPrivilegeEscalation"] is False and inner["readOnlyRootFilesystem"] is True
        assert inner["capabilities"] == {"drop": ["ALL"]}
        assert {"readinessProbe", "livenessProbe"} <= container.keys()
        assert container["resources"]["requests"].keys() >= {"cpu", "memory"}
        assert "memory" in container["resources"]["limits"]
        assert ":" in container["image"] and not container["image"].endswith(":latest")


def test_credentials_come_from_secrets_and_no_secret_is_here() -> None:
    assert "Secret" not in {item["kind"] for item in objects()}
    for item in workloads():
        for container in pod(item)["containers"]:
            for variable in container.get("env", []):
                if any(word in variable["name"] for word in ("PASSWORD", "SECRET", "TOKEN", "KEY", "AUTH_STRING")):
                    assert variable["valueFrom"]["secretKeyRef"]["name"] in ("qlora-clients", "qlora-servers")


def test_every_door_asks_for_credentials() -> None:
    containers = {container["name"]: container for item in workloads() for container in pod(item)["containers"]}
    variables = {name: {one["name"] for one in containers[name]["env"]} for name in containers}
    assert "PREFECT_SERVER_API_AUTH_STRING" in variables["prefect"]
    assert "--app-name=basic-auth" in containers["mlflow"]["command"]
    assert {"MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_BASIC_AUTH_FAIL_CLOSED"} <= variables["mlflow"]
    assert "QLORA_VOTE_SECRET" in variables["votes"]
    assert {item["spec"]["type"] for item in objects() if item["kind"] == "Service"} == {"ClusterIP"}


def test_services_and_policies_choose_pods_that_exist() -> None:
    pods = [item["spec"]["template"]["metadata"]["labels"] for item in workloads()]
    for item in objects():
        if item["kind"] == "Service":
            chosen = [labels for labels in pods if item["spec"]["selector"].items() <= labels.items()]
            assert len(chosen) == 1, named(item)
    claims = {item["metadata"]["name"] for item in objects() if item["kind"] == "PersistentVolumeClaim"}
    volumes = [volume for item in workloads() for volume in pod(item)["volumes"]]
    used = {one["persistentVolumeClaim"]["claimName"] for one in volumes if "persistentVolumeClaim" in one}
    assert used == claims


def test_network_is_shut_but_for_what_is_listed() -> None:
    policies = {item["metadata"]["name"]: item["spec"] for item in objects() if item["kind"] == "NetworkPolicy"}
    assert policies["deny-all-incoming"] == {"podSelector": {}, "policyTypes": ["Ingress"]}
    for name, policy in policies.items():
        for rule in policy.get("ingress", []):
            assert rule.get("from"), f"{name} lets everybody in"


def test_worker_may_start_jobs_and_nothing_else() -> None:
    (role,) = (item for item in objects() if item["kind"] == "Role")
    verbs = {(resource, verb) for rule in role["rules"] for resource in rule["resources"] for verb in rule["verbs"]}
    assert {resource for resource, verb in verbs if verb in ("create", "patch", "delete")} == {"jobs"}
    assert not any("*" in pair for pair in verbs) and "secrets" not in {resource for resource, _ in verbs}
