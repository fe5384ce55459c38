"""The `hpctrain` command. Imports happen inside commands, so that `--help` costs no torch."""

from __future__ import annotations

import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

import click

from hpctrain import __version__, failure, garbage, process
from hpctrain.errors import Error
from hpctrain.launcher import detect
from hpctrain.model import cli as model
from hpctrain.slurm import cli as slurm

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
    help="How replicas agree: single, horovod, ps, or auto (horovod on several ranks).",
)
@click.option("--servers", metavar="N", help="With ps: ranks that hold parameters.")
@click.option("--consistency", metavar="MODE", help="With ps: sync, async, ssp:S, or backup:B.")
@click.option("--replicas", metavar="N", help="With ps: copies of each slice on other servers.")
@click.option(
    "--elastic",
    metavar="HOW",
    help="With horovod, when a rank is lost: off, auto, ulfm, gloo, restart.",
)
@click.option(
    "--trace-samples", is_flag=True, default=None, help="Write which samples each step consumed."
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
@click.option("--dtype", metavar="TYPE", help="float32, float64, or bf16 (autocast).")
@click.option("--world-size", metavar="N", help="Ranks there must be; any other world is refused.")
@click.option(
    "--resume", metavar="auto|PATH", help="Newest good checkpoint of --out, if any; or a path."
)
@click.option("--config", "config_path", metavar="FILE", help="TOML file of configuration keys.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any other key.")
def train(config_path: str | None, settings: tuple[str, ...], **flags: Any) -> None:
    """Train TASK: a ready one, my_task.py[:Name], or package.module:Name.

    \b
    Ready tasks: digits (default; needs no data), cifar10, charlm, resnet50-synthetic.

    \b
    Every rank runs this same command; the launcher says how many there are:
      hpctrain train digits
      horovodrun -np 2 hpctrain train digits
      mpirun -np 2 hpctrain train cifar10 --data shards/ --epochs 10
      mpirun -np 6 hpctrain train cifar10 --strategy ps --servers 2 --consistency ssp:3
      srun --mpi=pmix hpctrain train my_task.py --config run.toml --resume auto

    \b
    A key is set by, later ones winning: the task's defaults, --config, the environment
    (HPCTRAIN__TRAIN__EPOCHS=3), --set train.epochs=3, the flags here.
    `hpctrain config [TASK]` lists every key with its meaning and value.

    \b
    Exit codes: 0 completed (result.json is there), 75 asked to stop (--resume auto goes on),
    2 something you can put right, 1 anything else.
    """
    with garbage.none_before_training():
        from hpctrain.run import configure, run

        code = run(configure(_layers(config_path, settings, flags)), say=click.echo)
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
    "record_order": "ps.record_order",
    "replay": "ps.replay",
}


def _layers(
    config_path: str | None, settings: tuple[str, ...], flags: dict[str, Any]
) -> list[tuple[str, dict[str, Any]]]:
    from hpctrain.config import put, read_environment, read_settings, read_toml, value_of

    given: dict[str, Any] = {}
    texts = (
        "data_path", "on_bad_shard", "out", "resume", "task", "strategy", "dtype", "consistency",
        "record_order", "replay", "elastic",
    )  # fmt: skip
    for flag, value in flags.items():
        if value is not None:
            plain = flag in texts or not isinstance(value, str)
            put(given, _FLAG_KEYS.get(flag, flag), value if plain else value_of(value))
    return [
        *([(config_path, read_toml(Path(config_path)))] if config_path else []),
        ("environment", read_environment()),
        ("--set", read_settings(settings)),
        ("command line", given),
    ]


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


@cli.group()
def data() -> None:
    """Make HDF5 shards of your data, check them, and measure how they are read."""


