"""Update rules: what the user's optimizer does to its parameters, done to a slice of them.

A server has slices of a flat vector, not tensors with ``.grad``, and each is about 0.1 ms of
arithmetic. So a rule calls torch's fused kernels without the optimizer around them.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from hpctrain.errors import Error, nearest
from hpctrain.optim.lamb import Lamb, lamb_update
from hpctrain.ps.huge_pages import zeros

State = dict[str, Tensor]
Numbers = Sequence[float]

GRAIN = 64
"""Cut at multiples of this many elements, and slices become, bit for bit, what the whole becomes
on one thread. Kernels compute the odd rest at the end by other instructions, which round otherwise.
"""


class Rule(ABC):
    """How weights change with a gradient. It holds no state, so threads may share it.

    Call it under ``torch.no_grad()``, with contiguous tensors of one dtype in host memory.

    Attributes:
        name: What travels to the server.
        hyper_names: What the numbers from ``hyper`` are, in order; the learning rate is the first.
        state_names: torch's own names of the tensors that are kept with the weights.
        per_tensor: Whether a slice has to hold whole tensors.
    """

    name: str
    hyper_names: tuple[str, ...]
    state_names: tuple[str, ...]
    per_tensor = False

    def hyper(self, group: Mapping[str, Any]) -> list[float]:
        """Return the numbers of one parameter group of an optimizer.

        Raises:
            Error: The group asks for what the rule does not do.
        """
        numbers = dict(group)
        if "betas" in group:
            numbers["beta1"], numbers["beta2"] = group["betas"]
        return [float(numbers[name]) for name in self.hyper_names]

    def new_state(self, weights: Tensor) -> State:
        """Return the state before the first update of these weights."""
        return {
            name: zeros(weights.nbytes).view(weights.dtype).view_as(weights)
            for name in self.state_names
        }

    def apply(
        self,
        weights: Tensor,
        gradient: Tensor,
        state: State,
        hyper: Numbers,
        step: int,
        *,
        lr_factor: float = 1.0,
        bounds: Sequence[int] | None = None,
    ) -> None:
        """Update a slice in place.

        Args:
            weights: The slice, of one dimension.
            gradient: Its gradient; may be overwritten.
            state: From ``new_state``.
            hyper: From ``hyper``.
            step: The number of this update of the slice, from 1.
            lr_factor: Multiplies the learning rate.
            bounds: Where in the slice each whole tensor begins, and where the last one ends, for a
                rule that is ``per_tensor``. None: the slice is one tensor.
        """
        if lr_factor != 1.0:
            hyper = [hyper[0] * lr_factor, *hyper[1:]]
        if weights.dtype not in (torch.float32, torch.float64):
            # Arithmetic in float32, as GPU kernels do it. (On a CPU, torch 2.13's fused SGD leaves
            # weights of 16 bits as they were.)
            wide = {name: values.float() for name, values in state.items()}
            moved = weights.float()
            self.apply(moved, gradient.float(), wide, hyper, step, bounds=bounds)
            weights.copy_(moved)
            for name, values in wide.items():
                state[name].copy_(values)
        elif self.per_tensor and bounds is not None:
            for begin, end in pairwise(bounds):
                part = {name: values[begin:end] for name, values in state.items()}
                self._update(weights[begin:end], gradient[begin:end], part, hyper, step)
        else:
            self._update(weights, gradient, state, hyper, step)

    def apply_rows(
        self,
        weights: Tensor,
        rows: Tensor,
        gradient: Tensor,
        state: State,
        hyper: Numbers,
        step: int,
        *,
        lr_factor: float = 1.0,
    ) -> None:
        """Update some rows of a table in place; the others, and their state, stay as they are.

        Args:
            weights: The table, of shape (n, width), as is its state.
            rows: Which rows, each once, int64.
            gradient: Theirs, of shape (len(rows), width); may be overwritten.
            state: From ``new_state``.
            hyper: From ``hyper``.
            step: The number of this update of the table, from 1.
            lr_factor: Multiplies the learning rate.

        Raises:
            Error: The rule is ``per_tensor``.
        """
        if self.per_tensor:
            raise Error(
                f"{self.name} cannot update rows alone: it needs the norm of the whole table.",
                hint="use SGD, Adam or AdamW, or embeddings with sparse=False.",
            )
        some = weights[rows].view(-1)
        theirs = {name: values[rows].view(-1) for name, values in state.items()}
        hyper = self._hyper_of_rows(hyper, step)
        self.apply(some, gradient.reshape(-1), theirs, hyper, step, lr_factor=lr_factor)
        weights[rows] = some.view_as(gradient)
        for name, values in theirs.items():
            state[name][rows] = values.view_as(gradient)

    @abstractmethod
    def _update(
        self, weights: Tensor, gradient: Tensor, state: State, hyper: Numbers, step: int
    ) -> None:
        """``apply`` to float32 or float64, and to one tensor if the rule is ``per_tensor``."""

    def _hyper_of_rows(self, hyper: Numbers, step: int) -> Numbers:
        return hyper


class _Sgd(Rule):
    """torch.optim.SGD. Where momentum is 0, the state may be left out.

    As in torch, the first momentum is the first gradient, without dampening. A row that is first
    updated after the table's first step starts from a momentum of 0 instead.
    """

    name = "sgd"
    hyper_names = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
    state_names = ("momentum_buffer",)

    def _update(
        self, weights: Tensor, gradient: Tensor, state: State, hyper: Numbers, step: int
    ) -> None:
        lr, momentum, dampening, weight_decay, nesterov, maximize = hyper
        torch._fused_sgd_(
            [weights],
            [gradient],
            [state["momentum_buffer"]] if momentum else [],
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov != 0,
            maximize=maximize != 0,
            is_first_step=step == 1,
        )


class _Adam(Rule):
    """torch.optim.Adam, and on rows torch.optim.SparseAdam, with weight decay of these rows."""

    name = "adam"
    hyper_names = ("lr", "beta1", "beta2", "eps", "weight_decay", "maximize")
    state_names = ("exp_avg", "exp_avg_sq")
    _kernel: Callable[..., None] = staticmethod(torch._fused_adam_)
    _decoupled = False

    def hyper(self, group: Mapping[str, Any]) -> list[float]:
        if group["amsgrad"]:
            raise Error("a parameter server has no amsgrad.", hint="use amsgrad=False.")
        if group.get("decoupled_weight_decay", self._decoupled) != self._decoupled:
            raise Error(
                "a parameter server has no Adam(decoupled_weight_decay=True).",
                hint="use torch.optim.AdamW, which is the same.",
            )
        return super().hyper(group)

    def _update(
        self, weights: Tensor, gradient: Tensor, state: State, hyper: Numbers, step: int
    ) -> None:
        lr, beta1, beta2, eps, weight_decay, maximize = hyper
        self._kernel(
            [weights],
            [gradient],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [_tensor(step)],
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=weight_decay,
            eps=eps,
            amsgrad=False,
            maximize=maximize != 0,
        )

    def _hyper_of_rows(self, hyper: Numbers, step: int) -> Numbers:
        lr, beta1, beta2, eps, *rest = hyper
        # SparseAdam adds eps before it corrects the second moment's bias, Adam after.
        return [lr, beta1, beta2, eps / math.sqrt(1 - beta2**step), *rest]


class _AdamW(_Adam):
    name = "adamw"
    _kernel = staticmethod(torch._fused_adamw_)
    _decoupled = True


class _Lamb(Rule):
    name = "lamb"
    hyper_names = ("lr", "beta1", "beta2", "eps", "weight_decay")
    state_names = ("exp_avg", "exp_avg_sq")
    per_tensor = True

    def _update(
        self, weights: Tensor, gradient: Tensor, state: State, hyper: Numbers, step: int
    ) -> None:
        lamb_update(weights, gradient, state["exp_avg"], state["exp_avg_sq"], step, *hyper)


_OF: dict[type[torch.optim.Optimizer], Rule] = {
    torch.optim.SGD: _Sgd(),
    torch.optim.Adam: _Adam(),
    torch.optim.AdamW: _AdamW(),
    Lamb: _Lamb(),
}
_NAMED = {rule.name: rule for rule in _OF.values()}


def rule_of(optimizer: torch.optim.Optimizer) -> Rule:
    """Return the rule that does what this optimizer does.

    Raises:
        Error: There is none, or not for one of its groups.
    """
    rule = _OF.get(type(optimizer))  # exactly: a subclass may do anything
    if rule is None:
        raise Error(
            f"a parameter server has no rule for the optimizer {type(optimizer).__name__}.",
            hint=f"use one of {', '.join(known.__name__ for known in _OF)}.",
        )
    for group in optimizer.param_groups:
        rule.hyper(group)
    return rule


def rule_named(name: str) -> Rule:
    """Return the rule of this name.

    Raises:
        Error: There is none.
    """
    if name not in _NAMED:
        raise Error(f"there is no update rule '{name}'.", hint=nearest(name, _NAMED))
    return _NAMED[name]


@functools.lru_cache(maxsize=64)
def _tensor(step: int) -> Tensor:
    """What kernels want instead of a number. Nobody writes to it, so threads may share it."""
    return torch.tensor(float(step))
