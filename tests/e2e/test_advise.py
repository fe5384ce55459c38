"""The cost model's commands, started as a user would."""

import json
import sys
from pathlib import Path

import pytest

from hpctrain.process import mpirun, run
from tests.waiting import SECONDS

ROOT = Path(__file__).parents[2]


def benchmark(name, *arguments):
    command = [sys.executable, "-m", f"benchmarks.{name}", *map(str, arguments)]
    return run(command, timeout_seconds=SECONDS, cwd=ROOT)


RECORD = {"strategy": "horovod", "ranks": 2, "nodes": 2, "bytes": 4e7, "seconds": 0.4,
          "link_bytes_per_second": 1.25e8}  # fmt: skip


def records():
    """As if the ring sent at 0.8 of the link, with 1 ms a message."""
    return [
        {**RECORD, "ranks": n, "nodes": n, "bytes": size, "link_bytes_per_second": link,
         "seconds": 2 * (n - 1) * (1e-3 + size / n / (0.8 * link))}
        for n in (2, 4, 8) for size in (4e4, 4e7) for link in (1.25e8, 1.25e9)
    ]  # fmt: skip


def test_fit_then_advise(hpctrain):
    file = hpctrain.folder / "records.json"
    file.write_text(json.dumps(records()))
    fitted = benchmark("fit", file, "--known", "reduce_seconds_per_byte=0", "--out", file.parent)
    assert fitted.returncode == 0, fitted.stdout
    assert "median error, held out" in fitted.stdout
    found = json.loads((file.parent / "fit.json").read_text())["records"][0]
    assert found["parameters"]["link_share"]["value"] == pytest.approx(0.8, rel=1e-3)
    assert found["held_out_median_error"] < 1e-3

    result = hpctrain(
        *("advise", "digits", "--nodes", 3, "--ranks-per-node", 2, "--network"),
        *("1Gbit,latency=50us", "--seconds", 0.1, "--speedup", 2, "--json", "advice.json"),
        *("--fit", "fit.json"),
    )
    assert result.returncode == 0, result.stdout
    assert "PREDICTED, not measured" in result.stdout and "best on 3 nodes: " in result.stdout
    assert "fitted instead  horovod" in result.stdout
    advice = json.loads((hpctrain.folder / "advice.json").read_text())
    assert advice["measured"]["parameter_bytes"] == 4 * 9930
    assert sum(share for _, share in advice["measured"]["buckets"]) == pytest.approx(1)
    rows = advice["predictions"]
    assert {row["nodes"] for row in rows} == {1, 2, 3}
    assert {row["ranks"] for row in rows} == {2, 4, 6}
    compute = advice["measured"]["forward_seconds"] + advice["measured"]["backward_seconds"]
    for row in rows:
        assert row["step_seconds_low"] <= row["step_seconds"] <= row["step_seconds_high"]
        assert row["compute"] == pytest.approx(compute / 2)
    # By the fit, a message of the ring takes 1 ms: 6 ranks pass 4 links between nodes.
    ring = next(row for row in rows if row["strategy"] == "horovod" and row["nodes"] == 3)
    assert ring["exchange"] > 4e-3


def test_mistakes_are_told(hpctrain):
    result = hpctrain("advise", "digits", "--nodes", 2, "--network", "quick")
    assert result.returncode == 2 and "'quick' is not a rate. HINT:" in result.stdout


def test_fit_tells_what_is_missing(tmp_path):
    file = tmp_path / "records.json"
    file.write_text(json.dumps([RECORD]))
    result = benchmark("fit", file)
    assert result.returncode == 2 and "HINT:" in result.stdout
    assert "Traceback" not in result.stdout


def test_emulated_steps():
    cases = ["ps:1+fp16", "ps:2+colocated+async"]
    job = {"cases": cases, "bytes": 2**16, "layers": 4, "buckets": 2, "forward_seconds": 0.01,
           "backward_seconds": 0.02, "jitter": 0.0, "window_seconds": 0.1}  # fmt: skip
    command = [*mpirun(2), sys.executable, "-m", "benchmarks.model_steps", json.dumps(job)]
    done = run(command, timeout_seconds=SECONDS, cwd=ROOT)
    assert done.returncode == 0, done.stdout
    alone, pushed, own = (json.loads(s) for s in done.stdout.splitlines() if s.startswith("{"))
    assert alone["forward_seconds"] >= 0.01 and alone["backward_seconds"] >= 0.02
    assert [pushed["strategy"], own["strategy"]] == cases
    assert pushed["workers"] == 1 and own["workers"] == 2
    assert pushed["compression_ratio"] == pytest.approx(0.5)
    for each in (pushed, own):
        assert 0.03 <= each["seconds_low"] <= each["seconds"] <= each["seconds_high"]
        assert each["steps"] >= 9 and 0 <= each["cores_busy"] <= 1


def test_simulate(tmp_path):
    result = benchmark(
        *("simulate", "--ranks", "4,64", "--steps", 40, "--days", 2, "--seeds", 2),
        *("--out", tmp_path),
    )
    assert result.returncode == 0, result.stdout
    document = json.loads((tmp_path / "simulate.json").read_text())
    assert document["simulated"] and document["environment"]["cores"] > 0
    groups = [record["group"] for record in document["records"]]
    assert groups.count("stragglers") == 2 * 2 * 5 and groups.count("failures") == 2 * 10
    assert document["best"]["Young"] > document["best"]["Daly"] > 0
    assert len((tmp_path / "simulate.csv").read_text().splitlines()) == 41
    assert (tmp_path / "simulate-goodput.png").stat().st_size > 0
    assert benchmark("simulate", "--ranks", "1").returncode == 2
