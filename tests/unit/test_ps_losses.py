"""Losses at any moment, in one thread: of workers, of servers, of several, noticed one by one."""

import random
import threading
import types

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hpctrain.ps.protocol import messages
from tests.examples import examples
from tests.unit.ps_simulation import Simulation
from tests.unit.test_ps import OPTIMIZERS, PHASES, slow_choice

STEPS = 6


class Lossy(Simulation):
    """Workers that also add numbers up, and whose first one takes snapshots.

    Whoever is killed is noticed by each of the others in its own time, and what it sent last may
    have come or not.
    """

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.sums = {}
        self.snapshots = []
        self._notices = []

    def kill(self, number):
        self.dead.add(number)
        for (a, b), pair in [*self.links.items(), *self.between.items()]:
            if number in (a, b):
                theirs = pair[1] if number == a else pair[0]
                for _ in range(self.random.choice([0, 0, 1, 3, 100])):
                    if theirs._queue:
                        theirs._queue.pop()
                self._notices.append((self.tick + self.random.choice([0, 10, 300]), theirs))

    def choosing(self, choose):
        """Time goes by for those who are to notice."""

        def chosen(actors):
            self.notice()
            return choose(actors)

        return chosen

    def notice(self):
        for when, end in list(self._notices):
            if when <= self.tick:
                end.failed = "killed"
                self._notices.remove((when, end))

    def work(self, worker, steps):
        client = self.clients[worker]
        while not client.settled():
            yield
        while client.clock < steps:
            clock = client.clock
            gradient = self.gradient(worker, self.gather(client.weights))
            client.begin(1.0, self.hyper(clock))
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
            if client._consistency.same_weights:
                yield from self._add_up(worker, client)
            if self._leads(worker, client):
                yield from self._take_whole_snapshot(client)
        client._do(lambda: client._tell(messages.Rest()))
        yield from self._add_up(worker, client)
        client.pull()
        while not client.settled():
            yield
        client._do(lambda: client._leave(types.SimpleNamespace(set=lambda: None)))

    def _add_up(self, worker, client):
        number = client.next_collective()
        data = torch.tensor([10.0**worker], dtype=torch.float64).numpy().tobytes()
        answer = yield from self._ask(client, "reduce", [number, "float64"], data)
        self.sums[number, worker] = answer.data

    @staticmethod
    def _leads(worker, client):
        return worker == min(other for other in range(worker + 1) if other not in client.lost)

    def _take_whole_snapshot(self, client):
        while not (yield from self._whole_snapshot(client)):
            pass
        found = client._fetching.snapshot
        self.snapshots.append((client.clock, found.steps, self.gather(found.weights)))

    def _ask(self, client, what, value=None, data=b""):
        event = threading.Event()
        client._asked += 1
        question = messages.Ask(client._asked, what, value, data)
        client._do(lambda: client._questions.ask(question, event))
        while not event.is_set():
            yield
        return client._questions.answers.pop(question.number)

    def _whole_snapshot(self, client):
        answer = yield from self._ask(client, "snapshot")
        event = threading.Event()
        client._do(lambda: client._fetching.fetch(answer.value, event))
        while not event.is_set():
            yield
        return client._fetching.complete


@pytest.mark.slow
@settings(max_examples=examples(300), phases=PHASES)
@given(
    workers=st.integers(2, 4), servers=st.integers(2, 4), seed=st.integers(0, 10**6),
    consistency=st.sampled_from(["sync", "async", "ssp:2", "backup:1"]),
    losses=st.lists(st.tuples(st.booleans(), st.integers(0, 1500)), min_size=1, max_size=3),
    near=st.booleans(), clip=st.booleans(),
)  # fmt: skip
@example(  # a server is lost, and the worker that was telling the others what is trained
    workers=4, servers=4, seed=6946, consistency="ssp:2", losses=[(True, 9), (True, 9)],
    near=False, clip=False,
)  # fmt: skip
def test_whoever_is_lost_the_others_go_on(workers, servers, seed, consistency, losses, near, clip):
    def make():
        return Lossy(
            {"consistency": consistency, "slice_bytes": 64, "replicas": 1}, workers, servers,
            OPTIMIZERS["sgd"], seed=seed, near=near, clip_norm=1.0 if clip else None,
        )  # fmt: skip

    simulation, generator = make(), random.Random(seed)
    victims = generator.sample(range(workers), workers - 1)
    faults, lost_servers, lost_workers = [], [], []
    for is_server, tick in losses:
        if is_server and not lost_servers:  # a second one may take the last copy along
            victim = generator.choice(simulation.server_numbers)
            lost_servers.append(victim)
        elif victims:
            victim = victims.pop()
            lost_workers.append(victim)
        else:
            continue
        faults.append((tick, lambda victim=victim: simulation.kill(victim)))
    simulation.run(STEPS, simulation.choosing(slow_choice(seed, workers)), faults=faults)
    live = [w for w in range(workers) if w not in simulation.dead]
    ends = [simulation.gather(simulation.clients[worker].weights) for worker in live]
    for worker, end in zip(live, ends, strict=True):
        assert simulation.clients[worker].clock >= STEPS
        assert torch.equal(end, ends[0])
    for number in {number for number, _ in simulation.sums}:
        sums = {simulation.sums.get((number, worker)) for worker in live} - {None}
        assert len(sums) <= 1
    if not lost_workers:
        whole = all(len(set(steps)) == 1 for _, steps, _ in simulation.snapshots)
        assert whole or consistency == "backup:1"
        if consistency == "sync":
            without_faults = make().run(STEPS)
            other = without_faults.gather(without_faults.clients[0].weights)
            assert torch.equal(ends[0], other)
