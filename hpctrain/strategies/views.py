"""Parameters and gradients as views of flat tensors, which are exchanged in one piece."""

from __future__ import annotations

import torch
from torch import nn


def dense_view(flat: torch.Tensor, start: int, parameter: nn.Parameter) -> torch.Tensor:
    """A parameter's part of a flat tensor, with the parameter's own shape and strides.

    The optimizer then runs over both alike.
    """
    piece = flat[start : start + parameter.numel()]
    # empty_like keeps the strides of dense tensors (channels_last among them), and only of those.
    strides = torch.empty_like(parameter, device="meta").stride()
    return piece.as_strided(parameter.shape, strides, piece.storage_offset())


def adopt(view: torch.Tensor, parameter: nn.Parameter) -> None:
    """Make a gradient that came to stand elsewhere (``grad = None`` before) the flat's again."""
    gradient = parameter.grad
    if gradient is view:
        return
    if gradient is None:
        view.zero_()
    elif gradient.data_ptr() != view.data_ptr():
        view.copy_(gradient)
    parameter.grad = view
