"""Everybody starts from rank 0's, of whatever kind it is; gradients of every kind are averaged."""

import pytest
import torch
from torch import nn

import hpctrain
from hpctrain.config import PsConfig
from tests.waiting import SECONDS


class Odd(nn.Module):
    """State of every kind that a replica may have."""

    _version = 3

    def __init__(self, rank):
        super().__init__()
        generator = torch.Generator().manual_seed(rank)

        def drawn(*shape, dtype=torch.float64):
            return torch.randn(*shape, generator=generator, dtype=dtype)

        self.weight = nn.Parameter(drawn(3, 2))
        self.frozen = nn.Parameter(drawn(4), requires_grad=False)
        self.register_buffer("turns", drawn(2, 2, dtype=torch.complex128))
        self.register_buffer("turned", drawn(4, 3).t())
        self.register_buffer("expanded", drawn(1, 1).expand(3, 3))
        self.register_buffer("hidden", drawn(5), persistent=False)
        self.register_buffer("counts", torch.arange(3) + rank)
        self.register_buffer("flags", torch.tensor([rank == 0, True]))
        self.register_buffer("half_as_long", drawn(3).to(torch.bfloat16))
        self.register_buffer("eighth", drawn(3).to(torch.float8_e4m3fn))
        self.register_buffer("empty", torch.empty(0, 3))
        self.extra = {"rank": rank}
        self.read_version = None

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *others):
        self.read_version = local_metadata.get("version")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *others)


def servers(world, **options):
    config = PsConfig(servers=world.size, colocate=True, silence_seconds=SECONDS, **options)
    return hpctrain.strategy("ps", hpctrain.init(), ps=config, timeout_seconds=SECONDS)


@pytest.mark.parametrize("kind", ["horovod", "ps"])
def test_state_of_every_kind(strategy, world, kind):
    how = strategy if kind == "horovod" else servers(world)
    model, expected = Odd(world.rank), Odd(0)
    head = nn.Parameter(torch.full((2,), float(world.rank)).double())  # not the model's
    inner = torch.optim.SGD([model.weight, head], lr=0.1 if world.rank == 0 else 0.5)
    optimizer = how.wrap(model, inner)
    for (name, ours), theirs in zip(
        [*model.named_parameters(), *model.named_buffers()],
        [*expected.parameters(), *expected.buffers()],
        strict=True,
    ):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), name
    assert model.extra == {"rank": 0} and not head.any()
    assert inner.param_groups[0]["lr"] == 0.1
    assert model.read_version in (None, 3)
    model.expanded.add_(1)  # it can be written to
    if kind == "ps":
        optimizer.step()
        how.world.comm.close()


def test_complex_gradients(strategy, world):
    weight = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    model = nn.ParameterList([weight])
    optimizer = strategy.wrap(model, torch.optim.SGD([weight], lr=0.1))
    optimizer.zero_grad()
    turn = torch.tensor(1.0 + 2.0j * world.rank)
    (weight * turn).real.sum().backward()
    plain = torch.ones(3, dtype=torch.complex64, requires_grad=True)
    mean = 1.0 + 2.0j * sum(range(world.size)) / world.size
    (plain * mean).real.sum().backward()
    assert torch.allclose(weight.grad, plain.grad)


def sparse_model():
    torch.manual_seed(3)
    return nn.Sequential(nn.EmbeddingBag(20, 3, sparse=True, mode="sum"), nn.Linear(3, 1)).double()


def test_sparse_gradients(strategy, world):
    """Rows that several ranks have are added up; a rank may have none; nobody has the rest."""
    model, plain = sparse_model(), sparse_model()
    inner = torch.optim.SparseAdam(model[0].parameters(), lr=0.1)
    optimizer = strategy.wrap(model, inner)
    reference = torch.optim.SparseAdam(plain[0].parameters(), lr=0.1)
    for step in range(4):
        x = torch.randint(0, 20, (6, 4), generator=torch.Generator().manual_seed(step))
        reference.zero_grad()
        plain(x).square().mean().backward()
        reference.step()
        optimizer.zero_grad()
        if step != 2:
            mine = x[6 * world.rank // world.size : 6 * (world.rank + 1) // world.size]
            (model(mine).square().mean() * len(mine) * world.size / 6).backward()
        elif world.rank == 0:  # the others have no samples
            (model(x).square().mean() * world.size).backward()
        optimizer.step()
        assert model[0].weight.grad.is_sparse
    assert torch.allclose(model[0].weight, plain[0].weight, rtol=0, atol=1e-12)


def adversaries():
    torch.manual_seed(4)
    models = nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
    return [model.double() for model in models]


def adversarial(models, optimizers, rank, size):
    (generator, critic), (og, oc) = models, optimizers
    for step in range(4):
        torch.manual_seed(step)
        noise, real = torch.randn(8, 3).double(), torch.randn(8, 4).double()
        mine = slice(8 * rank // size, 8 * (rank + 1) // size)
        noise, real = noise[mine], real[mine]
        share = len(noise) * size / 8
        oc.zero_grad()
        ((critic(generator(noise).detach()) - critic(real)).square().mean() * share).backward()
        oc.step()
        og.zero_grad()
        (critic(generator(noise)).square().mean() * share).backward()  # through both
        og.step()


def test_two_optimizers(strategy, world):
    plain, models = adversaries(), adversaries()
    adversarial(plain, [torch.optim.Adam(m.parameters(), 0.01) for m in plain], 0, 1)
    wrapped = [strategy.wrap(m, torch.optim.Adam(m.parameters(), 0.01)) for m in models]
    adversarial(models, wrapped, world.rank, world.size)
    for ours, theirs in zip(models, plain, strict=True):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.allclose(a, b, rtol=1e-10, atol=1e-13)


def test_ranks_without_samples(strategy, world):
    """They step all the same, and wait until the others have come to step, too."""
    models = nn.Linear(2, 1).double(), nn.Linear(2, 1).double()
    for model in models:
        nn.init.ones_(model.weight)
    plain, model = models
    reference = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    optimizer = strategy.wrap(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    plain.load_state_dict(model.state_dict())
    for _ in range(3):
        optimizer.zero_grad()
        reference.zero_grad()
        for _ in range(2):  # passes
            plain(torch.ones(1, 2).double()).sum().backward()
            if world.rank == 0:
                (model(torch.ones(1, 2).double()).sum() * world.size).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.synchronize()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        reference.step()
    assert torch.allclose(model.weight, plain.weight, rtol=1e-12)
