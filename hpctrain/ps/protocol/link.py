"""Messages with payloads between two processes, in order: over MPI, or within one process.

A message is announced by a header; its payloads follow as raw bytes straight from and into the
tensors that hold them. Nothing here blocks: `poll` moves on whatever can be moved.
"""

from __future__ import annotations

import ctypes
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec
import torch
from mpi4py import MPI

from hpctrain.errors import Error
from hpctrain.ps.protocol import messages
from hpctrain.ps.protocol.cipher import Cipher

HEADER_BYTES = 4096
"""A header is received into so much memory; a longer one follows as a payload."""

AHEAD_BYTES = 32 * 2**20
"""Payloads of a link being received at a time: enough to keep a network busy, not the memory."""


STARTING_SECONDS = 30.0
"""Who is yet to begin may be silent for so long at least: imports hold up all of a process."""


class Receiver(Protocol):
    """Takes in the messages of a link."""

    def buffers(self, link: Link, message: messages.Message) -> Sequence[torch.Tensor]:
        """Return contiguous tensors for the payloads of an announced message, in order.

        Args:
            link: Where it comes from.
            message: What is announced.
        """

    def payload(
        self, link: Link, message: messages.Message, number: int, buffer: torch.Tensor
    ) -> None:
        """Take in a payload; they come in the order of payloads and of messages.

        Args:
            link: Where it comes from.
            message: Whose payload it is.
            number: Its place among the message's payloads.
            buffer: One of the tensors that ``buffers`` has given.
        """

    def message(self, link: Link, message: messages.Message) -> None:
        """Take in a message that has come with all of its payloads.

        Args:
            link: Where it comes from.
            message: What has come.
        """


class Link(ABC):
    """A connection with one peer, each way.

    Attributes:
        peer: Who is at the other end, by number.
        failed: Why nothing more will come or go; None: all is well.
        heard: When something last came (``time.monotonic``).
        sent_bytes: Payload bytes sent.
        unsent_bytes: Of what is being sent, still in this process's memory.
    """

    def __init__(self, peer: int) -> None:
        self.peer = peer
        self.failed: str | None = None
        self.heard = time.monotonic()
        self.sent_bytes = 0
        self.unsent_bytes = 0

    @abstractmethod
    def send(self, message: messages.Message, payloads: Sequence[torch.Tensor] = ()) -> None:
        """Begin to send a message.

        Args:
            message: What is sent.
            payloads: Contiguous tensors that go with it; they must stay as they are until the peer
                has answered them.
        """

    @abstractmethod
    def poll(self, receiver: Receiver) -> bool:
        """Move sending and receiving on without blocking; return whether something happened."""

    @abstractmethod
    def idle(self) -> bool:
        """Return whether everything sent is on its way, and its memory free again."""


class _Incoming:
    """A message whose payloads are coming."""

    def __init__(self, message: messages.Message, buffers: Sequence[torch.Tensor]) -> None:
        self.message = message
        self.buffers = buffers
        self.requests: list[tuple[MPI.Request, bytearray | None]] = []
        self.done = 0
        self.size = sum(buffer.nbytes for buffer in buffers)


