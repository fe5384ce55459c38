"""The coordinator: how samples are divided by speed, small sums, and what a lost worker leaves."""

import random
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpctrain.ps.protocol import messages
from hpctrain.ps.protocol.messages import AGAIN
from hpctrain.ps.server.coordinator import SHIFT, Coordinator
from hpctrain.strategies.ps_communicator import PsCommunicator
from tests.examples import examples

WORKERS = [0, 1, 2, 5]  # ranks between them serve


class Asking:
    """A coordinator whose answers are kept by worker."""

    def __init__(self, workers=WORKERS, shares=None, timeout_seconds=600.0):
        self.answers = {}
        self.keep = False
        self.asked = 0
        self.coordinator = Coordinator(workers, shares, self._reply, timeout_seconds)

    def _reply(self, worker, answer):
        assert worker not in self.answers, "answered twice"
        self.answers[worker] = answer

    def ask(self, worker, what, value=None, data=b""):
        self.asked += 1
        self.coordinator.ask(worker, messages.Ask(self.asked, what, value, data))
        return None if self.keep else self.take(worker)

    def take(self, worker):
        return self.answers.pop(worker, None)

    def division(self, worker, round_, speed=None, epoch=0):
        workers, shares, _ = self.ask(worker, "division", [epoch, round_, speed]).value
        return dict(zip(workers, shares, strict=True))

    def round(self, round_, speeds):
        """Everybody asks; all get the same."""
        found = [self.division(worker, round_, speed) for worker, speed in speeds.items()]
        assert all(each == found[0] for each in found)
        return found[0]

    def reduce(self, worker, number, *values):
        data = np.array(values, dtype=np.float64).tobytes()
        return self.ask(worker, "reduce", [number, "float64"], data)

    def broadcast(self, worker, number, root, data=b""):
        return self.ask(worker, "broadcast", [number, root], data)


def parts(division):
    total = sum(division.values())
    return {worker: share / total for worker, share in division.items()}


def sums(answer):
    return np.frombuffer(answer.data, dtype=np.float64).tolist()


SPEEDS = st.lists(st.floats(0.05, 20.0), min_size=4, max_size=4)


@settings(max_examples=examples(200))
@given(values=SPEEDS)
def test_shares_follow_speeds(values):
    asking = Asking()
    speeds = dict(zip(WORKERS, values, strict=True))
    # First nobody's speed is known, and then not the speeds of all.
    assert len(set(asking.round(0, dict.fromkeys(WORKERS)).values())) == 1
    asking.round(1, speeds)
    for worker, part in parts(asking.round(2, speeds)).items():
        wanted = speeds[worker] / sum(values)
        assert abs(part - wanted) <= SHIFT * part + 1e-3  # what is off by little stays


def test_a_slow_worker_gets_what_it_can_do_in_the_time_of_the_others():
    asking = Asking()
    cost = {0: 1.0, 1: 4.0, 2: 1.0, 5: 1.0}
    fixed = 0.1  # of a step, whatever its share
    division = asking.round(0, dict.fromkeys(WORKERS))
    for round_ in range(1, 8):
        share = parts(division)
        seconds = {worker: fixed + cost[worker] * share[worker] for worker in WORKERS}
        division = asking.round(round_, {w: share[w] / seconds[w] for w in WORKERS})
    assert max(seconds.values()) < 1.2 * min(seconds.values())


@pytest.mark.parametrize("slow", [1.0, 0.25, 0.03])
def test_shares_do_not_flutter_under_noise(slow):
    asking, noise = Asking(), random.Random(0)
    true = {0: 1.0, 1: slow, 2: 1.0, 5: 1.3}
    seen = []
    for round_ in range(200):
        speeds = {w: speed * noise.uniform(0.95, 1.05) for w, speed in true.items()}
        division = asking.round(round_, speeds)
        if not seen or division != seen[-1]:
            seen.append(division)
    assert len(seen) == 2  # equal shares, and then those


