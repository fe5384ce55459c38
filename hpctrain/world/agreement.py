"""Check that all ranks agree on what decides the result, and on the parameters they came to.

Both are questions of one small sum over ranks as long as the answer is yes. Only where it is no,
ranks tell each other more, to find out what differs, and who differs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from hpctrain.errors import Error
from hpctrain.world.broadcast import broadcast_json, gather_numbers
from hpctrain.world.world import Communicator

SHOWN_CHARACTERS = 80
"""Of a value in a message."""

_SMALL, _GROUP = 2**12, 1024
"""Tensors of fewer elements are taken together, so many at a time."""

# A prime: rows of a matrix that change places do not meet the same weights.
_WIDTH = 1021
_WEIGHTS = np.random.default_rng(0).integers(-(2**62), 2**62, _WIDTH, dtype=np.int64) * 2 + 1
_ABSENT = "nothing of that name"


def compare(
    comm: Communicator,
    values: Mapping[str, str],
    *,
    hint: str = "start every rank by the same command, with the same environment, code and data.",
) -> None:
    """Refuse ranks that differ in what decides the result; every rank calls this.

    Args:
        comm: Of the world.
        values: Name -> text, such as a setting or a digest. Put what explains most first.
        hint: What to do where they differ.

    Raises:
        Error: The first name, in rank 0's order, whose texts differ; with the ranks and both texts.
    """
    if comm.size == 1:
        return
    other = _first_other(_gather(comm, json.dumps(sorted(values.items()))))
    if other is None:
        return
    ours = broadcast_json(comm, list(values.items()), 0)
    theirs = dict(broadcast_json(comm, list(values.items()), other))
    known = dict(ours)
    name = next(n for n in [*known, *theirs] if known.get(n) != theirs.get(n))
    has = _gather(comm, json.dumps(values.get(name)))
    raise Error(
        f"ranks differ in {name}: {_ranks(_alike(has, 0))} {_shown(known.get(name))}, "
        f"{_ranks(_alike(has, other))} {_shown(theirs.get(name))}.",
        hint=hint,
    )


def check_tensors(
    comm: Communicator,
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    what: str = "parameter",
    hint: str = "something changes it on each rank by that rank's own samples, such as forward() "
    "(max_norm, a start from the first batch) or a hook; it must do the same on every rank.",
) -> None:
    """Refuse ranks whose tensors are not the same bits; every rank calls this, at the same step.

    It costs one pass over the tensors' memory, and a sum of a few numbers over ranks.

    Args:
        comm: Of the world.
        tensors: Name and tensor, in the same order on every rank; of any type and layout.
        what: They are called in the message.
        hint: What to do where they differ.

    Raises:
        Error: The first tensor that differs, the ranks whose it is, and how many others do.
    """
    if comm.size == 1:
        return
    named = list(tensors)
    with torch.no_grad():
        sums = _sums([tensor for _, tensor in named])
    if _first_other(_gather(comm, json.dumps(sums))) is None:
        return
    mine = {name: checksum(tensor) for name, tensor in named}
    ours: dict[str, int] = broadcast_json(comm, mine, 0)
    differs = torch.tensor([float(mine.get(name) != ours[name]) for name in ours]).double()
    comm.all_reduce(differs)
    changed = [name for name, count in zip(ours, differs.tolist(), strict=True) if count]
    if not changed:  # but there are others besides
        raise Error(f"the ranks hold other {what}s, or in another order.", hint=hint)
    others = _alike(_gather(comm, str(mine.get(changed[0]) != ours[changed[0]])), 0, same=False)
    more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
    raise Error(
        f"the ranks hold different values of {what} '{changed[0]}'{more}: "
        f"{_ranks(others, verb=False)} not those of rank 0.",
        hint=hint,
    )


def checksum(tensor: torch.Tensor) -> int:
    """Return a number of 64 bits that any change of the tensor's bits changes, but by rare chance.

    It is a weighted sum of the bytes taken as integers, so NaNs are compared by their bits, and
    strides do not count.

    Example:
        >>> checksum(torch.tensor([0.0])) == checksum(torch.tensor([-0.0]))  # other bits
        False
    """
    sums = _weigh([_columns(part) for part in _parts(tensor.detach())])
    # Each part has its place among the others.
    return sum((2 * n + 1) * part for n, part in enumerate(sums)) % 2**64


def _gather(comm: Communicator, text: str) -> list[list[float]]:
    """Every rank's digest of a text: 96 bits, in pieces that a float64 holds exactly."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
    return gather_numbers(comm, [int.from_bytes(digest[i : i + 6], "big") for i in (0, 6)])


def _first_other(digests: Sequence[list[float]]) -> int | None:
    return next((rank for rank, digest in enumerate(digests) if digest != digests[0]), None)


def _alike(digests: Sequence[list[float]], rank: int, *, same: bool = True) -> list[int]:
    """Return the ranks whose digest is (not) that of a rank."""
    return [r for r, digest in enumerate(digests) if (digest == digests[rank]) is same]


def _ranks(ranks: list[int], *, verb: bool = True) -> str:
    one = len(ranks) == 1
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank{'' if one else 's'} {shown} {'has' if one else 'have'}"


def _shown(text: str | None) -> str:
    if text is None:
        return _ABSENT
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."


def _sums(tensors: list[torch.Tensor]) -> list[int]:
    """Checksums of all tensors; of small ones together, because there may be thousands."""
    large: list[torch.Tensor] = []
    small: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
    for tensor in tensors:
        if tensor.layout is torch.strided and not tensor.is_quantized and tensor.numel() < _SMALL:
            small.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        else:
            large += _parts(tensor)
    for group in small.values():
        for first in range(0, len(group), _GROUP):
            large.append(torch._C._nn.flatten_dense_tensors(group[first : first + _GROUP]))
    return _weigh([_columns(tensor) for tensor in large])


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the strided tensors that a tensor consists of."""
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.coalesce()
        return [tensor.indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [tensor.int_repr() if tensor.is_quantized else tensor]


def _columns(tensor: torch.Tensor) -> NDArray[np.int64]:
    """A strided tensor's bytes as a matrix of integers of 64 bits: its columns' sums."""
    flat = tensor.resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)
    words, left = divmod(len(flat), 8)
    rest = words % _WIDTH
    body = 8 * (words - rest)
    if tensor.device.type == "cpu":  # numpy's way through memory is several times as fast here
        data = flat.numpy()
        columns = data[:body].view(np.int64).reshape(-1, _WIDTH).sum(0)
    else:
        whole = flat[:body] if flat.storage_offset() % 8 == 0 else flat[:body].clone()
        columns = whole.view(torch.int64).view(-1, _WIDTH).sum(0).cpu().numpy()
        data, body = flat[body:].cpu().numpy(), 0
    if rest:
        columns[:rest] += data[body : body + 8 * rest].view(np.int64)
    if left:
        columns[rest] += int.from_bytes(data[-left:].tobytes(), "little")
    columns[-1] += len(flat)
    return np.asarray(columns)


def _weigh(columns: list[NDArray[np.int64]]) -> list[int]:
    if not columns:
        return []
    return [int(n) % 2**64 for n in (np.stack(columns) * _WEIGHTS).sum(axis=1)]
