"""Ways to train one model on several ranks, ours and others', each a rank's step; see peers.py.

Every case gets a model with the same weights, the same optimizer, and its rank's half of the same
batches. Each other's script is what its documentation shows, with the settings it recommends for
speed where they leave the result as it is.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from benchmarks.harness.processes import end_with_parent
from benchmarks.peers_models import MODELS, Kind
from hpctrain.world.launcher import detect

LR = 0.01
MOMENTUM = 0.9
LARGE_MB = 100  # of a bucket: about all gradients in one
WARM_UP = 2
COMPRESSIONS = ("fp16", "bf16", "int8", "topk:0.01", "powersgd:1", "powersgd:4")
POOL = 4  # batches, taken in turn
SAMPLED = 97  # every so many-th parameter is compared
Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Case = Callable[
    ["Place", nn.Module, torch.optim.Optimizer], contextlib.AbstractContextManager[Step]
]


class Place(NamedTuple):
    """Where a rank is.

    Attributes:
        rank: Its number.
        size: How many there are.
        meeting: A file that is not there yet, by which ranks may find each other.
        device: What it computes on.
    """

    rank: int
    size: int
    meeting: str
    device: torch.device


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """Return every case's optimizer."""
    return torch.optim.SGD(parameters, lr=LR, momentum=MOMENTUM, fused=True)


def training_step(model: nn.Module, optimizer: Any) -> Step:
    """Return a step as it is written by all who wrap the optimizer or the model."""

    def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss

    return step


@contextlib.contextmanager
def hpctrain(
    place: Place, model: nn.Module, optimizer: torch.optim.Optimizer, name: str, **settings: Any
) -> Iterator[Step]:
    """Train by a strategy of hpctrain as a user with a loop of their own has it."""
    from hpctrain import init, strategy

    how = strategy(name, init(), **settings)
    yield training_step(model, how.wrap(model, optimizer))
    how.world.comm.close()


@contextlib.contextmanager
def ps(
    place: Place, model: nn.Module, optimizer: torch.optim.Optimizer, compression: str = "none"
) -> Iterator[Step]:
    """Train by our parameter server, a server in every worker's process: as many as the others."""
    from hpctrain.config import PsConfig

    config = PsConfig(servers=place.size, colocate=True, compression=compression)
    with hpctrain(place, model, optimizer, "ps", ps=config) as step:
        yield step


@contextlib.contextmanager
def horovod(
    place: Place, model: nn.Module, optimizer: torch.optim.Optimizer, compression: str = "none"
) -> Iterator[Step]:
    """Our all-reduce."""
    from hpctrain.config import HorovodConfig

    config = HorovodConfig(compression=compression)
    with hpctrain(place, model, optimizer, "horovod", config=config) as step:
        yield step


Hook = Callable[[Any], None]
"""Gives a wrapped model a hook that compresses what it sends."""


def fp16_hook(wrapped: Any) -> None:
    """PyTorch's own: 16 bits on the wire, and in the sum."""
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    wrapped.register_comm_hook(None, default_hooks.fp16_compress_hook)


def powersgd_hook(wrapped: Any, rank: int) -> None:
    """PyTorch's own, with feedback and warm start; its first two steps are dense at the least."""
    from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

    state = powerSGD_hook.PowerSGDState(
        None, matrix_approximation_rank=rank, start_powerSGD_iter=WARM_UP
    )
    wrapped.register_comm_hook(state, powerSGD_hook.powerSGD_hook)


@contextlib.contextmanager
def ddp(
    place: Place,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    bucket_mb: int | None = None,
    hook: Hook | None = None,
) -> Iterator[Step]:
    """Train by PyTorch's DistributedDataParallel, over gloo, or over nccl on GPUs.

    Without copies of gradients (``gradient_as_bucket_view``), with a graph that never changes
    (``static_graph``), and without sending running statistics, which none of the others do.
    """
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    backend = "nccl" if place.device.type == "cuda" else "gloo"
    method = f"file://{place.meeting}"
    distributed.init_process_group(
        backend, init_method=method, rank=place.rank, world_size=place.size
    )
    wrapped = DistributedDataParallel(
        model,
        bucket_cap_mb=bucket_mb,
        gradient_as_bucket_view=True,
        static_graph=True,
        broadcast_buffers=False,
    )
    KEPT.append(wrapped)
    if hook is not None:
        hook(wrapped)
    yield training_step(wrapped, optimizer)
    distributed.destroy_process_group()


@contextlib.contextmanager
def stock_horovod(
    place: Place, model: nn.Module, optimizer: torch.optim.Optimizer
) -> Iterator[Step]:
    """Train by Horovod's own optimizer, with its default of fusing tensors up to 128 MB."""
    import horovod.torch as hvd

    hvd.init()
    wrapped = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    yield training_step(model, wrapped)  # to shut Horovod down would end MPI for good


