"""How long training stands still when a host of a Slurm job is killed, or its cable is cut.

    python -m benchmarks.elastic_hosts --runs 10 --data shards --engines hpctrain,stock,stock-tuned

A real Slurm cluster of four hosts in namespaces of this machine (root, and Slurm's and ssh's
packages, are needed). Each run is a job with ranks on three of them: ``hpctrain submit --elastic``,
or stock elastic Horovod (see elastic_engines.py) with the same model, data and global batch. At a
random step

- a host with neither rank 0 nor the batch script is killed (``worker``),
- the host with rank 0, the batch script and the launcher is killed (``first``); of ``stock-tuned``,
  whose batch script and launcher are on a fourth host, that with rank 0,
- or the cable of a host as in the first case is cut (``cable``).

The stall is from the end of the last step before the loss to the end of the next one, so it has a
step in it; the usual step is beside it. It is that of the survivor that stood still longest. All
engines' processes write down the ends of their steps in the same way. A run goes on if the
processes that are left complete it; if none of them ends a step for ``--patience`` seconds, it does
not. Of its steps, those are done again that had ended for a survivor, and were not kept. What
steps consumed that count is in the trace of samples: some twice, or some never. There are more
ranks than cores here: all points are oversubscribed.

The kinds and engines take turns. With ``--out``, what is there already is not run again, so that
runs can be made in parts of ``--seconds``, and ``--runs 0`` only prints the table. One line of JSON
for each run, then a table; all of it in ``--out``. The exit code is 1 if hpctrain did not go on, or
its samples are not each taken once.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import elastic_tasks
from benchmarks.elastic_engines import ENGINES, WORKERS, Work
from benchmarks.harness.bars import at_least, at_most
from benchmarks.harness.command import Add, Arguments, Benchmark, Report, count, words_of
from benchmarks.harness.rounds import quartiles
from benchmarks.harness.tables import table, tell
from benchmarks.slurm import slurm_cluster
from hpctrain import process
from tests.slurm.cluster import Cluster

KINDS = {"worker": "kill", "first": "kill", "cable": "cut"}
START_SECONDS = 120.0
SILENCE_SECONDS = 15.0  # without a step, before it is looked whether there are processes left
POLL_SECONDS = 0.1


class Samples(NamedTuple):
    """What the trace of a run says: steps that ended more than once, and samples that counted.

    Attributes:
        redone: Steps that ended, and were done again in another world.
        twice: Samples that were consumed more than once in an epoch.
        missed: Samples that an epoch went past.
    """

    redone: int
    twice: int
    missed: int


def samples(run: Path) -> Samples:
    """Read a run's trace; of each step counts what the last world did in which it ended."""
    begun: dict[tuple[int, tuple[int, ...]], dict[int, Any]] = {}
    ended: dict[int, dict[tuple[int, ...], list[int]]] = {}
    for path in sorted((run / "trace").glob("*.jsonl")):
        number = int(path.stem.partition("-")[2])
        for text in path.read_text().split("\n")[:-1]:
            line = json.loads(text)
            if "begun" in line:
                begun.setdefault((line["begun"], tuple(line["world"])), {})[number] = line
            elif "ended" in line:
                ended.setdefault(line["ended"], {})[tuple(line["world"])] = line["members"]
    consumed: dict[int, Counter[int]] = {}
    stops: dict[int, int] = {}
    for step in sorted(ended):
        world, members = max(ended[step].items())
        for member in members:
            line = begun[step, world][member]
            consumed.setdefault(line["epoch"], Counter()).update(line["samples"])
            stops[line["epoch"]] = line["stop"]
    return Samples(
        sum(len(worlds) > 1 for worlds in ended.values()),
        sum(sum(count > 1 for count in each.values()) for each in consumed.values()),
        sum(max(0, stop - len(consumed[epoch])) for epoch, stop in stops.items()),
    )


