"""A server: holds slices, updates them with what workers push, and answers."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch

from hpctrain.compression.codec import make_codec
from hpctrain.config import PsConfig
from hpctrain.errors import Error, PeerLost
from hpctrain.ps.protocol import messages
from hpctrain.ps.protocol.link import STARTING_SECONDS, Link
from hpctrain.ps.protocol.regions import Regions
from hpctrain.ps.server.coordinator import Coordinator
from hpctrain.ps.server.evicted import Evicted
from hpctrain.ps.server.gradients import Gradients
from hpctrain.ps.server.order_log import OrderLog
from hpctrain.ps.server.peers import Peers
from hpctrain.ps.server.replicas import Replicas
from hpctrain.ps.server.replies import Replies
from hpctrain.ps.server.scheduler import Scheduler
from hpctrain.ps.server.store import Store
from hpctrain.ps.server.table_server import TableServer
from hpctrain.ps.server.updates import Updates

HOUSEKEEPING_SECONDS = 0.02


class Server:
    """One server of a parameter server.

    It is moved on by ``poll``, which never blocks, until ``done``.

    Args:
        me: This server's number.
        workers: Links with the workers, by number.
        servers: Links with the other servers, by number.
        config: The same on every rank.
        regions: Memory shared with the workers of this host.
        timeout_seconds: Longest wait of a collective of the workers.
        on_lost: Called with the number of each peer that is lost.

    Attributes:
        peers: Links with all others, and who of them is left.
        done: Whether every worker has left.
        ports: New workers to connect with, and where.
        over: Whether no other new workers will come.
        lost: Whether any worker or server was lost.
        aborted: Whether another rank has said that it failed.
        order: The order of updates, where it is recorded or replayed.
        store: What it holds.
        held: The slices of it, by number.
        tables: Its rows of embedding tables.
        coordinator: Answers workers' questions, where this server coordinates.
    """

    def __init__(
        self,
        me: int,
        workers: dict[int, Link],
        servers: dict[int, Link],
        config: PsConfig,
        *,
        regions: Regions | None = None,
        timeout_seconds: float = 600.0,
        on_lost: Callable[[int], None] = lambda peer: None,
    ) -> None:
        self.me = me
        self.peers = Peers(me, workers, servers)
        self.config = config
        self.done = False
        self.over = False
        self.lost = False
        self.aborted = False
        self.ports: list[tuple[int, str]] = []
        initial_workers = sorted(workers)
        self.order = OrderLog(
            config.record_order, config.replay, me, initial_workers, config.consistency
        )
        self.store = Store(self.peers, config, self.order, regions or Regions())
        self.held = self.store.held
        self.coordinator = Coordinator(workers, self._shares(), self._reply, timeout_seconds)
        for epoch, round_, shares in self.order.divisions():
            self.coordinator.divisions[epoch, round_] = (initial_workers, shares)
        self._gradients = Gradients(self.store, make_codec(config.compression))
        self._replicas = Replicas(self.store, self.peers, self._gradients)
        self._replies = Replies(self.store, self.peers, config)
        self._updates = Updates(self.store, config, self._gradients, self._replicas)
        self._scheduler = Scheduler(
            self.store, self.peers, self._gradients, self._updates, self._replies
        )
        self._snapshots = self._scheduler.snapshots
        self._clipping = self._scheduler.aggregation.clipping
        self.tables = TableServer(self.peers, config)
        self._evicted = Evicted()
        self._copies: defaultdict[int, list[torch.Tensor]] = defaultdict(list)
        self._deferred: list[Callable[[], None]] = []
        self._housekept = 0.0
        self._last_heartbeat = 0.0
        self._on_lost = on_lost
        self._begun: set[int] = set()  # workers that have asked for weights
        self._resting: set[int] = set()  # workers that push nothing more, lost ones too
        self._regions: Regions | None = None
        self._opened = False
        self._closing = False  # whether a worker pushes nothing more: nobody else may come
        self._completed = False  # whether a worker has done all of its steps

    def _shares(self) -> list[int] | None:
        shares = self.config.shares or self.store.consistency.shares
        if isinstance(shares, list):
            return shares
        return None if shares == "speed" else [1] * len(self.peers.workers)

    # What moves it on.

    def poll(self) -> bool:
        """Move on without blocking; return whether something happened.

        Raises:
            PeerLost: A slice is lost with all of its replicas, or a worker ended the run.
            Error: The recorded run cannot be replayed, or this one not be recorded.
        """
        try:
            return self._poll()
        except Error as error:
            hint = None if isinstance(error, PeerLost) else error.hint
            self.peers.tell(messages.Abort(self.me, error.message, hint))
            raise

    def share(self, regions: Regions) -> None:
        """Reach the memory of this host's workers, from the next ``poll`` on."""
        self._regions = regions

    def _poll(self) -> bool:
        moved = False
        # Not while the slices are coming, to where they were to be without it.
        if self._regions is not None and (self._opened or self.store.layout is None):
            self.store.share(self._regions)
            self._regions = None
        for peers in (self.peers.workers, self.peers.servers, self.peers.newcomers):
            for peer, link in list(peers.items()):
                if peers.get(peer) is not link:
                    continue  # lost or moved just now: what a lost one sent counts no more
                moved |= link.poll(self)
                if link.failed is not None:
                    self._lose(peer, link.failed)
        self._replies.send_all()
        for worker in self.tables.poll():
            self.coordinator.postpone(worker)
            moved = True
        now = time.monotonic()
        if now - self._housekept > HOUSEKEEPING_SECONDS:
            self._housekept = now
            self._keep_house(now)
        return moved

    def idle(self) -> bool:
        """Return whether everything sent is on its way."""
        return self.peers.idle()

    def _keep_house(self, now: float) -> None:
        """Send heartbeats, and give up whoever has been silent for too long."""
        silence = self.config.silence_seconds
        if now - self._last_heartbeat > silence / 5:
            self._last_heartbeat = now
            self.peers.tell(messages.Heartbeat(self.coordinator.stop))
        for link in self.peers.links():
            begun = link.peer in self._begun or (link.peer in self.peers.servers and self._opened)
            if now - link.heard > (silence if begun else max(silence, STARTING_SECONDS)):
                self._lose(link.peer, f"it was silent for {now - link.heard:.1f} s")
        self._evicted.poll()
        if overdue := self.coordinator.overdue():
            self.abort(f"the other workers waited too long for worker {overdue}")

    # What comes.

    def buffers(self, link: Link, message: messages.Message) -> Sequence[torch.Tensor]:
        """Return memory for a message's payloads.

        Args:
            link: Where it comes from.
            message: What is announced.
        """
        if isinstance(message, messages.Push):
            return [self._gradients.buffer(size) for size in message.sizes]
        if isinstance(message, messages.Replicate):
            return [] if message.size is None else [self._gradients.buffer(message.size)]
        if isinstance(message, messages.Open):
            return self._open(message)
        if isinstance(message, messages.Copy | messages.Put):
            return [self._gradients.buffer(size) for size in message.sizes]
        return self.tables.buffers(message)

    def payload(
        self, link: Link, message: messages.Message, number: int, buffer: torch.Tensor
    ) -> None:
        """Take in a payload; gradients are worked on as they come, one by one.

        Args:
            link: Where it comes from.
            message: Whose payload it is.
            number: Its place among the message's payloads.
            buffer: What has come.
        """
        if isinstance(message, messages.Push):
            self._pushed(link.peer, message, number, buffer)
        elif isinstance(message, messages.Replicate):
            self._replicas.update(message, buffer)
        elif isinstance(message, messages.Copy):
            self._copies[message.slice].append(buffer)
        elif isinstance(message, messages.Put) and message.slices[number] in self.held:
            self.held[message.slices[number]].put[link.peer] = buffer
        elif isinstance(message, messages.PullRows | messages.PushRows | messages.CopyRows):
            self.tables.payload(link, buffer)

    def message(self, link: Link, message: messages.Message) -> None:
        """Take in a message that has come whole.

        Args:
            link: Where it comes from.
            message: What has come.
        """
        match message:
            case messages.Push():
                if not message.sizes:
                    for number in range(len(message.slices)):
                        self._pushed(link.peer, message, number, None)
            case messages.Put():
                pass
            case messages.Pull():
                self._pulled(link.peer, message)
            case messages.Ask():
                self._asked(link.peer, message)
            case messages.Norms():
                self._clipping.told(message)
            case messages.Replicate():
                self._replicas.updated(link, message)
            case messages.Replicated():
                held = self.held[message.slice]
                held.acknowledged[link.peer] = message.version
                self._replies.grant_delayed(held)
            case messages.Copy():
                self._copied(link, message, self._copies.pop(message.slice))
            case messages.Open() if not self._opened:
                self._opened = True
                for lost in self.peers.lost_servers:
                    self._inherit(lost)
                self._do_deferred()
            case messages.Open():
                pass
            case messages.Decided():
                self.coordinator.decided(message)
            case messages.Lost():
                self._lose(message.peer, message.reason)
            case messages.Rest():
                self._closing = True
                self._rest(link.peer)
            case messages.Leave():
                self._leave(link.peer, message.threads)
            case messages.NewWorker():
                self.ports.append((message.worker, message.port))
            case messages.Over():
                self.over = True
            case messages.Join():
                self._join(link)
            case messages.Joined():
                self._joined(link.peer, message)
            case messages.Abort():
                self.aborted = True
                raise message.error()
            case (
                messages.Freeze()
                | messages.Frozen()
                | messages.Cut()
                | messages.Kept()
                | messages.Fetch()
            ):
                self._snapshots.message(link, message)
            case (
                messages.OpenTables()
                | messages.PullRows()
                | messages.PushRows()
                | messages.CopyRows()
                | messages.RowsCopied()
                | messages.KeepRows()
            ):
                self.coordinator.postpone(link.peer)
                self.tables.message(link, message)
            case messages.Heartbeat():
                self.coordinator.stop |= message.stop
            case _:
                raise Error(f"server {self.me} got a {type(message).__name__} by mistake.")

    def _open(self, message: messages.Open) -> list[torch.Tensor]:
        if self._opened:  # the worker before this one was lost, but had told us
            return self.store.open_again(message)
        return self.store.open(message)

    def _copied(self, link: Link, message: messages.Copy, buffers: list[torch.Tensor]) -> None:
        if not self._opened:  # nobody has told this server yet what is trained
            self._deferred.append(lambda: self._copied(link, message, buffers))
            return
        self._replicas.copied(link, message, buffers)

    def primary(self, index: int) -> bool:
        """Return whether this server is the one that updates a slice."""
        return self.store.primary(index)

    def _pulled(self, worker: int, message: messages.Pull) -> None:
        if not self._opened:
            self._deferred.append(lambda: self._pulled(worker, message))
            return
        if worker not in self.peers.workers:
            return
        self._begun.add(worker)
        for index in message.slices:
            if not self.primary(index):
                # The worker found out before this server that their primary is gone.
                part = messages.Pull([index])
                self._deferred.append(lambda part=part: self._pulled(worker, part))  # type: ignore[misc]
                continue
            self._scheduler.pull(self.held[index], worker)

    def _asked(self, worker: int, question: messages.Ask) -> None:
        if not self.peers.coordinates:
            # The worker found out before this server that the coordinator is gone.
            self._deferred.append(lambda: self._asked(worker, question))
        elif worker not in self.peers.workers and worker not in self.peers.newcomers:
            return
        elif question.what == "known":
            self.coordinator.known(question)
        elif question.what == "snapshot":
            self.order.asked(worker, question.clock)
            self._snapshots.ask(worker, question)
        else:
            if question.what == "give":
                counts = {f"delay.{delay}": count for delay, count in self._updates.delays.items()}
                self.coordinator.add("statistics", counts)
                self._updates.delays.clear()
            before = len(self.coordinator.divisions)
            self.coordinator.ask(worker, question)
            if len(self.coordinator.divisions) > before:
                (epoch, round_), (workers, shares) = list(self.coordinator.divisions.items())[-1]
                for link in self.peers.servers.values():
                    link.send(messages.Decided(epoch, round_, workers, shares))

    def _reply(self, worker: int, answer: messages.Answer) -> None:
        link = self.peers.link(worker)
        if link is not None:
            link.send(answer)

    def _pushed(
        self, worker: int, push: messages.Push, number: int, buffer: torch.Tensor | None
    ) -> None:
        index = push.slices[number]
        if worker not in self.peers.workers:
            return
        if not self.primary(index):
            # The worker found out before this server that the slice's primary is gone.
            self._deferred.append(lambda: self._pushed(worker, push, number, buffer))
            return
        self.coordinator.postpone(worker)
        self._scheduler.push(self.held[index], worker, push, number, buffer)

    # Who comes and goes.

    @property
    def growable(self) -> bool:
        """Whether a new worker would find something to do."""
        return bool(self.store.layout and self.peers.workers and not self._closing)

    def greet(self, link: Link) -> None:
        """Add a new worker that can be talked with; it asks to join when it is ready."""
        self.peers.newcomers[link.peer] = link

    def _join(self, link: Link) -> None:
        worker = link.peer
        if self._closing:
            link.send(messages.Over())
            return
        self.peers.newcomers.pop(worker, None)
        self.peers.workers[worker] = link
        self._begun.add(worker)
        self._scheduler.join(worker)
        if not self.store.consistency.same_weights:
            self.coordinator.expect(worker)

    def _joined(self, worker: int, message: messages.Joined) -> None:
        if worker in self.peers.workers:
            self.coordinator.join(worker, message.since)
            for other in self.peers.workers:
                if other != worker:
                    self.peers.workers[other].send(message)

    def _leave(self, worker: int, threads: int) -> None:
        if self.peers.newcomers.pop(worker, None) is not None:
            return
        self._closing = self._completed = True
        self.order.left(worker, threads)
        self._forget_worker(worker)
        if not self.peers.workers:
            self._end()

    def _end(self) -> None:
        mine = {index: held.log for index, held in self.held.items() if self.primary(index)}
        divisions = [(*when, shares) for when, (_, shares) in self.coordinator.divisions.items()]
        self.order.write(mine, divisions, whole=not self.lost)
        self.done = True

    def _forget_worker(self, worker: int) -> Link:
        self._replies.forget(worker)
        link = self.peers.workers.pop(worker)
        self.coordinator.leave(worker)
        self._rest(worker)
        return link

    def _rest(self, worker: int) -> None:
        """Nothing more will be pushed by this worker: nobody waits for it."""
        self._resting.add(worker)
        clocks = [held.schedule.applied.get(worker, 0) for held in self.held.values()]
        self.order.rested(worker, max(clocks, default=0))
        self._scheduler.leave(worker)
        self.tables.leave(worker)

    def _lose(self, peer: int, reason: str) -> None:
        """Go on without a lost peer, and tell everybody."""
        known = peer in self.peers.workers or peer in self.peers.servers
        if self.order.replayed is not None and known:
            self.abort(f"rank {peer} is lost, and a replay needs all of them: {reason}")
        self.lost = True
        self._on_lost(peer)
        self.peers.newcomers.pop(peer, None)
        if peer in self.peers.workers:
            link = self._forget_worker(peer)
            if link.failed is None:
                self._evicted.add(link, reason)
            self.peers.tell(messages.Lost(peer, reason))
            if not self.peers.workers and self._completed:
                self._end()
            elif not self.peers.workers:
                raise PeerLost(
                    f"server {self.me}: the last worker is gone: worker {peer}: {reason}.",
                    hint="its own log says more; `--resume auto` goes on from the last checkpoint.",
                )
        if peer in self.peers.servers:
            self._lose_server(peer, reason)

    def _lose_server(self, peer: int, reason: str) -> None:
        del self.peers.servers[peer]
        self.peers.lost_servers.append(peer)
        self.peers.tell(messages.Lost(peer, reason))
        self.tables.lose(peer, reason)
        if self._opened:
            self._inherit(peer)
        self._snapshots.server_lost()
        self._do_deferred()

    def _do_deferred(self) -> None:
        deferred, self._deferred = self._deferred, []
        for action in deferred:
            action()

    def _inherit(self, lost: int) -> None:
        """Take over those of a lost server's slices that fail over to this one.

        Raises:
            PeerLost: The slices, or one of them, are lost.
        """
        before = self.store.placement
        gone = self.peers.lost_servers[: self.peers.lost_servers.index(lost) + 1]
        survivors = [server for server in self.peers.initial_servers if server not in gone]
        self.store.inherit(lost, survivors)
        for index, held in self.held.items():
            if self.primary(index):
                for worker in list(held.schedule.applied):
                    if worker in self._resting:
                        held.schedule.leave(worker)
                self._replicas.promote(held, before)
                self._replies.grant_delayed(held)
                self._scheduler.run(held)
        # Who has made an update has all norms of its round; others may wait for lost ones.
        self._clipping.tell_again()

    def abort(self, reason: str) -> None:
        """End the run for everybody.

        Raises:
            PeerLost: Always.
        """
        raise PeerLost(f"server {self.me} ends the run: {reason}.", hint="its log says more.")
