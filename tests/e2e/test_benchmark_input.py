"""The comparison of ways to get batches runs, and what it says is complete."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from hpctrain.process import run
from tests.waiting import SECONDS

ROOT = Path(__file__).parents[2]
CASES = ["memory", "rotating", "dataloader", "webdataset", "hpctrain", "lz4", "hpctrain-lz4",
         "hpctrain-open"]  # fmt: skip


def benchmark(*arguments):
    command = [sys.executable, "-m", "benchmarks.input", "--quick", "--sizes", "small"]
    # Some dozen processes, one after another.
    return run([*command, *map(str, arguments)], timeout_seconds=2 * SECONDS, cwd=ROOT)


def written(folder):
    document = json.loads((folder / "input.json").read_text())
    return document, {(each["case"], each["delivery"]): each for each in document["records"]}


def test_two_cases(tmp_path):
    result = benchmark(
        "--folder", tmp_path, "--cases", "memory,hpctrain", "--out", tmp_path / "out"
    )
    assert result.returncode == 0, result.stdout
    _, cases = written(tmp_path / "out")
    assert all(cases["hpctrain", delivery]["exact"] for delivery in ("uint8", "float32"))
    assert cases["hpctrain", "uint8"]["over_limit"] > 0 and "samples/s" in result.stdout


@pytest.mark.long
def test_quick(tmp_path):
    result = benchmark(
        *("--folder", tmp_path / "new" / "data", "--cases", ",".join(CASES)),
        *("--out", tmp_path / "out", "--timeout", SECONDS),
    )
    assert result.returncode == 0, result.stdout
    document, cases = written(tmp_path / "out")
    assert document["benchmark"] == "input" and document["batch"] == 256
    assert {name for name, _ in cases} == set(CASES)
    for name in ("memory", "rotating", "dataloader", "hpctrain"):
        for delivery in ("uint8", "float32"):
            record = cases[name, delivery]
            assert record["exact"] and record["samples_per_second"] > 0, result.stdout
    assert cases["memory", "uint8"]["over_limit"] == 1
    assert cases["dataloader", "uint8"]["hpctrain_over_peer"] > 0
    assert cases["hpctrain", "uint8"]["stall_ms"] >= 0
    assert cases["hpctrain", "float32"]["over_rotating"] > 0
    assert cases["hpctrain-lz4", "uint8"]["exact"]
    assert cases["hpctrain-lz4", "uint8"]["over_limit"] > 0
    assert cases["hpctrain-open", "uint8"]["first_batch_ms"] > 0
    if importlib.util.find_spec("webdataset") is None:
        assert cases["webdataset", "uint8"]["skipped"] == "not installed"
    assert "samples/s" in result.stdout and ">= 0.95: " in result.stdout  # table and verdicts


def test_a_case_that_fails_is_reported(tmp_path):
    (tmp_path / "data").write_text("in the way")
    result = benchmark("--folder", tmp_path / "data", "--cases", "memory", "--out", tmp_path)
    assert result.returncode == 0, result.stdout
    _, cases = written(tmp_path)
    assert "could not be made" in cases["memory", "uint8"]["failed"][0]


@pytest.mark.parametrize("arguments", [["--cases", "memry"], ["--rounds", "0"]])
def test_mistakes_are_told(arguments):
    result = benchmark(*arguments)
    assert result.returncode == 2 and "error:" in result.stdout
