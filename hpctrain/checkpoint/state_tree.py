"""State as tensors on one side and JSON on the other, so that neither file can carry code.

A tree is what ``state_dict()`` methods return: dicts and lists around tensors and plain values.
What JSON or safetensors have no place for goes under a mark, a key that begins with ``$``.
"""

from __future__ import annotations

import base64
from collections import OrderedDict
from typing import Any

import numpy as np
import torch

from hpctrain.checkpoint.tensor_file import DTYPES
from hpctrain.errors import Error

_TENSOR = "$tensor"
_ITEMS = "$items"
_TUPLE = "$tuple"
_BYTES = "$bytes"
_ARRAY = "$array"
_COMPLEX = "$complex"  # of 128 bits: pairs of float64
_SPARSE = "$sparse"
_QUANTIZED = "$quantized"
_STATE = "$state"  # a module's, with the versions that its layers are of
_LAYOUTS = {
    torch.sparse_csr: ("csr", "crow_indices", "col_indices"),
    torch.sparse_csc: ("csc", "ccol_indices", "row_indices"),
    torch.sparse_bsr: ("bsr", "crow_indices", "col_indices"),
    torch.sparse_bsc: ("bsc", "ccol_indices", "row_indices"),
}


def split(tree: Any, name: str = "") -> tuple[dict[str, torch.Tensor], Any]:
    """Take the tensors out of a tree.

    Args:
        tree: To be split.
        name: What the paths in it begin with.

    Returns:
        The tensors by their path in the tree, and a JSON-able tree that names them where they were.

    Raises:
        Error: A leaf is neither a tensor nor a plain value.

    Example:
        >>> split({"weight": torch.ones(2), "step": 7})
        ({'weight': tensor([1., 1.])}, {'weight': {'$tensor': 'weight'}, 'step': 7})
    """
    tensors: dict[str, torch.Tensor] = {}
    return tensors, _split(tree, name, tensors)


