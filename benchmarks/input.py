"""Ways of getting batches of 256 images and labels, side by side: hpctrain, others, and the limit.

    pip install -r benchmarks/input-requirements.txt
    python -m benchmarks.input --data /scratch/input --out input.json --plot input.png

Every case runs in a process of its own, once a round; the rounds go over all cases in turn, so that
whatever else the machine does falls on all alike. The limit, ``memory``, gathers samples at random
from an array in memory, on one thread, into one and the same batch; ratios to it are of the same
round. A speed is that of the best of three stretches of whole epochs, each a second or more. Files
are in the page cache. Loaders with workers have two. Normalised images are made by hpctrain's own
function for all: in hpctrain's loader, and elsewhere in the main process into one and the same
memory. A package that is not installed is reported as such. input_cases.py has the cases. JSON goes
to standard output or --out, a table to standard error.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.input_cases import BATCH, CASES, LIMITS, PEERS, SIZES, WORKERS, Case, Data
from hpctrain.errors import Error
from hpctrain.process import cores, run

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "numpy", "h5py", "hdf5plugin", "cramjam")
MAKE_SECONDS = 900
Round = dict[str, Any]


class Place(NamedTuple):
    """What is measured in one process."""

    case: str
    size: str
    delivery: str

    def __str__(self) -> str:
        return f"{self.case} {self.size} {self.delivery}"


def places(cases: Sequence[str], sizes: Sequence[str]) -> list[Place]:
    """All there are, those that are compared with each other next to each other."""
    return [
        Place(name, size, delivery)
        for size in sizes
        for delivery in ("uint8", "float32")
        for name in cases
        if size in CASES[name].sizes and delivery in CASES[name].deliveries
    ]


def missing(case: Case) -> bool:
    """Whether what it needs is not installed."""
    return bool(case.module) and importlib.util.find_spec(case.module) is None


def child(job: dict[str, Any], timeout_seconds: float) -> Round:
    """Do a job in a process of its own; ``failed`` says why, if it did."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", "benchmarks.input_cases", json.dumps(job), str(result)]
        done = run(command, timeout_seconds=timeout_seconds, cwd=ROOT)
        if done.returncode == 0:
            return dict(json.loads(result.read_text()))
    if done.returncode == 124:
        return {"failed": f"not done after {timeout_seconds:g} s"}
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    return {"failed": (lines or [f"exit code {done.returncode}"])[-1][:300]}


def say(text: str) -> None:
    """To standard error."""
    print(text, file=sys.stderr, flush=True)


def make_data(todo: list[Place], arguments: argparse.Namespace) -> dict[tuple[str, str], str]:
    """Make what is not there yet.

    Returns:
        Size and layout -> why it could not be made.
    """
    failed = {}
    for size, layout in dict.fromkeys((place.size, CASES[place.case].layout) for place in todo):
        if not Data(arguments.data, size, arguments.quick).marker(layout).exists():
            say(f"making {size} {layout}")
            job = {"root": str(arguments.data), "size": size, "quick": arguments.quick}
            result = child({**job, "layout": layout}, MAKE_SECONDS)
            if "failed" in result:
                failed[size, layout] = f"the data could not be made: {result['failed']}"
    return failed


def rounds_of(arguments: argparse.Namespace) -> dict[Place, list[Round]]:
    """Measure everything, round after round."""
    todo = places(arguments.cases, arguments.sizes)
    results: dict[Place, list[Round]] = {place: [] for place in todo}
    absent = [place for place in todo if missing(CASES[place.case])]
    present = [place for place in todo if place not in absent]
    for place in absent:
        results[place] = [{"skipped": "not installed"}]
    no_data = make_data(present, arguments)
    for number in range(arguments.rounds):
        for place in present:
            why = no_data.get((place.size, CASES[place.case].layout))
            if why is None:
                job = {"root": str(arguments.data), "quick": arguments.quick, **place._asdict()}
                result = child(job, arguments.timeout)
            else:
                result = {"failed": why}
            results[place].append(result)
            speed = f"{result['best']:,.0f} samples/s" if "best" in result else json.dumps(result)
            say(f"round {number + 1} of {arguments.rounds}: {place}: {speed}")
    return results


