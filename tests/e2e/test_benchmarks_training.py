"""benchmarks.scaling started alone, and benchmarks.accuracy by a line of mpirun."""

import csv
import json
import sys
from pathlib import Path

import pytest

from hpctrain.laps import PARTS
from hpctrain.process import mpirun, run

ROOT = Path(__file__).parents[2]


def benchmark(name, *arguments, prefix=()):
    command = [*prefix, sys.executable, "-m", f"benchmarks.{name}", *map(str, arguments)]
    return run(command, timeout_seconds=200, cwd=ROOT)


def test_scaling(tmp_path):
    result = benchmark("scaling", "--quick", "--emulate", 0.05, "--out", tmp_path)
    assert result.returncode == 0, result.stdout
    assert "digits, weak scaling, EMULATED COMPUTE" in result.stdout
    document = json.loads((tmp_path / "scaling.json").read_text())
    cases = {(r["scaling"], r["strategy"], r["ranks"]): r for r in document["records"]}
    assert sorted(cases) == sorted(
        (scaling, *case)
        for scaling in ("weak", "strong")
        for case in [("single", 1), *((s, n) for s in ("horovod", "ps:async") for n in (1, 2))]
    )
    for (scaling, _, ranks), record in cases.items():
        assert record["batch"] == (64 * ranks if scaling == "weak" else 64)
        assert record["emulated_compute"] and record["samples_per_second"] > 0
        # A rank sleeps for all of its samples.
        assert record["compute_ms"] > 0.05 * record["batch"] / ranks
        assert abs(sum(record[f"{part}_ms"] for part in PARTS) - record["step_ms"]) < 1e-6
    assert cases["weak", "single", 1]["efficiency"] == 1
    with (tmp_path / "scaling.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(cases)
    for kind in ("throughput", "efficiency", "parts"):
        stem = f"scaling-digits-weak-scaling-emulated-compute-{kind}"
        assert (tmp_path / f"{stem}.svg").stat().st_size and (tmp_path / f"{stem}.png").exists()


def test_accuracy_within_ranks(tmp_path):
    other = {"task": "digits", "strategy": "other", "ranks": 8, "workers": 8, "threads": 1,
             "emulated_compute": False, "oversubscribed": True, "nodes": 1, "batch": 64,
             "epochs": 3, "target": 0.8, "seed": 0, "to_target_seconds": 1.5,
             "to_target_samples": 640, "final_accuracy": 0.9, "total_seconds": 2.0,
             "curve": [{"samples": 640, "seconds": 1.5, "accuracy": 0.9}]}  # fmt: skip
    (tmp_path / "accuracy.jsonl").write_text(json.dumps(other) + "\n")
    result = benchmark("accuracy", "--quick", "--out", tmp_path, prefix=mpirun(2))
    assert result.returncode == 0, result.stdout
    records = {
        r["strategy"]: r for r in json.loads((tmp_path / "accuracy.json").read_text())["records"]
    }
    assert sorted(records) == ["horovod", "other", "ps:async"]  # those of other ranks stay
    for record in records.values():
        assert record["reached"] == "1 of 1" and record["to_target_seconds"] > 0
    curve = records["horovod"]["curve"]
    assert [each["samples"] for each in curve[:2]] == [640, 1280]
    assert records["horovod"]["to_target_samples"] in [each["samples"] for each in curve]
    assert "8*" in result.stdout


@pytest.mark.parametrize("arguments", [["--strategies", "single,horovd"], ["--ranks", "none"]])
def test_mistakes_are_told(arguments):
    result = benchmark("accuracy", *arguments)
    assert result.returncode == 2 and "error:" in result.stdout
