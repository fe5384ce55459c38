"""fp16 with a loss scale is torch's own GradScaler, on one rank and on several."""

import numpy as np
import pytest
import torch
from torch import nn

from hpctrain.checkpoint.store import CheckpointStore, load_verified
from hpctrain.config import resolve
from hpctrain.errors import Error
from hpctrain.strategies.single import Single
from hpctrain.tasks.task import Task
from hpctrain.train import loss_scale
from hpctrain.train.loop import Trainer
from hpctrain.train.recorder import Silent
from hpctrain.train.state import Counters
from hpctrain.world.launcher import ALONE
from hpctrain.world.world import World
from tests.unit.threads import train_on_ranks

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(48, 6)).astype("float32"), RNG.normal(size=(48, 1)).astype("float32")
STEPS, BATCH = 12, 12


class Net(Task):
    def model(self):
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))

    def loss(self, model, batch):
        return (model(batch["x"]) - batch["y"]).square().mean()

    def data(self, config):
        return {"train": {"x": X, "y": Y}}

    def optimizer(self, model, config):
        return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def trainer(folder, how=None, rank=0, task=Net, **train):
    settings = {"dtype": "fp16", "batch_size": BATCH, "steps": STEPS, **train}
    config = resolve(
        [
            ("test", {"data": {"order": "none", "workers": 0}, "schedule": {"name": "constant"}}),
            ("test", {"train": settings, "checkpoint": {"every_steps": 5, "keep": 9}}),
        ]
    )
    store = CheckpointStore(folder / f"{rank}" / "checkpoints", 9)
    return Trainer(config, task(), how or Single(World(ALONE)), store)


def trained(folder, snapshot=None, **train):
    made = trainer(folder, **train)
    made.restore(snapshot)
    made.run(Silent())
    return made


def weights(made):
    return [p.detach().clone() for p in made.state.model.parameters()]


def torchs(scale, clip):
    """The same steps with torch.amp.GradScaler, and how many of them it left out."""
    model = Net().model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    skipped = 0
    for step in range(STEPS):
        rows = slice(step * BATCH % 48, step * BATCH % 48 + BATCH)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = (model(torch.from_numpy(X[rows])) - torch.from_numpy(Y[rows])).square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        skipped += scaler.get_scale() < before
    return list(model.parameters()), skipped, scaler.get_scale()


@pytest.mark.parametrize(("scale", "clip"), [(2.0**8, None), (2.0**19, 0.5)])
def test_it_is_torchs_scaler(tmp_path, scale, clip):
    """Also where the first scales are too large, so that steps are left out."""
    wanted, skipped, last = torchs(scale, clip)
    made = trained(tmp_path, loss_scale=scale, clip_norm=clip)
    for mine, other in zip(weights(made), wanted, strict=True):
        assert torch.equal(mine, other)
    assert made.state.counters.skipped_steps == skipped and (skipped > 0) == (clip is not None)
    assert made.state.counters.loss_scale == last


def test_the_scale_itself_changes_nothing(tmp_path):
    one, two = (weights(trained(tmp_path / f"{k}", loss_scale=2.0**k)) for k in (8, 9))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_ranks_leave_out_the_same_steps(tmp_path):
    """A gradient too large on one rank alone is too large for all."""
    large = X.copy()
    large[BATCH - 1] *= 300  # the last rank's, in the first step

    class Uneven(Net):
        def data(self, config):
            return {"train": {"x": large, "y": Y}}

    ranks = train_on_ranks(3, lambda how, rank: trainer(tmp_path, how, rank, Uneven))
    for each in ranks:
        assert isinstance(each, Trainer), each
        assert each.state.counters.skipped_steps == ranks[0].state.counters.skipped_steps > 0
        assert all(torch.equal(a, b) for a, b in zip(weights(each), weights(ranks[0]), strict=True))


def test_a_resumed_run_has_the_same_bits(tmp_path):
    whole = trained(tmp_path / "whole", loss_scale=2.0**19)
    store = CheckpointStore(tmp_path / "whole" / "0" / "checkpoints", 9)
    again = trained(tmp_path / "again", load_verified(store.path(5)), loss_scale=2.0)
    assert all(torch.equal(a, b) for a, b in zip(weights(again), weights(whole), strict=True))
    assert again.state.counters.loss_scale == whole.state.counters.loss_scale


def test_many_good_steps_double_it():
    counters = Counters(loss_scale=4.0)
    for _ in range(loss_scale.GOOD_STEPS - 1):
        loss_scale.adjust(counters, finite=True)
    assert counters.loss_scale == 4.0
    loss_scale.adjust(counters, finite=True)
    assert (counters.loss_scale, counters.good_steps) == (8.0, 0)
    loss_scale.adjust(counters, finite=True)
    loss_scale.adjust(counters, finite=False)
    assert (counters.loss_scale, counters.good_steps) == (4.0, 0)


def test_residuals_on_another_scale_are_refused(tmp_path):
    made = trainer(tmp_path)
    made.wrap()
    made.optimizer.carries_gradients = True
    with pytest.raises(Error, match="keep what they leave out") as raised:
        made.run(Silent())
    assert raised.value.hint
