"""A worker's slices on their way: pushed by need, and brought back."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

from hpctrain.compression.codec import decode_rows, make_codec
from hpctrain.config import PsConfig
from hpctrain.ps.client.push_encoder import PushEncoder
from hpctrain.ps.partition.layout import Layout
from hpctrain.ps.partition.placement import Placement, place, without
from hpctrain.ps.protocol import messages
from hpctrain.ps.protocol.link import Link

WINDOW_BYTES = 2**20
"""While more than so much is on its way to a server, nothing is added: what becomes ready later but
is needed sooner overtakes the rest, and MPI's acknowledgements of what comes back do not have to
wait behind it, so that a link carries both ways at once."""

GROUP_BYTES = 2**18
"""Small slices for the same server travel in one message up to about this size."""


class Step(NamedTuple):
    """What a worker says of a step's pushes."""

    clock: int
    round: int
    weight: float
    hyper: list[list[float]]
    pull: bool


class Exchange:
    """Pushes gradients, and puts the weights that come in answer where they belong.

    The caller's thread calls ``open``, ``begin`` and ``touch``; all else is the polling thread's.

    Args:
        servers: Links with the servers that are left.
        config: The same on every rank.

    Attributes:
        versions: Of each slice's weights here.
        newest: The highest version a server has spoken of.
        placement: For each slice its holders; empty until ``place``.
        moved_bytes: Payload bytes pushed and pulled; ``dense_bytes``: of the same as they are in
            memory, sent or not.
    """

    def __init__(self, servers: dict[int, Link], config: PsConfig) -> None:
        self.versions: list[int] = []
        self.newest = 0
        self.placement: Placement = ()
        self.moved_bytes = 0
        self.dense_bytes = 0
        self._servers = servers
        self._config = config
        self._absent: dict[int, list[int]] = {}
        self._codec = make_codec(config.compression)
        self._step = Step(0, 0, 1.0, [], True)
        # Slices ready to be pushed, by need; and those pushed, with their server.
        self._ready: list[int] = []
        self._left: set[int] = set()
        self._under_way: dict[int, int] = {}
        self._pulling = False  # what is under way is pulls, not pushes

    def open(
        self,
        layout: Layout,
        weights: Sequence[torch.Tensor],
        gradients: Sequence[torch.Tensor],
        near: Collection[int],
    ) -> None:
        """Say what there is to exchange, and which servers reach this worker's memory.

        Args:
            layout: The same on every worker.
            weights: The flats that pulled weights are put into.
            gradients: The flats that are pushed.
            near: Servers that share memory with this worker.
        """
        self.versions = [0] * len(layout.slices)
        self._layout = layout
        self._sizes = layout.sizes()
        self._weights = weights
        self._near = near
        self._outgoing = PushEncoder(self._codec, layout, gradients)

    def begin(self) -> None:
        """Begin a step; it is over when every slice was pushed and answered."""
        self._outgoing.begin()
        self._absent = {}
        self._left = set(range(len(self.versions)))

    def touch(self, rows: Mapping[int, torch.Tensor]) -> None:
        """Note the rows that this step has touched, by flat."""
        self._outgoing.touch(rows)

    @property
    def busy(self) -> bool:
        """Whether a push or a pull is under way."""
        return bool(self._ready or self._under_way)

    @property
    def over(self) -> bool:
        """Whether nothing is under way, nor yet to be pushed in this step."""
        return not self._under_way and not self._ready and not self._left

    def place(self, initial: Iterable[int], lost: Iterable[int]) -> None:
        """Work out which server holds which slices.

        Args:
            initial: Servers that there were at the beginning.
            lost: Those lost since, in order, and maybe others.
        """
        servers = list(initial)
        self.placement = place(
            self._sizes, servers, method=self._config.placement, replicas=self._config.replicas
        )
        for server in [server for server in lost if server in servers]:
            servers.remove(server)
            self.placement = without(self.placement, self._sizes, server, servers)

    def lose(self, server: int) -> None:
        """Fail over: what a lost server did not answer goes to those that have its slices now."""
        if not self.placement:
            return
        self.placement = without(self.placement, self._sizes, server, sorted(self._servers))
        again = [index for index, holder in self._under_way.items() if holder == server]
        for index in again:
            del self._under_way[index]
        if self._pulling:
            self._pull(again)
        else:
            self.push(again)

    # What goes.

    def pull_all(self, message: messages.Join | None) -> bool:
        """Ask for all weights, by this message if there is one; return False if there are none."""
        self._pull(range(len(self.placement)), message)
        return bool(self._under_way)

    def _pull(self, some: Iterable[int], message: messages.Join | None = None) -> None:
        self._pulling = True
        groups: dict[int, list[int]] = {}
        for index in some:
            groups.setdefault(self.placement[index][0], []).append(index)
        for server, link in self._servers.items():
            indices = groups.get(server, [])
            self._under_way.update(dict.fromkeys(indices, server))
            if indices or message:
                link.send(message or messages.Pull(indices))

    def set_step(self, step: Step) -> None:
        """Push what comes next as gradients of this step."""
        self._step = step
        self._pulling = False

    def put(self, weights: Sequence[torch.Tensor]) -> None:
        """Have the next update start from these flats."""
        for server, link in self._servers.items():
            indices = [i for i, holders in enumerate(self.placement) if holders[0] == server]
            pieces = [self._layout.slices[index] for index in indices]
            payloads = [weights[p.flat][p.start : p.stop].clone() for p in pieces]
            link.send(messages.Put(indices, [payload.nbytes for payload in payloads]), payloads)

    def lack(self, absent: Mapping[int, list[int]]) -> None:
        """Note the parts of slices that have no gradient in this step."""
        self._absent.update(absent)

    def push(self, indices: Iterable[int]) -> None:
        """Queue slices to be pushed, those needed first in front."""
        for index in indices:
            heapq.heappush(self._ready, index)

    def send_ready(self) -> None:
        """Send as much of what is ready as may be on its way at a time."""
        if not self._ready:
            return
        waiting = []
        groups: dict[tuple[int, bool], list[int]] = {}
        while self._ready:
            index = heapq.heappop(self._ready)
            server = self.placement[index][0]
            if self._servers[server].unsent_bytes > WINDOW_BYTES:
                waiting.append(index)
                continue
            # Rows are sent to near servers too, which would have to look for them in the whole.
            sent = server not in self._near or self._outgoing.by_rows(index)
            group = groups.setdefault((server, sent), [])
            group.append(index)
            if sent and sum(self._sizes[i] for i in group) >= GROUP_BYTES:
                self._send_push(server, groups.pop((server, sent)), sent)
        for (server, sent), group in groups.items():
            self._send_push(server, group, sent)
        for index in waiting:
            heapq.heappush(self._ready, index)

    def _send_push(self, server: int, indices: list[int], sent: bool) -> None:
        payloads = [self._outgoing.payload(index) for index in indices] if sent else []
        for index in indices:
            self._under_way[index] = server
            self._left.discard(index)
            self.dense_bytes += self._sizes[index]
        self.moved_bytes += sum(payload.nbytes for payload in payloads)
        step = self._step
        self._servers[server].send(
            messages.Push(
                step.clock, step.round, step.weight, step.hyper, indices,
                [self.versions[index] for index in indices],
                [payload.nbytes for payload in payloads], step.pull,
                {index: self._absent[index] for index in indices if index in self._absent},
            ),
            payloads,
        )  # fmt: skip

    # What comes.

    def buffers(self, message: messages.Weights) -> Sequence[torch.Tensor]:
        """Return memory for weights that are announced: where the model reads them."""
        if not message.sizes:
            return []
        return [
            self._target(index, size)
            for index, size in zip(message.slices, message.sizes, strict=True)
        ]

    def _target(self, index: int, size: int) -> torch.Tensor:
        piece = self._layout.slices[index]
        if self._layout.flats[piece.flat].width:
            return torch.empty(size, dtype=torch.uint8)
        return self._weights[piece.flat][piece.start : piece.stop]

    def payload(self, message: messages.Weights, number: int, buffer: torch.Tensor) -> None:
        """Take in weights that have come; changed rows are put where they belong.

        Args:
            message: Whose payload it is.
            number: Its place among the message's payloads.
            buffer: What has come.
        """
        self.moved_bytes += buffer.nbytes
        piece = self._layout.slices[message.slices[number]]
        flat = self._layout.flats[piece.flat]
        if flat.width:
            table = self._weights[piece.flat][piece.start : piece.stop].view(-1, flat.width)
            rows, values = decode_rows(buffer, flat.width, flat.torch_dtype, height=len(table))
            table[rows] = values

    def answered(self, message: messages.Weights) -> None:
        """Take in that slices are answered: they need not be pushed again."""
        for index, version in zip(message.slices, message.versions, strict=True):
            if self._under_way.pop(index, None) is None:
                continue
            self._outgoing.answered(index)
            self.newest = max(self.newest, version)
            if message.pulled:
                self.versions[index] = version
                self.dense_bytes += self._sizes[index]
