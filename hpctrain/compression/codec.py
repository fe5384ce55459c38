"""Codecs: what may travel instead of a dense gradient: fewer bits, fewer values, or a few rows.

Encoded bytes are in the order of the machine's own words, little-endian wherever torch runs. A byte
tensor given to anything here starts at a multiple of 8 in its storage, and so do the parts inside.
All work is done in host memory.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from decimal import Decimal, InvalidOperation

import numpy as np
import torch
from torch import Tensor

from hpctrain.errors import Error, nearest

_BLOCK = 256
_INDEX_BYTES = 4  # int32
_ROW_BYTES = 8  # int64
_CORRUPT = "it was changed on the way, or its sender has other settings."


class Codec(ABC):
    """A way to encode slices of gradients. It holds no state, so threads may share it.

    Attributes:
        name: As :func:`make_codec` takes it.
        feedback: Whether what an encoding leaves out should be sent the next time, by
            :class:`ErrorFeedback`.
    """

    name: str
    feedback: bool

    @abstractmethod
    def capacity(self, elements: int, itemsize: int) -> int:
        """Return the most bytes that an encoded slice takes.

        Args:
            elements: How many the slice has.
            itemsize: Bytes of each before it is encoded.
        """

    def encode(self, gradient: Tensor, out: Tensor) -> int:
        """Encode a gradient, and return how many bytes it takes.

        Args:
            gradient: Shape (n,), float32 or float64, contiguous.
            out: Bytes, at least as many as ``capacity`` says.

        Returns:
            How many of them hold the encoded gradient.
        """
        size = self.capacity(gradient.numel(), gradient.element_size())
        self._encode(gradient, out[:size])
        return size

    def decode(self, data: Tensor, out: Tensor) -> None:
        """Decode a gradient over whatever was in ``out``.

        Args:
            data: The bytes of an encoded gradient, and no more.
            out: Of the gradient's shape and type.

        Raises:
            Error: These bytes are no encoded gradient of that shape and type.
        """
        self._check_size(data, out)
        self._decode(data, out)

    def _check_size(self, data: Tensor, dense: Tensor) -> None:
        size = self.capacity(dense.numel(), dense.element_size())
        if data.numel() != size:
            raise Error(
                f"{data.numel():,} bytes are no gradient of {dense.numel():,} values by codec "
                f"'{self.name}', which takes {size:,}.",
                hint=_CORRUPT,
            )

    def add(self, data: Tensor, total: Tensor) -> None:
        """Add a gradient to ``total``.

        Args:
            data: The bytes of an encoded gradient, and no more.
            total: Of the gradient's shape and type.

        Raises:
            Error: These bytes are no encoded gradient of that shape and type.
        """
        decoded = torch.empty_like(total)
        self.decode(data, decoded)
        total.add_(decoded)

    @abstractmethod
    def _encode(self, gradient: Tensor, out: Tensor) -> None:
        """Fill all of ``out``."""

    @abstractmethod
    def _decode(self, data: Tensor, out: Tensor) -> None:
        """Decode bytes that are as many as they should be."""


class _Cast(Codec):
    """Numbers of 16 bits. What float16 cannot hold, above 65504, becomes infinite and is seen."""

    feedback = False

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name = name
        self.dtype = dtype

    def capacity(self, elements: int, itemsize: int) -> int:
        return elements * self.dtype.itemsize

    def _encode(self, gradient: Tensor, out: Tensor) -> None:
        out.view(self.dtype).copy_(gradient)

    def _decode(self, data: Tensor, out: Tensor) -> None:
        out.copy_(data.view(self.dtype))


class _Int8(Codec):
    """Blocks of 256 values in 8 bits each, by a float32 scale: a block's largest value is 127.

    Dettmers, "8-Bit Approximations for Parallelism in Deep Learning", ICLR 2016, and others; here
    evenly spaced, and rounded to the nearest. First come the scales, then the values.
    """

    name = "int8"
    feedback = True

    def capacity(self, elements: int, itemsize: int) -> int:
        return 4 * -(-elements // _BLOCK) + elements

    def _encode(self, gradient: Tensor, out: Tensor) -> None:
        for values, scales, codes in _blocks(gradient, out):
            torch.div(values.abs().amax(1), 127, out=scales)
            # Next to the smallest of all numbers, scales are too coarse, hence the clamp. Where a
            # scale is zero or not a number, it says what is decoded, whatever the codes are.
            codes.copy_((values / scales[:, None]).round_().clamp_(-127, 127))

    def _decode(self, data: Tensor, out: Tensor) -> None:
        for values, scales, codes in _blocks(out, data):
            torch.mul(codes, scales[:, None], out=values)


def _blocks(dense: Tensor, encoded: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield the whole blocks, then the one that is not: values, scales and codes, by rows."""
    elements = dense.numel()
    blocks = -(-elements // _BLOCK)
    scales = encoded[: 4 * blocks].view(torch.float32)
    codes = encoded[4 * blocks :].view(torch.int8)
    whole, rest = divmod(elements, _BLOCK)
    cut = elements - rest
    if whole:
        yield dense[:cut].view(-1, _BLOCK), scales[:whole], codes[:cut].view(-1, _BLOCK)
    if rest:
        yield dense[cut:].view(1, rest), scales[whole:], codes[cut:].view(1, rest)


class _TopK(Codec):
    """The values that are largest without their sign, and where they are.

    Aji and Heafield, "Sparse Communication for Distributed Gradient Descent", EMNLP 2017. First
    come the values, then their indices as int32, ascending.
    """

    feedback = True

    def __init__(self, name: str, fraction: Decimal) -> None:
        self.name = name
        self.fraction = fraction

    def capacity(self, elements: int, itemsize: int) -> int:
        return self._count(elements) * (itemsize + _INDEX_BYTES)

    def _count(self, elements: int) -> int:
        return min(elements, max(1, math.ceil(self.fraction * elements)))

    def _encode(self, gradient: Tensor, out: Tensor) -> None:
        count = self._count(gradient.numel())
        chosen = _largest(gradient.abs(), count)
        values = count * gradient.element_size()
        torch.index_select(gradient, 0, chosen, out=out[:values].view(gradient.dtype))
        out[values:].view(torch.int32).copy_(chosen)

    def _decode(self, data: Tensor, out: Tensor) -> None:
        indices, values = self._parts(data, out)
        out.zero_()
        out[indices] = values

    def add(self, data: Tensor, total: Tensor) -> None:
        """Add a gradient to ``total``: to the values that it has."""
        self._check_size(data, total)
        indices, values = self._parts(data, total)
        total[indices] += values  # each index is there once

    def _parts(self, data: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
        """Return indices and values, once it is sure that they fit a gradient like ``dense``."""
        split = self._count(dense.numel()) * dense.element_size()
        indices = data[split:].view(torch.int32).long()
        if indices.numel() and (
            indices[0] < 0 or indices[-1] >= dense.numel() or (indices.diff() <= 0).any()
        ):
            raise Error(
                f"a gradient of {dense.numel():,} values by codec '{self.name}' has indices that "
                "are not ascending, or are beyond its end.",
                hint=_CORRUPT,
            )
        return indices, data[:split].view(dense.dtype)


def _largest(magnitude: Tensor, count: int) -> Tensor:
    """Return the ascending indices of the ``count`` largest; NaN is larger than any number.

    Selecting among everything is slow. So a sample says which values can be left out (Lin et al.,
    "Deep Gradient Compression", ICLR 2018), with a margin of four standard deviations. Where that
    leaves too few, none are left out: the result is exact, whatever the sample.
    """
    values = magnitude.numpy()  # which compares, and lists what is set, several times as fast
    candidates = np.arange(len(values))
    sample = magnitude[::61]  # a prime, not to be in step with the rows of a matrix
    expected = count / 61
    rank = math.ceil(expected + 4 * math.sqrt(expected) + 4)
    if rank < len(sample):
        threshold = sample.topk(rank, sorted=False).values.min().item()
        above = np.flatnonzero(~(values < threshold))  # NaN is not >= anything
        if len(above) >= count:
            candidates = above
    best = torch.from_numpy(values[candidates]).topk(count, sorted=False).indices
    chosen = np.zeros(len(candidates), dtype=bool)
    chosen[best.numpy()] = True
    return torch.from_numpy(candidates[chosen])


class ErrorFeedback:
    """Error feedback: sends with a slice's gradient what the encodings of earlier ones left out.

    Seide et al., "1-Bit Stochastic Gradient Descent", Interspeech 2014; that it converges like
    plain SGD was shown by Karimireddy et al., "Error Feedback Fixes SignSGD and other Gradient
    Compression Schemes", ICML 2019.

    Args:
        codec: How to encode.
        elements: Of the slice.
        dtype: Of its gradients.

    Attributes:
        residual: What is still to be sent, of shape (elements,).
    """

    def __init__(self, codec: Codec, elements: int, dtype: torch.dtype) -> None:
        self.codec = codec
        self.residual = torch.zeros(elements, dtype=dtype)

    def encode(self, gradient: Tensor, out: Tensor) -> int:
        """Encode a gradient and the residual, as :meth:`Codec.encode` does; keep the new residual.

        A gradient that is not finite is sent, so that it is seen, and not kept.

        Args:
            gradient: Shape (n,), of the residual's type.
            out: Bytes, at least as many as the codec's ``capacity`` says.

        Returns:
            How many of them hold the encoded gradient.
        """
        size = self.codec.encode(self.residual.add_(gradient), out)
        sent = torch.empty_like(self.residual)
        self.codec.decode(out[:size], sent)
        self.residual.sub_(sent).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        return size


def make_codec(spec: str) -> Codec | None:
    """Return the codec of that name, or None for ``none``.

    Args:
        spec: ``none``, ``fp16``, ``bf16``, ``int8``, or ``topk:`` and the fraction of the values
            that is sent.

    Raises:
        Error: There is none of that name.

    Example:
        >>> codec = make_codec("topk:0.25")
        >>> data = torch.empty(codec.capacity(4, 4), dtype=torch.uint8)
        >>> size = codec.encode(torch.tensor([0.1, -4.0, 0.2, 0.3]), data)
        >>> out = torch.empty(4)
        >>> codec.decode(data[:size], out)
        >>> size, out
        (8, tensor([ 0., -4.,  0.,  0.]))
    """
    name, _, text = spec.partition(":")
    if name == "topk":
        try:
            fraction = Decimal(text)
        except InvalidOperation:
            fraction = Decimal("NaN")
        if not (fraction.is_finite() and 0 < fraction <= 1):
            raise Error(
                f"codec '{spec}' does not say which fraction of the values to send.",
                hint="topk:0.01 sends one of a hundred; at most, topk:1 sends all.",
            )
        return _TopK(spec, fraction)
    codecs: dict[str, Codec | None] = {
        "none": None,
        "fp16": _Cast("fp16", torch.float16),
        "bf16": _Cast("bf16", torch.bfloat16),
        "int8": _Int8(),
    }
    if spec not in codecs:
        raise Error(f"there is no codec '{spec}'.", hint=nearest(spec, [*codecs, "topk:0.01"]))
    return codecs[spec]


def rows_capacity(count: int, width: int, itemsize: int) -> int:
    """Return how many bytes rows of a matrix take.

    Args:
        count: How many rows.
        width: Values of a row.
        itemsize: Bytes of a value.
    """
    return count * (_ROW_BYTES + width * itemsize)


def encode_rows(rows: Tensor, values: Tensor, out: Tensor) -> int:
    """Encode some rows of a matrix, as of an embedding's gradient.

    Args:
        rows: Which, int64 of shape (k,).
        values: What is in them, of shape (k, width).
        out: Bytes, at least as many as :func:`rows_capacity` says.

    Returns:
        How many of them hold the rows.
    """
    count, width = values.shape
    split, size = count * _ROW_BYTES, rows_capacity(count, width, values.element_size())
    out[:split].view(torch.int64).copy_(rows)
    out[split:size].view(values.dtype).copy_(values.flatten())
    return size


def sum_rows(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Sum matrices that are given by some of their rows; values are added in this order.

    Args:
        parts: Of each matrix its rows, each once, and what is in them.

    Returns:
        The rows that any of them has, ascending, and the sums.

    Example:
        >>> one, ten = torch.tensor([[1.0], [1.0]]), torch.tensor([[10.0]])
        >>> sum_rows([(torch.tensor([0, 2]), one), (torch.tensor([2]), ten)])
        (tensor([0, 2]), tensor([[ 1.],
                [11.]]))
    """
    rows, places = torch.cat([rows for rows, _ in parts]).unique(return_inverse=True)
    total = parts[0][1].new_zeros(len(rows), parts[0][1].shape[1])
    for (_, values), mine in zip(parts, places.split([len(r) for r, _ in parts]), strict=True):
        total[mine] += values  # a row is once in mine, else some of it would be missed
    return rows, total


def decode_rows(
    data: Tensor, width: int, dtype: torch.dtype, *, height: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return the rows and the values that :func:`encode_rows` was given, as views of its bytes.

    Args:
        data: The bytes of encoded rows, and no more.
        width: Of a row.
        dtype: Of the values.
        height: Rows of the matrix, where known: a row beyond is refused.

    Raises:
        Error: These bytes are no rows of such a matrix.
    """
    each = rows_capacity(1, width, dtype.itemsize)
    count, rest = divmod(data.numel(), each)
    if rest:
        raise Error(
            f"{data.numel():,} bytes are no whole number of rows of {width:,} values, which take "
            f"{each:,} each.",
            hint=_CORRUPT,
        )
    rows = data[: count * _ROW_BYTES].view(torch.int64)
    if count and (rows.min() < 0 or (height is not None and rows.max() >= height)):
        raise Error("rows of a gradient lie outside of their matrix.", hint=_CORRUPT)
    return rows, data[count * _ROW_BYTES :].view(dtype).view(count, width)
