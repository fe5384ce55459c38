"""Loggers: what takes a run's records, by name."""

from __future__ import annotations

from hpctrain.errors import Error
from hpctrain.registry import Registry
from hpctrain.train.loggers.base import Logger

LOGGERS = Registry(
    "logger",
    "hpctrain.loggers",
    {
        "csv": "hpctrain.train.loggers.csv:Csv",
        "tensorboard": "hpctrain.train.loggers.tensorboard:TensorBoard",
        "wandb": "hpctrain.train.loggers.wandb:WeightsAndBiases",
        "mlflow": "hpctrain.train.loggers.mlflow:MLflow",
    },
)


def loggers_of(specs: list[str], *, tensorboard: bool) -> dict[str, Logger]:
    """Return the loggers of a run by name, not open yet.

    Args:
        specs: ``NAME`` or ``NAME,option=value``.
        tensorboard: Whether TensorBoard is one of them anyway.

    Raises:
        Error: One cannot be made.

    Example:
        >>> sorted(loggers_of(["csv"], tensorboard=True))
        ['csv', 'tensorboard']
    """
    found: dict[str, Logger] = {}
    for spec in [*(["tensorboard"] if tensorboard else []), *specs]:
        name = spec.partition(",")[0]
        found[name] = LOGGERS.make(spec)
        if not isinstance(found[name], Logger):
            raise Error(f"'{name}' is no logger.", hint="derive its class from hpctrain.Logger.")
    return found
