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

Prints a table; --out gets stragglers.json, .csv (a line a run) and, where matplotlib is installed,
.png and .svg.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import importlib.util
import json
import os
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.output import environment, table
from hpctrain.errors import Error
from hpctrain.process import mpirun, run
from hpctrain.ps.consistency import parse

SCHEMA = 1
WORKERS, SERVERS = 4, 1
SLOW_RANK, SLOW_FACTOR = 1, 4.0
SHARE_STEPS = 4
MODES = ("sync", "sync+speed", "backup:1", "ssp:3", "ssp:3+equal", "async")
TASK_FILE = Path(__file__).with_name("stragglers_tasks.py")
BINS = (0, 1, 2, 3, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
Run = dict[str, Any]


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


def say(text: str) -> None:
    """To standard error."""
    print(text, file=sys.stderr, flush=True)


def command_of(mode: str, seed: int, folder: Path, arguments: argparse.Namespace) -> list[str]:
    """The run's."""
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


def measure(mode: str, seed: int, arguments: argparse.Namespace) -> Run:
    """One run; ``failed`` says why, if it did."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
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


def read(begun: float, records: list[dict[str, Any]], target: float) -> Run:
    """What a run's metrics say.

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
    result: Run = {
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
    """Of a histogram."""
    total = sum(counts.values())
    return sum(value * count for value, count in counts.items()) / total if total else None


def runs_of(arguments: argparse.Namespace) -> dict[str, list[Run]]:
    """Everything, seed after seed."""
    runs: dict[str, list[Run]] = {mode: [] for mode in arguments.modes}
    for seed in range(arguments.seeds):
        for mode in arguments.modes:
            result = {"seed": seed, **measure(mode, seed, arguments)}
            runs[mode].append(result)
            text = result.get("failed") or (
                f"{result['seconds']} s, {result['steps']} steps; at last accuracy "
                f"{result['final_accuracy']:.4f} after {result['total_seconds']} s"
            )
            say(f"seed {seed + 1} of {arguments.seeds}: {mode}: {text}")
    return runs


def summary(mode: str, runs: dict[str, list[Run]]) -> dict[str, Any]:
    """All runs of a mode."""
    good = [each for each in runs[mode] if "failed" not in each]
    seconds = [each["seconds"] for each in good if each["seconds"] is not None]
    ratios = [
        sync["seconds"] / each["seconds"]
        for sync, each in zip(runs.get("sync", ()), runs[mode], strict=False)
        if sync.get("seconds") and each.get("seconds")
    ]
    record: dict[str, Any] = {
        "reached": f"{len(seconds)} of {len(runs[mode])}",
        "seconds": statistics.median(seconds) if seconds else None,
        "seconds_spread": [min(seconds), max(seconds)] if seconds else None,
        "times_as_fast_as_sync": statistics.median(ratios) if ratios else None,
        "times_as_fast_as_sync_spread": [min(ratios), max(ratios)] if ratios else None,
    }
    if good:
        record["final_accuracy"] = statistics.median(each["final_accuracy"] for each in good)
        for name in ("staleness", "delay"):
            counts: Counter[int] = Counter()
            for each in good:
                counts.update(each[f"{name}_histogram"])
            record[f"{name}_mean"] = mean_of(counts)
            record[f"{name}_histogram"] = dict(sorted(counts.items()))
    return {**record, "runs": runs[mode]}


def record_of(runs: dict[str, list[Run]], arguments: argparse.Namespace) -> dict[str, Any]:
    """What goes to the JSON file."""
    return {
        "schema": SCHEMA,
        "benchmark": "stragglers",
        "emulated_compute": True,
        "task": arguments.task,
        **arguments.setting._asdict(),
        "workers": WORKERS,
        "servers": SERVERS,
        "slow_rank": SLOW_RANK,
        "slow_factor": SLOW_FACTOR,
        "share_steps": SHARE_STEPS,
        "seeds": arguments.seeds,
        "environment": environment(),
        "load_before": arguments.load,
        "modes": {mode: summary(mode, runs) for mode in runs},
    }


def shown(record: dict[str, Any]) -> str:
    """A line for each mode."""
    rows = [
        ["mode", f"s to {record['target']:g}", "spread", "x sync", "spread", "final", "staleness",
         "delay"],
    ]  # fmt: skip
    for mode, entry in record["modes"].items():
        if "final_accuracy" not in entry:
            rows.append([mode, "failed", *[""] * 6])
            continue
        rows.append(
            [
                mode,
                number(entry["seconds"], ".1f", "not reached"),
                span(entry["seconds_spread"], ".1f"),
                number(entry["times_as_fast_as_sync"], ".2f"),
                span(entry["times_as_fast_as_sync_spread"], ".2f"),
                number(entry["final_accuracy"], ".4f"),
                number(entry["staleness_mean"], ".2f"),
                number(entry["delay_mean"], ".2f"),
            ]
        )
    about = (
        f"{record['task']}, emulated compute: {record['step_ms']:g} ms for an equal share of a "
        f"batch, {record['slow_factor']:g} times that on one of {record['workers']} workers; "
        f"{record['seeds']} seeds, {record['environment']['cores']} cores"
    )
    return f"{about}\n{table(rows)}"


def number(value: float | None, form: str, otherwise: str = "-") -> str:
    """Of the table."""
    return otherwise if value is None else f"{value:{form}}"


def span(values: Sequence[float] | None, form: str) -> str:
    """Of the table."""
    return "" if values is None else f"{values[0]:{form}}-{values[1]:{form}}"


def write_csv(record: dict[str, Any], file: Path) -> None:
    """A line a run, each with where it was."""
    about = {
        key: record[key]
        for key in ("schema", "benchmark", "emulated_compute", "task", "target", "epochs", "batch",
                    "step_ms", "workers", "servers", "slow_factor", "load_before")
    }  # fmt: skip
    measured = ("seed", "seconds", "steps", "final_accuracy", "total_seconds", "staleness_mean",
                "delay_mean", "failed")  # fmt: skip
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["mode", *measured, *about, *record["environment"]])
        for mode, entry in record["modes"].items():
            for each in entry["runs"]:
                values = [each.get(key) for key in measured]
                writer.writerow([mode, *values, *about.values(), *record["environment"].values()])


def plot(record: dict[str, Any], files: Sequence[Path]) -> None:
    """Accuracy over time, and how far workers were ahead of the slowest."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    modes = {name: entry for name, entry in record["modes"].items() if "final_accuracy" in entry}
    colors = [f"C{place}" for place in range(len(modes))]
    for color, (mode, entry) in zip(colors, modes.items(), strict=True):
        left.plot(*mean_curve(entry["runs"]), color=color, label=mode, linewidth=1.2)
    left.axhline(record["target"], color="gray", linestyle=":", label="target")
    latest = max((entry["seconds"] or 0.0 for entry in modes.values()), default=0.0)
    left.set_xlim(0, 1.5 * latest or None)
    left.set_ylim(0.5 * record["target"], 1)
    left.set_xlabel("seconds since the first step (emulated compute)")
    left.set_ylabel("validation accuracy, mean over seeds")
    left.legend(loc="lower right", fontsize=8)
    highest = max((max(e["staleness_histogram"], default=0) for e in modes.values()), default=0)
    bins = [lower for lower in BINS if lower <= highest]
    width = 0.8 / max(1, len(modes))
    for place, (color, (mode, entry)) in enumerate(zip(colors, modes.items(), strict=True)):
        parts = binned(entry["staleness_histogram"], bins)
        where = [n - 0.4 + width * (place + 0.5) for n in range(len(bins))]
        right.bar(where, parts, width, color=color, label=mode)
    right.set_xticks(range(len(bins)), [bin_label(lower) for lower in bins])
    right.set_xlabel("staleness: clocks ahead of the slowest worker")
    right.set_ylabel("part of all steps")
    right.legend(fontsize=8)
    figure.suptitle(
        f"{record['task']}, one of {record['workers']} workers {record['slow_factor']:g} times "
        "slower (emulated compute)"
    )
    for file in files:
        figure.savefig(file, dpi=150)
    pyplot.close(figure)


def mean_curve(runs: Sequence[Run]) -> tuple[list[float], list[float]]:
    """Seconds and accuracy, means over the runs, at the steps at which all validated."""
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


def binned(counts: dict[int, int], bins: Sequence[int]) -> list[float]:
    """The part of a histogram from each bin's lower end up to the next one's."""
    total = sum(counts.values()) or 1
    uppers = [*bins[1:], float("inf")]
    return [
        sum(count for value, count in counts.items() if lower <= value < upper) / total
        for lower, upper in zip(bins, uppers, strict=True)
    ]


def bin_label(lower: int) -> str:
    """Of a bin that begins there."""
    place = BINS.index(lower)
    if place + 1 == len(BINS):
        return f"{lower}+"
    upper = BINS[place + 1] - 1
    return str(lower) if upper == lower else f"{lower}-{upper}"


def arguments_of(command: Sequence[str] | None) -> argparse.Namespace:
    """As given, checked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--task", choices=list(TASKS), default="digits")
    parser.add_argument("--data", type=Path, help="shard set; cifar10 needs one")
    parser.add_argument("--modes", default=",".join(MODES), help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--target", type=float, help="accuracy to reach; default: by task")
    parser.add_argument("--epochs", type=int, help="of every run; default: by task")
    parser.add_argument("--timeout", type=int, default=600, help="seconds for each run")
    parser.add_argument("--out", type=Path, help="folder for JSON, CSV and plots")
    arguments = parser.parse_args(command)
    arguments.modes = arguments.modes.split(",")
    for mode in arguments.modes:
        consistency, plus, shares = mode.partition("+")
        try:
            parse(consistency)
        except Error as error:
            parser.error(f"{error.message} {error.hint}")
        if plus and shares not in ("speed", "equal"):
            parser.error(f"mode {mode}: what follows the + can only be speed or equal")
    if arguments.seeds < 1:
        parser.error("--seeds must be 1 or more")
    if arguments.task == "cifar10" and arguments.data is None:
        parser.error("--task cifar10 needs --data, as `hpctrain data import` makes it")
    given = {key: getattr(arguments, key) for key in ("target", "epochs")}
    arguments.setting = TASKS[arguments.task]._replace(
        **{key: value for key, value in given.items() if value is not None}
    )
    arguments.load = round(os.getloadavg()[0], 2)
    return arguments


def main(command: Sequence[str] | None = None) -> None:
    """Run the modes asked for."""
    arguments = arguments_of(command)
    try:
        record = record_of(runs_of(arguments), arguments)
    except Error as error:
        raise SystemExit(str(error)) from error
    print(shown(record))
    if arguments.out is None:
        return
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    (out / "stragglers.json").write_text(json.dumps(record, indent=2) + "\n")
    write_csv(record, out / "stragglers.csv")
    if importlib.util.find_spec("matplotlib") is None:
        say("no plot: matplotlib is not installed")
    else:
        plot(record, [out / "stragglers.png", out / "stragglers.svg"])


if __name__ == "__main__":
    main()
