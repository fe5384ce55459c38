"""A small transformer trained on a mesh beside one process, in float64: by tests, and as a program.

    mpirun -np 4 python -m tests.meshes dp=2,pp=2 dp=2,tp=2

Each mesh trains with clipping, uneven parts, ranks without samples, and several passes a step. Then
its parameters and its optimizer's state are those of one process, and another mesh that begins with
them has the same bits.
"""

import contextlib
import functools
import sys

import torch

import hpctrain
from hpctrain.data.loader import Loader
from hpctrain.strategies.mesh import Mesh, MeshConfig
from hpctrain.tasks.gpt import Gpt
from hpctrain.train import compiler
from hpctrain.train.step import jointly
from hpctrain.world.launcher import ALONE
from hpctrain.world.world import World
from tests.waiting import SECONDS

compiler.import_when_wanted()

TOLERANCE = 1e-12
STEPS = 10


class Work:
    """What a trainer gives a strategy to compute with."""

    def __init__(self, task):
        self.task = task

    def loss(self, model, batch, *, training):
        loss, means = self.task.loss(model, batch)
        return loss, {"loss": loss.detach(), **means}

    def weight(self, batch):
        return float(batch.samples)

    def arithmetic(self):
        return contextlib.nullcontext()


def task_of(**options):
    return Gpt(width=16, layers=3, heads=4, context=8, **options)


def made(task):
    """The model and its optimizer: two groups, of which one decays; one parameter is frozen."""
    torch.manual_seed(0)
    model = task.model().double()
    next(p for n, p in model.named_parameters() if n.endswith("norm2.bias")).requires_grad = False
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return model, torch.optim.AdamW(groups, lr=0.01)


def loader(world):
    """41 samples in batches of 5: the last of an epoch has one, so some ranks have none."""
    tokens = torch.randint(0, 256, (41, 9), generator=torch.Generator().manual_seed(1))
    return Loader({"tokens": tokens}, 5, world=world, workers=0)


def train(strategy, task, accumulate=2):
    """Train; what rank 0 has then: the model's parameters by name, and the optimizer's state."""
    model, inner = made(task)
    optimizer = strategy.wrap(model, inner, clip_norm=0.3)
    work = Work(task)
    count = 0.0
    for _, batch in zip(range(STEPS), endless(loader(strategy.world)), strict=False):
        optimizer.zero_grad()
        parts = jointly(batch, accumulate)
        if not strategy.joint_passes:
            parts = list(batch.split(max(1, min(accumulate, batch.samples))))
        for number, part in enumerate(parts, start=1):
            with contextlib.nullcontext() if number == len(parts) else optimizer.no_sync():
                computed = optimizer.forward_backward(work, model, part, part.weight)
                count += sum(each.samples for each in computed)
        optimizer.step()
    strategy.check_parameters(model)
    seen = torch.tensor([count])
    strategy.world.comm.all_reduce(seen)
    with torch.no_grad():
        found = optimizer.evaluate(work, model, next(iter(loader(strategy.world))))
    parameters = optimizer.world_parameters() or {p: p.detach() for p in model.parameters()}
    named = {n: parameters[p] for n, p in model.named_parameters() if p in parameters}
    return named, optimizer.world_state(), (float(seen), found, float(optimizer.grad_norm))


def endless(batches):
    while True:
        yield from batches


def on_mesh(text, action):
    """Do something on a mesh such as ``dp=2,shard=parameters``; every rank calls this."""
    values = dict(pair.split("=") for pair in text.split(","))
    config = MeshConfig(**{k: int(v) if v.isdigit() else v for k, v in values.items()})
    strategy = Mesh(hpctrain.init(), config, timeout_seconds=SECONDS)
    try:
        return strategy, action(strategy)
    finally:
        strategy.world.comm.close()


def worst(found, expected):
    """The largest difference of two dicts of tensors, as a part of the norm."""
    assert found.keys() == expected.keys()
    return max(
        float((found[n] - e).norm() / e.norm().clamp(min=1e-30)) for n, e in expected.items()
    )


def flat(state):
    return {
        f"{number}.{name}": value.double()
        for number, values in state["state"].items()
        for name, value in values.items()
    }


@functools.cache
def alone():
    """The same training in one process."""
    task = task_of()
    return train(hpctrain.strategy("single", World(ALONE)), task, accumulate=1)


def check_parity(text):
    """Every rank calls this."""
    task = task_of()
    strategy, (named, state, (seen, _, norm)) = on_mesh(
        text, lambda s: train(prepared(s, task), task)
    )
    assert seen == 41 + 5  # samples of ten steps, each counted once
    if strategy.world.launch.rank == 0:
        expected, its, (_, _, its_norm) = alone()
        assert worst(named, expected) <= TOLERANCE
        assert worst(flat(state), flat(its)) <= TOLERANCE
        assert state["param_groups"] == its["param_groups"]
        assert abs(norm - its_norm) <= TOLERANCE * its_norm
    return named, state


def prepared(strategy, task):
    strategy.task = task
    return strategy


def check_handed_on(named, state, text):
    """What one mesh saved is, bit for bit, what another begins with and would save."""
    task = task_of()

    def begin(strategy):
        model, inner = made(task)
        if strategy.world.leads:
            model.load_state_dict({**model.state_dict(), **named}, strict=False)
            inner.load_state_dict(state)
        optimizer = prepared(strategy, task).wrap(model, inner)
        values = optimizer.world_parameters()
        kept = {n: values[p] for n, p in model.named_parameters() if p in values}
        return kept, optimizer.world_state()

    strategy, (kept, its) = on_mesh(text, begin)
    if strategy.world.launch.rank == 0:
        assert all(torch.equal(kept[n], value) for n, value in named.items())
        ours, theirs = flat(state), flat(its)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[n], value) for n, value in theirs.items())


def main():
    """Each mesh of the command line, and what the first hands to the last."""
    meshes = sys.argv[1:]
    saved = [check_parity(text) for text in meshes]
    check_handed_on(*saved[0], meshes[-1])
    print("parity:", *meshes, flush=True)


if __name__ == "__main__":
    main()
