"""`hpctrain launch`: ranks that outlive one another over Gloo, and are replaced."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hpctrain.elastic.driver_protocol import ADDRESS
from hpctrain.process import run
from tests.e2e.conftest import result_of
from tests.processes import children, started
from tests.slurm.conftest import TASK, slow_until
from tests.waiting import SECONDS, wait_until

# A busy machine may not let a rank give a sign of life for as long as is usual.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HPCTRAIN__ELASTIC__HANG_SECONDS": "5"}
QUIET = ("--set", "log.tensorboard=false", "--set", "log.every_steps=10")


def launched(hpctrain, ranks, *arguments, seconds=SECONDS):
    return run(
        ["hpctrain", "launch", "-np", str(ranks), "--", "hpctrain", "train", *map(str, arguments)],
        timeout_seconds=seconds, cwd=hpctrain.folder, env={**os.environ, **ENVIRONMENT},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("plan", "ranks"),
    [
        pytest.param("kill:rank=0@step=20", 2, marks=pytest.mark.long),
        ("kill:rank=2@step=20 kill:rank=0@step=20+0.02 stop:rank=1@step=60", 4),
    ],
)
def test_losses(hpctrain, plan, ranks):
    """Also of rank 0, and while the others recover; new ones come."""
    done = hpctrain(
        "chaos", "--out", "run", "--plan", plan, "--",
        "hpctrain", "launch", "-np", ranks, "--",
        "hpctrain", "train", TASK, *slow_until("joined", plan.count("rank")), *QUIET,
        "--epochs", 8,
        env=ENVIRONMENT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    outcome = json.loads((hpctrain.folder / "run" / "chaos.json").read_text())
    assert outcome["verdict"] == "good" and outcome["returncode"] == 0
    result = result_of(hpctrain.folder / "run")
    sizes = [change["size"] for change in result["world"]]
    assert sizes[0] == ranks and min(sizes) < ranks
    assert sizes[-1] == ranks
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
    before = children()
    metrics = hpctrain.folder / "run" / "metrics.jsonl"
    with started(
        ["hpctrain", "launch", "-np", "2", "--", "hpctrain", "train",
         TASK, "--epochs", "500", "--set", "options.pause=0.05", "--out", "run", *QUIET],
        cwd=hpctrain.folder, env={**os.environ, **ENVIRONMENT}, stdout=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        wait_until(lambda: metrics.exists() and "train" in metrics.read_text(),
                   "the first steps", running=process)  # fmt: skip
        process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS) == 128 + signal.SIGTERM
        assert children() == before
