"""A worker that comes late: its steps and its collectives are those of the others."""

import threading
import types
from collections import defaultdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpctrain.errors import Dismissed
from hpctrain.ps.client.client import Client
from hpctrain.ps.protocol import messages
from hpctrain.ps.protocol.link import LocalLink
from hpctrain.strategies.ps_communicator import PsCommunicator
from tests.examples import examples
from tests.unit.ps_simulation import Simulation

STEPS = 6
NEWCOMER = 3


class Program(threading.Thread):
    """A worker's own thread, which runs only while it is let."""

    def __init__(self, action):
        super().__init__(daemon=True)
        self._action = action
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self.ended = False
        self.waits_for = None
        self.error = None
        self.start()

    def run(self):
        self._go.acquire()
        try:
            self._action()
        except BaseException as error:
            self.error = error
        self.ended = True
        self._back.release()

    def move_on(self):
        self._go.release()
        self._back.acquire()
        if self.error is not None:
            raise self.error

    def pause(self, event=None):
        self.waits_for = event
        self._back.release()
        self._go.acquire()
        self.waits_for = None

    @property
    def can_move_on(self):
        return not self.ended and (self.waits_for is None or self.waits_for.is_set())


class Meeting(Simulation):
    """All workers add up ones, after each step or at the end; one comes when part of it is done."""

    def __init__(self, consistency, workers, servers, seed):
        config = {
            "consistency": consistency, "servers": servers, "replicas": int(servers > 1)
        }  # fmt: skip
        super().__init__(config, workers, servers, lambda p: torch.optim.SGD(p, lr=0.01), seed=seed)
        self.curvatures = self.curvatures[[w % workers for w in range(NEWCOMER + 1)]]
        self.targets = self.targets[[w % workers for w in range(NEWCOMER + 1)]]
        self.met = defaultdict(dict)  # clock -> worker -> how many there are, and came
        self.dismissed = False
        self.programs, self.comms = {}, {}
        for worker, client in self.clients.items():
            self._begin(worker, client, range(workers), lambda w=worker: self._work(w, STEPS))

    def _begin(self, worker, client, workers, action):
        roles = types.SimpleNamespace(workers=tuple(workers))
        self.comms[worker] = PsCommunicator(types.SimpleNamespace(client=client, roles=roles), 0, 1)
        program = self.programs[worker] = Program(action)

        def wait(event):
            while not event.is_set():
                program.pause(event)
            if client._error is not None:
                raise client._error

        client._await = wait

    @property
    def over(self):
        return all(server.done for s, server in self.servers.items() if s not in self.dead)

    def train(self, faults, pace):
        """Until all is done; the newcomer moves on at this pace, from 0 to 1."""
        faults = sorted(faults, key=lambda fault: fault[0])
        while not self.over:
            self.tick += 1
            assert self.tick < 20_000, "hangs"
            while faults and faults[0][0] <= self.tick:
                faults.pop(0)[1](faults)
            here = [w for w in self.clients if w != NEWCOMER or self.random.random() < pace]
            actors = [self.programs[w].move_on for w in here if self.programs[w].can_move_on]
            actors += [self.clients[w].poll for w in here]
            for s, server in self.servers.items():
                if s not in self.dead and not server.done:
                    actors.append(server.poll)
            self.random.choice(actors)()

    def come(self, faults):
        """A new worker is ready to join; not before the servers know what is trained."""
        alive = [server for s, server in self.servers.items() if s not in self.dead]
        if not all(server.store.layout for server in alive):
            faults.append((self.tick + 10, self.come))
            return
        links = {}
        for server in alive:
            links[server.me], end = self.links[NEWCOMER, server.me] = LocalLink.pair(
                NEWCOMER, server.me
            )
            server.greet(end)
        client = Client(NEWCOMER, links, self.config)
        client.begin_late(self.server_numbers, sorted(self.dead))
        flats = [[torch.zeros_like(f) for f in self.clients[0].weights] for _ in range(2)]
        client.open(self.layout, self.rule, *flats, join=True)
        self.clients[NEWCOMER] = client
        self._begin(NEWCOMER, client, [NEWCOMER], lambda: self._take_part(client))

    def _take_part(self, client):
        try:
            client.wait()
            self.comms[NEWCOMER]._ends.roles.workers = client.take_part()
        except Dismissed:
            self.dismissed = True
            client._do(lambda: client._tell(messages.Leave(1)))
        else:
            self._work(NEWCOMER, STEPS - client.clock)

    def _work(self, worker, steps):
        client, program = self.clients[worker], self.programs[worker]
        if steps == 0 and not client._consistency.same_weights:
            self.between_steps(worker, client, last=True)
        for _ in self.work(worker, steps):
            program.pause()

    def between_steps(self, worker, client, *, last):
        """All of them add up ones."""
        same_weights = client._consistency.same_weights
        if last and not same_weights:
            client.rest()
        if last or same_weights:
            comm, ones = self.comms[worker], torch.ones(1)
            comm.all_reduce(ones)
            self.met[client.clock if same_weights else STEPS][worker] = (comm.size, int(ones))
        return iter(())


@pytest.mark.slow
@settings(max_examples=examples(300))
@given(
    consistency=st.sampled_from(["sync", "async", "ssp:1", "backup:1"]),
    workers=st.integers(1, 3),
    servers=st.integers(1, 3),
    seed=st.integers(0, 10**6),
    tick=st.integers(1, 1200),
    lose=st.none() | st.integers(-40, 40),
    pace=st.sampled_from([1.0, 0.1]),
)
def test_a_worker_that_joins(consistency, workers, servers, seed, tick, lose, pace):
    meeting = Meeting(consistency, workers, servers, seed)
    faults = [(tick, meeting.come)]
    if lose is not None and servers > 1:
        # The coordinator, about then.
        faults.append((max(1, tick + lose), lambda faults: meeting.kill(100)))
    meeting.train(faults, pace)
    same_weights = consistency == "sync"
    clocks = sorted(meeting.met)
    assert clocks == (list(range(1, STEPS + 1)) if same_weights else [STEPS])
    for there in meeting.met.values():
        assert {*range(workers)} <= set(there)
        sizes, sums = ({*each} for each in zip(*there.values(), strict=True))
        assert sums == {len(there)}
        assert sizes == {len(there)} or not same_weights
    late = [NEWCOMER in meeting.met[clock] for clock in clocks]
    assert late == sorted(late)  # from its first step on it missed none
