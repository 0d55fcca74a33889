"""A sweep's turn on its cluster, as a global concurrency limit in Prefect. Knows the server; no Ray and no trials.

The limit is named by the cluster, so that all flows that sweep on it share it, and it can be seen in Prefect's UI.
A place in it is a lease: a flow that is killed gives it back within minutes.
"""

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from prefect.client.orchestration import get_client
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectAlreadyExists

from qlora_core.config.compute import ComputeConfig


def limit_name(compute: ComputeConfig) -> str:
    """What the limit of this cluster is called: by its address, an embedded one by the machine."""
    address = compute.ray_address or f"on {socket.gethostname()}"
    return f"qlora sweeps {address.removeprefix('ray://')}"


@contextmanager
def cluster_turn(compute: ComputeConfig) -> Iterator[None]:
    """Hold one of the cluster's `compute.sweeps_at_once` places for the block, after waiting for it; None: no limit.

    The number in force is that of whoever asked last.
    """
    if compute.sweeps_at_once is None:
        yield
        return
    name = limit_name(compute)
    _set_limit(name, compute.sweeps_at_once)
    # A lease that cannot be renewed for a moment is no reason to end a sweep that trains.
    with concurrency(name, occupy=1, strict=True, raise_on_lease_renewal_failure=False):
        yield


def _set_limit(name: str, places: int) -> None:
    with get_client(sync_client=True) as client:
        try:
            client.upsert_global_concurrency_limit_by_name(name, places)
        except ObjectAlreadyExists:
            # Another sweep has made it between the client's look and its creation: now it is there to be set
            client.upsert_global_concurrency_limit_by_name(name, places)
