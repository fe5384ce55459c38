"""The loop's own arithmetic, on one rank, against the same thing written out."""

import copy
import math
import time

import numpy as np
import pytest
import torch
from torch import nn

from hpctrain.checkpoint.store import CheckpointStore
from hpctrain.config import OptimizerConfig, ScheduleConfig, resolve
from hpctrain.data.order import EpochOrder
from hpctrain.data.source import ArraySource
from hpctrain.errors import Error
from hpctrain.optim.schedule import factor, peak_scale
from hpctrain.strategies.single import Single
from hpctrain.tasks.task import Task, load_task, make_task
from hpctrain.train.loop import Trainer
from hpctrain.train.recorder import Silent
from hpctrain.world.launcher import ALONE
from hpctrain.world.world import World

N = 22
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(N, 4)), RNG.normal(size=(N, 1))


class Line(Task):
    """A regression with a matrix, a norm and biases."""

    def model(self):
        return nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 1))

    def loss(self, model, batch):
        error = model(batch["x"]) - batch["y"]
        return error.square().mean(), {"absolute": error.abs().mean()}

    def data(self, config):
        return {
            "train": ArraySource({"x": X, "y": Y}),
            "validation": ArraySource({"x": X[:7], "y": Y[:7]}),
        }


class Recorded(Silent):
    def __init__(self):
        self.lines = []

    def write(self, kind, step, values, text=""):
        self.lines.append((kind, step, values))


def trainer_of(tmp_path, task=None, **sections):
    config = resolve([("test", {"train": {"dtype": "float64", "batch_size": 8}}), ("t", sections)])
    store = CheckpointStore(tmp_path / "checkpoints", config.checkpoint.keep)
    trainer = Trainer(config, task or Line(), Single(World(ALONE)), store)
    trainer.restore(None)
    return trainer


def batches(epoch):
    order = EpochOrder(N, 0, epoch).indices(np.arange(N))
    return [torch.from_numpy(order[start : start + 8]) for start in range(0, N, 8)]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_equals_the_loop_written_out(tmp_path, accumulate):
    """Schedule, clipping, accumulation, decay only of matrices, EMA, the short last batch."""
    trainer = trainer_of(
        tmp_path,
        train={
            "dtype": "float64",
            "batch_size": 8,
            "epochs": 4,
            "clip_norm": 0.5,
            "ema_decay": 0.8,
            "accumulate": accumulate,
        },
        optimizer={"name": "sgd", "lr": 0.1, "lr_batch_size": 4, "weight_decay": 0.1},
        schedule={"name": "linear", "warmup_steps": 3, "final": 0.1},
    )
    model = copy.deepcopy(trainer.state.model)
    recorder = Recorded()
    trainer.run(recorder)

    decayed = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.SGD(
        [{"params": decayed, "weight_decay": 0.1}, {"params": rest}],
        lr=0.2,
        momentum=0.9,
        nesterov=True,
    )
    averaged = copy.deepcopy(model)
    step, steps = 0, 12
    x, y = torch.from_numpy(X), torch.from_numpy(Y)
    for epoch in range(4):
        for indices in batches(epoch):
            done = (step - 3) / (steps - 3)
            rate = (step + 1) / 3 if step < 3 else 0.1 + 0.9 * (1 - done)
            for group in optimizer.param_groups:
                group["lr"] = 0.2 * rate
            optimizer.zero_grad()
            (model(x[indices]) - y[indices]).square().mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            for mean, now in zip(averaged.parameters(), model.parameters(), strict=True):
                mean.data = now.data.clone() if step == 0 else 0.8 * mean.data + 0.2 * now.data
            step += 1
    for ours, theirs in zip(trainer.state.model.parameters(), model.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-14)
    for ours, theirs in zip(
        trainer.state.ema.module.parameters(), averaged.parameters(), strict=True
    ):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-14)
    validation = [values for kind, _, values in recorder.lines if kind == "validation"]
    assert len(validation) == 4
    with torch.no_grad():
        error = averaged(x[:7]) - y[:7]
    assert validation[-1]["loss"] == pytest.approx(error.square().mean().item())
    assert validation[-1]["absolute"] == pytest.approx(error.abs().mean().item())


class Sleepy(Line):
    """Each part of its step takes a time of its own, at least."""

    def transform(self, batch, training):
        time.sleep(0.002)
        return batch

    def loss(self, model, batch):
        time.sleep(0.003)
        return super().loss(model, batch)

    def optimizer(self, model, config):
        optimizer = super().optimizer(model, config)
        optimizer.register_step_pre_hook(lambda *_: time.sleep(0.004))
        return optimizer


def test_the_time_of_a_step_is_divided(tmp_path):
    trainer = trainer_of(tmp_path, Sleepy(), data={"workers": 0}, log={"every_steps": 3})
    recorder = Recorded()
    began = time.perf_counter()
    trainer.run(recorder)
    elapsed = time.perf_counter() - began
    timings = [values for kind, _, values in recorder.lines if kind == "timing"]
    assert len(timings) == 10
    for values in timings:
        assert values["input_ms"] >= 2 and values["compute_ms"] >= 3 and values["update_ms"] >= 4
    assert sum(3 * sum(values.values()) for values in timings) <= 1e3 * elapsed


