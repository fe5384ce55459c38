"""Optimizers and schedulers of torch by name, beside the same thing written out in plain torch."""

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from hpctrain.checkpoint.store import CheckpointStore, load_verified
from hpctrain.config import OptimizerConfig, read_toml, resolve
from hpctrain.errors import Error
from hpctrain.optim.named import OPTIMIZERS, optimizer_of
from hpctrain.strategies.single import Single
from hpctrain.tasks.task import Task
from hpctrain.train.loop import Trainer
from hpctrain.train.recorder import Silent
from hpctrain.train.state import parameters_sha256
from hpctrain.world.launcher import ALONE
from hpctrain.world.world import World
from tests.unit.threads import train_on_ranks

RNG = np.random.default_rng(0)
N = 24
X, Y = RNG.normal(size=(N, 4)), RNG.normal(size=(N, 1))
EPOCH = 3  # steps


class Line(Task):
    def model(self):
        return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))

    def loss(self, model, batch):
        return (model(batch["x"]) - batch["y"]).square().mean()

    def data(self, config):
        return {"train": {"x": X, "y": Y}, "validation": {"x": X[:7], "y": Y[:7]}}


class Recorded(Silent):
    def __init__(self):
        self.rates = []

    def write(self, kind, step, values, text=""):
        if kind == "train":
            self.rates.append({k: v for k, v in values.items() if k.startswith("lr")})


def trainer_of(folder, task=None, strategy=None, snapshot=None, **sections):
    fixed = {
        "train": {"dtype": "float64", "batch_size": 8, "epochs": 4},
        "data": {"order": "none", "workers": 0},
        "log": {"every_steps": 1},
    }
    config = resolve([("test", fixed), ("test", sections)])
    store = CheckpointStore(folder / "checkpoints", 10)
    trainer = Trainer(config, task or Line(), strategy or Single(World(ALONE)), store)
    if strategy is None:
        trainer.restore(snapshot)
    return trainer


def trained(folder, **more):
    trainer = trainer_of(folder, **more)
    recorder = Recorded()
    trainer.run(recorder)
    return trainer, recorder.rates


def written_out(model, optimizer, scheduler, steps, after=lambda step: 1):
    """A plain loop; the scheduler takes so many steps after each."""
    rates = []
    x, y = torch.from_numpy(X), torch.from_numpy(Y)
    for step in range(steps):
        place = step % EPOCH * 8
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.zero_grad()
        (model(x[place : place + 8]) - y[place : place + 8]).square().mean().backward()
        optimizer.step()
        for _ in range(after(step)):
            scheduler.step()
    return rates


def alike(ours, theirs):
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def groups_of(model):
    return [
        {"params": [p for p in model.parameters() if p.ndim >= 2]},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]


@pytest.mark.parametrize(
    ("name", "options", "schedule", "arguments"),
    [
        ("RMSprop", {"alpha": 0.9, "momentum": 0.5}, "StepLR", {"step_size": 4, "gamma": 0.5}),
        ("NAdam", {"betas": [0.8, 0.9]}, "CosineAnnealingWarmRestarts", {"T_0": 3, "T_mult": 2}),
        ("Adagrad", {}, "CosineAnnealingLR", {"T_max": 12}),
        ("SGD", {"momentum": 0.9}, "OneCycleLR", {"max_lr": 0.1, "total_steps": 12}),
        ("AdamW", {}, "ExponentialLR", {"gamma": 0.9}),
    ],
)
def test_equals_plain_torch(tmp_path, name, options, schedule, arguments):
    """Also where what follows from the run is left to it: T_max, total_steps."""
    given = {key: value for key, value in arguments.items() if key not in ("T_max", "total_steps")}
    ours, rates = trained(
        tmp_path,
        optimizer={"name": name, "lr": 0.05, "options": options},
        schedule={"name": schedule, "options": given},
    )
    model = trainer_of(tmp_path / "plain").state.model
    kind = getattr(torch.optim, name)
    optimizer = kind(groups_of(model), lr=0.05, **options)
    scheduler = getattr(lr_scheduler, schedule)(optimizer, **arguments)
    expected = written_out(model, optimizer, scheduler, 12)
    assert [rate["lr"] for rate in rates] == pytest.approx(expected, rel=1e-12)
    alike(ours.state.model, model)


