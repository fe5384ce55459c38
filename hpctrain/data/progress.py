"""Show progress: a bar on a terminal, plain lines now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import click
from tqdm import tqdm

T = TypeVar("T")
LOG_SECONDS = 5.0


def progress(items: Iterable[T], *, what: str, total: int | None = None) -> Iterator[T]:
    """Pass items through, showing on standard error how many have gone by.

    Args:
        items: What passes through.
        what: They are called.
        total: How many will come; None: not known.
    """
    if sys.stderr.isatty():
        yield from tqdm(items, desc=what, total=total, unit_scale=True, dynamic_ncols=True)
        return
    said = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        if time.monotonic() - said > LOG_SECONDS:
            said = time.monotonic()
            click.echo(f"{what}: {done}" + (f" of {total}" if total else ""), err=True)
