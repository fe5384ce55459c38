"""The driver of elastic ranks: it replaces those that are lost, and takes in new ones.

It starts ranks where some are missing (:mod:`hpctrain.launch.worker_slots`), hears of each several
times a second, and says what the world is. Stock elastic Horovod has a driver, too; this one
bounds every wait, and forgives hosts.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from hpctrain.elastic.driver_protocol import LINE_BYTES, challenge, pack, proof, proves, unpack
from hpctrain.elastic.membership import MEET_SECONDS, Member, Progress
from hpctrain.launch.listener import Strangers, admit, listening, read_until
from hpctrain.run_folder import INTERRUPTED, INTERRUPTED_CODE, RESULT

LOOK_SECONDS = 0.05
STALL_SECONDS = 0.5
LATE_SECONDS = 20.0
"""So long the first world waits for all, once there are as many as it needs."""

ALONE_SECONDS = 0.5
"""So long a rank may be alone at a meeting, before the others are called. Where somebody is to join
they all come by themselves, and would take a call for a loss."""

MOST_VAIN = 5
"""Worlds one after the other in which nobody took a step: the ranks cannot reach each other."""


@dataclass(eq=False)
class Rank:
    """A process that takes part, or is about to.

    Attributes:
        seat: Which of those that were started it is.
        member: Its number and host.
        identity: As :func:`hpctrain.world.process_reaper.identity` says there.
        writer: To it.
        heard: When it last gave a sign of life; seconds of the monotonic clock.
        hang_seconds: Silence after which it is lost.
        progress: What it said when it came to a meeting; None: it is not there.
        takes_part: Whether it is in the world.
        entered: Whether it has found the others of the world.
        done: Whether it has ended in good order.
    """

    seat: int
    member: Member
    identity: list[int]
    writer: asyncio.StreamWriter
    heard: float
    hang_seconds: float
    progress: Progress | None = None
    takes_part: bool = False
    entered: bool = False
    done: bool = False

    def send(self, kind: str, **values: Any) -> None:
        """Tell it something, if it is there.

        Args:
            kind: Of the message.
            values: What it says.
        """
        with contextlib.suppress(OSError, RuntimeError):
            self.writer.write(pack(kind, **values))


class Place(NamedTuple):
    """A rank's place in a world, in the order of Horovod's variables."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    cross_rank: int
    cross_size: int


def places(hosts: list[str]) -> list[Place]:
    """Return the places of ranks on these hosts; ranks of a host come one after the other."""
    found = []
    for rank, host in enumerate(hosts):
        first = hosts.index(host)
        local = rank - first
        others = [each for each in dict.fromkeys(hosts) if hosts.count(each) > local]
        cross = others.index(host)
        found.append(Place(rank, len(hosts), local, hosts.count(host), cross, len(others)))
    return found


def by_host(ranks: list[Rank]) -> list[Rank]:
    """Sort ranks so that those of a host are together, else in their order, as Horovod wants it."""
    first: dict[str, int] = {}
    for rank in ranks:
        first.setdefault(rank.member.host, len(first))
    return sorted(ranks, key=lambda rank: first[rank.member.host])


