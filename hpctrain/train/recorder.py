"""What a run leaves behind for people and programs: metrics.jsonl, TensorBoard, the terminal."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol

import click
from tqdm import tqdm

from hpctrain.errors import Error
from hpctrain.world.world import World

Kind = Literal["train", "timing", "validation", "exchange", "event"]
QUIET = ("timing", "exchange")
"""What is written, but not shown."""


class Recorder(Protocol):
    """Takes what happens during a run."""

    def write(self, kind: Kind, step: int, values: dict[str, Any], text: str = "") -> None:
        """Record values at a step; the text is shown in their place, if there is one."""

    def say(self, text: str) -> None:
        """Tell the person who watches."""

    def advance(self, step: int) -> None:
        """Note that a step is done."""

    def close(self) -> None:
        """Write out whatever is still held."""


class Silent:
    """Records nothing."""

    def write(self, kind: Kind, step: int, values: dict[str, Any], text: str = "") -> None:
        """Nothing."""

    def say(self, text: str) -> None:
        """Nothing."""

    def advance(self, step: int) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class RunRecorder:
    """Writes ``metrics.jsonl`` (one object a line: kind, step, time, values) and the rest.

    Args:
        folder: The run folder.
        steps: Of the whole run, for the progress bar.
        tensorboard: Also write event files.
    """

    def __init__(self, folder: Path, steps: int, *, tensorboard: bool) -> None:
        # Line by line, so that a killed run keeps all but the line it was writing.
        self._lines = (folder / "metrics.jsonl").open("a", buffering=1, encoding="utf-8")
        self._steps = steps
        self._bar = tqdm(total=steps, unit="step", dynamic_ncols=True) if _terminal() else None
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"))

    def write(self, kind: Kind, step: int, values: dict[str, Any], text: str = "") -> None:
        """Record values at a step, and show them, or the text in their place.

        Raises:
            Error: The disk is full, or the like.
        """
        line = {"kind": kind, "step": step, "time": round(time.time(), 3), **plain(values)}
        try:
            self._lines.write(json.dumps(line) + "\n")
            if self._board is not None:
                for name, value in values.items():
                    if isinstance(value, (int, float)):
                        self._board.add_scalar(f"{kind}/{name}", value, step)
        except OSError as error:
            raise Error(
                f"cannot write {self._lines.name}: {error.strerror}.",
                hint="make room, then go on with --resume auto.",
            ) from error
        if kind in QUIET:
            return
        text = text or " ".join(f"{name} {_short(value)}" for name, value in values.items())
        if self._bar is not None and kind == "train":
            self._bar.set_postfix_str(text)
        else:
            # An event's text says what it is.
            what = f"{kind} " if kind != "event" else ""
            self.say(f"step {step}/{self._steps} {what}{text}")

    def say(self, text: str) -> None:
        """Tell the person who watches, without breaking the bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            click.echo(text)

    def advance(self, step: int) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def close(self) -> None:
        """Write out whatever is still held."""
        with contextlib.suppress(OSError):  # said by write() already
            self._lines.close()
        if self._board is not None:
            with contextlib.suppress(OSError):
                self._board.close()
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

    def write(self, kind: Kind, step: int, values: dict[str, Any], text: str = "") -> None:
        """Record values at a step; the text is shown in their place, if there is one."""
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


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """Values as JSON has them: it knows no infinities and no NaN, which become null."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }


def _terminal() -> bool:
    return sys.stderr.isatty()


def _short(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