def test_a_worker_that_turns_slow_is_noticed():
    asking = Asking()
    for round_ in range(3):
        before = asking.round(round_, dict.fromkeys(WORKERS, 1.0))
    assert len(set(before.values())) == 1
    asking.round(3, {0: 1.0, 1: 0.25, 2: 1.0, 5: 1.0})
    after = parts(asking.round(4, {0: 1.0, 1: 0.25, 2: 1.0, 5: 1.0}))
    assert after[1] == pytest.approx(after[0] / 4, rel=0.05)


@settings(max_examples=examples(100))
@given(data=st.data())
def test_a_round_is_divided_alike_for_everybody(data):
    asking = Asking()
    joined, left = [7, 9], 2
    found = {}
    workers = list(WORKERS)
    for _ in range(60):
        action = data.draw(st.sampled_from(["ask"] * 8 + ["join", "leave"]))
        if action == "join" and joined:
            workers.append(joined.pop())
            asking.coordinator.join(workers[-1])
        elif action == "leave" and left:
            left -= 1
            gone = workers.pop(data.draw(st.integers(0, len(workers) - 1)))
            asking.coordinator.leave(gone)
        else:
            worker = data.draw(st.sampled_from(workers))
            when = (data.draw(st.integers(0, 1)), data.draw(st.integers(0, 3)))
            speed = data.draw(st.one_of(st.none(), st.floats(0.1, 10)))
            division = asking.division(worker, when[1], speed, epoch=when[0])
            if when not in found:
                assert sorted(division) == sorted(workers)
                found[when] = division
            assert division == found[when]
            assert min(division.values()) >= 1


def test_who_joins_late_has_a_small_share_until_its_speed_is_known():
    asking = Asking()
    speeds = {0: 1.0, 1: 0.25, 2: 1.0, 5: 1.0}
    for round_ in range(3):
        before = asking.round(round_, speeds)
    asking.coordinator.join(8)
    decided = asking.division(8, 2)
    assert decided == before  # that round goes on without it
    division = asking.division(8, 3)
    assert division[8] == min(before.values())
    assert {w: division[w] for w in WORKERS} == before
    speeds[8] = 1.0
    asking.round(4, speeds)
    share = parts(asking.round(5, speeds))
    assert share[8] == pytest.approx(1 / 4.25, rel=0.05)


def test_a_lost_worker_has_no_share_and_is_not_waited_for():
    asking = Asking()
    speeds = {0: 1.0, 1: 0.25, 2: 1.0, 5: 1.0}
    asking.round(0, speeds)
    asking.round(1, speeds)
    asking.coordinator.leave(2)
    del speeds[2]
    share = parts(asking.round(2, speeds))
    assert sorted(share) == [0, 1, 5]
    assert share[1] == pytest.approx(0.25 / 2.25, rel=0.05)
    # Lost before its speed was known: the others' are enough.
    asking = Asking()
    asking.round(0, {0: 1.0, 1: 0.25, 5: 1.0})
    asking.coordinator.leave(2)
    assert parts(asking.division(0, 1)) == pytest.approx({0: 0.444, 1: 0.111, 5: 0.444}, abs=0.01)


def test_shares_by_hand_stay():
    asking = Asking(shares=[4, 1, 4, 4])
    for round_ in range(3):
        division = asking.round(round_, {0: 1.0, 1: 9.0, 2: 1.0, 5: 1.0})
        assert division == {0: 4, 1: 1, 2: 4, 5: 4}
    asking.coordinator.leave(1)
    asking.coordinator.join(8)
    assert asking.division(0, 3) == {0: 4, 2: 4, 5: 4, 8: 1}


def test_a_successor_goes_on_with_the_shares():
    asking, successor = Asking(), Asking()
    for round_ in range(3):
        division = asking.round(round_, {0: 1.0, 1: 0.25, 2: 1.0, 5: 1.0})
        message = messages.Decided(0, round_, list(division), list(division.values()))
        successor.coordinator.decided(message)
    assert successor.division(5, 2) == division
    assert successor.division(5, 3) == division  # it knows no speeds yet


