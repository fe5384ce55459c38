"""The comparison of ways to get batches runs, and what it says is complete."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from hpctrain.process import run
from tests.waiting import SECONDS

ROOT = Path(__file__).parents[2]
CASES = ["memory", "dataloader", "webdataset", "hpctrain", "lz4", "hpctrain-lz4", "hpctrain-open"]


def benchmark(*arguments):
    command = [sys.executable, "-m", "benchmarks.input", "--quick", "--sizes", "small"]
    # Some dozen processes, one after another.
    return run([*command, *map(str, arguments)], timeout_seconds=2 * SECONDS, cwd=ROOT)


def test_quick(tmp_path):
    file = tmp_path / "record.json"
    result = benchmark(
        "--data", tmp_path / "data", "--cases", ",".join(CASES), "--out", file, "--timeout", SECONDS
    )
    assert result.returncode == 0, result.stdout
    record = json.loads(file.read_text())
    assert record["benchmark"] == "input" and record["batch"] == 256
    cases = {name: by_size["small"] for name, by_size in record["cases"].items()}
    assert sorted(cases) == sorted(CASES)
    for name in ("memory", "dataloader", "hpctrain"):
        for delivery in ("uint8", "float32"):
            entry = cases[name][delivery]
            assert entry["exact"] and entry["samples_per_second"] > 0, result.stdout
    assert cases["memory"]["uint8"]["ratio_to_memory"] == 1
    assert cases["dataloader"]["uint8"]["hpctrain_over_peer"] > 0
    assert cases["hpctrain"]["uint8"]["stall_ms"] >= 0
    assert cases["hpctrain-lz4"]["uint8"]["exact"]
    assert cases["hpctrain-lz4"]["uint8"]["ratio_to_lz4"] > 0
    assert cases["hpctrain-open"]["uint8"]["first_batch_ms"] > 0
    if importlib.util.find_spec("webdataset") is None:
        assert cases["webdataset"]["uint8"] == {"skipped": "not installed"}
    assert "samples/s (of limit)" in result.stdout  # the table


def test_a_case_that_fails_is_reported(tmp_path):
    (tmp_path / "data").write_text("in the way")
    result = benchmark("--data", tmp_path / "data", "--cases", "memory", "--out", tmp_path / "r")
    assert result.returncode == 0, result.stdout
    entry = json.loads((tmp_path / "r").read_text())["cases"]["memory"]["small"]["uint8"]
    assert "could not be made" in entry["failed"]


@pytest.mark.parametrize("arguments", [["--cases", "memry"], ["--rounds", "0"]])
def test_mistakes_are_told(arguments):
    result = benchmark(*arguments)
    assert result.returncode == 2 and "error:" in result.stdout
