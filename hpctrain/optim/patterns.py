"""Parameters chosen by patterns of their names."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from hpctrain.errors import Error, nearest


def matching(model: nn.Module, patterns: str | Iterable[str], key: str) -> dict[str, nn.Parameter]:
    """Return the parameters of a model whose names match one of some patterns.

    Args:
        model: Whose they are.
        patterns: As of file names: ``backbone.*``, ``*.bias``, ``layers.[0-3].*``.
        key: Of the configuration, that has them.

    Raises:
        Error: A pattern matches nothing.

    Example:
        >>> list(matching(nn.Linear(2, 1), "bi*", "train.freeze"))
        ['bias']
    """
    named = dict(model.named_parameters())
    chosen: dict[str, nn.Parameter] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = {name: p for name, p in named.items() if fnmatchcase(name, pattern)}
        if not found:
            parts = {name.partition(".")[0] + ".*" for name in named if "." in name}
            raise Error(
                f"{key}: no parameter is called '{pattern}'.",
                hint=nearest(pattern, sorted(parts | named.keys())),
            )
        chosen |= found
    return chosen
