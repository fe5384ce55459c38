"""Measure a task here, in one process and a few seconds: what the cost model needs to know."""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from hpctrain.compression.codec import ErrorFeedback, make_codec
from hpctrain.config import RunConfig
from hpctrain.costmodel.inputs import Buckets
from hpctrain.costmodel.strategies import Compression
from hpctrain.data.batch import Batch
from hpctrain.data.loader import Loader
from hpctrain.data.random import key
from hpctrain.errors import Error
from hpctrain.optim.lamb import Lamb
from hpctrain.process import cores
from hpctrain.tasks.task import TaskTransform, load_task, make_task
from hpctrain.train.step import DTYPES, applied
from hpctrain.world.world import World, init

WARM_UP, LEAST, MOST = 2, 5, 200
REPEATS = 5


class Measured(NamedTuple):
    """One rank's step without exchange. Times are medians, in seconds.

    Attributes:
        device: Where it ran.
        threads: Of torch, on a CPU.
        samples: Of a batch.
        steps: How many were timed.
        parameter_bytes: Of the gradients.
        forward_seconds: Of a step.
        backward_seconds: Of a step.
        update_seconds: Of a step, by the optimizer.
        flat_update_seconds: That, had all parameters been one tensor, as servers have them.
        low_seconds: Lower quartile of forward and backward together.
        high_seconds: The upper one.
        jitter: Standard deviation by mean, as the quartiles have it.
        buckets: When gradients were ready, in buckets as the strategy horovod fills them.
        load: Processes that wanted a core before.
        copy_bytes_per_second: From memory to memory.
        reduce_seconds_per_byte: Adding one vector to another.
    """

    device: str
    threads: int
    samples: int
    steps: int
    parameter_bytes: float
    forward_seconds: float
    backward_seconds: float
    update_seconds: float
    flat_update_seconds: float
    low_seconds: float
    high_seconds: float
    jitter: float
    buckets: Buckets
    load: float
    copy_bytes_per_second: float
    reduce_seconds_per_byte: float


class _Step(NamedTuple):
    forward: float
    backward: float
    update: float


