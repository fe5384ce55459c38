"""`hpctrain launch`: ranks that outlive one another over Gloo, and are replaced."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpctrain.elastic.wire import ADDRESS
from hpctrain.process import run, search_path, which
from tests.e2e.conftest import result_of
from tests.slurm.conftest import TASK

ENVIRONMENT = {"OMP_NUM_THREADS": "1"}
QUIET = ("--set", "log.tensorboard=false", "--set", "log.every_steps=10")


def launched(hpctrain, ranks, *arguments, seconds=90):
    return run(
        ["hpctrain", "launch", "-np", str(ranks), "--", "hpctrain", "train", *map(str, arguments)],
        timeout_seconds=seconds, cwd=hpctrain.folder, env={**os.environ, **ENVIRONMENT},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("plan", "ranks", "epochs"),
    [
        ("kill:rank=0@step=20", 2, 25),
        ("kill:rank=2@step=20 kill:rank=0@step=20+0.02 stop:rank=1@step=60", 4, 12),
    ],
)
def test_losses(hpctrain, plan, ranks, epochs):
    """Also of rank 0, and while the others recover; where there is time, a new one comes."""
    done = hpctrain(
        "chaos", "--out", "run", "--plan", plan, "--",
        "hpctrain", "launch", "-np", ranks, "--",
        "hpctrain", "train", TASK, "--set", "options.pause=0.02", *QUIET, "--epochs", epochs,
        env=ENVIRONMENT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    outcome = json.loads((hpctrain.folder / "run" / "chaos.json").read_text())
    assert outcome["verdict"] == "good" and outcome["returncode"] == 0
    result = result_of(hpctrain.folder / "run")
    sizes = [change["size"] for change in result["world"]]
    assert sizes[0] == ranks and min(sizes) < ranks
    assert sizes[-1] == ranks or epochs < 20
    assert result["metrics"]["final"]["val_accuracy"] > 0.97


def test_a_world_formed_again_and_again(hpctrain):
    """Gloo's connections are cut while Horovod's thread is at them, wherever that is just then."""
    rank = (sys.executable, Path(__file__).with_name("regroup.py"), hpctrain.folder, 40)
    done = hpctrain("launch", "-np", 3, "--", *rank, env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("3 ranks go on") == 40


def test_an_error_on_one_rank_ends_all(hpctrain):
    fault = ("--set", "options.fault=error", "--set", "options.pause=0.01")
    done = launched(hpctrain, 2, TASK, "--epochs", 50, *fault)
    assert done.returncode == 1
    assert "ValueError: a bad sample" in done.stdout
    assert "rank 1 on" in done.stdout and "failed with exit code 1" in done.stdout


def test_bad_input(hpctrain):
    done = launched(hpctrain, 2, "digits", "--set", "train.nonsense=1")
    assert done.returncode == 2
    assert "train.nonsense" in done.stdout and "Traceback" not in done.stdout
    done = hpctrain("launch", "--", "hpctrain", "train", "digits")
    assert done.returncode == 2
    assert "HINT: -np 2" in done.stdout
    done = hpctrain("train", "digits", "--elastic", "gloo", ranks=2)
    assert done.returncode == 2
    assert "hpctrain launch" in done.stdout


def test_nobody_drives(hpctrain):
    """An address at which nobody listens, or somebody else."""
    environment = {ADDRESS: "127.0.0.1:9", "HPCTRAIN_DRIVER_KEY": "00", "HPCTRAIN_RANK": "0",
                   "HPCTRAIN_SIZE": "2"}  # fmt: skip
    done = hpctrain("train", "digits", "--elastic", "gloo", env=environment)
    assert done.returncode == 2
    assert "the driver at 127.0.0.1:9 cannot be reached" in done.stdout


def test_ended_by_a_signal(hpctrain):
    """Nothing is left behind."""
    process = subprocess.Popen(
        [which("hpctrain"), "launch", "-np", "2", "--", "hpctrain", "train",
         str(TASK), "--epochs", "500", "--set", "options.pause=0.05", "--out", "run", *QUIET],
        cwd=hpctrain.folder, env={**os.environ, **ENVIRONMENT, "PATH": search_path()},
        stdout=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        metrics = hpctrain.folder / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 60
        while not metrics.exists() or "train" not in metrics.read_text():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 128 + signal.SIGTERM
    finally:
        process.kill()
    left = run(["pgrep", "-f", str(hpctrain.folder)], timeout_seconds=10)
    assert left.stdout == ""