def test_train_metrics_are_weighted_by_samples(tmp_path):
    trainer = trainer_of(tmp_path, optimizer={"lr": 1e-30}, log={"every_steps": 3})
    recorder = Recorded()
    start = copy.deepcopy(trainer.state.model)
    trainer.run(recorder)
    with torch.no_grad():
        error = start(torch.from_numpy(X)) - torch.from_numpy(Y)
    (_, step, values) = next(line for line in recorder.lines if line[0] == "train")
    assert step == 3  # an epoch: 8 + 8 + 6 samples
    assert values["loss"] == pytest.approx(error.square().mean().item())
    assert values["absolute"] == pytest.approx(error.abs().mean().item())


def test_best_and_early_stop(tmp_path):
    class Scripted(Line):
        """Validation losses as written; training leaves them alone."""

        script = iter([5.0, 3.0, 4.0, 3.5, 3.2, 1.0])

        def loss(self, model, batch):
            loss, means = super().loss(model, batch)
            if not torch.is_grad_enabled():
                loss = torch.tensor(next(self.script), dtype=torch.float64)
            return loss, means

    trainer = trainer_of(tmp_path, Scripted(), train={"patience": 3, "batch_size": 8, "epochs": 9})
    trainer.run(Silent())
    counters = trainer.state.counters
    assert counters.stopped_early
    assert counters.step == 15  # the fifth epoch's end; 1.0 is never reached
    assert counters.best["step"] == 6
    assert counters.best["metrics"]["val_loss"] == 3.0
    assert trainer.store.best() == trainer.store.path(6).resolve()
    assert trainer.store.steps() == [6, 12, 15]


def test_bf16_computes_in_bf16_and_keeps_float32(tmp_path):
    seen = []

    class Watched(Line):
        def loss(self, model, batch):
            out = model[0](batch["x"])
            seen.append(out.dtype)
            return super().loss(model, batch)

    trainer = trainer_of(tmp_path, Watched(), train={"dtype": "bf16", "batch_size": 8, "steps": 2})
    trainer.run(Silent())
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in trainer.state.model.parameters()} == {torch.float32}


def test_layers_random_numbers_repeat_after_a_resume(tmp_path):
    """Dropout: nothing of a generator is saved, and nothing is lost."""

    class Dropping(Line):
        def model(self):
            return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))

    def train(folder, steps, snapshot=None):
        trainer = trainer_of(
            folder,
            Dropping(),
            train={"dtype": "float64", "batch_size": 8, "steps": steps},
            schedule={"name": "constant"},
        )
        if snapshot is not None:
            trainer.restore(snapshot)
        torch.rand(7)  # whatever the process did before
        trainer.run(Silent())
        return trainer

    whole = train(tmp_path / "whole", 10)
    first = train(tmp_path / "first", 4)
    second = train(tmp_path / "second", 10, first.store.newest(pytest.fail))
    for a, b in zip(whole.state.model.parameters(), second.state.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_schedule(name):
    config = ScheduleConfig(name=name, warmup_epochs=0.5, final=0.2)
    values = [factor(config, step, 40, 20) for step in range(40)]
    assert values[:10] == pytest.approx([(n + 1) / 10 for n in range(10)])
    assert values[10] == 1.0
    assert factor(config, 40, 40, 20) == pytest.approx(1.0 if name == "constant" else 0.2)
    middle = {"constant": 1.0, "linear": 0.6, "cosine": 0.2 + 0.8 * (1 + math.cos(math.pi / 2)) / 2}
    assert factor(config, 25, 40, 20) == pytest.approx(middle[name])


def test_linear_scaling():
    assert peak_scale(OptimizerConfig(lr_batch_size=256), 1024) == 4.0
    assert peak_scale(OptimizerConfig(), 1024) == 1.0


def test_options_are_checked_and_converted():
    task = make_task(load_task("cifar10"), {"widths": [4, 8, 8], "classes": 3})
    assert task.widths == (4, 8, 8)
    model = task.model()
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 3)


def test_augmentation_moves_pixels_and_makes_none():
    from hpctrain.tasks.cifar10 import augment, reflect

    images = torch.arange(2 * 32 * 32 * 3).reshape(2, 32, 32, 3).float()
    centre = torch.tensor([[0.9, 0.5, 0.5], [0.1, 0.5, 0.5]])  # as it is; flipped
    out = augment(images, centre)
    assert torch.equal(out[0], images[0])
    assert torch.equal(out[1], images[1].flip(1))
    shifted = augment(images, torch.tensor([[0.9, 0.99, 0.5], [0.9, 0.5, 0.0]]))
    assert torch.equal(shifted[0][:28], images[0][4:])
    assert torch.equal(shifted[1][:, 4:], images[1][:, :28])
    assert reflect(torch.tensor([-2, -1, 0, 3, 4, 5]), 4).tolist() == [2, 1, 0, 3, 2, 1]


def test_a_task_need_not_validate(tmp_path):
    class Bare(Line):
        def data(self, config):
            return {"train": ArraySource({"x": X, "y": Y})}

    trainer = trainer_of(tmp_path, Bare(), train={"batch_size": 100, "epochs": 2})
    trainer.run(Silent())
    assert trainer.state.counters.step == 2
    assert trainer.state.counters.best is None


def test_a_monitor_that_is_not_there(tmp_path):
    class Wrong(Line):
        monitor = "absolut"

    with pytest.raises(Error, match=r"monitors 'absolut'.*did you mean 'absolute'"):
        trainer_of(tmp_path, Wrong()).run(Silent())
