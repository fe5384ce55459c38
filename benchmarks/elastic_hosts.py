"""How long training stands still when a host of a Slurm job is killed, or its cable is cut.

    python -m benchmarks.elastic_hosts --runs 10 --data shards

A real Slurm cluster of four hosts in namespaces of this machine (root, and Slurm's packages, are
needed). Each run is a job of three of them, submitted with ``--elastic``; at a random step

- a host with neither rank 0 nor the batch script is killed (``worker``),
- the host with rank 0, the batch script and srun is killed (``first``),
- or a host's cable is cut (``cable``).

The stall is from the end of the last step before the loss to the end of the next one, as the event
in the metrics has it, and so has a step in it; the usual step is beside it. A run is good if it is
completed by the processes that are left, and the trace of samples has each once an epoch. There are
more ranks than cores here: all points are oversubscribed.

One line of JSON for each run, then a table; all of it in ``--out``.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.output import table, write
from hpctrain.elastic import ledger
from tests.slurm.cluster import Cluster

KINDS = {"worker": ("kill", "n3"), "first": ("kill", "n1"), "cable": ("cut", "n3")}
HOSTS, LOG_STEPS = 3, 2
SECONDS = 240.0


def metrics(run: Path) -> list[dict[str, Any]]:
    """What a run has recorded so far."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def one(cluster: Cluster, kind: str, number: int, task: list[str], steps: int) -> dict[str, Any]:
    """A run, and what became of it."""
    how, host = KINDS[kind]
    generator = random.Random(f"{kind}-{number}")
    at = generator.randrange(steps // 4, steps // 2)
    folder = Path(tempfile.mkdtemp(prefix="elastic-hosts-"))
    run = folder / "run"
    submit = [
        "hpctrain", "submit", *task, "--nodes", str(HOSTS), "--elastic", "--trace-samples",
        "--steps", str(steps), "--set", f"log.every_steps={LOG_STEPS}",
        "--set", "log.tensorboard=false", "--out", str(run), "--time", "20:00",
    ]  # fmt: skip
    record: dict[str, Any] = {"kind": kind, "run": number, "step": at, "verdict": "good"}
    job = cluster.call(*submit, cwd=folder).split()[1].rstrip(":")
    try:
        deadline = time.monotonic() + SECONDS
        hit = False
        while not (run / "result.json").exists() and time.monotonic() < deadline:
            lines = metrics(run)
            if not hit and lines and lines[-1]["step"] >= at:
                time.sleep(generator.uniform(0, 0.2))
                getattr(cluster, how)(host)
                hit = True
            time.sleep(0.01)
        lines = metrics(run)
        lost = [line for line in lines if "lost" in line]
        rates = [line["samples_per_second"] for line in lines if line["kind"] == "train"]
        if not (run / "result.json").exists():
            record["verdict"] = "not completed"
        elif [line["host"] for line in lost] != [host]:
            record["verdict"] = "other hosts were lost, or the run was started again"
        elif wrong := ledger.check(run).wrong:
            record["verdict"] = wrong[0]
        if lost and rates:
            batch = json.loads((run / "result.json").read_text())["samples"] / steps
            record["stall_ms"] = lost[0]["step_ms"]
            record["usual_step_ms"] = round(1e3 * batch / statistics.median(rates), 1)
    finally:
        if how == "cut":
            cluster.heal(host)
        cluster.run("scancel", job)
        cluster.mend()
        shutil.rmtree(folder, ignore_errors=True)
    return record


def summary(records: list[dict[str, Any]]) -> str:
    """A line for each kind."""
    rows = [["what is lost", "runs", "good", "stall ms median", "max", "usual step ms"]]
    for kind in KINDS:
        some = [record for record in records if record["kind"] == kind]
        stalls = [record["stall_ms"] for record in some if "stall_ms" in record]
        if not stalls:
            continue
        usual = statistics.median(r["usual_step_ms"] for r in some if "usual_step_ms" in r)
        good = sum(record["verdict"] == "good" for record in some)
        rows.append(
            [kind, str(len(some)), str(good), f"{statistics.median(stalls):.0f}",
             f"{max(stalls):.0f}", f"{usual:.0f}"]
        )  # fmt: skip
    return table(rows)


def main() -> int:
    """Run all; 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=2, help="of each kind")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--data", type=Path, help="shards of CIFAR-10; without: the digits")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, help="folder for all records, as JSON and CSV")
    options = parser.parse_args()
    task = (
        ["digits"] if options.data is None else ["cifar10", "--data", str(options.data.resolve())]
    )
    task += ["--batch-size", str(options.batch_size)]
    records = []
    cluster = Cluster(4)
    try:
        cluster.up()
        for number in range(options.runs):
            for kind in options.kinds.split(","):
                records.append(one(cluster, kind, number, task, options.steps))
                print(json.dumps(records[-1]), flush=True)
    finally:
        cluster.down()
    print(summary(records))
    if options.out is not None:
        write(options.out, "elastic_hosts", records)
    return int(any(record["verdict"] != "good" for record in records))


if __name__ == "__main__":
    raise SystemExit(main())
