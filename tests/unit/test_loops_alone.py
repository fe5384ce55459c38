"""What a loop of one's own meets on one rank, and how it ends."""

import contextlib
import subprocess
import sys
import types

import pytest
import torch
from mpi4py import MPI
from torch import nn

from hpctrain.compression.dense import Dense
from hpctrain.errors import Error
from hpctrain.ps.protocol import shared_memory
from hpctrain.strategies.gradient_averaging import AveragedGradients, call_when_ready
from hpctrain.strategies.single import Single
from hpctrain.train.state import Counters
from hpctrain.train.step_rollback import StepRollback
from hpctrain.world.launcher import ALONE
from hpctrain.world.world import World


def test_a_closure_works_on_one_rank():
    torch.manual_seed(0)
    x, y = torch.randn(20, 3), torch.randn(20, 1)
    models = nn.Linear(3, 1), nn.Linear(3, 1)
    models[1].load_state_dict(models[0].state_dict())
    plain, inner = (torch.optim.LBFGS(m.parameters(), lr=0.5) for m in models)
    wrapped = Single(World(ALONE)).wrap(models[1], inner)
    for model, optimizer in zip(models, (plain, wrapped), strict=True):

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
    assert torch.equal(models[0].weight, models[1].weight)
    with pytest.raises(Error, match="LBFGS"):
        wrapped.step()


@pytest.mark.slow
def test_an_uncaught_error_is_one_line():
    program = "import hpctrain; hpctrain.init(); raise hpctrain.Error('no.', hint='yes.')"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.returncode == 2 and found.stderr == "hpctrain: error: no. HINT: yes.\n"


@pytest.mark.parametrize("free", [2**12, 2**62])
def test_windows_that_do_not_fit_are_not_made(monkeypatch, free):
    """MPI would make them, and the first to write there be killed."""
    monkeypatch.setattr(shared_memory, "_free_bytes", lambda: free)
    shared = shared_memory.Sharing(MPI.COMM_SELF, {0: 0}, True, contextlib.nullcontext)
    shared.offer(2**20)
    while not shared.done.is_set():
        shared.poll()
    assert shared.regions.has(0) == (free > 2**20)


class Running(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("seen", torch.zeros(2))
        self.register_buffer("expanded", torch.zeros(1).expand(3))

    def forward(self, x):
        self.mean = self.mean + x  # another tensor
        self.seen += x
        return x


def test_buffers_that_forward_replaces_are_taken_back():
    model = Running()
    loader = types.SimpleNamespace(place=(0, 0, 0))
    state = types.SimpleNamespace(model=model, loader=loader, counters=Counters())
    committed = StepRollback(state)
    for step in range(3):
        committed.keep()
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        model(torch.ones(2) * (step + 1))
        model.expanded = torch.ones(3) * step
        committed.undo(counters=False)
        for name, buffer in model.named_buffers():
            assert torch.equal(buffer, before[name]), name
        model(torch.ones(2))


class Twins:
    """Other ranks that do as this one does, while there are any; what was exchanged with them."""

    rank = 0

    def __init__(self):
        self.size = 1
        self.exchanged = []

    def start_sum(self, tensor, name):
        self.exchanged.append(name)
        return tensor.mul_(self.size)

    def start_average(self, tensor, name):
        self.exchanged.append(name)
        return tensor

    def ready(self, handle):
        return True

    def wait(self, handle):
        return handle


def test_a_rank_exchanges_nothing_while_it_is_alone():
    """Ranks are lost, and join, between steps; a part of the model is not used by any."""
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)) for _ in range(2)]
    for model in models:
        model.unused = nn.Parameter(torch.ones(2))
    models[1].load_state_dict(models[0].state_dict())
    twins = Twins()
    names, parameters = zip(*models[1].named_parameters(), strict=True)
    averaged = AveragedGradients(
        parameters, names, twins, Dense(), 40, [], lambda part: None, lambda: twins.size == 1
    )
    call_when_ready(parameters, averaged.ready)
    for ranks in (1, 1, 2, 2, 1, 2):
        twins.size = ranks
        twins.exchanged.clear()
        for model in models:
            model(torch.randn(3, 4, generator=torch.Generator().manual_seed(1))).sum().backward()
        averaged.synchronize()
        averaged.stepped()
        assert ("hpctrain.round" in twins.exchanged) == bool(twins.exchanged) == (ranks > 1)
        for one, other in zip(*(m.parameters() for m in models), strict=True):
            assert (one.grad is None) == (other.grad is None)
            assert one.grad is None or torch.equal(one.grad, other.grad)
        averaged.forget_average()
        for model in models:
            model.zero_grad()
