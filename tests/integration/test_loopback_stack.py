"""The whole system, started for real on loopback: each of its ports asks for a credential, and nothing outlives it.

Postgres, Prefect's and MLflow's servers, an S3 server, Ray with a token, the vote page and a Prefect worker, as
`python -m infra.loopback` starts them.
"""

import base64
import contextlib
import ipaddress
import os
import signal
import socket
import urllib.error
import urllib.request
from typing import TYPE_CHECKING

import boto3
import psutil
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError

if TYPE_CHECKING:
    from conftest import Stack

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


def listening(stack: "Stack") -> dict[int, tuple[str, str]]:
    """Every TCP port that any process of the system listens on: its address, and the process's name."""
    found = {}
    for process in stack.processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            for connection in process.net_connections(kind="tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    found[connection.laddr.port] = (connection.laddr.ip, process.name())
    return found


def is_loopback(ip: str) -> bool:
    """Whether the address is this machine's own; Ray's servers name it as IPv6 writes it, ::ffff:127.0.0.1."""
    address = ipaddress.ip_address(ip)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def status_of(url: str, method: str = "GET", body: bytes | None = None, headers: dict[str, str] | None = None) -> int:
    request = urllib.request.Request(url, body, headers or {}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_every_port_is_on_loopback_and_the_known_ones_are_there(stack: "Stack") -> None:
    found = listening(stack)
    assert [owner for owner in found.values() if not is_loopback(owner[0])] == []
    assert set(stack.ports.values()) <= found.keys(), (stack.ports, found)


@pytest.mark.parametrize("password", ["", "wrong"])
def test_postgres_refuses_without_its_password(stack: "Stack", password: str) -> None:
    import psycopg

    for user, database in (
        ("postgres", "postgres"),
        ("prefect", "prefect"),
        ("mlflow", "mlflow"),
        ("mlflow", "studies"),
    ):
        with pytest.raises(psycopg.OperationalError, match=r"password|CONNECT"):
            psycopg.connect(
                host="127.0.0.1", port=stack.ports["postgres"], user=user, password=password, dbname=database
            )


@pytest.mark.parametrize("header", [{}, {"Authorization": "Basic cWxvcmE6d3Jvbmc="}], ids=["none", "wrong"])
def test_prefect_and_mlflow_refuse_without_their_passwords(stack: "Stack", header: dict[str, str]) -> None:
    prefect_url, mlflow_url = (f"http://127.0.0.1:{stack.ports[name]}" for name in ("prefect", "mlflow"))
    kind = {"Content-Type": "application/json", **header}
    asked = {
        f"{prefect_url}/api/flow_runs/filter": status_of(f"{prefect_url}/api/flow_runs/filter", "POST", b"{}", kind),
        f"{prefect_url}/api/admin/settings": status_of(f"{prefect_url}/api/admin/settings", headers=header),
        f"{prefect_url}/api/admin/database/clear": status_of(
            f"{prefect_url}/api/admin/database/clear", "POST", b'{"confirm": true}', kind
        ),
    }
    for path in ("experiments/search?max_results=1", "registered-models/search", "users/current"):
        asked[path] = status_of(f"{mlflow_url}/api/2.0/mlflow/{path}", headers=header)
    asked["artifacts"] = status_of(f"{mlflow_url}/api/2.0/mlflow-artifacts/artifacts", headers=header)
    asked["home"] = status_of(f"{mlflow_url}/", headers=header)
    assert set(asked.values()) <= {401, 403}, asked


def test_the_bucket_refuses_unsigned_and_wrongly_signed_requests(stack: "Stack") -> None:
    url = stack.environment["AWS_ENDPOINT_URL"]
    unsigned = [
        status_of(url + path, method)
        for path in ("/", "/artifacts", "/artifacts/x", "/moto-api/data.json", "/moto-api/reset")
        for method in ("GET", "PUT", "POST", "DELETE")
    ]
    assert set(unsigned) == {403}
    key_id = stack.environment["AWS_ACCESS_KEY_ID"]
    wrong = boto3.client(
        "s3", endpoint_url=url, aws_access_key_id=key_id, aws_secret_access_key="wrong", region_name="us-east-1"
    )
    for ask in (
        lambda: wrong.list_objects_v2(Bucket="artifacts"),
        lambda: wrong.get_object(Bucket="artifacts", Key="x"),
        lambda: wrong.put_object(Bucket="artifacts", Key="x", Body=b""),
        lambda: wrong.delete_object(Bucket="artifacts", Key="x"),
    ):
        with pytest.raises(ClientError) as refused:
            ask()
        assert refused.value.response["ResponseMetadata"]["HTTPStatusCode"] == 403


def test_a_presigned_url_opens_its_object_in_its_time_and_nothing_else(stack: "Stack") -> None:
    client = boto3.client(
        "s3",
        endpoint_url=stack.environment["AWS_ENDPOINT_URL"],
        aws_access_key_id=stack.environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=stack.environment["AWS_SECRET_ACCESS_KEY"],
        region_name="us-east-1",
        config=Config(signature_version="s3v4"),
    )
    for name in ("a", "b"):
        client.put_object(Bucket="artifacts", Key=f"signed {name}", Body=name.encode())

    def url(seconds: int) -> str:
        named = {"Bucket": "artifacts", "Key": "signed a", "ResponseContentDisposition": 'attachment; filename="a"'}
        return client.generate_presigned_url("get_object", Params=named, ExpiresIn=seconds)

    good = url(100)
    with urllib.request.urlopen(good, timeout=10) as answer:
        assert answer.read() == b"a"
    changed = [good.replace("Expires=100", "Expires=999"), good.replace("signed%20a", "signed%20b"), url(0)]
    assert good not in changed
    assert {status_of(one) for one in changed} | {status_of(good, method) for method in ("PUT", "DELETE")} == {403}


def test_the_vote_page_refuses_without_a_signed_link(stack: "Stack") -> None:
    url = f"http://127.0.0.1:{stack.ports['votes']}"
    paths = ("/", "/r/forged", "/results/forged", "/results/forged/files/votes.csv", "/openapi.json", "/docs")
    assert {status_of(url + path) for path in paths} <= {403, 404}


def test_no_credential_is_in_any_file_of_the_servers(stack: "Stack") -> None:
    names = ("AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "RAY_AUTH_TOKEN", "PGPASSWORD")
    prefect = stack.environment["PREFECT_API_AUTH_STRING"]
    secrets = [stack.canary, prefect.partition(":")[2], *(stack.environment[name] for name in names)]
    needles = [*(secret.encode() for secret in secrets), base64.b64encode(prefect.encode())]
    told = stack.folder / "stack.env"
    found, read = [], 0
    for path in stack.folder.rglob("*"):
        if path.is_file() and path != told:
            with contextlib.suppress(FileNotFoundError):
                content = path.read_bytes()
                read += 1
                found += [(str(path), needle) for needle in needles if needle in content]
    assert found == [] and read > 100
    # Control: they are where they belong, which only their owner can read.
    assert told.stat().st_mode & 0o077 == 0
    assert all(needle in told.read_bytes() for needle in needles[1:-1])


def test_sigkill_of_the_front_leaves_no_orphan(stack: "Stack") -> None:
    below = stack.processes()[1:]
    assert len(below) > 10
    os.kill(stack.process.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(below, timeout=90)
    assert [process.name() for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []
    for port in stack.ports.values():
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=2)
