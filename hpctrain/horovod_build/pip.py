"""Run pip, bounded in time, and log what it builds."""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import click

from hpctrain.errors import Error
from hpctrain.process import run

TIMEOUT_SECONDS = 3600
SHOWN_EVERY_SECONDS = 15.0


class Log:
    """A build's log, written as lines come; tells the person who watches how far the build is.

    Args:
        path: Of the file.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8")
        self._began = time.monotonic()
        self._where = "started"
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._show, daemon=True)

    def __enter__(self) -> Log:
        self._watch.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._over.set()
        self._watch.join()
        self._file.close()

    def line(self, text: str) -> None:
        """Keep a line; it is where the build is."""
        self._file.write(text)
        self._file.flush()
        progress = re.match(r"\s*(\[ *\d+%\]) .*?([^/]+?)(?:\.o)?\s*$", text)
        if progress:
            self._where = f"{progress[1]} {progress[2]}"
        elif "%]" not in self._where and text.strip():
            self._where = text.strip()[:60]

    def say(self, what: str) -> None:
        """Tell the person, with the time since the start."""
        click.echo(f"  {time.monotonic() - self._began:4.0f} s  {what}")

    def _show(self) -> None:
        while not self._over.wait(SHOWN_EVERY_SECONDS):
            self.say(self._where)


def pip(
    *arguments: str,
    environment: Mapping[str, str] | None = None,
    log: Log | None = None,
    hint: str = "is the package index reachable, and the disk not full?",
) -> None:
    """Run pip of this Python.

    Args:
        arguments: Its command and what belongs to it.
        environment: Its environment variables; None: this process's.
        log: Keeps what it prints.
        hint: What to do where it fails.

    Raises:
        Error: It failed, or took longer than an hour.
    """
    done = run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments],
        env=environment,
        timeout_seconds=TIMEOUT_SECONDS,
        each=log.line if log is not None else None,
    )
    if done.returncode != 0:
        raise Error(f"pip {arguments[0]} failed: {tail(done.stdout, 2)}", hint=hint)


def tail(text: str, lines: int) -> str:
    """Return the last lines of an output, in one line.

    Args:
        text: The output.
        lines: How many.
    """
    return " | ".join(text.strip().splitlines()[-lines:])
