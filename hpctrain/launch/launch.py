"""``hpctrain launch``: elastic ranks over Gloo, whose number is kept up."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

from hpctrain.elastic.driver_protocol import ADDRESS, KEY, new_key
from hpctrain.errors import Error
from hpctrain.launch.driver import Driver, listen
from hpctrain.launch.listener import Strangers
from hpctrain.launch.rendezvous import opener
from hpctrain.launch.starters import Pool, RankProcess, Srun, Ssh, Starter, address_for
from hpctrain.launch.worker_slots import WorkerSlots, place_variables
from hpctrain.process import search_path, which
from hpctrain.registry import Registry
from hpctrain.slurm import hosts

END_SECONDS = 10.0
"""So long ranks may take to end by themselves when the run is over."""

STARTERS = Registry("starter", "hpctrain.starters", {"here": "hpctrain.launch.starters:Here"})
"""By name, classes whose instances start so many ranks."""

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def way_for(
    count: int | None,
    named: str | None,
    pool: int | None,
    options: Sequence[str],
    logs: Path,
    starter: str | None = None,
) -> Starter:
    """Choose the starter of ranks by the options of the command line.

    Args:
        count: Of ranks on this host.
        named: Other hosts, such as ``a:2,b:2``.
        pool: Of jobs of one rank each.
        options: For sbatch.
        logs: Folder for those jobs' logs.
        starter: What starts ``count`` ranks in place of this host's processes.

    Raises:
        Error: Nothing says how, or more than one thing does.
    """
    if sum(each is not None for each in (count, named, pool)) > 1:
        raise Error("-np, --hosts and --pool exclude one another.", hint="give one of them.")
    if starter is not None and count is None:
        raise Error("--starter without -np.", hint="say how many ranks it is to start: -np 4.")
    if pool is not None:
        return Pool(pool, options, logs)
    if named is not None:
        return Ssh(_hosts(named))
    if count is not None:
        made: Starter = STARTERS.get(starter or "here")(count)
        return made
    if "SLURM_JOB_NODELIST" in os.environ:
        if which("srun") is None:
            raise Error("srun is not on PATH.", hint="say how many ranks: -np 2.")
        return Srun([node.name for node in hosts.nodes() for _ in range(node.tasks)])
    raise Error("nothing says how many ranks to start.", hint="-np 2, --hosts a,b, or --pool 4.")


def _hosts(text: str) -> list[str]:
    found = []
    for part in text.split(","):
        name, _, slots = part.partition(":")
        if not name or (slots and not slots.isdigit()):
            raise Error(f"--hosts {text}: {part!r} is no host.", hint="for example a:2,b:2.")
        found += [name] * int(slots or 1)
    return found


def launch(
    command: Sequence[str], way: Starter, *, least: int | None, address: str | None,
    say: Callable[[str], None],
) -> int:  # fmt: skip
    """Run a command on ranks that outlive one another, to its end.

    Args:
        command: What each rank runs.
        way: How they are started.
        least: With how many ranks the run may begin; None: with all.
        address: Of this host, by which ranks reach it; None: found out.
        say: Tells the person who watches.

    Returns:
        The exit code.

    Raises:
        Error: The driver cannot be reached where it is to be, or Horovod lacks Gloo.
    """
    if importlib.util.find_spec("horovod") is None:
        raise Error("Horovod is not installed.", hint="run `hpctrain horovod build`.")
    return asyncio.run(_launch(list(command), way, least, address or address_for(way.hosts), say))


async def _launch(
    command: list[str], way: Starter, least: int | None, address: str, say: Callable[[str], None]
) -> int:
    wanted = len(way.hosts)
    key = new_key()
    strangers = Strangers(say)
    driver = Driver(key, wanted, min(least or wanted, wanted), opener(address, strangers), say)
    async with contextlib.AsyncExitStack() as listens:
        try:
            port = await listens.enter_async_context(listen(driver, address, strangers))
        except OSError as error:
            raise Error(
                f"cannot listen at {address}: {error.strerror}.", hint="give another --address."
            ) from error
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(
                number, driver.end, 128 + number, f"{number.name}: ending all ranks"
            )
        shared = {
            ADDRESS: f"{address}:{port}",
            KEY: key,
            "PATH": search_path(),
            "HPCTRAIN__STRATEGY": "horovod",  # a world of one would choose another
            **_given(way),
        }
        shared.setdefault("HPCTRAIN__ELASTIC__MODE", "gloo")

        def task(seat: int) -> RankProcess:
            return RankProcess(
                command, {**shared, **place_variables(way.hosts, seat)}, str(Path.cwd())
            )

        return await _keep_up(driver, WorkerSlots(driver, way, task, say))


async def _keep_up(driver: Driver, seats: WorkerSlots) -> int:
    """Keep ranks started until the run is over; its exit code."""
    keeping = asyncio.ensure_future(seats.keep())
    serving = asyncio.ensure_future(driver.serve())
    await asyncio.wait([keeping, serving], return_when=asyncio.FIRST_COMPLETED)
    if keeping.done():  # by an error of its own
        serving.cancel()
        keeping.result()
    code = serving.result()
    if any(rank.done for rank in driver.ranks):
        await seats.ended(END_SECONDS)
    keeping.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await keeping
    return code


def _given(way: Starter) -> dict[str, str]:
    """What of the environment ranks on other hosts are to have, too."""
    if not isinstance(way, Ssh):
        return {}
    prefixes = ("HPCTRAIN", "HOROVOD", "GLOO", "NCCL", "OMP", "MKL", "PYTHON", "LD_LIBRARY", "LANG")
    return {name: value for name, value in os.environ.items() if name.startswith(prefixes)}
