"""Training runs that benchmarks make within the ranks they are on, and what their reports share."""

from __future__ import annotations

import contextlib
import io
from typing import Any, NamedTuple

from benchmarks.harness.command import Arguments
from benchmarks.harness.processes import scratch
from hpctrain.errors import Error
from hpctrain.process import cores
from hpctrain.report.compare import records_of
from hpctrain.world.launcher import Launch, detect

Line = dict[str, Any]
STRATEGIES = ("single", "horovod", "ps:sync", "ps:ssp:3", "ps:async")


class Known(NamedTuple):
    """A task that benchmarks train.

    Attributes:
        spec: As `hpctrain train` takes it.
        emulated: The same, with an option ``sample_ms`` to sleep for; None: there is none.
        batch: Samples of a rank's step.
        steps: Between lines of the log.
        bundled: Whether it has samples of its own.
    """

    spec: str
    emulated: str | None
    batch: int
    steps: int
    bundled: bool = False


TASKS = {
    "digits": Known("digits", "benchmarks.stragglers_tasks:Digits", 64, 20, True),
    "cifar10": Known("cifar10", "benchmarks.stragglers_tasks:Cifar10", 128, 2),
    "perceptron": Known(
        "benchmarks.training_tasks:Perceptron",
        "benchmarks.training_tasks:EmulatedPerceptron",
        64,
        6,
        True,
    ),
}


def known(task: str) -> Known:
    """Return a task by its name here, or any that `hpctrain train` takes."""
    return TASKS.get(task, Known(task, None, 64, 10))


class Case(NamedTuple):
    """A strategy on some ranks.

    Attributes:
        strategy: As it was asked for.
        ranks: All of them.
        workers: Those that compute.
        layer: Its configuration.
    """

    strategy: str
    ranks: int
    workers: int
    layer: dict[str, Any]


def case_of(strategy: str, ranks: int, servers: int) -> Case | None:
    """Return a strategy on some ranks; None where it cannot be.

    Args:
        strategy: ``single``, ``horovod`` or ``ps:CONSISTENCY``.
        ranks: Of the launcher.
        servers: Of these, for a parameter server alone; 0: a thread of every worker is one.

    Raises:
        Error: There is no such strategy.
    """
    name, _, consistency = strategy.partition(":")
    if name == "single":
        return Case(strategy, ranks, 1, {"strategy": name}) if ranks == 1 else None
    if name == "horovod" and not consistency:
        return Case(strategy, ranks, ranks, {"strategy": name})
    if name == "ps":
        from hpctrain.ps.consistency import parse

        parse(consistency)
        if servers >= ranks:
            return None
        ps = {"consistency": consistency, "servers": servers or ranks, "colocate": servers == 0}
        return Case(strategy, ranks, ranks - servers, {"strategy": name, "ps": ps})
    raise Error(f"there is no strategy {strategy}.", hint=f"there are {', '.join(STRATEGIES)}.")


def cases(arguments: Arguments, ranks: int) -> list[Case]:
    """Return the strategies asked for that there are on so many ranks."""
    found = (case_of(each, ranks, arguments.servers) for each in arguments.strategies)
    return [each for each in found if each is not None]


def train(task: str, arguments: Arguments, layer: dict[str, Any]) -> list[Line]:
    """Run one `hpctrain train` within this process; every rank of the world calls this.

    Args:
        task: To train.
        arguments: Of the benchmark: data, emulation, timeout.
        layer: Configuration.

    Returns:
        Its metrics.jsonl, on rank 0; elsewhere nothing.

    Raises:
        Error: It cannot be done.
    """
    from hpctrain import run as training
    from hpctrain.config import read_environment

    setting = known(task)
    layer = {"task": setting.spec, "timeout_seconds": arguments.timeout, **layer}
    layer["log"] = {"tensorboard": False, **layer.get("log", {})}
    layer["checkpoint"] = {"every_steps": 10**9}
    if arguments.emulate is not None:
        layer |= {"task": setting.emulated, "options": {"sample_ms": arguments.emulate}}
    if arguments.data is not None and not setting.bundled:
        layer["data"] = {"path": str(arguments.data)}
    with scratch() as nowhere, contextlib.redirect_stdout(io.StringIO()):
        folder = nowhere / "run"
        layer["out"] = str(folder)
        config = training.configure([("benchmark", layer), ("environment", read_environment())])
        training.run(config, lambda text: None)
        return records_of(folder) if detect().rank == 0 else []


def about(task: str, case: Case, arguments: Arguments, launch: Launch) -> Line:
    """Return what a line begins with."""
    return {
        "task": task,
        "strategy": case.strategy,
        "ranks": case.ranks,
        "workers": case.workers,
        "threads": arguments.threads,
        "emulated_compute": arguments.emulate is not None,
        "oversubscribed": launch.local_size * arguments.threads > cores(),
        "launcher": launch.name,
        "nodes": -(-launch.size // launch.local_size),
    }
