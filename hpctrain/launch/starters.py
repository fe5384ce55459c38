"""Starters of ranks: here, by ssh, by srun in this job, or as a job of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import psutil

from hpctrain.errors import Error
from hpctrain.process import search_path
from hpctrain.slurm import commands
from hpctrain.slurm.ssh import one_task
from hpctrain.world.network import address_towards, answers

SEAT = [sys.executable, "-m", "hpctrain.launch.worker_slot"]
KILL_SECONDS = 3.0
ASK_SECONDS = 1.0
PROBE_SECONDS = 2.0
SSH = ["ssh", "-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5", "-o", "ServerAliveInterval=2",
       "-o", "ServerAliveCountMax=2"]  # fmt: skip
SSH_PORT, SLURMD_PORT = 22, 6818


class RankProcess(NamedTuple):
    """The process that a rank is to run.

    Attributes:
        command: The program and its arguments.
        environment: Variables to add.
        folder: Where.
    """

    command: Sequence[str]
    environment: Mapping[str, str]
    folder: str


class Starter(Protocol):
    """A way to start ranks on hosts.

    Attributes:
        hosts: Of each seat; an empty name: the way chooses.
    """

    hosts: list[str]

    async def run(self, seat: int, task: RankProcess) -> int:
        """Run a rank to its end; when this is cancelled, it is killed.

        Args:
            seat: Of the rank: which of those that are to be started.
            task: What it runs.

        Returns:
            Its exit code, as far as that is known.
        """

    async def usable(self, seat: int) -> bool:
        """Whether a rank can be started again on the host of one that was lost."""


class Here:
    """Starts ranks as processes of this host.

    Args:
        count: How many.
    """

    def __init__(self, count: int) -> None:
        self.hosts = [os.uname().nodename] * count

    async def run(self, seat: int, task: RankProcess) -> int:
        """Run a rank to its end.

        Args:
            seat: Of the rank.
            task: What it runs.
        """
        return await _child(SEAT, os.environ, task)

    async def usable(self, seat: int) -> bool:
        """Tell that this host is always there."""
        return True


class Ssh:
    """Starts ranks as processes of other hosts, by ssh.

    Args:
        hosts: Of each seat.
    """

    def __init__(self, hosts: list[str]) -> None:
        self.hosts = hosts

    async def run(self, seat: int, task: RankProcess) -> int:
        """Run a rank to its end.

        Args:
            seat: Of the rank.
            task: What it runs.
        """
        # One string for a shell on the other side, each word of it quoted.
        return await _child([*SSH, self.hosts[seat], shlex.join(SEAT)], os.environ, task)

    async def usable(self, seat: int) -> bool:
        """Whether the host answers."""
        return await asyncio.to_thread(answers, self.hosts[seat], SSH_PORT, PROBE_SECONDS)


class Srun:
    """Starts ranks as steps of this Slurm job.

    Args:
        hosts: Of each seat.
    """

    def __init__(self, hosts: list[str]) -> None:
        self.hosts = hosts

    async def run(self, seat: int, task: RankProcess) -> int:
        """Run a rank to its end.

        Args:
            seat: Of the rank.
            task: What it runs.
        """
        arguments, environment = one_task(self.hosts[seat])
        command = [*arguments, "--no-kill", "--input=all", *SEAT]
        return await _child(command, environment, task)

    async def usable(self, seat: int) -> bool:
        """Whether Slurm has the node, and it answers."""
        host = self.hosts[seat]
        if not await asyncio.to_thread(commands.node_is_up, host):
            return False
        return await asyncio.to_thread(answers, host, SLURMD_PORT, PROBE_SECONDS)


class Pool:
    """Starts ranks as jobs of one task each: a node that comes back takes up the next one.

    Args:
        count: How many.
        options: For sbatch.
        folder: For the jobs' script and logs.
    """

    def __init__(self, count: int, options: Sequence[str], folder: Path) -> None:
        self.hosts = [""] * count
        self._options = options
        self._script = folder / "rank.sbatch"
        self._log = folder / "%x-%j.out"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._script.write_text('#!/bin/bash\nexec "$@"\n')
        except OSError as error:
            raise Error(f"cannot write {self._script}: {error.strerror}.", hint="choose another "
                        "--logs.") from error  # fmt: skip

    async def run(self, seat: int, task: RankProcess) -> int:
        """Run a rank to its end, as a job.

        Args:
            seat: Of the rank.
            task: What it runs.
        """
        # The environment goes with the job; its arguments could be read by everybody.
        arguments = ["--parsable", "--ntasks=1", f"--job-name=hpctrain-rank-{seat}",
                     f"--output={self._log}", "--open-mode=append", "--no-requeue",
                     "--export=ALL", *self._options, str(self._script), *task.command]  # fmt: skip
        environment = {**os.environ, **task.environment}
        for name in [name for name in environment if name.startswith("SLURM_")]:
            if name != "SLURM_CONF":
                del environment[name]
        said = await asyncio.to_thread(commands.call, "sbatch", *arguments, environment=environment)
        job = said.strip().splitlines()[-1].partition(";")[0]
        try:
            while True:
                await asyncio.sleep(ASK_SECONDS)
                with contextlib.suppress(Error):  # where Slurm does not answer, the job may live
                    states = await asyncio.to_thread(commands.states, [job])
                    if job not in states or states[job].over:
                        return 0
        finally:
            with contextlib.suppress(Error):
                await asyncio.shield(asyncio.to_thread(commands.cancel, job))

    async def usable(self, seat: int) -> bool:
        """Tell that a rank can always be queued again: Slurm knows when a node is there."""
        return True


async def _child(command: Sequence[str], environment: Mapping[str, str], task: RankProcess) -> int:
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        env={**environment, "PATH": search_path()},
        start_new_session=True,
    )
    assert process.stdin is not None
    words = {"command": task.command, "environment": dict(task.environment), "folder": task.folder}
    try:
        with contextlib.suppress(OSError):
            process.stdin.write(json.dumps(words).encode() + b"\n")
            await process.stdin.drain()
        return await process.wait()
    finally:
        process.stdin.close()  # by which its seat knows
        if process.returncode is None:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(process.wait(), KILL_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def address_for(hosts: Sequence[str]) -> str:
    """Return the address by which other hosts reach this one.

    Args:
        hosts: The others, as far as they are known.

    Raises:
        Error: This host has no address but its own.
    """
    mine = {os.uname().nodename, "localhost", "127.0.0.1"}
    if hosts and all(host in mine for host in hosts):
        return "127.0.0.1"
    for host in hosts:
        if host and host not in mine:
            with contextlib.suppress(OSError):
                return address_towards(host)
    found = [each.address for name, addresses in psutil.net_if_addrs().items() if name != "lo"
             for each in addresses if each.family == socket.AF_INET]  # fmt: skip
    if not found:
        raise Error("this host has no network address.", hint="give one by --address.")
    return str(found[0])
