"""Ways of getting batches of 256 images and labels, side by side: hpctrain, others, and the limit.

    pip install -r benchmarks/input-requirements.txt
    python -m benchmarks.input --folder /scratch/input --out results

Every case runs in a process of its own, once a round; the rounds go over all cases in turn, so that
whatever else the machine does falls on all alike. The limit, ``memory``, gathers samples at random
from an array in memory, on one thread, into one and the same batch; ``rotating`` gathers into as
many batches in turn as hpctrain's loader holds, which do not stay in the processor's cache. Ratios
to a limit are of the same round. A speed is that of the best of three stretches of whole epochs,
each a second or more. Files are in the page cache. Loaders with workers have two. Normalised images
are made by hpctrain's own function for all: in hpctrain's loader, and elsewhere in the main process
into one and the same memory. A package that is not installed is reported as such. input_cases.py
has the cases.

Prints a table; --out gets input.json, input.csv and plots (PNG, SVG).
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness.bars import at_least, at_most
from benchmarks.harness.command import Add, Arguments, Benchmark, Report, count, positive, words_of
from benchmarks.harness.processes import ROOT, module, scratch
from benchmarks.harness.results import environment
from benchmarks.harness.rounds import Record, Round, compared, in_turn, record_of
from benchmarks.harness.tables import by_group, say, spread, table
from benchmarks.input_cases import BATCH, CASES, DELIVERIES, PEERS, SIZES, WORKERS, Case, Data
from hpctrain.process import run

PACKAGES = ("h5py", "hdf5plugin", "cramjam")
MAKE_SECONDS = 900
BARS = (
    at_least("over_rotating", 0.95, case="hpctrain"),
    at_least("over_limit", 0.9, case=("hpctrain-lz4", "hpctrain-zstd")),
    at_least("hpctrain_over_peer", 10.0, case="litdata", size="large", delivery="uint8"),
    at_most("stall_ms", 0.05, case="hpctrain"),
)


class Place(NamedTuple):
    """What is measured in one process."""

    case: str
    size: str
    delivery: str

    def __str__(self) -> str:
        return f"{self.case} {self.size} {self.delivery}"


def places(cases: Sequence[str], sizes: Sequence[str]) -> list[Place]:
    """Return all there are, those that are compared with each other next to each other."""
    return [
        Place(name, size, delivery)
        for size in sizes
        for delivery in DELIVERIES
        for name in cases
        if size in CASES[name].sizes and delivery in CASES[name].deliveries
    ]


def missing(case: Case) -> bool:
    """Return whether what a case needs is not installed."""
    return bool(case.module) and importlib.util.find_spec(case.module) is None


def child(job: dict[str, Any], timeout_seconds: float) -> Round:
    """Do a job in a process of its own; ``failed`` says why, if it did."""
    with scratch() as folder:
        result = folder / "result.json"
        command = module("input_cases", json.dumps(job), str(result))
        done = run(command, timeout_seconds=timeout_seconds, cwd=ROOT)
        if done.returncode == 0:
            return dict(json.loads(result.read_text()))
    if done.returncode == 124:
        return {"failed": f"not done after {timeout_seconds:g} s"}
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    return {"failed": (lines or [f"exit code {done.returncode}"])[-1][:300]}


def make_data(todo: Sequence[Place], folder: Path, quick: bool) -> dict[tuple[str, str], str]:
    """Make what is not there yet.

    Args:
        todo: What is to be measured.
        folder: For data.
        quick: Whether they are few.

    Returns:
        Size and layout -> why it could not be made.
    """
    failed = {}
    for size, layout in dict.fromkeys((place.size, CASES[place.case].layout) for place in todo):
        if not Data(folder, size, quick).marker(layout).exists():
            say(f"making {size} {layout}")
            job = {"root": str(folder), "size": size, "quick": quick, "layout": layout}
            result = child(job, MAKE_SECONDS)
            if "failed" in result:
                failed[size, layout] = f"the data could not be made: {result['failed']}"
    return failed


def rounds_of(arguments: Arguments, folder: Path) -> dict[Place, list[Round]]:
    """Measure everything, round after round, with data in a folder."""

    def measured(place: Place) -> Round:
        job = {"root": str(folder), "quick": arguments.quick, **place._asdict()}
        return child(job, arguments.timeout)

    def told(number: int, place: Place, result: Round) -> None:
        speed = f"{result['best']:,.0f} samples/s" if "best" in result else json.dumps(result)
        say(f"round {number + 1} of {arguments.rounds}: {place}: {speed}")

    todo = places(arguments.cases, arguments.sizes)
    present = [place for place in todo if not missing(CASES[place.case])]
    no_data = make_data(present, folder, arguments.quick)
    why = {place: no_data.get((place.size, CASES[place.case].layout)) for place in present}
    runs = {place: partial(measured, place) for place in present if why[place] is None}
    results = in_turn(runs, arguments.rounds, tell=told)
    failed = {place: [{"failed": text}] * arguments.rounds for place, text in why.items() if text}
    skipped = {place: [{"skipped": "not installed"}] for place in todo}
    return skipped | failed | results


def beside_others(place: Place, results: dict[Place, list[Round]]) -> Record:
    """Return the record of a place; its ratios are of best stretches in the same round.

    Args:
        place: Which.
        results: Of all places.
    """
    case = CASES[place.case]
    variables: Record = {"group": f"{place.size} {place.delivery}", **place._asdict()}
    variables["limit"] = case.versus
    rounds = results[place]
    if "skipped" in rounds[0]:
        return {**variables, **rounds[0]}
    if any("best" in each for each in rounds):
        others = {"over_limit": case.versus}
        others |= {"over_rotating": "rotating"} if place.case == "hpctrain" else {}
        for name, other in others.items():
            if limit := results.get(place._replace(case=other)):
                rounds = compared(rounds, limit, name, lambda one, top: one["best"] / top["best"])
        ours = results.get(place._replace(case="hpctrain"))
        if place.case in PEERS and ours:
            name = "hpctrain_over_peer"
            rounds = compared(rounds, ours, name, lambda one, own: own["best"] / one["best"])
    names = {"best": "samples_per_second", "median": "samples_per_second_median_stretch"}
    return record_of(variables, [{names.get(k, k): v for k, v in each.items()} for each in rounds])


def show(records: Sequence[Record]) -> str:
    """Return a table with a line for each case: samples a second, and as a part of its limit."""
    groups = dict(by_group(records))
    heads = [f"{group} (of limit)" for group in groups]
    rows = [["samples/s", *heads, "stall ms", "first ms", "exact"]]
    for name, some in by_group(records, "case"):
        cells = [cell([each for each in some if each["group"] == group]) for group in groups]
        for key in ("stall_ms", "first_batch_ms"):
            cells.append(next((spread(each, key) for each in some if key in each), ""))
        known = [each["exact"] for each in some if "exact" in each]
        rows.append([name, *cells, ("yes" if all(known) else "NO") if known else ""])
    return table(rows)


def cell(records: Sequence[Record]) -> str:
    """Return a cell of the table, of the one record that is there for it, or of none."""
    if not records:
        return ""
    (record,) = records
    if "samples_per_second" not in record:
        return str(record.get("skipped") or ("failed" if "failed" in record else ""))
    text = f"{record['samples_per_second']:,.0f}"
    return f"{text} ({record['over_limit']:.3f})" if "over_limit" in record else text


def measure(arguments: Arguments) -> Report:
    """Measure the cases asked for, with data that are kept in ``--folder`` or not at all."""
    with scratch() as nowhere:
        folder = (arguments.folder or nowhere).resolve()
        folder.parent.mkdir(parents=True, exist_ok=True)
        results = rounds_of(arguments, folder)
        samples = {name: Data(folder, name, arguments.quick).samples for name in arguments.sizes}
    records = [beside_others(place, results) for place in results]
    peers = dict.fromkeys(case.package for case in CASES.values() if case.package)
    about = {"batch": BATCH, "workers": WORKERS, "samples": samples}
    more = {**about, "versions": environment((*PACKAGES, *peers))}
    return Report(records, show(records), more)


def options(add: Add) -> None:
    """Add the benchmark's own options."""
    add("--folder", type=Path, help="for data, made where it is missing and used again; default: "
        "none kept")  # fmt: skip
    add("--rounds", type=count, default=3)
    add("--cases", type=words_of(CASES), default=",".join(CASES), help=f"of {', '.join(CASES)}")
    add("--sizes", type=words_of(SIZES), default=",".join(SIZES), help=f"of {', '.join(SIZES)}")
    add("--timeout", type=positive, default=300, help="seconds for each process")


BENCHMARK = Benchmark(
    "input", __doc__, measure, options=options, bars=BARS, quick={"rounds": 1}
)  # --quick also makes few data

if __name__ == "__main__":
    BENCHMARK.run()
