"""Benchmarks of steps, checkpoints and codecs run, agree, and write what they say."""

import json
import sys
from pathlib import Path

import pytest

from hpctrain.process import run
from tests.waiting import SECONDS

ROOT = Path(__file__).parents[2]


def benchmark(name, *arguments):
    command = [sys.executable, "-m", f"benchmarks.{name}", *map(str, arguments)]
    return run(command, timeout_seconds=SECONDS, cwd=ROOT)


def written(folder, name):
    assert (folder / f"{name}.csv").exists()
    assert {path.suffix for path in folder.glob(f"{name}-*")} == {".png", ".svg"}
    return json.loads((folder / f"{name}.json").read_text())["records"]


@pytest.mark.long
def test_peers(tmp_path):
    options = ("--networks", "here", "--models", "mlp_2M", "--rounds", 1, "--steps", 2)
    result = benchmark("peers", "--cases", "horovod,ddp", *options, "--out", tmp_path)
    assert result.returncode == 0, result.stdout
    records = written(tmp_path, "peers")
    assert [each["case"] for each in records] == ["horovod", "ddp"], result.stdout
    for each in records:
        assert "failed" not in each and each["error"] < 1e-4 and each["step_ms"] > 0
    assert "speed over ddp" in result.stdout


def test_checkpoint(tmp_path):
    options = ("--mb", 2, "--rounds", 1, "--cases", "hpctrain,write", "--folder", tmp_path)
    result = benchmark("checkpoint", *options)
    assert result.returncode == 0, result.stdout
    rows = [line.split()[0] for line in result.stdout.splitlines() if "(" in line]
    assert rows == ["hpctrain", "write"], result.stdout
    assert not list(tmp_path.iterdir())


def test_compression(tmp_path):
    options = ("--mbits", "", "--count", 100_000, "--rounds", 1, "--codecs", "fp16,int8")
    result = benchmark("compression", *options, "--out", tmp_path)
    assert result.returncode == 0, result.stdout
    assert [each["codec"] for each in written(tmp_path, "compression")] == ["fp16", "int8"]


def test_mistakes_are_told():
    result = benchmark("peers", "--cases", "ddq")
    assert result.returncode == 2 and "there is no ddq" in result.stdout