@data.command("import")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("destination", type=click.Path(path_type=Path))
@click.option(
    "--shard-mib",
    type=click.IntRange(1),
    help="About the size of a shard; else chosen so that there are some 64.",
)
@click.option(
    "--compression",
    type=click.Choice(["none", "lz4", "zstd"]),
    default="none",
    show_default=True,
    help="Of what does compress: counts, masks, sparse fields; not photographs.",
)
@click.option("--resize", type=click.IntRange(1), help="Scale images to N x N pixels.")
@click.option(
    "--keep-encoded", is_flag=True, help="Store image files as they are, to decode in training."
)
@click.option(
    "--validation-fraction",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.1,
    show_default=True,
    help="Part held out where the data have no splits of their own.",
)
@click.option(
    "--sequence-length",
    type=click.IntRange(1),
    default=128,
    show_default=True,
    help="Characters that a text sample predicts.",
)
def data_import(
    source: Path,
    destination: Path,
    shard_mib: int | None,
    compression: Any,
    resize: int | None,
    keep_encoded: bool,
    validation_fraction: float,
    sequence_length: int,
) -> None:
    """Turn SOURCE into a shard set in the folder DESTINATION.

    \b
    SOURCE is one of:
      a folder of images, or a tar of one: [train|test|validation/]CLASS/NAME.jpg
      a WebDataset tar, or a folder of them: KEY.jpg, KEY.cls, KEY.json, ...
      an .npz or .npy: x_train, y_train, x_test, ... or x, y; one row a sample
      a .csv or .parquet, or a folder of them: one column a field
      an .h5 or .hdf5: one dataset a field (`hpctrain data adopt` uses it where it is)
      a text: rows of bytes for a language model

    Interrupted, it goes on where it was when given again. Under a launcher the work is divided:
    mpirun -np 8 hpctrain data import SOURCE DESTINATION makes the very same shard set.
    """
    from hpctrain.data.importers import ImportOptions, import_data

    options = ImportOptions(
        shard_bytes=shard_mib * 2**20 if shard_mib else None,
        compression=compression,
        resize=resize,
        keep_encoded=keep_encoded,
        validation_fraction=validation_fraction,
        sequence_length=sequence_length,
    )
    shards = import_data(source, destination, options)
    if shards is not None:
        _describe(shards)


@data.command()
@click.argument("sources", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Folder for the index to write."
)
@click.option("--fields", default="", help="Datasets to take, with commas; else all of numbers.")
@click.option("--no-checksums", is_flag=True, help="Do not read the files; `verify` knows less.")
def adopt(sources: tuple[Path, ...], out: Path, fields: str, no_checksums: bool) -> None:
    """Use HDF5 files as a shard set where they are: write an index, copy nothing.

    SOURCES are files, or folders of *.h5 and *.hdf5. Datasets with as many rows are the fields of
    a file's samples; names such as x_train or test/x tell splits.
    """
    from hpctrain.data.adopt import adopt as adopt_files

    names = tuple(name.strip().strip("/") for name in fields.split(",") if name.strip())
    _describe(adopt_files(sources, out, fields=names, checksums=not no_checksums))


@data.command()
@click.argument("path", type=click.Path(path_type=Path))
def info(path: Path) -> None:
    """Say what the shard set PATH holds."""
    from hpctrain.data.shards import ShardSet

    _describe(ShardSet(path))


def _describe(shards: Any) -> None:
    for split in shards.splits.values():
        fields = ", ".join(f"{name} {spec}" for name, spec in split.fields.items())
        entries = shards.index.splits[split.name].shards
        size = sum(entry.bytes for entry in entries)
        click.echo(
            f"{shards.path}/{split.name}: {len(split)} samples of {fields}; "
            f"{len(entries)} shards, {size / 1e6:.1f} MB"
        )


