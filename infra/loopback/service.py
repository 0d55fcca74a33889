"""One process of the stack: its command, its environment, and how one sees that it is ready. Starts nothing."""

import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


class StackError(RuntimeError):
    """The stack cannot start or go on; the message says what to do."""


@dataclass(frozen=True)
class Service:
    """`ready` is asked again and again until it is true, `timeout_s` long."""

    name: str
    command: list[str] = field(repr=False)
    environment: Mapping[str, str] = field(repr=False)
    ready: Callable[[], bool]
    timeout_s: float = 240.0
    user: str | None = None


def free_ports(count: int) -> list[int]:
    """Different TCP ports on loopback on which nobody listens right now."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def accepts(port: int) -> Callable[[], bool]:
    """Whether something listens on the port."""

    def ask() -> bool:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=2).close()
        except OSError:
            return False
        return True

    return ask


def answers(url: str, statuses: tuple[int, ...] = (200,)) -> Callable[[], bool]:
    """Whether the address answers with one of these statuses."""

    def ask() -> bool:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return answer.status in statuses
        except urllib.error.HTTPError as error:
            return error.code in statuses
        except OSError:
            return False

    return ask
