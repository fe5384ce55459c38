"""The `hpctrain` command. Imports happen inside commands, so that `--help` costs no torch."""

from __future__ import annotations

import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

import click

from hpctrain import __version__, process
from hpctrain.costmodel import cli as model
from hpctrain.data import cli as data
from hpctrain.errors import Error
from hpctrain.horovod_build import cli as horovod_build
from hpctrain.inference import cli as inference
from hpctrain.launch import cli as elastic
from hpctrain.report import cli as report
from hpctrain.slurm import cli as slurm
from hpctrain.train import gc_control
from hpctrain.world import failure_record
from hpctrain.world.launcher import detect

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.group(context_settings=CONTEXT)
@click.version_option(__version__, prog_name="hpctrain")
def cli() -> None:
    """Train PyTorch models on Slurm and MPI clusters.

    \b
    One process:         hpctrain train digits
    Two, over Horovod:   horovodrun -np 2 hpctrain train digits
    Two, under MPI:      mpirun -np 2 hpctrain train my_task.py --data shards/
    As a Slurm job:      hpctrain submit digits --nodes 3
    Which strategy?      hpctrain advise digits --nodes 8 --network 10Gbit
    Is all well here?    hpctrain doctor
    """


@cli.command()
@click.argument("task", required=False)
@click.option(
    "--strategy",
    metavar="NAME",
    help="How replicas agree: auto, one that `hpctrain strategies` lists, or package.mod:Name.",
)
@click.option("--servers", metavar="N", help="With ps: ranks that hold parameters.")
@click.option(
    "--consistency",
    metavar="MODE",
    help="With ps: sync, async, ssp:S, backup:B, or package.module:Class.",
)
@click.option("--replicas", metavar="N", help="With ps: copies of each slice on other servers.")
@click.option(
    "--mesh",
    metavar="AXES",
    help="With mesh: its axes, such as dp=2,pp=2,tp=2, and shard=parameters.",
)
@click.option(
    "--elastic",
    metavar="HOW",
    help="With horovod, when a rank is lost: off, auto, ulfm, gloo, restart.",
)
@click.option(
    "--trace-samples", is_flag=True, default=None, help="Write which samples each step consumed."
)
@click.option(
    "--callback",
    "callbacks",
    multiple=True,
    metavar="NAME",
    help="Do more at a run's events: statistics, summary, samples, time-budget,minutes=50, or "
    "package.mod:Name. Repeatable.",
)
@click.option(
    "--profile", is_flag=True, default=None, help="Trace a few steps by torch's profiler."
)
@click.option("--record-order", metavar="DIR", help="With ps: record the order of pushes.")
@click.option("--replay", metavar="DIR", help="With ps: repeat a recorded run bit for bit.")
@click.option(
    "--data", "data_path", metavar="DIR", help="Shard set made by `hpctrain data import`."
)
@click.option("--out", metavar="DIR", help="Run folder. Default: runs/TASK-TIME.")
@click.option("--epochs", metavar="N", help="Passes over the training samples.")
@click.option("--steps", metavar="N", help="Optimizer steps; decides instead of --epochs.")
@click.option("--batch-size", metavar="N", help="Global batch, over all ranks together.")
@click.option("--lr", metavar="RATE", help="Peak learning rate.")
@click.option(
    "--on-bad-shard", metavar="stop|skip", help="skip: go on without unreadable shards' samples."
)
@click.option("--seed", metavar="N", help="Start values, sample order, augmentation.")
@click.option("--dtype", metavar="TYPE", help="float32, float64, or bf16 or fp16 (autocast).")
@click.option("--world-size", metavar="N", help="Ranks there must be; any other world is refused.")
@click.option(
    "--resume", metavar="auto|PATH", help="Newest good checkpoint of --out, if any; or a path."
)
@click.option(
    "--init-from",
    metavar="SOURCE",
    help="Begin with the weights of a run, a checkpoint, or a file.",
)
@click.option(
    "--init-partial", is_flag=True, default=None, help="Of those, what fits by name and shape."
)
@click.option("--config", "config_path", metavar="FILE", help="TOML file of configuration keys.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any other key.")
@click.option(
    "--dry-run", is_flag=True, default=None, help="Take one batch through all of it; write nothing."
)
def train(
    config_path: str | None, settings: tuple[str, ...], dry_run: bool | None, **flags: Any
) -> None:
    """Train TASK: a ready one, my_task.py[:Name], or package.module:Name.

    \b
    Ready tasks: digits (default; needs no data), dlrm (likewise), cifar10, charlm, gpt,
    resnet50-synthetic.

    \b
    Every rank runs this same command; the launcher says how many there are:
      hpctrain train digits
      horovodrun -np 2 hpctrain train digits
      mpirun -np 2 hpctrain train cifar10 --data shards/ --epochs 10
      mpirun -np 6 hpctrain train cifar10 --strategy ps --servers 2 --consistency ssp:3
      mpirun -np 4 hpctrain train gpt --data shards/ --strategy mesh --mesh dp=2,pp=2
      srun --mpi=pmix hpctrain train my_task.py --config run.toml --resume auto

    \b
    A key is set by, later ones winning: the task's defaults, --config, the environment
    (HPCTRAIN__TRAIN__EPOCHS=3), --set train.epochs=3, the flags here.
    `hpctrain config [TASK]` lists every key with its meaning and value.

    \b
    Exit codes: 0 completed (result.json is there), 75 asked to stop (--resume auto goes on),
    2 something you can put right, 1 anything else.
    """
    with gc_control.none_before_training():
        from hpctrain.run import configure, run

        resolved = configure(_layers(config_path, settings, flags))
        if dry_run:
            from hpctrain.train.dry_run import dry_run as rehearse

            rehearse(resolved, say=click.echo)
            return
        code = run(resolved, say=click.echo)
    if code:
        sys.exit(code)


