"""The cost model against training steps on emulated hosts, at places that it was not fitted to.

    python -m benchmarks.model --out results
    python -m benchmarks.model --full --hosts 8 --mbits 100 --out results/8x100
    python -m benchmarks.model results/*/model.json --out results

The first measures steps of some strategies on 2, 4 and 8 hosts (ps_hosts.py) with links of two
rates, the second all strategies at some places, and the third takes what was measured before.

Exchange and update are hpctrain's own; computing is emulated (model_steps.py says how), so that a
rank on each of 8 hosts computes at full speed on 2 cores. Horovod runs its MPI operations. Open
MPI is told to take the ring for `horovod`; for `horovod+halving` it is left alone, and then takes
Rabenseifner's algorithm for messages of these sizes (coll_tuned_decision_fixed.c of Open MPI 5).

The model's parameters are fitted to all places but one, for each family of strategies (those that
exchange in the same way), and predict that one: a number of hosts and a rate of their links. The
table has how far that is off, by strategy. `hosts` is the same, but all places with that number of
hosts are left out, and `rates` all with that rate. Measured is a mean step; of three windows the
median. While it is measured, all cores are watched: where they idle for less than a tenth of the
time, the point is marked `*`, because there this machine is the bound, and not the links that it
emulates. (Horovod's threads always ask for the next message, so for it that says nothing.)

Prints tables; --out gets model.json, model.csv, a plot, and records.json for benchmarks.fit.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import ps_hosts
from benchmarks.harness.command import Add, Arguments, Benchmark, Report, count, numbers, positive
from benchmarks.harness.processes import module
from benchmarks.harness.tables import by_group, say, table
from benchmarks.model_steps import Job
from hpctrain.costmodel.fit import Record, held_out
from hpctrain.errors import Error
from hpctrain.report.figures import Plot, Series

HOSTS, MBITS = (2, 4, 8), (100.0, 200.0, 400.0)
BYTES, LAYERS, BUCKETS = 2**22, 8, 4
FORWARD_SECONDS, BACKWARD_SECONDS, JITTER = 0.06, 0.12, 0.05
WINDOW_SECONDS = {False: 0.5, True: 0.8}
TIMEOUT_SECONDS = 900.0
IDLE = 0.1
YIELD = ("--mca", "mpi_yield_when_idle", "1")  # there are more ranks than cores
# For Open MPI's tuned collectives: one collective, all-reduce (2), has one rule for all sizes of
# communicators, of two sizes of messages: recursive doubling (3) for what Horovod negotiates with,
# the ring (4) from 16 KiB on.
RULES = "1\n2\n1\n0\n2\n0 3 0 0\n16384 4 0 0\n"
# Sleep is no slower beside an exchange; and to add a byte takes next to nothing of the 20 to 80 ns
# that it takes to send it, so the fit could not tell.
KNOWN = {"contention": 0.0, "reduce_seconds_per_byte": 5e-10}
Point = dict[str, Any]


def cases_of(hosts: int, full: bool) -> list[str]:
    """Return the strategies for so many hosts, with a rank each."""
    half = f"ps:{hosts // 2}"
    everywhere = f"ps:{hosts}+colocated"
    cases = ["horovod", "ps:1", half, everywhere]
    if hosts > 2:
        cases += ["ps:1+async", f"{half}+async"]
    if full:
        cases += ["horovod+halving", "ps:1+fp16"]
        cases += [f"{everywhere}+{how}" for how in ("async", "ssp:3", "int8", "topk:0.01")]
        cases += [f"{half}+ssp:3"] * (hosts > 2)
    return list(dict.fromkeys(cases))


def measured_at(hosts: int, mbits: float, full: bool) -> list[Point]:
    """Measure all strategies at a place.

    Args:
        hosts: How many.
        mbits: Of their links.
        full: Whether these are all strategies, for longer.

    Raises:
        Error: The hosts do not come up, or a job fails.
    """
    cases = cases_of(hosts, full)
    points: list[Point] = []
    with ps_hosts.hosts(hosts, mbits) as cluster, tempfile.NamedTemporaryFile("w") as rules:
        rules.write(RULES)
        rules.flush()
        ring = ["--mca", "coll_tuned_use_dynamic_rules", "1"]
        ring += ["--mca", "coll_tuned_dynamic_rules_filename", rules.name]
        for options, some in (
            (ring, [case for case in cases if case != "horovod+halving"]),
            ([], [case for case in cases if case == "horovod+halving"]),
        ):
            if some:
                points += run(cluster, options, hosts, mbits, some, full)
    return points


def run(
    cluster: ps_hosts.Hosts,
    options: Sequence[str],
    hosts: int,
    mbits: float,
    cases: list[str],
    full: bool,
) -> list[Point]:
    """Measure strategies that one job can."""
    job = Job(
        cases, BYTES, LAYERS, BUCKETS, FORWARD_SECONDS, BACKWARD_SECONDS, JITTER,
        WINDOW_SECONDS[full],
    )  # fmt: skip
    command = module("model_steps", json.dumps(job._asdict()))
    done = cluster.mpirun(
        [1] * hosts,
        command,
        TIMEOUT_SECONDS,
        options=[*YIELD, *options],
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or len(lines) != 1 + len(cases):
        raise Error(
            f"{hosts} hosts, {mbits:g} Mbit/s: exit code {done.returncode} after "
            f"{len(lines)} results: {done.stdout.strip()[-300:]}",
            hint="`hpctrain doctor` says whether MPI and Horovod work here.",
        )
    alone, *found = lines
    place = {"hosts": hosts, "link_Mbps": mbits, "bytes": BYTES, "emulated": True}
    parts = ("forward_seconds", "backward_seconds", "update_seconds")
    return [
        {**place, **each, **{part: alone[part] for part in parts}, "jitter": JITTER}
        for each in found
    ]


def fit_record(point: Point) -> Record:
    """Return a point as the fit takes it."""
    strategy = str(point["strategy"])
    return Record(
        strategy=strategy,
        ranks=point["hosts"],
        nodes=point["hosts"],
        bytes=point["bytes"],
        seconds=point["seconds"],
        link_bytes_per_second=1e6 * point["link_Mbps"] / 8,
        forward_seconds=point["forward_seconds"],
        backward_seconds=point["backward_seconds"],
        update_seconds=point["update_seconds"],
        buckets=BUCKETS if strategy.startswith("horovod") else LAYERS,
        jitter=point["jitter"],
        compression_ratio=point.get("compression_ratio", 1.0),
        encode_seconds_per_byte=point.get("encode_seconds_per_byte", 0.0),
        decode_seconds_per_byte=point.get("decode_seconds_per_byte", 0.0),
    )


def predicted(points: Sequence[Point]) -> tuple[list[Point], list[Record]]:
    """Return points with the errors of predictions, and the records that these are made of."""
    records = [fit_record(point) for point in points]
    points = [
        {
            **point,
            "machine_bound": record.known_strategy.kind == "ps" and point["cores_busy"] > 1 - IDLE,
            "seconds_predicted": None,
        }
        for point, record in zip(points, records, strict=True)
    ]
    families = [record.known_strategy.family for record in records]
    for each in dict.fromkeys(families):
        some = [n for n, family in enumerate(families) if family == each]
        left_out = {
            "error": lambda record: record.place,
            "error_hosts": lambda record: record.nodes,
            "error_rates": lambda record: record.link_bytes_per_second,
        }
        for key, by in left_out.items():
            if len({by(records[n]) for n in some}) < 2:
                continue
            errors = held_out([records[n] for n in some], KNOWN, by)
            for n, error in zip(some, errors, strict=True):
                points[n][key] = error
                if key == "error":
                    points[n]["seconds_predicted"] = points[n]["seconds"] * (1 + error)
    return points, records


def without_number(point: Point) -> str:
    """Return a strategy without its number of servers."""
    name, _, rest = str(point["strategy"]).partition("+")
    return "+".join(filter(None, [name.partition(":")[0], rest]))


def summaries(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Return errors by strategy, by hosts, by rate, and in all."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(without_number(point), []).append(point)
    for hosts in sorted({point["hosts"] for point in points}):
        groups[f"{hosts} hosts"] = [p for p in points if p["hosts"] == hosts]
    for mbits in sorted({point["link_Mbps"] for point in points}):
        groups[f"{mbits:g} Mbit/s"] = [p for p in points if p["link_Mbps"] == mbits]
    groups["all"] = list(points)
    groups["all that the machine does not bound"] = [p for p in points if not p["machine_bound"]]
    found = []
    for name, some in groups.items():
        entry: dict[str, Any] = {"group": name, "points": len(some)}
        for key in ("error", "error_hosts", "error_rates"):
            sizes = [abs(point[key]) for point in some if key in point]
            if sizes:
                entry |= {f"median_{key}": statistics.median(sizes), f"largest_{key}": max(sizes)}
        found.append(entry)
    return found


def shown(points: Sequence[Point], groups: Sequence[dict[str, Any]]) -> str:
    """Return the tables."""
    rows = [["hosts", "Mbit/s", "strategy", "step ms", "least..most", "predicted", "error"]]
    for p in points:
        span = f"{1e3 * p['seconds_low']:.0f}..{1e3 * p['seconds_high']:.0f}"
        mark = "*" if p["machine_bound"] else ""
        step, foretold = 1e3 * p["seconds"], 1e3 * p["seconds_predicted"]
        rows.append([str(p["hosts"]), f"{p['link_Mbps']:g}", p["strategy"], f"{step:.0f}{mark}",
                     span, f"{foretold:.0f}", f"{p['error']:+.0%}"])  # fmt: skip
    errors = [["error", "points", "median", "largest", "hosts", "rates"]]
    for each in groups:
        keys = ("median_error", "largest_error", "median_error_hosts", "median_error_rates")
        cells = [f"{each[key]:.1%}" if key in each else "" for key in keys]
        errors.append([each["group"], str(each["points"]), *cells])
    return f"{table(rows)}\n* bound by this machine's cores\n\n{table(errors)}"


def figure(points: Sequence[Point]) -> Plot:
    """Return a plot of predicted steps by measured ones, of each strategy in order of time."""
    lines = []
    ordered = sorted(points, key=lambda point: float(point["seconds"]))
    named = [{**point, "group": without_number(point)} for point in ordered]
    for look, (name, some) in enumerate(by_group(named)):
        x, y = ([1e3 * p[key] for p in some] for key in ("seconds", "seconds_predicted"))
        lines.append(Series(name, x, y, look=look))
    ends = [1e3 * f(p["seconds"] for p in points) for f in (min, max)]
    return Plot(
        "model", "Steps predicted from other places", "measured step, ms (emulated compute)",
        "predicted, ms", lines, "The straight line: predicted as measured.",
        ideal=[(end, end) for end in ends], log_x=True, log_y=True,
    )  # fmt: skip


def read(files: Iterable[Path]) -> list[Point]:
    """Return what earlier runs measured.

    Raises:
        Error: A file is not one of this benchmark's.
    """
    points = []
    for file in files:
        try:
            points += json.loads(file.read_text(encoding="utf-8"))["measured"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Error(
                f"{file} is no model.json: {error}.", hint="--out of this benchmark writes it."
            ) from error
    return points


def measure(arguments: Arguments) -> Report:
    """Measure, or take what was measured; then predict."""
    points = read(arguments.files)
    if not arguments.files:
        rates = arguments.mbits or (MBITS if arguments.full else MBITS[1:])
        for hosts, mbits in itertools.product(arguments.hosts, rates):
            began, load = time.perf_counter(), os.getloadavg()[0]
            some = measured_at(hosts, mbits, arguments.full)
            points += [{**point, "load_before": load} for point in some]
            took = time.perf_counter() - began
            say(f"{hosts} hosts, {mbits:g} Mbit/s: {len(some)} strategies in {took:.0f} s")
    if len({(point["hosts"], point["link_Mbps"]) for point in points}) < 2:
        text = f"one place alone predicts nothing; {len(points)} measurements"
        return Report(points, text, {"measured": points})
    found, records = predicted(points)
    groups = summaries(found)
    more = {"measured": points, "errors": groups}
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        content = [record.model_dump(mode="json") for record in records]
        (arguments.out / "records.json").write_text(json.dumps(content, indent=1) + "\n")
    return Report(found, shown(found, groups), more, figures=[figure(found)])


def options(add: Add) -> None:
    """Add the benchmark's own options."""
    add("files", nargs="*", type=Path, help="model.json of earlier runs")
    add("--full", action="store_true", help="all strategies, for longer")
    add("--hosts", type=numbers(count), default="2,4,8", help="default: %(default)s")
    add("--mbits", type=numbers(positive), help="default: 200,400; with --full 100, too")


QUICK = {"hosts": "2", "mbits": "400"}
BENCHMARK = Benchmark("model", __doc__, measure, options=options, quick=QUICK)

if __name__ == "__main__":
    BENCHMARK.run()
