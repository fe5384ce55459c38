"""Which consistency is worth what where one worker of four is four times slower.

    python -m benchmarks.stragglers --out results

A mode is a consistency, with `+speed` where workers' shares of a batch go by their speed, as they
do by themselves with ssp, and `+equal` where they are equal, as they are with all others. Each run
is an `hpctrain train` of its own under mpirun, with the same task, rates, batches and epochs; the
modes take turns, seed by seed, so that whatever else the machine does falls on all alike.

Computing is emulated: a worker sleeps for each sample of its share (stragglers_tasks.py), besides
the small computation that is really done, so that four workers run at full speed on few cores.

Time runs from the first step until the first validation with the target accuracy; it holds all
that a run does meanwhile: exchange, validation, checkpoints. ``x sync``, how many times as fast as
sync, is the median over seeds of the ratios of one seed each. Staleness: how many clocks a worker
was ahead of the slowest. Delay: updates that a push missed. Both are means over all steps until
rank 0 had done its own.

With equal shares ssp:S gets no further than S steps ahead of the slow worker, and from then on all
go at its pace: the bound means that. It pays where workers are slow now and then, or where a slow
worker has less to do.

Prints a table; --out gets stragglers.json, .csv and, where matplotlib is installed, plots: accuracy
over time, and how far workers were ahead of the slowest.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness.command import Add, Arguments, Benchmark, Report, count, words
from benchmarks.harness.processes import scratch
from benchmarks.harness.rounds import Record, Round, compared, in_turn, record_of
from benchmarks.harness.tables import say, table
from hpctrain.errors import Error
from hpctrain.process import cores, mpirun, run
from hpctrain.ps.consistency import parse
from hpctrain.report.figures import Bars, Plot, Series

WORKERS, SERVERS = 4, 1
SLOW_RANK, SLOW_FACTOR = 1, 4.0
SHARE_STEPS = 4
MODES = ("sync", "sync+speed", "backup:1", "ssp:3", "ssp:3+equal", "async")
TASK_FILE = Path(__file__).with_name("stragglers_tasks.py")


class Setting(NamedTuple):
    """What is trained, the same for all modes.

    Attributes:
        kind: Class in stragglers_tasks.py.
        batch: Global batch.
        epochs: Passes over the data.
        step_ms: Emulated computing of a worker with an equal share.
        validate_every: Steps between validations.
        target: Accuracy to reach.
    """

    kind: str
    batch: int
    epochs: int
    step_ms: float
    validate_every: int
    target: float


TASKS = {
    "digits": Setting("Digits", 64, 6, 20.0, 5, 0.97),
    "cifar10": Setting("Cifar10", 256, 3, 400.0, 50, 0.6),
}


def command_of(mode: str, seed: int, folder: Path, arguments: Arguments) -> list[str]:
    """Return the command of a mode's run."""
    setting: Setting = arguments.setting
    consistency, _, shares = mode.partition("+")
    settings = {
        "ps.share_steps": SHARE_STEPS,
        "train.validate_every_steps": setting.validate_every,
        # Only the best are kept, by every mode alike.
        "checkpoint.every_steps": 10**9,
        "log.tensorboard": "false",
        "options.sample_ms": setting.step_ms / (setting.batch / WORKERS),
        "options.slow_rank": SLOW_RANK,
        "options.slow_factor": SLOW_FACTOR,
        "options.begun": folder / "begun",
    }
    command = [
        *mpirun(WORKERS + SERVERS),
        *("hpctrain", "train", f"{TASK_FILE}:{setting.kind}", "--strategy", "ps"),
        *("--servers", str(SERVERS), "--consistency", consistency, "--seed", str(seed)),
        *("--batch-size", str(setting.batch), "--epochs", str(setting.epochs)),
        *("--out", str(folder / "run")),
    ]
    if arguments.data:
        command += ["--data", str(arguments.data)]
    if shares:
        settings["ps.shares"] = shares
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    return command


def train(mode: str, seed: int, arguments: Arguments) -> Round:
    """Train once in a mode; ``failed`` says why, if it did."""
    with scratch() as folder:
        # The launcher itself ends its ranks then; the other limit is for the launcher.
        environment = {**os.environ, "MPIEXEC_TIMEOUT": str(arguments.timeout)}
        done = run(
            command_of(mode, seed, folder, arguments),
            timeout_seconds=arguments.timeout + 60,
            env=environment,
        )
        if done.returncode != 0:
            lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
            errors = [line for line in lines if "rror" in line]
            return {"failed": (errors or lines or [f"exit code {done.returncode}"])[-1][:300]}
        begun = float((folder / "begun").read_text())
        lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return read(begun, [json.loads(line) for line in lines], arguments.setting.target)


