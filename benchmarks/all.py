"""All benchmarks, one after the other, and what falls short.

    python -m benchmarks.all --out results
    python -m benchmarks.all --quick --only peers,ps

Each is a program of its own with its own options, started as by hand; what it prints is in LOG in
its folder of ``--out``. Shown is every figure that is to be reached, and whether it was; at the end
are those that fell short, and the benchmarks that failed or cannot run on this machine. ``--quick``
runs the smallest form of each, which shows that it runs; its figures say little.

Left out are those that need files which are not here: fit and ps_lite, and the matrix of set-ups,
which takes hours and is no measurement.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness.bars import at_most, line_of
from benchmarks.harness.command import Add, Arguments, Benchmark, NotHereError, Report, words_of
from benchmarks.harness.processes import ROOT, module, scratch
from benchmarks.harness.tables import table
from hpctrain.process import mpirun, run

LOG = "log"
HELD, SHORT, FAILED, NOT_HERE = "held", "fell short", "failed", "cannot run here"


class Entry(NamedTuple):
    """How a benchmark is started.

    Attributes:
        name: Of its module.
        words: Its options.
        ranks: Of MPI, within which it runs; 0: it starts its own.
    """

    name: str
    words: tuple[str, ...] = ()
    ranks: int = 0


ENTRIES = {
    "published": Entry("published"),
    "simulate": Entry("simulate"),
    "allreduce": Entry("allreduce", ranks=2),
    "backward": Entry("backward", ranks=2),
    "overhead": Entry("overhead", ("--model", "perceptron"), ranks=2),
    "overhead-alone": Entry("overhead", ("--model", "perceptron"), ranks=1),
    "overhead-convnet": Entry("overhead", ("--model", "convnet"), ranks=2),
    "scaling": Entry("scaling"),
    "accuracy": Entry("accuracy"),
    "input": Entry("input"),
    "checkpoint": Entry("checkpoint"),
    "compression": Entry("compression"),
    "ps": Entry("ps"),
    "tables": Entry("tables"),
    "peers": Entry("peers"),
    "slow_network": Entry("slow_network"),
    "stragglers": Entry("stragglers"),
    "model": Entry("model"),
    "elastic_overhead": Entry("elastic_overhead"),
    "elastic_kills": Entry("elastic_kills"),
    "ps_kills": Entry("ps_kills"),
    "goodput": Entry("goodput"),
    "elastic_hosts": Entry("elastic_hosts"),
    "elastic_return": Entry("elastic_return"),
    "requeues": Entry("requeues"),
    "strangers": Entry("strangers"),
}


def started(entry: Entry, folder: Path, *, quick: bool, timeout: float) -> dict[str, Any]:
    """Run a benchmark, and return what came of it.

    Args:
        entry: How it is started.
        folder: For its files.
        quick: Whether in its smallest form.
        timeout: Seconds after which it has failed.

    Returns:
        ``result``, its ``seconds``, and its ``verdicts``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{entry.name}.json"
    file.unlink(missing_ok=True)
    prefix = mpirun(entry.ranks) if entry.ranks else []
    words = [*entry.words, "--out", str(folder.resolve()), *(["--quick"] if quick else [])]
    began = time.monotonic()
    done = run([*prefix, *module(entry.name, *words)], timeout_seconds=timeout, cwd=ROOT)
    (folder / LOG).write_text(done.stdout, encoding="utf-8")
    record: dict[str, Any] = {"seconds": round(time.monotonic() - began, 1), "verdicts": []}
    if file.exists():
        record["verdicts"] = json.loads(file.read_text(encoding="utf-8"))["targets"]
    short = [each for each in record["verdicts"] if not each["met"]]
    if done.returncode == NotHereError.exit_code:
        result = NOT_HERE
    elif done.returncode and not short:
        result = FAILED
    else:
        result = SHORT if short else HELD
    said = done.stdout.split("-" * 40)[0].strip() or done.stdout.strip()  # mpirun's comes after it
    last = said.splitlines()[-1:] if result in (FAILED, NOT_HERE) else []
    return {"result": result, **record, "said": last}


def measure(arguments: Arguments) -> Report:
    """Run the benchmarks asked for."""
    records = []
    with scratch() as nowhere:
        out = arguments.out or nowhere
        for name in arguments.only:
            print(f"benchmarks.{name}", flush=True)
            found = started(
                ENTRIES[name], out / name, quick=arguments.quick, timeout=arguments.timeout
            )
            records.append({"benchmark": name, **found})
            for line in [*map(line_of, found["verdicts"]), *found["said"]]:
                print(f"  {line}", flush=True)
    counts = {each: sum(record["result"] == each for record in records) for each in (SHORT, FAILED)}
    summary = {"fell_short": counts[SHORT], "failed": counts[FAILED]}
    return Report(records, show(records), summary=[summary])


def show(records: Iterable[dict[str, Any]]) -> str:
    """Return a table of all benchmarks, and the figures that fell short."""
    rows, short = [["benchmark", "result", "held", "of", "s"]], []
    for record in records:
        met = [each["met"] for each in record["verdicts"]]
        row = [record["benchmark"], record["result"], str(sum(met)), str(len(met))]
        rows.append([*row, f"{record['seconds']:.0f}"])
        short += [
            f"{record['benchmark']}: {line_of(each)}"
            for each in record["verdicts"]
            if not each["met"]
        ]
    return "\n".join(["", table(rows), *(["", *short] if short else [])])


def options(add: Add) -> None:
    """Add the benchmark's own options."""
    add("--only", type=words_of(ENTRIES), default=",".join(ENTRIES), metavar="NAMES",
        help=f"of {', '.join(ENTRIES)}")  # fmt: skip
    add("--timeout", type=float, default=7200, help="seconds for each; default: %(default)s")


BARS = (at_most("fell_short", 0, must=True), at_most("failed", 0, must=True))
BENCHMARK = Benchmark("all", __doc__, measure, options=options, bars=BARS, plots=False)

if __name__ == "__main__":
    BENCHMARK.run()
