"""How soon a node that comes back is at work again, and how long the others stand still for it.

    python -m benchmarks.elastic_return --runs 10 --data shards

A real Slurm cluster of three hosts in namespaces of this machine (root, and Slurm's packages, are
needed), and a pool of three jobs of one rank each, by ``hpctrain launch --pool 3``. At a random
step a host is killed; the others go on. When Slurm has set it down, after 10 s in this cluster, it
is switched on again. (Before that Slurm takes its job for completing, for a minute.) The run goes
on until the node has come back, however fast its steps are, and is then asked to stop. Measured are

- the stall of the others at the loss: from the end of the last step before to the end of the next,
- from when Slurm has the node again to the end of the first step that its new rank takes part in,
- the stall of the others for that: the step of the joining.

A run is good if the node came back, the run stopped in good order, the world's sizes were 3, 2, 3,
and the trace of samples has each once an epoch. There are more ranks than cores here: all points
are oversubscribed.

One line of JSON for each run, then a table; all of it in ``--out``.
"""

from __future__ import annotations

import random
import statistics
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.bars import at_least, at_most
from benchmarks.harness.command import Add, Arguments, Benchmark, Report, count
from benchmarks.harness.processes import Tail, ended, scratch, until
from benchmarks.harness.rounds import spread_of
from benchmarks.harness.tables import table, tell
from benchmarks.slurm import slurm_cluster
from hpctrain.run_folder import INTERRUPTED, STOP
from hpctrain.train import sample_trace
from tests.slurm.cluster import Cluster

HOSTS, LOST = 3, "n3"
SECONDS = 200.0  # of a run at the most
TIMEOUT_SECONDS = 10  # of Slurm's, after which a silent node is down
AWAY_SECONDS = 15.0
STEPS = 10**9  # more than there is time for
STEPS_AFTER = 20  # with the node that is back, before the run is asked to stop
FIGURES = {
    "loss_stall_ms": "stall at the loss, ms",
    "back_seconds": "from available to at work, s",
    "join_stall_ms": "stall for the joining, ms",
    "usual_step_ms": "usual step, ms",
}
BARS = (
    at_least("good_share", 1.0, must=True),
    at_most("back_seconds", 2.5),
    at_most("join_stall_ms", 100),
    at_most("loss_stall_ms", 100),
)


def available(cluster: Cluster) -> bool:
    """Return whether Slurm has the node again."""
    state = cluster.run("sinfo", "--noheader", f"--nodes={LOST}", "--format=%T").stdout.split()
    return bool(state) and all(each in ("idle", "allocated", "mixed") for each in state)


def command_of(folder: Path, run: Path, task: Sequence[str]) -> list[str]:
    """Return what starts the pool, whose ranks train a task."""
    return [
        "hpctrain", "launch", "--pool", str(HOSTS), "--sbatch=--exclusive", "--logs",
        str(folder / "pool"), "--", "hpctrain", "train", *task, "--steps", str(STEPS), "--out",
        str(run), "--trace-samples", "--set", "log.every_steps=10",
        "--set", "log.tensorboard=false",
    ]  # fmt: skip


