"""The work pools' templates are what Prefect's workers of that type take, and name secrets instead of holding them."""

import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft202012Validator

DEPLOYMENTS = Path(__file__).parents[2] / "deployments"
POOLS = {"process": "prefect", "docker": "prefect-docker", "kubernetes": "prefect-kubernetes"}
PLACEHOLDER = re.compile(r"\{\{ (\w+) \}\}")


def template(kind: str) -> dict[str, Any]:
    return json.loads((DEPLOYMENTS / "pools" / f"{kind}.json").read_text())


def prefects_own(kind: str) -> dict[str, Any]:
    views = files("prefect").joinpath("server/api/collections_data/views/aggregate-worker-metadata.json")
    return json.loads(views.read_text())[POOLS[kind]][kind]["default_base_job_configuration"]


def resolved(node: Any, values: dict[str, Any]) -> Any:
    """The job as a worker gets it, with each variable's default and what Prefect itself fills in."""
    if isinstance(node, dict):
        kept = {key: resolved(value, values) for key, value in node.items()}
        return {key: value for key, value in kept.items() if value is not None}
    if isinstance(node, list):
        return [resolved(value, values) for value in node]
    if isinstance(node, str) and (match := PLACEHOLDER.fullmatch(node)):
        return values.get(match.group(1))
    return PLACEHOLDER.sub(lambda match: str(values[match.group(1)]), node) if isinstance(node, str) else node


def test_there_is_a_template_for_each_type_of_pool() -> None:
    assert {path.stem for path in (DEPLOYMENTS / "pools").iterdir()} == POOLS.keys()


@pytest.mark.parametrize("kind", POOLS)
def test_template_is_one_that_the_worker_takes(kind: str) -> None:
    ours, own = template(kind), prefects_own(kind)
    extra = {"container_create_kwargs"} if kind == "docker" else set()
    assert ours["job_configuration"].keys() - own["job_configuration"].keys() <= extra
    used = set(PLACEHOLDER.findall(json.dumps(ours["job_configuration"])))
    assert used == ours["variables"]["properties"].keys()
    assert used <= own["variables"]["properties"].keys()
    Draft202012Validator.check_schema(ours["variables"])
    defaults = {name: one["default"] for name, one in ours["variables"]["properties"].items() if "default" in one}
    assert list(Draft202012Validator(ours["variables"]).iter_errors(defaults)) == []


@pytest.mark.parametrize("kind", POOLS)
def test_secrets_are_named_and_not_written(kind: str) -> None:
    environment = template(kind)["variables"]["properties"]["env"]["default"]
    for name, value in environment.items():
        if re.search(r"PASSWORD|SECRET|TOKEN|KEY|AUTH_STRING", name):
            assert re.fullmatch(r"\{\{ prefect\.blocks\.secret\.qlora-[a-z0-9-]+ \}\}", value), name


def test_kubernetes_job_fits_the_schema_and_is_contained() -> None:
    pool = template("kubernetes")
    defaults = {name: one.get("default") for name, one in pool["variables"]["properties"].items()}
    given = {"name": "run", "labels": {"app": "qlora"}, "command": ["prefect", "flow-run", "execute"], "env": []}
    job = resolved(pool["job_configuration"]["job_manifest"], {**defaults, **given})
    kubernetes_validate.validate(job, "1.33", strict=True)
    pod = job["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    (container,) = pod["containers"]
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert container["resources"]["limits"]["memory"] == "16Gi"


def test_docker_container_is_not_root() -> None:
    job = template("docker")["job_configuration"]
    assert job["container_create_kwargs"]["user"] == "1000" and job["privileged"] is False


def test_environment_chooses_the_pool_of_every_deployment() -> None:
    deployments = yaml.safe_load((DEPLOYMENTS / "prefect.yaml").read_text())["deployments"]
    assert {deployment["work_pool"]["name"] for deployment in deployments} == {"{{ $QLORA_POOL }}"}
