"""The arithmetic of benchmarks.scaling and benchmarks.accuracy, and how ranks are started."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import accuracy, launching, scaling, training
from benchmarks.harness import results
from hpctrain.errors import Error
from hpctrain.report.benchmarks import read_benchmark
from hpctrain.report.figures import Stacks
from hpctrain.report.page import figures_of, sections_of
from hpctrain.train.step_timer import PARTS


def line(strategy="horovod", ranks=1, speed=100.0, number=0, *, kind="weak", **more):
    """As a round of benchmarks.scaling leaves it; batches of 64 a rank."""
    batch = 64 * ranks if kind == "weak" else 64
    parts = {f"{part}_ms": float(place) for place, part in enumerate(PARTS)}
    return {
        "task": "digits", "strategy": strategy, "ranks": ranks, "workers": ranks, "threads": 1,
        "emulated_compute": False, "oversubscribed": ranks > 2, "nodes": 1, "rank_batch": 64,
        "batch": batch, "round": number, "samples_per_second": speed,
        "step_ms": sum(parts.values()), **parts, **more,
    }  # fmt: skip


def found(records, **wanted):
    (record,) = [r for r in records if all(r[key] == value for key, value in wanted.items())]
    return record


def test_speed_counts_from_the_second_line_on():
    train = [(1.0, 5.0), (2.0, 100.0), (5.0, 20.0)]  # 100 samples, then 60
    records = [{"kind": "train", "time": t, "samples_per_second": s} for t, s in train]
    records += [
        {"kind": "timing", **{f"{part}_ms": ms for part in PARTS}} for ms in (99.0, 2.0, 4.0)
    ]
    speed = scaling.speed_of(records)
    assert speed["samples_per_second"] == 160 / 4
    assert speed["exchange_ms"] == 3 and speed["step_ms"] == 3 * len(PARTS)
    with pytest.raises(Error, match="too short"):
        scaling.speed_of(records[:1])


@given(
    st.floats(1, 1e6),
    st.lists(st.floats(0.1, 2), min_size=1, max_size=4),
    st.sampled_from([2, 4, 7]),
)
def test_efficiency_is_found_again_however_fast_rounds_are(alone, weather, ranks):
    """The machine's state differs from round to round, and falls on all numbers of ranks alike."""
    wanted = {"weak": 0.9, "strong": 0.5}
    lines = []
    for number, factor in enumerate(weather):
        lines.append(line("single", 1, alone * factor, number))
        lines += [
            line("horovod", ranks, alone * factor * ranks * part, number, kind=kind)
            for kind, part in wanted.items()
        ]
    records = scaling.summary(lines)
    assert len(records) == 4
    for kind, part in wanted.items():
        record = found(records, scaling=kind, ranks=ranks)
        for key in ("efficiency", "efficiency_min", "efficiency_max"):
            assert math.isclose(record[key], part, rel_tol=1e-9)
        assert found(records, scaling=kind, strategy="single")["efficiency"] == 1
        assert record["rounds"] == len(weather)


def test_strong_efficiency_is_that_of_step_times():
    t_1, t_4 = 0.08, 0.04
    lines = [line("single", 1, 64 / t_1), line("horovod", 4, 64 / t_4, kind="strong")]
    record = found(scaling.summary(lines), scaling="strong", ranks=4)
    assert math.isclose(record["efficiency"], t_1 / (4 * t_4))
    assert record["baseline"] == "single on 1" and record["oversubscribed"]


def test_baseline_is_the_fewest_ranks_where_single_was_not_measured():
    lines = [line(ranks=ranks, speed=speed) for ranks, speed in ((4, 300.0), (2, 200.0))]
    record = found(scaling.summary(lines), ranks=4)
    assert record["efficiency"] == 0.75 and record["baseline"] == "horovod on 2"


def test_what_is_measured_again_replaces_and_what_differs_stays_apart():
    lines = [line(speed=50.0), line(speed=100.0), line(speed=200.0, number=1)]
    lines.append(line(speed=10.0, emulated_compute=True))
    records = scaling.summary(lines)
    assert len(records) == 2
    plain = found(records, scaling="weak", emulated_compute=False)
    assert plain["samples_per_second"] == 150 and plain["rounds"] == 2
    emulated = found(records, scaling="weak", emulated_compute=True)
    assert "EMULATED" in emulated["group"] and emulated["efficiency"] == 1