_FLAG_KEYS = {
    "data_path": "data.path",
    "on_bad_shard": "data.on_bad_shard",
    "epochs": "train.epochs",
    "steps": "train.steps",
    "batch_size": "train.batch_size",
    "lr": "optimizer.lr",
    "dtype": "train.dtype",
    "servers": "ps.servers",
    "consistency": "ps.consistency",
    "replicas": "ps.replicas",
    "elastic": "elastic.mode",
    "trace_samples": "log.trace_samples",
    "init_from": "init.source",
    "init_partial": "init.partial",
    "profile": "log.profile",
    "callbacks": "train.callbacks",
    "record_order": "ps.record_order",
    "replay": "ps.replay",
}


def _layers(
    config_path: str | None, settings: tuple[str, ...], flags: dict[str, Any]
) -> list[tuple[str, dict[str, Any]]]:
    from hpctrain.config import put, read_environment, read_settings, read_toml, value_of

    given: dict[str, Any] = {}
    if (axes := flags.pop("mesh", None)) is not None:
        given["mesh"] = _axes(axes)
    texts = (
        "data_path", "on_bad_shard", "out", "resume", "task", "strategy", "dtype", "consistency",
        "record_order", "replay", "elastic", "init_from",
    )  # fmt: skip
    for flag, value in flags.items():
        if value is not None and value != ():
            key = _FLAG_KEYS.get(flag, flag)
            if isinstance(value, tuple):
                put(given, key, list(value))
                continue
            plain = flag in texts or not isinstance(value, str)
            put(given, key, value if plain else value_of(value))
    return [
        *([(config_path, read_toml(Path(config_path)))] if config_path else []),
        ("environment", read_environment()),
        ("--set", read_settings(settings)),
        ("command line", given),
    ]


def _axes(text: str) -> dict[str, Any]:
    """Take ``dp=2,pp=2`` apart."""
    from hpctrain.config import value_of

    pairs = [pair.partition("=") for pair in text.split(",")]
    if not all(name and value for name, _, value in pairs):
        raise Error(f"--mesh {text!r} is not NAME=VALUE,...", hint="for example --mesh dp=2,pp=2.")
    return {name.strip(): value_of(value.strip()) for name, _, value in pairs}


@cli.command()
@click.argument("task", required=False)
@click.option("--config", "config_path", metavar="FILE", help="TOML file of configuration keys.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any other key.")
def config(task: str | None, config_path: str | None, settings: tuple[str, ...]) -> None:
    """List every configuration key, with its meaning and the value it has for TASK, as TOML."""
    from hpctrain.config import reference
    from hpctrain.run import configure

    resolved = configure(_layers(config_path, settings, {"task": task}))
    click.echo(reference(resolved), nl=False)


@cli.command()
@click.argument("path", metavar="TASK-FILE", default="my_task.py", type=click.Path(path_type=Path))
def init(path: Path) -> None:
    """Write a task to begin with (default: my_task.py), and beside it run.toml and job.sbatch.

    They train as they are; comments say what to replace.
    """
    from hpctrain.tasks.starter import write_starter

    files = write_starter(path)
    click.echo(f"wrote {', '.join(map(str, files))}")
    where = "" if path.parent == Path() else f"cd {path.parent} && "
    click.echo(f"next: {where}hpctrain train --config {files[1].name} --dry-run")


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def strategies(as_json: bool) -> None:
    """List the strategies by which replicas can agree, a line each.

    Packages add theirs by entry points of the group hpctrain.strategies. One of your own needs
    neither: --strategy package.module:Class.
    """
    import json

    from hpctrain.strategies import summaries

    found = summaries()
    if as_json:
        click.echo(json.dumps([{"name": name, "summary": text} for name, text in found.items()]))
        return
    width = max(map(len, found))
    for name, text in found.items():
        click.echo(f"{name:{width}}  {text}")


