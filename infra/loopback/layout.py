"""Which services there are, on which ports, with which credentials: the stack's plan. Starts nothing."""

import base64
import os
import sys
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from infra.loopback import postgres
from infra.loopback.credentials import Credentials
from infra.loopback.service import Service, accepts, answers, free_ports

BUCKET = "artifacts"
POOL = "local"
PORTS = ("postgres", "objects", "prefect", "mlflow", "ray", "votes")
HOST = "127.0.0.1"
_BIN = Path(sys.executable).parent
_FOREIGN = ("AWS_", "PREFECT_", "MLFLOW_", "RAY_", "PG", "QLORA_")
"""Variables of other stacks, which must not reach this one."""


@dataclass(frozen=True)
class Layout:
    """The plan for one start in `folder`. `key_id` is known once the S3 server runs."""

    folder: Path
    credentials: Credentials
    ports: Mapping[str, int]
    pairs: Path

    @classmethod
    def make(cls, folder: Path, pairs: Path) -> "Layout":
        """New credentials and free ports."""
        return cls(folder, Credentials(), dict(zip(PORTS, free_ports(len(PORTS)), strict=True)), pairs)

    @property
    def logs(self) -> Path:
        """One file a service."""
        return self.folder / "logs"

    @property
    def key_id(self) -> str:
        """The S3 access key's id."""
        return (self.folder / "s3-key-id").read_text(encoding="utf-8")

    def database(self, role: str, name: str, driver: str) -> str:
        """The address of a database without its password, which drivers take from PGPASSWORD."""
        return f"postgresql+{driver}://{role}@{HOST}:{self.ports['postgres']}/{name}"

    def base_environment(self) -> dict[str, str]:
        """What every process gets: the caller's, without what belongs to other stacks, without usage reports."""
        own = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
        return own | {
            "DO_NOT_TRACK": "1",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "PREFECT_HOME": str(self.folder / "prefect"),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        }

    def bucket_environment(self) -> dict[str, str]:
        """What a client of the S3 server needs."""
        return {
            "AWS_ENDPOINT_URL": f"http://{HOST}:{self.ports['objects']}",
            "AWS_ACCESS_KEY_ID": self.key_id,
            "AWS_SECRET_ACCESS_KEY": self.credentials.s3_secret,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def client_environment(self) -> dict[str, str]:
        """What `qlora` and `prefect` need to use all of it."""
        return self.bucket_environment() | {
            "PREFECT_API_URL": f"http://{HOST}:{self.ports['prefect']}/api",
            "PREFECT_API_AUTH_STRING": self.credentials.prefect_auth,
            "MLFLOW_TRACKING_URI": f"http://{HOST}:{self.ports['mlflow']}",
            "MLFLOW_TRACKING_USERNAME": "qlora",
            "MLFLOW_TRACKING_PASSWORD": self.credentials.mlflow_admin,
            "RAY_ADDRESS": f"{HOST}:{self.ports['ray']}",
            **self._ray_environment(),
            # Keeps Ray's drivers from replacing 127.0.0.1, where the head listens, by the machine's own address.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "PGPASSWORD": self.credentials.studies_database,
        }

    def config(self) -> dict[str, str]:
        """The settings of a pipeline config that make a job use all of it."""
        return {
            "store": f"s3://{BUCKET}/qlora",
            "registry.tracking_uri": f"http://{HOST}:{self.ports['mlflow']}",
            "compute.ray_address": f"{HOST}:{self.ports['ray']}",
            "sweep.storage": self.database("studies", "studies", "psycopg"),
        }

    def databases(self) -> dict[str, tuple[str, tuple[str, ...]]]:
        """Role: (password, databases)."""
        made = self.credentials
        return {
            "prefect": (made.prefect_database, ("prefect",)),
            "mlflow": (made.mlflow_database, ("mlflow", "mlflow_users")),
            "studies": (made.studies_database, ("studies",)),
        }

    def stores(self) -> list[Service]:
        """What all else stands on: the database server and the S3 server."""
        data, environment = self.folder / "postgres", self.base_environment()
        user, key_id = postgres.server_user(), self.folder / "s3-key-id"
        objects = [sys.executable, "-m", "infra.loopback.object_store", str(self.ports["objects"]), BUCKET, str(key_id)]
        return [
            Service(
                "postgres",
                postgres.server_command(data, self.ports["postgres"]),
                {"PATH": os.environ.get("PATH", ""), "LC_ALL": "C.UTF-8"},
                accepts(self.ports["postgres"]),
                user=user,
            ),
            Service(
                "objects",
                objects,
                environment | {"S3_SECRET": self.credentials.s3_secret},
                lambda: key_id.exists() and accepts(self.ports["objects"])(),
            ),
        ]

    def cluster(self) -> Service:
        """The Ray head, alone, because it gives itself little time to start."""
        return self._ray()

    def servers(self) -> list[Service]:
        """What people and jobs talk to."""
        return [self._prefect(), self._mlflow(), self._votes()]

    def worker(self) -> Service:
        """A process worker of the pool `local`, which runs deployments."""
        command = [str(_BIN / "prefect"), "--no-prompt", "worker", "start", "--pool", POOL, "--type", "process"]
        return Service("worker", command, self.base_environment() | self.client_environment(), self._worker_is_online())

    def _prefect(self) -> Service:
        port = self.ports["prefect"]
        command = [str(_BIN / "prefect"), "--no-prompt", "server", "start", "--host", HOST, "--port", str(port)]
        environment = self.base_environment() | {
            "PREFECT_SERVER_API_AUTH_STRING": self.credentials.prefect_auth,
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": self.database("prefect", "prefect", "asyncpg"),
            "PGPASSWORD": self.credentials.prefect_database,
        }
        return Service("prefect", command, environment, answers(f"http://{HOST}:{port}/api/ready"))

    def _mlflow(self) -> Service:
        port, users = self.ports["mlflow"], self.folder / "mlflow-auth.ini"
        database = self.database("mlflow", "mlflow_users", "psycopg")
        users.write_text(
            f"[mlflow]\ndefault_permission = NO_PERMISSIONS\ndatabase_uri = {database}\nadmin_username = qlora\n"
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n",
            encoding="utf-8",
        )
        command = [str(_BIN / "mlflow"), "server", "--host", HOST, "--port", str(port), "--workers", "1"]
        command += ["--app-name", "basic-auth", "--serve-artifacts", "--artifacts-destination", f"s3://{BUCKET}/mlflow"]
        command += ["--backend-store-uri", self.database("mlflow", "mlflow", "psycopg")]
        environment = (
            self.base_environment()
            | self.bucket_environment()
            | {
                "MLFLOW_AUTH_CONFIG_PATH": str(users),
                "MLFLOW_AUTH_ADMIN_PASSWORD": self.credentials.mlflow_admin,
                "MLFLOW_BASIC_AUTH_FAIL_CLOSED": "true",
                "MLFLOW_FLASK_SERVER_SECRET_KEY": self.credentials.mlflow_session,
                "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
                "PGPASSWORD": self.credentials.mlflow_database,
            }
        )
        return Service("mlflow", command, environment, answers(f"http://{HOST}:{port}/health"))

    def _ray(self) -> Service:
        ready = self.folder / "ray-ready"
        command = [sys.executable, "-m", "infra.loopback.ray_head", str(self.ports["ray"])]
        command += [str(self.folder / "ray"), str(ready)]
        # Ray's own 10 s are too few for a busy machine.
        environment = self.base_environment() | self._ray_environment() | {"RAY_raylet_start_wait_time_s": "60"}
        return Service("ray", command, environment, ready.exists)

    def _ray_environment(self) -> dict[str, str]:
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.credentials.ray}

    def _votes(self) -> Service:
        port = self.ports["votes"]
        command = [str(_BIN / "qlora"), "vote", "serve", str(self.pairs), "--study", str(self.folder / "votes.sqlite")]
        command += ["--host", HOST, "--port", str(port), "--json"]
        environment = self.base_environment() | {"QLORA_VOTE_SECRET": self.credentials.votes}
        return Service("votes", command, environment, accepts(port))

    def _worker_is_online(self) -> Callable[[], bool]:
        address = f"http://{HOST}:{self.ports['prefect']}/api/work_pools/{POOL}/workers/filter"
        token = base64.b64encode(self.credentials.prefect_auth.encode()).decode()
        headers = {"Content-Type": "application/json", "Authorization": f"Basic {token}"}

        def ask() -> bool:
            request = urllib.request.Request(address, b"{}", headers)
            try:
                with urllib.request.urlopen(request, timeout=10) as answer:
                    return b"ONLINE" in answer.read()
            except OSError:
                return False

        return ask
