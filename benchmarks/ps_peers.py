"""Ways to train parameters between two ranks, ours and others', and the limits; see ps.py.

A round takes the gradient of ResNet-50's 25,557,032 float32 parameters, makes a step of SGD with
momentum by PyTorch's fused kernel, and leaves rank 0 with the new parameters. What they are after
the last round has a closed form, and is checked. A case runs in processes of its own, each with one
thread for PyTorch's kernels. Rank 0 times its rounds, which ranks that work alike begin together;
writing the gradient, which a backward pass would do, is not timed. Between rounds it times a copy
of as many bytes, the yardstick of the same process.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.processes import (
    ROOT,
    Start,
    end_with_parent,
    module,
    on_ranks,
    scratch,
    why_failed,
)
from hpctrain.process import run

COUNT = 25_557_032
LR = 0.01
MOMENTUM = 0.9
WARM_UP = 3
TOLERANCE = 1e-5
CHILD = module("ps_peers", "--child")
TWO_RANKS = on_ranks(2)
Result = dict[str, Any]
Cases = Mapping[str, Callable[..., Result]]


def pattern(count: int = COUNT) -> torch.Tensor:
    """Return the mean of all ranks' gradients, unlike in neighbours so that a shift is seen."""
    return 1 + torch.arange(count, dtype=torch.float32).remainder_(5)


class Parameters:
    """The parameters, all zero at first, and their optimizer."""

    def __init__(self, count: int = COUNT) -> None:
        self.weights = torch.zeros(count)
        self.momentum = torch.zeros(count)
        self.steps = 0

    def step(self, gradient: torch.Tensor, lr: float = LR) -> None:
        """Make a step of SGD with momentum, in one pass over memory."""
        torch._fused_sgd_(
            [self.weights],
            [gradient],
            [self.momentum],
            weight_decay=0.0,
            momentum=MOMENTUM,
            lr=lr,
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,  # true would only copy, but the buffer starts at zero
        )
        self.steps += 1


def error_after(weights: torch.Tensor, steps: int) -> float:
    """Return the largest relative error of parameters after so many steps."""
    velocity = weight = 0.0
    for _ in range(steps):
        velocity = MOMENTUM * velocity + 1
        weight -= LR * velocity
    return float((weights / (weight * pattern(weights.numel())) - 1).abs().max())


def milliseconds(work: Callable[[], object]) -> float:
    """Return how long a call takes."""
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


def rounds_of(
    rounds: int,
    work: Callable[[], object],
    before: Callable[[], object] = lambda: None,
    *,
    yardstick: bool = True,
) -> Result:
    """Return the milliseconds of each round, after some that are not counted.

    Args:
        rounds: To be timed.
        work: What is timed.
        before: What is done before each, and not timed.
        yardstick: Whether to time copies too, before ``before``.
    """
    source, target = pattern(), torch.zeros(COUNT)
    times, copies = [], []
    for _ in range(WARM_UP + rounds):
        if yardstick:
            copies.append(milliseconds(lambda: target.copy_(source)))
        before()
        times.append(milliseconds(work))
    return {"times_ms": times[WARM_UP:], "memcpy_ms": copies[WARM_UP:]}


def memcpy(rounds: int, folder: Path) -> Result:
    """Time the yardstick: as many bytes as the parameters have, from one tensor to another."""
    source, target = pattern(), torch.zeros(COUNT)
    result = rounds_of(rounds, lambda: target.copy_(source))
    return {**result, "error": float((target - source).abs().max())}


def update(rounds: int, folder: Path) -> Result:
    """Time the other yardstick: the optimizer's step with nothing sent anywhere."""
    gradient, parameters = pattern(), Parameters()
    result = rounds_of(rounds, lambda: parameters.step(gradient))
    return {**result, "error": error_after(parameters.weights, parameters.steps)}