def measure(config: RunConfig, seconds: float, ranks_per_node: int) -> Measured:
    """Train for a while with ``train.batch_size`` samples a step, and forget the result.

    Args:
        config: Of the task; its global batch is taken as one rank's.
        seconds: To measure for, after some steps to warm up.
        ranks_per_node: Among which the cores here are divided.

    Raises:
        Error: The task or its data cannot be loaded, or this is not the only process.
    """
    load = os.getloadavg()[0]
    world = init()
    if world.size > 1:
        raise Error(
            f"hpctrain advise on {world.size} ranks: it measures one.",
            hint="start it without a launcher.",
        )
    torch.set_num_threads(max(1, cores() // ranks_per_node))
    task = make_task(load_task(config.task), config.options)
    torch.manual_seed(key(config.seed, -1, 0))
    model = task.model().to(world.device, DTYPES[config.train.dtype]).train()
    optimizer = task.optimizer(model, config.optimizer)
    loader = Loader(
        task.data(config.data)["train"],
        config.train.batch_size,
        seed=config.seed,
        shuffle=config.data.order,
        transform=TaskTransform(task, True, config.task, config.options),
        workers=config.data.workers,
        worker_kind=config.data.worker_kind,
    )
    ready = _Ready(optimizer, world)
    steps: list[_Step] = []
    begun = time.perf_counter()
    for number, batch in enumerate(_batches(loader)):
        if number == WARM_UP:
            begun = time.perf_counter()
        optimizer.zero_grad()
        marks = [_now(world)]
        result = applied(task.loss, model, batch, world.device, config.train.dtype)
        loss = result[0] if isinstance(result, tuple) else result
        marks.append(_now(world))
        ready.begin()
        loss.backward()
        marks.append(_now(world))
        ready.end()
        optimizer.step()
        marks.append(_now(world))
        if number >= WARM_UP:
            steps.append(_Step(*(b - a for a, b in itertools.pairwise(marks))))
        over = time.perf_counter() - begun > seconds
        if (over and len(steps) >= LEAST) or len(steps) >= MOST:
            break
    loader.close()
    low, middle, high = statistics.quantiles([s.forward + s.backward for s in steps], n=4)
    size = ready.bytes
    vector = torch.zeros(max(1, size // 4), device=world.device)
    other = torch.ones_like(vector)
    copying = _median_seconds(lambda: vector.copy_(other), world)
    adding = _median_seconds(lambda: vector.add_(other), world)
    return Measured(
        device=str(world.device),
        threads=torch.get_num_threads(),
        samples=config.train.batch_size,
        steps=len(steps),
        parameter_bytes=float(size),
        forward_seconds=statistics.median(s.forward for s in steps),
        backward_seconds=statistics.median(s.backward for s in steps),
        update_seconds=statistics.median(s.update for s in steps),
        flat_update_seconds=_flat_update(optimizer, vector, world),
        low_seconds=low,
        high_seconds=high,
        jitter=(high - low) / 1.349 / middle,
        buckets=ready.buckets(config.horovod.bucket_bytes),
        load=load,
        copy_bytes_per_second=size / copying,
        reduce_seconds_per_byte=adding / size,
    )


def codec(name: str, parameter_bytes: float) -> Compression:
    """Measure what a codec of ``ps.compression`` does to gradients, on this CPU.

    Args:
        name: Of the codec.
        parameter_bytes: Of the gradients to try it on.

    Raises:
        Error: There is no such codec.
    """
    made = make_codec(name)
    assert made is not None
    gradient = torch.randn(max(1, int(parameter_bytes) // 4))
    size = 4 * gradient.numel()
    encoded = torch.empty(made.capacity(gradient.numel(), 4), dtype=torch.uint8)
    # What is left out has to be remembered, which takes time too.
    fed_back = made.feedback
    encoder = ErrorFeedback(made, gradient.numel(), gradient.dtype) if fed_back else made
    encode = _median_seconds(lambda: encoder.encode(gradient, encoded), None)
    decode = _median_seconds(lambda: made.decode(encoded, gradient), None)
    return Compression(name, encoded.numel() / size, encode / size, decode / size)


def _flat_update(optimizer: torch.optim.Optimizer, vector: torch.Tensor, world: World) -> float:
    """Time the update of one tensor as long as all parameters, by an optimizer of that kind."""
    flat = torch.zeros_like(vector, requires_grad=True)
    flat.grad = torch.zeros_like(vector)
    momentum = optimizer.defaults.get("momentum", 0.0)
    single: torch.optim.Optimizer = torch.optim.AdamW([flat])
    if isinstance(optimizer, torch.optim.SGD):
        single = torch.optim.SGD([flat], lr=1.0, momentum=momentum)
    elif isinstance(optimizer, Lamb):
        single = Lamb([flat])
    return _median_seconds(lambda: single.step(), world)


class _Ready:
    """Notes when each parameter's gradient is ready."""

    def __init__(self, optimizer: torch.optim.Optimizer, world: World) -> None:
        groups = optimizer.param_groups
        trained = [p for group in groups for p in group["params"] if p.requires_grad]
        self.bytes = sum(p.numel() * p.element_size() for p in trained)
        self._world = world
        self._begun = self._ended = 0.0
        self._noted: list[tuple[float, int]] = []
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(self._note)

    def begin(self) -> None:
        """Take note that backward begins."""
        self._noted.clear()
        self._begun = time.perf_counter()

    def end(self) -> None:
        """Take note that backward has ended."""
        self._ended = time.perf_counter()

    def _note(self, parameter: torch.Tensor) -> None:
        size = parameter.numel() * parameter.element_size()
        self._noted.append((time.perf_counter() - self._begun, size))

    def buckets(self, bucket_bytes: int) -> Buckets:
        """Return how far the last backward was when each bucket was full, and each one's share.

        On a GPU backward is only launched from here, so there it is the order of launches.
        """
        whole, held, found = self._ended - self._begun, 0, []
        for place, (moment, size) in enumerate(self._noted, start=1):
            held += size
            if held >= bucket_bytes or place == len(self._noted):
                found.append((min(1.0, moment / whole), held / self.bytes))
                held = 0
        return tuple(found)


def _batches(loader: Loader) -> Iterator[Batch]:
    while True:
        for batch in loader:
            if batch.samples == loader.batch_size or loader.samples < loader.batch_size:
                yield batch


def _now(world: World | None) -> float:
    if world is not None and world.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _median_seconds(action: Callable[[], object], world: World | None) -> float:
    times = []
    for _ in range(REPEATS + 1):
        begun = _now(world)
        action()
        times.append(_now(world) - begun)
    return statistics.median(times[1:])
