"""Listening on an address: whether it is this machine's alone, the socket, and how it is written. Knows no protocol."""

import ipaddress
import socket

from qlora_core.errors import ConfigError


def is_loopback(host: str) -> bool:
    """Whether a host, by address or name, can be reached from this machine only. Other names are not looked up."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on `host`:`port` (0: a free one). Raises ConfigError for an address that cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=128)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"cannot listen on {host}:{port} ({error}); choose another --port or --host") from error


def http_address(host: str, listening: socket.socket) -> str:
    """The address of a listening socket, without a path."""
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listening.getsockname()[1]}"
