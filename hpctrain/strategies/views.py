"""Make parameters and gradients views of flat tensors, which are exchanged in one piece."""

from __future__ import annotations

import torch
from torch import nn


def dense_view(flat: torch.Tensor, start: int, parameter: nn.Parameter) -> torch.Tensor:
    """Return a parameter's part of a flat tensor, with the parameter's own shape and strides.

    The optimizer then runs over both alike.

    Args:
        flat: Of one dimension.
        start: The part's first element.
        parameter: Of the flat's type.
    """
    piece = flat[start : start + parameter.numel()]
    # empty_like keeps the strides of dense tensors (channels_last among them), and only of those.
    strides = torch.empty_like(parameter, device="meta").stride()
    return piece.as_strided(parameter.shape, strides, piece.storage_offset())


def adopt(view: torch.Tensor, parameter: nn.Parameter) -> None:
    """Make a gradient that stands elsewhere the flat's again; to be called without autograd.

    Args:
        view: Its place in the flat.
        parameter: Whose gradient it is; it has one.
    """
    gradient = parameter.grad
    if gradient is view:
        return
    assert gradient is not None
    if gradient.layout != torch.strided:
        gradient = gradient.to_dense()
    if gradient.data_ptr() != view.data_ptr() or gradient.stride() != view.stride():
        view.copy_(gradient)
    parameter.grad = view
