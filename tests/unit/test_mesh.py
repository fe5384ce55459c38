"""How ranks of a mesh are arranged, layers cut, parameters placed, and passes ordered."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hpctrain.config import RunConfig
from hpctrain.errors import Error
from hpctrain.mesh.cuts import balanced
from hpctrain.mesh.layers import apart_of, sequence_of
from hpctrain.mesh.region import Region, rows_by_head
from hpctrain.mesh.schedules import order
from hpctrain.mesh.shape import Place, Shape, fitted
from hpctrain.strategies.mesh import Mesh, MeshConfig, check_knobs
from hpctrain.tasks.gpt import Gpt
from hpctrain.tasks.task import Task
from hpctrain.world.launcher import ALONE
from hpctrain.world.world import World


def test_neighbours_are_tensor_parallel_then_replicas_then_stages():
    shape = Shape(pp=2, dp=3, tp=2)
    places = [shape.place(rank) for rank in range(shape.size)]
    assert places == [
        Place(pp, dp, tp) for pp, dp, tp in itertools.product(range(2), range(3), range(2))
    ]
    assert [shape.rank(place) for place in places] == list(range(12))


def test_a_mesh_takes_as_many_ranks_as_there_are():
    assert fitted(8, dp=None, pp=2, tp=2) == Shape(pp=2, dp=2, tp=2)
    for ranks, dp in ((6, None), (2, None), (8, 4)):
        with pytest.raises(Error, match=rf"a mesh of dp=.*, and {ranks} were launched. HINT:"):
            fitted(ranks, dp=dp, pp=2, tp=2)


def worst(costs, cuts):
    return max(sum(costs[n] for n in cut) for cut in cuts)


@given(st.lists(st.integers(0, 20), min_size=1, max_size=8), st.integers(1, 8))
def test_cuts_are_the_best_there_are(costs, stages):
    if stages > len(costs):
        with pytest.raises(Error, match="cannot be cut"):
            balanced(costs, stages)
        return
    cuts = balanced(costs, stages)
    assert [n for cut in cuts for n in cut] == list(range(len(costs))) and all(map(len, cuts))
    others = itertools.combinations(range(1, len(costs)), stages - 1)
    best = min(worst(costs, map(range, (0, *inner), (*inner, len(costs)))) for inner in others)
    assert worst(costs, cuts) == best


@given(st.data())
def test_regions_are_parts_of_the_whole(data):
    """Ordered and narrowed as tensors are; the parts of all ranks make up the whole again."""
    shape = data.draw(st.tuples(st.integers(1, 7), st.integers(1, 5)))
    rows = data.draw(st.permutations(range(shape[0])))
    whole = torch.arange(shape[0] * shape[1]).view(shape)
    region, expected = Region.whole(shape).ordered(rows), whole[rows]
    for dim in data.draw(st.lists(st.integers(0, 1), max_size=2)):
        size = region.sizes[dim]
        start = data.draw(st.integers(0, size))
        stop = data.draw(st.integers(start, size))
        region = region.narrowed(dim, start, stop)
        expected = expected.narrow(dim, start, stop - start)
    assert region.sizes == tuple(expected.shape)
    assert torch.equal(region.take(whole), expected)
    copy = torch.full_like(whole, -1)
    region.put(copy, expected)
    assert torch.equal(region.take(copy), expected)
    assert (copy >= 0).sum() == region.elements and torch.equal(copy[copy >= 0], whole[copy >= 0])


def test_fused_projections_are_divided_by_heads():
    heads, width, ranks = 4, 3, 2
    fused = torch.arange(3 * heads * width)
    rows = rows_by_head(heads, width, 3, ranks)
    for rank, mine in enumerate(fused[rows].chunk(ranks)):
        expected = [part.chunk(ranks)[rank] for part in fused.chunk(3)]
        assert torch.equal(mine, torch.cat(expected))


SCHEDULES = [
    *itertools.product(("gpipe", "1f1b"), (2, 3, 4), range(1, 7), (1,)),
    *itertools.product(("gpipe", "interleaved"), (2, 3), (1, 2, 3, 4, 6), (2, 3)),
]


@pytest.mark.parametrize(("schedule", "ranks", "microbatches", "chunks"), SCHEDULES)
def test_no_rank_waits_for_ever(schedule, ranks, microbatches, chunks):
    """Each pass once, none before what it needs, whatever the speed of ranks."""
    left = [order(schedule, rank, ranks, microbatches, chunks) for rank in range(ranks)]
    every = set(itertools.product((True, False), range(chunks), range(microbatches)))
    assert all(len(mine) == len(every) and set(mine) == every for mine in left)
    done = set()
    while any(left):
        ready = []
        for rank, mine in enumerate(left):
            forward, chunk, number = mine[0] if mine else (None, 0, 0)
            stage = rank + ranks * chunk
            needs = {(forward, stage - 1 if forward else stage + 1, number)}
            needs |= set() if forward else {(True, stage, number)}
            if mine and all(n in done or not 0 <= n[1] < ranks * chunks for n in needs):
                ready.append(rank)
                done.add((forward, stage, number))
        assert ready
        for rank in ready:
            left[rank].pop(0)


def test_1f1b_keeps_few_activations():
    """Of so many micro-batches as there are stages from this one on (Narayanan et al., 2021)."""
    for rank in range(4):
        kept, most = 0, 0
        for action in order("1f1b", rank, 4, 16):
            kept += 1 if action.forward else -1
            most = max(most, kept)
        assert most == 4 - rank


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.blocks = nn.ModuleList([nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)), nn.Tanh()])
        self.tied = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        self.tied[1].weight = self.first.weight

    def forward(self, x):
        return x


def test_layers_that_are_sharded_one_by_one():
    """Not those without parameters, nor those that share one with another part."""
    net = Net()
    assert apart_of(net, None) == [net.blocks[0], net.blocks[1], net.tied[0]]


def test_layers_of_a_pipeline():
    model = Gpt(width=8, layers=1, heads=2).model()
    assert sequence_of(model, None) == list(model)

    class Says(Task):
        def stages(self, model):
            return [model.first, *model.blocks]

    with pytest.raises(Error, match=r"the model \(Net\) cannot be cut into stages"):
        sequence_of(Net(), Task())
    with pytest.raises(Error, match=r"parameter 'tied.0.weight' is in no layer"):
        sequence_of(Net(), Says())


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"virtual": 2, "pp": 2}, "mesh.virtual = 2 with mesh.schedule = 1f1b"),
        ({"schedule": "interleaved", "pp": 2, "microbatches": 3}, "is no multiple of mesh.pp"),
        ({"microbatches": 3}, "are of a pipeline, and mesh.pp is 1"),
    ],
)
def test_knobs_that_do_not_go_together(knobs, said):
    with pytest.raises(Error, match=said):
        check_knobs(MeshConfig(**knobs))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("train", {"ema_decay": 0.9}, "train.ema_decay"),
        ("train", {"sync_batchnorm": True}, "train.sync_batchnorm"),
        ("log", {"trace_samples": True}, "--trace-samples"),
        ("train", {"callbacks": ["statistics,every=5"]}, "callback 'statistics'"),
    ],
)
def test_what_a_mesh_cannot_do_is_refused(key, value, said):
    mesh = Mesh.__new__(Mesh)
    mesh.shape, mesh.config = Shape(pp=2, dp=1, tp=1), MeshConfig()
    with pytest.raises(Error, match=rf"{said} cannot be used with strategy 'mesh' of dp=1, pp=2"):
        mesh.prepare(RunConfig(**{key: value}), Task())


def test_a_world_of_replicas():
    """Samples and seeds go by replica; who writes goes by process."""
    world = World(ALONE)
    assert (world.rank, world.size, world.leads) == (0, 1, True)
    world.replica = (1, 2)
    assert (world.rank, world.size, world.leads) == (1, 2, True)
