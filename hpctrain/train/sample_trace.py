"""Which samples every step consumed, written down while training and checked afterwards.

Each process has a file of its own, ``trace/N.jsonl`` in the run folder. Before a rank's gradients
leave it, it writes which samples they are of; when a step has ended, that it did, and for whom.
What counts for a step is what the last world wrote in which it ended: a step that was begun again
in a smaller world, or after a restart, was not taken before.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hpctrain.checkpoint.store import CheckpointStore
from hpctrain.config import RunConfig
from hpctrain.data.batch import Batch
from hpctrain.errors import Error
from hpctrain.files import json_lines
from hpctrain.strategies.base import Strategy

FOLDER = "trace"


class SampleTrace:
    """A process's part of the trace.

    Args:
        out: The run folder.
        number: Of this process, for good.
        launch: How often the run had been started before.
    """

    def __init__(self, out: Path, number: int, launch: int) -> None:
        folder = out / FOLDER
        self._number = number
        self._launch = launch
        path = folder / f"{launch}-{number}.jsonl"
        try:
            folder.mkdir(exist_ok=True)
            self._file = path.open("a", buffering=1)
        except OSError as error:
            raise Error(f"cannot write {path}: {error.strerror}.", hint="make room.") from error
        self._write({"process": os.getpid(), "host": os.uname().nodename})

    def begin(self, step: int, generation: int, epoch: int, batch: Batch) -> None:
        """Write that a step's gradients are about to leave this rank, and of which samples.

        Args:
            step: The step, counted from 1.
            generation: How often the world was formed anew.
            epoch: Counted from 0.
            batch: This rank's samples of the global batch.
        """
        self._write(
            {
                "begun": step,
                "world": [self._launch, generation],
                "epoch": epoch,
                "start": batch.start,
                "stop": batch.stop,
                "samples": batch.indices.tolist(),
            }
        )

    def end(self, step: int, generation: int, members: Sequence[int]) -> None:
        """Write that a step has ended, in a world of these processes.

        Args:
            step: The step, numbered as in :meth:`begin`.
            generation: How often the world was formed anew.
            members: Numbers of the processes in it.
        """
        self._write({"ended": step, "world": [self._launch, generation], "members": list(members)})

    def _write(self, line: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise Error(
                f"cannot write {self._file.name}: {error.strerror}.", hint="make room."
            ) from error


def begin_trace(
    config: RunConfig, strategy: Strategy, store: CheckpointStore, launch: int
) -> SampleTrace:
    """Begin this process's part of the trace of a run.

    Args:
        config: Resolved.
        strategy: Connected.
        store: Stands in the run folder.
        launch: How often the run had been started before.

    Raises:
        Error: A trace of this run would mean nothing, or cannot be written.
    """
    if not strategy.agreement.in_step or config.data.weights is not None:
        raise Error(
            "samples cannot be traced where ranks do not take steps together, or where samples "
            "are drawn by weight.",
            hint="drop --trace-samples.",
        )
    recovery = strategy.recovery
    number = recovery.membership.number if recovery is not None else strategy.world.rank
    return SampleTrace(store.folder.parent, number, launch)


def launches(out: Path) -> int:
    """Count how often a run was started with a trace before.

    Args:
        out: The run folder.
    """
    numbers = [int(path.name.partition("-")[0]) for path in (out / FOLDER).glob("*-*.jsonl")]
    return max(numbers, default=-1) + 1


class Verdict(NamedTuple):
    """What the trace of a run says.

    Attributes:
        steps: How many ended.
        samples: How many they consumed.
        begun_again: Steps that were begun in more than one world.
        wrong: What is not as it should be, a line each; empty: every sample once an epoch.
    """

    steps: int
    samples: int
    begun_again: int
    wrong: list[str]


class _Step(NamedTuple):
    """What a step that counts consumed."""

    epoch: int
    start: int
    stop: int
    samples: list[int]


def check(out: Path) -> Verdict:
    """Read a run's trace, and find samples that were consumed twice or never.

    Raises:
        Error: There is none, or it holds what no run writes.
    """
    try:
        return _check(out)
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise Error(
            f"the trace in {out / FOLDER} cannot be read: {type(error).__name__}: {error}.",
            hint="train with --trace-samples again.",
        ) from error


def _check(out: Path) -> Verdict:
    begun: dict[int, dict[tuple[int, ...], dict[int, dict[str, Any]]]] = {}
    ended: dict[int, dict[tuple[int, ...], list[int]]] = {}
    files = sorted((out / FOLDER).glob("*-*.jsonl"))
    if not files:
        raise Error(f"{out} has no trace.", hint="train with --trace-samples.")
    for path in files:
        number = int(path.stem.partition("-")[2])
        for line in json_lines(path):
            world = tuple(line.get("world", ()))
            if "begun" in line:
                begun.setdefault(line["begun"], {}).setdefault(world, {})[number] = line
            elif "ended" in line:
                ended.setdefault(line["ended"], {})[world] = line["members"]
    wrong: list[str] = []
    steps = []
    # Where numbers are left out, one of them is among so many.
    for number in range(1, min(max(ended, default=0), len(ended) + 1) + 1):
        if number not in ended:
            wrong.append(f"step {number} never ended")
            continue
        world, members = max(ended[number].items())
        parts = begun.get(number, {}).get(world, {})
        if silent := [str(member) for member in members if member not in parts]:
            wrong.append(f"step {number}: process {', '.join(silent)} wrote nothing of it")
            continue
        places = {
            (parts[member]["epoch"], parts[member]["start"], parts[member]["stop"])
            for member in members
        }
        if len(places) > 1:
            wrong.append(f"step {number}: its ranks were at different places")
        samples = [sample for member in members for sample in parts[member]["samples"]]
        steps.append(_Step(*min(places), samples))
    wrong += _epochs(steps)
    again = sum(len(worlds) > 1 for worlds in begun.values())
    return Verdict(len(ended), sum(len(step.samples) for step in steps), again, wrong)


def _epochs(steps: list[_Step]) -> Iterator[str]:
    """Yield what is wrong with the samples of each epoch."""
    epochs: dict[int, list[_Step]] = {}
    for step in steps:
        epochs.setdefault(step.epoch, []).append(step)
    first: set[int] = set()
    for number, its in epochs.items():
        samples = [sample for step in its for sample in step.samples]
        if twice := len(samples) - len(set(samples)):
            yield f"epoch {number}: {twice} samples twice"
        if [step.start for step in its] != [0, *(step.stop for step in its[:-1])]:
            yield f"epoch {number}: its batches do not follow one another"
        if len(samples) != its[-1].stop:
            yield f"epoch {number}: {len(samples)} samples, not {its[-1].stop}"
        first = first or set(samples)
        if number != max(epochs) and set(samples) != first:
            yield f"epoch {number}: other samples than in the first"