def median_of(rounds: Sequence[Round], key: str) -> float | None:
    """Over those that have it."""
    values = [each[key] for each in rounds if key in each]
    return statistics.median(values) if values else None


def ratio(over: Sequence[Round], under: Sequence[Round] | None) -> float | None:
    """Median of the rounds' own ratios of best stretches."""
    pairs = zip(over, under or (), strict=False)
    ratios = [a["best"] / b["best"] for a, b in pairs if "best" in a and "best" in b]
    return statistics.median(ratios) if ratios else None


def summary(place: Place, results: dict[Place, list[Round]]) -> dict[str, Any]:
    """All rounds of one place."""
    rounds = results[place]
    good = [each for each in rounds if "skipped" not in each and "failed" not in each]
    if not good:
        return dict(rounds[0])
    record: dict[str, Any] = {}
    if "best" in good[0]:
        speeds = [each["best"] for each in good]
        record["samples_per_second"] = statistics.median(speeds)
        record["spread"] = [min(speeds), max(speeds)]
        record["samples_per_second_median_stretch"] = median_of(good, "median")
        versus = CASES[place.case].versus
        if versus:
            record[f"ratio_to_{versus}"] = ratio(rounds, results.get(place._replace(case=versus)))
        if place.case in PEERS:
            ours = results.get(place._replace(case="hpctrain"), [])
            record["hpctrain_over_peer"] = ratio(ours, rounds)
    if "exact" in good[0]:
        record["exact"] = all(each["exact"] for each in good)
    for key in ("first_batch_ms", "stall_ms"):
        if key in good[0]:
            record[key] = median_of(good, key)
            record[f"{key}_spread"] = [f([each[key] for each in good]) for f in (min, max)]
    failures = [each["failed"] for each in rounds if "failed" in each]
    if failures:
        record["failed_rounds"] = failures
    return record


def version_of(package: str) -> str | None:
    """Of what is installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def record_of(results: dict[Place, list[Round]], arguments: argparse.Namespace) -> dict[str, Any]:
    """What is printed."""
    from hpctrain import __version__

    cases: dict[str, Any] = {}
    for place in results:
        by_size = cases.setdefault(place.case, {}).setdefault(place.size, {})
        by_size[place.delivery] = summary(place, results)
    peers = dict.fromkeys(case.package for case in CASES.values() if case.package)
    return {
        "schema": 1,
        "benchmark": "input",
        "batch": BATCH,
        "workers": WORKERS,
        "rounds": arguments.rounds,
        "quick": arguments.quick,
        "samples": {
            name: {
                "shape": SIZES[name].shape,
                "count": Data(arguments.data, name, arguments.quick).samples,
            }
            for name in arguments.sizes
        },
        "versions": {
            "python": platform.python_version(),
            "hpctrain": __version__,
            **{package: version_of(package) for package in (*PACKAGES, *peers)},
        },
        "machine": platform.machine(),
        "cores": cores(),
        "load_before": arguments.load,
        "cases": cases,
    }


def table(record: dict[str, Any]) -> str:
    """A line for each case: samples a second, and as a part of its limit."""
    columns = [(size, delivery) for size in record["samples"] for delivery in ("uint8", "float32")]
    heads = [f"{size} {delivery}" for size, delivery in columns]
    rows = [["samples/s (of limit)", *heads, "stall ms", "first ms", "exact"]]
    for name, by_size in record["cases"].items():
        row, entries = [name], []
        for size, delivery in columns:
            entry = by_size.get(size, {}).get(delivery)
            row.append("" if entry is None else cell(entry))
            entries += [entry] if entry else []
        stalls = [entry["stall_ms"] for entry in entries if "stall_ms" in entry]
        firsts = [entry["first_batch_ms"] for entry in entries if "first_batch_ms" in entry]
        known = [entry["exact"] for entry in entries if "exact" in entry]
        row.append(f"{stalls[0]:.2f}" if stalls else "")
        row.append(f"{firsts[0]:.0f}" if firsts else "")
        row.append(("yes" if all(known) else "NO") if known else "")
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            text.rjust(width) if number else text.ljust(width)
            for number, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def cell(entry: dict[str, Any]) -> str:
    """Of the table."""
    if "skipped" in entry:
        return str(entry["skipped"])
    if "failed" in entry:
        return "failed"
    if "samples_per_second" not in entry:
        return ""
    text = f"{entry['samples_per_second']:,.0f}"
    ratios = [entry[key] for key in entry if key.startswith("ratio_to_")]
    if ratios and ratios[0] is not None:
        text += f" ({ratios[0]:.3f})"
    return text


def plot(record: dict[str, Any], file: Path) -> None:
    """Bars for each size and delivery, on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [(size, delivery) for size in record["samples"] for delivery in ("uint8", "float32")]
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(4.2 * len(panels), 4.5), squeeze=False, layout="constrained"
    )
    for (size, delivery), axis in zip(panels, axes[0], strict=True):
        speeds = {}
        for name, by_size in record["cases"].items():
            entry = by_size.get(size, {}).get(delivery, {})
            if "samples_per_second" in entry:
                speeds[name] = (entry["samples_per_second"], entry["spread"])
        middles = [middle for middle, _ in speeds.values()]
        errors = [
            [middle - spread[0] for middle, spread in speeds.values()],
            [spread[1] - middle for middle, spread in speeds.values()],
        ]
        if not speeds:
            continue
        bars = axis.barh(list(speeds), middles, xerr=errors, color=[*map(color_of, speeds)])
        axis.bar_label(bars, [f"{middle:,.0f}" for middle in middles], padding=4, fontsize=8)
        axis.set_xscale("log")
        axis.set_xlim(min(middles) / 3, max(middles) * 8)
        axis.invert_yaxis()
        height, width, channels = record["samples"][size]["shape"]
        axis.set_title(f"{height}x{width}x{channels} as {delivery}")
        axis.set_xlabel("samples/s")
    figure.savefig(file, dpi=150)


