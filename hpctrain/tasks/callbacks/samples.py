"""A few validation samples and what the model makes of them, for people to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from PIL import Image

from hpctrain.data.batch import Batch
from hpctrain.tasks.callbacks.base import Callback, Run


@dataclass
class Samples(Callback):
    """Writes the first validation samples and their predictions at each validation.

    They go to ``samples/step-S.txt`` of the run folder, a line a sample, and images to
    ``samples/step-S-NAME.png``, side by side. The task defines ``predictions()``. A subclass may
    say what is shown, such as decoded text, by :meth:`show`.

    Args:
        count: How many.
    """

    ranks: ClassVar[Literal["zero", "all"]] = "all"  # a task may gather in predictions()
    count: int = 8

    def show(
        self, run: Run, batch: Batch, predictions: Mapping[str, torch.Tensor]
    ) -> Mapping[str, torch.Tensor | Sequence[str]]:
        """Return what is written: texts or rows by name, one for each sample.

        Rows of one number are written as text, rows of shape (height, width), (1, height, width) or
        (3, height, width) as images; of others the place of the largest value. Here, it is all
        predictions, and those of the batch's fields that are numbers or images.

        Args:
            run: The run.
            batch: The samples, on the CPU.
            predictions: What the task makes of them.
        """
        rows = {name: field for name, field in batch.items() if len(field) == batch.samples}
        shown = {name: row for name, row in rows.items() if is_image(row) or row[0].numel() == 1}
        return {**shown, **predictions}

    def on_validation(self, run: Run) -> None:
        """Write them, on rank 0.

        Args:
            run: The run.
        """
        shown = self.show(run, *run.predictions(self.count))
        if run.world.rank != 0:
            return
        folder = run.folder / "samples"
        folder.mkdir(exist_ok=True)
        columns: dict[str, list[str]] = {}
        for name, values in shown.items():
            if isinstance(values, torch.Tensor) and is_image(values):
                save(values, folder / f"step-{run.step:06}-{name}.png")
            elif isinstance(values, torch.Tensor):
                columns[name] = texts(values)
            else:
                columns[name] = list(values)
        rows = zip(*columns.values(), strict=True)
        lines = [
            "  ".join(f"{n} {text}" for n, text in zip(columns, row, strict=True)) for row in rows
        ]
        path = folder / f"step-{run.step:06}.txt"
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def is_image(values: torch.Tensor) -> bool:
    """Whether the rows of a tensor look like images.

    Args:
        values: Of shape (samples, ...).

    Example:
        >>> is_image(torch.zeros(4, 3, 32, 32)), is_image(torch.zeros(4, 10))
        (True, False)
    """
    return values.ndim == 3 or (values.ndim == 4 and values.shape[1] in (1, 3))


def texts(values: torch.Tensor) -> list[str]:
    """Return a short text for each row: its number, or the place of its largest value.

    Args:
        values: Of shape (samples, ...).

    Example:
        >>> texts(torch.tensor([0.5, 2.0])), texts(torch.tensor([[0.1, 0.9], [3.0, 2.0]]))
        (['0.5', '2'], ['1', '0'])
    """
    rows = values.detach().reshape(len(values), -1)
    if rows.shape[1] == 1:
        return [f"{value:.5g}" for value in rows[:, 0].tolist()]
    return [str(place) for place in rows.argmax(1).tolist()]


def save(values: torch.Tensor, path: Path) -> None:
    """Write images side by side as one PNG, each scaled to the range of its own values.

    Args:
        values: Of shape (samples, height, width) or (samples, 1 or 3, height, width).
        path: Where to.
    """
    images = values.detach().double().nan_to_num()
    images = images[:, None] if images.ndim == 3 else images
    low = images.amin((1, 2, 3), keepdim=True)
    span = (images.amax((1, 2, 3), keepdim=True) - low).clamp_min(1e-12)
    wide = torch.cat(list((images - low) / span * 255), dim=2).to(torch.uint8)  # (channels, h, w)
    pixels = np.ascontiguousarray(wide.expand(3, -1, -1).permute(1, 2, 0).numpy())
    Image.fromarray(pixels).save(path)
