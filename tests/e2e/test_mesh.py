"""Meshes by the installed command, and on four ranks."""

import sys
from pathlib import Path

from hpctrain.process import mpirun, run
from tests.e2e.conftest import result_of
from tests.e2e.test_averaging import cut_back
from tests.e2e.test_sharded import tensors
from tests.waiting import SECONDS

CHOSEN = ["--steps", "20", "--set", "log.tensorboard=false", "--set", "checkpoint.every_steps=10",
    "--set", "checkpoint.keep=9", "--set", "train.dtype=float64", "--set", "train.batch_size=50",
    "--set", "train.clip_norm=0.5", "--set", "train.accumulate=2", "--set",
    "train.nonfinite=skip"]  # fmt: skip


def test_resumes_on_the_same_mesh_and_by_another_strategy(hpctrain):
    """With the same bits; and from its checkpoint, which is one process's, to the same numbers."""

    def train(how, name, *more):
        hpctrain.train("digits", *CHOSEN, *how, "--out", name, *more, ranks=2)
        return tensors(hpctrain.folder / name), result_of(hpctrain.folder / name)

    pipeline = ["--strategy", "mesh", "--mesh", "pp=2"]
    expected, whole = train(pipeline, "run")
    assert whole["samples"] == 1000
    for name, how in (("again", pipeline), ("ring", ["--strategy", "horovod"])):
        cut_back(hpctrain.folder / "run", 10, hpctrain.folder / name)
        found, result = train(how, name, "--resume", "auto")
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert (found[key] - value).norm() <= 1e-11 * value.norm(), (name, key)
        if name == "again":
            assert result["parameters_sha256"] == whole["parameters_sha256"]
            assert result["metrics"]["best"] == whole["metrics"]["best"]


def test_four_ranks():
    """Products of two axes equal one process, and hand their state on to each other."""
    meshes = ["dp=2,pp=2,shard=parameters", "pp=2,tp=2", "dp=2,tp=2,shard=parameters"]
    done = run(
        [*mpirun(4), sys.executable, "-m", "tests.meshes", *meshes],
        timeout_seconds=SECONDS,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stdout
    assert f"parity: {' '.join(meshes)}" in done.stdout
