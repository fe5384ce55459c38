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

import argparse
import dataclasses
import json
import os
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.output import write
from hpctrain.launch.chaos import Chaos, Outcome, judge_metrics
from hpctrain.launch.faults import Fault, draw
from hpctrain.process import mpirun

STEPS_AN_EPOCH = -(-1438 // 64)  # of the training samples, 1,438
EPOCHS = {"ulfm": 6, "gloo": 30}  # new ranks need some seconds to come
FAULTS = 3.45  # in a run, about
LIMIT_SECONDS = 90.0


def train(engine: str, folder: Path, ranks: int, faults: list[Fault]) -> Outcome:
    """A run, with what goes wrong in it."""
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
    """How many ranks a run has, and what goes wrong in it."""
    generator = random.Random(f"{seed}-{number}")
    ranks = generator.choice([3, 4])
    faults: list[Fault] = []
    steps = EPOCHS[engine] * STEPS_AN_EPOCH
    while not faults:
        faults = draw(ranks, steps, steps / FAULTS, generator)
    return ranks, faults


def run(engine: str, seed: int, number: int, faultless: list[dict[str, float]]) -> dict[str, Any]:
    """One run of the campaign, as a record."""
    ranks, faults = plan(engine, seed, number)
    with tempfile.TemporaryDirectory(prefix="elastic-kills-") as name:
        folder = Path(name)
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


def table(records: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """What all runs together say."""
    kinds = ("kill", "stop")
    came = [fault for record in records for fault in record["faults"]]
    rows = [
        ("runs", str(len(records))),
        ("good", str(sum(record["verdict"] == "good" for record in records))),
        *((f"{kind}s", str(sum(fault.startswith(kind) for fault in came))) for kind in kinds),
    ]
    single = [
        record["recovery_ms"][0]
        for record in records
        if len(record["faults"]) == 1 == len(record["recovery_ms"])
        and record["faults"][0].startswith("kill")
    ]
    if single:
        rows += [
            ("recovery from a single kill, median ms", f"{statistics.median(single):.0f}"),
            ("the same, longest ms", f"{max(single):.0f}"),
        ]
    return rows


def main() -> int:
    """Run the campaign; 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--engine", choices=sorted(EPOCHS), default="ulfm")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="number of the first run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for all records, as JSON and CSV")
    arguments = parser.parse_args()
    faultless = []
    for ranks in (1, 2, 3, 4):
        with tempfile.TemporaryDirectory(prefix="elastic-kills-") as folder:
            faultless.append(train(arguments.engine, Path(folder), ranks, []).metrics)
    records = []
    for number in range(arguments.first, arguments.first + arguments.runs):
        records.append(run(arguments.engine, arguments.seed, number, faultless))
        print(json.dumps(records[-1]), flush=True)
    for name, value in table(records):
        print(f"{name:42}{value}")
    if arguments.out is not None:
        write(arguments.out, "elastic_kills", records, faultless=faultless)
    return int(any(record["verdict"] != "good" for record in records))


if __name__ == "__main__":
    raise SystemExit(main())
