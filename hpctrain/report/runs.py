"""Read run folders for a report."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hpctrain.errors import Error
from hpctrain.files import read_json, read_regular
from hpctrain.report.compare import Record, records_of, speeds_of
from hpctrain.report.figures import number
from hpctrain.run_folder import RESULT
from hpctrain.slurm.jobs import outcome

HINT = "name run folders of `hpctrain train`, or JSON files that benchmarks wrote."


@dataclass
class Run:
    """A run, as its folder tells of it.

    Attributes:
        path: The folder.
        label: The shortest end of the path that no other run has.
        records: Of metrics.jsonl, each with ``seconds``: since the start, without standstills.
        config: The configuration, by dotted keys.
        toml: The same as the file has it.
        result: Of result.json; empty where the run is not completed.
        state: How it ended.
    """

    path: Path
    label: str
    records: list[Record]
    config: dict[str, Any]
    toml: str
    result: dict[str, Any]
    state: str

    def of(self, kind: str) -> list[Record]:
        """Return the records of a kind."""
        return [record for record in self.records if record.get("kind") == kind]

    @cached_property
    def sizes(self) -> list[tuple[float, int]]:
        """The step and number of ranks, from each change on."""
        return [
            (float(record["step"]), int(record["size"]))
            for record in self.of("event")
            if isinstance(record.get("size"), int) and (number(record["size"]) or 0) > 0
        ]

    @property
    def ranks(self) -> str:
        """How many ranks computed, one number after the other."""
        sizes = [size for _, size in self.sizes]
        changes = [b for a, b in zip([None, *sizes], sizes, strict=False) if a != b]
        return " → ".join(map(str, changes))

    @property
    def strategy(self) -> str:
        """The strategy's name, with the consistency of a parameter server."""
        name = str(self.result.get("strategy") or self.config.get("strategy") or "unknown")
        consistency = self.config.get("ps.consistency")
        return f"{name} {consistency}" if name == "ps" and consistency else name

    @property
    def oversubscribed(self) -> bool:
        """Whether it began with more ranks than cores."""
        return any(record.get("oversubscribed") is True for record in self.of("event"))

    @property
    def speed(self) -> float | None:
        """The speed in samples per second: the median over its lines, but for the first."""
        speeds = speeds_of(self.records)
        return statistics.median(speeds[1:] or speeds) if speeds else None

    @property
    def step_ms(self) -> float | None:
        """What a step usually takes, in milliseconds."""
        batch = number(self.config.get("train.batch_size"))
        return 1e3 * batch / self.speed if batch and self.speed else None

    @property
    def metrics(self) -> dict[str, float]:
        """The last metrics of training and validation, by the names of result.json."""
        found: dict[str, float] = {}
        for kind, prefix in (("train", "train_"), ("validation", "val_")):
            for record in self.of(kind)[-1:]:
                for name in metrics_of(record):
                    found[prefix + name] = float(record[name])
        return found


MACHINERY = (
    "kind", "step", "time", "seconds", "epoch", "lr", "grad_norm", "samples_per_second",
    "input_wait_ms", "input_wait_share", "lost_samples",
)  # fmt: skip
"""What records of training hold beside what the task reports."""


def metrics_of(record: Record) -> list[str]:
    """Return the names of what the task reports in a record of training or validation."""
    return [name for name in record if name not in MACHINERY and number(record[name]) is not None]


def read_run(path: Path) -> Run:
    """Read the folder of a run that is completed or not.

    Raises:
        Error: It holds no metrics, or a file that is damaged.
    """
    records = [r for r in records_of(path) if number(r.get("step")) is not None]
    if not any(r.get("kind") in ("train", "validation") for r in records):
        what = "nothing yet" if (path / "metrics.jsonl").exists() else "no metrics.jsonl"
        raise Error(f"{path} holds {what} to report.", hint=HINT)
    config, toml = _config(path / "config.toml")
    ended = outcome(path)
    return Run(
        path=path,
        label=str(path),
        records=continued(records),
        config=config,
        toml=toml,
        result=_result(path / RESULT),
        state=ended[0] if ended else "unfinished",
    )


def continued(records: Sequence[Record]) -> list[Record]:
    """Join the records of a run that was killed and resumed, as if it had not been.

    What was measured after the checkpoint that was resumed from is measured again: only the second
    time counts. ``seconds`` is added to each record, in which a standstill takes no time.
    """
    kept: list[Record] = []
    seconds = 0.0
    begun: float | None = None  # the time at which `seconds` was 0
    for record in records:
        now = number(record.get("time"))
        if _starts(record):
            kept = [r for r in kept if r.get("kind") == "event" or r["step"] <= record["step"]]
            seconds = max((r["seconds"] for r in kept), default=0.0)
            begun = None
        if now is not None:
            begun = now - seconds if begun is None else begun
            seconds = max(seconds, now - begun)
        kept.append({**record, "seconds": seconds})
    return kept


def _starts(record: Record) -> bool:
    return record.get("kind") == "event" and "lost" not in record and "joined" not in record


def name_runs(runs: Sequence[Run]) -> None:
    """Give each run the shortest label that tells it from the others; * for oversubscribed ones."""
    for run in runs:
        parts = run.path.resolve().parts
        others = [other.path.resolve().parts for other in runs if other is not run]
        for length in range(1, len(parts) + 1):
            if all(other[-length:] != parts[-length:] for other in others):
                break
        run.label = "/".join(parts[-length:]).replace("//", "/") + "*" * run.oversubscribed


def _config(path: Path) -> tuple[dict[str, Any], str]:
    from hpctrain.config import TOML_BYTES, read_toml

    try:
        text = read_regular(path, TOML_BYTES).decode("utf-8")
    except FileNotFoundError:
        return {}, ""
    except (OSError, UnicodeDecodeError) as error:
        raise Error(f"cannot read {path}: {error}.", hint="mend or remove it.") from error
    return _flat(read_toml(path)), text


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _result(path: Path) -> dict[str, Any]:
    try:
        result = read_json(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise Error(f"cannot read {path}: {error}.", hint="mend or remove it.") from error
    if not isinstance(result, dict):
        raise Error(f"{path} is not the result of a run.", hint="remove it.")
    return result
