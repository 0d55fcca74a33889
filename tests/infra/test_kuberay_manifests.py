"""The KubeRay manifests fit the API's schema and keep what the design promises: token, no idle GPUs, one version."""

import copy
import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

INFRA = Path(__file__).parents[2] / "infra"
SCHEMAS = Path(__file__).parent / "schemas"
MANIFESTS = sorted((INFRA / "kuberay").glob("*.yaml"))
RAY_FLOOR = (2, 58, 2)  # below it are CVE-2025-62593 and its kin


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def faults(document: dict[str, Any]) -> list[str]:
    schema = json.loads((SCHEMAS / f"{document['kind'].lower()}.json").read_text())
    Draft202012Validator.check_schema(schema)
    found = Draft202012Validator(schema).iter_errors(document)
    return [f"{'/'.join(map(str, fault.absolute_path))}: {fault.message}" for fault in found]


def cluster_of(document: dict[str, Any]) -> dict[str, Any]:
    return document["spec"] if document["kind"] == "RayCluster" else document["spec"]["rayClusterSpec"]


def test_there_is_a_manifest_of_each_kind() -> None:
    assert sorted(read(path)["kind"] for path in MANIFESTS) == ["RayCluster", "RayJob"]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifest_fits_the_schema(path: Path) -> None:
    assert faults(read(path)) == []


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("spec", "workerGroupSpecs", 0, "minReplica"), 0),
        (("spec", "workerGroupSpecs", 0, "maxReplicas"), "four"),
        (("spec", "authOptions", "mode"), "tokens"),
        (("spec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("spec", "headGroupSpec", "template", "spec", "containers"), []),
        (
            ("spec", "workerGroupSpecs", 1, "template", "spec", "containers", 0, "resources", "limits", "memory"),
            "64 GB",
        ),
    ],
    ids=lambda value: "/".join(map(str, value)) if isinstance(value, tuple) else repr(value),
)
def test_the_schema_sees_a_mistake(place: tuple[Any, ...], value: Any) -> None:
    document = copy.deepcopy(read(INFRA / "kuberay" / "raycluster.yaml"))
    inner = document
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    assert faults(document)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_token_is_on_and_nothing_runs_on_the_head(path: Path) -> None:
    cluster = cluster_of(read(path))
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    start = cluster["headGroupSpec"]["rayStartParams"]
    assert (start["num-cpus"], start["num-gpus"]) == ("0", "0")


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_gpu_groups_shrink_to_nothing_and_have_one_gpu_a_pod(path: Path) -> None:
    cluster = cluster_of(read(path))
    assert cluster["enableInTreeAutoscaling"] is True
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    assert groups.keys() == {"gpu-on-demand", "gpu-spot"}
    for group in groups.values():
        assert group["minReplicas"] == group["replicas"] == 0 < group["maxReplicas"]
        (container,) = group["template"]["spec"]["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    selectors = [group["template"]["spec"]["nodeSelector"]["qlora-fleet/capacity"] for group in groups.values()]
    assert selectors == ["on-demand", "spot"]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_ray_is_the_installed_one_and_above_the_security_floor(path: Path) -> None:
    named = cluster_of(read(path))["rayVersion"]
    assert named == version("ray")
    assert tuple(map(int, named.split("."))) >= RAY_FLOOR


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_every_pod_runs_one_image_without_root_over_the_same_work_folder(path: Path) -> None:
    cluster = cluster_of(read(path))
    pods = [part["template"]["spec"] for part in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
    containers = [container for pod in pods for container in pod["containers"]]
    assert len({container["image"] for container in containers}) == 1
    assert all(pod["securityContext"]["runAsNonRoot"] for pod in pods)
    assert all({"name": "work", "mountPath": "/state"} in container["volumeMounts"] for container in containers)


def test_the_jobs_command_is_one_that_the_cli_takes() -> None:
    from typer.testing import CliRunner

    from flows.cli.app import app
    from qlora_core.config.load import parse_config

    words = read(INFRA / "kuberay" / "rayjob.yaml")["spec"]["entrypoint"].split()
    assert words[:2] == ["qlora", "sweep"]
    assert CliRunner().invoke(app, ["sweep", "--help"]).exit_code == 0
    overrides = dict(word.split("=", 1) for word in words if "=" in word)
    compute = {key.removeprefix("compute."): yaml.safe_load(value) for key, value in overrides.items()}
    config = {"data": {"sources": ["."]}, "base": {"model": "demo"}, "compute": compute}
    assert parse_config(config, folder=Path.cwd()).compute.gpus == "required"


def test_the_image_has_the_token_on_and_no_root() -> None:
    text = (INFRA / "docker" / "Dockerfile").read_text()
    assert re.search(r"^\s+RAY_AUTH_MODE=token \\$", text, flags=re.MULTILINE)
    assert text.index("USER 1000") > text.index("pip install")
    assert "--constraint /tmp/install/constraints.txt" in text
