"""benchmarks.scaling started alone, and benchmarks.accuracy by a line of mpirun."""

import csv
import json
import sys
from pathlib import Path

import pytest

from hpctrain.process import mpirun, run
from hpctrain.train.step_timer import PARTS
from tests.waiting import SECONDS

ROOT = Path(__file__).parents[2]


def benchmark(name, *arguments, prefix=()):
    command = [*prefix, sys.executable, "-m", f"benchmarks.{name}", *map(str, arguments)]
    return run(command, timeout_seconds=SECONDS, cwd=ROOT)


@pytest.mark.long
def test_scaling(tmp_path):
    options = ("--quick", "--scaling", "weak", "--emulate", 0.05)
    result = benchmark("scaling", *options, "--out", tmp_path)
    assert result.returncode == 0, result.stdout
    assert "digits, weak scaling, 64 a rank, EMULATED COMPUTE" in result.stdout
    document = json.loads((tmp_path / "scaling.json").read_text())
    cases = {(r["strategy"], r["ranks"]): r for r in document["records"] if r["scaling"] == "weak"}
    assert sorted(cases) == [
        ("horovod", 1), ("horovod", 2), ("ps:async", 1), ("ps:async", 2), ("single", 1)
    ]  # fmt: skip
    for (_, ranks), record in cases.items():
        assert record["batch"] == 64 * ranks and record["emulated_compute"]
        assert record["samples_per_second"] > 0
        assert record["compute_ms"] > 0.05 * 64  # a rank sleeps for all of its samples
        assert abs(sum(record[f"{part}_ms"] for part in PARTS) - record["step_ms"]) < 1e-6
    assert cases["single", 1]["efficiency"] == 1
    with (tmp_path / "scaling.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(document["records"])
    for kind in ("throughput", "efficiency", "parts"):
        stem = f"scaling-digits-weak-scaling-64-a-rank-emulated-compute-{kind}"
        assert (tmp_path / f"{stem}.svg").stat().st_size and (tmp_path / f"{stem}.png").exists()


def test_accuracy_within_ranks(tmp_path):
    file = tmp_path / "lines"
    result = benchmark("accuracy", "--quick", "--lines", file, prefix=mpirun(1))
    assert result.returncode == 0, result.stdout
    (line,) = [json.loads(line) for line in file.read_text().splitlines()]
    # The others are for more ranks.
    assert (line["strategy"], line["ranks"], line["launcher"]) == ("single", 1, "mpirun")
    assert [point["samples"] for point in line["curve"][:2]] == [640, 1280]
    first = next(point for point in line["curve"] if point["accuracy"] >= 0.8)
    assert line["to_target_samples"] == first["samples"]
    assert line["to_target_seconds"] == first["seconds"] > 0


@pytest.mark.parametrize("arguments", [["--strategies", "single,horovd"], ["--ranks", "none"]])
def test_mistakes_are_told(arguments):
    result = benchmark("accuracy", *arguments)
    assert result.returncode == 2 and "error:" in result.stdout