def stall_seconds(ends: list[float], hit: float) -> float | None:
    """Return the longest time between two ends of steps, from the last one before the fault on."""
    before = max((end for end in ends if end <= hit), default=None)
    if before is None or ends[-1] <= hit:
        return None
    since = [end for end in ends if end >= before]
    return max(later - earlier for earlier, later in itertools.pairwise(since))


def target(kind: str, driver: str, workers: list[elastic_tasks.Process]) -> str:
    """Return the host to lose."""
    hosts = {worker.host: worker.rank for worker in workers}
    zero = next(host for host, rank in hosts.items() if rank == 0)
    if kind == "first":
        return driver if driver in hosts else zero
    return max(host for host in hosts if host not in (driver, zero))


def processes(folder: Path) -> list[int]:
    """Return the processes whose command names a folder."""
    found = process.run(["pgrep", "--full", str(folder)], timeout_seconds=10).stdout
    return [int(word) for word in found.split()]


def watch(run: Path, host: str, patience: float) -> str:
    """Wait for the end of a run that has lost a host, and return what became of it."""
    began = time.monotonic()
    while not (run / "result.json").exists():
        time.sleep(POLL_SECONDS)
        left = [each for each in elastic_tasks.read(run) if each.host != host]
        idle = time.monotonic() - max([began, *(each.ends[-1] for each in left if each.ends)])
        if idle > patience:
            return f"no step for {patience:.0f} s"
        if idle > SILENCE_SECONDS and not processes(run):
            return "all processes ended"
    return "went on"


