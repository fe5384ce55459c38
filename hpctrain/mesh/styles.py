"""How the layers of a transformer are divided over tensor-parallel ranks, in torch's styles.

Shoeybi et al., "Megatron-LM", arXiv:1909.08053: the first matrix of a pair is cut by rows (columns
of its transpose), the second by columns, so that a pair takes one all-reduce in each direction.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from hpctrain.errors import Error
from hpctrain.mesh.region import rows_by_head

ROWS = "hpctrain_rows"
"""What a parameter remembers whose rows were put into another order before they were divided."""


class HeadwiseParallel(ColwiseParallel):
    """Cuts a fused projection, such as that of queries, keys and values, by heads.

    Its rows are those of all heads' queries, then keys, then values; each rank gets all three of
    its own heads, in the same order. Checkpoints have the rows as one process has them.

    Args:
        heads: Of the attention.
        parts: What is fused: 3 of queries, keys and values.
    """

    def __init__(self, heads: int, parts: int = 3) -> None:
        super().__init__()
        self._heads = heads
        self._parts = parts

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        ranks = device_mesh.size()
        if self._heads % ranks:
            raise Error(
                f"{self._heads} heads cannot be divided over tp={ranks} ranks.",
                hint="choose a tp that divides the number of heads.",
            )
        for parameter in module.parameters(recurse=False):
            width = len(parameter) // (self._parts * self._heads)
            rows = rows_by_head(self._heads, width, self._parts, ranks)
            setattr(parameter, ROWS, rows)
            parameter.data = parameter.data[torch.tensor(rows)]
        return super()._apply(module, device_mesh)


def attention(name: str, *, qkv: str, out: str, heads: int) -> dict[str, ParallelStyle]:
    """Return the styles of an attention with a fused projection of queries, keys and values.

    The module has to compute with as many heads as come out of the projection, not with a number
    of its own.

    Args:
        name: Of the module that has both projections, in the model.
        qkv: The fused projection's name in it.
        out: The output projection's.
        heads: Of the whole attention.

    Example:
        >>> sorted(attention("blocks.0", qkv="qkv", out="out", heads=8))
        ['blocks.0.out', 'blocks.0.qkv']
    """
    return {f"{name}.{qkv}": HeadwiseParallel(heads), f"{name}.{out}": RowwiseParallel()}


def mlp(name: str, *, up: str, down: str) -> dict[str, ParallelStyle]:
    """Return the styles of a perceptron with one hidden layer.

    Args:
        name: Of the module that has both layers, in the model.
        up: The first layer's name in it.
        down: The second's.

    Example:
        >>> sorted(mlp("blocks.0.mlp", up="0", down="2"))
        ['blocks.0.mlp.0', 'blocks.0.mlp.2']
    """
    return {f"{name}.{up}": ColwiseParallel(), f"{name}.{down}": RowwiseParallel()}