@dataclass
class Driver:
    """The driver of a run: it knows who takes part, by their heartbeats.

    Args:
        key: Of the run.
        wanted: How many ranks there should be.
        least: With how many the run may begin.
        rendezvous: Makes a store for the next world's addresses; where, and what ends it.
        say: Tells the person who watches.

    Attributes:
        lost: Called with the seat of a rank that is lost, to end what is left of it.
        code: The exit code, once the run is over.
        out: The run folder, once training has begun.
    """

    key: str
    wanted: int
    least: int
    rendezvous: Callable[[], tuple[str, Callable[[], None]]]
    say: Callable[[str], None]
    lost: Callable[[int], None] = lambda seat: None
    code: int | None = None
    out: str | None = None
    ranks: list[Rank] = field(default_factory=list)
    generation: int = -1
    _next: int = 0
    _regroups_since: float | None = None
    _called: bool = False
    _enough_since: float | None = None
    _vain: int = 0
    _newest: int = -2
    _no_store_since: float | None = None
    _hearing: set[asyncio.Task[None]] = field(default_factory=set)
    _begun: asyncio.Event = field(default_factory=asyncio.Event)
    _end_store: Callable[[], None] = lambda: None

    @property
    def members(self) -> list[Rank]:
        """The members of the world, by rank."""
        return [rank for rank in self.ranks if rank.takes_part]

    async def serve(self) -> int:
        """Look after the ranks until the run is over.

        Returns:
            The exit code.
        """
        looked = time.monotonic()
        while self.code is None:
            await asyncio.sleep(LOOK_SECONDS)
            now = time.monotonic()
            if now - looked > STALL_SECONDS:  # this process was held up, and has heard nobody
                for rank in self.ranks:
                    rank.heard = now
            looked = now
            self._look()
        for rank in self.ranks:
            rank.send("over")
        self._end_store()
        return self.code

    def end(self, code: int, why: str = "") -> None:
        """End the run; the first call decides.

        Args:
            code: The run's exit code.
            why: Said to the person who watches; empty: nothing is.
        """
        if self.code is None:
            self.code = code
            if why:
                self.say(why)

    # What ranks say.

    async def greet(self, connection: socket.socket) -> bool:
        """Do the handshake with somebody who has connected; False: it is no rank of the run."""
        loop = asyncio.get_running_loop()
        mine = challenge()
        await loop.sock_sendall(connection, pack("who", challenge=mine))
        hello = unpack(bytes(await read_until(connection, b"\n")))
        theirs = str(hello["challenge"])
        if not proves(self.key, hello["proof"], "rank", mine, theirs):
            return False
        member = Member(-1, str(hello["host"]))
        seat, hang_seconds = int(hello["seat"]), float(hello["hang_seconds"])
        identity = list(hello["identity"])
        await loop.sock_sendall(
            connection, pack("known", proof=proof(self.key, "driver", mine, theirs))
        )
        reader, writer = await asyncio.open_connection(sock=connection, limit=LINE_BYTES)
        rank = Rank(seat, member, identity, writer, time.monotonic(), hang_seconds)
        hearing = asyncio.ensure_future(self._hear(rank, reader))
        self._hearing.add(hearing)
        hearing.add_done_callback(self._hearing.discard)
        return True

    async def _hear(self, rank: Rank, reader: asyncio.StreamReader) -> None:
        self.ranks.append(rank)
        welcome = asyncio.ensure_future(self._welcome(rank))
        why = ""
        try:
            while not why:
                why = await self._heard(rank, reader)
                self._go_on()
        finally:
            welcome.cancel()
            rank.writer.close()
            self._gone(rank, why)
            self._go_on()

    async def _heard(self, rank: Rank, reader: asyncio.StreamReader) -> str:
        """Take in one thing that a rank says; why nothing more is to be expected of it."""
        try:
            line = await reader.readline()
            rank.heard = time.monotonic()
            if line:
                self._take(rank, unpack(line))
        except (OSError, ValueError) as error:
            return f"its connection ended: {type(error).__name__} {error}"
        return "" if line else "its connection ended"

    async def _welcome(self, rank: Rank) -> None:
        """Tell a process its number; one that comes late, when the others have begun."""
        if self.generation < 0:
            rank.member = rank.member._replace(number=rank.seat)
            self._next = max(self._next, self.wanted, rank.seat + 1)
            rank.send("welcome", number=rank.member.number, out=None)
            rank.progress = Progress(0, -1, -1)
            return
        await self._begun.wait()
        rank.member = rank.member._replace(number=self._next)
        self._next += 1
        rank.send("welcome", number=rank.member.number, out=self.out)

    def _take(self, rank: Rank, message: dict[str, Any]) -> None:
        """Take in what a rank says.

        Raises:
            ValueError: It is not what ranks say.
        """
        kind = message["kind"]
        try:
            progress = Progress(*message["progress"]) if kind == "meet" else None
            code = int(message["code"]) if kind == "abort" else 0
            out = str(message["out"]) if kind == "begun" else ""
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a message of kind {kind!r}") from error
        if progress is not None:
            rank.progress = progress
            if rank.takes_part:
                self._regroups_since = self._regroups_since or time.monotonic()
            elif self.generation >= 0:
                for member in self.members:
                    member.send("waiting")
        elif kind == "entered":
            rank.entered = message.get("generation") == self.generation
            if all(member.entered for member in self.members):
                self._end_store()  # all have found each other
        elif kind == "begun":
            self.out = out
            self._begun.set()
        elif kind == "done":
            rank.done = True
        elif kind == "abort":
            where = f"rank {rank.member.number} on {rank.member.host}"
            self.end(code, f"{where} failed with exit code {code}")

    def _gone(self, rank: Rank, why: str) -> None:
        if rank not in self.ranks or rank.done or self.code is not None:
            return
        self.ranks.remove(rank)
        self.say(f"rank {rank.member.number} on {rank.member.host} is lost: {why}")
        self.lost(rank.seat)
        if rank.takes_part:
            self._regroups_since = self._regroups_since or time.monotonic()
            self._call_together()

    # What follows.

    def _call_together(self) -> None:
        """Have all members come, whatever they wait for."""
        self._called = True
        self._end_store()  # who is about to wait for an address there does so in vain
        for rank in self.members:
            rank.send("regroup", generation=self.generation)

    def _look(self) -> None:
        now = time.monotonic()
        for rank in list(self.ranks):
            silent = now - rank.heard
            if rank.done:
                continue
            if silent > rank.hang_seconds:
                self._cut(rank, f"no sign of life for {silent:.1f} s")
            elif silent > rank.hang_seconds / 2:
                # A host looks for the way to another only when it has something to send. Where the
                # network has changed, this may be what brings the rank's own messages here again.
                rank.send("beat")
        if self.generation < 0:
            self._look_for_first(now)
        elif self._regroups_since is not None:
            late = [rank for rank in self.members if rank.progress is None]
            alone = now - self._regroups_since
            if late and alone > ALONE_SECONDS and not self._called:
                self._call_together()
            elif alone > MEET_SECONDS:
                for rank in late:
                    self._cut(rank, f"it did not come within {MEET_SECONDS:.0f} s after a loss")
        self._go_on()

    def _go_on(self) -> None:
        """If all have come whom the run waits for, do what is next."""
        members = self.members
        if self.code is not None or self.generation < 0:
            return
        if members and all(rank.done for rank in members):
            self._finish()
        elif not members:
            self.end(1, "no rank is left; --resume auto goes on from the last checkpoint")
        elif self._regroups_since is not None and all(rank.progress for rank in members):
            self._form([*members, *self._ready()])

    def _cut(self, rank: Rank, why: str) -> None:
        rank.send("cut")
        rank.writer.close()
        self._gone(rank, why)

    def _ready(self) -> list[Rank]:
        return [rank for rank in self.ranks if not rank.takes_part and rank.progress is not None]

    def _look_for_first(self, now: float) -> None:
        ready = sorted(self._ready(), key=lambda rank: rank.seat)
        if len(ready) < self.least:
            self._enough_since = None
            return
        self._enough_since = self._enough_since or now
        if len(ready) >= self.wanted or now - self._enough_since > LATE_SECONDS:
            self._form(ready)

    def _form(self, ranks: list[Rank]) -> None:
        """Form a new world of the ranks that have come."""
        if (store := self._store()) is None:
            return
        where, self._end_store = store
        newest = max(rank.progress.step for rank in ranks if rank.progress is not None)
        self._vain = self._vain + 1 if newest == self._newest else 0
        self._newest = newest
        if self._vain > MOST_VAIN:
            self.end(1, f"{MOST_VAIN} worlds without a step: can the hosts reach each other?")
            return
        self.generation += 1
        self._regroups_since, self._called = None, False
        ranks = by_host(ranks)
        self.ranks = [*ranks, *(rank for rank in self.ranks if rank not in ranks)]
        hosts = [rank.member.host for rank in ranks]
        values = {
            "generation": self.generation,
            "members": [rank.member for rank in ranks],
            "identities": {rank.member.number: rank.identity for rank in ranks},
            "progress": [rank.progress for rank in ranks],
            "rendezvous": where,
        }
        for rank, place in zip(ranks, places(hosts), strict=True):
            rank.takes_part, rank.progress, rank.entered = True, None, False
            rank.send("world", **values, rank=place.rank, place=place)
        if self.generation:
            names = ", ".join(str(rank.member.number) for rank in ranks)
            self.say(f"{len(ranks)} ranks go on from step {max(0, newest)}: {names}")

    def _store(self) -> tuple[str, Callable[[], None]] | None:
        """A store for the next world's addresses; None: there can be none now."""
        self._end_store()
        self._end_store = lambda: None
        try:
            store = self.rendezvous()
        except OSError as error:  # of this process, and no rank's fault: it is tried again
            now = time.monotonic()
            if self._no_store_since is None:
                self._no_store_since = now
                self.say(f"no port for the ranks' addresses yet: {error.strerror}")
            if now - self._no_store_since > MEET_SECONDS:
                self.end(1, f"no port for the ranks' addresses: {error.strerror}")
            return None
        self._no_store_since = None
        return store

    def _finish(self) -> None:
        """All members have ended in good order."""
        folder = Path(self.out or "")
        if self.out and (folder / RESULT).exists():
            self.end(0)
        elif self.out and (folder / INTERRUPTED).exists():
            self.end(INTERRUPTED_CODE)
        else:
            self.end(1, "the ranks ended without a result")


@contextlib.asynccontextmanager
async def listen(driver: Driver, address: str, strangers: Strangers) -> AsyncIterator[int]:
    """Listen for ranks that connect to a driver; yield the port.

    Args:
        driver: Greets them.
        address: Of this host, where ranks can reach it.
        strangers: Told of those who do not have the run's key.

    Raises:
        OSError: It cannot listen there.
    """
    with listening(address) as server:
        admitting = asyncio.ensure_future(admit(server, driver.greet, strangers))
        try:
            yield int(server.getsockname()[1])
        finally:
            admitting.cancel()
            await asyncio.gather(admitting, return_exceptions=True)
