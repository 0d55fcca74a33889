"""One mover of aliases at a time, across machines: a lease in the artifact store, beside MLflow's last-writer-wins.

Everybody who promotes, rolls back or answers with the same store and registry waits here for his turn. It guards
nothing by itself: the champion is compared before it is moved and read back afterwards (`registry.aliases`).
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from qlora_core.config.pipeline import PipelineConfig
from qlora_core.digest import digest_json
from qlora_core.errors import RegistryError
from qlora_core.pipeline.job import Job
from qlora_core.registry.connection import without_credentials

_POLL_S = 0.1


@contextmanager
def champion_lease(config: PipelineConfig, *, timeout_s: float = 600.0) -> Iterator[None]:
    """Hold the aliases of the config's registered model for the block. A holder that dies loses them by itself.

    Not reentrant. Raises RegistryError where somebody else holds them for longer than `timeout_s`, StoreError where the
    store cannot be written.
    """
    name = f"registry/{digest_json([without_credentials(config.tracking_uri), config.registry.model_name])}"
    leases = Job(config).store.leases
    deadline = time.monotonic() + timeout_s
    while True:
        with leases.attempt(name) as lease:
            if lease is not None:
                yield
                return
        if time.monotonic() > deadline:
            raise RegistryError(
                f"another process has held the aliases of {config.registry.model_name!r} for {timeout_s:g} s "
                f"(lease {name}); see who promotes, and run the command again"
            )
        time.sleep(_POLL_S)
