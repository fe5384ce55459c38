"""How parameters become slices: the same cuts on every rank, whatever the number of servers."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec
import torch

from hpctrain.errors import Error
from hpctrain.ps.update_rules import GRAIN

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}


LARGEST_SLICE, SMALLEST_SLICE = 2**21, 2**16  # the largest is what TCP sends at once
SLICES_PER_SERVER = 32
"""With 12, bounded loads put no more than 10 % above the mean on any server. With more, less time
goes by until the first is answered, and after the last is pushed."""


def slice_bytes_for(total_bytes: int, servers: int) -> int:
    """Return the size of slices that leaves every server enough of them.

    Args:
        total_bytes: Of all parameters.
        servers: How many servers there are.
    """
    size = LARGEST_SLICE
    while size > SMALLEST_SLICE and total_bytes < size * SLICES_PER_SERVER * servers:
        size //= 2
    return size


class Flat(msgspec.Struct, frozen=True):
    """Parameters of one type and one parameter group, laid end to end.

    Attributes:
        dtype: Their type, by name.
        group: Number of the optimizer's parameter group.
        ends: Where each parameter ends, in elements; it begins where the one before it ends.
        width: Of a row, where gradients come as rows of an embedding; else 0.
    """

    dtype: str
    group: int
    ends: tuple[int, ...]
    width: int = 0

    @property
    def elements(self) -> int:
        """The elements of all parameters together."""
        return self.ends[-1]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type of the elements."""
        return DTYPES[self.dtype]


class Slice(NamedTuple):
    """A contiguous run of a flat: what a server holds and updates as one.

    Attributes:
        number: Its place among all slices; the lower, the sooner a forward pass needs it.
        flat: Number of the flat.
        start: First element.
        stop: Element after the last.
        bounds: Where in it each parameter begins, and the last ends.
    """

    number: int
    flat: int
    start: int
    stop: int
    bounds: tuple[int, ...]

    @property
    def elements(self) -> int:
        """How many elements the slice has."""
        return self.stop - self.start


class Parameter(NamedTuple):
    """What the layout needs to know of a parameter.

    Attributes:
        dtype: Its type.
        group: Its parameter group.
        elements: How many.
        width: Of a row where its gradient is sparse, else 0.
    """

    dtype: torch.dtype
    group: int
    elements: int
    width: int = 0


class Layout:
    """Flats, and the slices they are cut into.

    Args:
        flats: Of the parameters.
        slice_bytes: A slice is no larger, unless a parameter must stay whole.
        whole: Never cut a parameter (LAMB needs its norm in one place).
    """

    def __init__(self, flats: Sequence[Flat], slice_bytes: int, *, whole: bool = False) -> None:
        self.flats = tuple(flats)
        self.slice_bytes = slice_bytes
        self.whole = whole
        self.slices: tuple[Slice, ...] = tuple(self._cut())

    @classmethod
    def of(
        cls, parameters: Sequence[Parameter], slice_bytes: int, *, whole: bool = False
    ) -> tuple[Layout, list[tuple[int, int]]]:
        """The layout of parameters, in the order in which a forward pass needs them.

        Returns:
            The layout, and for each parameter its flat and its first element there.

        Raises:
            Error: A parameter's type cannot be served.
        """
        names = {dtype: name for name, dtype in DTYPES.items()}
        ends: dict[tuple[str, int, int], list[int]] = {}
        places: list[tuple[tuple[str, int, int], int]] = []
        for parameter in parameters:
            if parameter.dtype not in names:
                raise Error(
                    f"a parameter of type {parameter.dtype} cannot be served.",
                    hint=f"the types are {', '.join(DTYPES)}.",
                )
            kind = (names[parameter.dtype], parameter.group, parameter.width)
            flat = ends.setdefault(kind, [])
            places.append((kind, flat[-1] if flat else 0))
            flat.append(places[-1][1] + parameter.elements)
        numbers = {kind: number for number, kind in enumerate(ends)}
        flats = [Flat(kind[0], kind[1], tuple(flat), kind[2]) for kind, flat in ends.items()]
        return (
            cls(flats, slice_bytes, whole=whole),
            [(numbers[kind], start) for kind, start in places],
        )

    def sizes(self) -> list[int]:
        """Return the bytes of each slice."""
        return [
            piece.elements * self.flats[piece.flat].torch_dtype.itemsize for piece in self.slices
        ]

    @property
    def digest(self) -> str:
        """A digest that is the same where layouts are."""
        text = repr((self.flats, self.slice_bytes, self.whole))
        return hashlib.sha256(text.encode()).hexdigest()

    def _cut(self) -> Iterable[Slice]:
        runs = []
        for place, flat in enumerate(self.flats):
            size = max(1, self.slice_bytes // flat.torch_dtype.itemsize)
            if size > GRAIN:
                size = size // GRAIN * GRAIN
            if flat.width:
                size = max(flat.width, size // flat.width * flat.width)
            edges = _whole_edges(flat.ends, size) if self.whole else range(0, flat.elements, size)
            for start, stop in itertools.pairwise([*edges, flat.elements]):
                runs.append((start / flat.elements, place, start, stop))
        # Flats side by side: what a forward pass needs first is early in each of them.
        for number, (_, place, start, stop) in enumerate(sorted(runs)):
            inner = [end - start for end in self.flats[place].ends if start < end < stop]
            yield Slice(number, place, start, stop, (0, *inner, stop - start))


def _whole_edges(ends: Sequence[int], size: int) -> list[int]:
    edges = [0]
    for begin, end in itertools.pairwise((0, *ends)):
        if end - edges[-1] > size and begin > edges[-1]:
            edges.append(begin)
    return edges