@pytest.mark.parametrize(
    ("strategy", "ranks", "servers", "workers"),
    [("single", 1, 0, 1), ("single", 2, 0, None), ("horovod", 4, 1, 4), ("ps:async", 4, 0, 4),
     ("ps:ssp:3", 4, 1, 3), ("ps:sync", 1, 1, None)],
)  # fmt: skip
def test_which_ranks_work(strategy, ranks, servers, workers):
    case = training.case_of(strategy, ranks, servers)
    assert (case and case.workers) == workers


@pytest.mark.parametrize("strategy", ["horovd", "ps", "ps:ssp", "horovod:sync"])
def test_strategies_that_there_are_not(strategy):
    with pytest.raises(Error):
        training.case_of(strategy, 2, 0)


def seed_line(number, reached, **more):
    curve = [
        {"samples": 640 * n, "seconds": n * (1 + number), "accuracy": n / 10} for n in (1, 2, 9)
    ]
    return {
        "task": "digits", "strategy": "horovod", "ranks": 2, "workers": 2, "threads": 1,
        "emulated_compute": False, "oversubscribed": False, "nodes": 1, "batch": 64, "epochs": 8,
        "target": 0.9, "seed": number, "to_target_seconds": reached,
        "to_target_samples": reached and 640, "final_accuracy": 0.95, "total_seconds": 9.0,
        "curve": curve, **more,
    }  # fmt: skip


def test_the_way_to_a_target():
    records = [{"kind": "event", "time": 100.0, "step": 0}]
    for step, value in ((10, 0.5), (20, 0.91), (30, 0.89)):
        records.append({"kind": "validation", "step": step, "time": 100 + step, "accuracy": value})
    way = accuracy.progress_of(records, 64, 0.9)
    assert (way["to_target_seconds"], way["to_target_samples"]) == (20, 1280)
    assert (way["final_accuracy"], way["total_seconds"]) == (0.89, 30)
    assert accuracy.progress_of(records, 64, 0.99)["to_target_seconds"] is None


