"""The compose files fit the Compose specification and keep what they promise: pins, no root, health, no secret.

What `docker compose config` would do without an engine: interpolate, merge, check the schema and every reference.
"""

import copy
import json
import re
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

COMPOSE = Path(__file__).parents[2] / "infra" / "compose"
FILES = sorted(COMPOSE.glob("*.yaml"))
VARIABLE = re.compile(r"\$\{(\w+)(:\?|:-)([^}]*)\}")
OWN = f"qlora-fleet:{version('qlora-fleet')}"
MAKES_A_BUCKET = "bucket"


class MissingVariableError(KeyError):
    """A required variable that is not set."""


def read(name: str = "compose.yaml") -> dict[str, Any]:
    """The file as Compose merges it: YAML merge keys with lists, and no extension fields."""
    document = yaml.safe_load((COMPOSE / name).read_text())
    return {key: value for key, value in document.items() if not key.startswith("x-")}


def interpolate(node: Any, variables: dict[str, str]) -> Any:
    """`${NAME:?message}` and `${NAME:-default}` as Compose replaces them; a lone dollar sign is an error."""
    if isinstance(node, dict):
        return {key: interpolate(value, variables) for key, value in node.items()}
    if isinstance(node, list):
        return [interpolate(value, variables) for value in node]
    if not isinstance(node, str):
        return node

    def value(match: re.Match[str]) -> str:
        name, kind, rest = match.groups()
        if not variables.get(name):
            if kind == ":?":
                raise MissingVariableError(name)
            return rest
        return variables[name]

    replaced = VARIABLE.sub(value, node)
    assert "$" not in replaced, f"{node!r} holds a dollar sign that is no variable"
    return replaced


def required(node: Any) -> set[str]:
    return {name for name, kind, _ in VARIABLE.findall(json.dumps(node)) if kind == ":?"}


def everything_set() -> dict[str, str]:
    return {name: f"value-of-{name.lower()}" for name in required(read())}


def services() -> dict[str, Any]:
    return interpolate(read(), everything_set())["services"]


def faults(document: dict[str, Any]) -> list[str]:
    text = files("check_jsonschema").joinpath("builtin_schemas/vendor/compose-spec.json").read_text()
    found = Draft202012Validator(json.loads(text)).iter_errors(document)
    return [f"{'/'.join(map(str, fault.absolute_path))}: {fault.message}" for fault in found]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_file_fits_the_specification(path: Path) -> None:
    assert faults(interpolate(read(path.name), everything_set())) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [("healthchek", {}), ("ports", "127.0.0.1:1:1"), ("restart", 3), ("depends_on", {"x": {"condition": "up"}})],
)
def test_the_schema_sees_a_mistake(key: str, value: Any) -> None:
    document = copy.deepcopy(interpolate(read(), everything_set()))
    document["services"]["mlflow"][key] = value
    assert faults(document)


def test_gpu_file_lays_over_services_that_exist() -> None:
    assert read("compose.gpu.yaml")["services"].keys() <= read()["services"].keys()


@pytest.mark.parametrize("name", sorted(required(read())))
def test_every_password_is_required(name: str) -> None:
    without = {other: value for other, value in everything_set().items() if other != name}
    with pytest.raises(MissingVariableError, match=name):
        interpolate(read(), without)


def test_no_secret_stands_in_a_file() -> None:
    for name, service in read()["services"].items():
        for variable, value in service.get("environment", {}).items():
            if re.search(r"PASSWORD|SECRET|TOKEN|KEY|AUTH_STRING", variable):
                assert re.fullmatch(r"\$\{QLORA_\w+:\?[^}]+\}", value), f"{name}: {variable}={value}"
    for text in ((COMPOSE / name).read_text() for name in ("databases.sh", "make-bucket.sh", "mlflow-auth.ini")):
        assert not re.search(r"PASSWORD '|password *=|://\w+:[^@/\s]+@", text)


def test_images_are_pinned_and_ours_is_this_version() -> None:
    for name, service in services().items():
        tag = service["image"].rpartition(":")[2]
        assert re.search(r"\d+\.\d+|RELEASE\.\d{4}-", tag), f"{name}: {service['image']}"
    ours = {service["image"] for service in services().values() if "build" in service}
    assert ours == {OWN}
    build = services()["prefect"]["build"]
    assert (COMPOSE / build["context"] / build["dockerfile"]).resolve().is_file()


def test_nobody_is_root_or_may_become_it() -> None:
    for name, service in services().items():
        assert service["user"].split(":")[0] not in ("", "0", "root"), name
        assert service["cap_drop"] == ["ALL"] and service["read_only"] is True, name
        assert "no-new-privileges:true" in service["security_opt"], name
        assert not service.get("privileged"), name


def test_every_server_has_a_health_check() -> None:
    for name, service in services().items():
        if name != MAKES_A_BUCKET:
            assert service["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL"), name
            assert service["healthcheck"]["retries"] >= 3, name


def test_published_ports_are_on_loopback_and_rays_are_not_published() -> None:
    published = {name: service["ports"] for name, service in services().items() if "ports" in service}
    assert published.keys() == {"objects", "prefect", "mlflow", "votes"}
    assert all(port.startswith("127.0.0.1:") for ports in published.values() for port in ports)


def test_every_reference_has_its_target() -> None:
    document = interpolate(read(), everything_set())
    for name, service in document["services"].items():
        for other, how in service.get("depends_on", {}).items():
            target = document["services"][other]
            if how["condition"] == "service_healthy":
                assert target["healthcheck"].get("disable") is not True, f"{name} waits for {other}"
        assert set(service["networks"]) <= document["networks"].keys()
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("./"):
                assert (COMPOSE / source).is_file(), volume
            elif not source.startswith("value-of-"):
                assert source in document["volumes"], volume


def test_doors_ask_for_credentials() -> None:
    found = services()
    assert found["prefect"]["environment"]["PREFECT_SERVER_API_AUTH_STRING"]
    assert "--app-name=basic-auth" in found["mlflow"]["command"]
    assert found["mlflow"]["environment"]["MLFLOW_BASIC_AUTH_FAIL_CLOSED"] == "true"
    assert "default_permission = NO_PERMISSIONS" in (COMPOSE / "mlflow-auth.ini").read_text()
    for name in ("ray-head", "ray-worker", "worker"):
        environment = found[name]["environment"]
        assert environment["RAY_AUTH_MODE"] == "token" and environment["RAY_AUTH_TOKEN"], name
    assert found["votes"]["environment"]["QLORA_VOTE_SECRET"]
    assert "scram-sha-256" in found["postgres"]["environment"]["POSTGRES_INITDB_ARGS"]
    assert found["objects"]["environment"]["MINIO_ROOT_PASSWORD"]
