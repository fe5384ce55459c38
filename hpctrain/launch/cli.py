"""The commands `hpctrain trace`, `hpctrain chaos` and `hpctrain launch`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from hpctrain.errors import Error


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
def trace(run: Path) -> None:
    """Check that RUN, trained with --trace-samples, took every sample once an epoch."""
    from hpctrain.train.sample_trace import check

    verdict = check(run)
    for line in verdict.wrong:
        click.echo(line)
    if verdict.wrong:
        raise Error(
            f"{run}: samples were left out or taken twice.",
            hint="the lines above say where; was a file of its trace removed?",
        )
    click.echo(
        f"{run}: {verdict.steps} steps took {verdict.samples} samples, each once an epoch; "
        f"{verdict.begun_again} steps were begun again."
    )


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("command", nargs=-1, type=click.UNPROCESSED, required=True)
@click.option("--out", "folder", required=True, type=click.Path(path_type=Path),
              help="The run folder.")  # fmt: skip
@click.option("--plan", default="", metavar="FAULTS", help="What goes wrong, and when.")
@click.option("--mtbf-steps", type=float, metavar="N", help="Random faults, N steps apart.")
@click.option("--seed", default=0, show_default=True, help="Of the random faults.")
@click.option("--ranks", type=click.IntRange(1), default=4, show_default=True,
              help="How many there are, for random faults.")  # fmt: skip
@click.option("--steps", type=click.IntRange(1), default=100, show_default=True,
              help="Within how many steps random faults come.")  # fmt: skip
@click.option("--kill-node", metavar="COMMAND", help="By which a node is lost; its name is added.")
@click.option("--limit-seconds", type=float, default=600.0, show_default=True,
              help="A run that takes longer hangs.")  # fmt: skip
def chaos(
    command: tuple[str, ...],
    folder: Path,
    plan: str,
    mtbf_steps: float | None,
    seed: int,
    ranks: int,
    steps: int,
    kill_node: str | None,
    limit_seconds: float,
) -> None:
    """Run COMMAND, a launcher and `hpctrain train TASK`, while things go wrong, and judge it.

    \b
      hpctrain chaos --out runs/a --plan "kill:rank=3@step=40 stop:rank=1@step=80" -- \\
          mpirun --with-ft ulfm -np 4 hpctrain train digits --elastic auto

    \b
    Faults: kill:rank=3@step=40  stop:rank=1@step=80+0.01  slow:rank=2,x3  node:n2@time=5
    By --mtbf-steps and --seed they are drawn at random. The run is good if it ends in time, and
    every sample was taken once an epoch; what became of it is in chaos.json in the run folder.
    """
    import random
    import shlex

    from hpctrain.launch.chaos import Chaos, save
    from hpctrain.launch.faults import draw, parse

    faults = parse(plan)
    if mtbf_steps is not None:
        faults += draw(ranks, steps, mtbf_steps, random.Random(seed))  # noqa: S311
    words = [*command, "--out", str(folder), "--trace-samples"]
    outcome = Chaos(
        words, folder, faults, kill_node=shlex.split(kill_node or ""), limit_seconds=limit_seconds
    ).run()
    for fault in outcome.faults:
        click.echo(f"chaos: {fault}")
    times = " ".join(f"{ms:.0f}" for ms in outcome.recovery_ms)
    click.echo(f"chaos: recovered in {times or '-'} ms; a step takes {outcome.usual_ms:.1f} ms")
    for line in outcome.wrong:
        click.echo(f"chaos: {line}")
    if folder.is_dir():
        save(outcome, folder / "chaos.json")
    click.echo(f"chaos: {outcome.verdict}")
    sys.exit(outcome.verdict != "good")


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option("-np", "count", type=click.IntRange(1), help="Ranks on this host.")
@click.option("--hosts", "named", metavar="A:2,B:2", help="Hosts with their ranks, by ssh.")
@click.option("--pool", type=click.IntRange(1), help="Slurm jobs of one rank each.")
@click.option("--sbatch", "options", multiple=True, metavar="OPTION", help="For those jobs.")
@click.option("--logs", type=click.Path(file_okay=False, path_type=Path), default=Path("pool"),
              show_default=True, help="Folder for those jobs' logs.")  # fmt: skip
@click.option("--min-np", "least", type=click.IntRange(1),
              help="Ranks to begin with; the others join as they come. Default: all.")  # fmt: skip
@click.option("--starter", metavar="PACKAGE.MODULE:CLASS",
              help="What starts the -np ranks, in place of processes of this host.")  # fmt: skip
@click.option("--address", help="Of this host, by which ranks reach it. Default: found out.")
def launch(
    command: tuple[str, ...],
    count: int | None,
    named: str | None,
    pool: int | None,
    options: tuple[str, ...],
    logs: Path,
    least: int | None,
    starter: str | None,
    address: str | None,
) -> None:
    """Start COMMAND, an `hpctrain train`, on ranks that outlive one another, and keep them up.

    \b
      hpctrain launch -np 4 -- hpctrain train digits
      hpctrain launch --hosts a:2,b:2 -- hpctrain train my_task.py --data shards/
      hpctrain launch --pool 8 --sbatch --gpus=1 -- hpctrain train my_task.py --data shards/

    \b
    In a Slurm job, without any of these, it starts the job's tasks by srun. With --pool every rank
    is a job of its own: one that is lost is submitted again, and takes part as soon as Slurm has a
    node for it. The ranks exchange over Gloo, and take the address of this process from it: it has
    to run to the end, best on a host that none of them uses.
    """
    from hpctrain.launch.launch import launch as run
    from hpctrain.launch.launch import way_for

    def say(text: str) -> None:
        click.echo(f"hpctrain launch: {text}")

    way = way_for(count, named, pool, options, logs, starter)
    sys.exit(run(command, way, least=least, address=address, say=say))
