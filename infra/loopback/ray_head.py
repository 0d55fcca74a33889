"""A Ray head on the loopback interface alone.

    RAY_AUTH_MODE=token RAY_AUTH_TOKEN=... python -m infra.loopback.ray_head PORT TEMP_DIR READY_FILE

`ray start` replaces 127.0.0.1 by the machine's own address and then listens on every interface; Ray's cluster class
takes it as it stands. Without the autoscaler's monitor, whose page of figures asks for no token.
"""

import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster

from infra.loopback.keeper import end_descendants
from infra.loopback.service import free_ports

_OBJECT_STORE_BYTES = 100_000_000
_TRIES = 3
_AGENT_PORTS = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")


def main(port: int, temp_dir: Path, ready: Path) -> None:
    """Serve until the process is ended; `ready` appears once jobs can be run."""
    head = {
        "node_ip_address": "127.0.0.1",
        "gcs_server_port": port,
        "num_cpus": len(os.sched_getaffinity(0)),
        "object_store_memory": _OBJECT_STORE_BYTES,
        "include_dashboard": False,
        "no_monitor": True,
        # Named ports: else Ray waits for its agents to tell theirs, too shortly for a machine busy with other servers.
        **dict(zip(_AGENT_PORTS, free_ports(len(_AGENT_PORTS)), strict=True)),
        "temp_dir": str(temp_dir),
    }
    cluster = _started(head)
    ready.touch()
    signal.sigwait({signal.SIGINT, signal.SIGTERM})
    cluster.shutdown()


def _started(head: dict[str, Any]) -> Cluster:
    """The cluster, tried again: Ray gives a node 30 s to start, too few for a machine busy with the other servers."""
    for left in reversed(range(_TRIES)):
        try:
            return Cluster(initialize_head=True, head_node_args=dict(head))
        except Exception as error:  # Ray raises the bare class
            if not left:
                raise
            sys.stderr.write(f"Ray did not start ({error}); trying again\n")
            end_descendants()
            shutil.rmtree(head["temp_dir"], ignore_errors=True)
    raise AssertionError("unreachable")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