def _split(tree: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(tree, torch.Tensor):
        return _split_tensor(tree, path, tensors)
    if isinstance(tree, dict):
        return _split_dict(tree, path, tensors)
    if isinstance(tree, (list, tuple)):
        inner = [_split(value, _join(path, index), tensors) for index, value in enumerate(tree)]
        return {_TUPLE: inner} if isinstance(tree, tuple) else inner
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    if isinstance(tree, bytes):
        return {_BYTES: base64.b64encode(tree).decode()}
    if isinstance(tree, (np.ndarray, np.generic)) and tree.dtype.kind in "biufc":
        whole = torch.from_numpy(np.array(tree, order="C"))
        return {_ARRAY: _split_tensor(whole, path, tensors)}
    raise _unholdable(path, f"a {type(tree).__name__}")


def _split_dict(tree: dict[Any, Any], path: str, tensors: dict[str, torch.Tensor]) -> Any:
    inner: Any = {key: _split(value, _join(path, key), tensors) for key, value in tree.items()}
    if not all(isinstance(key, str) and not key.startswith("$") for key in inner):
        # JSON keys are text, and ours begin with a mark.
        inner = {_ITEMS: [[_split(key, path, tensors), value] for key, value in inner.items()]}
    metadata = getattr(tree, "_metadata", None)
    if metadata is not None:
        return {_STATE: inner, "metadata": _split(dict(metadata), path, tensors)}
    return inner


def _split_tensor(tensor: torch.Tensor, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    tensor = tensor.detach()
    if tensor.layout == torch.sparse_coo:
        whole = tensor.coalesce()
        parts = {"indices": whole.indices(), "values": whole.values()}
        mark: dict[str, Any] = {_SPARSE: "coo", "size": list(tensor.shape)}
    elif tensor.layout in _LAYOUTS:
        name, outer, inner = _LAYOUTS[tensor.layout]
        parts = {part: getattr(tensor, part)() for part in (outer, inner, "values")}
        mark = {_SPARSE: name, "size": list(tensor.shape)}
    elif tensor.is_quantized:
        if tensor.qscheme() != torch.per_tensor_affine:
            raise _unholdable(path, f"a tensor quantized by {tensor.qscheme()}")
        parts = {"values": tensor.int_repr()}
        mark = {_QUANTIZED: True, "scale": tensor.q_scale()}
        mark["zero"] = tensor.q_zero_point()
    elif tensor.dtype == torch.complex128:
        parts = {"pairs": torch.view_as_real(tensor.resolve_conj())}
        mark = {_COMPLEX: True}
    elif tensor.layout == torch.strided and tensor.dtype in DTYPES:
        while path in tensors:  # "a.b" beside "a" that holds "b"
            path += "+"
        tensors[path] = tensor
        return {_TENSOR: path}
    else:
        raise _unholdable(path, f"a tensor of {tensor.dtype} and {tensor.layout}")
    named = {part: _split_tensor(each, _join(path, part), tensors) for part, each in parts.items()}
    return {**mark, "parts": named}


def _unholdable(path: str, what: str) -> Error:
    return Error(
        f"'{path}' is {what}, which a checkpoint cannot hold.",
        hint="keep tensors, numbers, text, lists and dicts in state_dict().",
    )


def join(tensors: dict[str, torch.Tensor], tree: Any) -> Any:
    """Put tensors back into the tree they were split from.

    Args:
        tensors: By their path.
        tree: That names them.

    Raises:
        KeyError: The tree names a tensor that is not given.
    """
    if isinstance(tree, list):
        return [join(tensors, value) for value in tree]
    if not isinstance(tree, dict):
        return tree
    if _TENSOR in tree:
        return tensors[tree[_TENSOR]]
    if _ITEMS in tree:
        return {join(tensors, key): join(tensors, value) for key, value in tree[_ITEMS]}
    if _TUPLE in tree:
        return tuple(join(tensors, value) for value in tree[_TUPLE])
    if _BYTES in tree:
        return base64.b64decode(tree[_BYTES])
    if _ARRAY in tree:
        array = join(tensors, tree[_ARRAY]).numpy()
        return array if array.ndim else array[()]
    if _STATE in tree:
        state: Any = OrderedDict(join(tensors, tree[_STATE]))
        state._metadata = OrderedDict(join(tensors, tree["metadata"]))
        return state
    if _SPARSE in tree or _QUANTIZED in tree or _COMPLEX in tree:
        return _join_tensor(tree, join(tensors, tree["parts"]))
    return {key: join(tensors, value) for key, value in tree.items()}


def names(tree: Any) -> list[str]:
    """List the tensors that a tree names, as ``split`` made it."""
    if isinstance(tree, list):
        return [name for value in tree for name in names(value)]
    if not isinstance(tree, dict):
        return []
    if _TENSOR in tree:
        return [tree[_TENSOR]]
    return [name for value in tree.values() for name in names(value)]


def merge(one: Any, other: Any) -> Any:
    """Make one tree of two that ``split`` has made: dicts are united, the first has the last word.

    Args:
        one: A tree.
        other: Has what the first lacks, and may have what it has.
    """
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return one
    return {
        key: merge(one[key], other[key]) if key in one and key in other else {**one, **other}[key]
        for key in {**one, **other}
    }


def _join_tensor(mark: dict[str, Any], parts: dict[str, torch.Tensor]) -> torch.Tensor:
    if _COMPLEX in mark:
        return torch.view_as_complex(parts["pairs"])
    if _QUANTIZED in mark:
        values, scale, zero = parts["values"], mark["scale"], mark["zero"]
        return torch._make_per_tensor_quantized_tensor(values, scale, zero)
    if mark[_SPARSE] == "coo":
        size = mark["size"]
        return torch.sparse_coo_tensor(
            parts["indices"], parts["values"], size, is_coalesced=True, check_invariants=True
        )
    layout = {names[0]: each for each, names in _LAYOUTS.items()}[mark[_SPARSE]]
    _, outer, inner = _LAYOUTS[layout]
    return torch.sparse_compressed_tensor(
        parts[outer],
        parts[inner],
        parts["values"],
        mark["size"],
        layout=layout,
        check_invariants=True,
    )


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)
