"""Promise 3: killed and resumed, a run ends where an uninterrupted one ends, bit for bit."""

import os
import random
import time

import psutil
import pytest

from tests.e2e.conftest import result_of
from tests.slurm.conftest import TASK, slow_until
from tests.waiting import SECONDS

# A run is not over before it is killed, however late that may be.
ARGUMENTS = (
    *(TASK, "--epochs", 8, "--seed", 5, *slow_until("", at=100, file="killed")),
    *("--set", "checkpoint.every_steps=10", "--set", "train.ema_decay=0.9"),
    *("--set", "train.clip_norm=1.0"),
)


def kill_a_rank(process):
    """SIGKILL to a training process: the only one, or one of the launcher's."""
    ranks = [
        child
        for child in [psutil.Process(process.pid), *psutil.Process(process.pid).children(True)]
        if "hpctrain" in " ".join(child.cmdline()) and "mpirun" not in child.cmdline()[0]
    ]
    random.choice(ranks).kill()


def train_and_kill(hpctrain, ranks, after_seconds):
    """Start a run and kill it so long after its first checkpoint."""
    with hpctrain.training(*ARGUMENTS, ranks=ranks) as process:
        time.sleep(after_seconds)
        kill_a_rank(process)
        process.communicate(timeout=SECONDS)  # a rank's death ends the whole run


@pytest.mark.parametrize("ranks", [0, 2])
def test_killed_and_resumed(hpctrain, ranks):
    seed = int(os.environ.get("HPCTRAIN_TEST_SEED", "0"))
    random.seed(seed)
    train_and_kill(hpctrain, ranks, random.uniform(0, 0.4))
    (hpctrain.folder / "killed").touch()
    hpctrain.train(*ARGUMENTS, "--out", "whole", ranks=ranks)
    assert not (hpctrain.folder / "run" / "result.json").exists()
    resumed = hpctrain.train(*ARGUMENTS, "--out", "run", "--resume", "auto", ranks=ranks)
    assert "resumed at step" in resumed.stdout
    whole, pieces = (result_of(hpctrain.folder / name) for name in ("whole", "run"))
    assert pieces["parameters_sha256"] == whole["parameters_sha256"]
    assert pieces["steps"] == whole["steps"] and pieces["samples"] == whole["samples"]
    assert pieces["metrics"]["best"] == whole["metrics"]["best"]
    for name in ("val_loss", "val_accuracy"):
        assert pieces["metrics"]["final"][name] == whole["metrics"]["final"][name]
    assert [entry["reason"].split(" at ")[0] for entry in pieces["world"]] == ["start", "resumed"]


def test_resume_of_a_complete_run_changes_nothing(hpctrain):
    hpctrain.train("digits", "--epochs", 1, "--out", "run")
    before = result_of(hpctrain.folder / "run")
    hpctrain.train("digits", "--epochs", 1, "--out", "run", "--resume", "auto")
    after = result_of(hpctrain.folder / "run")
    assert after["parameters_sha256"] == before["parameters_sha256"]
    assert after["steps"] == before["steps"]


def test_a_run_may_be_extended_on_another_world(hpctrain):
    """The cursor is in the checkpoint, and no rank or size is."""
    fixed = ("digits", "--dtype", "float64", "--set", "schedule.name=constant", "--out", "run")
    hpctrain.train(*fixed, "--steps", 30)
    hpctrain.train(*fixed, "--steps", 60, "--resume", "auto", ranks=2)
    result = result_of(hpctrain.folder / "run")
    assert result["steps"] == 60
    assert [entry["size"] for entry in result["world"]] == [1, 2]
    # 1,438 samples an epoch in batches of 64: 23 steps each, the last of 30.
    assert result["samples"] == 2 * 1438 + 14 * 64


def test_a_damaged_checkpoint_is_named_and_passed_over(hpctrain):
    hpctrain.train("digits", "--epochs", 3, "--out", "run", "--set", "checkpoint.keep=5")
    newest = sorted((hpctrain.folder / "run" / "checkpoints").glob("step-*"))[-1]
    (newest / "tensors.safetensors").write_bytes(b"damaged")
    resumed = hpctrain.train(
        *("digits", "--epochs", 3, "--out", "run", "--resume", "auto"),
        *("--set", "checkpoint.keep=5"),
    )
    assert f"{newest.name}/tensors.safetensors is damaged" in resumed.stdout
    assert "resumed at step 46" in resumed.stdout
