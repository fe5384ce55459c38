"""This host's addresses, whether other hosts are up, and how MPI uses TCP."""

from __future__ import annotations

import os
import socket

TCP = {"flags": "send,inplace", "sndbuf": "131072"}


def both_ways() -> None:
    """Set Open MPI to carry both directions of a TCP link at once; it reads this at its start.

    Else it puts a message on its way in one piece, and what the other direction waits for (that a
    message may be sent; an acknowledgement) behind it, or behind megabytes in a socket: then one
    direction goes after the other. The user's own settings are left alone.
    """
    for name, value in TCP.items():
        os.environ.setdefault(f"OMPI_MCA_btl_tcp_{name}", value)


def address_towards(other: str) -> str:
    """Return the address of this host from which it reaches another one.

    Raises:
        OSError: It does not know the other one.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((other, 9))  # sends nothing
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str | None:
    """Return the network interface of this host that has an address; None: there is none."""
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address == address for each in addresses):
            return str(name)
    return None


def answers(host: str, port: int, seconds: float) -> bool:
    """Tell whether a host is up, even if nothing listens at the port.

    Args:
        host: Its name or address.
        port: Any port; a refused connection proves the host, too.
        seconds: Longest wait.
    """
    try:
        socket.create_connection((host, port), timeout=seconds).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return True
