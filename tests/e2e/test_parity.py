"""Promise 1: the number of ranks, and who launched them, do not change what is learnt."""

import pytest
import torch

from hpctrain.checkpoint.store import CheckpointStore, load_verified
from tests.e2e.conftest import result_of

ARGUMENTS = ("digits", "--steps", 50, "--dtype", "float64", "--seed", 3, "--out", "run")


def parameters(folder):
    store = CheckpointStore(folder / "run" / "checkpoints", keep=1)
    return load_verified(store.path(50))["model"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    from tests.e2e.conftest import Command

    folder = tmp_path_factory.mktemp("single")
    Command(folder).train(*ARGUMENTS)
    return parameters(folder)


@pytest.mark.parametrize(
    ("launcher", "ranks"),
    [("horovodrun", 2), ("horovodrun --gloo", 2), ("mpirun", 2), ("mpirun", 3)],
)
def test_same_parameters(hpctrain, reference, launcher, ranks):
    """64 is not divisible by 3, nor is the epoch by 64."""
    hpctrain.train(*ARGUMENTS, launcher=launcher, ranks=ranks)
    ours = parameters(hpctrain.folder)
    assert ours.keys() == reference.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == torch.float64
        assert (tensor - reference[name]).norm() <= 1e-12 * reference[name].norm(), name
    assert result_of(hpctrain.folder / "run")["world"] == [
        {"step": 0, "size": ranks, "reason": "start"}
    ]


def test_accumulation_changes_nothing(hpctrain, reference):
    hpctrain.train(*ARGUMENTS, "--set", "train.accumulate=5", ranks=2)
    ours = parameters(hpctrain.folder)
    for name, tensor in ours.items():
        assert (tensor - reference[name]).norm() <= 1e-12 * reference[name].norm(), name
