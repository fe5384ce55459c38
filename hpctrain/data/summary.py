"""Summarise in a few lines what was made of a source: for what is imported and what is adopted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.data.index import FieldSpec

EXAMPLES = 3
MOST_CLASSES = 20
"""That are listed one by one."""
MOST_COUNTED = 10_000
"""Values of a field of classes; a field of more is none."""
CLASS_FIELDS = ("label", "labels", "class", "target", "targets", "y")


@dataclass
class Found:
    """What was seen in a source, beside its fields and splits.

    Attributes:
        kind: What it was taken for, and how it was read.
        classes: Class -> samples, where they are known.
        left_out: Why something was seen and not taken -> how many there are, and some of them.
        notes: What else a reader should know.
    """

    kind: str
    classes: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, tuple[int, list[str]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def leave(self, why: str, what: str, count: int = 1) -> None:
        """Note that something was not taken.

        Args:
            why: The reason.
            what: Its name.
            count: Of how many things.
        """
        before, examples = self.left_out.get(why, (0, []))
        if len(examples) < EXAMPLES:
            examples = [*examples, what]
        self.left_out[why] = (before + count, examples)

    def lines(self, fields: Mapping[str, FieldSpec], splits: Mapping[str, int]) -> list[str]:
        """Return the lines of the summary.

        Args:
            fields: Of a sample.
            splits: Split -> samples.
        """
        return [
            f"read as   {self.kind}",
            "splits    " + ", ".join(f"{name} {count}" for name, count in splits.items()),
            "fields    " + ", ".join(f"{shown(name)} {spec}" for name, spec in fields.items()),
            *([f"classes   {_listed(self.classes)}"] if self.classes else []),
            *(
                f"left out  {count} {why}: {', '.join(map(shown, some))}"
                + (", ..." if count > len(some) else "")
                for why, (count, some) in self.left_out.items()
            ),
            *(f"note      {shown(note)}" for note in self.notes),
        ]


def _listed(classes: Mapping[str, int]) -> str:
    counts = [f"{shown(name)} {count}" for name, count in classes.items()]
    if len(counts) <= MOST_CLASSES:
        return f"{len(counts)}: {', '.join(counts)}"
    few, many = min(classes.values()), max(classes.values())
    return f"{len(counts)}, of {few} to {many} samples: {', '.join(counts[:EXAMPLES])}, ..."


def shown(name: str) -> str:
    """Return a name from a source, which may hold anything, fit for a terminal."""
    shown = name.encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in shown)


def is_class_field(name: str, spec: FieldSpec) -> bool:
    """Tell whether a field's name and type are those of one class number a sample.

    Args:
        name: Of the field.
        spec: What the field is.
    """
    plain = spec.shape in ((), (1,)) and not spec.ragged
    return name.lower() in CLASS_FIELDS and plain and spec.kind.kind in "biu"


def count_classes(numbers: NDArray[Any]) -> dict[int, int]:
    """Count the samples of each class's number."""
    values, counts = np.unique(numbers, return_counts=True)
    return dict(zip(values.astype(int).tolist(), counts.tolist(), strict=True))
