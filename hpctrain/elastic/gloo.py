"""Membership by a driver outside the ranks, for Horovod over Gloo: it also takes in new hosts.

The driver (:mod:`hpctrain.launch.driver`) hears of every rank several times a second. It says who
is lost, and when all that are left have come together, what the new world is; Gloo's connections
are made anew then.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from hpctrain.elastic.connections import connections, shut_down
from hpctrain.elastic.driver_protocol import (
    ADDRESS,
    KEY,
    LINE_BYTES,
    challenge,
    pack,
    proof,
    proves,
    unpack,
)
from hpctrain.elastic.membership import MEET_SECONDS, Meeting, Member, Progress, Welcome
from hpctrain.errors import Dismissed, Error, PeerLost
from hpctrain.world.network import interface_of
from hpctrain.world.process_reaper import ProcessReaper, identity

T = TypeVar("T")

CONNECT_SECONDS = 10.0
CUT_EVERY_SECONDS = 0.05
START_SECONDS = MEET_SECONDS / 2
PAUSES = (0.1, 0.2, 0.4, 0.8, 1.6)
"""Between attempts to be known to a driver that closes the connection."""

DRIVER_GONE = "its log says why; `--resume auto` goes on from the last checkpoint."


class _World(NamedTuple):
    """What the driver says of a world."""

    generation: int
    rank: int
    members: list[Member]
    identities: dict[int, list[int]]
    progress: list[Progress]
    environment: dict[str, str]


class Gloo:
    """Membership by the driver whose address is in the environment.

    Args:
        hang_seconds: Silence after which a process is lost.
        timeout_seconds: Longest wait for the first world.

    Attributes:
        comm: None: Gloo's world is in the environment.
        welcome: What a process that joins a run under way was told; None: it began with the run.

    Raises:
        Error: The driver cannot be reached, or has another key.
    """

    name = "gloo"
    comm = None

    def __init__(
        self,
        hang_seconds: float,
        timeout_seconds: float,
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        self.generation = 0
        self.members: list[Member] = []
        self.lost_hosts: set[str] = set()
        self._fence = ProcessReaper({})
        self._exchange: set[tuple[int, int]] = set()  # Gloo's connections
        self._changed = threading.Condition()
        self._sends = threading.Lock()
        self._world: _World | None = None
        self._regroup = -1  # the newest generation that has lost somebody
        self._starting = False
        self._waiting = False
        self._over = False
        self._gone = ""  # why the driver is
        self._greeting: dict[str, Any] | None = None
        for pause in (*PAUSES, None):
            if self._greet(environment, hang_seconds, last=pause is None):
                break
            time.sleep(pause or 0.0)
        _set_defaults(self._connection.getsockname()[0], timeout_seconds)
        self._connection.settimeout(None)
        threading.Thread(target=self._listen, daemon=True).start()
        period = hang_seconds / 4
        threading.Thread(target=self._beat, args=(period,), daemon=True).start()
        self._wait_seconds = timeout_seconds
        greeting = self._await(lambda: self._greeting, timeout_seconds, "number")
        self.number = int(greeting["number"])
        self.welcome = None if greeting["out"] is None else Welcome(self.number, greeting["out"])

    # What the run asks for.

    def connect(self, begin: Callable[[], None]) -> None:
        """Start Horovod on the first world."""
        progress = Progress(0, -1, -1)
        world = self._await(lambda: self._world, self._wait_seconds, "world")
        while not self._enter(world, begin):
            world = self._gather(progress)

    def meet(self, progress: Progress, begin: Callable[[], None]) -> Meeting:
        """Form a new world of those that are alive, and of those that want to join.

        Args:
            progress: How far this rank has come.
            begin: Starts Horovod on the new world.
        """
        before = self.members
        while True:
            world = self._gather(progress)
            if self._enter(world, begin):
                break
        lost = [member for member in before if member not in self.members]
        self.lost_hosts |= {member.host for member in lost}
        for member in lost:
            self._fence.cut_off(member.number)
        return Meeting(
            self.generation,
            world.progress,
            lost,
            [member for member in self.members if before and member not in before],
        )

    def begin(self, out: Path, wanted: int | None) -> None:
        """Tell the driver that training begins.

        Args:
            out: The run folder.
            wanted: Not used: the driver knows.
        """
        self._send("begun", out=str(out.resolve()))

    def waiting(self) -> bool:
        """Whether somebody wants to join, as far as this rank knows."""
        return self._waiting

    def watch(self) -> None:
        """Look for losses while waiting for others.

        Raises:
            PeerLost: One of them is lost.
        """
        if self._regroup >= self.generation:
            raise PeerLost(
                f"rank {self.number} on {os.uname().nodename} lost a peer: the driver says so.",
                hint="the driver's log says which.",
            )

    def leave(self) -> None:
        """End this rank's part in good order."""
        self._send("done")

    def abort(self, code: int) -> None:
        """Have the driver end the others with an exit code, and end: this rank has failed."""
        self._send("abort", code=code)
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_WR)  # not before it is sent
        os._exit(code)

    # Worlds.

    def _gather(self, progress: Progress) -> _World:
        """Tell the driver that this rank cannot go on by itself; the next world."""
        shut_down(self._exchange)
        with self._changed:
            self._world = None
        self._send("meet", progress=progress, generation=self.generation)
        seconds = MEET_SECONDS * 2 if self.members else self._wait_seconds
        return self._await(lambda: self._world, seconds, "world")

    def _await(self, what: Callable[[], T | None], seconds: float, name: str) -> T:
        """Wait for something that the driver is to say."""
        with self._changed:
            self._changed.wait_for(lambda: what() or self._gone or self._over, timeout=seconds)
            found, over, gone = what(), self._over, self._gone
        if found is not None:
            return found
        if over:
            raise Dismissed("the run was over before this process could take part in it.")
        raise PeerLost(
            f"a rank on {os.uname().nodename}: "
            + (gone or f"the driver gave it no {name} within {seconds:.0f} s."),
            hint=DRIVER_GONE,
        )

    def _enter(self, world: _World, begin: Callable[[], None]) -> bool:
        """Start Horovod on a world; False: somebody was lost meanwhile."""
        os.environ |= world.environment
        before = connections()
        with self._changed:
            self._starting = True
        cutter = threading.Thread(target=self._cut, args=(world.generation, before), daemon=True)
        cutter.start()
        try:
            begin()
            entered = self._regroup < world.generation
        except Exception as error:
            print(f"hpctrain: Gloo did not start: {error}", file=sys.stderr, flush=True)
            entered = False
        finally:
            with self._changed:
                self._starting = False
                self._changed.notify_all()
            cutter.join()
        self._exchange = connections() - before
        self.generation = world.generation
        if entered:
            self.members = world.members
            self._send("entered", generation=world.generation)
        self._fence.know(world.identities)
        return entered

    def _cut(self, generation: int, before: set[tuple[int, int]]) -> None:
        """While Horovod starts: if one is lost that it waits for, have the start fail.

        So, too, where it takes too long: Gloo takes the first connection that comes for its
        peer's, and a stranger's may. The next attempt is at other ports.
        """
        deadline = time.monotonic() + START_SECONDS
        with self._changed:
            while self._starting:
                left = deadline - time.monotonic()
                failed = self._regroup >= generation or left <= 0
                if failed:
                    shut_down(connections() - before)
                self._changed.wait(CUT_EVERY_SECONDS if failed else left)

    # The connection to the driver.

    def _greet(self, environment: Mapping[str, str], hang_seconds: float, *, last: bool) -> bool:
        """Show that this is a rank of the run, and see that it is the run's driver.

        Returns:
            False: what listens closed the connection. So does a driver with which strangers, too,
            open connections.

        Raises:
            Error: It is not the run's driver; or it closed the connection, the last time.
        """
        key = environment[KEY]
        host, _, port = environment[ADDRESS].rpartition(":")
        self._connection = _connect(host, int(port))
        self._lines = self._read_lines()
        wrong = Error(
            f"what listens at {environment[ADDRESS]} is not this run's driver.",
            hint="is another run's HPCTRAIN_DRIVER in the environment?",
        )
        try:
            theirs = str(next(self._lines)["challenge"])
            mine = challenge()
            self._send(
                "hello",
                challenge=mine,
                proof=proof(key, "rank", theirs, mine),
                seat=int(environment.get("HPCTRAIN_RANK", "0")),
                host=os.uname().nodename,
                identity=identity(),
                hang_seconds=hang_seconds,
            )
            answer = next(self._lines)
            if not proves(key, answer.get("proof"), "driver", theirs, mine):
                raise wrong
        except (StopIteration, OSError) as error:
            self._connection.close()
            if last:
                raise wrong from error
            return False
        except (KeyError, ValueError) as error:
            raise wrong from error
        return True

    def _send(self, kind: str, **values: Any) -> None:
        with self._sends, contextlib.suppress(OSError):  # who listens finds out, too
            self._connection.sendall(pack(kind, **values))

    def _beat(self, seconds: float) -> None:
        while not self._gone:
            self._send("beat")
            time.sleep(seconds)

    def _read_lines(self) -> Iterator[dict[str, Any]]:
        with self._connection.makefile("rb") as file:
            while line := file.readline(LINE_BYTES):
                yield unpack(line)

    def _listen(self) -> None:
        try:
            for message in self._lines:
                with self._changed:
                    self._hear(message)
                    self._changed.notify_all()
        except (OSError, ValueError, KeyError) as error:
            gone = f"the driver is gone: {error}."
        else:
            gone = "the driver is gone."
        with self._changed:
            self._gone = gone
            self._changed.notify_all()

    def _hear(self, message: dict[str, Any]) -> None:
        kind = message["kind"]
        if kind == "welcome":
            self._greeting = message
        elif kind == "world":
            self._world = _world(message)
            self._waiting = False
        elif kind == "regroup":
            self._regroup = max(self._regroup, message["generation"])
        elif kind == "waiting":
            self._waiting = True
        elif kind == "over":
            self._over = True
        elif kind == "cut":
            print(
                f"hpctrain: error: rank {self.number} on {os.uname().nodename} gave no sign of "
                "life, and the others have gone on without it.",
                file=sys.stderr,
                flush=True,
            )
            os._exit(PeerLost.exit_code)


