"""Whether a run stays one run however often, and whenever, its job is told that time is up.

    python -m benchmarks.requeues --requeues 200 --out benchmarks/results
    python -m benchmarks.requeues --trials 30

A real Slurm cluster of four hosts on this machine (Slurm's packages are needed). Some runs at a
time, each one a job of a rank that is told by USR1 that time is up, at random moments, also before
it trains and while it saves, and so is put back into the queue, again and again. After a third of
the signals the controller is stopped (SIGSTOP) for 5 to 75 s, within a second: it does what it was
asked for when it goes on.

Held against a run that nothing happened to: each ends with the same parameters, bit for bit, and
nothing was submitted but one job for each. One line of JSON for each run. The exit code is 1 if one
of them does not hold. There are as many ranks as cores, or more.

With ``--trials`` a sweep of so many trials instead, each of which is put back into the queue twice
at random moments, by USR1 or by ``scontrol requeue``: each is completed, with its own values, and
there are no others.
"""

from __future__ import annotations

import contextlib
import csv
import json
import random
import time
from pathlib import Path
from typing import Any

from benchmarks.harness.bars import at_least, at_most
from benchmarks.harness.command import Add, Arguments, Benchmark, Report, count, positive
from benchmarks.harness.processes import scratch
from benchmarks.harness.tables import tell
from benchmarks.slurm import slurm_cluster
from tests.slurm.cluster import Cluster

TASK = Path(__file__).parents[1] / "tests" / "slurm" / "faulty_task.py"
TRAIN = (TASK, "--nodes", "1", "--epochs", "4", "--set", "checkpoint.every_steps=20")
SILENCE = (5.0, 75.0)
PAUSE_SECONDS = 1.0
"""Of each step, of 92: so a run is not over before its signals."""

LOOK_SECONDS = 0.3
SUBMIT_SECONDS = 600.0
CRED_SECONDS = 30
"""A requeued job waits for so long; a step that comes later, on a busy machine, is refused."""

RUN_SECONDS = 600.0
SUBMITTED = "_slurm_rpc_submit_batch_job: JobId="
SPACE = """\
metric = "val_loss"
seed = 3
startup_trials = {trials}
[space]
"optimizer.lr" = {{low = 1e-4, high = 1e-2, log = true}}
"""
ORDERS = (("scancel", "--signal=USR1", "--batch"), ("scontrol", "requeue"))
TRIAL_ORDERS = 2
SWEEP_SECONDS = 3600.0


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

    def __init__(
        self, cluster: Cluster, folder: Path, *, pause: float, signals: int, within: float
    ) -> None:
        self.folder = folder
        self._within = within
        self.signals = 0
        self.silences = 0
        self._cluster = cluster
        self._left = signals
        done = cluster.run("hpctrain", "submit", *map(str, TRAIN), "--set",
                           f"options.pause={pause}", "--out", str(folder), "--time", "60:00",
                           cwd=folder.parent, timeout_seconds=SUBMIT_SECONDS)  # fmt: skip
        assert done.returncode == 0, done.stdout
        self.job = done.stdout.split()[1].rstrip(":")
        self._next: float | None = None
        self._deadline = time.monotonic() + RUN_SECONDS * (1 + signals)

    @property
    def left(self) -> int:
        """How many signals are still to come."""
        return self._left

    def look(self, running: set[str], chance: random.Random) -> bool:
        """Send the next signal if it is time to.

        Args:
            running: The jobs that run now.
            chance: Chooses the moment.

        Returns:
            Whether one was sent.
        """
        if self.job not in running or self._left == 0:
            self._next = None
            return False
        if self._next is None:
            self._next = time.monotonic() + chance.uniform(0.0, self._within)
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
    whole = Run(cluster, folder / "whole", pause=0.0, signals=0, within=0.0)
    while not whole.over():
        time.sleep(1)
    expected = json.loads((whole.folder / "result.json").read_text())["parameters_sha256"]
    records: list[dict[str, Any]] = []
    running: list[Run] = []
    begun = 0

    def more() -> bool:
        """Whether the runs so far will not do: some are over before all their signals came."""
        coming = sum(run.signals + run.left for run in running)
        return (sum(record["requeues"] for record in records) + coming < asked.requeues
                and time.monotonic() - began < asked.seconds)  # fmt: skip

    while running or more():
        time.sleep(LOOK_SECONDS)
        if not controller.look():
            continue
        if len(running) < asked.at_once and more():
            running.append(Run(cluster, folder / f"run-{begun:03}", pause=PAUSE_SECONDS,
                               signals=asked.each, within=asked.within))  # fmt: skip
            begun += 1
        said = cluster.run("squeue", "--noheader", "--states=R", "--format=%i").stdout
        now = set(said.split())
        for run in list(running):
            if run.look(now, chance) and chance.random() < asked.silent:
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