def mpi_allreduce(rounds: int, folder: Path) -> Result:
    """Have MPI sum the gradients in place; each rank updates its own parameters."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD

    def reduce(gradient: torch.Tensor) -> None:
        comm.Allreduce(MPI.IN_PLACE, gradient.numpy(), MPI.SUM)

    return all_reduce(rounds, comm, reduce)


def gloo(rounds: int, folder: Path) -> Result:
    """Have PyTorch's Gloo sum the gradients in place; each rank updates its own parameters.

    In one piece, which was the fastest of all sizes tried.
    """
    from mpi4py import MPI  # starts the processes and ends them together; moves none of the data
    from torch import distributed

    comm = MPI.COMM_WORLD
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=comm.rank, world_size=comm.size
    )
    try:
        return all_reduce(rounds, comm, distributed.all_reduce)
    finally:
        distributed.destroy_process_group()


def all_reduce(rounds: int, comm: Any, reduce: Callable[[torch.Tensor], object]) -> Result:
    """Time rounds of a sum over all ranks, in place, and the update."""
    parameters = Parameters()
    mine = pattern() * (2 * (comm.rank + 1) / (comm.size + 1))  # the mean over ranks is the pattern
    gradient = torch.empty_like(mine)

    def before() -> None:
        gradient.copy_(mine)
        comm.Barrier()

    def work() -> None:
        reduce(gradient)
        # The learning rate makes a mean of the sum, which spares a pass over memory.
        parameters.step(gradient, LR / comm.size)

    # One rank alone: two that copy at once share the memory's bandwidth.
    result = rounds_of(rounds, work, before, yardstick=comm.rank == 0)
    errors = comm.allgather(error_after(parameters.weights, parameters.steps))
    return {} if comm.rank else {**result, "error": max(errors)}


class RpcServer:
    """The server that the worker of ``torch_rpc`` has a remote reference to."""

    def __init__(self, slice_count: int) -> None:
        parts = torch.empty(COUNT).split(slice_count)
        self.parameters = [Parameters(part.numel()) for part in parts]

    def push_pull(self, number: int, gradient: torch.Tensor) -> torch.Tensor:
        """Update a slice by its gradient and return its parameters."""
        self.parameters[number].step(gradient)
        return self.parameters[number].weights


def torch_rpc(rounds: int, folder: Path, slice_count: int = COUNT) -> Result:
    """Time PyTorch's RPC over TensorPipe: a call with the gradient returns the parameters."""
    from mpi4py import MPI  # as in gloo
    from torch.distributed import rpc

    comm = MPI.COMM_WORLD
    rpc.init_rpc(
        ["worker", "server"][comm.rank],
        rank=comm.rank,
        world_size=2,
        rpc_backend_options=rpc.TensorPipeRpcBackendOptions(
            init_method=f"file://{folder}/meeting", rpc_timeout=120
        ),
    )
    result: Result = {}
    if comm.rank == 0:
        server = rpc.remote("server", RpcServer, args=(slice_count,)).rpc_async()
        gradient = pattern().split(slice_count)
        weights: list[torch.Tensor] = []

        def work() -> None:
            futures = [server.push_pull(number, part) for number, part in enumerate(gradient)]
            weights[:] = torch.futures.wait_all(futures)

        result = rounds_of(rounds, work)
        result["error"] = error_after(torch.cat(weights), WARM_UP + rounds)
    rpc.shutdown()
    return result


def torch_rpc_slices(rounds: int, folder: Path) -> Result:
    """Time PyTorch's RPC with slices of 4 MB, all on their way at once: the fastest tried."""
    return torch_rpc(rounds, folder, slice_count=2**20)


def connected(count: int, settings: dict[str, Any]) -> tuple[Any, Any, list[list[float]]]:
    """Return this rank of our parameter server, ready: ends, client, the rule's numbers.

    A server serves first, until all workers have left; its client is None.
    """
    from hpctrain.config import PsConfig
    from hpctrain.ps.endpoint import Endpoint
    from hpctrain.ps.partition.layout import Layout, Parameter, slice_bytes_for
    from hpctrain.ps.update_rules import rule_of

    ends = Endpoint(PsConfig(**settings))
    if ends.client is None:
        ends.serve()
        return ends, None, []
    layout, _ = Layout.of(
        [Parameter(torch.float32, 0, count)], slice_bytes_for(4 * count, len(ends.roles.servers))
    )
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=LR, momentum=MOMENTUM)
    rule = rule_of(optimizer)
    hyper = [rule.hyper(group) for group in optimizer.param_groups]
    return ends, ends.open(layout, rule, weights=[torch.zeros(count)]), hyper


