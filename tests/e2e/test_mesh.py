"""Meshes by the installed command, and on four ranks."""

import sys
from pathlib import Path

import pytest

from hpctrain.process import mpirun, run
from tests.e2e.conftest import result_of
from tests.e2e.test_averaging import cut_back
from tests.e2e.test_sharded import tensors
from tests.waiting import SECONDS

CHOSEN = ["--steps", "20", "--set", "log.tensorboard=false", "--set", "checkpoint.every_steps=10",
    "--set", "checkpoint.keep=9", "--set", "train.dtype=float64", "--set", "train.batch_size=50",
    "--set", "train.clip_norm=0.5", "--set", "train.accumulate=2", "--set",
    "train.nonfinite=skip"]  # fmt: skip


@pytest.fixture
def mesh(hpctrain):
    """Train digits on a mesh of two ranks."""

    def train(axes, name, *more):
        chosen = [*CHOSEN, "--strategy", "mesh", "--mesh", axes, "--out", name, *more]
        return hpctrain.train("digits", *chosen, ranks=2)

    return train


def test_equals_one_process_and_resumes_on_any_mesh(hpctrain, mesh):
    """From its own checkpoint with the same bits; from another strategy's to the same numbers."""
    hpctrain.train("digits", *CHOSEN, "--strategy", "single", "--out", "one")
    expected = tensors(hpctrain.folder / "one")
    mesh("pp=2", "run")
    cut_back(hpctrain.folder / "run", 10, hpctrain.folder / "again")
    mesh("pp=2", "again", "--resume", "auto")
    whole, again = (result_of(hpctrain.folder / name) for name in ("run", "again"))
    assert again["parameters_sha256"] == whole["parameters_sha256"]
    assert again["metrics"]["best"] == whole["metrics"]["best"]
    assert whole["samples"] == 1000
    cut_back(hpctrain.folder / "run", 10, hpctrain.folder / "sharded")
    mesh("dp=2,shard=parameters", "sharded", "--resume", "auto")
    cut_back(hpctrain.folder / "run", 10, hpctrain.folder / "ring")
    hpctrain.train(
        "digits", *CHOSEN, "--strategy", "horovod", "--resume", "auto", "--out", "ring", ranks=2
    )
    for name in ("run", "sharded", "ring"):
        found = tensors(hpctrain.folder / name)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert (found[key] - value).norm() <= 1e-11 * value.norm(), (name, key)


def test_four_ranks():
    """Products of two axes equal one process, and hand their state on to each other."""
    meshes = ["dp=2,pp=2", "pp=2,tp=2", "dp=2,tp=2,shard=parameters", "dp=2,pp=2,shard=gradients"]
    done = run(
        [*mpirun(4), sys.executable, "-m", "tests.meshes", *meshes],
        timeout_seconds=SECONDS,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stdout
    assert f"parity: {' '.join(meshes)}" in done.stdout


def test_a_mesh_that_does_not_fit(hpctrain):
    told = hpctrain("train", "digits", "--strategy", "mesh", "--mesh", "dp=2,pp=2", ranks=2)
    assert told.returncode == 2 and "Traceback" not in told.stdout
    assert "a mesh of dp=2, pp=2, tp=1 takes 4 ranks, and 2 were launched. HINT:" in told.stdout
