"""Goodput under continual faults: what part of what the living ranks could do gets done.

    python -m benchmarks.goodput --minutes 30 --out results

Four ranks train the digits under ``hpctrain launch -np 4``. Every 15 seconds one of them, drawn at
random, is killed (SIGKILL), whatever the others are doing; a new one is started and joins. At the
end the run is asked to stop. Computing is emulated (stragglers_tasks.py): a rank sleeps for each
sample, so that four ranks compute at full speed on few cores; all else is real.

The trace of samples says when which step ended, and with whom. Goodput is the samples that counted
by those that the ranks which were alive could have taken in the same time. How many these are is
measured in the same run: a step of k ranks takes its emulated computing, less with more ranks, and
what is left of a step of all ranks after it; the latter is the mean over all steps of the whole
world in which nobody was killed or joined. A rank is alive from the step before the first that it
takes part in until it is killed. So what counts as lost is the step that was cut short, the
recovery, the stall for a rank that joins, and whatever starting it takes from the others.

A run is good if it stopped in good order; and the trace must have each sample once an epoch.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import statistics
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness.bars import at_least, at_most
from benchmarks.harness.command import Add, Arguments, Benchmark, Report, count, positive
from benchmarks.harness.processes import ROOT, Tail, ended, scratch, until
from benchmarks.harness.rounds import spread_of
from benchmarks.harness.tables import say, table
from hpctrain.errors import Error
from hpctrain.process import cores, search_path
from hpctrain.run_folder import INTERRUPTED, STOP
from hpctrain.train import sample_trace

TASK = ROOT / "benchmarks" / "stragglers_tasks.py"
START_SECONDS, END_SECONDS = 180.0, 120.0
WARM_UP_SECONDS = 5.0
LOOK_SECONDS = 0.01
LEAST_RANKS = 2  # that are left after a fault
MOST = 10**9  # more steps than there is time for
BARS = (
    at_least("goodput", 0.99),
    at_most("samples_wrong", 0, must=True),
    at_least("good", 1, must=True),
)


class Step(NamedTuple):
    """A step that ended.

    Attributes:
        number: From 1 on.
        time: When it was seen to have ended; seconds of the monotonic clock.
        samples: Of all ranks.
        members: The numbers of the processes that took it.
    """

    number: int
    time: float
    samples: int
    members: frozenset[int]


class Kill(NamedTuple):
    """A process that was killed, and when."""

    time: float
    number: int


class Watch:
    """Follows a run by its trace: its steps, and the processes that take them.

    Args:
        run: The run folder.
    """

    def __init__(self, run: Path) -> None:
        self.steps: list[Step] = []
        self.kills: list[Kill] = []
        self._folder = run / sample_trace.FOLDER
        self._tails: dict[int, Tail] = {}
        self._pids: dict[int, int] = {}
        self._samples: dict[int, int] = {}  # of steps that have begun

    @property
    def living(self) -> frozenset[int]:
        """The members of the world that have not been killed."""
        members = self.steps[-1].members if self.steps else frozenset()
        return members - {kill.number for kill in self.kills}

    def look(self) -> None:
        """Take in what has been written since the last time."""
        if self._folder.exists():
            for entry in os.scandir(self._folder):
                number = int(Path(entry.name).stem.partition("-")[2])
                self._tails.setdefault(number, Tail(Path(entry.path)))
        gone = {kill.number for kill in self.kills}
        for number, tail in self._tails.items():
            for line in [] if number in gone else tail.new():
                self._take(number, line)

    def _take(self, number: int, line: dict[str, Any]) -> None:
        newest = self.steps[-1].number if self.steps else 0
        if "process" in line:
            self._pids[number] = line["process"]
        elif line.get("begun", 0) > newest:
            self._samples[line["begun"]] = line["stop"] - line["start"]
        elif line.get("ended", 0) > newest:
            samples = self._samples.pop(line["ended"])
            members = frozenset(line["members"])
            self.steps.append(Step(line["ended"], time.monotonic(), samples, members))

    def kill(self, number: int) -> None:
        """Kill a process."""
        os.kill(self._pids[number], signal.SIGKILL)
        self.kills.append(Kill(time.monotonic(), number))


def goodput_of(
    steps: Sequence[Step], kills: Sequence[Kill], batch: int, sample_seconds: float
) -> dict[str, float]:
    """Return what part of what living ranks could do was done.

    Args:
        steps: That ended, in order; the first only begins the time.
        kills: During it.
        batch: Samples of a step of all ranks.
        sample_seconds: Emulated computing of a sample.

    Raises:
        Error: All ranks were never together without a fault.
    """
    world = max(len(step.members) for step in steps)
    pairs = list(itertools.pairwise(steps))
    calm = [
        after.time - before.time
        for before, after in pairs
        if len(after.members) == world
        and after.members == before.members
        and not any(before.time < kill.time <= after.time for kill in kills)
    ]
    if not calm:
        raise Error("all ranks were never together without a fault.", hint="give more --minutes.")
    rest = max(0.0, statistics.fmean(calm) - sample_seconds * batch / world)
    possible = 0.0
    for before, after in pairs:
        living = before.members | after.members
        living -= {kill.number for kill in kills if kill.time <= before.time}
        moment = before.time
        for kill in [kill for kill in kills if before.time < kill.time <= after.time]:
            possible += (kill.time - moment) * _rate(len(living), batch, sample_seconds, rest)
            living, moment = living - {kill.number}, kill.time
        possible += (after.time - moment) * _rate(len(living), batch, sample_seconds, rest)
    done = sum(step.samples for step in steps[1:])
    members = sum((after.time - before.time) * len(after.members) for before, after in pairs)
    return {
        "goodput": done / possible,
        "step_ms": 1e3 * statistics.fmean(calm),
        "exchange_ms": 1e3 * rest,
        "mean_ranks": members / (steps[-1].time - steps[0].time),
    }


def _rate(ranks: int, batch: int, sample_seconds: float, rest: float) -> float:
    """Return the samples a second that so many ranks could take."""
    return batch / (sample_seconds * batch / ranks + rest) if ranks else 0.0


def run(folder: Path, arguments: Arguments) -> dict[str, Any]:
    """Train under faults, and return what became of it."""
    out = folder / "run"
    command = [
        "hpctrain", "launch", "-np", str(arguments.ranks), "--",
        "hpctrain", "train", f"{TASK}:Digits", "--batch-size", str(arguments.batch),
        "--steps", str(MOST), "--out", str(out), "--trace-samples",
        "--set", f"options.sample_ms={arguments.sample_ms}", "--set", "log.tensorboard=false",
        "--set", f"checkpoint.every_steps={MOST}", "--set", f"train.validate_every_steps={MOST}",
    ]  # fmt: skip
    environment = {**os.environ, "PATH": search_path(), "OMP_NUM_THREADS": "1"}
    watch = Watch(out)
    with (folder / "log").open("w") as log:
        driver = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            env=environment, start_new_session=True,
        )  # fmt: skip
    with ended(driver):
        begin = faults(watch, driver, arguments)
        (out / STOP).touch()
        until(lambda: driver.poll() is not None, time.monotonic() + END_SECONDS)
    steps = [step for step in watch.steps if step.time >= begin]
    metrics = Tail(out / "metrics.jsonl").read()
    wrong = sample_trace.check(out).wrong
    record: dict[str, Any] = {
        "ranks": arguments.ranks,
        "every_seconds": arguments.every,
        "minutes": arguments.minutes,
        "sample_ms": arguments.sample_ms,
        "oversubscribed": arguments.ranks > cores(),
        "faults": len(watch.kills),
        "returns": sum("joined" in line for line in metrics),
        "steps": len(steps) - 1,
        "good": (out / INTERRUPTED).exists(),
        "samples_wrong": len(wrong),
        **goodput_of(steps, watch.kills, arguments.batch, 1e-3 * arguments.sample_ms),
    }
    for what in ("lost", "joined"):
        stalls = [line["step_ms"] for line in metrics if what in line]
        record |= spread_of(f"{what}_step_ms", stalls)
    if wrong or not record["good"]:
        record["wrong"] = wrong[:10]
        record["output"] = (folder / "log").read_text(errors="replace")[-4000:]
    return record


def faults(watch: Watch, driver: subprocess.Popen[bytes], arguments: Arguments) -> float:
    """Wait until all ranks train, and let faults come until it is over.

    Args:
        watch: Follows the run.
        driver: Of it.
        arguments: How many faults, and when.

    Returns:
        When the time began that counts.

    Raises:
        Error: The run did not start, or has ended.
    """

    def looked(seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            watch.look()
            if driver.poll() is not None:
                raise Error(f"the run ended by itself, with exit code {driver.returncode}.")
            time.sleep(LOOK_SECONDS)

    deadline = time.monotonic() + START_SECONDS
    while len(watch.living) < arguments.ranks:
        looked(0.1)
        if time.monotonic() > deadline:
            raise Error(f"{arguments.ranks} ranks did not come together.")
    looked(WARM_UP_SECONDS)
    generator = random.Random(arguments.seed)
    begin = time.monotonic()
    for number in range(1, int(60 * arguments.minutes / arguments.every)):
        looked(begin + number * arguments.every - time.monotonic())
        if len(watch.living) > LEAST_RANKS:
            watch.kill(generator.choice(sorted(watch.living)))
        say(f"{number * arguments.every:.0f} s: step {watch.steps[-1].number}, "
            f"{len(watch.living)} ranks")  # fmt: skip
    looked(begin + 60 * arguments.minutes - time.monotonic())
    return begin


def measure(arguments: Arguments) -> Report:
    """Train under faults once."""
    with scratch() as folder:
        record = run(folder, arguments)
    keys = ("faults", "returns", "steps", "mean_ranks", "step_ms", "exchange_ms", "lost_step_ms",
            "joined_step_ms", "goodput")  # fmt: skip
    rows = [[key.replace("_", " "), f"{record[key]:.4g}"] for key in keys if key in record]
    return Report([record], table(rows))


def options(add: Add) -> None:
    """Add the benchmark's own options."""
    add("--minutes", type=positive, default=30, help="default: %(default)s")
    add("--every", type=positive, default=15, help="seconds between faults; default: %(default)s")
    add("--ranks", type=count, default=4)
    add("--batch", type=count, default=96, help="of all ranks; default: %(default)s")
    add("--sample-ms", type=positive, default=1.0, help="emulated computing; default: %(default)s")
    add("--seed", type=int, default=0, help="of who is killed")


BENCHMARK = Benchmark(
    "goodput", __doc__, measure, options=options, bars=BARS, quick={"minutes": 2}, plots=False
)

if __name__ == "__main__":
    BENCHMARK.run()
