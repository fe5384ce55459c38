"""A model whose embedding table is on servers learns what one process learns."""

import torch

import hpctrain as package
from tests.e2e.conftest import result_of
from tests.e2e.test_ps import alone, assert_same, ps, saved

SMALL = (
    "dlrm", "--dtype", "float64", "--seed", 3, "--steps", 12, "--set", "log.tensorboard=false",
    "--set", "options.samples=4000", "--set", "options.ids=200", "--set", "options.admit_after=2",
    "--set", "checkpoint.every_steps=6", "--set", "checkpoint.keep=9",
)  # fmt: skip
IDS = torch.cat([torch.arange(200) + (field << 40) for field in range(6)])


def rows(folder):
    """The rows of a run's newest checkpoint, and how many were made of them."""
    store = package.load(folder, "newest").table.store
    return store.read(IDS), len(store)


def test_servers_train_what_one_process_trains_and_go_on_as_others(hpctrain, tmp_path):
    theirs = alone(tmp_path / "single", *SMALL)
    arguments, ranks = ps(2, 1)
    hpctrain.train(*SMALL, *arguments, "--out", "ps", ranks=ranks)
    assert_same(saved(tmp_path / "ps"), theirs)
    (expected, count), (found, ours) = rows(tmp_path / "single"), rows(tmp_path / "ps")
    assert 0 < ours == count < 1200
    assert (found - expected).norm() <= 1e-12 * expected.norm()
    assert result_of(tmp_path / "ps")["metrics"]["final"]["val_auc"] > 0.6
    # From the middle on, by two servers instead of one: the same bits.
    arguments, ranks = ps(2, 2)
    middle = tmp_path / "ps" / "checkpoints" / "step-00000006"
    hpctrain.train(*SMALL, *arguments, "--resume", middle, "--out", "two", ranks=ranks)
    again, made = rows(tmp_path / "two")
    assert torch.equal(again, found) and made == ours
    for name, value in saved(tmp_path / "ps")["model"].items():
        assert torch.equal(saved(tmp_path / "two")["model"][name], value), name
