"""Every mesh of two ranks equals one process, and hands its state on, bit for bit."""

import pytest
import torch
from torch import nn

import hpctrain
from hpctrain.errors import Error
from hpctrain.optim.lamb import Lamb
from hpctrain.strategies.mesh import Mesh, MeshConfig
from hpctrain.world.launcher import detect
from tests.meshes import check_handed_on, check_parity, on_mesh, prepared, task_of

pytestmark = pytest.mark.skipif(detect().size != 2, reason="meshes of two ranks")

MESHES = [
    "dp=2",
    "dp=2,shard=parameters",
    "dp=2,shard=gradients",
    "dp=2,shard=optimizer",
    "pp=2",
    "pp=2,schedule=gpipe,microbatches=3",
    "pp=2,schedule=interleaved,virtual=2,microbatches=2",
    "tp=2",
]
_saved = {}


@pytest.mark.parametrize("mesh", MESHES)
def test_parity(mesh):
    """AdamW, clipping, uneven parts, passes, frozen and tied parameters."""
    _saved[mesh] = check_parity(mesh)


@pytest.mark.parametrize(("first", "second"), zip(MESHES, [*MESHES[3:], *MESHES[:3]], strict=True))
def test_handed_on(first, second):
    check_handed_on(*(_saved.get(first) or check_parity(first)), second)


class OnlyCalls(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))


@pytest.mark.parametrize(
    ("mesh", "model", "kind", "said"),
    [
        ("tp=2", lambda: nn.Linear(4, 3), torch.optim.SGD, "nothing says how the model is divided"),
        ("dp=2,shard=parameters", lambda: nn.Linear(4, 3), Lamb, "cannot cut the state of Lamb"),
        ("pp=2", lambda: nn.Linear(4, 3), torch.optim.SGD, "cannot be cut into stages"),
        ("pp=2", lambda: OnlyCalls().layers, torch.optim.SGD, "keeps statistics of batches"),
        (
            "dp=2",
            lambda: nn.Embedding(4, 3, sparse=True),
            torch.optim.SGD,
            "no sparse gradients",
        ),
    ],
)
def test_refused(mesh, model, kind, said):
    def begin(strategy):
        made = model()
        with pytest.raises(Error, match=said):
            strategy.wrap(made, kind(made.parameters(), lr=0.1))

    on_mesh(mesh, begin)


def test_what_tp_does_not_divide():
    task = task_of()
    task.heads = 1

    def begin(strategy):
        model = task.model()
        with pytest.raises(Error, match="1 heads cannot be divided over tp=2 ranks"):
            prepared(strategy, task).wrap(model, torch.optim.SGD(model.parameters(), lr=0.1))

    on_mesh("tp=2", begin)


def test_a_mesh_of_other_ranks():
    with pytest.raises(Error, match="takes 4 ranks, and 2 were launched"):
        Mesh(hpctrain.init(), MeshConfig(dp=2, pp=2))


def test_ranks_that_come_apart_are_named():
    """Of what both hold; what each has alone is not compared."""
    task = task_of()

    def begin(strategy):
        model = task.model()
        prepared(strategy, task).wrap(model, torch.optim.SGD(model.parameters(), lr=0.1))
        strategy.check_parameters(model)
        if strategy.world.comm.rank == 1:
            model[0].positions.weight.data[0, 0] += 1
        with pytest.raises(Error, match=r"of parameter '0.positions.weight': rank 1 has not"):
            strategy.check_parameters(model)

    on_mesh("tp=2", begin)
