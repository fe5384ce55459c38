"""The loop on several ranks (threads of this process) beside plain torch in one."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hpctrain.checkpoint.store import CheckpointStore
from hpctrain.config import resolve
from hpctrain.errors import Error
from hpctrain.strategies.buffer_averaging import average_buffers
from hpctrain.strategies.single import Single
from hpctrain.tasks.task import Task
from hpctrain.train.loop import Trainer
from hpctrain.train.recorder import Silent
from hpctrain.world.launcher import ALONE
from hpctrain.world.world import World
from tests.unit.threads import on_ranks, train_on_ranks

RNG = np.random.default_rng(0)
N = 26
X, Y = RNG.normal(size=(N, 4)) + 2, RNG.normal(size=(N, 1))
PLAIN = {
    "data": {"order": "none", "workers": 0},
    "schedule": {"name": "constant"},
    "optimizer": {"name": "sgd", "lr": 0.05},
}


class Net(Task):
    """With BatchNorm, whose statistics show who saw what."""

    def model(self):
        return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 1))

    def loss(self, model, batch):
        return (model(batch["x"]) - batch["y"]).square().mean()

    def data(self, config):
        return {"train": {"x": X, "y": Y}, "validation": {"x": X[:7], "y": Y[:7]}}


def trainer(folder, task, strategy=None, rank=0, **train):
    settings = {"dtype": "float64", "batch_size": 8, "epochs": 2, **train}
    config = resolve([("test", PLAIN), ("test", {"train": settings})])
    store = CheckpointStore(folder / f"{rank}" / "checkpoints", 2)
    return Trainer(config, task, strategy or Single(World(ALONE)), store)


def single(folder, task, **train):
    alone = trainer(folder, task, **train)
    alone.restore(None)
    alone.run(Silent())
    return alone


def on(size, folder, make_task, **train):
    return train_on_ranks(size, lambda how, rank: trainer(folder, make_task(), how, rank, **train))


def same(one, other, tolerance=1e-12):
    ours, theirs = one.state.model.state_dict(), other.state.model.state_dict()
    for name, value in theirs.items():
        difference = (ours[name].double() - value.double()).norm()
        assert difference <= tolerance * max(1.0, float(value.double().norm())), name


@pytest.mark.parametrize(
    ("size", "batch", "accumulate"), [(2, 8, 1), (3, 8, 1), (3, 2, 1), (2, 9, 2)]
)
def test_synchronised_batchnorm_is_that_of_one_process(tmp_path, size, batch, accumulate):
    """Uneven parts, and ranks without samples; a pass takes the same samples on both."""
    # Of two samples BatchNorm makes ones, whatever they are: few steps, or rounding grows.
    settings = {"batch_size": batch, "steps": 8 if batch > 2 else 3}
    ranks = on(size, tmp_path, Net, accumulate=accumulate, sync_batchnorm=True, **settings)
    if accumulate == 1:
        alone = single(tmp_path / "alone", Net(), **settings)
        for each in ranks:
            same(each, alone, 1e-11)  # BatchNorm of few samples makes rounding grow
    for each in ranks[1:]:
        same(each, ranks[0], 0.0)


def test_synchronised_batchnorm_alone_is_batchnorm(tmp_path):
    same(single(tmp_path / "a", Net(), sync_batchnorm=True), single(tmp_path / "b", Net()))


class Volumes(Net):
    """Two samples a step, each with statistics of its own."""

    def model(self):
        return nn.Sequential(nn.BatchNorm1d(1, affine=False), nn.Flatten(), nn.Linear(16, 1))

    def data(self, config):
        x = RNG.normal(size=(60, 1, 16)) + 5
        return {"train": {"x": x, "y": x.mean(2)}}


def test_a_rank_without_samples_counts_nothing_in_running_statistics(tmp_path):
    for each in on(3, tmp_path, Volumes, batch_size=2, epochs=2):
        assert abs(float(each.state.model[0].running_mean) - 5) < 0.3
        assert int(each.state.model[0].num_batches_tracked) == 60


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 4), st.data())
def test_buffers_are_averaged_by_samples(size, data):
    samples = data.draw(st.lists(st.integers(0, 9), min_size=size, max_size=size))
    table = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def model(rank):
        module = nn.Module()
        values = torch.arange(6.0).view(2, 3) * (rank + 1)
        module.register_buffer("turned", values.t())
        module.register_buffer("short", torch.full((2,), float(rank)).bfloat16())
        module.register_buffer("turns", torch.complex(values, -values))
        module.register_buffer("table", table.clone())
        module.register_buffer("mask", torch.tensor([float("inf"), float("nan"), 0.0]))
        module.register_buffer("count", torch.tensor(10 + rank))
        module.register_buffer("flags", torch.tensor([rank == 0, True]))
        module.register_buffer("edges", torch.eye(3).to_sparse())
        module.register_buffer("nothing", torch.zeros(0, 3))
        return module

    def average(comm):
        module = model(comm.rank)
        average_buffers(comm, [module], samples[comm.rank])
        return module

    most = samples.index(max(samples))
    weights = samples if any(samples) else [1.0 if r == most else 0.0 for r in range(size)]
    factor = sum(w * (rank + 1) for rank, w in enumerate(weights)) / sum(weights)
    for module in on_ranks(size, average):
        assert torch.allclose(module.turned, torch.arange(6.0).view(2, 3).t() * factor)
        assert module.turns.is_complex() and torch.allclose(module.turns.real, module.turned.t())
        assert torch.equal(module.table, table)  # not a bit
        assert module.mask[0] == float("inf") and module.mask[1].isnan()
        assert int(module.count) == 10 + most and bool(module.flags[0]) == (most == 0)


class Drifting(Net):
    """What changes its parameters by the samples it sees."""

    def model(self):
        class First(nn.Linear):
            def forward(self, x):
                if self.training:
                    with torch.no_grad():
                        self.weight.clamp_(max=float(x.abs().max()) / 30)
                return super().forward(x)

        return nn.Sequential(First(4, 5), nn.Linear(5, 1))


def test_ranks_that_come_apart_end_the_run(tmp_path):
    for error in on(2, tmp_path, Drifting):
        assert isinstance(error, Error)
        assert "different values of parameter '0.weight'" in str(error)
        assert "rank 1 has not those of rank 0" in str(error)


class Spoilt(Net):
    """One sample is no number."""

    def model(self):
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))

    def data(self, config):
        x = X.copy()
        x[14, 2] = np.nan  # in the second batch, in rank 1's part
        return {"train": {"x": x, "y": Y}, "validation": {"x": X, "y": Y}}


def test_a_loss_that_is_no_number_ends_the_run(tmp_path):
    for error in on(2, tmp_path, Spoilt):
        assert isinstance(error, Error) and "first at step 2 on rank 1" in str(error)
        assert "parameter '0.weight' is no longer finite" in str(error)
    with pytest.raises(Error, match="not finite at step 2 on rank 0"):
        single(tmp_path / "a", Spoilt(), steps=2)


def test_steps_that_are_no_numbers_are_left_out_alike(tmp_path):
    ranks = on(2, tmp_path, Spoilt, nonfinite="skip", ema_decay=0.9)
    alone = single(tmp_path / "alone", Spoilt(), nonfinite="skip", ema_decay=0.9)
    for each in [*ranks, alone]:
        assert each.state.counters.skipped_steps == 2 and each.state.counters.step == 8
        assert each.state.counters.metrics["skipped_steps"] == 2
        same(each, alone)
        assert all(p.isfinite().all() for p in each.state.model.parameters())


def test_allowed_it_goes_on_but_saves_nothing_and_is_no_success(tmp_path):
    with pytest.raises(Error, match="not finite at its end"):
        single(tmp_path, Spoilt(), nonfinite="allow", epochs=2)
    assert CheckpointStore(tmp_path / "0" / "checkpoints", 2).steps() == []


def test_every_step_left_out_is_no_success(tmp_path):
    class Nothing(Spoilt):
        def loss(self, model, batch):
            return super().loss(model, batch) * float("nan")

    with pytest.raises(Error, match="every step was left out"):
        single(tmp_path, Nothing(), nonfinite="skip")


class Rare(Net):
    """Metrics that only some batches, and so some ranks, have."""

    def model(self):
        return nn.Linear(4, 1)

    def loss(self, model, batch):
        error = (model(batch["x"]) - batch["y"]).square()
        means = {"always": error.mean().item(), "count": np.float32(1), "whole": 2}
        chosen = batch["x"][:, 0] > 3.2
        if chosen.any():
            means["rare"] = error[chosen].mean().detach()
        return error.mean(), means


def test_a_metric_of_some_batches_on_some_ranks_is_recorded(tmp_path):
    alone = single(tmp_path / "alone", Rare(), epochs=3)
    for each in on(3, tmp_path, Rare, epochs=3):
        metrics = each.state.counters.metrics
        assert metrics.keys() == alone.state.counters.metrics.keys() and "train_rare" in metrics
        for name in ("train_loss", "train_always", "val_loss", "val_whole", "train_count"):
            assert metrics[name] == pytest.approx(alone.state.counters.metrics[name])


def test_the_last_samples_go_to_fewer_ranks_where_batchnorm_needs_two(tmp_path):
    class Last(Net):
        def data(self, config):
            return {"train": {"x": X[:18], "y": Y[:18]}}

    for each in on(2, tmp_path, Last):  # batches of 8, 8 and 2
        assert each.state.counters.samples == 36
    with pytest.raises(Error, match=r"statistics of one sample: step 2.*HINT: data.drop_last"):
        single(tmp_path / "one", Last(), batch_size=17)


def test_the_start_refuses_what_cannot_be_saved_or_trained(tmp_path):
    class Odd(Net):
        def optimizer(self, model, config):
            optimizer = super().optimizer(model, config)
            optimizer.param_groups[0]["rule"] = lambda: 0
            return optimizer

    class Closure(Net):
        def optimizer(self, model, config):
            return torch.optim.LBFGS(model.parameters())

    for task, message in (
        (Odd(), "optimizer.param_groups.0.rule' is a function"),
        (Closure(), "LBFGS of task Closure evaluates the loss again"),
    ):
        with pytest.raises(Error, match=message):
            trainer(tmp_path, task, nonfinite="skip")