@given(st.lists(st.one_of(st.none(), st.floats(0.1, 100)), min_size=1, max_size=7))
def test_a_seed_that_does_not_get_there_counts_as_the_longest(times):
    (record,) = accuracy.summary([seed_line(n, seconds) for n, seconds in enumerate(times)])
    reached = sorted(seconds for seconds in times if seconds is not None)
    assert record["reached"] == f"{len(reached)} of {len(times)}"
    if 2 * len(reached) > len(times):
        longest = [*reached, *[math.inf] * (len(times) - len(reached))]
        middle = (longest[(len(times) - 1) // 2] + longest[len(times) // 2]) / 2
        assert math.isclose(record["to_target_seconds"], middle)
        assert (record["to_target_seconds_min"], record["to_target_seconds_max"]) == (
            reached[0], reached[-1]
        )  # fmt: skip
    elif 2 * len(reached) < len(times):
        assert "to_target_seconds" not in record and "not reached" in launching.shown(
            [record], accuracy.table_for
        )


def test_curves_are_medians_where_all_validated():
    lines = [seed_line(0, 1.0), seed_line(1, 2.0), seed_line(2, 3.0)]
    lines[2]["curve"] = lines[2]["curve"][1:]
    (record,) = accuracy.summary(lines)
    assert record["curve"] == [
        {"samples": 1280, "seconds": 4, "accuracy": 0.2},
        {"samples": 5760, "seconds": 18, "accuracy": 0.9},
    ]


def write(folder, name, records):
    results.write(folder, name, records)
    return folder / f"{name}.json"


def test_reports_of_scaling(tmp_path):
    lines = [line("single"), *(line(ranks=n, speed=80.0 * n) for n in (1, 2, 4))]
    file = write(tmp_path, "scaling", scaling.summary(lines))
    plots = figures_of(file)
    speed = plots["scaling-digits-weak-scaling-64-a-rank-throughput"]
    assert [each.label for each in speed.series] == ["single", "horovod"]
    assert list(speed.series[1].hollow) == [False, False, True]
    assert speed.ideal == [(1.0, 100.0), (4.0, 400.0)]
    assert list(plots["scaling-digits-weak-scaling-64-a-rank-efficiency"].series[1].y) == [0.8] * 3
    parts = plots["scaling-digits-weak-scaling-64-a-rank-parts"]
    assert isinstance(parts, Stacks) and list(parts.labels) == [
        "single, 1", "horovod, 1", "horovod, 2", "horovod, 4*"
    ]  # fmt: skip
    assert "horovod, 4*: input 0, compute 1, exchange 2" in str(parts)
    (section,) = sections_of([], [read_benchmark(file)])
    assert len(section.tables) == 1  # of strong scaling there is nothing but one rank


def test_reports_of_accuracy(tmp_path):
    file = write(tmp_path, "accuracy", accuracy.summary([seed_line(0, 1.0), seed_line(1, 3.0)]))
    plot = figures_of(file)["accuracy-digits-to-0-9-over-seconds"]
    assert [list(each.x) for each in plot.series] == [[1.5, 3, 13.5]]
    assert plot.ideal == [(1.5, 0.9), (13.5, 0.9)]


@pytest.mark.parametrize("name", ["scaling", "accuracy"])
@pytest.mark.parametrize("record", [{"ranks": "x"}, {"curve": [1, {"samples": 1}]}, {"ranks": -1}])
def test_files_of_the_same_name_that_hold_something_else(tmp_path, name, record):
    full = {"strategy": "s", "ranks": 0, "samples_per_second": 0.0, "efficiency": 0.0, **record}
    assert figures_of(write(tmp_path, name, [full])) == {}


class Launches:
    """Stands in for the launcher: notes what is started, and leaves a line as ranks do."""

    def __init__(self, code=0, output=""):
        self.code, self.output, self.started = code, output, []

    def __call__(self, command, **options):
        self.started.append(command)
        ranks = int(command[command.index("-n") + 1])
        (file,) = [word.partition("=")[2] for word in command if word.startswith("--lines=")]
        with Path(file).open("a") as stream:
            speeds = {1: 100.0, 2: 150.0}
            number = int(command[-2].rpartition("=")[2])
            stream.write(json.dumps(line(ranks=ranks, speed=speeds[ranks], number=number)) + "\n")
        return subprocess.CompletedProcess(command, self.code, self.output)


def test_ranks_are_started_round_after_round(monkeypatch, tmp_path, capsys):
    launches = Launches()
    monkeypatch.setattr(launching, "run", launches)
    monkeypatch.setattr(results, "plots", lambda *_: None)
    (tmp_path / "scaling.jsonl").write_text("of another time")
    command = ["--launcher", "srun --mpi=pmix -n", "--ranks=1,2", "--rounds", "2", "--batch", "64"]
    scaling.BENCHMARK.main([*command, "--out", str(tmp_path)])
    starts = [each[:4] for each in launches.started]
    assert starts == [["srun", "--mpi=pmix", "-n", n] for n in ("1", "2", "1", "2")]
    assert launches.started[2][4:] == [
        sys.executable, "-m", "benchmarks.scaling", "--ranks=1,2", "--rounds", "2",
        "--batch", "64", "--rounds=1", "--first-round=1", f"--lines={tmp_path / 'scaling.jsonl'}",
    ]  # fmt: skip
    assert "0.75" in capsys.readouterr().out


def test_ranks_that_fail_are_told(monkeypatch, tmp_path):
    monkeypatch.setattr(launching, "run", Launches(1, "step 1\nerror: no disk. HINT: buy one.\n"))
    arguments = scaling.BENCHMARK.parse(["--launcher", "srun -n", "--quick"])
    with pytest.raises(Error, match="1 ranks failed with exit code 1: error: no disk") as error:
        launching.drive(arguments, "scaling", "round", tmp_path / "lines")
    assert "srun -n 1" in error.value.hint


@pytest.mark.parametrize(
    "command",
    [["--ranks", "0"], ["--tasks", "cifar10"], ["--strategies", "horovd"], ["--rounds", "0"],
     ["--tasks", "charlm", "--emulate", "1"], ["--servers", "-1"]],
)  # fmt: skip
def test_mistakes_on_the_command_line(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        scaling.BENCHMARK.parse(command)
    assert exit_.value.code == 2 and "error:" in capsys.readouterr().err