@cli.command()
@click.argument("source", metavar="RUN|CHECKPOINT", type=click.Path(path_type=Path))
@click.argument("out", metavar="FILE", type=click.Path(path_type=Path))
@click.option(
    "--which", metavar="best|newest", help="Of a run's checkpoints. Default: best, if there is one."
)
def export(source: Path, out: Path, which: str | None) -> None:
    """Write a trained model's parameters and buffers as a plain safetensors FILE.

    They are those that the run's metric is of: the averaged ones, where train.ema_decay was set.
    `hpctrain.load(RUN)` gives the model itself, in a program.
    """
    from hpctrain.checkpoint.weights import export as write
    from hpctrain.checkpoint.weights import read_weights

    weights = read_weights(source, which, lambda text: click.echo(text, err=True))
    for name in write(weights, out):
        click.echo(f"warning: '{name}' is left out: it is no tensor.", err=True)
    size = out.stat().st_size / 1e6
    click.echo(f"{out}: {weights.kind} of {weights.folder}, {size:.3g} MB")


@cli.command()
def doctor() -> None:
    """Check this machine: MPI, Horovod, cores, GPUs, HDF5, Slurm; and say what to do."""
    from hpctrain.doctor import examine
    from hpctrain.world.check_result import report

    sys.exit(report(examine()))


def _config_of(parameters: dict[str, Any]) -> Any:
    from hpctrain.run import configure

    flags = {name: value for name, value in parameters.items() if name != "dry_run"}
    return configure(_layers(flags.pop("config_path"), flags.pop("settings"), flags))


for command in (
    inference.evaluate, inference.predict,
    data.group, elastic.trace, elastic.chaos, elastic.launch, horovod_build.group,
    *slurm.submission(train, _config_of), slurm.job, slurm.group, slurm.trial, slurm.trials,
    report.compare, report.report, report.runs, model.command(_config_of),
):  # fmt: skip
    cli.add_command(command)


def main() -> NoReturn:
    """Run the command line; errors of the caller are one line and exit code 2."""
    _open_streams()
    code = 1
    try:
        code = cli.main(standalone_mode=False) or 0
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else 1
    except Error as error:
        code = error.exit_code
        failure_record.note(error, code)
        _complain(str(error))
    except click.ClickException as error:
        error.show()
        code = 2
    except (KeyboardInterrupt, click.Abort):
        _complain("interrupted.")
        code = 130
    except Exception as error:
        failure_record.note(error, 1)
        click.echo(_traceback(error), nl=False, err=True)
        code = 1
    _leave(code)


def _open_streams() -> None:
    """Have somewhere to write to where the caller closed it, and a way to write any path's name."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            descriptor = os.open(os.devnull, os.O_RDWR)
            stream = os.fdopen(descriptor, "w")
            if descriptor != number:
                os.dup2(descriptor, number)
            setattr(sys, name, stream)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _traceback(error: BaseException) -> str:
    """An exception's traceback, from the first line that is the user's own, if there is one."""
    shown = traceback.TracebackException.from_exception(error)
    ours = (str(Path(__file__).parent), str(Path(click.__file__).parent), sys.argv[0])
    own = [n for n, frame in enumerate(shown.stack) if not frame.filename.startswith(ours)]
    if own:
        shown.stack = traceback.StackSummary.from_list(list(shown.stack)[own[0] :])
    return "".join(shown.format())


def _complain(text: str) -> None:
    launch = detect()
    if launch.rank > 0:
        # What is wrong on every rank is said once: the launcher ends the others when rank 0 fails.
        time.sleep(1.0)
    where = f" [rank {launch.rank} on {os.uname().nodename}]" if launch.rank > 0 else ""
    click.echo(f"hpctrain: error:{where} {text}", err=True)


def _leave(code: int) -> NoReturn:
    """End this process; on failure at once, because tearing MPI down would wait for the others."""
    sys.stdout.flush()
    sys.stderr.flush()
    if code != 0 and process.abort is not None:
        process.abort(code)
    if code != 0 or not process.mpi_is_whole:
        os._exit(code)
    gc_control.leave_alone()  # else the interpreter looks through all modules on its way out
    sys.exit(0)
