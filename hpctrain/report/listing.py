"""The runs of a folder, a line each: how they are, their best metrics, and how they differ."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hpctrain.errors import Error
from hpctrain.report.compare import Record, records_of
from hpctrain.report.runs import config_of, metrics_of
from hpctrain.run_folder import CONFIG, in_use
from hpctrain.slurm.jobs import outcome

_BEST = Path("checkpoints", "best")
_OF_PLACE = ("out", "resume", "data.stage_dir")
"""Keys that say where a run is, and nothing of what it trains."""


class Listed(NamedTuple):
    """A run.

    Attributes:
        run: Its folder.
        state: ``completed``, ``interrupted``, ``failed: ...``, ``running``, or ``unfinished``:
            it neither ended nor goes on.
        step: The last that was recorded.
        steps: Of the whole run; None: not known yet.
        metrics: Of the best checkpoint's validation; of the last where none is marked.
        config: By dotted keys.
    """

    run: Path
    state: str
    step: int
    steps: int | None
    metrics: dict[str, float]
    config: dict[str, Any]


def list_runs(folder: Path) -> list[Listed]:
    """Return the runs in a folder, in the order of their beginnings.

    Args:
        folder: Of run folders, or one of them.

    Raises:
        Error: There is no such folder.
    """
    if not folder.is_dir():
        raise Error(
            f"{folder} is no folder.", hint="name one of runs; `hpctrain train` makes runs/."
        )
    places = [folder] if (folder / CONFIG).is_file() else folder.iterdir()
    found = [place for place in places if (place / CONFIG).is_file()]
    records = {run: records_of(run) for run in found}
    found.sort(key=lambda run: (_begun(records[run]), run.name))
    return [_listed(run, records[run]) for run in found]


def differences(runs: Sequence[Listed]) -> list[dict[str, Any]]:
    """Return of each run the keys that are not the same in all, without those of its place.

    Args:
        runs: To be compared; None stands for what is not set.
    """
    keys = dict.fromkeys(key for run in runs for key in run.config)
    apart = [
        key
        for key in sorted(keys)
        if key not in _OF_PLACE and len({_text(run.config.get(key)) for run in runs}) > 1
    ]
    return [{key: run.config.get(key) for key in apart} for run in runs]


def _listed(run: Path, records: Sequence[Record]) -> Listed:
    try:
        config = config_of(run / CONFIG)[0]
        ended = outcome(run)
        state = "running" if in_use(run) else ended[0] if ended else "unfinished"
    except Error as error:
        config, state = {}, f"damaged: {error.message}"
    steps = [record["steps"] for record in records if isinstance(record.get("steps"), int)]
    taken = [record["step"] for record in records if isinstance(record.get("step"), int)]
    return Listed(run, state, max(taken, default=0), steps[-1] if steps else None,
                  _metrics(run, records), config)  # fmt: skip


def _metrics(run: Path, records: Sequence[Record]) -> dict[str, float]:
    validations = [record for record in records if record.get("kind") == "validation"]
    try:
        best = re.search(r"\d+$", str((run / _BEST).readlink()))
    except OSError:
        best = None
    step = int(best[0]) if best else None
    at_best = [record for record in validations if record.get("step") == step]
    chosen = (at_best or validations)[-1:]
    return {name: float(record[name]) for record in chosen for name in metrics_of(record)}


def _begun(records: Sequence[Record]) -> float:
    times = [record["time"] for record in records if isinstance(record.get("time"), (int, float))]
    return float(min(times, default=float("inf")))


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
