"""A Ray cluster of several nodes on the loopback interface, as a program: a head without slots, nodes of one slot each.

    python loopback_cluster.py NODES

Prints its address, then takes a command a line and answers each with a line: `kill PID` ends the node of the worker
with this process id as a power cut would, `add` lets a new one join. Ends with its input, and takes all of its
processes along.
"""

import json
import sys
from pathlib import Path

from ray._private import ray_constants
from ray._private.node import Node
from ray.cluster_utils import Cluster

SMALL_STORE_BYTES = 80_000_000


def main(nodes: int) -> None:
    """Serve commands until standard input ends."""
    head = {"num_cpus": 0, "node_ip_address": "127.0.0.1", "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={**head, "object_store_memory": SMALL_STORE_BYTES})
    members = [_joined(cluster) for _ in range(nodes)]
    _answer({"address": cluster.address})
    for line in sys.stdin:
        command, _, worker = line.strip().partition(" ")
        if command == "kill":
            node = next(member for member in members if _raylet(member) == _parent(int(worker)))
            members.remove(node)
            cluster.remove_node(node, allow_graceful=False)
        elif command == "add":
            members.append(_joined(cluster))
        else:
            raise ValueError(f"{command!r} is no command; there are `kill` and `add`")
        _answer({"done": command, "nodes": len(members)})
    cluster.shutdown()


def _raylet(node: Node) -> int:
    return node.all_processes[ray_constants.PROCESS_TYPE_RAYLET][0].process.pid


def _parent(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[1])


def _joined(cluster: Cluster) -> Node:
    settings = {"num_cpus": 1, "node_ip_address": "127.0.0.1", "object_store_memory": SMALL_STORE_BYTES}
    for last in (False, False, True):
        try:
            return cluster.add_node(**settings)
        except Exception:
            # Ray raises the bare class when a node is not up within 30 s, as on a machine busy with other work.
            if last:
                raise
    raise AssertionError("not reached: the last try returns or raises")


def _answer(fields: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]))
