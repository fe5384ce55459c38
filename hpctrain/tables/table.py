"""An embedding table as a module of a model: its rows are elsewhere, and come batch by batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpctrain.errors import Error
from hpctrain.tables.row_store import RowStore
from hpctrain.tables.rules import TableRule, rule_of
from hpctrain.tables.spec import DTYPES, Start, TableSpec

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LARGEST_NAME = 64


class Touched(NamedTuple):
    """What a step has to say of a table's rows.

    Attributes:
        ids: Of the rows, all distinct, ``[n]``.
        gradient: Summed over the step's samples, ``[n, dim]``.
        sights: How often its samples have each, ``[n]``.
    """

    ids: Tensor
    gradient: Tensor
    sights: Tensor


class Pull(Protocol):
    """Brings rows from where they are."""

    def __call__(self, ids: Tensor) -> Tensor:
        """Return rows, ``[n, dim]``.

        Args:
            ids: All distinct, ``[n]``.
        """


class Table(nn.Module):
    """An embedding table whose rows live on the servers of ``--strategy ps``, and nowhere else.

    It is used like ``nn.EmbeddingBag``, or with ``mode=None`` like ``nn.Embedding``. A worker
    brings the rows that a batch has, each once, and pushes their summed gradients; servers update
    them by the table's own optimizer. In one process (``--strategy single``, or no strategy) rows
    are made here as they are first updated; a loop without a strategy calls :meth:`step` beside
    ``optimizer.step()``.

    A table has no parameters: the model's optimizer does not know of it, nor does
    ``state_dict()``. Checkpoints of a run hold its rows in files of their own.

    Args:
        name: Its name, one of the model's tables.
        dim: Values of a row.
        rows: How many rows there are: ids are 0 to ``rows - 1``.
        hashed: Ids are any 64-bit integers, and there is no end of rows.
        optimizer: ``sgd``, ``adagrad``, ``rowwise_adagrad``, ``adam`` or ``ftrl``, or one of
            :mod:`hpctrain.tables.rules` with numbers of its own.
        init: What rows begin with: ``zeros``, ``uniform:SCALE`` or ``normal:DEVIATION``, a pure
            function of (seed, name, id).
        mode: How the rows of a bag become one: ``sum`` or ``mean``; None: each id has its row.
        admit_after: An id has a row only when it was seen so often; before, gradients of it are
            dropped, and it reads as what it begins with.
        evict_after: A row that no sample had for so many steps is forgotten; None: never.
        evict_below: Only rows that were seen less often than this are forgotten; None: all.
        seed: Of what rows begin with; None: torch's (``torch.manual_seed``).
        dtype: float32 or float64.

    Attributes:
        spec: What it is, as a plain value.
        store: The rows, where they are in this process; None: servers have them.

    Raises:
        Error: The arguments do not go together.

    Example:
        >>> table = Table("words", 4, hashed=True, optimizer="adagrad", mode="mean")
        >>> table(torch.tensor([[7, 9], [7, 7]])).shape
        torch.Size([2, 4])
    """

    def __init__(
        self,
        name: str,
        dim: int,
        *,
        rows: int | None = None,
        hashed: bool = False,
        optimizer: str | TableRule = "rowwise_adagrad",
        init: str = "uniform:0.05",
        mode: str | None = "sum",
        admit_after: int = 1,
        evict_after: int | None = None,
        evict_below: int | None = None,
        seed: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        _check(name, dim, rows, hashed, mode, dtype)
        if admit_after < 1 or (evict_after is not None and evict_after < 1):
            raise Error(
                f"table '{name}' has admit_after={admit_after} and evict_after={evict_after}.",
                hint="they are 1 or more.",
            )
        if evict_below is not None and evict_after is None:
            raise Error(
                f"table '{name}': evict_below without evict_after forgets nothing.",
                hint="say after how many steps: evict_after=1000.",
            )
        self.mode = mode
        self.spec = TableSpec(
            name, dim, rows, _NAMES[dtype], rule_of(optimizer), Start.of(init),
            torch.initial_seed() % 2**63 if seed is None else seed,
            admit_after, evict_after, evict_below,
        )  # fmt: skip
        self._device = torch.device("cpu")
        self._pull: Pull | None = None
        self._touched: list[tuple[Tensor, Tensor, Tensor]] = []
        self.store: RowStore | None = RowStore(self.spec)

    def extra_repr(self) -> str:
        """Return what ``print`` shows."""
        rows = "hashed" if self.spec.rows is None else f"rows={self.spec.rows}"
        return f"'{self.spec.name}', {self.spec.dim}, {rows}, mode={self.mode!r}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Table:
        """Follow the model to its device and type; rows are in host memory."""
        probe = fn(torch.empty(0, dtype=self.spec.torch_dtype))
        if probe.dtype in _NAMES and probe.dtype != self.spec.torch_dtype:
            if self.store is None or self.store.version:
                raise Error(
                    f"table '{self.spec.name}' has rows already: its type stays.",
                    hint="change the model's type before it is trained.",
                )
            values = {name: getattr(self.spec, name) for name in self.spec.__struct_fields__}
            self.spec = TableSpec(**{**values, "dtype": _NAMES[probe.dtype]})
            self.store = RowStore(self.spec)
        self._device = probe.device
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def forward(
        self,
        ids: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        """Return the embeddings of ids, or of bags of ids.

        Args:
            ids: Integers: ``[batch, bag]``, or ``[n]`` with ``offsets``; with ``mode=None`` of any
                shape.
            offsets: Where each bag begins in ``ids``, ``[batch]``.
            per_sample_weights: Of each id, with ``mode="sum"``.

        Returns:
            ``[batch, dim]``; with ``mode=None`` the shape of ``ids`` and ``dim``.

        Raises:
            Error: An id is none of the table's.
        """
        distinct, inverse, counts = torch.unique(
            ids.detach().cpu().long(), return_inverse=True, return_counts=True
        )
        self._check_ids(distinct)
        rows = self._rows(distinct).to(self._device)
        if torch.is_grad_enabled():
            rows.requires_grad_()
            self._touched.append((distinct, rows, counts))
        inverse = inverse.to(self._device)
        if self.mode is None:
            return F.embedding(inverse, rows)
        if not len(distinct):
            bags = len(ids) if offsets is None else len(offsets)
            return rows.new_zeros(bags, self.spec.dim)
        return F.embedding_bag(
            inverse, rows, offsets, mode=self.mode, per_sample_weights=per_sample_weights
        )

    def _rows(self, ids: Tensor) -> Tensor:
        if self.store is not None:
            return self.store.read(ids)
        assert self._pull is not None
        return self._pull(ids)

    def _check_ids(self, distinct: Tensor) -> None:
        rows = self.spec.rows
        if rows is not None and len(distinct) and not 0 <= distinct[0] <= distinct[-1] < rows:
            wrong = distinct[0] if distinct[0] < 0 else distinct[-1]
            raise Error(
                f"table '{self.spec.name}' of {rows} rows has no row {int(wrong)}.",
                hint="give it more rows, or hashed=True.",
            )

    def attach(self, pull: Pull) -> None:
        """Have the rows elsewhere from now on.

        Args:
            pull: Brings them.
        """
        self._pull, self.store = pull, None

    def take(self) -> Touched:
        """Return what this step's passes have to say of the rows, and forget it."""
        touched, self._touched = self._touched, []
        parts = [(ids, rows.grad, sights) for ids, rows, sights in touched if rows.grad is not None]
        if not parts:
            nothing = torch.empty(0, dtype=torch.int64)
            return Touched(
                nothing, torch.empty(0, self.spec.dim).to(self.spec.torch_dtype), nothing
            )
        return summed([Touched(ids, grad.cpu(), sights) for ids, grad, sights in parts])

    def forget(self) -> None:
        """Forget the gradients of this step's passes."""
        self._touched = []

    def step(self, lr_factor: float = 1.0) -> None:
        """Update the rows that are here, by the gradients of the passes since the last step.

        Args:
            lr_factor: On the learning rate of the table's optimizer.

        Raises:
            Error: Servers have them.
        """
        if self.store is None:
            raise Error(
                f"table '{self.spec.name}' is on servers, which update it.",
                hint="call step() of the wrapped optimizer alone.",
            )
        self.store.update(*self.take(), lr_factor)

    def statistics(self) -> dict[str, int]:
        """Return what the rows here are; nothing where servers have them."""
        return {} if self.store is None else self.store.statistics()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is of a step; a table of servers is not to be copied by accident."""
        if self.store is None:
            raise Error(
                f"table '{self.spec.name}' is on servers: it cannot be copied.",
                hint="copy the model before it is wrapped, or `hpctrain.load` a run.",
            )
        return {**self.__dict__, "_touched": []}


def _check(
    name: str, dim: int, rows: int | None, hashed: bool, mode: str | None, dtype: torch.dtype
) -> None:
    if not (name.isidentifier() and len(name) <= _LARGEST_NAME):
        raise Error(
            f"a table's name is '{name[:80]}'.", hint="use letters, digits and _: `user_id`."
        )
    if dim < 1:
        raise Error(f"table '{name}': rows of {dim} values.", hint="dim is 1 or more.")
    if hashed == (rows is not None) or (rows is not None and rows < 1):
        raise Error(f"table '{name}' has rows={rows} and hashed={hashed}.", hint="say one of them.")
    if mode not in ("sum", "mean", None):
        raise Error(f"table '{name}' has no mode '{mode}'.", hint="say sum, mean or None.")
    if dtype not in _NAMES:
        raise Error(f"table '{name}' cannot be {dtype}.", hint=f"say {', '.join(_NAMES.values())}.")


def summed(parts: list[Touched]) -> Touched:
    """Return the sum of what several passes or workers have to say, added up in their order.

    Args:
        parts: At least one.
    """
    if len(parts) == 1:
        return parts[0]
    ids, where = torch.unique(torch.cat([part.ids for part in parts]), return_inverse=True)
    gradient = torch.cat([part.gradient for part in parts])
    sights = torch.cat([part.sights for part in parts])
    return Touched(
        ids,
        gradient.new_zeros(len(ids), gradient.shape[1]).index_add_(0, where, gradient),
        sights.new_zeros(len(ids)).index_add_(0, where, sights),
    )


def tables_of(model: nn.Module) -> list[Table]:
    """Return a model's tables, in its order.

    Raises:
        Error: Two have one name.
    """
    found = [module for module in model.modules() if isinstance(module, Table)]
    names = [table.spec.name for table in found]
    for name in names:
        if names.count(name) > 1:
            raise Error(f"two tables are called '{name}'.", hint="share one, or name them apart.")
    return found