def test_a_scheduler_by_epochs_waits_for_no_warmup_but_is_scaled_by_it(tmp_path):
    schedule = {"name": "StepLR", "every": "epoch", "options": {"step_size": 2}}
    _, rates = trained(tmp_path / "a", optimizer={"lr": 0.1}, schedule=schedule)
    assert [rate["lr"] for rate in rates] == pytest.approx([0.1] * 6 + [0.01] * 6)
    warm = {"name": "StepLR", "warmup_steps": 4, "options": {"step_size": 2}}
    _, rates = trained(tmp_path / "b", optimizer={"lr": 0.1}, schedule=warm)
    rise = [0.025, 0.05, 0.075, 0.1]
    fall = [0.1 * 0.1 ** (step // 2) for step in range(8)]
    assert [rate["lr"] for rate in rates] == pytest.approx([*rise, *fall])


def test_a_plateau_goes_by_the_monitored_metric(tmp_path):
    class Flat(Line):
        mode = "max"  # the loss falls, so that no validation is better than the first

    options = {"patience": 0, "factor": 0.5, "threshold": 0.0}
    schedule = {"name": "ReduceLROnPlateau", "options": options}
    _, rates = trained(
        tmp_path, task=Flat(), optimizer={"name": "SGD", "lr": 1e-3}, schedule=schedule
    )
    assert [rate["lr"] for rate in rates] == [1e-3] * 6 + [5e-4] * 3 + [2.5e-4] * 3


def test_a_scheduler_of_the_task(tmp_path):
    class Mine(Line):
        def optimizer(self, model, config):
            head, *rest = model.children()
            rest = [p for module in rest for p in module.parameters()]
            return torch.optim.SGD(
                [{"params": head.parameters(), "lr": 0.1}, {"params": rest}], 0.2
            )

        def schedule(self, optimizer):
            parts = [
                lr_scheduler.ConstantLR(optimizer, 0.5, 2),
                lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
            ]
            return lr_scheduler.SequentialLR(optimizer, parts, [2])

    run, rates = trained(tmp_path, task=Mine(), train={"steps": 4}, schedule={"name": "linear"})
    said = "schedule.name = linear changes nothing: schedule() of this task gives a SequentialLR."
    assert said in run.warnings
    assert rates[0] == {"lr": 0.05, "lr_1": 0.1}  # of every group
    assert rates[3] == pytest.approx({"lr": 0.05, "lr_1": 0.1})
    assert rates[2] == pytest.approx({"lr": 0.1, "lr_1": 0.2})


SCHEDULES = [
    {"name": "CosineAnnealingWarmRestarts", "options": {"T_0": 5}, "warmup_steps": 2},
    {"name": "OneCycleLR"},
    {"name": "ReduceLROnPlateau", "options": {"patience": 0, "factor": 0.3}},
    {"name": "ExponentialLR", "options": {"gamma": 0.5}, "every": "epoch"},
]


@pytest.mark.parametrize("stop", [3, 5])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule["name"])
def test_resumes_bit_for_bit(tmp_path, schedule, stop):
    sections = {
        "optimizer": {"name": "RAdam", "lr": 0.05},
        "schedule": schedule,
        "checkpoint": {"every_steps": 1},
        "train": {"dtype": "float64", "batch_size": 8, "epochs": 2},
    }
    whole, rates = trained(tmp_path / "whole", **sections)
    store = CheckpointStore(tmp_path / "whole" / "checkpoints", 10)
    snapshot = load_verified(store.path(stop))
    rest, later = trained(tmp_path / "rest", snapshot=snapshot, **sections)
    assert later == rates[stop:]
    assert parameters_sha256(rest.state.model) == parameters_sha256(whole.state.model)


def test_a_longer_run_has_the_schedule_of_its_length(tmp_path):
    """As with `cosine`: not that of the checkpoint, which has come to its end."""
    schedule = {"name": "CosineAnnealingLR"}
    trained(tmp_path / "short", schedule=schedule, train={"epochs": 1})
    newest = CheckpointStore(tmp_path / "short" / "checkpoints", 10)
    snapshot = load_verified(newest.path(newest.steps()[-1]))
    _, rates = trained(tmp_path / "b", snapshot=snapshot, schedule=schedule, train={"epochs": 2})
    _, whole = trained(tmp_path / "whole", schedule=schedule, train={"epochs": 2})
    assert rates == whole[3:]
    from_cosine, _ = trained(tmp_path / "cosine", train={"epochs": 1})
    snapshot = copy.deepcopy(from_cosine.state.state_dict())
    _, rates = trained(
        tmp_path / "c", snapshot=snapshot, schedule={"name": "OneCycleLR"}, train={"epochs": 2}
    )
    _, whole = trained(tmp_path / "d", schedule={"name": "OneCycleLR"}, train={"epochs": 2})
    assert rates == whole[3:]


def test_several_ranks_have_the_rates_of_one(tmp_path):
    sections = {
        "optimizer": {"name": "Adamax", "lr": 0.05},
        "schedule": {"name": "ReduceLROnPlateau", "options": {"patience": 0, "factor": 0.5}},
    }
    ranks = train_on_ranks(
        2, lambda how, rank: trainer_of(tmp_path / f"{rank}", strategy=how, **sections)
    )
    alone, _ = trained(tmp_path / "alone", **sections)
    for each in ranks:
        alike(each.state.model, alone.state.model)
        assert each.state.schedule.state_dict() == ranks[0].state.schedule.state_dict()


def test_lbfgs_on_one_process(tmp_path):
    """A whole batch a step, as it is meant to be used; stopped and gone on with the same bits."""
    sections = {
        "train": {"dtype": "float64", "batch_size": N, "epochs": 6},
        "optimizer": {"name": "LBFGS", "options": {"max_iter": 5, "history_size": 3}},
        "schedule": {"name": "constant"},
    }
    ours, _ = trained(tmp_path / "ours", **sections)
    model = trainer_of(tmp_path / "plain").state.model
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=5, history_size=3)
    x, y = torch.from_numpy(X), torch.from_numpy(Y)

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    for _ in range(6):
        optimizer.step(closure)
    alike(ours.state.model, model)

    store = CheckpointStore(tmp_path / "ours" / "checkpoints", 10)
    rest, _ = trained(tmp_path / "rest", snapshot=load_verified(store.path(3)), **sections)
    assert parameters_sha256(rest.state.model) == parameters_sha256(ours.state.model)
    with pytest.raises(Error, match="wants a closure") as raised:
        skips = {**sections["train"], "nonfinite": "skip"}
        trainer_of(tmp_path / "skip", **{**sections, "train": skips})
    assert "--strategy single" in raised.value.hint


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"optimizer": {"name": "RMSProp"}}, "no optimizer 'RMSProp'. HINT: .*'RMSprop'"),
        ({"optimizer": {"name": "fractions:Fraction"}}, "is no optimizer"),
        ({"optimizer": {"options": {"epsilon": 1}}}, "AdamW has no option 'epsilon'.*'eps'"),
        (
            {"optimizer": {"name": "SGD", "options": {"nesterov": True}}},
            "SGD cannot be made with .*Nesterov momentum requires",
        ),
        ({"schedule": {"name": "StepLr"}}, "no scheduler 'StepLr'. HINT: .*'StepLR'"),
        ({"schedule": {"name": "StepLR"}}, "StepLR cannot be made with no options: .*step_size"),
        (
            {"schedule": {"name": "StepLR", "options": {"step": 1}}},
            "StepLR has no option 'step' .*'step_size'",
        ),
        ({"schedule": {"name": "LambdaLR"}}, "LambdaLR is made of functions"),
        ({"schedule": {"name": "OneCycleLR", "final": 0.1}}, "schedule.final = 0.1"),
        (
            {"schedule": {"name": "OneCycleLR", "options": {"total_steps": 3}}},
            "OneCycleLR: Tried to step",
        ),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, sections, message):
    with pytest.raises(Error, match=message) as raised:
        trained(tmp_path, **sections)
    assert raised.value.hint and "\n" not in str(raised.value)


