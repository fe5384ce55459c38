"""What becomes of elastic training when ranks are killed and stopped, again and again.

    python -m benchmarks.elastic_kills --runs 200 --seed 0

Each run trains handwritten digits on three or four ranks under ``mpirun --with-ft ulfm``, or with
``--engine gloo`` under ``hpctrain launch``, which also starts new ranks for those lost. Ranks get
SIGKILL or SIGSTOP at random steps: one after the other, also while the others recover from the one
before, also rank 0, down to a single rank. A run is good if

- it ends in time,
- every sample was taken once an epoch, by the trace of samples,
- the final validation metrics are those of runs without faults (on one to four ranks), but for
  rounding.

One line of JSON for each run, then a table; all of it in ``--out``. The exit code is 1 if any run
was not good. Recovery is the step of the loss, from the end of the last step before it to its own.
"""

from __future__ import annotations

import dataclasses
import os
import random
import statistics
from pathlib import Path
from typing import Any

from benchmarks.harness.bars import at_least
from benchmarks.harness.command import Add, Arguments, Benchmark, Report, count
from benchmarks.harness.processes import scratch
from benchmarks.harness.tables import table, tell
from hpctrain.launch.chaos import Chaos, Outcome, judge_metrics
from hpctrain.launch.faults import Fault, draw
from hpctrain.process import mpirun

STEPS_AN_EPOCH = -(-1438 // 64)  # of the training samples, 1,438
EPOCHS = {"ulfm": 6, "gloo": 30}  # new ranks need some seconds to come
FAULTS = 3.45  # in a run, about
LIMIT_SECONDS = 90.0


def train(engine: str, folder: Path, ranks: int, faults: list[Fault]) -> Outcome:
    """Run a training, with what goes wrong in it."""
    launcher = [*mpirun(ranks), "--with-ft", "ulfm"]
    if engine == "gloo":
        launcher = ["hpctrain", "launch", "-np", str(ranks), "--"]
    command = [
        *launcher, "hpctrain", "train", "digits", "--elastic", engine,
        "--epochs", str(EPOCHS[engine]), "--out", str(folder / "run"), "--trace-samples",
        "--set", "log.every_steps=20", "--set", "log.tensorboard=false",
    ]  # fmt: skip
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    chaos = Chaos(command, folder / "run", faults, limit_seconds=LIMIT_SECONDS)
    return chaos.run(folder / "log")


def plan(engine: str, seed: int, number: int) -> tuple[int, list[Fault]]:
    """Return how many ranks a run has, and what goes wrong in it."""
    generator = random.Random(f"{seed}-{number}")
    ranks = generator.choice([3, 4])
    faults: list[Fault] = []
    steps = EPOCHS[engine] * STEPS_AN_EPOCH
    while not faults:
        faults = draw(ranks, steps, steps / FAULTS, generator)
    return ranks, faults


def run(engine: str, seed: int, number: int, faultless: list[dict[str, float]]) -> dict[str, Any]:
    """Return one run of the campaign, as a record."""
    ranks, faults = plan(engine, seed, number)
    with scratch() as folder:
        outcome = train(engine, folder, ranks, faults)
        judge_metrics(outcome, faultless, lambda text: None)
        record = {
            "engine": engine,
            "seed": seed,
            "run": number,
            "ranks": ranks,
            **dataclasses.asdict(outcome),
        }
        if outcome.verdict != "good":
            record["output"] = (folder / "log").read_text(errors="replace")[-4000:]
    return record


def summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what all runs together say."""
    came = [fault for record in records for fault in record["faults"]]
    good = sum(record["verdict"] == "good" for record in records)
    found = {"runs": len(records), "good": good, "good_share": good / len(records)}
    found |= {f"{kind}s": sum(each.startswith(kind) for each in came) for kind in ("kill", "stop")}
    single = [
        record["recovery_ms"][0]
        for record in records
        if len(record["faults"]) == 1 == len(record["recovery_ms"])
        and record["faults"][0].startswith("kill")
    ]
    if single:
        found["single_kill_recovery_ms"] = round(statistics.median(single))
        found["single_kill_recovery_ms_max"] = round(max(single))
    return found


def measure(arguments: Arguments) -> Report:
    """Run the campaign."""
    faultless = []
    for ranks in (1, 2, 3, 4):
        with scratch() as folder:
            faultless.append(train(arguments.engine, folder, ranks, []).metrics)
    records = []
    for number in range(arguments.first, arguments.first + arguments.runs):
        records.append(run(arguments.engine, arguments.seed, number, faultless))
        tell(records[-1])
    found = summary(records)
    text = table([[key.replace("_", " "), str(value)] for key, value in found.items()])
    return Report(records, text, {"faultless": faultless}, summary=[found])


def options(add: Add) -> None:
    """Add the benchmark's own options."""
    add("--engine", choices=sorted(EPOCHS), default="ulfm")
    add("--runs", type=count, default=20)
    add("--first", type=int, default=0, help="number of the first run")
    add("--seed", type=int, default=0)


BENCHMARK = Benchmark(
    "elastic_kills", __doc__, measure, options=options, quick={"runs": 2}, plots=False,
    bars=(at_least("good_share", 1.0, must=True),),
)  # fmt: skip

if __name__ == "__main__":
    BENCHMARK.run()
