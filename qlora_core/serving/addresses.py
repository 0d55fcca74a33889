"""Which hosts are this machine. Knows names and numbers only."""

import ipaddress


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a host: localhost, 127.0.0.0/8, ::1."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
