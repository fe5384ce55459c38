"""`hpctrain compare`, `hpctrain report` and `hpctrain runs`."""

from __future__ import annotations

from pathlib import Path

import click

from hpctrain.slurm.cli import columns, short


@click.command()
@click.argument(
    "inputs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN_OR_BENCH..."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("report.html"),
    show_default=True,
    help="The page.",
)
@click.option(
    "--plots",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for the same plots as PNG and SVG.",
)
def report(inputs: tuple[Path, ...], out: Path, plots: Path | None) -> None:
    """Show runs and benchmarks on one HTML page that needs no network, also on a phone.

    \b
    RUN_OR_BENCH is a run folder of `hpctrain train`, completed or not, or a JSON file that a
    benchmark wrote:
      hpctrain report runs/digits-20260101-120000
      hpctrain report runs/one runs/two runs/four --out scaling.html --plots figures/
      hpctrain report results/ps.json

    Several runs are compared: what differs in their configurations, their curves side by side and,
    where they differ in their number of ranks, throughput and efficiency.
    """
    from hpctrain.report.page import report as write

    count = write(inputs, out, plots)
    many = f"{count} plot{'s' * (count != 1)}"
    click.echo(f"{out}: {many}" + (f", also in {plots}" if plots else ""))


@click.command()
@click.argument("folder", default="runs", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="For programs, with whole configurations.")
def runs(folder: Path, as_json: bool) -> None:
    """List the runs in FOLDER (default: runs) in the order of their beginnings.

    Each with its state, the last step, the metrics of its best checkpoint, and what of its
    configuration is not the same in all of them.
    """
    import json

    from hpctrain.report.listing import differences, list_runs

    found = list_runs(folder)
    if as_json:
        rows = [{**run._asdict(), "run": str(run.run)} for run in found]
        click.echo(json.dumps(rows, default=str))
        return
    if not found:
        click.echo(f"no runs in {folder}")
        return
    table = [["RUN", "STATE", "STEP", "BEST", "DIFFERENT"]]
    for run, apart in zip(found, differences(found), strict=True):
        best = " ".join(f"{name} {short(value)}" for name, value in run.metrics.items())
        different = " ".join(f"{key}={short(value)}" for key, value in apart.items())
        step = f"{run.step}/{short(run.steps)}"
        table.append([run.run.name, run.state, step, best or "-", different])
    columns(table)


@click.command()
@click.argument("runs", nargs=-1, required=True)
def compare(runs: tuple[str, ...]) -> None:
    """Show runs side by side: ranks, speed, efficiency.

    Efficiency is the speed of a rank, by that of a rank in the smallest of the runs.
    """
    from hpctrain.report.compare import compare as compare_runs

    rows = compare_runs([Path(run) for run in runs])
    names = list(dict.fromkeys(name for row in rows for name in row.metrics))
    table = [["RUN", "RANKS", "SAMPLES/S", "EFFICIENCY", *(name.upper() for name in names)]]
    for row in rows:
        shown = [short(row.metrics.get(name)) for name in names]
        speed = f"{row.samples_per_second:.1f}"
        table.append([row.run, str(row.ranks), speed, f"{row.efficiency:.2f}", *shown])
    columns(table)
