"""Read files that benchmarks wrote, whatever their form, as one list of records."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpctrain.errors import Error
from hpctrain.files import read_json
from hpctrain.report.runs import HINT

Record = dict[str, Any]

SINGULAR = {"cases": "case", "modes": "mode"}
"""Objects by whose keys a file may hold its records, and what such a key is."""


@dataclass(frozen=True)
class Benchmark:
    """A file of a benchmark.

    Attributes:
        path: The file.
        name: Of the benchmark.
        about: What holds for all records: versions, the machine, settings.
        targets: Whether they are met, where the benchmark says so.
        records: One a case, the independent variables first.
    """

    path: Path
    name: str
    about: Record
    targets: list[Record]
    records: list[Record]


def read_benchmark(path: Path) -> Benchmark:
    """Read a JSON file of a benchmark.

    Its records are those of ``records``; or the objects in ``cases`` or ``modes``, by whose keys
    they then begin; or the file is one record.

    Raises:
        Error: It is something else.
    """
    try:
        document = read_json(path)
    except (OSError, ValueError) as error:
        raise Error(f"cannot read {path}: {error}.", hint=HINT) from error
    if not isinstance(document, dict) or not {"schema", "benchmark"} <= set(document):
        raise Error(f"{path} is not of a benchmark: it names none, or no schema.", hint=HINT)
    records = list(_records(document))
    if not records:
        raise Error(f"{path} holds no records.", hint="run the benchmark again.")
    return Benchmark(
        path=path,
        name=str(document["benchmark"]),
        about=_about(document, single=records == [_whole(document)]),
        targets=[each for each in _list(document.get("targets")) if isinstance(each, dict)],
        records=records,
    )


def _records(document: Record) -> Iterator[Record]:
    if "records" in document:
        yield from (each for each in _list(document["records"]) if isinstance(each, dict))
        return
    for key, name in SINGULAR.items():
        if isinstance(document.get(key), dict):
            yield from _nested(document[key], name, {})
            return
    yield _whole(document)


def _nested(tree: Record, name: str, above: Record) -> Iterator[Record]:
    depth = len(above) + 1
    for key, value in tree.items():
        place = {**above, name if depth == 1 else f"{name} {depth}": key}
        if not isinstance(value, dict):
            continue
        if value and all(isinstance(each, dict) for each in value.values()):
            yield from _nested(value, name, place)
        else:
            yield {**place, **value}


def _whole(document: Record) -> Record:
    return {k: v for k, v in document.items() if k not in ("schema", "benchmark")}


def _about(document: Record, *, single: bool) -> Record:
    if single:
        return {"schema": document["schema"]}
    about: Record = {}
    for key, value in document.items():
        if key in ("benchmark", "records", "targets", *SINGULAR):
            continue
        if isinstance(value, dict):
            about |= {
                k if key in ("environment", "versions") else f"{key}.{k}": v
                for k, v in value.items()
            }
        else:
            about[key] = value
    return about


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
