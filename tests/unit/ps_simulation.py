"""A whole parameter server in one thread: who moves on next is the test's choice."""

import random
import threading
import types

import torch

from hpctrain.config import PsConfig
from hpctrain.ps.client.client import Client
from hpctrain.ps.partition.layout import Layout, Parameter
from hpctrain.ps.protocol import messages
from hpctrain.ps.protocol.link import LocalLink
from hpctrain.ps.protocol.regions import Regions, region_bytes
from hpctrain.ps.server.server import Server
from hpctrain.ps.update_rules import rule_of

SIZES = (7, 150, 3, 64, 33)


class Simulation:
    """Workers minimise quadratics of their own; their gradients are functions of what they read."""

    def __init__(
        self, config, workers, servers, make_optimizer, *, dtype=torch.float64, seed=0, near=False,
        clip_norm=None, weights=None, groups=1,
    ):  # fmt: skip
        self.config = PsConfig(**config)
        parameters = [Parameter(dtype, n % groups, size) for n, size in enumerate(SIZES)]
        self.dummies = [torch.zeros(size, dtype=dtype, requires_grad=True) for size in SIZES]
        grouped = [{"params": self.dummies[g::groups]} for g in range(groups)]
        self.optimizer = make_optimizer(grouped)
        rule = rule_of(self.optimizer)
        self.rule = rule
        self.layout, self.places = Layout.of(
            parameters, self.config.slice_bytes or 512, whole=rule.per_tensor
        )
        self.random = random.Random(seed)
        generator = torch.Generator().manual_seed(seed)
        self.curvatures = torch.rand(workers, sum(SIZES), generator=generator, dtype=dtype) + 0.1
        self.targets = torch.randn(workers, sum(SIZES), generator=generator, dtype=dtype)
        start = torch.randn(sum(SIZES), generator=generator, dtype=dtype)
        self.start = start if weights is None else weights
        self.server_numbers = [100 + n for n in range(servers)]
        links = {(w, s): LocalLink.pair(w, s) for w in range(workers) for s in self.server_numbers}
        between = {
            (a, b): LocalLink.pair(a, b)
            for a in self.server_numbers for b in self.server_numbers if a < b
        }  # fmt: skip
        memory = {
            w: torch.zeros(2 * region_bytes(self.layout), dtype=torch.uint8) for w in range(workers)
        }
        common = 0 if near and self.config.consistency == "sync" else None
        self.servers = {}
        for s in self.server_numbers:
            peers = {b: between[s, b][0] for b in self.server_numbers if s < b}
            peers |= {a: between[a, s][1] for a in self.server_numbers if a < s}
            regions = Regions(memory, common) if near else None
            to_workers = {w: links[w, s][1] for w in range(workers)}
            self.servers[s] = Server(s, to_workers, peers, self.config, regions=regions)
            self.servers[s].order.keeps = True
        self.clients = {}
        for w in range(workers):
            own = Regions({w: memory[w]} if common is None else memory, common)
            own.lay_out(self.layout)
            client = Client(
                w,
                {s: links[w, s][0] for s in self.server_numbers},
                self.config,
                near=self.server_numbers if near else (),
            )
            values, gradients = own.flats(w)
            start = [torch.zeros_like(flat) for flat in values]
            self._scatter(start, self.start)
            client.open(
                self.layout, rule, values, gradients, before=range(w), start=start,
                clip_norm=clip_norm,
            )  # fmt: skip
            self.clients[w] = client
        self.links = links
        self.between = between
        self.dead = set()
        self.history = []  # (worker, clock, slowest clock) at each begin
        self.gradients = {}
        self.tick = 0
        self._snapshot_tick, self.snapshot = None, self

    def _scatter(self, flats, vector):
        for (flat, begin), size, start in zip(self.places, SIZES, self._starts(), strict=True):
            flats[flat][begin : begin + size] = vector[start : start + size]

    def slowest(self):
        """Steps that every live worker has pushed, and every server applied."""
        return min(
            held.schedule.slowest
            for s, server in self.servers.items() if s not in self.dead
            for number, held in server.held.items() if server.primary(number)
        )  # fmt: skip

    def gather(self, flats):
        return torch.cat(
            [flats[f][b : b + size] for (f, b), size in zip(self.places, SIZES, strict=True)]
        )

    @staticmethod
    def _starts():
        return [sum(SIZES[:n]) for n in range(len(SIZES))]

    def gradient(self, worker, weights):
        return self.curvatures[worker] * (weights - self.targets[worker])

    def hyper(self, clock):
        # A schedule: the rate changes at every step.
        groups = [{**group, "lr": group["lr"] / (1 + 0.1 * clock)}
                  for group in self.optimizer.param_groups]  # fmt: skip
        return [self.rule.hyper(group) for group in groups]

    def work(self, worker, steps, weights=lambda worker, clock: 1.0):
        """A worker's steps, as a generator that yields where others may move on."""
        client = self.clients[worker]
        while not client.settled():
            yield
        for step in range(steps):
            clock = client.clock
            self.history.append((worker, clock, self.slowest()))
            weight = weights(worker, clock)
            gradient = self.gradient(worker, self.gather(client.weights)) * weight
            self.gradients[worker, clock] = gradient
            client.begin(weight, self.hyper(clock))
            self._scatter(client.gradients, gradient)
            indices = list(range(len(self.layout.slices)))
            self.random.shuffle(indices)
            while indices:
                cut = self.random.randint(1, len(indices))
                client.push(indices[:cut])
                indices = indices[cut:]
                yield
            while not client.settled():
                yield
            client.end()
            yield from self.between_steps(worker, client, last=step == steps - 1)
        client._do(lambda: client._leave(types.SimpleNamespace(set=lambda: None)))

    def between_steps(self, worker, client, *, last):
        """What a worker does there besides."""
        due = self._snapshot_tick is not None and self.tick >= self._snapshot_tick
        if worker == 0 and (due or last) and self.snapshot is None:
            yield from self._take_snapshot(client)

    def snapshot_after(self, tick):
        """Have the first worker ask for a snapshot between two of its steps."""
        self._snapshot_tick, self.snapshot = tick, None

    def _take_snapshot(self, client):
        answer = threading.Event()
        question = messages.Ask(10**6, "snapshot", None, clock=client.clock)
        client._do(lambda: client._questions.ask(question, answer))
        while not answer.is_set():
            yield
        fetched = threading.Event()
        number = client._questions.answers.pop(question.number).value
        client._do(lambda: client._fetching.fetch(number, fetched))
        while not fetched.is_set():
            yield
        self.snapshot = client._fetching.snapshot

    def run(self, steps, choose=None, faults=(), **options):
        """Until every worker has done its steps; ``faults`` are (tick, callable)."""
        choose = choose or self.random.choice
        generators = {w: self.work(w, steps, **options) for w in self.clients}
        faults = sorted(faults, key=lambda fault: fault[0])
        while not all(server.done for s, server in self.servers.items() if s not in self.dead):
            self.tick += 1
            assert self.tick < 200_000, "the simulation hangs"
            while faults and faults[0][0] <= self.tick:
                faults.pop(0)[1]()
            actors = [("work", w) for w in generators if w not in self.dead]
            actors += [("client", w) for w in self.clients if w not in self.dead]
            actors += [("server", s) for s in self.servers if s not in self.dead]
            kind, number = choose(actors)
            if kind == "work":
                if next(generators[number], "over") == "over":
                    del generators[number]
            elif kind == "client":
                self.clients[number].poll()
                assert self.clients[number]._error is None, self.clients[number]._error
            elif not self.servers[number].done:
                self.servers[number].poll()
        return self

    def kill(self, number):
        """From one moment to the next nothing comes or goes; at the end no server is lost."""
        if number in self.servers and any(server.done for server in self.servers.values()):
            return
        self.dead.add(number)
        for (a, b), pair in [*self.links.items(), *self.between.items()]:
            if number in (a, b):
                for end in pair:
                    end.failed = "killed"

    def final(self):
        """The servers' weights."""
        flats = [torch.zeros(f.elements, dtype=f.torch_dtype) for f in self.layout.flats]
        for s, server in self.servers.items():
            for index, held in server.held.items():
                if s not in self.dead and server.primary(index):
                    piece = held.piece
                    flats[piece.flat][piece.start : piece.stop] = held.weights
        return self.gather(flats)

    def logs(self):
        return {
            index: held.log
            for s, server in self.servers.items()
            if s not in self.dead
            for index, held in server.held.items()
            if server.primary(index)
        }