def _world(message: Mapping[str, Any]) -> _World:
    members = [Member(*each) for each in message["members"]]
    rank = int(message["rank"])
    names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE")
    environment = {
        f"HOROVOD_{name}": str(value) for name, value in zip(names, message["place"], strict=True)
    }
    environment |= {
        "HOROVOD_HOSTNAME": members[rank].host,
        # HOST:PORT/PATH: the port that Horovod puts behind it becomes a part of the path.
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": str(message["rendezvous"]),
        "HOROVOD_GLOO_RENDEZVOUS_PORT": "0",
    }
    return _World(
        int(message["generation"]),
        rank,
        members,
        {int(number): its for number, its in message["identities"].items()},
        [Progress(*each) for each in message["progress"]],
        environment,
    )


def _connect(host: str, port: int) -> socket.socket:
    try:
        connection = socket.create_connection((host, port), timeout=CONNECT_SECONDS)
    except OSError as error:
        raise Error(
            f"the driver at {host}:{port} cannot be reached: {error}.",
            hint="is it running, and reachable from this host? Start ranks by `hpctrain launch`.",
        ) from error
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _set_defaults(address: str, timeout_seconds: float) -> None:
    """What Horovod reads at its start; the user's own is left alone."""
    os.environ |= {"HOROVOD_CONTROLLER": "gloo", "HOROVOD_CPU_OPERATIONS": "gloo"}
    os.environ.setdefault("HOROVOD_GLOO_TIMEOUT_SECONDS", str(max(1, round(timeout_seconds))))
    os.environ.setdefault("HOROVOD_LOG_LEVEL", "fatal")  # a loss is no error here
    if wire := interface_of(address):
        os.environ.setdefault("HOROVOD_GLOO_IFACE", wire)
