"""What people do between backward() and step() ends as in one process, with every strategy."""

import runpy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import hpctrain
from hpctrain.config import PsConfig
from tests.waiting import SECONDS

BATCH, STEPS = 12, 6


def model_of(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)
    ).double()


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.01)


def halve(parameter):
    parameter.grad.mul_(0.5)


class Loop:
    """A plain loop; what a habit does otherwise is a method of the same name as a point in it."""

    reentrant = None

    def __init__(self, model, make):
        self.model = model
        self.optimizer = make(model.parameters())
        self.inner = self.optimizer

    def prepare(self):
        pass

    def wrapped(self):
        pass

    def forward(self, x, step):
        return self.model(x)

    def backward(self, x, y, share, step):
        (self.loss(x, y, step) * share).backward()

    def loss(self, x, y, step):
        return nn.functional.mse_loss(self.forward(x, step), y)

    def change(self, step):
        pass

    def before(self, step):
        self.optimizer.zero_grad()

    def steps(self, step):
        return True

    def run(self, rank=0, size=1):
        for step in range(STEPS):
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(BATCH, 5, generator=generator, dtype=torch.float64)
            y = torch.randn(BATCH, 2, generator=generator, dtype=torch.float64)
            mine = slice(BATCH * rank // size, BATCH * (rank + 1) // size)
            self.before(step)
            x, y = x[mine], y[mine]
            self.backward(x, y, len(x) * size / BATCH, step)
            self.change(step)
            if self.steps(step):
                self.optimizer.step()
        return self.model


class Plain(Loop):
    """Nothing."""


class ClipNorm(Loop):
    def change(self, step):
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)


class ClipValue(Loop):
    def change(self, step):
        nn.utils.clip_grad_value_(self.model.parameters(), 0.02)


class Sign(Loop):
    def change(self, step):
        for parameter in self.model.parameters():
            parameter.grad.sign_()


class Replaced(Loop):
    def change(self, step):
        for parameter in self.model.parameters():
            parameter.grad = parameter.grad.clamp(-0.02, 0.02)


class Drop(Loop):
    def change(self, step):
        if step % 2:
            for parameter in self.model[0].parameters():
                parameter.grad = None


class Skip(Loop):
    def steps(self, step):
        return step != 3


class Twice(Loop):
    def backward(self, x, y, share, step):
        for part in range(2):
            (nn.functional.mse_loss(self.model(x)[:, part], y[:, part]) * share).backward()


class Retained(Loop):
    def backward(self, x, y, share, step):
        loss = self.loss(x, y, step) * share
        loss.backward(retain_graph=True)
        loss.backward()


class ZeroNotNone(Loop):
    def before(self, step):
        self.optimizer.zero_grad(set_to_none=False)


class ModelZero(Loop):
    def before(self, step):
        self.model.zero_grad()


class Accumulated(Loop):
    """Over two steps."""

    def before(self, step):
        if step % 2 == 0:
            self.optimizer.zero_grad()

    def backward(self, x, y, share, step):
        if step % 2 == 0 and self.optimizer is not self.inner:
            with self.optimizer.no_sync():
                super().backward(x, y, share, step)
        else:
            super().backward(x, y, share, step)

    def steps(self, step):
        return step % 2 == 1


class Alternate(Loop):
    """A part has no gradient in some steps, on any rank."""

    def forward(self, x, step):
        return self.model[2:](self.model[:2](x).detach()) if step % 2 else self.model(x)


class Penalty(Loop):
    """A gradient penalty: a pass through the gradient."""

    def loss(self, x, y, step):
        x = x.clone().requires_grad_(True)
        out = self.model(x)
        (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        return nn.functional.mse_loss(out, y) + 0.1 * grad.square().sum(1).mean()


class Reentrant(Loop):
    """A block that is used twice, within checkpointing that runs passes within passes."""

    def forward(self, x, step):
        hidden = self.model[:2](x)
        for _ in range(2):
            hidden = checkpoint(self.model[2:4], hidden, use_reentrant=True)
        return self.model[4](hidden)


class AllReentrant(Loop):
    """No parameter is outside of checkpointing."""

    def forward(self, x, step):
        return checkpoint(self.model, x.requires_grad_(True), use_reentrant=True)


class HookBefore(Loop):
    def prepare(self):
        for parameter in self.model.parameters():
            parameter.register_post_accumulate_grad_hook(halve)


class HookAfter(Loop):
    def wrapped(self):
        for parameter in self.model.parameters():
            parameter.register_post_accumulate_grad_hook(halve)


class Unfreeze(Loop):
    def prepare(self):
        self.model[0].requires_grad_(False)

    def before(self, step):
        super().before(step)
        self.model[0].requires_grad_(step >= 3)


class Freeze(Loop):
    def before(self, step):
        super().before(step)
        self.model[2].requires_grad_(step < 3)


class ClampedData(Loop):
    """As the critic of a Wasserstein GAN has it."""

    def forward(self, x, step):
        for parameter in self.model.parameters():
            parameter.data.clamp_(-0.2, 0.2)
        return self.model(x)


class Shrunk(Loop):
    """A change that two workers may not both make to the same memory."""

    def change(self, step):
        with torch.no_grad():
            self.model[4].weight.mul_(0.9)


class PostHook(Loop):
    def prepare(self):
        def clamp(*_):
            for parameter in self.model.parameters():
                parameter.data.clamp_(-0.2, 0.2)

        self.optimizer.register_step_post_hook(clamp)


class PreHook(Loop):
    def prepare(self):
        def clip(*_):
            nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)

        self.optimizer.register_step_pre_hook(clip)


