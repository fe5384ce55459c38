"""What a rank keeps of gradients from one step to the next: residuals, momentum."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch

from hpctrain.errors import Error


class _Piece(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def start(self) -> int: ...

    @property
    def stop(self) -> int: ...


class Memory:
    """One tensor for each flat, of its shape; what a step makes of it counts when that has ended.

    The tensor that was and the one that is to be change places with each step, so nothing is
    copied. By parameter, tensors are of one dimension, in the order of the gradient's memory.
    """

    def __init__(self) -> None:
        self._kept: dict[str, torch.Tensor] = {}
        self._next: dict[str, torch.Tensor] = {}
        self._spare: dict[str, torch.Tensor] = {}
        self._pieces: dict[str, list[_Piece]] = {}
        self._loaded: dict[str, torch.Tensor] = {}  # of parameters in no flat yet

    def now(self, name: str, like: torch.Tensor, pieces: Iterable[_Piece]) -> torch.Tensor:
        """Return what is remembered: as the step's exchanges have left it so far.

        Args:
            name: Of the flat.
            like: A tensor of the flat's shape and type.
            pieces: What lies in the flat.
        """
        if name not in self._kept:
            kept = self._kept[name] = torch.zeros_like(like)
            self._pieces[name] = list(pieces)
            for piece in self._pieces[name]:
                self._take(kept[piece.start : piece.stop], piece.name)
        return self._next.get(name, self._kept[name])

    def _take(self, target: torch.Tensor, name: str) -> None:
        loaded = self._loaded.pop(name, None)
        if loaded is None:
            return
        if loaded.numel() != target.numel():
            raise Error(
                f"the residual of '{name}' has {loaded.numel():,} values, its gradient "
                f"{target.numel():,}.",
                hint="resume with the task and options the run was started with.",
            )
        target.copy_(loaded)

    def next(self, name: str) -> torch.Tensor:
        """Return where to put what is to be remembered; maybe the same tensor as :meth:`now`."""
        if name not in self._next:
            spare = self._spare.pop(name, None)
            self._next[name] = torch.empty_like(self._kept[name]) if spare is None else spare
        return self._next[name]

    def began(self, name: str) -> bool:
        """Whether the step has made something of a flat's."""
        return name in self._next

    def restore(self, name: str, start: int, stop: int) -> None:
        """Undo what the step has made of some elements of a flat.

        Args:
            name: Of the flat.
            start: The first element.
            stop: The element after the last.
        """
        if name in self._next:
            self._next[name][start:stop] = self._kept[name][start:stop]

    def commit(self) -> None:
        """Take over what the step has made of each tensor: the step has ended."""
        for name, tensor in self._next.items():
            self._spare[name], self._kept[name] = self._kept[name], tensor
        self._next = {}

    def rollback(self) -> None:
        """Roll back to what was remembered before the step, which was given up."""
        self._spare |= self._next
        self._next = {}

    def clear(self) -> None:
        """Forget everything: all tensors are zero again."""
        self.rollback()
        self._loaded = {}
        for tensor in self._kept.values():
            tensor.zero_()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return copies, by parameter, of what is remembered of the steps that have ended."""
        state = {name: tensor.clone() for name, tensor in self._loaded.items()}
        for name, tensor in self._kept.items():
            for piece in self._pieces[name]:
                state[piece.name] = tensor[piece.start : piece.stop].clone()
        return state

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Load what is to be remembered, and forget everything else.

        Args:
            state: By parameter; those that are in no flat are kept until they are.

        Raises:
            Error: One has another size than its gradient.
        """
        self.clear()
        self._loaded = dict(state)
        for name, tensor in self._kept.items():
            for piece in self._pieces[name]:
                self._take(tensor[piece.start : piece.stop], piece.name)