def color_of(case: str) -> str:
    """Of its bar."""
    if case in LIMITS:
        return "tab:gray"
    return "tab:orange" if case.startswith("hpctrain") else "tab:blue"


def arguments_of(command: Sequence[str] | None) -> argparse.Namespace:
    """As given, checked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder for data, used again; default: none kept")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a trial: little data, one round")
    parser.add_argument("--cases", default=",".join(CASES), help=f"of {', '.join(CASES)}")
    parser.add_argument("--sizes", default=",".join(SIZES), help=f"of {', '.join(SIZES)}")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for each process")
    parser.add_argument("--out", type=Path, help="file for the JSON")
    parser.add_argument("--plot", type=Path, help="file for a chart; needs matplotlib")
    arguments = parser.parse_args(command)
    for option, known in (("cases", CASES), ("sizes", SIZES)):
        chosen = getattr(arguments, option).split(",")
        unknown = [name for name in chosen if name not in known]
        if unknown:
            parser.error(f"there are no {option} {', '.join(unknown)}; only {', '.join(known)}")
        # Always in the same order, the limits before what is compared with them.
        setattr(arguments, option, [name for name in known if name in chosen])
    if arguments.rounds < 1:
        parser.error("--rounds must be 1 or more")
    if arguments.quick:
        arguments.rounds = 1
    if arguments.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib")
    arguments.load = round(os.getloadavg()[0], 2)
    return arguments


def main(command: Sequence[str] | None = None) -> None:
    """Run the cases asked for."""
    arguments = arguments_of(command)
    with tempfile.TemporaryDirectory() as folder:
        arguments.data = (arguments.data or Path(folder)).resolve()
        try:
            results = rounds_of(arguments)
        except Error as error:
            raise SystemExit(str(error)) from error
        record = record_of(results, arguments)
    text = json.dumps(record, indent=2)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    else:
        print(text)
    if arguments.plot:
        plot(record, arguments.plot)
    say(table(record))


if __name__ == "__main__":
    main()