def ours(
    rounds: int,
    folder: Path,
    *,
    count: int = COUNT,
    gradient: torch.Tensor | None = None,
    expected: Callable[[Any, int], torch.Tensor] | None = None,
    key: str | None = None,
    **settings: Any,
) -> Result:
    """Time our parameter server: a worker pushes its gradients, and pulls the weights.

    Args:
        rounds: To be timed.
        folder: Not used.
        count: Of parameters, for any number of workers.
        gradient: Of every worker; None: such that the mean is the pattern.
        expected: The weights after so many steps, given the layout too; None: the closed form's.
        key: To encrypt by.
        settings: Of ``PsConfig``.
    """
    from hpctrain.ps.protocol.cipher import VARIABLE
    from hpctrain.strategies.ps_communicator import PsCommunicator

    os.environ.pop(VARIABLE, None)
    os.environ.update({VARIABLE: key} if key else {})
    ends, client, hyper = connected(count, settings)
    from mpi4py import MPI  # not before: hpctrain.ps has settings that MPI reads at its start

    if client is None:
        MPI.COMM_WORLD.gather(0.0)
        return {}
    layout = client.layout
    client.exchange.moved_bytes = 0  # what opening took
    comm, workers = PsCommunicator(ends, 0, 1), len(ends.roles.workers)
    scale = 2 * (comm.rank + 1) / (workers + 1)
    mine = pattern(count) * scale if gradient is None else gradient

    def before() -> None:
        client.gradients[0].copy_(mine)
        if workers > 1:
            comm.barrier()

    def work() -> None:
        client.push_pull(1.0, hyper).wait()
        client.end()

    result = rounds_of(rounds, work, before, yardstick=workers == 1)
    weights, steps = client.weights[0], WARM_UP + rounds
    if expected is None:
        error = error_after(weights, steps)
    else:
        target = expected(layout, steps)
        error = float((weights - target).abs().max() / target.abs().max())
    loads = dict.fromkeys(ends.roles.servers, 0)
    for holders, size in zip(client.exchange.placement, layout.sizes(), strict=True):
        loads[holders[0]] += size
    result["moved_MB"] = client.exchange.moved_bytes / steps / 1e6
    result["server_MB"] = [load / 1e6 for load in loads.values()]
    ends.close()
    errors = MPI.COMM_WORLD.gather(error)
    return {} if errors is None else {**result, "error": max(errors)}


def compressed(gradient: torch.Tensor, name: str, layout: Any, steps: int) -> torch.Tensor:
    """Return the weights after so many steps with a gradient that a codec has changed."""
    from hpctrain.compression.codec import ErrorFeedback, make_codec

    codec = make_codec(name)
    assert codec is not None
    encoders: list[Any] = [
        ErrorFeedback(codec, piece.elements, gradient.dtype) if codec.feedback else codec
        for piece in layout.slices
    ]
    parameters, decoded = Parameters(), torch.empty_like(gradient)
    for _ in range(steps):
        for encoder, piece in zip(encoders, layout.slices, strict=True):
            part = slice(piece.start, piece.stop)
            out = torch.empty(codec.capacity(piece.elements, 4), dtype=torch.uint8)
            codec.decode(out[: encoder.encode(gradient[part], out)], decoded[part])
        parameters.step(decoded)
    return parameters.weights


CASES: Cases = {
    "memcpy": memcpy,
    "update": update,
    "mpi_allreduce": mpi_allreduce,
    "gloo": gloo,
    "torch_rpc": torch_rpc,
    "torch_rpc_slices": torch_rpc_slices,
    "messages": partial(ours, shared_memory=False),
    "shared": partial(ours, shared_memory=True),
}
ALONE = ("memcpy", "update")


def run_case(
    name: str,
    rounds: int,
    *,
    start: Start = TWO_RANKS,
    timeout_seconds: float = 300,
    command: Sequence[str] = CHILD,
    options: Mapping[str, Any] | None = None,
) -> Result:
    """Measure a case in processes of its own.

    Args:
        name: Of ``CASES``, or of what the command has.
        rounds: To be timed.
        start: Runs a command on two ranks, within a time limit; see ``ps_hosts`` for another one.
        timeout_seconds: After it, all processes of the case are killed.
        command: Runs a case by :func:`child`.
        options: More arguments of the case.

    Returns:
        ``times_ms`` of all rounds, their ``best_ms`` and ``median_ms``, and the largest relative
        ``error`` of a parameter; or why it ``failed``.
    """
    options = options or {}
    record: Result = {"benchmark": "ps_peers", "case": name, "rounds": rounds}
    record["bytes"] = 4 * options.get("count", COUNT)
    with scratch() as folder:
        command = [*command, name, str(rounds), str(folder), json.dumps(options)]
        if name in ALONE:
            done = run(command, timeout_seconds=timeout_seconds, cwd=ROOT)
        else:
            done = start(command, timeout_seconds)
        file = folder / "result.json"
        if done.returncode or not file.exists():
            return {**record, "failed": why_failed(done)}
        record.update(json.loads(file.read_text()))
    if not record["error"] < TOLERANCE:
        record["failed"] = f"wrong parameters: relative error {record['error']:g}"
    record["best_ms"] = min(record["times_ms"])
    record["median_ms"] = statistics.median(record["times_ms"])
    return record


def child(cases: Cases, name: str, rounds: str, folder: str, options: str) -> None:
    """Be a rank of a case; the one with a result writes it."""
    end_with_parent()
    torch.set_num_threads(1)
    result = cases[name](int(rounds), Path(folder), **json.loads(options))
    if result:
        (Path(folder) / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    child(CASES, *sys.argv[2:])
