"""State as tensors on one side and JSON on the other, so that neither file can carry code.

A tree is what ``state_dict()`` methods return: dicts and lists around tensors and plain values.
"""

from __future__ import annotations

from typing import Any

import torch

from hpctrain.errors import Error

_TENSOR = "$tensor"
_ITEMS = "$items"


def split(tree: Any, name: str = "") -> tuple[dict[str, torch.Tensor], Any]:
    """Take the tensors out of a tree.

    Returns:
        The tensors by their path in the tree, and a JSON-able tree that names them where they were.

    Raises:
        Error: A leaf is neither a tensor nor a plain value.
    """
    tensors: dict[str, torch.Tensor] = {}
    return tensors, _split(tree, name, tensors)


def _split(tree: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(tree, torch.Tensor):
        tensors[path] = tree
        return {_TENSOR: path}
    if isinstance(tree, dict):
        inner = {key: _split(value, _join(path, key), tensors) for key, value in tree.items()}
        if all(isinstance(key, str) for key in inner):
            return inner
        return {_ITEMS: [[key, value] for key, value in inner.items()]}  # JSON keys are text
    if isinstance(tree, (list, tuple)):
        return [_split(value, _join(path, index), tensors) for index, value in enumerate(tree)]
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    raise Error(
        f"'{path}' is a {type(tree).__name__}, which a checkpoint cannot hold.",
        hint="keep tensors, numbers, text, lists and dicts in state_dict().",
    )


def join(tensors: dict[str, torch.Tensor], tree: Any) -> Any:
    """Put tensors back into the tree they were split from; tuples come back as lists.

    Raises:
        KeyError: The tree names a tensor that is not given.
    """
    if isinstance(tree, dict):
        if _TENSOR in tree:
            return tensors[tree[_TENSOR]]
        if _ITEMS in tree:
            return {key: join(tensors, value) for key, value in tree[_ITEMS]}
        return {key: join(tensors, value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [join(tensors, value) for value in tree]
    return tree


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)
