"""The world's collectives, and what is built on them."""

from pathlib import Path

import pytest
import torch

from hpctrain.errors import PeerLost
from hpctrain.train.metrics import Meter
from hpctrain.world.broadcast import broadcast_bytes, broadcast_json, broadcast_tree
from hpctrain.world.launcher import detect
from tests.waiting import SECONDS, wait_until


def test_the_world_is_the_launchers(world):
    launch = detect()
    assert (world.rank, world.size) == (launch.rank, launch.size)
    assert world.local_size == launch.local_size
    seen = torch.zeros(world.size)
    seen[world.local_rank] = 1
    world.comm.all_reduce(seen)
    assert seen.tolist() == [1.0] * world.size  # all on one host, each its own local rank
    assert world.launch.name == "mpirun"


def test_all_reduce_and_broadcast(world):
    tensor = torch.full((3,), world.rank + 1.0, dtype=torch.float64)
    world.comm.all_reduce(tensor)
    assert tensor.tolist() == [world.size * (world.size + 1) / 2] * 3
    for root in range(world.size):
        tensor = torch.tensor([world.rank])
        world.comm.broadcast(tensor, root)
        assert tensor.item() == root


def test_broadcast_of_other_things(world):
    assert broadcast_bytes(world.comm, b"") == b""
    assert broadcast_bytes(world.comm, b"abc" * world.rank, root=world.size - 1) == b"abc" * (
        world.size - 1
    )
    assert broadcast_json(world.comm, {"rank": world.rank, "none": None}) == {
        "rank": 0,
        "none": None,
    }
    shared = torch.arange(3.0)
    state = {"a": shared, "tied": shared, "n": {1: [torch.tensor(True), 2.5]}, "empty": []}
    received = broadcast_tree(world.comm, state if world.rank == 0 else None)
    assert torch.equal(received["a"], shared) and torch.equal(received["tied"], shared)
    assert received["n"][1][0].item() is True and received["n"][1][1] == 2.5
    assert received["empty"] == []


def test_meter_weights_by_samples(world):
    """Rank r adds r samples of value r, so rank 0 adds one batch of one and the mean is exact."""
    meter = Meter()
    samples = max(world.rank, 1) if world.rank != 1 else 0
    if samples:  # rank 1 has none, and does not know what the metric is called
        meter.add({"loss": torch.tensor(float(world.rank))}, samples)
    counts = {r: (0 if r == 1 else max(r, 1)) for r in range(world.size)}
    expected = sum(r * n for r, n in counts.items()) / sum(counts.values())
    assert meter.read(world.comm) == {"loss": pytest.approx(expected)}
    assert meter.read(world.comm) == {"loss": pytest.approx(expected)}  # if a rank is lost, again
    meter.settle()
    assert meter.read(world.comm) == {}


def test_meter_without_samples_on_rank_0(world):
    meter = Meter()
    assert meter.read(world.comm) == {}
    if world.rank == world.size - 1:
        meter.add({"loss": torch.tensor(2.0)}, weight=3)
    assert meter.read(world.comm) == {"loss": 2.0}


def test_waiting_is_bounded_and_names_the_ranks(strategy, world, tmp_path):
    comm = world.comm
    over = Path(broadcast_json(comm, str(tmp_path / "over")))  # as rank 0 calls it
    if world.rank == 0:
        comm.timeout_seconds = 1.0
        with pytest.raises(PeerLost, match=r"rank 0 of \d+ .* waited 1 s .* ranks 1"):
            comm.all_reduce(torch.zeros(1))
        comm.timeout_seconds = SECONDS
        over.touch()
    else:
        wait_until(over.exists, "rank 0 to give up")
        comm.all_reduce(torch.zeros(1))
    comm.broadcast(torch.zeros(1))


def test_gathers_with_a_gradient(world):
    """Rank r gives r rows; each loss is the square of the sum over all of them."""
    mine = torch.full((world.rank, 2), world.rank + 1.0, requires_grad=True)
    rows = world.all_gather(mine)
    expected = [[r + 1.0] * 2 for r in range(world.size) for _ in range(r)]
    assert rows.tolist() == expected
    rows.sum().square().backward()
    total = sum(map(sum, expected))
    assert mine.grad.tolist() == [[2 * total * world.size] * 2] * world.rank
    given = {"rank": world.rank, "ids": list(range(world.rank))}
    expected = [{"rank": r, "ids": list(range(r))} for r in range(world.size)]
    assert world.gather_object(given) == expected