def test_a_worker_tells_its_speed_in_parts_of_batches():
    asked = []

    def ask(what, value):
        asked.append(value)
        return types.SimpleNamespace(value=[[0, 1], [3, 1], False])

    client = types.SimpleNamespace(ask=ask, me=0, lost={}, joined={}, clock=0, stopped=False)
    ends = types.SimpleNamespace(
        client=client,
        roles=types.SimpleNamespace(workers=[0, 1]),
        config=types.SimpleNamespace(share_steps=4),
    )
    comm = PsCommunicator(ends, 0, 1)
    speeds = []
    for batch, seconds in enumerate([0.1] * 8 + [0.4] * 24):
        part = comm.part(0, batch)
        assert (part.lower, part.upper, part.total) == (0, 3, 4)
        comm.computed(1.5, seconds)  # of two workers' batches: three quarters
        speeds = [speed for _, _, speed in asked]
    assert [value[:2] for value in asked] == [[0, round_] for round_ in range(8)]
    assert speeds[0] is None
    assert speeds[1:3] == pytest.approx([7.5, 7.5])
    # A change is followed soon, but no single measurement counts alone.
    after = 0.75 / 0.4
    assert after < speeds[4] < speeds[3] < 2 * after
    assert speeds[7] == pytest.approx(after, rel=0.05)


def test_pools_collect_for_the_first_worker():
    asking = Asking()
    assert asking.ask(5, "give", ["a", {"x": 1.0, "y": 2.0}]).value == [{}, False]
    assert asking.ask(1, "give", ["a", {"x": 1.0}]).value == [{}, False]
    asking.coordinator.add("b", {"x": 10.0})
    assert asking.ask(0, "give", ["a", {"x": 0.5}]).value == [{"x": 2.5, "y": 2.0}, False]
    # Taken once; another pool is another's.
    assert asking.ask(0, "give", ["a", {}]).value == [{}, False]
    assert asking.ask(0, "give", ["b", {"x": 1.0}]).value == [{"x": 11.0}, False]
    # Without the first worker, the next one is the first; nothing is lost.
    asking.ask(2, "give", ["a", {"x": 3.0}])
    asking.coordinator.leave(0)
    assert asking.ask(1, "give", ["a", {"x": 4.0}]).value == [{"x": 7.0}, False]


def test_all_hear_that_training_is_to_end():
    asking = Asking()
    assert asking.ask(2, "stop").value is None
    assert asking.ask(0, "give", ["a", {}]).value[1] is True
    assert asking.ask(1, "division", [0, 0, None]).value[2] is True


def test_reductions_are_answered_when_all_have_given():
    asking = Asking()
    for worker in (5, 0, 2):
        assert asking.reduce(worker, "0.1", 0.1 * worker, 1.0) is None
    assert sums(asking.reduce(1, "0.1", 0.1, 1.0)) == pytest.approx([0.8, 4.0])
    others = [sums(asking.take(worker)) for worker in (0, 2, 5)]
    # In the order of the workers, whoever came first: the same to the last bit.
    assert all(other == [0.0 + 0.1 + 0.2 + 0.5, 4.0] for other in others)
    assert not asking.coordinator.overdue()


@pytest.mark.parametrize("gave", [False, True])
def test_a_reduction_does_not_wait_for_a_lost_worker(gave):
    asking = Asking()
    asking.reduce(0, "0.1", 1.0)
    asking.reduce(1, "0.1", 10.0)
    if gave:
        asking.reduce(5, "0.1", 1000.0)
        asking.coordinator.leave(5)
        asking.reduce(2, "0.1", 100.0)
    else:
        asking.reduce(2, "0.1", 100.0)
        assert asking.take(0) is None
        asking.coordinator.leave(5)
    expected = [1111.0] if gave else [111.0]  # what a worker gave before it was lost counts
    assert sums(asking.answers[0]) == sums(asking.answers[1]) == expected


