"""How soon a node that comes back is at work again, and how long the others stand still for it.

    python -m benchmarks.elastic_return --runs 10 --data shards

A real Slurm cluster of three hosts in namespaces of this machine (root, and Slurm's packages, are
needed), and a pool of three jobs of one rank each, by ``hpctrain launch --pool 3``. At a random
step a host is killed; the others go on. When Slurm has set it down, after 10 s in this cluster, it
is switched on again. (Before that Slurm takes its job for completing, for a minute.) Measured are

- the stall of the others at the loss: from the end of the last step before to the end of the next,
- from when Slurm has the node again to the end of the first step that its new rank takes part in,
- the stall of the others for that: the step of the joining.

A run is good if it is completed, the world's sizes were 3, 2, 3, and the trace of samples has each
once an epoch. There are more ranks than cores here: all points are oversubscribed.

One line of JSON for each run, then a table; all of it in ``--out``.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.output import table, write
from hpctrain.train import sample_trace
from tests.slurm.cluster import Cluster

HOSTS, LOST = 3, "n3"
SECONDS = 200.0
TIMEOUT_SECONDS = 10  # of Slurm's, after which a silent node is down
AWAY_SECONDS = 15.0
FIGURES = {
    "loss_stall_ms": "stall at the loss, ms",
    "back_seconds": "from available to at work, s",
    "join_stall_ms": "stall for the joining, ms",
    "usual_step_ms": "usual step, ms",
}


def metrics(run: Path) -> list[dict[str, Any]]:
    """What a run has recorded so far."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def until(condition: Callable[[], object], deadline: float) -> bool:
    """Whether something came to be in time."""
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def events(run: Path, word: str) -> list[dict[str, Any]]:
    """What was recorded of losses, or of joinings."""
    return [line for line in metrics(run) if word in line]


def available(cluster: Cluster) -> bool:
    """Whether Slurm has the node again."""
    state = cluster.run("sinfo", "--noheader", f"--nodes={LOST}", "--format=%T").stdout.split()
    return bool(state) and all(each in ("idle", "allocated", "mixed") for each in state)


def one(cluster: Cluster, number: int, task: list[str]) -> dict[str, Any]:
    """A run, and what became of it."""
    generator = random.Random(number)
    at = generator.randrange(20, 60)
    folder = Path(tempfile.mkdtemp(prefix="elastic-return-"))
    run = folder / "run"
    command = [
        "hpctrain", "launch", "--pool", str(HOSTS), "--sbatch=--exclusive", "--logs",
        str(folder / "pool"), "--", "hpctrain", "train", *task, "--out", str(run),
        "--trace-samples", "--set", "log.every_steps=2", "--set", "log.tensorboard=false",
    ]  # fmt: skip
    record: dict[str, Any] = {"run": number, "step": at, "verdict": "good"}
    deadline = time.monotonic() + SECONDS
    with (folder / "log").open("w") as log:
        go = ("sh", "-c", 'cd "$0" && exec "$@"', str(folder))
        driver = subprocess.Popen(
            cluster.command(*go, *command), env=cluster.environment, stdout=log,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            until(lambda: any(line["step"] >= at for line in metrics(run)), deadline)
            cluster.kill(LOST)
            until(lambda: events(run, "lost"), deadline)
            time.sleep(AWAY_SECONDS)
            cluster.start(LOST)
            until(lambda: available(cluster), deadline)
            back = time.time()
            until(lambda: events(run, "joined"), deadline)
            until(lambda: driver.poll() is not None, deadline)
            lost, joined = events(run, "lost"), events(run, "joined")
            result = run / "result.json"
            if not result.exists():
                record["verdict"] = "not completed"
            elif wrong := sample_trace.check(run).wrong:
                record["verdict"] = wrong[0]
            elif [c["size"] for c in json.loads(result.read_text())["world"]] != [3, 2, 3]:
                record["verdict"] = "other worlds than 3, 2, 3"
            if record["verdict"] != "good":
                texts = [folder / "log", *sorted((folder / "pool").glob("*.out"))]
                record["output"] = [text.read_text(errors="replace")[-2000:] for text in texts]
            if lost and joined:
                rates = [line["samples_per_second"] for line in metrics(run) if "lr" in line]
                samples = json.loads(result.read_text()) if result.exists() else None
                record["loss_stall_ms"] = lost[0]["step_ms"]
                record["back_seconds"] = round(joined[0]["time"] - back, 2)
                record["join_stall_ms"] = joined[0]["step_ms"]
                if samples:
                    batch = samples["samples"] / samples["steps"]
                    record["usual_step_ms"] = round(1e3 * batch / statistics.median(rates), 1)
        finally:
            driver.send_signal(signal.SIGTERM)
            try:
                driver.wait(20)
            except subprocess.TimeoutExpired:
                driver.kill()
            cluster.run("scancel", "--user=root")
            cluster.mend()
            shutil.rmtree(folder, ignore_errors=True)
    return record


def summary(records: list[dict[str, Any]]) -> str:
    """A line for each figure."""
    good = sum(record["verdict"] == "good" for record in records)
    rows = [["", "median", "max", "runs", "good"]]
    for name, title in FIGURES.items():
        values = [record[name] for record in records if name in record]
        if values:
            middle, most = statistics.median(values), max(values)
            rows.append([title, f"{middle:.4g}", f"{most:.4g}", str(len(values)), str(good)])
    return table(rows)


def main() -> int:
    """Run all; 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--data", type=Path, help="shards of CIFAR-10; without: the digits")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--out", type=Path, help="folder for all records, as JSON and CSV")
    options = parser.parse_args()
    name = "digits" if options.data is None else "cifar10"
    task = [name, "--batch-size", str(options.batch_size), "--steps", str(options.steps)]
    if options.data is not None:
        task += ["--data", str(options.data.resolve())]
    records = []
    cluster = Cluster(HOSTS, slurmd_timeout=TIMEOUT_SECONDS)
    try:
        cluster.up()
        for number in range(options.runs):
            records.append(one(cluster, number, task))
            print(json.dumps(records[-1]), flush=True)
    finally:
        cluster.down()
    print(summary(records))
    if options.out is not None:
        write(options.out, "elastic_return", records)
    return int(any(record["verdict"] != "good" for record in records))


if __name__ == "__main__":
    raise SystemExit(main())
