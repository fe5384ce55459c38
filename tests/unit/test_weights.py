"""Means are over all targets, as a task counts them, however they are divided."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hpctrain.checkpoint.store import CheckpointStore
from hpctrain.config import resolve
from hpctrain.errors import Error
from hpctrain.strategies.base import Agreement
from hpctrain.strategies.single import Single
from hpctrain.tasks.checks import checked_weight
from hpctrain.tasks.task import Task
from hpctrain.train.loop import Trainer
from hpctrain.train.recorder import Silent
from hpctrain.world.launcher import ALONE
from hpctrain.world.world import World
from tests.unit.test_ranks import PLAIN
from tests.unit.threads import train_on_ranks

RNG = np.random.default_rng(2)
LENGTHS = RNG.integers(1, 9, 26)
X = RNG.normal(size=(26, 8, 3))
Y = np.where(np.arange(8) < LENGTHS[:, None], RNG.integers(0, 4, (26, 8)), -100)
BATCH, EPOCHS = 8, 2


def mean(model, x, y):
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=-100)


class Padded(Task):
    def model(self):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4))

    def data(self, config):
        return {"train": {"x": X, "y": Y}, "validation": {"x": X[:11], "y": Y[:11]}}

    def loss(self, model, batch):
        if not len(batch["y"]):
            return model(batch["x"]).sum()
        return mean(model, batch["x"], batch["y"])

    def weight(self, batch):
        return (batch["y"] != -100).sum()


def trainer(folder, how, rank, task=Padded, **train):
    settings = {"dtype": "float64", "batch_size": BATCH, "epochs": EPOCHS, **train}
    config = resolve([("test", PLAIN), ("test", {"train": settings})])
    return Trainer(config, task(), how, CheckpointStore(folder / f"{rank}" / "checkpoints", 2))


def oracle(clip):
    model = Padded().model().double()
    optimizer = torch.optim.SGD(
        [
            {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.01},
            {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=0.05, momentum=0.9, nesterov=True,
    )  # fmt: skip
    x, y = torch.from_numpy(X), torch.from_numpy(Y)
    for _ in range(EPOCHS):
        for rows in torch.arange(26).split(BATCH):
            optimizer.zero_grad()
            mean(model, x[rows], y[rows]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
    with torch.no_grad():
        return model, float(mean(model, x[:11], y[:11]))


@pytest.mark.parametrize(("size", "accumulate"), [(1, 1), (1, 3), (3, 1), (3, 2)])
def test_gradients_and_validation_are_means_over_all_targets(tmp_path, size, accumulate):
    """26 samples in batches of 8: the last has two, so that one of three ranks has none."""
    settings = {"accumulate": accumulate, "clip_norm": 0.3}
    if size == 1:
        alone = trainer(tmp_path, Single(World(ALONE)), 0, **settings)
        alone.restore(None)
        alone.run(Silent())
        ranks = [alone]
    else:
        ranks = train_on_ranks(size, lambda how, rank: trainer(tmp_path, how, rank, **settings))
    model, validation = oracle(0.3)
    for each in ranks:
        assert isinstance(each, Trainer), each
        mine = each.state.model.parameters()
        for one, other in zip(mine, model.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
        assert each.state.counters.metrics["val_loss"] == pytest.approx(validation, abs=1e-12)


def test_a_batch_without_targets_changes_nothing_but_by_momentum(tmp_path):
    class Empty(Padded):
        def data(self, config):
            return {"train": {"x": X, "y": Y}}

        def weight(self, batch):
            return 0

    alone = trainer(tmp_path, Single(World(ALONE)), 0, Empty)
    before = [p.detach().clone() for p in alone.state.model.parameters() if p.ndim < 2]
    alone.restore(None)
    alone.run(Silent())
    after = [p for p in alone.state.model.parameters() if p.ndim < 2]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("result", [None, -1, math.nan, "3", torch.zeros(2)])
def test_what_is_no_weight_is_refused(result):
    class Wrong(Padded):
        def weight(self, batch):
            return result

    batch = type("Batch", (dict,), {"samples": 2})()
    with pytest.raises(Error, match=r"weight\(\) of task Wrong returned") as raised:
        checked_weight(Wrong(), batch)
    assert raised.value.hint


def test_servers_cannot_weigh(tmp_path):
    how = Single(World(ALONE))
    how.agreement = Agreement.ON_SERVERS
    with pytest.raises(Error, match="no rank knows what the others' samples count for"):
        trainer(tmp_path, how, 0)
