"""Submitted runs: their state in Slurm, their progress, and how they ended."""

from __future__ import annotations

import contextlib
import glob
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import msgspec

from hpctrain.errors import Error, nearest
from hpctrain.files import open_regular, parse_json, read_json, read_regular
from hpctrain.run_folder import INTERRUPTED, INTERRUPTED_CODE, RESULT
from hpctrain.slurm import commands, owner
from hpctrain.slurm.commands import State
from hpctrain.slurm.supervise import FAILURE, SUBMISSION

MOST = 2.0**63
"""Bound on steps, times and losses: larger values are taken for damage."""

POLL_SECONDS = 2.0
TAIL_BYTES = 2**16
MOST_BYTES = 2**24
LOST_SECONDS = 60.0
"""How long a job may be unknown to Slurm before it counts as lost."""

SILENCE_SECONDS = 3600.0
"""How long Slurm may stay silent before a wait gives up."""


@dataclass(frozen=True)
class Submitted:
    """A run that was submitted.

    Attributes:
        run: The run folder.
        job: The ID of the job that owns the run now.
        name: The job's name.
        before: The IDs of earlier jobs of the run, which Slurm would not requeue.
        log: The log's path, with Slurm's patterns such as %j; empty: in the run folder.
    """

    run: Path
    job: str
    name: str
    before: tuple[str, ...] = ()
    log: str = ""


class _Submission(msgspec.Struct):
    """The fields of submission.json that are used. The file may have been written by anyone."""

    job: owner.JobNumber
    name: Annotated[str, msgspec.Meta(max_length=1000)]
    time: float
    log: str = ""


@dataclass(frozen=True)
class Progress:
    """A run's progress, as recorded in its metrics.jsonl.

    Attributes:
        step: Steps completed.
        steps: Steps of the whole run; 0 if not known.
        loss: The training loss recorded last.
        samples_per_second: The throughput recorded last.
        seconds_left: Estimated time to completion at the speed so far; None if not known.
        restarts: How often the run was restarted.
    """

    step: int = 0
    steps: int = 0
    loss: float | None = None
    samples_per_second: float | None = None
    seconds_left: float | None = None
    restarts: int = 0


def find(folder: Path, say: Callable[[str], None] = lambda text: None) -> list[Submitted]:
    """Find the submitted runs in a folder and its immediate subfolders, oldest first.

    Args:
        folder: The folder to search.
        say: Called with a line for each submission.json that cannot be read.
    """
    found = []
    for path in [folder / SUBMISSION, *folder.glob(f"*/{SUBMISSION}")]:
        try:
            about = msgspec.json.decode(read_regular(path, MOST_BYTES), type=_Submission)
        except FileNotFoundError:
            continue
        except OSError as error:
            say(f"{path}: {error.strerror}")
        except owner.UNREADABLE as error:
            say(f"{path}: {' '.join(str(error).split())}")
        else:
            run = Submitted(path.parent, about.job, about.name, (), about.log)
            found.append((about.time, _now(run)))
    return [run for _, run in sorted(found, key=lambda each: each[0])]


def _now(run: Submitted) -> Submitted:
    """Return the run with the job that owns its folder now, which may have changed."""
    had = list(dict.fromkeys(claim.job for claim in owner.claims(run.run)))
    number, *elsewhere = (run.before or (run.job,))[0].partition(";")
    if number not in had or had[-1] == number:
        return run
    chain = ["".join([each, *elsewhere]) for each in had[had.index(number) :]]
    return replace(run, job=chain[-1], before=tuple(chain[:-1]))


def named(which: str, folder: Path) -> Submitted:
    """Find a submitted run.

    Args:
        which: A job ID, a job's name (the newest run of that name counts), or a run folder.
        folder: The folder to search for IDs and names.

    Raises:
        Error: There is no such run.
    """
    runs = find(folder)
    for run in [*find(Path(which)), *reversed(runs)]:
        if which in (run.job, run.name, *run.before) or Path(which).resolve() == run.run.resolve():
            return run
    known = [name for run in runs for name in (run.job, run.name)]
    hint = nearest(which, known) if known else f"no runs were submitted from {folder}."
    raise Error(f"no submitted run {which!r} in {folder}.", hint=hint)


def progress(run: Path) -> Progress:
    """Read a run's progress from its metrics; all zero if there are none yet."""
    path = run / "metrics.jsonl"
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(TAIL_BYTES)
            file.seek(max(0, size - TAIL_BYTES))
            tail = file.read()
    except OSError:
        return Progress()
    starts = [r for r in _records(head + b"\n" + tail) if r.get("kind") == "event" and "steps" in r]
    starts = [r for r in starts if _number(r["steps"])]
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
        int(last["step"]), steps, _number(last.get("loss")),
        _number(last.get("samples_per_second")), left, max(0, len(seen) - 1),
    )  # fmt: skip


def _records(data: bytes) -> Iterable[dict[str, Any]]:
    for line in data.splitlines():
        with contextlib.suppress(ValueError):  # the first and the last may be cut
            record = parse_json(line)
            whole = isinstance(record, dict) and None not in (
                _number(record.get("step")), _number(record.get("time"))
            )  # fmt: skip
            if whole:
                yield record


def _number(value: Any) -> float | None:
    """Return a value if it is a finite number, else None."""
    usable = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if usable and abs(value) < MOST else None


def outcome(run: Path) -> tuple[str, int] | None:
    """Return how a run ended according to its own files, and its exit code; None if not known."""
    if (run / RESULT).exists():
        return "completed", 0
    if (run / FAILURE).exists():
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            failure = read_json(run / FAILURE, MOST_BYTES)
            where = f"rank {failure['rank']}: " if failure["rank"] is not None else ""
            text = f"{where}{failure['what']}: {failure['message']}"
            return f"failed: {text}", int(failure["exit_code"])
    if (run / INTERRUPTED).exists():
        return "interrupted", INTERRUPTED_CODE
    return None


