"""A recorded run repeated by other servers, bit for bit, in every interleaving."""

import random
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpctrain.errors import Error, PeerLost
from hpctrain.ps.server.order_log import Record, check_unused
from tests.examples import examples
from tests.unit.ps_simulation import Simulation
from tests.unit.test_ps import OPTIMIZERS, PHASES, slow_choice

STEPS = 6


class Run(Simulation):
    """A run whose first worker takes snapshots at some clocks; some twice."""

    def __init__(self, config, workers, servers, name, *, turns=0, snapshots=(), **options):
        super().__init__(config, workers, servers, OPTIMIZERS[name], **options)
        self.random = random.Random(turns)
        self.turns, self.workers = turns, workers
        self.wanted = list(snapshots)
        self.taken = []

    def between_steps(self, worker, client, *, last):
        while worker == 0 and self.wanted and self.wanted[0] <= client.clock:
            self.wanted.pop(0)
            yield from self._take_snapshot(client)
            snapshot = self.snapshot
            state = [flat for flats in snapshot.state.values() for flat in flats]
            self.taken.append([*snapshot.weights, *state, torch.tensor(snapshot.steps)])

    def go(self, steps=STEPS, faults=()):
        def weights(worker, clock):  # some have no samples
            return (worker + clock) % 3 / 2

        return self.run(steps, slow_choice(self.turns, self.workers), faults, weights=weights)


def same(one, two):
    return len(one) == len(two) and all(
        torch.equal(a, b) for first, second in zip(one, two, strict=True)
        for a, b in zip(first, second, strict=True)
    )  # fmt: skip


def contents(folder, workers):
    record = Record(folder)
    about = record.about
    slices = [record.slice(index, range(workers)) for index in range(about.slices)]
    for log in slices:
        log.answers.sort()  # those at one version came in any order
    return [about.asked, about.clocks, slices]


@pytest.mark.slow
@settings(max_examples=examples(150), phases=PHASES)
@given(
    workers=st.integers(1, 4), servers=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    near=st.tuples(st.booleans(), st.booleans()), turns=st.tuples(st.integers(), st.integers()),
    consistency=st.sampled_from(["sync", "async", "ssp:0", "ssp:2", "backup:1", "backup:2"]),
    name=st.sampled_from(sorted(OPTIMIZERS)), slice_bytes=st.sampled_from([64, 200, 4096]),
    pull_every=st.sampled_from([1, 2, [1, 3]]), compensation=st.sampled_from([0.0, 0.1]),
    clip=st.booleans(), replicas=st.integers(0, 1), seed=st.integers(0, 10**6),
    snapshots=st.lists(st.integers(0, STEPS), max_size=5).map(sorted),
)  # fmt: skip
def test_a_replay_on_other_servers_is_the_recorded_run(
    workers, servers, near, turns, consistency, name, slice_bytes, pull_every, compensation, clip,
    replicas, seed, snapshots,
):  # fmt: skip
    rounds = consistency.startswith(("sync", "backup"))
    config = {"consistency": consistency, "slice_bytes": slice_bytes}
    if not rounds:
        config |= {"delay_compensation": compensation, "pull_every": pull_every}
    options = {"seed": seed, "snapshots": snapshots, "clip_norm": 0.5 if rounds and clip else None}
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder, "first"), Path(folder, "second")
        copies = {"replicas": min(replicas, servers[0] - 1)}
        recorded = Run(
            {**config, **copies, "record_order": first}, workers, servers[0], name,
            near=near[0], turns=turns[0], **options,
        ).go()  # fmt: skip
        replayed = Run(
            {**config, "replay": first, "record_order": second}, workers, servers[1], name,
            near=near[1], turns=turns[1], **options,
        ).go()  # fmt: skip
        assert contents(first, workers) == contents(second, workers)
    assert torch.equal(recorded.final(), replayed.final())
    assert same(recorded.taken, replayed.taken)


def recorded(folder, **options):
    config = {"consistency": "async", "slice_bytes": 200}
    return Run({**config, "record_order": folder}, 3, 2, "sgd", snapshots=[3, 6], **options).go()


def replay(folder, *, workers=3, steps=STEPS, snapshots=(3, 6), **other):
    config = {"consistency": "async", "slice_bytes": 200, **other.pop("config", {})}
    config["replay"] = folder
    run = Run(config, workers, 1, other.pop("name", "sgd"), snapshots=snapshots, turns=1, **other)
    with pytest.raises(Error) as caught:
        run.go(steps)
    for client in run.clients.values():  # nobody is left waiting
        client.poll()
        assert client.left or type(client._error) is type(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("other", "complaint"),
    [
        ({"seed": 1}, "first update"),
        ({"name": "adamw"}, "first update"),
        ({"clip_norm": 1e-3, "config": {"lr_by_delay": False}}, "snapshot 1"),
        ({"steps": STEPS + 1}, "none of the recorded run's"),
        ({"steps": STEPS - 1, "snapshots": (3,)}, "ends before"),
        ({"snapshots": (2, 6)}, "wants a snapshot after 2 steps"),
        ({"snapshots": (3, 5, 6)}, "wants a snapshot after 5 steps"),
        ({"config": {"slice_bytes": 64}}, "other parameters"),
    ],
)  # fmt: skip
def test_a_replay_that_is_another_run_ends_with_an_error(tmp_path, other, complaint):
    recorded(tmp_path)
    error = replay(tmp_path, **other)
    assert complaint in str(error)
    assert error.exit_code == 2


def test_a_replay_that_loses_a_rank_ends(tmp_path):
    recorded(tmp_path)
    config = {"consistency": "async", "slice_bytes": 200, "replay": tmp_path}
    run = Run(config, 3, 1, "sgd", snapshots=[3, 6])
    with pytest.raises(PeerLost, match="a replay needs all"):
        run.go(faults=[(100, lambda: run.kill(2))])


def test_a_record_is_of_the_same_workers_and_consistency(tmp_path):
    recorded(tmp_path)
    record = Record(tmp_path)
    record.check(3, "async")
    with pytest.raises(Error, match="had 3 workers, this one has 2"):
        record.check(2, "async")
    with pytest.raises(Error, match="was async, this one is sync"):
        record.check(3, "sync")


def test_a_run_that_lost_a_rank_is_not_repeated(tmp_path):
    config = {"consistency": "async", "slice_bytes": 200, "record_order": tmp_path}
    run = Run(config, 3, 2, "sgd")
    run.go(faults=[(100, lambda: run.kill(2))])
    with pytest.raises(Error, match="lost a worker or server"):
        Record(tmp_path).check(3, "async")


def test_records_are_not_mixed(tmp_path):
    check_unused(tmp_path / "none")
    recorded(tmp_path)
    with pytest.raises(Error, match="already holds a record"):
        check_unused(tmp_path)
    part = next(tmp_path.glob("server-*"))
    whole = part.read_bytes()
    part.unlink()
    with pytest.raises(Error, match="not whole"):
        Record(tmp_path)
    part.write_bytes(whole[:100])
    with pytest.raises(Error, match="is not a record"):
        Record(tmp_path)
    with pytest.raises(Error, match="there is no record"):
        Record(tmp_path / "none")
