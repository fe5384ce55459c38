"""What happens in a run, given to its loggers and to whoever watches the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import click
from tqdm import tqdm

from hpctrain.errors import Error
from hpctrain.train.loggers.base import Logger
from hpctrain.train.loggers.jsonl import JsonLines
from hpctrain.world.world import World

SHOWN = ("train", "validation", "event")
"""Kinds of records that are shown as they are written."""

_MARKS = {"train": "train     ", "validation": "VALIDATION"}


class Recorder(Protocol):
    """Takes what happens during a run."""

    def write(self, kind: str, step: int, values: dict[str, Any], text: str = "") -> None:
        """Record values at a step; the text is shown in their place, if there is one.

        Args:
            kind: ``train``, ``timing``, ``validation``, ``exchange``, ``event``, or a callback's.
            step: Optimizer steps done.
            values: Numbers and texts by name.
            text: What is shown instead of the values; "": the values.
        """

    def say(self, text: str) -> None:
        """Tell the person who watches."""

    def advance(self, step: int) -> None:
        """Note that a step is done."""

    def close(self) -> None:
        """Write out whatever is still held."""


class Silent:
    """Records nothing."""

    def write(self, kind: str, step: int, values: dict[str, Any], text: str = "") -> None:
        """Do nothing: the record is dropped.

        Args:
            kind: Makes no difference.
            step: Makes no difference.
            values: Makes no difference.
            text: Makes no difference.
        """

    def say(self, text: str) -> None:
        """Do nothing: the line is dropped."""

    def advance(self, step: int) -> None:
        """Do nothing: no progress is shown."""

    def close(self) -> None:
        """Do nothing: nothing is held."""


class RunRecorder:
    """Gives records to ``metrics.jsonl`` and to loggers, and shows them.

    A logger that fails is said once, and left out from then on.

    Args:
        folder: The run folder.
        steps: Of the whole run, for the progress bar.
        loggers: By name, besides ``metrics.jsonl``; opened here.
        config: What loggers are told of the run.

    Raises:
        Error: A logger cannot be used here.
    """

    def __init__(
        self,
        folder: Path,
        steps: int,
        loggers: Mapping[str, Logger],
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self._steps = steps
        self._bar = tqdm(total=steps, unit="step", dynamic_ncols=True) if _terminal() else None
        self._own = JsonLines()
        self._own.open(folder, {})
        self._loggers = dict(loggers)
        for name, each in loggers.items():
            self._try(name, partial(each.open, folder, config or {}))

    def write(self, kind: str, step: int, values: dict[str, Any], text: str = "") -> None:
        """Record values at a step, and show them, or the text in their place.

        Args:
            kind: Of the record; those of :data:`SHOWN` are shown as well as written.
            step: Optimizer steps done.
            values: Numbers and texts by name.
            text: What is shown instead of the values; "": the values.

        Raises:
            Error: ``metrics.jsonl`` cannot be written.
        """
        seconds = time.time()
        self._own.write(kind, step, seconds, values)
        for name, each in list(self._loggers.items()):
            self._try(name, partial(each.write, kind, step, seconds, values))
        if kind not in SHOWN:
            return
        text = text or " ".join(f"{name} {_short(value)}" for name, value in values.items())
        if self._bar is not None and kind == "train":
            self._bar.set_postfix_str(text)
        else:
            # An event's text says what it is.
            what = f"{_MARKS[kind]} " if kind != "event" else ""
            self.say(f"step {step:>{len(str(self._steps))}}/{self._steps} {what}{text}")

    def _try(self, name: str, action: Callable[[], None]) -> None:
        """Have a logger do something; if it cannot, the run goes on without it."""
        try:
            action()
        except Error:
            raise
        except Exception as error:
            del self._loggers[name]
            self.say(
                f"warning: logger '{name}' is left out from here on: "
                f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            )

    def say(self, text: str) -> None:
        """Tell the person who watches, without breaking the bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            click.echo(text)

    def advance(self, step: int) -> None:
        """Advance the progress bar, where there is one, to a step."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def close(self) -> None:
        """Write out whatever is still held."""
        self._own.close()
        for name, each in list(self._loggers.items()):
            self._try(name, each.close)
        if self._bar is not None:
            self._bar.close()


class OnRankZero:
    """Records where the rank is 0, which may become another's when a rank is lost.

    Args:
        world: Who takes part.
        make: Makes the recorder, when it is needed first.
    """

    def __init__(self, world: World, make: Callable[[], Recorder]) -> None:
        self._world = world
        self._make = make
        self._made: Recorder | None = None

    def _recorder(self) -> Recorder:
        if not self._world.leads:
            return Silent()
        if self._made is None:
            self._made = self._make()
        return self._made

    def write(self, kind: str, step: int, values: dict[str, Any], text: str = "") -> None:
        """Record values at a step, on the rank that is 0 now; do nothing on others.

        Args:
            kind: Of the record.
            step: Optimizer steps done.
            values: Numbers and texts by name.
            text: What is shown instead of the values; "": the values.
        """
        self._recorder().write(kind, step, values, text)

    def say(self, text: str) -> None:
        """Tell the person who watches."""
        self._recorder().say(text)

    def advance(self, step: int) -> None:
        """Note that a step is done."""
        self._recorder().advance(step)

    def close(self) -> None:
        """Write out whatever is still held."""
        if self._made is not None:
            self._made.close()


def _terminal() -> bool:
    return sys.stderr.isatty()


def _short(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
