"""Records for MLflow."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpctrain.errors import Error
from hpctrain.files import read_regular
from hpctrain.train.loggers.base import Logger

ID_BYTES = 100
MOST_PARAMETERS = 100  # in a request


@dataclass
class MLflow(Logger):
    """Sends records to MLflow's server, or keeps them as files in ``mlflow/`` of the run folder.

    ``MLFLOW_TRACKING_URI`` names the server. A run that goes on in its folder goes on there, too:
    its id is in ``mlflow/id``.

    Args:
        experiment: To be put into.
        uri: Of the server, or ``file:`` and a folder; None: as ``MLFLOW_TRACKING_URI`` says, else
            the run folder.
    """

    experiment: str = "hpctrain"
    uri: str | None = None

    def open(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Begin, or go on with, a run.

        Args:
            folder: The run folder.
            config: Its values become parameters.

        Raises:
            Error: MLflow is not installed.
        """
        try:
            from mlflow.entities import Metric, Param
            from mlflow.tracking import MlflowClient
        except ImportError as error:
            raise Error(
                f"logger 'mlflow': {error}.", hint="pip install mlflow-skinny, or mlflow."
            ) from error
        self._metric = Metric
        own = folder.resolve() / "mlflow"
        own.mkdir(exist_ok=True)
        uri = self.uri or os.environ.get("MLFLOW_TRACKING_URI") or own.as_uri()
        # Training waits meanwhile, so not for minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        if uri.startswith("file:"):  # since 3.7 files have to be asked for
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        self._client = MlflowClient(tracking_uri=uri)
        path = own / "id"
        if path.exists():
            self._id = read_regular(path, ID_BYTES).decode("ascii")
            self._client.update_run(self._id, status="RUNNING")
            return
        known = self._client.get_experiment_by_name(self.experiment)
        place = known.experiment_id if known else self._client.create_experiment(self.experiment)
        self._id = self._client.create_run(place, run_name=folder.resolve().name).info.run_id
        path.write_text(self._id, encoding="utf-8")
        parameters = [Param(key, str(value)) for key, value in flat(config)]
        for first in range(0, len(parameters), MOST_PARAMETERS):
            self._client.log_batch(self._id, params=parameters[first : first + MOST_PARAMETERS])

    def write(self, kind: str, step: int, seconds: float, values: Mapping[str, Any]) -> None:
        """Send the numbers, called ``KIND/NAME``, in one request.

        Args:
            kind: Of the record.
            step: Of the record.
            seconds: When.
            values: Texts among them are left out.
        """
        milliseconds = int(1e3 * seconds)
        self._client.log_batch(
            self._id,
            metrics=[
                self._metric(f"{kind}/{name}", float(value), milliseconds, step)
                for name, value in values.items()
                if isinstance(value, (int, float))
            ],
        )

    def close(self) -> None:
        """Have it shown as over."""
        self._client.set_terminated(self._id)


def flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return dotted keys and values of nested sections.

    Args:
        config: Sections, keys and values.
        prefix: Before each key.

    Example:
        >>> flat({"seed": 1, "train": {"steps": 5}})
        [('seed', 1), ('train.steps', 5)]
    """
    found: list[tuple[str, Any]] = []
    for name, value in config.items():
        if isinstance(value, Mapping):
            found += flat(value, f"{prefix}{name}.")
        else:
            found.append((prefix + name, value))
    return found
