"""Time and samples to a target accuracy, by every strategy.

    python -m benchmarks.accuracy --out results
    mpirun -np 2 --bind-to none python -m benchmarks.accuracy --out results    # these ranks alone

Started alone it starts, seed after seed, the second of these lines for every number of ranks; that
line, which can also be given by hand, appends what it measured to accuracy.jsonl in --out, and
reports all that is there. Within it all strategies train in turn, in the same processes, by
`hpctrain train`'s own loop, with the same global batch, rates and epochs (as the task has them,
divided by the delay with async and ssp, which is hpctrain's default); only the seed differs from
round to round. Each run goes on to its end.

Time runs from the start of training to the first validation with the target accuracy. It holds all
that a run does meanwhile: exchange, validation, saving the best; not the start of processes. Each
launch trains a few steps beforehand, to be warm. Samples are the steps until then, times the global
batch; where ranks do not go in lockstep, those of rank 0. Shown are medians over seeds, and the
least and the largest; a seed that does not get there counts as longer than all others.

``single`` is on one rank, the others on those of --ranks from 2 on. ``*``: more ranks, times their
threads, than cores. With --emulate a rank sleeps for each sample, and all that comes of it says
EMULATED COMPUTE.

Prints a table; --out gets accuracy.json, .csv and, where matplotlib is installed, plots: accuracy
over samples and over time.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from benchmarks.harness.command import Add, Arguments, count
from benchmarks.harness.rounds import spread_of
from benchmarks.harness.tables import table
from benchmarks.launching import benchmark_of, latest
from benchmarks.training import Case, Line, about, cases, known, train
from hpctrain.world.launcher import Launch

WARM_UP_STEPS = 5
TASKS = ("digits",)
KEYS = ("task", "strategy", "ranks", "workers", "threads", "emulated_compute", "batch", "epochs",
        "target", "seed")  # fmt: skip


class Goal(NamedTuple):
    """How a task is trained to an accuracy.

    Attributes:
        target: Accuracy to reach.
        epochs: Of a run, which also is what the learning rate falls over.
        validate_every: Steps between validations.
    """

    target: float
    epochs: int
    validate_every: int


GOALS = {"digits": Goal(0.97, 8, 10), "cifar10": Goal(0.6, 3, 50)}
USUAL = Goal(0.9, 10, 50)


def goal_of(task: str, arguments: Arguments) -> Goal:
    """Return the goal that is asked for, or else the task's."""
    given = {name: getattr(arguments, name) for name in Goal._fields}
    return GOALS.get(task, USUAL)._replace(**{k: v for k, v in given.items() if v is not None})


def measure(arguments: Arguments, launch: Launch, number: int) -> Iterator[Line | None]:
    """Measure a seed on these ranks: every task and strategy."""
    for task in arguments.tasks:
        goal = goal_of(task, arguments)
        batch = arguments.batch or known(task).batch
        found = [each for each in cases(arguments, launch.size) if _belongs(each)]
        for case in found[:1]:
            warm = layer_of(case, batch, goal, number)
            warm["train"] |= {"steps": WARM_UP_STEPS, "validate_every_steps": None}
            train(task, arguments, warm)
        for case in found:
            records = train(task, arguments, layer_of(case, batch, goal, number))
            if launch.rank == 0:
                yield {
                    **about(task, case, arguments, launch),
                    "batch": batch,
                    **goal._asdict(),
                    "seed": number,
                    **progress_of(records, batch, goal.target),
                }


def _belongs(case: Case) -> bool:
    """Return whether the strategy is one for so many ranks."""
    return case.strategy == "single" or case.ranks > 1


def layer_of(case: Case, batch: int, goal: Goal, seed: int) -> dict[str, Any]:
    """Return the configuration of a run that is measured."""
    train = {"epochs": goal.epochs, "batch_size": batch}
    return {
        **case.layer,
        "seed": seed,
        "train": {**train, "validate_every_steps": goal.validate_every},
    }