class RpcServer:
    """Sums the gradients of all workers, updates, and answers all at once.

    After PyTorch's tutorial "Implementing Batch RPC Processing Using Asynchronous Executions", but
    answers parameters instead of a pickled module.
    """

    def __init__(self, model: nn.Module, workers: int) -> None:
        self.parameters = list(copy.deepcopy(model).parameters())
        self.optimizer = sgd(self.parameters)
        self.workers = workers
        self.lock = threading.Lock()
        self.came: list[list[torch.Tensor]] = []
        self.answer: torch.futures.Future[list[torch.Tensor]] = torch.futures.Future()

    def update(self, gradients: list[torch.Tensor]) -> torch.futures.Future[list[torch.Tensor]]:
        """Take a worker's gradients; what is returned is done when all have come."""
        with self.lock, torch.no_grad():
            answer = self.answer
            self.came.append(gradients)
            if len(self.came) == self.workers:
                first, *others = self.came
                for parameter, gradient, *more in zip(self.parameters, first, *others, strict=True):
                    for other in more:
                        gradient.add_(other)
                    parameter.grad = gradient.div_(self.workers)
                self.optimizer.step()
                self.came, self.answer = [], torch.futures.Future()
                answer.set_result([parameter.detach() for parameter in self.parameters])
        return answer


_rpc_server: list[RpcServer] = []


@torch.distributed.rpc.functions.async_execution
def rpc_update(gradients: list[torch.Tensor]) -> torch.futures.Future[list[torch.Tensor]]:
    """Pass a worker's gradients to the server in this process."""
    return _rpc_server[0].update(gradients)


@contextlib.contextmanager
def torch_rpc(place: Place, model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Step]:
    """Train by a parameter server of PyTorch's RPC, in the first worker's process."""
    from torch.distributed import rpc

    if place.rank == 0:
        _rpc_server[:] = [RpcServer(model, place.size)]
    options = rpc.TensorPipeRpcBackendOptions(
        init_method=f"file://{place.meeting}", rpc_timeout=120
    )
    rpc.init_rpc(
        str(place.rank), rank=place.rank, world_size=place.size, rpc_backend_options=options
    )
    parameters = list(model.parameters())

    def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        model.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        weights = rpc.rpc_sync("0", rpc_update, args=([p.grad for p in parameters],))
        with torch.no_grad():
            for parameter, value in zip(parameters, weights, strict=True):
                parameter.copy_(value)
        return loss

    yield step
    rpc.shutdown()


CASES: dict[str, Case] = {
    "horovod": horovod,
    "ps": ps,
    "ddp": ddp,
    f"ddp_{LARGE_MB}": partial(ddp, bucket_mb=LARGE_MB),
    "stock_horovod": stock_horovod,
    "torch_rpc": torch_rpc,
    **{f"horovod_{each}": partial(horovod, compression=each) for each in COMPRESSIONS},
    "ddp_fp16": partial(ddp, hook=fp16_hook),
    "ddp_powersgd:1": partial(ddp, hook=partial(powersgd_hook, rank=1)),
    "ddp_powersgd:4": partial(ddp, hook=partial(powersgd_hook, rank=4)),
}


def sample(model: nn.Module, before: torch.Tensor | None = None) -> torch.Tensor:
    """Return some of all parameters, less what they were before."""
    flat = nn.utils.parameters_to_vector(model.parameters()).detach()[::SAMPLED].cpu().double()
    return flat if before is None else flat - before


def train(case: Case, kind: Kind, place: Place, steps: int) -> tuple[dict[str, Any], torch.Tensor]:
    """Train, time each step, and say how far a sample of the parameters has come."""
    torch.manual_seed(0)
    model = kind.build().to(place.device)
    before = sample(model)
    draws = torch.Generator().manual_seed(1)
    x = torch.randn(POOL, place.size, kind.batch, *kind.shape, generator=draws)
    y = torch.randint(10, (POOL, place.size, kind.batch), generator=draws)
    x, y = x[:, place.rank].to(place.device), y[:, place.rank].to(place.device)
    times, losses = [], []
    with case(place, model, sgd(model.parameters())) as step:
        for number in range(WARM_UP + steps):
            began = time.perf_counter()
            loss = step(x[number % POOL], y[number % POOL])
            losses.append(loss.item())  # which waits for a GPU
            times.append(1e3 * (time.perf_counter() - began))
        moved = sample(model, before)
    return {"times_ms": times[WARM_UP:], "losses": losses}, moved


KEPT: list[nn.Module] = []
"""What would hang for good if it were taken apart: the last to hold a process group of gloo's ends
it with Python's lock in hand, for which that group's own thread may be waiting."""


def take_cores(rank: int, size: int) -> None:
    """Have an emulated host's rank run on its share of this host's cores."""
    all_cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, all_cores[rank::size] or all_cores)
    torch.set_num_threads(max(1, len(all_cores) // size))


def child(name: str, models: str, steps: str, folder: str, own_cores: str) -> None:
    """Be a rank of a case: measure, write that, and a sample of the parameters."""
    end_with_parent()
    launch = detect()
    if own_cores == "own":
        take_cores(launch.rank, launch.size)
    else:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // launch.local_size))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", launch.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    for kind in models.split(","):
        place = Place(launch.rank, launch.size, f"{folder}/{kind}.meeting", device)
        record, moved = train(CASES[name], MODELS[kind], place, int(steps))
        np.save(f"{folder}/{kind}.{launch.rank}.npy", moved.numpy())
        Path(f"{folder}/{kind}.{launch.rank}.json").write_text(json.dumps(record))
    if KEPT:
        os._exit(0)


if __name__ == "__main__":
    child(*sys.argv[1:])