def read(begun: float, records: list[dict[str, Any]], target: float) -> Round:
    """Return what a run's metrics say.

    Args:
        begun: Time of the first step.
        records: Of metrics.jsonl.
        target: Accuracy to reach.
    """
    validations = [each for each in records if each["kind"] == "validation"]
    curve = [
        (each["step"], round(each["time"] - begun, 3), each["accuracy"]) for each in validations
    ]
    reached = [each for each in validations if each["accuracy"] >= target]
    result: Round = {
        "seconds": round(reached[0]["time"] - begun, 3) if reached else None,
        "steps": reached[0]["step"] if reached else None,
        "final_accuracy": curve[-1][2],
        "total_seconds": curve[-1][1],
        "curve": curve,
    }
    exchanges = [each for each in records if each["kind"] == "exchange"]
    for name in ("staleness", "delay"):
        counts: Counter[int] = Counter()
        for each in exchanges:
            counts.update({int(k): n for k, n in each.get(f"{name}_histogram", {}).items()})
        result[f"{name}_histogram"] = dict(sorted(counts.items()))
        result[f"{name}_mean"] = mean_of(counts)
    return result


def mean_of(counts: Counter[int]) -> float | None:
    """Return the mean of a histogram."""
    total = sum(counts.values())
    return sum(value * count for value, count in counts.items()) / total if total else None


def runs_of(arguments: Arguments) -> dict[str, list[Round]]:
    """Train in all modes, seed after seed."""
    seeds: dict[str, int] = dict.fromkeys(arguments.modes, 0)

    def next_of(mode: str) -> Round:
        seeds[mode] += 1
        return {"seed": seeds[mode] - 1, **train(mode, seeds[mode] - 1, arguments)}

    def told(seed: int, mode: str, result: Round) -> None:
        text = result.get("failed") or (
            f"{result['seconds']} s, {result['steps']} steps; at last accuracy "
            f"{result['final_accuracy']:.4f} after {result['total_seconds']} s"
        )
        say(f"seed {seed + 1} of {arguments.seeds}: {mode}: {text}")

    runs = {mode: partial(next_of, mode) for mode in arguments.modes}
    return in_turn(runs, arguments.seeds, tell=told)


def summary(mode: str, runs: dict[str, list[Round]]) -> Record:
    """Return the record of a mode.

    Args:
        mode: Which.
        runs: Of all modes.
    """
    rounds = [each if each.get("seconds") else {**each, "seconds": None} for each in runs[mode]]
    if "sync" in runs:
        name = "times_as_fast_as_sync"
        rounds = compared(
            rounds, runs["sync"], name,
            lambda one, sync: sync["seconds"] / one["seconds"]
            if sync["seconds"] and one["seconds"] else None,
        )  # fmt: skip
    measured = ("seconds", "times_as_fast_as_sync", "final_accuracy", "failed")
    kept = [{k: each[k] for k in measured if each.get(k) is not None} for each in rounds]
    record = record_of({"mode": mode}, kept)
    reached = sum("seconds" in each for each in kept)
    record["reached"] = f"{reached} of {len(kept)}"
    for name in ("staleness", "delay"):
        counts: Counter[int] = Counter()
        for each in rounds:
            counts.update(each.get(f"{name}_histogram", {}))
        record[f"{name}_mean"] = mean_of(counts)
        record[f"{name}_histogram"] = dict(sorted(counts.items()))
    return {**record, "runs": runs[mode]}


def shown(records: Sequence[Record], arguments: Arguments) -> str:
    """Return a table with a line for each mode."""
    setting: Setting = arguments.setting
    rows = [["mode", f"s to {setting.target:g}", "x sync", "final", "staleness", "delay"]]
    for each in records:
        if "final_accuracy" not in each:
            rows.append([each["mode"], "failed", *[""] * 4])
            continue
        seconds = with_ends(each, "seconds", ".1f") or "not reached"
        ratio = with_ends(each, "times_as_fast_as_sync", ".2f") or "-"
        row = [each["mode"], seconds, ratio, f"{each['final_accuracy']:.4f}"]
        for key in ("staleness_mean", "delay_mean"):
            row.append("-" if each[key] is None else f"{each[key]:.2f}")
        rows.append(row)
    about = (
        f"{arguments.task}, emulated compute: {setting.step_ms:g} ms for an equal share of a "
        f"batch, {SLOW_FACTOR:g} times that on one of {WORKERS} workers; "
        f"{arguments.seeds} seeds, {cores()} cores"
    )
    return f"{about}\n{table(rows)}"