def test_a_reduction_does_not_wait_for_who_comes_after_it():
    """The others are still about the step before the newcomer's first one."""
    asking = Asking()
    asking.reduce(0, "7.1", 1.0)
    assert asking.ask(8, "joined", 8).value == [(0, 0), (1, 0), (2, 0), (5, 0), (8, 8)]
    asking.reduce(1, "7.1", 10.0)
    asking.reduce(2, "7.1", 100.0)
    assert sums(asking.reduce(5, "7.1", 1000.0)) == [1111.0]
    asking.answers.clear()
    for worker in WORKERS:
        asking.reduce(worker, "8.1", 1.0)
    assert not asking.answers
    assert sums(asking.reduce(8, "8.1", 1.0)) == [5.0]


def test_several_reductions_at_a_time():
    asking = Asking(workers=[0, 1])
    assert asking.reduce(0, "0.1", 1.0) is None
    assert asking.reduce(0, "0.2", 5.0) is None
    assert sums(asking.reduce(1, "0.1", 2.0)) == sums(asking.take(0)) == [3.0]
    assert sums(asking.reduce(1, "0.2", 6.0)) == sums(asking.take(0)) == [11.0]


def test_who_is_waited_for_too_long_is_named():
    asking = Asking(timeout_seconds=-1.0)  # at once
    assert asking.coordinator.overdue() == ""
    asking.reduce(0, "0.1", 1.0)
    asking.reduce(2, "0.1", 1.0)
    assert asking.coordinator.overdue() == "1, 5"
    asking = Asking(timeout_seconds=-1.0)
    asking.broadcast(2, "0.1", root=0)
    assert asking.coordinator.overdue() == "0"


def test_who_pushes_meanwhile_is_given_more_time(monkeypatch):
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr("time.monotonic", lambda: clock.now)
    asking = Asking(workers=[0, 1], timeout_seconds=10.0)
    asking.reduce(0, "0.1", 1.0)
    clock.now = 9.0
    asking.coordinator.postpone(1)
    clock.now = 18.0
    assert asking.coordinator.overdue() == ""
    asking.coordinator.postpone(0)  # who has given is not waited for
    clock.now = 20.0
    assert asking.coordinator.overdue() == "1"


@settings(max_examples=examples(50))
@given(order=st.permutations(WORKERS), root=st.sampled_from(WORKERS))
def test_everybody_gets_a_broadcast_once(order, root):
    asking = Asking()
    asking.keep = True
    for place, worker in enumerate(order, start=1):
        asking.broadcast(worker, "0.1", root, b"news" if worker == root else b"")
        given = root in order[:place]
        assert sorted(asking.answers) == (sorted(order[:place]) if given else [])
    got = {worker: answer.data for worker, answer in asking.answers.items()}
    assert got == {worker: b"" if worker == root else b"news" for worker in WORKERS}
    assert not asking.coordinator._broadcasts


def test_a_broadcast_outlives_its_root():
    asking = Asking()
    asking.broadcast(0, "0.1", 0, b"news")
    asking.coordinator.leave(0)
    assert [asking.broadcast(w, "0.1", 0).data for w in (1, 2, 5)] == [b"news"] * 3
    assert not asking.coordinator._broadcasts
    # Listeners that are lost leave nothing behind.
    asking.broadcast(1, "0.2", 1, b"news")
    asking.broadcast(2, "0.2", 1)
    asking.coordinator.leave(5)
    assert not asking.coordinator._broadcasts


def test_another_gives_in_place_of_a_lost_root():
    asking = Asking()
    assert asking.broadcast(5, "0.1", root=0) is None  # it does not know yet
    asking.coordinator.leave(0)
    assert asking.coordinator.overdue() == ""
    assert asking.broadcast(1, "0.1", root=1, data=b"news").data == b""
    assert asking.take(5).data == b"news"
    assert asking.broadcast(2, "0.1", root=0).data == b"news"


def test_a_root_that_nobody_replaces_is_waited_for_no_longer():
    asking = Asking()
    for worker in (1, 2, 5):
        assert asking.broadcast(worker, "0.1", root=0) is None
    assert asking.coordinator.overdue() == ""
    asking.coordinator.leave(0)
    # By the time they ask again they know.
    assert {asking.take(worker).value for worker in (1, 2, 5)} == {AGAIN}
