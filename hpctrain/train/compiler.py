"""torch's compiler, left out of a process until somebody wants something compiled.

The first step of any of torch's optimizers imports ``torch._dynamo``, eight hundred modules with
sympy among them, only to tell it to keep out. That is a third of what a rank computes until its
first step, and as many files that all ranks ask of a cluster's file system at once.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

_NAME = "torch._dynamo"


class _NotYet(ModuleType):
    """In the place of ``torch._dynamo``: knows how to keep out, and has all else imported."""

    def graph_break(self, *arguments: Any, **options: Any) -> None:
        """Do nothing: outside of compiled code there is no graph to break."""

    def disable(
        self, function: Callable[..., Any], *arguments: Any, **options: Any
    ) -> Callable[..., Any]:
        """Return the function as it is, or what the compiler makes of it once that is loaded."""

        @functools.cache
        def disabled() -> Callable[..., Any]:
            made: Callable[..., Any] = self.__getattr__("disable")(function, *arguments, **options)
            return made

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            absent = sys.modules.get(_NAME) is self
            return (function if absent else disabled())(*args, **kwargs)

        return call

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":  # asked of every module by `inspect`
            raise AttributeError(name)
        if sys.modules.get(_NAME) is self:
            del sys.modules[_NAME]
        return getattr(importlib.import_module(_NAME), name)


def import_when_wanted() -> None:
    """Import ``torch._dynamo`` no earlier than something is asked of it, if it is not there yet."""
    if _NAME not in sys.modules:
        sys.modules[_NAME] = vars(torch)["_dynamo"] = _NotYet(_NAME)
