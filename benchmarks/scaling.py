"""Weak and strong scaling of every strategy, and where the time of a step goes.

    python -m benchmarks.scaling --out results                        # 1, 2 and 4 ranks, in turn
    python -m benchmarks.scaling --launcher "srun --mpi=pmix -n" --ranks 1,8,16 --out results
    mpirun -np 2 --bind-to none python -m benchmarks.scaling --out results    # these ranks alone

Started alone it starts, round after round, the third of these lines for every number of ranks.
That line, which can be given by hand for one number after the other, appends what it measured to
scaling.jsonl in --out, and reports all that is there; what is measured again replaces what was.

Within a round all strategies train in turn, in the same processes, by `hpctrain train`'s own loop:
loader, metrics and recorder included, validation and checkpoints not. Of 6 lines of the log the
first is to warm up; throughput is the samples of the others by their time, and their records of
kind `timing` say where it went, as means over the steps of all ranks: input, compute (forward and
backward), exchange (what is left of it after backward, waiting for others included; with ps, the
servers' update too), update, and the rest (logging).

Weak scaling keeps the batch of a rank, strong scaling the global batch, which is that of one rank
in the other. Efficiency is X_N / (N X_1), which with the same global batch is t_1 / (N t_N). X_1 is
`single` on one rank where that was measured, else the same strategy on the fewest ranks; of the
same round. N counts all ranks, also those that only serve (--servers). Every rank computes with the
same number of threads (--threads) at any N. Shown are medians over rounds, and the least and the
largest.

Tasks: digits (real, bundled), perceptron (1.3M parameters, made-up samples) and, with --data,
cifar10.
``*``: more ranks, times their threads, than cores. With --emulate a rank sleeps for each sample,
and all that comes of it says EMULATED COMPUTE.

Prints tables; --out gets scaling.json, .csv and, where matplotlib is installed, plots.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.harness.bars import at_least
from benchmarks.harness.command import Add, Arguments, count
from benchmarks.harness.rounds import spread_of
from benchmarks.harness.tables import table
from benchmarks.launching import benchmark_of, latest
from benchmarks.training import Case, Line, about, cases, known, train
from hpctrain.errors import Error
from hpctrain.train.step_timer import PARTS
from hpctrain.world.launcher import Launch

LOG_LINES = 6
TASKS = ("digits", "perceptron")
SCALINGS = ("weak", "strong")
KEYS = ("task", "strategy", "ranks", "workers", "threads", "emulated_compute", "rank_batch",
        "batch", "round")  # fmt: skip


def measure(arguments: Arguments, launch: Launch, number: int) -> Iterator[Line | None]:
    """Measure a round on these ranks: every task, strategy and global batch."""
    for task in arguments.tasks:
        rank_batch = arguments.batch or known(task).batch
        for case in cases(arguments, launch.size):
            batches = {"weak": rank_batch * case.workers, "strong": rank_batch}
            for batch in dict.fromkeys(batches[each] for each in arguments.scaling or SCALINGS):
                steps = arguments.steps or known(task).steps
                records = train(task, arguments, layer_of(case, batch, steps))
                if launch.rank == 0:
                    yield {
                        **about(task, case, arguments, launch),
                        "rank_batch": rank_batch,
                        "batch": batch,
                        "round": number,
                        **speed_of(records),
                    }


def layer_of(case: Case, batch: int, steps: int) -> dict[str, Any]:
    """Return the configuration of a run that is measured."""
    train = {"steps": LOG_LINES * steps, "batch_size": batch, "validate_every_steps": 10**9}
    return {**case.layer, "train": train, "log": {"every_steps": steps}}


def speed_of(records: Sequence[Line]) -> Line:
    """Return what a run's metrics.jsonl says of its speed, but for the log's first line.

    Raises:
        Error: It has fewer lines.
    """
    lines = [each for each in records if each["kind"] == "train"]
    timings = [each for each in records if each["kind"] == "timing"][1:]
    seconds = [b["time"] - a["time"] for a, b in itertools.pairwise(lines)]
    if not seconds or sum(seconds) <= 0:
        raise Error("a run was too short to be measured.", hint="give more --steps.")
    samples = sum(
        s * line["samples_per_second"] for s, line in zip(seconds, lines[1:], strict=True)
    )
    found = {"samples_per_second": samples / sum(seconds)}
    parts = {
        f"{part}_ms": statistics.mean(each[f"{part}_ms"] for each in timings) for part in PARTS
    }
    return {**found, "step_ms": sum(parts.values()), **parts}


def summary(lines: Sequence[Line]) -> list[Line]:
    """Return a record for each task, kind of scaling, strategy and number of ranks."""
    records = []
    lines = latest(lines, KEYS)
    for scaling in SCALINGS:
        rounds: dict[tuple[Any, ...], list[Line]] = {}
        belong = [line for line in lines if scaling in scalings_of(line)]
        # A worker alone belongs to both; it is shown where there is something to compare.
        scaled = {line["task"] for line in belong if line["workers"] > 1}
        shown = {line["task"] for line in lines if line["workers"] > 1}
        for line in belong:
            if line["task"] in scaled or (line["task"] not in shown and scaling == "weak"):
                rounds.setdefault(tuple(line[key] for key in KEYS[:-1]), []).append(line)
        for key, group in rounds.items():
            records.append(merged(scaling, group, baseline(key, rounds)))
    tasks, strategies = (list(dict.fromkeys(r[key] for r in records)) for key in KEYS[:2])
    groups = list(dict.fromkeys(record["group"] for record in records))
    return sorted(
        records,
        key=lambda r: (
            tasks.index(r["task"]),
            groups.index(r["group"]),
            strategies.index(r["strategy"]),
            r["ranks"],
        ),
    )


def scalings_of(line: Line) -> list[str]:
    """Return the kinds of scaling that a line is a point of, as its batch says."""
    batches = {"weak": line["rank_batch"] * line["workers"], "strong": line["rank_batch"]}
    return [scaling for scaling, batch in batches.items() if batch == line["batch"]]


def baseline(key: tuple[Any, ...], groups: dict[tuple[Any, ...], list[Line]]) -> list[Line]:
    """Return what efficiency is by: single on one rank, else the strategy on the fewest ranks."""
    task, strategy, _, _, *alike = key
    same = [
        (other[1] != "single", other[2], lines)
        for other, lines in groups.items()
        if other[0] == task and other[1] in ("single", strategy) and list(other[4:7]) == alike[:3]
    ]
    return min(same, key=lambda each: each[:2])[2]


def merged(scaling: str, group: Sequence[Line], base: Sequence[Line]) -> Line:
    """Return the record of all rounds of a case."""
    first = group[0]
    alone = {line["round"]: line["samples_per_second"] / line["ranks"] for line in base}
    speeds = [line["samples_per_second"] for line in group]
    ratios = [
        line["samples_per_second"] / line["ranks"] / alone[line["round"]]
        for line in group
        if line["round"] in alone
    ]
    batch = f"{first['rank_batch']} {'a rank' if scaling == 'weak' else 'in all'}"
    emulated = ", EMULATED COMPUTE" if first["emulated_compute"] else ""
    record: Line = {"group": f"{first['task']}, {scaling} scaling, {batch}{emulated}"}
    record |= {key: first[key] for key in ("task", "strategy")}
    record |= {"scaling": scaling}
    record |= {key: first[key] for key in ("ranks", "workers", "batch", "threads")}
    record |= {key: first[key] for key in ("emulated_compute", "oversubscribed", "nodes")}
    record |= {"rounds": len(group), **spread_of("samples_per_second", speeds)}
    record |= spread_of("efficiency", ratios)
    record["baseline"] = f"{base[0]['strategy']} on {base[0]['ranks']}"
    record |= spread_of("step_ms", [line["step_ms"] for line in group])
    parts = (f"{part}_ms" for part in PARTS)
    return record | {key: statistics.median(line[key] for line in group) for key in parts}


def table_for(records: Sequence[Line]) -> str:
    """Return the table of a group of records."""
    rows = [["strategy", "ranks", "batch", "samples/s", "spread", "efficiency", "spread", "step ms",
             *PARTS]]  # fmt: skip
    for each in records:
        efficiency = ["-", "-"]
        if "efficiency" in each:
            ends = f"{each['efficiency_min']:.2f}-{each['efficiency_max']:.2f}"
            efficiency = [f"{each['efficiency']:.2f}", ends]
        speeds = f"{each['samples_per_second_min']:.0f}-{each['samples_per_second_max']:.0f}"
        rows.append(
            [each["strategy"], f"{each['ranks']}{'*' * each['oversubscribed']}",
             str(each["batch"]), f"{each['samples_per_second']:.0f}", speeds, *efficiency,
             f"{each['step_ms']:.2f}", *(f"{each[f'{part}_ms']:.2f}" for part in PARTS)]
        )  # fmt: skip
    return table(rows)


def options(add: Add) -> None:
    """Add the benchmark's own options."""
    add("--scaling", choices=SCALINGS, action="append", help="default: both")
    add("--steps", type=count, help=f"of each of {LOG_LINES} lines of the log; default: by task")


# A strategy that has nothing to exchange should cost nothing.
BARS = (at_least("efficiency", 0.97, strategy="horovod", ranks=1, scaling="weak"),)
QUICK = {"tasks": "digits", "ranks": "1,2", "strategies": "single,horovod,ps:async", "steps": 3,
         "rounds": 1}  # fmt: skip
BENCHMARK = benchmark_of(
    "scaling", __doc__, tasks=TASKS, ranks="1,2,4", what="round", measure=measure, summary=summary,
    table=table_for, options=options, bars=BARS, quick=QUICK,
)  # fmt: skip

if __name__ == "__main__":
    BENCHMARK.run()