@data.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--threads", type=click.IntRange(1), help="Shards at a time. Default: one a core.")
def verify(path: Path, threads: int | None) -> None:
    """Compare every byte of the shard set PATH with its checksums.

    Each shard that differs is a line that says how; the exit code is then 2.
    """
    from hpctrain.data.verify import verify as verify_set

    verdicts = verify_set(path, threads=threads)
    for verdict in verdicts:
        click.echo(f"{verdict.path}: {verdict.reason}")
    if verdicts:
        samples = sum(verdict.samples for verdict in verdicts)
        raise Error(
            f"{len(verdicts)} of the shards of {path} are bad, with {samples} samples.",
            hint="import the data again, or train without them by --on-bad-shard skip.",
        )
    click.echo(f"{path}: every byte is as it was written.")


@data.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.argument("stage_dir", type=click.Path(path_type=Path))
@click.option("--remove", is_flag=True, help="Remove the copies instead.")
@click.option(
    "--timeout-seconds", type=float, default=600.0, show_default=True, help="Longest standstill."
)
def stage(path: Path, stage_dir: Path, remove: bool, timeout_seconds: float) -> None:
    """Copy the shard set PATH to STAGE_DIR on this node's own storage, checking it on the way.

    Training uses the copies when it is given --set data.stage_dir=STAGE_DIR. What does not fit is
    read where it is. On every node of a job: srun --ntasks-per-node=1 hpctrain data stage ...
    """
    from hpctrain.data.stage import stage as stage_set
    from hpctrain.data.stage import unstage

    if remove:
        unstage(path, stage_dir, kept=True)
    else:
        click.echo(str(stage_set(path, stage_dir, keep=True, timeout_seconds=timeout_seconds)))


@data.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--split", default="train", show_default=True)
@click.option("--batch-size", type=click.IntRange(1), default=256, show_default=True)
@click.option("--ranks", type=click.IntRange(1), default=8, show_default=True)
@click.option("--label", default="label", show_default=True, help="Field to measure mixing by.")
@click.option("--seconds", type=float, default=3.0, show_default=True, help="To measure for.")
@click.option("--workers", type=click.IntRange(0), default=2, show_default=True)
def bench(
    path: Path, split: str, batch_size: int, ranks: int, label: str, seconds: float, workers: int
) -> None:
    """Measure how fast the shard set PATH is read here, and how well its order mixes."""
    from hpctrain.data.bench import bench as measure

    report = measure(
        path,
        split,
        batch_size=batch_size,
        ranks=ranks,
        label=label,
        seconds=seconds,
        workers=workers,
    )
    megabytes = report.bytes_per_second / 1e6
    click.echo(
        f"speed            {report.samples_per_second:,.0f} samples/s, {megabytes:,.0f} MB/s"
    )
    click.echo(f"of memory speed  {report.memory_ratio:.0%} (the same gather from RAM, one thread)")
    click.echo(f"first batch      {report.first_batch_ms:.1f} ms after opening")
    click.echo(f"stall            {report.stall_ms:.3f} ms a batch, with a step of 4 ms")
    if report.shuffle_quality is not None:
        click.echo(
            f"shuffle quality  {report.shuffle_quality:.2f} in a batch, {report.drift:.2f} over 16 "
            f"(variance of {label} shares; 1: as a full permutation)"
        )
    if report.amplification is not None:
        click.echo(f"reading          {report.amplification:.2f} times the data, by {ranks} ranks")


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
def trace(run: Path) -> None:
    """Check that RUN, trained with --trace-samples, took every sample once an epoch."""
    from hpctrain.elastic.ledger import check

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


@cli.command(context_settings={"ignore_unknown_options": True})
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

    from hpctrain.elastic.chaos import Chaos, save
    from hpctrain.elastic.faults import draw, parse

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


@cli.command(context_settings={"ignore_unknown_options": True})
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option("-np", "count", type=click.IntRange(1), help="Ranks on this host.")
@click.option("--hosts", "named", metavar="A:2,B:2", help="Hosts with their ranks, by ssh.")
@click.option("--pool", type=click.IntRange(1), help="Slurm jobs of one rank each.")
@click.option("--sbatch", "options", multiple=True, metavar="OPTION", help="For those jobs.")
@click.option("--logs", type=click.Path(file_okay=False, path_type=Path), default=Path("pool"),
              show_default=True, help="Folder for those jobs' logs.")  # fmt: skip
