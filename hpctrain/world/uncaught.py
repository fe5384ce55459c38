"""End a program of the user's own where an exception is caught by nobody, on all ranks.

`hpctrain train` catches them itself. Here too bad input is one line and exit code 2; and on several
ranks a process leaves at once, because tearing MPI down would wait for the others, or find memory
gone that messages are yet to come to.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from types import TracebackType

from hpctrain import process
from hpctrain.errors import Error
from hpctrain.world.launcher import Launch

RELUCTANT_SECONDS = 1.0
"""Rank 0 speaks first: what is wrong on every rank is said once; the launcher ends the others."""


def install(launch: Launch, abort: Callable[[str, int], None]) -> None:
    """Install the hook by which an uncaught exception ends this process and tells its peers.

    Args:
        launch: How this process was started.
        abort: Tells its peers why, and with which exit code.
    """
    before = sys.excepthook
    if getattr(before, "is_hpctrain", False):
        return

    def hook(kind: type[BaseException], error: BaseException, at: TracebackType | None) -> None:
        sys.excepthook = before  # nothing may come back here
        _end(launch, abort, before, kind, error, at)

    hook.is_hpctrain = True  # type: ignore[attr-defined]
    sys.excepthook = hook


def _end(
    launch: Launch,
    abort: Callable[[str, int], None],
    report: Callable[[type[BaseException], BaseException, TracebackType | None], object],
    kind: type[BaseException],
    error: BaseException,
    at: TracebackType | None,
) -> None:
    code = error.exit_code if isinstance(error, Error) else 1
    if launch.size > 1:
        abort(f"rank {launch.rank}: {kind.__name__}: {error}", code)
    if isinstance(error, Error):
        if launch.rank > 0:
            time.sleep(RELUCTANT_SECONDS)
        where = f" [rank {launch.rank} on {os.uname().nodename}]" if launch.rank > 0 else ""
        print(f"hpctrain: error:{where} {error}", file=sys.stderr)
    else:
        report(kind, error, at)
    if launch.size > 1 or code != 1:
        sys.stdout.flush()
        sys.stderr.flush()
        if process.abort is not None:
            process.abort(code)
        os._exit(code)