def one(cluster: Cluster, number: int, task: Sequence[str], batch: int) -> dict[str, Any]:
    """Run once, and return what became of it.

    Args:
        cluster: It is whole again afterwards.
        number: Of the run; it decides when the host is killed.
        task: What `hpctrain train` is given.
        batch: Its global batch.
    """
    at = random.Random(number).randrange(20, 60)
    record: dict[str, Any] = {"run": number, "step": at}
    with scratch() as folder:
        go = ("sh", "-c", 'cd "$0" && exec "$@"', str(folder))
        run = folder / "run"
        with (folder / "log").open("w") as log:
            driver = subprocess.Popen(
                cluster.command(*go, *command_of(folder, run, task)), env=cluster.environment,
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        try:
            with ended(driver):
                record |= outlived(cluster, driver, run, at, batch)
            if record["verdict"] != "good":
                texts = [folder / "log", *sorted((folder / "pool").glob("*.out"))]
                record["output"] = [text.read_text(errors="replace")[-2000:] for text in texts]
        finally:
            cluster.run("scancel", "--user=root")
            cluster.mend()
    return record


def outlived(
    cluster: Cluster, driver: subprocess.Popen[bytes], run: Path, at: int, batch: int
) -> dict[str, Any]:
    """Have a run lose its node and get it back, and return the verdict and what was measured."""
    metrics = Tail(run / "metrics.jsonl")
    deadline = time.monotonic() + SECONDS

    def events(word: str) -> list[dict[str, Any]]:
        return [line for line in metrics.read() if word in line]

    def farthest() -> int:
        return max((line["step"] for line in metrics.read()), default=-1)

    if not until(lambda: farthest() >= at, deadline):
        return {"verdict": "the pool did not start"}
    cluster.kill(LOST)
    if not until(lambda: events("lost"), deadline):
        return {"verdict": "the loss was not outlived"}
    time.sleep(AWAY_SECONDS)
    cluster.start(LOST)
    if not until(lambda: available(cluster), deadline):
        return {"verdict": f"Slurm did not have {LOST} again"}
    back = time.time()
    if not until(lambda: events("joined"), deadline):
        return {"verdict": f"{LOST} did not come back within {time.time() - back:.0f} s"}
    lost, joined = events("lost")[0], events("joined")[0]
    until(lambda: farthest() >= joined["step"] + STEPS_AFTER, deadline)
    (run / STOP).touch()
    until(lambda: driver.poll() is not None, deadline)
    rates = [line["samples_per_second"] for line in metrics.read() if "lr" in line]
    return {
        "verdict": verdict_of(run, [HOSTS, *(line["size"] for line in metrics.read()
                                             if {"lost", "joined"} & set(line))]),
        "loss_stall_ms": lost["step_ms"],
        "back_seconds": round(joined["time"] - back, 2),
        "join_stall_ms": joined["step_ms"],
        "usual_step_ms": round(1e3 * batch / statistics.median(rates), 1),
    }  # fmt: skip


def verdict_of(run: Path, sizes: Sequence[int]) -> str:
    """Return what is wrong with a run that was asked to stop, or that it is good.

    Args:
        run: The folder.
        sizes: Of its worlds, in order.
    """
    if not (run / INTERRUPTED).exists():
        return "did not stop in good order"
    if wrong := sample_trace.check(run).wrong:
        return wrong[0]
    return "good" if list(sizes) == [3, 2, 3] else f"worlds of {sizes}, not of 3, 2, 3"


def summary(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the record of all runs."""
    good = sum(record["verdict"] == "good" for record in records)
    found = {"hosts": HOSTS, "runs": len(records), "good": good}
    found["good_share"] = good / len(records)
    for name in FIGURES:
        found |= spread_of(name, [record[name] for record in records if name in record])
    return found


def show(found: dict[str, Any]) -> str:
    """Return a table with a line for each figure."""
    rows = [["", "median", "max"]]
    for name, title in FIGURES.items():
        if name in found:
            rows.append([title, f"{found[name]:.4g}", f"{found[f'{name}_max']:.4g}"])
    return f"{table(rows)}\n{found['good']} of {found['runs']} runs were good"


def measure(arguments: Arguments) -> Report:
    """Make all runs."""
    task = ["digits" if arguments.data is None else "cifar10"]
    task += ["--batch-size", str(arguments.batch_size)]
    if arguments.data is not None:
        task += ["--data", str(arguments.data.resolve())]
    records = []
    with slurm_cluster(HOSTS, slurmd_timeout=TIMEOUT_SECONDS) as cluster:
        for number in range(arguments.runs):
            records.append(one(cluster, number, task, arguments.batch_size))
            tell(records[-1])
    found = summary(records)
    return Report(records, show(found), summary=[found])


def options(add: Add) -> None:
    """Add the benchmark's own options."""
    add("--runs", type=count, default=2)
    add("--data", type=Path, help="shards of CIFAR-10; without: the digits")
    add("--batch-size", type=count, default=32)


BENCHMARK = Benchmark(
    "elastic_return", __doc__, measure, options=options, bars=BARS, quick={"runs": 1}, plots=False
)

if __name__ == "__main__":
    BENCHMARK.run()
