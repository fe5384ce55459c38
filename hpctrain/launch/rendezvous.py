"""The rendezvous of ranks that start Gloo: a store of their addresses, by Horovod's HTTP protocol.

Horovod's own store listens on all of a host's addresses and keeps what anybody puts there. This one
listens where the driver does, answers only who knows a path that the driver has told the ranks, and
is there no longer than the ranks of a world need to find each other.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
import socket
from collections.abc import Callable

from hpctrain.launch.listener import Strangers, admit, listening, read_until

VALUE_BYTES = 16 * 2**20
"""Longest value: a rank's addresses, one for each of the others."""

NAME_BYTES = 255


class Store:
    """A store of the addresses of one world's ranks.

    Attributes:
        where: ``HOST:PORT/PATH``, for ``HOROVOD_GLOO_RENDEZVOUS_ADDR``: Horovod puts ``http://``
            before it and ``:0/SCOPE/KEY`` behind.

    Args:
        address: Of this host, where to listen.
        strangers: Told of those who do not know the path.

    Raises:
        OSError: It cannot listen there.
    """

    def __init__(self, address: str, strangers: Strangers) -> None:
        server = listening(address)
        self._secret = secrets.token_hex(16)
        self.where = f"{address}:{server.getsockname()[1]}/{self._secret}"
        self._values: dict[tuple[str, str], bytes] = {}
        self._serving = asyncio.ensure_future(admit(server, self._serve, strangers))
        self._serving.add_done_callback(lambda done: server.close())

    def close(self) -> None:
        """Stop listening, and forget all addresses."""
        self._serving.cancel()
        self._values.clear()

    async def _serve(self, connection: socket.socket) -> bool:
        """One request; True: from one of the ranks."""
        loop = asyncio.get_running_loop()
        head, _, body = bytes(await read_until(connection, b"\r\n\r\n")).partition(b"\r\n\r\n")
        lines = head.decode("ascii").split("\r\n")
        method, path, _ = lines[0].split(" ")
        _, secret, scope, key = path.split("/")
        if not hmac.compare_digest(secret, f"{self._secret}:0"):
            return False
        place = scope[:NAME_BYTES], key[:NAME_BYTES]
        fields = (line.partition(":") for line in lines[1:])
        length = next(
            (int(text) for name, _, text in fields if name.lower() == "content-length"), 0
        )
        if not 0 <= length <= VALUE_BYTES:
            return False
        value = bytearray(body)
        while len(value) < length:
            block = await loop.sock_recv(connection, min(length - len(value), 2**16))
            if not block:
                return False
            value += block
        answer = self._answer(method, place, bytes(value))
        await loop.sock_sendall(connection, answer)
        connection.close()
        return True

    def _answer(self, method: str, place: tuple[str, str], value: bytes) -> bytes:
        found: bytes | None = b""
        if method == "PUT":
            self._values[place] = value
        elif method == "DELETE":
            self._values.pop(place, None)
        else:
            found = self._values.get(place)
        status = "404 Not Found" if found is None else "200 OK"
        head = (
            f"HTTP/1.1 {status}\r\nContent-Length: {len(found or b'')}\r\nConnection: close\r\n\r\n"
        )
        return head.encode() + (found or b"")


def opener(address: str, strangers: Strangers) -> Callable[[], tuple[str, Callable[[], None]]]:
    """Return a function that opens a store for each world, and returns its place and what ends it.

    Args:
        address: Of this host, where to listen.
        strangers: Told of those who do not know the path.
    """

    def open_store() -> tuple[str, Callable[[], None]]:
        store = Store(address, strangers)
        return store.where, store.close

    return open_store
