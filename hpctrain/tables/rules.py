"""Row-wise optimizers of tables: each changes the rows that a step touched, and nothing else."""

from __future__ import annotations

from typing import Any

import msgspec
import torch
from torch import Tensor

from hpctrain.errors import Error, nearest


class TableRule(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """How rows change with their gradients.

    A rule is a value that travels to servers; what it keeps of a row lies beside the row.

    Attributes:
        lr: The learning rate; the run's schedule multiplies it.
        clip: Largest 2-norm of a row's gradient, or None.
    """

    lr: float
    clip: float | None = None

    def check(self) -> None:
        """Refuse numbers that make no update.

        Raises:
            Error: Which.
        """
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise Error(
                    f"{type(self).__name__}({name}={value}) is no optimizer of a table.",
                    hint=f"{name} is a number of at least 0.",
                )

    def widths(self, dim: int) -> dict[str, int]:
        """Return what is kept of each row: values by name.

        Args:
            dim: Values of a row.
        """
        return {}

    def starts(self) -> dict[str, float]:
        """Return what a new row's state is filled with, where that is not 0."""
        return {}

    def update(
        self, weights: Tensor, gradient: Tensor, state: dict[str, Tensor], steps: Tensor, lr: float
    ) -> None:
        """Update rows in place.

        Args:
            weights: The rows, ``[n, dim]``.
            gradient: Of each; may be overwritten.
            state: By name, ``[n, width]``.
            steps: How many updates each row has had, this one counted, ``[n]``.
            lr: The learning rate of now.
        """
        if self.clip is not None:
            norms = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
            gradient *= (self.clip / norms).clamp_(max=1.0)
        self._update(weights, gradient, state, steps, lr)

    def _update(
        self, weights: Tensor, gradient: Tensor, state: dict[str, Tensor], steps: Tensor, lr: float
    ) -> None:
        raise NotImplementedError


class Sgd(TableRule, frozen=True, kw_only=True, tag=True):
    """Stochastic gradient descent: ``w -= lr g``.

    Example:
        >>> Sgd(lr=0.1).widths(16)
        {}
    """

    lr: float = 0.01

    def _update(
        self, weights: Tensor, gradient: Tensor, state: dict[str, Tensor], steps: Tensor, lr: float
    ) -> None:
        weights.sub_(gradient, alpha=lr)


class Adagrad(TableRule, frozen=True, kw_only=True, tag=True):
    """Adagrad (Duchi, Hazan and Singer, 2011), with a sum of squares for each value.

    Attributes:
        eps: Added to the root.
        start: What sums of squares begin with.

    Example:
        >>> Adagrad(lr=0.1).widths(16)
        {'sum': 16}
    """

    lr: float = 0.01
    eps: float = 1e-10
    start: float = 0.0

    def widths(self, dim: int) -> dict[str, int]:
        """Return one sum a value."""
        return {"sum": dim}

    def starts(self) -> dict[str, float]:
        """Return where sums begin."""
        return {"sum": self.start}

    def _squares(self, gradient: Tensor) -> Tensor:
        return gradient.square()

    def _update(
        self, weights: Tensor, gradient: Tensor, state: dict[str, Tensor], steps: Tensor, lr: float
    ) -> None:
        state["sum"] += self._squares(gradient)
        weights.addcdiv_(gradient, state["sum"].sqrt().add_(self.eps), value=-lr)


class RowAdagrad(Adagrad, frozen=True, kw_only=True, tag=True):
    """Adagrad with one sum a row, of the mean square of its gradients: a value of state a row.

    Example:
        >>> RowAdagrad(lr=0.1).widths(16)
        {'sum': 1}
    """

    def widths(self, dim: int) -> dict[str, int]:
        """Return one sum a row."""
        return {"sum": 1}

    def _squares(self, gradient: Tensor) -> Tensor:
        return gradient.square().mean(dim=1, keepdim=True)


class Adam(TableRule, frozen=True, kw_only=True, tag=True):
    """Adam (Kingma and Ba, 2015) on rows: bias is corrected by a row's own steps.

    Example:
        >>> Adam(lr=0.001).widths(16)
        {'exp_avg': 16, 'exp_avg_sq': 16}
    """

    lr: float = 0.001
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def widths(self, dim: int) -> dict[str, int]:
        """Return two moments a value."""
        return {"exp_avg": dim, "exp_avg_sq": dim}

    def _update(
        self, weights: Tensor, gradient: Tensor, state: dict[str, Tensor], steps: Tensor, lr: float
    ) -> None:
        first, second = state["exp_avg"], state["exp_avg_sq"]
        first.lerp_(gradient, 1 - self.beta1)
        second.mul_(self.beta2).addcmul_(gradient, gradient, value=1 - self.beta2)
        counts = steps.to(torch.float64).unsqueeze(1)
        mean = first / (1 - self.beta1**counts).to(first.dtype)
        root = (second / (1 - self.beta2**counts).to(first.dtype)).sqrt_()
        weights.addcdiv_(mean, root.add_(self.eps), value=-lr)


class Ftrl(TableRule, frozen=True, kw_only=True, tag=True):
    """FTRL-proximal (McMahan et al., "Ad Click Prediction: a View from the Trenches", KDD 2013).

    Attributes:
        l1: Weights are 0 until their gradients have come to more than this.
        l2: Shrinks weights.
        beta: Added to the root, as in the paper.

    Example:
        >>> Ftrl(lr=0.1, l1=1.0).widths(16)
        {'z': 16, 'n': 16}
    """

    lr: float = 0.1
    l1: float = 0.0
    l2: float = 0.0
    beta: float = 1.0

    def widths(self, dim: int) -> dict[str, int]:
        """Return the paper's z and n a value."""
        return {"z": dim, "n": dim}

    def _update(
        self, weights: Tensor, gradient: Tensor, state: dict[str, Tensor], steps: Tensor, lr: float
    ) -> None:
        z, n = state["z"], state["n"]
        root = n.sqrt()
        n.addcmul_(gradient, gradient)
        z += gradient - (n.sqrt() - root) / lr * weights
        scale = (self.beta + n.sqrt()) / lr + self.l2
        weights.copy_(torch.where(z.abs() <= self.l1, 0.0, -(z - z.sign() * self.l1) / scale))


AnyRule = Sgd | Adagrad | RowAdagrad | Adam | Ftrl
_NAMED: dict[str, Any] = {
    "sgd": Sgd,
    "adagrad": Adagrad,
    "rowwise_adagrad": RowAdagrad,
    "adam": Adam,
    "ftrl": Ftrl,
}


def rule_of(given: str | TableRule) -> AnyRule:
    """Return a rule by its name, with its usual numbers, or the one that is given.

    Raises:
        Error: There is none of that name, or its numbers make no update.

    Example:
        >>> rule_of("adagrad").lr
        0.01
    """
    rule: Any = given
    if isinstance(given, str):
        if given not in _NAMED:
            raise Error(f"there is no optimizer '{given}' of tables.", hint=nearest(given, _NAMED))
        rule = _NAMED[given]()
    if type(rule) not in _NAMED.values():
        raise Error(
            f"a table's optimizer is a {type(rule).__name__}.",
            hint=f"name one of {', '.join(_NAMED)}, or make one, such as "
            "hpctrain.tables.rules.Adagrad(lr=0.1).",
        )
    rule.check()
    found: AnyRule = rule
    return found
