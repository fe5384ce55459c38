"""Python's collector of cyclic garbage, kept away from what lasts.

Importing torch makes some hundred thousand objects that stay. Looking through them again and again
is a third of a rank's start; and in training it would be a pause now and then, in which all other
ranks wait. See ``gc.freeze`` in Python's documentation.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def none_before_training() -> Iterator[None]:
    """Suspend garbage collection until :func:`leave_alone`, or to the end of the context."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def leave_alone() -> None:
    """Leave all that there is by now out of collections, and collect from here on."""
    gc.freeze()
    gc.enable()
