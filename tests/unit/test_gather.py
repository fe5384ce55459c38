"""world.all_gather and gather_object, on ranks that are threads; beside one process."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from hpctrain.errors import Error
from hpctrain.tasks.task import Task
from hpctrain.train.loop import Trainer
from hpctrain.world.broadcast import gather_tensors
from hpctrain.world.launcher import ALONE
from hpctrain.world.world import World
from tests.unit.test_ranks import on, same, single
from tests.unit.threads import on_ranks

RNG = np.random.default_rng(3)
X = RNG.normal(size=(13, 6))


def world_of(comm):
    world = World(ALONE)
    world.comm = comm
    return world


def contrast(mine, others, first):
    """InfoNCE of this rank's rows beside all; the sum over its rows."""
    places = torch.arange(len(mine)) + first
    return F.cross_entropy(mine @ others.t(), places, reduction="sum")


@pytest.mark.parametrize("rows", [[3, 2], [4, 0, 1], [0, 5]])
def test_the_gradient_is_that_of_all_losses(rows):
    torch.manual_seed(0)
    whole = torch.randn(sum(rows), 4, dtype=torch.float64, requires_grad=True)
    contrast(whole, whole.sin(), 0).backward()

    def gradient(comm):
        first = sum(rows[: comm.rank])
        mine = whole.detach()[first : first + rows[comm.rank]].clone().requires_grad_()
        others = world_of(comm).all_gather(mine.sin())
        assert torch.equal(others, whole.detach().sin())
        contrast(mine, others, first).backward()
        return mine.grad

    found = torch.cat(on_ranks(len(rows), gradient))
    assert torch.allclose(found, whole.grad, rtol=0, atol=1e-14)


TYPES = [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64]


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_tensors_come_bit_for_bit(data):
    size = data.draw(st.integers(1, 3))
    shapes = st.lists(st.integers(0, 3), max_size=3)
    draws = st.dictionaries(st.text(max_size=3), st.tuples(st.sampled_from(TYPES), shapes))
    kinds = [data.draw(draws) for _ in range(size)]
    generator = torch.Generator().manual_seed(0)

    def made(dtype, shape):
        bits = torch.randint(0, 2, (*shape, dtype.itemsize), generator=generator)
        if dtype != torch.bool:
            bits = bits * 200
        return bits.to(torch.uint8).view(dtype).reshape(shape)

    given = [{name: made(*kind) for name, kind in each.items()} for each in kinds]
    for gathered in on_ranks(size, lambda comm: gather_tensors(comm, given[comm.rank])):
        for mine, found in zip(given, gathered, strict=True):
            assert list(mine) == list(found)
            for name, tensor in mine.items():
                assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
                assert (
                    tensor.numpy(force=True).tobytes() == found[name].numpy().tobytes()
                    if (tensor.dtype != torch.bfloat16)
                    else torch.equal(tensor.view(torch.int16), found[name].view(torch.int16))
                )


def test_what_cannot_be_gathered():
    def shapes(comm):
        world_of(comm).all_gather(torch.zeros(2, 3 + comm.rank))

    def types(comm):
        world_of(comm).all_gather(torch.zeros(2, dtype=TYPES[comm.rank]))

    def scalar(comm):
        world_of(comm).all_gather(torch.tensor(1.0))

    for action in (shapes, types, scalar):
        for error in on_ranks(2, action):
            assert isinstance(error, Error) and "rows of one shape and type" in error.message
    for error in on_ranks(2, lambda comm: world_of(comm).gather_object({1, 2})):
        assert isinstance(error, Error) and "set is not JSON" in error.message


def test_objects_by_rank():
    values = [{"name": "a", "ids": [1, 2]}, None, "text"]
    for found in on_ranks(3, lambda comm: world_of(comm).gather_object(values[comm.rank])):
        assert found == values


class Contrastive(Task):
    """Each sample beside all others of the global batch."""

    gathers = True

    def model(self):
        return nn.Linear(6, 3)

    def data(self, config):
        return {"train": {"x": X}, "validation": {"x": X[:7]}}

    def loss(self, model, batch):
        mine = F.normalize(model(batch["x"]))
        others = self.world.all_gather(F.normalize(model(batch["x"]).cos()))
        sizes = self.world.gather_object(len(mine))
        first = sum(sizes[: self.world.rank])
        return contrast(mine, others, first) / max(len(mine), 1)


@pytest.mark.parametrize("size", [2, 3])
def test_a_contrastive_task_is_that_of_one_process(tmp_path, size):
    """The last batch, of one sample, leaves ranks without any."""
    settings = {"batch_size": 4, "steps": 8}
    alone = single(tmp_path / "alone", Contrastive(), **settings)
    ranks = on(size, tmp_path, Contrastive, **settings)
    for each in ranks:
        assert isinstance(each, Trainer), each
        same(each, alone, 1e-12)
        metrics = each.state.counters.metrics
        assert metrics["val_loss"] == pytest.approx(alone.state.counters.metrics["val_loss"], 1e-12)


def test_a_task_that_does_not_say_that_it_gathers(tmp_path):
    class Silently(Contrastive):
        gathers = False

    for error in on(2, tmp_path, Silently, batch_size=4, steps=1):
        assert isinstance(error, Error) and "gathers = True" in error.hint