def sweep(
    cluster: Cluster, folder: Path, trials: int, within: float, chance: random.Random
) -> dict[str, Any]:
    """A sweep whose trials are put back into the queue; what became of them.

    Args:
        cluster: Where.
        folder: For the sweep.
        trials: How many.
        within: Seconds of each start in which something happens to it.
        chance: Chooses the moments, and how.
    """
    (folder / "space.toml").write_text(SPACE.format(trials=trials))
    done = cluster.run(
        "hpctrain", "sweep", str(TASK), "--set", "options.pause=0.3", "--set",
        "checkpoint.every_steps=20", "--space", "space.toml", "--trials", str(trials), "--jobs",
        "4", "--submit", "--epochs", "4", "--out", "sweep", "--time", "60:00", cwd=folder,
        timeout_seconds=SUBMIT_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    job = done.stdout.split()[2].rstrip(":")
    left = {f"{job}_{task}": TRIAL_ORDERS for task in range(1, trials + 1)}
    moments: dict[str, float] = {}
    given = dict.fromkeys((order[0] for order in ORDERS), 0)
    began = time.monotonic()
    while time.monotonic() - began < SWEEP_SECONDS:
        time.sleep(LOOK_SECONDS)
        said = cluster.run("squeue", "--noheader", "--array", "--format=%i %t")
        lines = said.stdout.splitlines()
        if said.returncode == 0 and not lines:
            break
        running = {line.split()[0] for line in lines if line.split()[1:] == ["R"]}
        moments = {task: when for task, when in moments.items() if task in running}
        for task in running & left.keys():
            if left[task] and time.monotonic() > moments.setdefault(
                task, time.monotonic() + chance.uniform(0.0, within)
            ):
                order = chance.choice(ORDERS)
                if cluster.run(*order, task).returncode == 0:
                    given[order[0]] += 1
                    left[task] -= 1
                del moments[task]
    cluster.call("hpctrain", "trials", "sweep", cwd=folder)
    with (folder / "sweep" / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    logs = [path.read_text() for path in (folder / "sweep").glob(f"*-{job}_*.out")]
    # The first line of each start, "trial 3: {values}".
    starts = [[line for line in log.splitlines() if line.startswith("trial ") and "{" in line]
              for log in logs]  # fmt: skip
    states = [row["state"] for row in rows]
    good = (
        states == ["complete"] * trials
        and len(logs) == trials
        and all(len(set(lines)) == 1 for lines in starts)
        and len({lines[0] for lines in starts}) == trials
        and len({row["optimizer.lr"] for row in rows}) == trials
    )
    return {
        "good": good,
        "trials": len(rows),
        "states": {state: states.count(state) for state in set(states)},
        "signals": given["scancel"],
        "requeued": given["scontrol"],
        "starts": sum(map(len, starts)),
        "values": len({line for lines in starts for line in lines}),
    }


def measure(asked: Arguments) -> Report:
    """Run the campaign, or the sweep."""
    chance = random.Random(asked.seed)
    with (
        scratch() as folder,
        slurm_cluster(4, own_hosts=False, cred_seconds=CRED_SECONDS) as cluster,
    ):
        if asked.trials is not None:
            found = sweep(cluster, folder, asked.trials, asked.within, chance)
            return Report([found], json.dumps(found))
        records, submitted = campaign(cluster, folder, asked, chance)
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
    add("--within", type=positive, default=12.0,
        help="seconds of a start in which a signal comes")  # fmt: skip
    add("--silent", type=float, default=1 / 3)
    add("--trials", type=count, help="a sweep of so many instead")
    add("--seconds", type=positive, default=1e9, help="begin no run after this")
    add("--seed", type=int, default=0)


BARS = (
    at_most("wrong", 0, must=True),
    at_most("submitted_too_many", 0, must=True),
    at_least("good", 1, must=True),
)
QUICK = {"requeues": 2, "each": 2, "silent": 0.0}
BENCHMARK = Benchmark(
    "requeues", __doc__, measure, options=options, bars=BARS, quick=QUICK, plots=False
)

if __name__ == "__main__":
    BENCHMARK.run()
