"""Whether a run stays one run however often, and whenever, its job is told that time is up.

    python -m benchmarks.requeues --requeues 200 --out benchmarks/results

A real Slurm cluster of four hosts on this machine (Slurm's packages are needed). Some runs at a
time, each one a job of a rank that is told by USR1 that time is up, at random moments, also before
it trains and while it saves, and so is put back into the queue, again and again. After a third of
the signals the controller is stopped (SIGSTOP) for 5 to 75 s, within a second: it does what it was
asked for when it goes on.

Held against a run that nothing happened to: each ends with the same parameters, bit for bit, and
nothing was submitted but one job for each. One line of JSON for each run. The exit code is 1 if one
of them does not hold. There are as many ranks as cores, or more.
"""

from __future__ import annotations

import contextlib
import json
import random
import time
from pathlib import Path
from typing import Any

from benchmarks.harness.bars import at_most
from benchmarks.harness.command import Add, Arguments, Benchmark, Report, count
from benchmarks.harness.processes import scratch
from benchmarks.harness.tables import tell
from benchmarks.slurm import slurm_cluster
from tests.slurm.cluster import Cluster

TASK = Path(__file__).parents[1] / "tests" / "slurm" / "faulty_task.py"
TRAIN = (TASK, "--nodes", "1", "--epochs", "4", "--set", "checkpoint.every_steps=20")
SILENCE = (5.0, 75.0)
MOMENT = (0.0, 12.0)
PAUSE_SECONDS = 0.5
"""Of each step, of 92: so a run is not over before its signals."""

RUN_SECONDS = 240.0
SUBMITTED = "_slurm_rpc_submit_batch_job: JobId="


class Controller:
    """The cluster's controller, which can be stopped for a while."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._silence = contextlib.ExitStack()
        self._until = 0.0

    def stop(self, seconds: float) -> None:
        """Stop it for so long; :meth:`look` lets it go on."""
        self._silence.enter_context(self._cluster.silent())
        self._until = time.monotonic() + seconds

    def look(self) -> bool:
        """Let it go on if it is time to; whether it answers."""
        if self._until and time.monotonic() > self._until:
            self._silence.close()
            self._until = 0.0
        return self._until == 0.0


class Run:
    """A run, and the signals that are still to come to it."""

    def __init__(self, cluster: Cluster, folder: Path, pause: float, signals: int) -> None:
        self.folder = folder
        self.signals = 0
        self.silences = 0
        self._cluster = cluster
        self._left = signals
        done = cluster.run("hpctrain", "submit", *map(str, TRAIN), "--set",
                           f"options.pause={pause}", "--out", str(folder), "--time", "30:00",
                           cwd=folder.parent)  # fmt: skip
        assert done.returncode == 0, done.stdout
        self.job = done.stdout.split()[1].rstrip(":")
        self._next: float | None = None
        self._deadline = time.monotonic() + RUN_SECONDS * (1 + signals)

    def look(self, chance: random.Random) -> bool:
        """Send the next signal if it is time to; whether one was sent."""
        running = self._cluster.run("squeue", "--noheader", f"--jobs={self.job}", "--states=R",
                                    "--format=%i").stdout.strip() == self.job  # fmt: skip
        if not running or self._left == 0:
            self._next = None
            return False
        if self._next is None:
            self._next = time.monotonic() + chance.uniform(*MOMENT)
        if time.monotonic() < self._next:
            return False
        self._next = None
        self._left -= 1
        self.signals += 1
        return self._cluster.run(
            "scancel", "--signal=USR1", "--batch", self.job
        ).returncode == 0  # fmt: skip

    def over(self) -> bool:
        """Whether it has ended, or never will."""
        ended = (self.folder / "result.json").exists() or (self.folder / "failure.json").exists()
        if time.monotonic() > self._deadline:
            return True
        return (
            ended
            and self._cluster.run(
                "squeue", "--noheader", f"--jobs={self.job}", "--states=R,CG,PD", "--format=%i"
            ).stdout.strip()
            == ""
        )

    def record(self, expected: str) -> dict[str, Any]:
        """What became of it."""
        result = self.folder / "result.json"
        found = json.loads(result.read_text())["parameters_sha256"] if result.exists() else None
        log = "".join(path.read_text() for path in sorted(self.folder.glob("*.out")))
        owners = [json.loads(path.read_text()) for path in (self.folder / "owners").glob("*.json")]
        return {
            "signals": self.signals,
            "silences": self.silences,
            "requeues": max(owner["again"] for owner in owners),
            "jobs": len({owner["job"] for owner in owners}),
            "same": found == expected,
            "last": log.strip().splitlines()[-1] if log else "",
        }


def campaign(
    cluster: Cluster, folder: Path, asked: Arguments, chance: random.Random
) -> tuple[list[dict[str, Any]], int]:
    """All runs, and how many jobs were submitted for them."""
    began = time.monotonic()
    controller = Controller(cluster)
    whole = Run(cluster, folder / "whole", 0.0, 0)
    while not whole.over():
        time.sleep(1)
    expected = json.loads((whole.folder / "result.json").read_text())["parameters_sha256"]
    records: list[dict[str, Any]] = []
    running: list[Run] = []
    begun = 0
    while running or (begun * asked.each < asked.requeues):
        if time.monotonic() - began > asked.seconds and not running:
            break
        time.sleep(0.2)
        if not controller.look():
            continue
        more = begun * asked.each < asked.requeues and time.monotonic() - began < asked.seconds
        if more and len(running) < asked.at_once:
            running.append(Run(cluster, folder / f"run-{begun:03}", PAUSE_SECONDS, asked.each))
            begun += 1
        for run in list(running):
            if run.look(chance) and chance.random() < asked.silent:
                time.sleep(chance.uniform(0.0, 1.0))
                controller.stop(chance.uniform(*SILENCE))
                run.silences += 1
                break
            if run.over():
                running.remove(run)
                records.append(run.record(expected))
                tell(records[-1])
    log = (cluster.folder / "log" / "slurmctld.log").read_text()
    return records, log.count(SUBMITTED) - 1


def measure(asked: Arguments) -> Report:
    """Run the campaign."""
    with scratch() as folder, slurm_cluster(4) as cluster:
        records, submitted = campaign(cluster, folder, asked, random.Random(asked.seed))
    keys = ("signals", "requeues", "silences")
    found = {"runs": len(records), **{key: sum(each[key] for each in records) for key in keys}}
    found["submitted_too_many"] = submitted - len(records)
    found["wrong"] = sum(not each["same"] or each["jobs"] != 1 for each in records)
    text = ", ".join(f"{value} {key.replace('_', ' ')}" for key, value in found.items())
    return Report(records, text, summary=[found])


def options(add: Add) -> None:
    """Add the benchmark's own options."""
    add("--requeues", type=count, default=200)
    add("--each", type=count, default=4, help="signals to each run")
    add("--at-once", type=count, default=3)
    add("--silent", type=float, default=1 / 3)
    add("--seconds", type=float, default=1e9, help="begin no run after this")
    add("--seed", type=int, default=0)


BARS = (at_most("wrong", 0, must=True), at_most("submitted_too_many", 0, must=True))
QUICK = {"requeues": 2, "each": 2, "silent": 0.0}
BENCHMARK = Benchmark(
    "requeues", __doc__, measure, options=options, bars=BARS, quick=QUICK, plots=False
)

if __name__ == "__main__":
    BENCHMARK.run()