def with_ends(record: Record, key: str, form: str) -> str:
    """Return a measure with the least and the largest, or nothing where there is none."""
    if key not in record:
        return ""
    low, high = record[f"{key}_min"], record[f"{key}_max"]
    return f"{record[key]:{form}} ({low:{form}}-{high:{form}})"


def figures(records: Sequence[Record], target: float) -> list[Plot | Bars]:
    """Return plots of accuracy over time, and of how far workers were ahead of the slowest.

    Args:
        records: Of all modes.
        target: Accuracy that was to be reached.
    """
    good = [each for each in records if "final_accuracy" in each]
    curves = {each["mode"]: mean_curve(each["runs"]) for each in good}
    lines = [
        Series(mode, x, y, look=look) for look, (mode, (x, y)) in enumerate(curves.items()) if x
    ]
    ends = [end for each in lines for end in (each.x[0], each.x[-1])]
    found: list[Plot | Bars] = [
        Plot("stragglers-accuracy", "One worker is slower (emulated compute)",
             "seconds since the first step", "validation accuracy, mean over seeds", lines,
             "The straight line is the target.",
             ideal=[(min(ends), target), (max(ends), target)])
    ] if lines else []  # fmt: skip
    ahead = [each for each in good if each["staleness_mean"] is not None]
    if ahead:
        means = [float(each["staleness_mean"]) for each in ahead]
        found.append(
            Bars("stragglers-staleness", "Clocks ahead of the slowest worker", "staleness, mean",
                 [each["mode"] for each in ahead], means, means, means, [False] * len(means))
        )  # fmt: skip
    return found


def mean_curve(runs: Sequence[Round]) -> tuple[list[float], list[float]]:
    """Return seconds and accuracy, means over the runs, at the steps at which all validated."""
    curves = [
        {step: (seconds, accuracy) for step, seconds, accuracy in each["curve"]}
        for each in runs
        if "curve" in each
    ]
    steps = sorted(set.intersection(*map(set, curves)))
    means = [
        tuple(map(statistics.mean, zip(*(curve[step] for curve in curves), strict=True)))
        for step in steps
    ]
    return [seconds for seconds, _ in means], [accuracy for _, accuracy in means]


def measure(arguments: Arguments) -> Report:
    """Train in the modes asked for."""
    runs = runs_of(arguments)
    records = [summary(mode, runs) for mode in runs]
    about = {"workers": WORKERS, "servers": SERVERS, "slow_rank": SLOW_RANK}
    about |= {"slow_factor": SLOW_FACTOR, "share_steps": SHARE_STEPS, "emulated_compute": True}
    about |= arguments.setting._asdict()
    plots = figures(records, arguments.setting.target)
    return Report(records, shown(records, arguments), about, figures=plots)


def options(add: Add) -> None:
    """Add the benchmark's own options."""
    add("--task", choices=list(TASKS), default="digits")
    add("--data", type=Path, help="shard set; cifar10 needs one")
    add("--modes", type=words, default=",".join(MODES), help="default: %(default)s")
    add("--seeds", type=count, default=2)
    add("--target", type=float, help="accuracy to reach; default: by task")
    add("--epochs", type=count, help="of every run; default: by task")
    add("--timeout", type=count, default=600, help="seconds for each run")


def check(parser: argparse.ArgumentParser, arguments: Arguments) -> None:
    """Refuse modes that there are not, and fill in what depends on the task."""
    for mode in arguments.modes:
        consistency, plus, shares = mode.partition("+")
        try:
            parse(consistency)
        except Error as error:
            parser.error(f"{error.message} {error.hint}")
        if plus and shares not in ("speed", "equal"):
            parser.error(f"mode {mode}: what follows the + can only be speed or equal")
    if arguments.task == "cifar10" and arguments.data is None:
        parser.error("--task cifar10 needs --data, as `hpctrain data import` makes it")
    given = {key: getattr(arguments, key) for key in ("target", "epochs")}
    arguments.setting = TASKS[arguments.task]._replace(
        **{key: value for key, value in given.items() if value is not None}
    )


QUICK = {"modes": "sync,ssp:3", "seeds": 1, "epochs": 2, "target": 0.8}
BENCHMARK = Benchmark("stragglers", __doc__, measure, options=options, check=check, quick=QUICK)

if __name__ == "__main__":
    BENCHMARK.run()
