"""Prefect's temporary server, for runs without a server of their own: it outlives the terminal's Ctrl-C.

A terminal sends Ctrl-C to every process it started. A server that ends first leaves its run nobody to tell how it
ended: Prefect then asks an address where nobody answers, for minutes. Knows no flow.
"""

import signal

from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_EPHEMERAL_ENABLED


def start_temporary_server() -> None:
    """Start it where Prefect would on its first use; it ends with this process. Nothing where a server is set."""
    if PREFECT_API_URL.value() or not PREFECT_SERVER_EPHEMERAL_ENABLED.value():
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # a new process keeps its starter's mask
    try:
        SubprocessASGIServer().start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
