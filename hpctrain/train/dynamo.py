"""The front end of ``torch.compile``, kept out of processes that compile nothing.

``torch.optim`` imports ``torch._dynamo`` at an optimizer's start and steps, to tell it what to
leave out of compiled code. This takes as long as importing torch itself, also where nothing is ever
compiled. Before anybody else has imported that module there is nobody to be told.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer, optimizer


def import_when_used() -> None:
    """Have torch's optimizers use ``torch._dynamo`` only after somebody else has imported it.

    To be called before an optimizer is made. A torch whose optimizers use it in another way is left
    as it is.
    """
    kinds = [kind for kind in vars(torch.optim).values() if isinstance(kind, type)]
    for decorate, direct in (
        (getattr(optimizer, "_use_grad_for_differentiable", None), _with_grad_if_differentiable),
        (getattr(torch, "_disable_dynamo", None), _as_it_is),
    ):
        if decorate is None:
            continue
        decorated = decorate(lambda: None).__code__
        for kind in {Optimizer, *kinds}:
            for name, method in list(vars(kind).items()):
                if getattr(method, "__code__", None) is decorated:
                    setattr(kind, name, _until_imported(direct(method.__wrapped__), method))


def _until_imported(direct: Callable[..., Any], method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (method if "torch._dynamo" in sys.modules else direct)(*args, **kwargs)

    return call


def _as_it_is(method: Callable[..., Any]) -> Callable[..., Any]:
    return method


def _with_grad_if_differentiable(step: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            return step(self, *args, **kwargs)

    return call
