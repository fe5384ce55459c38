"""Jobs whose first node is lost, with the batch script, and that go on without (``--no-kill``).

Such a job would stay until its time limit, whatever becomes of its ranks. Slurm is told to start it
again: its script then finds the run completed, or goes on with it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator

from hpctrain.errors import Error
from hpctrain.network import answers
from hpctrain.process import search_path
from hpctrain.slurm import commands

SUPERVISOR = "HPCTRAIN_SUPERVISOR"
"""The environment variable that names the batch script's host; ``hpctrain job`` sets it."""

OVER = b"."
SILENCE_SECONDS = 10
END_SECONDS = 10.0  # where only the script has ended, Slurm ends the job by itself


def end_job(lost_hosts: Iterable[str]) -> None:
    """Have Slurm start the job again, if the script's host is among those where ranks were lost."""
    if os.environ.get(SUPERVISOR) in set(lost_hosts):
        _requeue()


@contextlib.contextmanager
def watched(node: str) -> Iterator[None]:
    """Have another node of the job watch this one, on which the batch script runs.

    Args:
        node: Which one.
    """
    with socket.create_server(("", 0)) as server:
        address = f"{os.uname().nodename}:{server.getsockname()[1]}"
        step = subprocess.Popen(
            ["srun", "--overlap", "--no-kill", "--kill-on-bad-exit=0", "--mpi=none", "--nodes=1",
             "--ntasks=1", f"--nodelist={node}", "--quiet",
             sys.executable, "-m", "hpctrain.slurm.orphan", address],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env={**os.environ, "PATH": search_path()}, start_new_session=True,
        )  # fmt: skip
        watchers: list[socket.socket] = []

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    watchers.append(server.accept()[0])

        threading.Thread(target=accept, daemon=True).start()
        try:
            yield
        finally:
            for watcher in watchers:
                with contextlib.suppress(OSError):
                    watcher.sendall(OVER)
            step.kill()
            step.wait()


def watch(address: str) -> None:
    """Return when the script has ended in good order; else, if its host is lost, end the job.

    Args:
        address: ``HOST:PORT`` at which the script listens.
    """
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=SILENCE_SECONDS) as script:
            script.settimeout(None)
            script.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in (("KEEPIDLE", 4), ("KEEPINTVL", 2), ("KEEPCNT", 3)):
                script.setsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{name}"), value)
            if script.recv(1) == OVER:
                return
    except OSError:
        pass
    time.sleep(END_SECONDS)
    if not answers(host, int(port), SILENCE_SECONDS):
        _requeue()


def _requeue() -> None:
    try:
        commands.requeue(commands.this_job())
    except Error as error:
        print(f"hpctrain: {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    watch(sys.argv[1])
