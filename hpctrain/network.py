"""This host's addresses, and whether others are there."""

from __future__ import annotations

import socket


def address_towards(other: str) -> str:
    """The address of this host from which it reaches another one.

    Raises:
        OSError: It does not know the other one.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((other, 9))  # sends nothing
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str | None:
    """The network interface of this host that has that address."""
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address == address for each in addresses):
            return str(name)
    return None


def answers(host: str, port: int, seconds: float) -> bool:
    """Whether a host is there, even if nothing listens at the port."""
    try:
        socket.create_connection((host, port), timeout=seconds).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return True