class MPILink(Link):
    """A link with another process, over MPI.

    Args:
        comm: The communicator; errors must return (mpi4py's default).
        rank: The peer's rank in it.
        me: This end's number.
        peer: The peer's number.
        tags: For messages to the peer, and from it; the next number of each is for payloads.
        cipher: Seals everything, where there is one.
    """

    def __init__(
        self,
        comm: MPI.Comm,
        rank: int,
        me: int,
        peer: int,
        tags: tuple[int, int],
        cipher: Cipher | None = None,
    ) -> None:
        super().__init__(peer)
        self._comm = comm
        self._rank = rank
        self._to, self._from = tags
        self._cipher = cipher
        self._me = me
        # By tag, because headers may overtake payloads.
        self._sent: Counter[int] = Counter()
        self._opened: Counter[int] = Counter()
        self._sending: deque[tuple[MPI.Request, Any]] = deque()
        self._incoming: deque[_Incoming] = deque()
        self._ahead = 0
        self._long = False  # what follows a long header is known only once that has come
        self._status = MPI.Status()
        self._header = bytearray(HEADER_BYTES)
        # MPI may write there as long as it runs, whatever becomes of this link: never to be freed.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._header))
        self._next: MPI.Prequest | None = None
        try:
            self._next = comm.Recv_init([self._header, MPI.BYTE], rank, self._from)
            self._next.Start()
        except MPI.Exception as error:
            self._fail(error)

    def send(self, message: messages.Message, payloads: Sequence[torch.Tensor] = ()) -> None:
        """Begin to send a message.

        Args:
            message: What is sent.
            payloads: Contiguous tensors that go with it; they must stay as they are until the peer
                has answered them.
        """
        if self.failed is not None:
            return
        header = messages.encode(message)
        parts: list[Any] = []
        if len(header) > HEADER_BYTES - Cipher.OVERHEAD:
            parts.append(header)
            header = messages.encode(messages.Long(len(header)))
        parts += [_bytes(payload) for payload in payloads]
        try:
            self._start(header, self._to)
            for part in parts:
                self._start(part, self._to + 1)
                self.sent_bytes += len(part)
        except MPI.Exception as error:
            self._fail(error)

    def _start(self, data: Any, tag: int) -> None:
        if self._cipher is not None:
            # Numbered, and with both ends, so that a message can be neither repeated nor moved.
            self._sent[tag] += 1
            place = (self._me, self.peer, tag, self._sent[tag])
            data = self._cipher.seal(data, b"%d>%d:%d:%d" % place)
        request = self._comm.Isend([data, MPI.BYTE], self._rank, tag)
        self._sending.append((request, data))
        self.unsent_bytes += len(data)

    def _open(self, data: Any, tag: int) -> Any:
        if self._cipher is None:
            return data
        self._opened[tag] += 1
        place = (self.peer, self._me, tag, self._opened[tag])
        return self._cipher.open(data, b"%d>%d:%d:%d" % place, f"rank {self.peer}")

    def poll(self, receiver: Receiver) -> bool:
        """Move sending and receiving on without blocking; return whether something happened."""
        if self.failed is not None:
            return False
        try:
            moved = self._poll_sending()
            # In between, because on one host a payload may have come with its header: it is best
            # worked on at once, while it is in the cache.
            while self._poll_header(receiver):
                self._poll_payloads(receiver)
                moved = True
            return self._poll_payloads(receiver) or moved
        except MPI.Exception as error:
            self._fail(error)
            return True

    def _poll_sending(self) -> bool:
        moved = False
        while self._sending and self._sending[0][0].Test():
            _, data = self._sending.popleft()
            self.unsent_bytes -= len(data)
            moved = True
        return moved

    def _poll_header(self, receiver: Receiver) -> bool:
        assert self._next is not None
        if self._ahead > AHEAD_BYTES or self._long or not self._next.Test(self._status):
            return False
        data = bytes(self._header[: self._status.Get_count(MPI.BYTE)])
        self._next.Start()
        self.heard = time.monotonic()
        self._announced(self._decode(self._open(data, self._from)), receiver)
        return True

    def _decode(self, data: Any) -> messages.Message:
        try:
            message: messages.Message = messages.decode(data)
            return message
        except (msgspec.MsgspecError, ValueError) as error:  # ValueError: text that is not UTF-8
            raise Error(
                f"rank {self.peer} sent what is no message: {error}.",
                hint="give every rank the same key, or none, and the same hpctrain.",
            ) from error

    def _announced(self, message: messages.Message, receiver: Receiver) -> None:
        self._long = isinstance(message, messages.Long)
        if isinstance(message, messages.Long):
            buffers: Sequence[torch.Tensor] = [torch.empty(message.size, dtype=torch.uint8)]
        else:
            buffers = receiver.buffers(self, message)
        incoming = _Incoming(message, buffers)
        for buffer in buffers:
            sealed = bytearray(buffer.nbytes + Cipher.OVERHEAD) if self._cipher else None
            target = _bytes(buffer) if sealed is None else sealed
            request = self._comm.Irecv([target, MPI.BYTE], self._rank, self._from + 1)
            incoming.requests.append((request, sealed))
        self._incoming.append(incoming)
        self._ahead += incoming.size

    def _poll_payloads(self, receiver: Receiver) -> bool:
        moved = False
        while self._incoming:
            first = self._incoming[0]
            while first.done < len(first.requests):
                request, sealed = first.requests[first.done]
                if not request.Test():
                    return moved
                self.heard = time.monotonic()
                buffer = first.buffers[first.done]
                if sealed is not None:
                    _bytes(buffer)[:] = memoryview(self._open(sealed, self._from + 1))
                first.done += 1
                moved = True
                if not isinstance(first.message, messages.Long):
                    receiver.payload(self, first.message, first.done - 1, buffer)
            self._incoming.popleft()
            self._ahead -= first.size
            moved = True
            if isinstance(first.message, messages.Long):
                self._announced(self._decode(_bytes(first.buffers[0])), receiver)
            else:
                receiver.message(self, first.message)
        return moved

    def idle(self) -> bool:
        """Return whether everything sent is on its way, and its memory free again."""
        return self.failed is not None or not self._sending

    def _fail(self, error: MPI.Exception) -> None:
        if error.Get_error_class() == MPI.ERR_PROC_FAILED:
            self.failed = "its process ended"
        else:
            self.failed = " ".join(str(error).split())


class LocalLink(Link):
    """With another part of this process; made in pairs. Payloads are handed over, not copied."""

    def __init__(self, peer: int) -> None:
        super().__init__(peer)
        self._queue: deque[tuple[messages.Message, Sequence[torch.Tensor]]] = deque()
        self._other = self

    @classmethod
    def pair(cls, one: int, two: int) -> tuple[LocalLink, LocalLink]:
        """Return the two ends of a link within this process, the first part's end first.

        Args:
            one: The first part's number.
            two: The second part's number.
        """
        first, second = cls(two), cls(one)
        first._other, second._other = second, first
        return first, second

    def send(self, message: messages.Message, payloads: Sequence[torch.Tensor] = ()) -> None:
        """Hand over a message to the other end.

        Args:
            message: What is sent.
            payloads: The tensors that go with it, copied by the other end when it polls.
        """
        if self.failed is None:
            self.sent_bytes += sum(payload.nbytes for payload in payloads)
            self._other._queue.append((message, payloads))

    def poll(self, receiver: Receiver) -> bool:
        """Take in what was handed over until now; return whether there was something."""
        moved = False
        for _ in range(len(self._queue)):
            self.heard = time.monotonic()
            message, payloads = self._queue.popleft()
            buffers = receiver.buffers(self, message)
            for number, (buffer, payload) in enumerate(zip(buffers, payloads, strict=True)):
                buffer.view(-1).view(torch.uint8).copy_(payload.view(-1).view(torch.uint8))
                receiver.payload(self, message, number, buffer)
            receiver.message(self, message)
            moved = True
        return moved

    def idle(self) -> bool:
        """Return True: nothing of this end is being read after ``send``."""
        return not self._other._queue


def _bytes(data: Any) -> memoryview:
    if isinstance(data, torch.Tensor):
        return data.view(-1).view(torch.uint8).numpy().data
    return memoryview(data)