class Scaler(Loop):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)

    def backward(self, x, y, share, step):
        loss = self.loss(x, y, step) * share
        if step == 2:
            loss = loss * float("inf")
        self.scaler.scale(loss).backward()

    def steps(self, step):
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return False


class Overlapping(Loop):
    """Gradients are pushed while backward() computes: nothing is done to them."""

    def wrapped(self):
        self.optimizer.overlaps = True


class OverlappingReentrant(Reentrant):
    wrapped = Overlapping.wrapped


class OverlappingAlternate(Alternate):
    wrapped = Overlapping.wrapped


class OverlappingClamp(ClampedData):
    wrapped = Overlapping.wrapped


HABITS = [
    Plain, ClipNorm, ClipValue, Sign, Replaced, Drop, Skip, Twice, Retained, ZeroNotNone,
    ModelZero, Accumulated, Alternate, Penalty, Reentrant, AllReentrant, HookBefore, HookAfter,
    Unfreeze, Freeze, ClampedData, Shrunk, PostHook, PreHook, Scaler, Overlapping,
    OverlappingReentrant, OverlappingAlternate, OverlappingClamp,
]  # fmt: skip


@pytest.fixture(params=["horovod", "ps", "ps by messages"])
def make_strategy(request, strategy, world):
    """Strategies of one kind, closed in the end."""
    made = []

    def make(**options):
        if request.param == "horovod":
            return strategy
        config = PsConfig(
            servers=world.size,
            colocate=True,
            silence_seconds=SECONDS,
            shared_memory=request.param == "ps",
            **options,
        )
        made.append(hpctrain.strategy("ps", hpctrain.init(), ps=config, timeout_seconds=SECONDS))
        return made[-1]

    yield make
    for each in made:
        each.world.comm.close()


def assert_same(model, reference):
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert (ours - theirs).norm() <= 1e-11 * theirs.norm()


@pytest.mark.parametrize("habit", HABITS)
def test_habits(make_strategy, world, habit):
    for make in (sgd, adamw):
        plain = habit(model_of(), make)
        plain.prepare()
        plain.wrapped()
        expected = plain.run()
        loop = habit(model_of(100 * world.rank), make)
        loop.prepare()
        loop.optimizer = make_strategy().wrap(loop.model, loop.optimizer)
        loop.wrapped()
        assert_same(loop.run(world.rank, world.size), expected)


# A worker's parameters are the servers' own there, so those that it changes itself are refused.
UNCHANGED = [h for h in HABITS if h not in (ClampedData, Shrunk, PostHook, OverlappingClamp)]


@pytest.mark.parametrize("consistency", ["async", "ssp:1"])
@pytest.mark.parametrize("habit", UNCHANGED)
def test_habits_of_one_worker(world, habit, consistency):
    """Without lockstep one worker alone has an order that is known: that of one process."""
    plain = habit(model_of(), sgd)
    plain.prepare()
    plain.wrapped()
    expected = plain.run()
    config = PsConfig(servers=world.size - 1, consistency=consistency, silence_seconds=SECONDS)
    strategy = hpctrain.strategy("ps", hpctrain.init(), ps=config, timeout_seconds=SECONDS)
    if strategy.serves:
        strategy.serve()
        return
    loop = habit(model_of(), sgd)
    loop.prepare()
    loop.optimizer = strategy.wrap(loop.model, loop.optimizer)
    loop.wrapped()
    assert_same(loop.run(), expected)
    strategy.world.comm.close()


def test_two_optimizers_in_a_loop():
    """A generator and a discriminator over Horovod end as in one process."""
    folder = Path(__file__).parents[2] / "examples"
    ours, plain = (runpy.run_path(str(folder / f"{name}.py")) for name in ("gan", "gan_plain"))
    for name in ("make", "judge"):
        for one, other in zip(ours[name].parameters(), plain[name].parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
