"""Sharded optimizer state by the installed command."""

import torch
from safetensors.torch import load_file

from tests.e2e.conftest import cut_back, result_of

CHOSEN = ["--steps", "40", "--set", "log.tensorboard=false", "--set", "checkpoint.every_steps=20",
    "--set", "checkpoint.keep=9", "--set", "train.dtype=float64",
    "--set", "train.clip_norm=0.5", "--set", "train.nonfinite=skip"]  # fmt: skip


def tensors(folder):
    """Of the newest checkpoint."""
    return load_file(max((folder / "checkpoints").glob("step-*")) / "tensors.safetensors")


def test_equals_horovod_and_resumes(hpctrain):
    """The checkpoint is the whole state, as of one process, and either goes on from either's."""
    for name, how in (("run", "sharded"), ("ring", "horovod")):
        hpctrain.train("digits", "--strategy", how, *CHOSEN, "--out", name, ranks=2)
    ours, theirs = (tensors(hpctrain.folder / name) for name in ("run", "ring"))
    assert ours.keys() == theirs.keys() and any("exp_avg" in name for name in ours)
    for name, value in theirs.items():
        assert torch.linalg.vector_norm(ours[name] - value) <= 1e-11 * value.norm(), name
    cut_back(hpctrain.folder / "run", 20, hpctrain.folder / "again")
    hpctrain.train(
        "digits", "--strategy", "sharded", *CHOSEN, "--resume", "auto", "--out", "again", ranks=2
    )
    whole, again = (result_of(hpctrain.folder / name) for name in ("run", "again"))
    assert again["parameters_sha256"] == whole["parameters_sha256"]
    cut_back(hpctrain.folder / "ring", 20, hpctrain.folder / "mixed")
    hpctrain.train(
        "digits", "--strategy", "sharded", *CHOSEN, "--resume", "auto", "--out", "mixed", ranks=2
    )
    for name, value in tensors(hpctrain.folder / "mixed").items():
        assert torch.linalg.vector_norm(ours[name] - value) <= 1e-11 * value.norm(), name


def test_what_needs_whole_tensors_is_refused(hpctrain):
    told = hpctrain(
        "train", "digits", "--strategy", "sharded", "--set", "optimizer.name=lamb", ranks=2
    )
    assert told.returncode == 2 and "Traceback" not in told.stdout
    assert "strategy 'sharded' cannot cut the state of Lamb" in told.stdout