def test_a_plateau_needs_a_metric(tmp_path):
    class Blind(Line):
        def data(self, config):
            return {"train": {"x": X, "y": Y}}

    with pytest.raises(Error, match="no validation samples"):
        trainer_of(tmp_path, task=Blind(), schedule={"name": "ReduceLROnPlateau"})


@pytest.mark.parametrize("name", OPTIMIZERS.names(builtin_alone=True))
def test_every_optimizer_of_torch_can_be_named(name):
    model = nn.Linear(3, 2, bias=False)
    made = optimizer_of(OptimizerConfig(name=name), model)
    plain = getattr(torch.optim, name)(model.parameters())
    mine, theirs = ({k: v for k, v in o.param_groups[0].items() if k != "params"}
                    for o in (made, plain))  # fmt: skip
    assert mine == theirs  # torch's own defaults


def test_what_is_set_survives_a_file(tmp_path):
    """A run's config.toml, given again, makes the same optimizer."""
    for name, key in itertools.product(("sgd", "SGD", "Adam"), ("lr", "momentum", "betas")):
        values = {"lr": 0.5, "momentum": 0.25, "betas": [0.5, 0.75]}
        config = resolve([("a", {"optimizer": {"name": name, key: values[key]}})])
        (tmp_path / "config.toml").write_text(config.to_toml())
        again = resolve([("file", read_toml(tmp_path / "config.toml"))])
        made, remade = (
            optimizer_of(each.optimizer, nn.Linear(2, 2)).param_groups for each in (config, again)
        )
        for one, other in zip(made, remade, strict=True):
            assert {**one, "params": 0} == {**other, "params": 0}
            if key in one:
                assert one[key] == config.optimizer.model_dump()[key]
