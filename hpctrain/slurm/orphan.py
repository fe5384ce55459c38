"""Jobs whose first node is lost, with the batch script, and that go on without (``--no-kill``).

Such a job would stay until its time limit, whatever becomes of its ranks. Slurm is told to start it
again: its script then finds the run completed, or goes on with it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence

from hpctrain.errors import Error
from hpctrain.process import search_path
from hpctrain.slurm import commands
from hpctrain.world.network import answers

SUPERVISOR = "HPCTRAIN_SUPERVISOR"
"""The environment variable that names the batch script's host; ``hpctrain job`` sets it."""

OVER = b"."
OVER_SECONDS = 2.0
LOOK_SECONDS = 2.0
MOST_SECONDS = 60.0
SILENCE_SECONDS = 10.0
END_SECONDS = 10.0  # where only the script has ended, Slurm ends the job by itself


def end_job(lost_hosts: Iterable[str]) -> None:
    """Have Slurm restart the job if the batch script's host is among those lost."""
    if os.environ.get(SUPERVISOR) in set(lost_hosts):
        _requeue()


@contextlib.contextmanager
def watched(nodes: Sequence[str]) -> Iterator[None]:
    """Have another node of the job watch this host, on which the batch script runs.

    The watcher tries to connect to a port that is bound here but at which nothing listens: as long
    as the host is up it refuses the connection. So nobody can connect, and no authentication is
    needed. A watcher that could not be started, or is lost, is followed by one on the next node.

    Args:
        nodes: That may watch; the first one does at first.
    """
    over = threading.Event()
    with socket.socket() as refusing:
        refusing.bind(("", 0))
        address = f"{os.uname().nodename}:{refusing.getsockname()[1]}"
        thread = threading.Thread(target=_keep_watcher, args=(nodes, address, over), daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def _keep_watcher(nodes: Sequence[str], address: str, over: threading.Event) -> None:
    """Have a watcher until all is over; one that ends in good order needs no successor.

    A site may allow none: attempts become rarer, so that Slurm is not asked without end.
    """
    pause = LOOK_SECONDS
    for node in itertools.cycle(nodes):
        step = _started(node, address)
        while not over.wait(LOOK_SECONDS / 4) and step.poll() is None:
            pass
        if over.is_set() or step.returncode == 0:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                step.communicate(OVER, timeout=OVER_SECONDS)
            step.kill()
            step.wait()
            return
        if over.wait(pause):
            return
        pause = min(2 * pause, MOST_SECONDS)


def _started(node: str, address: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        ["srun", "--overlap", "--no-kill", "--kill-on-bad-exit=0", "--mpi=none", "--nodes=1",
         "--ntasks=1", f"--nodelist={node}", "--quiet",
         sys.executable, "-m", "hpctrain.slurm.orphan", address],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, "PATH": search_path()}, start_new_session=True,
    )  # fmt: skip


def watch(address: str) -> None:
    """Wait for the batch script's orderly end; if its host is lost, have the job restarted.

    Args:
        address: ``HOST:PORT`` at which the batch script's host refuses connections.
    """
    host, _, port = address.rpartition(":")
    if not answers(host, int(port), SILENCE_SECONDS):
        return  # a firewall is between them, and nothing can be said
    while True:
        silent_since = time.monotonic()
        while not answers(host, int(port), SILENCE_SECONDS):
            if time.monotonic() - silent_since > SILENCE_SECONDS + END_SECONDS:
                _requeue()
                return
            time.sleep(LOOK_SECONDS)
        if _over():
            return


def _over() -> bool:
    """Return whether the batch script reports within ``LOOK_SECONDS`` that it has ended."""
    ready, _, _ = select.select([sys.stdin], [], [], LOOK_SECONDS)
    if not ready:
        return False
    if os.read(sys.stdin.fileno(), 1) == OVER:
        return True
    time.sleep(LOOK_SECONDS)  # its end is gone, and perhaps its host
    return False


def _requeue() -> None:
    try:
        commands.requeue(commands.this_job())
    except Error as error:
        print(f"hpctrain: {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    watch(sys.argv[1])
