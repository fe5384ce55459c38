"""Records for Weights & Biases."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpctrain.errors import Error
from hpctrain.files import read_regular
from hpctrain.train.loggers.base import Logger

ID_BYTES = 100


@dataclass
class WeightsAndBiases(Logger):
    """Sends records to Weights & Biases, or keeps them in the run folder until `wandb sync`.

    Where the server is, and who this is, its own variables say (``WANDB_BASE_URL``,
    ``WANDB_API_KEY``); on nodes without a network set ``WANDB_MODE=offline``. A run that goes on in
    its folder goes on there, too: its id is in ``wandb/id``.

    Args:
        project: To be put into.
        name: Of the run; None: its folder's.
        mode: ``online``, ``offline`` or ``disabled``; None: as ``WANDB_MODE`` says.
    """

    project: str = "hpctrain"
    name: str | None = None
    mode: str | None = None

    def open(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Begin, or go on with, a run.

        Args:
            folder: The run folder.
            config: Shown beside it.

        Raises:
            Error: wandb is not installed.
        """
        try:
            import wandb
        except ImportError as error:
            raise Error(f"logger 'wandb': {error}.", hint="pip install wandb.") from error
        path = folder / "wandb" / "id"
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            path.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
        options: dict[str, Any] = {"mode": self.mode} if self.mode is not None else {}
        self._run = wandb.init(
            project=self.project,
            name=self.name or folder.resolve().name,
            dir=str(folder),
            id=read_regular(path, ID_BYTES).decode("ascii"),
            resume="allow",
            config=dict(config),
            **options,
        )
        self._end = wandb.teardown
        self._run.define_metric("*", step_metric="step")

    def write(self, kind: str, step: int, seconds: float, values: Mapping[str, Any]) -> None:
        """Send the numbers, called ``KIND/NAME``.

        Args:
            kind: Of the record.
            step: Of the record.
            seconds: Not used: the time of sending counts.
            values: Texts among them are left out.
        """
        numbers = {
            f"{kind}/{name}": value
            for name, value in values.items()
            if isinstance(value, (int, float))
        }
        self._run.log({**numbers, "step": step})

    def close(self) -> None:
        """Send what is left, and end the process that sends."""
        self._run.finish()
        self._end()