@click.option("--min-np", "least", type=click.IntRange(1),
              help="Ranks to begin with; the others join as they come. Default: all.")  # fmt: skip
@click.option("--address", help="Of this host, by which ranks reach it. Default: found out.")
def launch(
    command: tuple[str, ...],
    count: int | None,
    named: str | None,
    pool: int | None,
    options: tuple[str, ...],
    logs: Path,
    least: int | None,
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
    from hpctrain.elastic.launch import launch as run
    from hpctrain.elastic.launch import way_for

    def say(text: str) -> None:
        click.echo(f"hpctrain launch: {text}")

    way = way_for(count, named, pool, options, logs)
    sys.exit(run(command, way, least=least, address=address, say=say))


@cli.command()
def doctor() -> None:
    """Check this machine: MPI, Horovod, cores, GPUs, HDF5, Slurm; and say what to do."""
    from hpctrain.doctor import examine
    from hpctrain.finding import report

    sys.exit(report(examine()))


@cli.command()
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


@cli.group()
def horovod() -> None:
    """Build Horovod for the torch and MPI installed here, and check it."""


@horovod.command("build")
@click.option("--gpu", is_flag=True, help="Build the NCCL operations (needs CUDA and NCCL).")
@click.option("--rebuild", is_flag=True, help="Build even where the cache holds this very wheel.")
def horovod_build(gpu: bool, rebuild: bool) -> None:
    """Fetch Horovod 0.28.1, patch it, build it, install it, and prove it on 2 ranks.

    \b
    MPI is the one whose mpicxx comes first on PATH. For GPUs, CUDA is taken from CUDA_HOME or
    nvcc's place, and NCCL from NCCL_HOME or the nvidia wheels that came with torch.
    Wheels are cached by all they were built from (HPCTRAIN_CACHE moves the cache).
    """
    from hpctrain.horovod_build.build import build

    build(gpu=gpu, rebuild=rebuild)


@horovod.command("run", context_settings={"ignore_unknown_options": True})
@click.argument("command", nargs=-1, type=click.UNPROCESSED, required=True)
def horovod_run(command: tuple[str, ...]) -> None:
    """Horovodrun COMMAND within a Slurm job: on all of its nodes, through srun instead of ssh."""
    from hpctrain.slurm.horovodrun import become

    become(list(command))


@horovod.command("check")
def horovod_check() -> None:
    """Say what is built into the installed Horovod, against which libraries, and what is wrong."""
    from hpctrain.finding import report
    from hpctrain.horovod_build.check import check

    sys.exit(report(check()))


def _config_of(parameters: dict[str, Any]) -> Any:
    from hpctrain.run import configure

    flags = dict(parameters)
    return configure(_layers(flags.pop("config_path"), flags.pop("settings"), flags))


for command in (
    *slurm.submission(train, _config_of), slurm.job, slurm.group, slurm.trial, slurm.trials,
    slurm.compare, model.command(_config_of),
):  # fmt: skip
    cli.add_command(command)


def main() -> NoReturn:
    """Run the command line; errors of the caller are one line and exit code 2."""
    code = 1
    try:
        code = cli.main(standalone_mode=False) or 0
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else 1
    except Error as error:
        code = error.exit_code
        failure.note(error, code)
        _complain(str(error))
    except click.ClickException as error:
        error.show()
        code = 2
    except (KeyboardInterrupt, click.Abort):
        _complain("interrupted.")
        code = 130
    except Exception as error:
        failure.note(error, 1)
        traceback.print_exc()
        code = 1
    _leave(code)


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
    garbage.leave_alone()  # else the interpreter looks through all modules on its way out
    sys.exit(0)
