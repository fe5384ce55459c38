"""Cases in processes of their own: how they are started, end, and tell what became of them."""

from __future__ import annotations

import contextlib
import ctypes
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

from hpctrain.process import mpirun, run

ROOT = Path(__file__).parents[2]
"""Where ``python -m benchmarks.NAME`` works."""

PR_SET_PDEATHSIG = 1  # of linux/prctl.h
Start = Callable[[Sequence[str], float], CompletedProcess[str]]
"""Runs a command on all ranks, within a time limit in seconds."""


def module(name: str, *words: str) -> tuple[str, ...]:
    """Return the command that runs a module of the benchmarks in a process of its own."""
    return (sys.executable, "-m", f"benchmarks.{name}", *words)


def on_ranks(count: int) -> Start:
    """Return what runs a command on so many ranks of this host."""

    def start(command: Sequence[str], timeout_seconds: float) -> CompletedProcess[str]:
        return run([*mpirun(count), *command], timeout_seconds=timeout_seconds, cwd=ROOT)

    return start


def end_with_parent() -> None:
    """Have this process killed when its launcher is.

    mpirun gives each rank a process group of its own, so killing mpirun's at a time limit is not
    enough.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def why_failed(done: CompletedProcess[str]) -> str:
    """Return what a process that failed said last, without what mpirun says of it."""
    said = done.stdout.split("-" * 40)[0].strip()
    return f"exit code {done.returncode}: {said[-300:]}"


@contextlib.contextmanager
def scratch(folder: Path | None = None) -> Iterator[Path]:
    """Give a new folder that is deleted afterwards.

    Args:
        folder: Where it is made, such as on a disk to be measured; made where it is missing. None:
            where temporary files are.
    """
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as name:
        yield Path(name)


class Tail:
    """A file of JSON lines that is still being written, read on each time from where it ended.

    Args:
        path: The file; it need not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[dict[str, Any]] = []
        self._at = 0

    def new(self) -> list[dict[str, Any]]:
        """Return the lines that have come since the last time, as far as they are whole.

        Who was killed may have left one that is not; it is left out.
        """
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self._at)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._at += len(whole)
        found = []
        for line in whole.splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        return found

    def read(self) -> list[dict[str, Any]]:
        """Return all lines so far that are whole, and have not been asked for by :meth:`new`."""
        self.lines += self.new()
        return self.lines


def until(condition: Callable[[], object], deadline: float) -> bool:
    """Wait until a condition holds, and return whether it did in time.

    Args:
        condition: Asked some fifty times a second.
        deadline: Of the monotonic clock.
    """
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@contextlib.contextmanager
def ended(process: subprocess.Popen[Any], seconds: float = 20.0) -> Iterator[None]:
    """Have a process end with the block: asked to by SIGTERM, and killed if it does not in time."""
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
