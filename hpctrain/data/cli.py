"""The commands `hpctrain data ...`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hpctrain.errors import Error


@click.group("data")
def group() -> None:
    """Make HDF5 shards of your data, check them, and measure how they are read."""


@group.command("import")
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
@click.option(
    "--kind",
    metavar="KIND",
    help="What SOURCE is, where it could be read in several ways: images, webdataset, tables, "
    "text; or an importer of your own, package.module:Class.",
)
@click.option("--fields", default="", help="Arrays, columns or members to take, with commas.")
@click.option(
    "--no-splits", is_flag=True, help="Words such as train and test in names tell no splits."
)
@click.option(
    "--classes",
    type=click.Choice(["first", "last", "path", "none"]),
    help="Folder that names an image's class: the first below the split, the last, all; or none.",
)
@click.option(
    "--pixels",
    type=click.Choice(["rgb", "gray", "keep"]),
    default="rgb",
    show_default=True,
    help="What images become: 8 bits of three channels or one, or their own bits and channels.",
)
@click.option("--delimiter", help="Between a table's columns; \\t is a tab.  [default: a comma]")
@click.option(
    "--header/--no-header", default=None, help="Whether a table's first line names its columns."
)
@click.option("--decimal", default=".", show_default=True, help="A table's decimal mark.")
@click.option(
    "--missing",
    help="What stands for missing whole numbers: a number, or nan, for floats.",
)
@click.option("--dry-run", is_flag=True, help="Say what SOURCE holds; write nothing.")
def data_import(
    source: Path,
    destination: Path,
    shard_mib: int | None,
    fields: str,
    no_splits: bool,
    delimiter: str | None,
    dry_run: bool,
    **choices: Any,
) -> None:
    """Turn SOURCE into a shard set in the folder DESTINATION.

    \b
    SOURCE is one of:
      a folder of images, or a tar of one: [train|test|validation/]CLASS/NAME.jpg
      a WebDataset tar, or a folder of them: KEY.jpg, KEY.cls, KEY.json, ...
      an .npz or .npy: x_train, y_train, x_test, ... or x, y; one row a sample
      a .csv, .tsv, .jsonl, .parquet, .arrow or .feather, or a folder of them: one column a field
      an .h5 or .hdf5: one dataset a field (`hpctrain data adopt` uses it where it is)
      a text: rows of bytes for a language model

    What was made of it is said before it is read: fields, splits, classes, what was left out. What
    can be read in several ways is refused with the options that decide.

    Interrupted, it goes on where it was when given again. Under a launcher the work is divided:
    mpirun -np 8 hpctrain data import SOURCE DESTINATION makes the very same shard set.
    """
    from hpctrain.data.importers import ImportOptions, import_data, look

    options = ImportOptions(
        shard_bytes=shard_mib * 2**20 if shard_mib else None,
        fields=_names(fields),
        names_tell_splits=not no_splits,
        delimiter="\t" if delimiter == "\\t" else delimiter,
        **choices,
    )
    if dry_run:
        for line in look(source, options):
            click.echo(line)
        return
    shards = import_data(source, destination, options, say=click.echo)
    if shards is not None:
        _describe(shards)


def _names(listed: str) -> tuple[str, ...]:
    return tuple(name.strip().strip("/") for name in listed.split(",") if name.strip())


@group.command()
@click.argument("sources", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Folder for the index to write."
)
@click.option("--fields", default="", help="Datasets to take, with commas; else all of numbers.")
@click.option("--no-checksums", is_flag=True, help="Do not read the files; `verify` knows less.")
@click.option(
    "--no-splits", is_flag=True, help="Words such as train and test in names tell no splits."
)
@click.option("--dry-run", is_flag=True, help="Say what SOURCES hold; write nothing.")
def adopt(
    sources: tuple[Path, ...],
    out: Path,
    fields: str,
    no_checksums: bool,
    no_splits: bool,
    dry_run: bool,
) -> None:
    """Use HDF5 files as a shard set where they are: write an index, copy nothing.

    SOURCES are files, or folders of *.h5 and *.hdf5. Datasets with as many rows are the fields of
    a file's samples; names such as x_train or test/x tell splits.
    """
    from hpctrain.data.adopt import adopt as adopt_files
    from hpctrain.data.adopt import look

    names, told = _names(fields), not no_splits
    if dry_run:
        for line in look(sources, fields=names, names_tell_splits=told):
            click.echo(line)
        return
    shards = adopt_files(
        sources,
        out,
        fields=names,
        checksums=not no_checksums,
        names_tell_splits=told,
        say=click.echo,
    )
    _describe(shards)


@group.command()
@click.argument("path", type=click.Path(path_type=Path))
def info(path: Path) -> None:
    """Say what the shard set PATH holds."""
    from hpctrain.data.shards import ShardSet

    _describe(ShardSet(path))


def _describe(shards: Any) -> None:
    from hpctrain.data.summary import shown

    for split in shards.splits.values():
        fields = ", ".join(f"{shown(name)} {spec}" for name, spec in split.fields.items())
        entries = shards.index.splits[split.name].shards
        size = sum(entry.bytes for entry in entries)
        click.echo(
            f"{shards.path}/{split.name}: {len(split)} samples of {fields}; "
            f"{len(entries)} shards, {size / 1e6:.1f} MB"
        )


@group.command()
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


@group.command()
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


@group.command()
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
