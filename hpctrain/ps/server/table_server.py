"""A server's end of embedding tables: its group of rows, and the copy of another's."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch

from hpctrain.config import PsConfig
from hpctrain.errors import PeerLost
from hpctrain.ps.partition.row_placement import RowPlacement
from hpctrain.ps.protocol import messages
from hpctrain.ps.protocol.link import Link
from hpctrain.ps.server.peers import Peers
from hpctrain.ps.server.row_group import RowGroup
from hpctrain.tables.spec import TableSpec
from hpctrain.tables.table import Touched

TableMessage = (
    messages.OpenTables
    | messages.PullRows
    | messages.PushRows
    | messages.CopyRows
    | messages.RowsCopied
    | messages.KeepRows
)


class TableServer:
    """The rows that a server has, of all tables.

    Args:
        peers: This server's number, and who takes part.
        config: The same on every rank.

    Attributes:
        groups: Those that it has, by number.
    """

    def __init__(self, peers: Peers, config: PsConfig) -> None:
        self.groups: dict[int, RowGroup] = {}
        self._peers = peers
        self._config = config
        self._placement: RowPlacement | None = None
        self._specs: list[TableSpec] = []
        self._incoming: defaultdict[int, list[torch.Tensor]] = defaultdict(list)
        self._resting: set[int] = set()
        self._early: list[Callable[[], None]] = []  # copies that came before the tables were known

    def buffers(self, message: messages.Message) -> list[torch.Tensor]:
        """Return memory for a message's payloads.

        Args:
            message: What is announced.
        """
        if isinstance(message, messages.PullRows):
            return [torch.empty(message.count, dtype=torch.int64)]
        if isinstance(message, messages.PushRows | messages.CopyRows):
            return [torch.empty(size, dtype=torch.uint8) for size in message.sizes]
        return []

    def payload(self, link: Link, buffer: torch.Tensor) -> None:
        """Take in a payload; those of a message come before it has come whole.

        Args:
            link: Where it comes from.
            buffer: What has come.
        """
        self._incoming[link.peer].append(buffer)

    def message(self, link: Link, message: TableMessage) -> None:
        """Take in a message that has come whole.

        Args:
            link: Where it comes from.
            message: What has come.
        """
        peer, payloads = link.peer, self._incoming.pop(link.peer, [])
        match message:
            case messages.OpenTables():
                self._open(message)
            case messages.PullRows():
                self.groups[message.group].pull(peer, message, payloads[0])
            case messages.PushRows():
                self.groups[message.group].push(peer, message, self._touched(message, payloads))
            case messages.KeepRows():
                self.groups[message.group].keep(peer, message)
            case messages.CopyRows():
                self._copy(link, message, payloads)
            case messages.RowsCopied():
                self.groups[message.group].copied(message.version)

    def _touched(
        self, message: messages.PushRows | messages.CopyRows, payloads: list[torch.Tensor]
    ) -> dict[int, Touched]:
        found = {}
        for place, table in enumerate(message.tables):
            spec = self._specs[table]
            ids, gradient, sights = payloads[3 * place : 3 * place + 3]
            rows = gradient.view(spec.torch_dtype).view(-1, spec.dim)
            found[table] = Touched(ids.view(torch.int64), rows, sights.view(torch.int64))
        return found

    def _open(self, message: messages.OpenTables) -> None:
        if self._placement is not None:
            return
        servers, me = self._peers.initial_servers, self._peers.me
        placement = RowPlacement(servers, self._config.placement, self._config.replicas)
        self._placement, self._specs = placement, message.tables
        for number, holders in placement.holders.items():
            if me in holders:
                self.groups[number] = RowGroup(
                    number, message.tables, placement, self._peers, self._config
                )
        self.groups[me].own(self._pushing)
        for lost in self._peers.lost_servers:
            self.lose(lost, "it was lost before tables were opened")
        early, self._early = self._early, []
        for copy in early:
            copy()

    @property
    def _pushing(self) -> list[int]:
        return [worker for worker in self._peers.workers if worker not in self._resting]

    def _copy(self, link: Link, message: messages.CopyRows, payloads: list[torch.Tensor]) -> None:
        if self._placement is None:
            self._early.append(lambda: self._copy(link, message, payloads))
            return
        self.groups[message.group].copy(message, self._touched(message, payloads))
        link.send(messages.RowsCopied(message.group, message.version + 1))

    def leave(self, worker: int) -> None:
        """Wait no longer for a worker that pushes nothing more: it is done, or lost."""
        self._resting.add(worker)
        self._incoming.pop(worker, None)
        for group in self.groups.values():
            group.leave(worker)

    def lose(self, server: int, reason: str) -> None:
        """Go on without a server: take over its group, where its copy is here.

        Args:
            server: The one that is lost.
            reason: How that was noticed.

        Raises:
            PeerLost: Nobody has its group.
        """
        self._incoming.pop(server, None)
        if self._placement is None:
            return
        for number in self._placement.lose(server):
            holders = self._placement.holders[number]
            if not holders:
                raise PeerLost(
                    f"server {self._peers.me} ends the run: server {server} is lost, and with it "
                    f"the only copy of rows of tables: {reason}.",
                    hint="ps.replicas=1 survives the first loss; now, go on from a checkpoint.",
                )
            if holders[0] == self._peers.me:
                self.groups[number].own(self._pushing)
        for group in self.groups.values():
            group.answer_delayed()

    def poll(self) -> list[int]:
        """Write or read rows on for a moment; return the workers that wait for that."""
        found = [group.poll() for group in self.groups.values()]
        return [worker for worker in found if worker is not None]
