"""Submitted runs: what Slurm says of them, how far they are, and how they ended."""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpctrain.errors import Error, nearest
from hpctrain.run_folder import INTERRUPTED, INTERRUPTED_CODE, RESULT
from hpctrain.slurm import commands
from hpctrain.slurm.commands import State
from hpctrain.slurm.supervise import FAILURE, SUBMISSION

POLL_SECONDS = 2.0
TAIL_BYTES = 2**16
LOST_SECONDS = 60.0
"""So long a job may be unknown to Slurm."""


@dataclass(frozen=True)
class Submitted:
    """A run that was submitted.

    Attributes:
        run: Its folder.
        job: Its number.
        name: Its name.
    """

    run: Path
    job: str
    name: str


@dataclass(frozen=True)
class Progress:
    """How far a run is, from its metrics.jsonl.

    Attributes:
        step: Steps done.
        steps: Of the whole run; 0 where that is not known.
        loss: The last one recorded.
        samples_per_second: Likewise.
        seconds_left: By the speed so far; None where nothing can be said.
        restarts: How often it was started again.
    """

    step: int = 0
    steps: int = 0
    loss: float | None = None
    samples_per_second: float | None = None
    seconds_left: float | None = None
    restarts: int = 0


def find(folder: Path) -> list[Submitted]:
    """The submitted runs in a folder, and in the folders in it, oldest first."""
    found = []
    for path in [folder / SUBMISSION, *folder.glob(f"*/{SUBMISSION}")]:
        with contextlib.suppress(OSError, ValueError, KeyError):
            about = json.loads(path.read_text())
            run = Submitted(path.parent, str(about["job"]), str(about["name"]))
            found.append((about["time"], run))
    return [run for _, run in sorted(found, key=lambda each: float(each[0]))]


def named(which: str, folder: Path) -> Submitted:
    """The run of a job's number or name (the newest of that name), or of a run folder.

    Raises:
        Error: There is none.
    """
    runs = find(folder)
    for run in [*find(Path(which)), *reversed(runs)]:
        if which in (run.job, run.name) or Path(which).resolve() == run.run.resolve():
            return run
    known = [name for run in runs for name in (run.job, run.name)]
    hint = nearest(which, known) if known else f"no runs were submitted from {folder}."
    raise Error(f"no submitted run {which!r} in {folder}.", hint=hint)


def progress(run: Path) -> Progress:
    """How far a run is."""
    path = run / "metrics.jsonl"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(TAIL_BYTES)
            file.seek(max(0, size - TAIL_BYTES))
            tail = file.read()
    except OSError:
        return Progress()
    starts = [r for r in _records(head + b"\n" + tail) if r.get("kind") == "event" and "steps" in r]
    seen = {(r["time"], r["step"]): r for r in starts}
    begun = max(seen.values(), key=lambda r: float(r["time"]), default=None)
    train = [r for r in _records(tail) if r.get("kind") == "train"]
    if begun is None:
        return Progress()
    last: dict[str, Any] = train[-1] if train else begun
    steps = int(begun["steps"])
    done, seconds = last["step"] - begun["step"], last["time"] - begun["time"]
    left = (steps - last["step"]) * seconds / done if done > 0 else None
    return Progress(
        int(last["step"]), steps, last.get("loss"), last.get("samples_per_second"), left,
        max(0, len(seen) - 1),
    )  # fmt: skip


def _records(data: bytes) -> Iterable[dict[str, Any]]:
    for line in data.splitlines():
        with contextlib.suppress(ValueError):  # the first and the last may be cut
            record = json.loads(line)
            if isinstance(record, dict):
                yield record


def outcome(run: Path) -> tuple[str, int] | None:
    """How a run ended by its own account, and its exit code; None where it says nothing."""
    if (run / RESULT).exists():
        return "completed", 0
    if (run / FAILURE).exists():
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            failure = json.loads((run / FAILURE).read_text())
            where = f"rank {failure['rank']}: " if failure["rank"] is not None else ""
            text = f"{where}{failure['what']}: {failure['message']}"
            return f"failed: {text}", int(failure["exit_code"])
    if (run / INTERRUPTED).exists():
        return "interrupted", INTERRUPTED_CODE
    return None


def describe(run: Submitted, state: State | None) -> str:
    """A job's state, in a few words."""
    ended = outcome(run.run)
    if state is not None and not state.over:
        return f"{state.name} ({state.reason})" if state.reason else state.name
    if ended is not None:
        return ended[0]
    return state.name if state is not None else "unknown to Slurm, and without a result"


def wait(run: Submitted, say: Callable[[str], None]) -> int:
    """Return when a run is over, however often it was started again; the training's exit code.

    Raises:
        Error: Slurm does not answer.
    """
    before = ""
    unknown_since: float | None = None
    while True:
        state = commands.states([run.job]).get(run.job)
        unknown_since = (unknown_since or time.monotonic()) if state is None else None
        lost = unknown_since is not None and time.monotonic() - unknown_since > LOST_SECONDS
        ended = outcome(run.run)
        if lost or (state is not None and state.over) or (state is None and ended is not None):
            break
        text = state.name + (f" {state.reason}" if state.reason else "") if state else before
        if text != before:
            say(f"job {run.job}: {text}")
            before = text
        time.sleep(POLL_SECONDS)
    if ended is None or ended[0] == "interrupted":
        name = state.name if state is not None else "unknown to Slurm"
        say(f"job {run.job}: {name}, without a result; see {log(run) or run.run}")
        return ended[1] if ended is not None else 1
    say(f"job {run.job}: {ended[0]}")
    return ended[1]


def wait_for_all(numbers: Sequence[str], say: Callable[[str], None]) -> None:
    """Return when all of these jobs are over.

    Raises:
        Error: Slurm does not answer.
    """
    before = ""
    known: dict[str, State] = {}
    begun = time.monotonic()
    while True:
        states = known | commands.states(numbers)
        known = states  # Slurm forgets those that have been over for a while
        names = Counter(state.name.lower() for state in states.values())
        text = ", ".join(f"{count} {name}" for name, count in sorted(names.items()))
        if text != before:
            say(text)
            before = text
        if states and all(state.over for state in states.values()):
            return
        if not states and time.monotonic() - begun > LOST_SECONDS:
            raise Error(f"Slurm knows nothing of job {numbers[0]}.", hint="`squeue` may tell more.")
        time.sleep(POLL_SECONDS)


def log(run: Submitted) -> Path | None:
    """A run's newest log."""
    logs = sorted(run.run.glob("*.out"), key=lambda path: path.stat().st_mtime)
    return logs[-1] if logs else None
