"""Processes that tests start: none outlives its test, whatever its process group."""

import contextlib
import ctypes
import os
import signal
import subprocess
from pathlib import Path

import psutil

from hpctrain.process import search_path
from tests.waiting import wait_until

PR_SET_CHILD_SUBREAPER = 36
HELPERS = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")
"""What Python keeps for later."""


def adopt_orphans():
    """Have processes whose parents end become this one's children, so that none is lost sight of.

    Launchers put ranks into process groups and sessions of their own, and may end before them.
    """
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def children():
    """This process's own children that run, and the orphans among its descendants."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            found += map(int, (task / "children").read_text().split())
    running = []
    for pid in found:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            words = " ".join(process.cmdline())  # of one that has ended: none
            if words and not any(helper in words for helper in HELPERS):
                running.append(process)
    return running


def ended(pid):
    """Whether a process is no more, be it that nobody has asked for its exit code yet."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def kill(processes):
    """End processes with all that they have started; their command lines."""
    killed = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            for each in (process, *process.children(recursive=True)):
                with contextlib.suppress(psutil.Error):
                    killed.append(f"{each.pid} {' '.join(each.cmdline())[:200]}")
                    each.kill()
    return killed


@contextlib.contextmanager
def started(command, *, signals=(), **options):
    """A process in a session of its own, which is ended with all that it has started.

    Args:
        command: The program and its arguments.
        signals: Those that are to have their usual effect, though a shell has put the tests into
            the background.
        options: Of ``Popen``.
    """

    def reset():
        for number in signals:
            signal.signal(number, signal.SIG_DFL)

    options.setdefault("env", os.environ)
    options["env"] = {**options["env"], "PATH": search_path()}
    process = subprocess.Popen(
        list(map(str, command)), stdin=subprocess.DEVNULL, start_new_session=True,
        preexec_fn=reset, **options,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            kill([psutil.Process(process.pid)])
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def assert_no_more_than(before, seconds):
    """End what is running besides these children, and fail if it did not end by itself."""

    def over():
        return not set(children()) - set(before)

    try:
        wait_until(over, "processes of this test to end", seconds=seconds)
    except AssertionError as error:
        left = "\n".join(kill(set(children()) - set(before)))
        raise AssertionError(f"{error}{left}") from None