def one(
    cluster: Cluster, engine: str, kind: str, number: int, work: Work, patience: float
) -> dict[str, Any]:
    """Run once, and return what became of it."""
    generator = random.Random(f"{kind}-{number}")
    at = generator.randrange(work.steps // 4, work.steps // 2)
    pause = generator.uniform(0, 0.2)
    folder = Path(tempfile.mkdtemp(prefix="elastic-hosts-"))
    run = folder / "run"
    record: dict[str, Any] = {"engine": engine, "kind": kind, "run": number, "step": at}
    host, job = "", ENGINES[engine].submit(cluster, work, run)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not (
            len(workers := elastic_tasks.read(run)) == WORKERS
            and min(len(each.ends) for each in workers) >= at
        ):
            if time.monotonic() > deadline:
                return {**record, "outcome": "did not start", "log": log(folder)}
            time.sleep(0.02)
        time.sleep(pause)
        host = target(kind, ENGINES[engine].driver, workers)
        hit = time.monotonic()
        getattr(cluster, KINDS[kind])(host)
        load = round(os.getloadavg()[0], 1)
        record |= {"host": host, "outcome": watch(run, host, patience), "load": load}
        left = [each for each in elastic_tasks.read(run) if each.host != host and each.ends]
        survivors = [each for each in left if each.ends[0] < hit]
        stalls = [stall_seconds(each.ends, hit) for each in survivors]
        if record["outcome"] != "went on":
            record["log"] = log(folder)
        elif len(left) != len(survivors) or any(each is None for each in stalls):
            record["outcome"] = "went on in other processes"
        else:
            usual = [b - a for e in survivors for a, b in itertools.pairwise(e.ends) if b < hit]
            record["stall_ms"] = round(1e3 * max(each for each in stalls if each is not None), 1)
            record["usual_step_ms"] = round(1e3 * statistics.median(usual), 1)
            record |= samples(run)._asdict()
        return record
    finally:
        if KINDS[kind] == "cut" and host:
            cluster.heal(host)
        cluster.run("scancel", job)
        for pid in processes(folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        cluster.mend()
        shutil.rmtree(folder, ignore_errors=True)


def log(folder: Path) -> str:
    """Return the end of a run's log."""
    text = "".join(path.read_text(errors="replace") for path in sorted(folder.rglob("*.out")))
    return text[-2000:]


def summary(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a record for each kind and engine; stalls in milliseconds."""
    found = []
    for kind, engine in itertools.product(KINDS, ENGINES):
        some = [each for each in records if (each["kind"], each["engine"]) == (kind, engine)]
        good = [each for each in some if each["outcome"] == "went on"]
        if not some:
            continue
        each = {"kind": kind, "engine": engine, "runs": len(some), "went_on": len(good)}
        each["went_on_share"] = len(good) / len(some)
        if good:
            stalls = [one["stall_ms"] for one in good]
            low, middle, high = quartiles(stalls)
            each |= {"stall_ms": middle, "stall_ms_min": min(stalls), "stall_ms_max": max(stalls)}
            each["stall_ms_quartiles"] = [low, high]
            each["usual_step_ms"] = statistics.median(one["usual_step_ms"] for one in good)
            each |= {name: sum(one[name] for one in good) for name in Samples._fields}
        found.append(each)
    return found


def show(records: list[dict[str, Any]]) -> str:
    """Return a table of the summary."""
    rows = [["what is lost: engine", "runs", "went on", "stall: median", "quartiles", "max",
             "usual step", "steps done again", "samples twice", "never"]]  # fmt: skip
    for each in records:
        row = [f"{each['kind']}: {each['engine']}", str(each["runs"]), str(each["went_on"])]
        if "stall_ms" in each:
            row += [f"{each['stall_ms']:.0f}", "{:.0f}-{:.0f}".format(*each["stall_ms_quartiles"])]
            row += [f"{each['stall_ms_max']:.0f}", f"{each['usual_step_ms']:.0f}"]
            row += [str(each[name]) for name in Samples._fields]
        rows.append(row + ["-"] * (len(rows[0]) - len(row)))
    return table(rows)


def measure(arguments: Arguments) -> Report:
    """Make the runs that are not there yet."""

    def report() -> Report:
        found = summary(records)
        more = {"task": work.task, "batch_size": work.batch_size}
        return Report(records, show(found), more, summary=found)

    data = arguments.data and arguments.data.resolve()
    work = Work("cifar10" if data else "digits", data, arguments.batch_size, arguments.steps)
    records: list[dict[str, Any]] = []
    file = arguments.out and arguments.out / f"{BENCHMARK.name}.json"
    if file and file.exists():
        records = json.loads(file.read_text())["records"]
    there = {(each["run"], each["kind"], each["engine"]) for each in records}
    cases = itertools.product(range(arguments.runs), arguments.kinds, arguments.engines)
    left = [case for case in cases if case not in there]
    if not left:
        return report()
    began = time.monotonic()
    with slurm_cluster(4) as cluster:
        for number, kind, engine in left:
            if arguments.seconds is not None and time.monotonic() - began > arguments.seconds:
                break
            records.append(one(cluster, engine, kind, number, work, arguments.patience))
            tell(records[-1])
            if arguments.out is not None:
                BENCHMARK.save(report(), arguments)
    return report()


def options(add: Add) -> None:
    """Add the benchmark's own options."""
    add("--runs", type=int, default=2, help="of each kind and engine")
    add("--kinds", type=words_of(KINDS), default=",".join(KINDS))
    add("--engines", type=words_of(ENGINES), default="hpctrain", help=f"of {', '.join(ENGINES)}")
    add("--data", type=Path, help="shards of CIFAR-10; without: the digits")
    add("--batch-size", type=count, default=24, help="of all three ranks")
    add("--steps", type=count, default=60)
    add("--patience", type=float, default=60, help="seconds without a step")
    add("--seconds", type=float, help="begin no run after so long")


BARS = (
    at_least("went_on_share", 1.0, must=True, kind=tuple(KINDS), engine="hpctrain"),
    at_most("twice", 0, must=True, kind=tuple(KINDS), engine="hpctrain"),
    at_most("missed", 0, must=True, kind=tuple(KINDS), engine="hpctrain"),
)
QUICK = {"runs": 1, "kinds": "worker"}
BENCHMARK = Benchmark(
    "elastic_hosts", __doc__, measure, options=options, bars=BARS, quick=QUICK, plots=False
)

if __name__ == "__main__":
    BENCHMARK.run()
