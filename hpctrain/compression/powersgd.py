"""PowerSGD: matrices of low rank in place of gradients (Vogels, Karimireddy and Jaggi, 2019)."""

from __future__ import annotations

import zlib
from typing import Any

import torch

from hpctrain.compression.compressor import (
    Collectives,
    Compressor,
    Exchange,
    Flat,
    Options,
    Piece,
)
from hpctrain.compression.memory import Memory
from hpctrain.errors import Error


class PowerSgd(Compressor):
    """One step of subspace iteration for each matrix.

    Vogels, Karimireddy and Jaggi, "PowerSGD: Practical Low-Rank Gradient Compression for
    Distributed Optimization", NeurIPS 2019. With M_i = gradient + residual of rank i, a x b, and r
    the rank: P = mean of M_i Q; P is made orthonormal; Q_i = M_i^T P; Q = mean of Q_i. The result
    is P Q^T, the new residual M_i - P Q_i^T, and Q is what the next step begins with (warm start).
    A flat takes two all-reduces, of r a and r b values a matrix. Filters are matrices with a row
    for each of their outputs.

    As in that paper's Algorithm 2, a residual is what this rank's own product lacks. (The authors'
    code, and that of torch's hook, subtract the mean product. The mean over ranks is the same, but
    residuals then also add up by how much this rank's gradients differ from the others', without
    bound; and with a rank that is lost goes what cancelled the others'.)

    Vectors, complex gradients, and matrices that would not become ``min_rate`` times as small go as
    they are, in the first of the two all-reduces; so does everything in the first ``warmup_steps``
    steps. All ranks make the same P orthonormal, by Householder reflections, and so have the same
    bits wherever their processors and libraries round alike.

    Args:
        rank: Of the products.
        options: Feedback, warm-up, warm start and the least rate.
    """

    name = "powersgd"
    takes = frozenset({"feedback", "warmup_steps", "warm_start", "min_rate"})

    def __init__(self, rank: int, options: Options) -> None:
        super().__init__()
        self.rank = rank
        self.warmup_steps = options.warmup_steps
        self.warm_start = options.warm_start
        self.min_rate = options.min_rate
        if options.feedback:
            self.memories["residual"] = Memory()
        self._factors: dict[str, torch.Tensor] = {}  # Q^T by parameter, as the last step left it
        self._next: dict[str, torch.Tensor] = {}

    @classmethod
    def make(cls, argument: str, options: Options) -> PowerSgd:
        """Make a compressor of the rank that follows the name.

        Args:
            argument: The rank of the products, from 1.
            options: Error feedback, warm-up, warm start, and the least rate.

        Raises:
            Error: The argument is no rank.
        """
        if not (argument.isascii() and argument.isdecimal() and 0 < int(argument) < 2**16):
            raise Error(
                f"compression 'powersgd:{argument}' does not say which rank products have.",
                hint="powersgd:1 sends least, powersgd:4 is nearer to the gradient.",
            )
        return cls(int(argument), options)

    def commit(self) -> None:
        """Take over residuals and factors of the step, which has ended."""
        super().commit()
        self._factors |= self._next
        self._next = {}

    def rollback(self) -> None:
        """Roll back residuals and factors: the step was given up."""
        super().rollback()
        self._next = {}

    def _average(self, flat: Flat, world: Collectives) -> Exchange:
        wanted = self._wanted(flat)
        matrices = self._matrices(flat, wanted) if self.steps >= self.warmup_steps else []
        if not matrices:
            yield self._all_reduce(flat.values.copy_(wanted), flat.name, world)
            self._sent_all(flat, 0, flat.values.numel())
            return
        vectors = _between(matrices, flat.values.numel())
        factors = [self._factor(piece, m, world.size) for piece, m in matrices]
        first = [wanted[start:stop] for start, stop in vectors]
        first += [(m @ q.T).view(-1) for (_, m), q in zip(matrices, factors, strict=True)]
        sent = torch.cat(first)
        yield self._all_reduce(sent, f"{flat.name}.first", world)
        finite = bool(torch.isfinite(sent).all())
        parts = sent.split([part.numel() for part in first])
        for (start, stop), part in zip(vectors, parts, strict=False):
            flat.values[start:stop] = part
            self._sent_all(flat, start, stop)
        sizes = [m.shape[0] for _, m in matrices]
        products = zip(parts[len(vectors) :], sizes, strict=True)
        bases = [_orthonormal(p.view(a, -1)) if finite else p.view(a, -1) for p, a in products]
        yield from self._second(flat, world, matrices, bases, finite=finite)

    def _second(
        self,
        flat: Flat,
        world: Collectives,
        matrices: list[tuple[Piece, torch.Tensor]],
        bases: list[torch.Tensor],
        *,
        finite: bool,
    ) -> Exchange:
        """Exchange the second factors, keep the residuals, and multiply."""
        if not finite:  # of some rank, which all see alike: nothing is kept, and all see the result
            self._give_up(flat)
            return
        own = [p.T @ m for (_, m), p in zip(matrices, bases, strict=True)]
        sent = torch.cat([q.view(-1) for q in own])
        handle = self._all_reduce(sent, f"{flat.name}.second", world)
        if "residual" in self.memories:  # while that is on its way
            for (_, m), p, q in zip(matrices, bases, own, strict=True):
                m.addmm_(p, q, alpha=-1)
        yield handle
        parts = sent.split([q.numel() for q in own])
        for (piece, m), p, part in zip(matrices, bases, parts, strict=True):
            q = part.view(-1, m.shape[1])
            out = flat.values[piece.start : piece.stop].view(m.shape)
            torch.mm(p, q, out=out)
            if self.warm_start:
                self._next[piece.name] = q.clone()
        if not bool(torch.isfinite(sent).all()):
            self._give_up(flat)

    def _give_up(self, flat: Flat) -> None:
        flat.values.fill_(torch.nan)
        for memory in self.memories.values():
            memory.restore(flat.name, 0, flat.values.numel())
        for piece in flat.pieces:
            self._next.pop(piece.name, None)

    def _wanted(self, flat: Flat) -> torch.Tensor:
        """What is to be sent: gradient and residual, where the next residual will be."""
        residual = self.memories.get("residual")
        if residual is None:
            return flat.values.clone()
        before = residual.now(flat.name, flat.values, flat.pieces)
        return torch.add(before, flat.values, out=residual.next(flat.name))

    def _sent_all(self, flat: Flat, start: int, stop: int) -> None:
        """Some elements have gone as they are: nothing is left of them, if they were numbers."""
        residual = self.memories.get("residual")
        if residual is None:
            return
        residual.next(flat.name)[start:stop] = 0
        if not bool(torch.isfinite(flat.values[start:stop]).all()):
            residual.restore(flat.name, start, stop)

    def _matrices(self, flat: Flat, wanted: torch.Tensor) -> list[tuple[Piece, torch.Tensor]]:
        found = []
        for piece in flat.pieces:
            rows, size = piece.rows, piece.stop - piece.start
            columns = size // rows if rows else 0
            rank = min(self.rank, rows, columns)
            if rows > 1 and self.min_rate * rank * (rows + columns) <= size:
                found.append((piece, wanted[piece.start : piece.stop].view(rows, columns)))
        return found

    def _factor(self, piece: Piece, matrix: torch.Tensor, size: int) -> torch.Tensor:
        """Q^T to begin with, of shape (rank, columns); the same on all ranks."""
        rank = min(self.rank, *matrix.shape)
        factor = self._next.get(piece.name, self._factors.get(piece.name))
        if factor is not None and factor.shape == (rank, matrix.shape[1]):
            return factor.to(matrix)
        seed = zlib.crc32(f"{piece.name} {0 if self.warm_start else self.steps}".encode())
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(rank, matrix.shape[1], generator=generator).to(matrix)

    def _shared(self) -> dict[str, torch.Tensor]:
        return {name: factor.clone() for name, factor in self._factors.items()}

    def _load_shared(self, tensors: dict[str, Any]) -> None:
        self._factors = dict(tensors)

    def _forget_shared(self) -> None:
        self._factors = {}


def _orthonormal(matrix: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns that span at least those of a tall matrix."""
    basis: torch.Tensor = torch.linalg.qr(matrix)[0]
    return basis.contiguous()


def _between(matrices: list[tuple[Piece, torch.Tensor]], size: int) -> list[tuple[int, int]]:
    """What of a flat lies before, between and behind the matrices."""
    starts = [0, *(piece.stop for piece, _ in matrices)]
    stops = [*(piece.start for piece, _ in matrices), size]
    return [(a, b) for a, b in zip(starts, stops, strict=True) if a < b]
