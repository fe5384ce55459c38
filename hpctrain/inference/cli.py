"""`hpctrain evaluate` and `hpctrain predict`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click


def _of_a_run(command: Callable[..., None]) -> Callable[..., None]:
    """What both commands are told."""
    for option in (
        click.option("--batch-size", type=click.IntRange(min=1), help="Samples in a pass."),
        click.option(
            "--data", metavar="DIR", help="Shard set in place of the run's data (data.path)."
        ),
        click.option("--split", default="validation", show_default=True, help="Of the data."),
        click.option(
            "--which",
            metavar="best|newest",
            help="Of a run's checkpoints. Default: best, if there is one.",
        ),
        click.argument("source", metavar="RUN|CHECKPOINT", type=click.Path(path_type=Path)),
    ):
        command = option(command)
    return command


@click.command()
@_of_a_run
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def evaluate(as_json: bool, **wanted: Any) -> None:
    """Measure a trained model on a split: its loss, means, and metrics of the whole set.

    The weights are those that the run's reported metric is of. Each sample is taken once, on any
    number of ranks:

    \b
      hpctrain evaluate runs/digits-1
      mpirun -np 4 hpctrain evaluate runs/digits-1 --data shards/ --split test
    """
    from hpctrain.inference.evaluate import evaluate as measure
    from hpctrain.inference.passes import Wanted, passes

    with passes(Wanted(**wanted), _complain) as over:
        metrics = measure(over)
        if over.world.rank == 0:
            shown = " ".join(f"{name} {value:.6g}" for name, value in metrics.items())
            what = f"{over.trained.checkpoint}: {wanted['split']}, {len(over.samples)} samples"
            click.echo(json.dumps(metrics) if as_json else f"{what}: {shown}")


@click.command()
@_of_a_run
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="The HDF5 file; replaced if it exists.",
)
def predict(out: Path, **wanted: Any) -> None:
    """Write what a trained model's task predicts of each sample of a split, in order.

    FILE has a dataset for each tensor that the task's predictions() gives, with a row for each
    sample. On any number of ranks its bytes are the same, as long as they compute alike (kind of
    processor, threads of a rank, --batch-size):

    \b
      hpctrain predict runs/digits-1 --out predictions.h5
      mpirun -np 4 hpctrain predict runs/digits-1 --split test --out predictions.h5
    """
    from hpctrain.inference.passes import Wanted, passes
    from hpctrain.inference.predict import predict as write

    with passes(Wanted(**wanted), _complain) as over:
        write(over, out)
        if over.world.rank == 0:
            click.echo(f"{out}: {len(over.samples)} samples by {over.trained.checkpoint}")


def _complain(text: str) -> None:
    click.echo(text, err=True)