def describe(run: Submitted, state: State | None) -> str:
    """Describe a run's state in a few words.

    Args:
        run: The run.
        state: Its job's state in Slurm; None if Slurm does not know the job.
    """
    ended = outcome(run.run)
    if state is not None and not state.over:
        return f"{state.name} ({state.reason})" if state.reason else state.name
    if ended is not None:
        return ended[0]
    return state.name if state is not None else "unknown to Slurm, and without a result"


class Silence:
    """Job states for a wait that tolerates periods in which Slurm does not answer.

    Args:
        say: Called with a line when such a period begins.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._since: float | None = None

    def states(self, jobs: Iterable[str]) -> dict[str, State] | None:
        """Return the states of jobs; None while Slurm does not answer.

        Raises:
            Error: Slurm has not answered for ``SILENCE_SECONDS``, or is not installed.
        """
        try:
            states = commands.states(jobs)
        except commands.Unanswered as error:
            if self._since is None:
                self._since = time.monotonic()
                self._say(f"{error.message} Waiting on; what runs is not touched by this")
            if time.monotonic() - self._since > SILENCE_SECONDS:
                raise
            return None
        self._since = None
        return states


def wait(run: Submitted, say: Callable[[str], None]) -> int:
    """Wait until a run is over, across restarts and successor jobs.

    Args:
        run: The run.
        say: Called with a line for each change of state.

    Returns:
        The training's exit code.

    Raises:
        Error: Slurm has not answered for ``SILENCE_SECONDS``.
    """
    before = ""
    unknown_since: float | None = None
    silence = Silence(say)
    while True:
        run = _now(run)
        states = silence.states([run.job])
        if states is None:
            time.sleep(POLL_SECONDS)
            continue
        state = states.get(run.job)
        unknown_since = (unknown_since or time.monotonic()) if state is None else None
        lost = unknown_since is not None and time.monotonic() - unknown_since > LOST_SECONDS
        ended = outcome(run.run)
        if lost or (state is not None and state.over) or (state is None and ended is not None):
            if _now(run).job == run.job:
                break
            unknown_since = None
            continue
        text = state.name + (f" {state.reason}" if state.reason else "") if state else before
        if (text := printable(f"job {run.job}: {text}")) != before:
            say(text)
            before = text
        time.sleep(POLL_SECONDS)
    if ended is None or ended[0] == "interrupted":
        name = state.name if state is not None else "unknown to Slurm"
        say(printable(f"job {run.job}: {name}, without a result; see {log(run) or run.run}"))
        return ended[1] if ended is not None else 1
    say(printable(f"job {run.job}: {ended[0]}"))
    return ended[1]


def wait_for_all(numbers: Sequence[str], say: Callable[[str], None]) -> None:
    """Wait until all of several jobs are over.

    Args:
        numbers: The job IDs.
        say: Called with a line for each change of state.

    Raises:
        Error: Slurm has not answered for ``SILENCE_SECONDS``, or knows none of the jobs.
    """
    before = ""
    known: dict[str, State] = {}
    begun = time.monotonic()
    silence = Silence(say)
    while True:
        now = silence.states(numbers)
        states = known | (now or {})
        known = states  # Slurm forgets those that have been over for a while
        names = Counter(state.name.lower() for state in states.values())
        text = ", ".join(f"{count} {name}" for name, count in sorted(names.items()))
        if text != before:
            say(text)
            before = text
        if states and all(state.over for state in states.values()):
            return
        if now == {} and not states and time.monotonic() - begun > LOST_SECONDS:
            raise Error(f"Slurm knows nothing of job {numbers[0]}.", hint="`squeue` may tell more.")
        time.sleep(POLL_SECONDS)


def cancel(run: Submitted) -> list[str]:
    """Cancel all jobs of a run that are not over.

    Returns:
        The IDs of the cancelled jobs.

    Raises:
        Error: Slurm does not answer.
    """
    run = _now(run)
    numbers = [*run.before, run.job]
    try:
        states = commands.states(numbers)
    except commands.Unanswered:
        states = {}
    left = [number for number in numbers if number == run.job or number in states]
    left = [number for number in left if number not in states or not states[number].over]
    for number in left or [run.job]:  # the one before first: it could submit another
        commands.cancel(number)
    return left or [run.job]


def printable(text: str) -> str:
    """Replace characters that a terminal would interpret as control sequences by ``?``."""
    return "".join(each if each.isprintable() or each in "\n\t" else "?" for each in text)


def log(run: Submitted) -> Path | None:
    """Return the path of a run's newest log; None if there is none."""
    paths = list(run.run.glob("*.out"))
    if run.log:
        where = Path(run.log)
        parts = re.split(r"(%\d*[A-Za-z%])", where.name)
        name = "".join(_part(run, part) if n % 2 else glob.escape(part)
                       for n, part in enumerate(parts))  # fmt: skip
        paths += Path(str(where.parent).replace("%%", "%")).glob(name or "*.out")
    found = []
    for path in paths:
        with contextlib.suppress(OSError):
            found.append((path.stat().st_mtime, path))
    return max(found)[1] if found else None


def _part(run: Submitted, pattern: str) -> str:
    """Translate one of Slurm's filename patterns, such as ``%j``, to a glob pattern."""
    numbers = [job.partition(";")[0] for job in (*run.before, run.job)]
    known = {"%%": "%", "%x": glob.escape(run.name), "%j": numbers[0] if len(numbers) == 1 else "*"}
    return known.get(pattern, "*")
