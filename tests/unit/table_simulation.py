"""Embedding tables on a parameter server in one thread: who moves on next is the test's choice."""

import random

import torch

from hpctrain.config import PsConfig
from hpctrain.ps.client.client import Client
from hpctrain.ps.protocol.link import LocalLink
from hpctrain.ps.server.server import Server
from hpctrain.tables.table import Touched


class Simulation:
    """Workers that pull rows, and push gradients which the test gives."""

    def __init__(self, specs, workers, servers, config=None, seed=0):
        self.config = PsConfig(servers=servers, **(config or {}))
        numbers = [100 + n for n in range(servers)]
        links = {(w, s): LocalLink.pair(w, s) for w in range(workers) for s in numbers}
        between = {(a, b): LocalLink.pair(a, b) for a in numbers for b in numbers if a < b}
        self.servers = {}
        for s in numbers:
            peers = {b: between[s, b][0] for b in numbers if s < b}
            peers |= {a: between[a, s][1] for a in numbers if a < s}
            to_workers = {w: links[w, s][1] for w in range(workers)}
            self.servers[s] = Server(s, to_workers, peers, self.config)
        self.clients = {}
        for w in range(workers):
            client = Client(w, {s: links[w, s][0] for s in numbers}, self.config)
            client.open_tables(specs)
            self.clients[w] = client
        self.specs = specs
        self.links, self.between = links, between
        self.random = random.Random(seed)
        self.dead = set()
        self.moves, self.fault, self.slow = 0, None, None
        self.history = []  # (worker, clock, slowest clock) when a worker begins a step

    def kill_after(self, moves, number):
        """Lose a server when so many clients and servers have moved on."""
        self.fault = (moves, number)

    def fall(self):
        """Lose the server that is due to be lost, if it lives."""
        if self.fault is not None:
            self.kill(self.fault[1])
            self.fault = None

    def move(self):
        """One client or server, whichever."""
        self.moves += 1
        if self.fault is not None and self.moves >= self.fault[0]:
            self.fall()
        actors = [*self.clients.items(), *self.servers.items()]
        number, actor = self.random.choice([each for each in actors if each[0] not in self.dead])
        if number == self.slow and self.random.random() < 0.9:
            return
        actor.poll()
        if isinstance(actor, Client) and actor._error is not None:
            raise actor._error

    def until(self, done):
        for _ in range(100_000):
            if done():
                return
            self.move()
        raise AssertionError("the simulation hangs")

    def waiting(self, client, call):
        """Call what waits in the caller's thread; the others move on meanwhile."""
        client.tables._wait = lambda event: self.until(event.is_set)
        return call()

    def pull(self, worker, table, ids):
        client = self.clients[worker]
        return self.waiting(client, lambda: client.tables.pull(table, ids))

    def settled(self, worker):
        pushed = self.clients[worker].tables._pushed
        return pushed is None or pushed.event.is_set()

    def run(self, steps, batch, gradient, weights=lambda worker: 1.0):
        """Each worker pulls the rows of its batch and pushes what ``gradient`` makes of them.

        Args:
            steps: Of each worker.
            batch: ``(worker, step) -> ids`` of each table, with repetitions.
            gradient: ``(table, ids, rows) -> gradients``, one a sample.
            weights: Of a worker's loss.
        """
        done = dict.fromkeys(self.clients, 0)
        computed = {}  # by worker that has read, and is yet to push
        left = set(self.clients)
        while left := {w for w in left if done[w] < steps and w not in self.dead}:
            ready = [w for w in left if w in computed or self.settled(w)]
            if not ready:
                self.move()
                continue
            worker = self.random.choice(ready)
            if worker in computed:
                self.clients[worker].tables.push(weights(worker), 1.0, computed.pop(worker))
                done[worker] += 1
            else:
                self.clients[worker].tables.settle()
                slowest = min((group.schedule.slowest for group in self.owned()), default=0)
                self.history.append((worker, done[worker], slowest))
                batches = batch(worker, done[worker])
                computed[worker] = self._compute(worker, batches, gradient, weights(worker))
            for _ in range(self.random.randrange(20)):
                self.move()
        self.until(lambda: all(self.settled(w) for w in self.clients if w not in self.dead))

    def _compute(self, worker, batches, gradient, weight):
        touched = []
        for table, ids in enumerate(batches):
            distinct, inverse, counts = torch.unique(ids, return_inverse=True, return_counts=True)
            rows = self.pull(worker, table, distinct)
            each = gradient(table, ids, rows[inverse]) * weight
            total = torch.zeros_like(rows).index_add_(0, inverse, each)
            touched.append(Touched(distinct, total, counts))
        return touched

    def keep(self, worker, folder, files=None):
        client = self.clients[worker]
        return self.waiting(client, lambda: client.tables.keep(folder, files))

    def owned(self):
        """The groups of rows, where they belong to."""
        return [
            group
            for number, server in self.servers.items() if number not in self.dead
            for group in server.tables.groups.values() if group.schedule is not None
        ]  # fmt: skip

    def rows(self, table, ids):
        """The servers' rows."""
        return self.pull(0, table, ids)

    def kill(self, number):
        self.dead.add(number)
        for pair, ends in [*self.links.items(), *self.between.items()]:
            if number in pair:
                for end in ends:
                    end.failed = "killed"
                    end._queue.clear()