def progress_of(records: Sequence[Line], batch: int, target: float) -> Line:
    """Return what a run's metrics.jsonl says of its way to the target.

    Args:
        records: Of that file.
        batch: The global one.
        target: Accuracy to reach.
    """
    begun = next(each["time"] for each in records if each["kind"] == "event")
    curve = [
        {
            "samples": each["step"] * batch,
            "seconds": round(each["time"] - begun, 3),
            "accuracy": each["accuracy"],
        }
        for each in records
        if each["kind"] == "validation"
    ]
    reached = next((each for each in curve if each["accuracy"] >= target), None)
    return {
        "to_target_seconds": reached and reached["seconds"],
        "to_target_samples": reached and reached["samples"],
        "final_accuracy": curve[-1]["accuracy"],
        "total_seconds": curve[-1]["seconds"],
        "curve": curve,
    }


def summary(lines: Sequence[Line]) -> list[Line]:
    """Return a record for each task, strategy and number of ranks."""
    groups: dict[tuple[Any, ...], list[Line]] = {}
    for line in latest(lines, KEYS):
        groups.setdefault(tuple(line[key] for key in KEYS[:-1]), []).append(line)
    return [merged(group) for group in groups.values()]


def merged(group: Sequence[Line]) -> Line:
    """Return the record of all seeds of a case."""
    first = group[0]
    emulated = ", EMULATED COMPUTE" if first["emulated_compute"] else ""
    record: Line = {"group": f"{first['task']} to {first['target']:g}{emulated}"}
    record |= {key: first[key] for key in (*KEYS[:-1], "oversubscribed", "nodes")}
    reached = [line for line in group if line["to_target_seconds"] is not None]
    record |= {"seeds": len(group), "reached": f"{len(reached)} of {len(group)}"}
    for key in ("to_target_seconds", "to_target_samples"):
        values = [line[key] for line in reached]
        middle = statistics.median([*values, *[math.inf] * (len(group) - len(values))])
        if math.isfinite(middle):
            record |= {**spread_of(key, values), key: middle}
    record |= spread_of("final_accuracy", [line["final_accuracy"] for line in group])
    record |= spread_of("total_seconds", [line["total_seconds"] for line in group])
    return {**record, "curve": curve_of([line["curve"] for line in group])}


def curve_of(curves: Sequence[Sequence[Line]]) -> list[Line]:
    """Return medians over seeds, where all of them validated."""
    by_samples = [{point["samples"]: point for point in curve} for curve in curves]
    shared = sorted(set.intersection(*map(set, by_samples)))
    return [
        {
            "samples": samples,
            **{
                key: statistics.median(curve[samples][key] for curve in by_samples)
                for key in ("seconds", "accuracy")
            },
        }
        for samples in shared
    ]


def table_for(records: Sequence[Line]) -> str:
    """Return the table of a group of records."""
    rows = [["strategy", "ranks", "s to target", "spread", "samples", "spread", "reached",
             "accuracy at last", "s in all"]]  # fmt: skip
    for each in records:
        row = [each["strategy"], f"{each['ranks']}{'*' * each['oversubscribed']}"]
        for key, form in (("to_target_seconds", ".2f"), ("to_target_samples", ".0f")):
            if key in each:
                ends = f"{each[f'{key}_min']:{form}}-{each[f'{key}_max']:{form}}"
                row += [f"{each[key]:{form}}", ends]
            else:
                row += ["not reached", ""]
        last = f"{each['final_accuracy']:.4f}"
        rows.append([*row, each["reached"], last, f"{each['total_seconds']:.2f}"])
    return table(rows)


def options(add: Add) -> None:
    """Add the benchmark's own options."""
    add("--target", type=float, help="accuracy to reach; default: by task")
    add("--epochs", type=count, help="of every run; default: by task")
    add("--validate-every", type=count, help="steps between validations; default: by task")


QUICK = {"strategies": "single,horovod,ps:async", "target": 0.8, "epochs": 3, "rounds": 1}
BENCHMARK = benchmark_of(
    "accuracy", __doc__, tasks=TASKS, ranks="1,2", what="seed", measure=measure, summary=summary,
    table=table_for, options=options, quick=QUICK,
)  # fmt: skip

if __name__ == "__main__":
    BENCHMARK.run()
