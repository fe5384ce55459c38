"""A model whose embedding table is on servers learns what one process learns."""

import pytest
import torch

import hpctrain as package
from hpctrain.errors import Error
from tests.e2e.conftest import result_of
from tests.e2e.test_bad_input import complaint
from tests.e2e.test_ps import alone, assert_same, ps, saved

SMALL = (
    "dlrm", "--dtype", "float64", "--seed", 3, "--set", "log.tensorboard=false",
    "--set", "options.samples=4000", "--set", "options.ids=200",
)  # fmt: skip
IDS = torch.cat([torch.arange(200) + (field << 40) for field in range(6)])


def rows(folder):
    table = package.load(folder, "newest").table
    return table, table.store.read(IDS)


@pytest.mark.parametrize(("workers", "servers"), [(2, 1), (2, 2)])
def test_servers_train_what_one_process_trains(hpctrain, tmp_path, workers, servers):
    options = ("--steps", 12, "--set", "options.admit_after=2")
    theirs = alone(tmp_path / "single", *SMALL, *options)
    arguments, ranks = ps(workers, servers)
    hpctrain.train(*SMALL, *options, *arguments, "--out", "ps", ranks=ranks)
    assert_same(saved(tmp_path / "ps"), theirs)
    table, found = rows(tmp_path / "ps")
    alone_table, expected = rows(tmp_path / "single")
    assert len(table.store) == len(alone_table.store)
    assert (found - expected).norm() <= 1e-12 * expected.norm()
