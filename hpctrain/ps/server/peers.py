"""A server's links with workers and other servers, and which of these coordinates."""

from __future__ import annotations

from hpctrain.ps.protocol import messages
from hpctrain.ps.protocol.link import Link


class Peers:
    """Who a server exchanges messages with; all of its parts share this one.

    Args:
        me: This server's number.
        workers: Links with the workers, by number.
        servers: Links with the other servers, by number.

    Attributes:
        me: This server's number.
        workers: Links with the workers that take part now.
        servers: Links with the other servers that are left.
        newcomers: Links with workers that are getting ready to join.
        initial_servers: All servers that there were at the beginning, this one too.
        lost_servers: Those lost since, in order.
    """

    def __init__(self, me: int, workers: dict[int, Link], servers: dict[int, Link]) -> None:
        self.me = me
        self.workers = workers
        self.servers = servers
        self.newcomers: dict[int, Link] = {}
        self.initial_servers = sorted([me, *servers])
        self.lost_servers: list[int] = []

    @property
    def coordinator(self) -> int:
        """The number of the server that coordinates: the lowest that is left."""
        return min([self.me, *self.servers])

    @property
    def coordinates(self) -> bool:
        """Whether this server is the coordinator."""
        return self.me == self.coordinator

    def link(self, worker: int) -> Link | None:
        """Return the link with a worker or newcomer, or None where it is gone."""
        return self.workers.get(worker) or self.newcomers.get(worker)

    def links(self) -> list[Link]:
        """Return all links there are now."""
        return [*self.workers.values(), *self.servers.values(), *self.newcomers.values()]

    def tell(self, message: messages.Message) -> None:
        """Send everybody a message."""
        for link in self.links():
            link.send(message)

    def idle(self) -> bool:
        """Whether everything sent to workers and servers is on its way."""
        return all(link.idle() for link in [*self.workers.values(), *self.servers.values()])
