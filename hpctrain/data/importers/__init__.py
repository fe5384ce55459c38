"""Turning what people have into a shard set: images, arrays, tables, text, WebDataset, HDF5."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hpctrain.data.importers.plan import Importer, ImportOptions
from hpctrain.data.importers.tar import is_tar
from hpctrain.data.importers.work import make
from hpctrain.errors import Error
from hpctrain.launcher import Launch, detect

if TYPE_CHECKING:
    from hpctrain.data.shards import ShardSet

__all__ = ["ImportOptions", "import_data"]

TABLES = (".parquet", ".csv")
HDF5 = (".h5", ".hdf5", ".hdf")
TEXTS = (".txt", ".md", "")
TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


def import_data(
    source: Path, destination: Path, options: ImportOptions, launch: Launch | None = None
) -> ShardSet | None:
    """Make a shard set of what ``source`` holds; several ranks share the work.

    An import that was stopped is gone on with where it was. Whatever the number of ranks, and
    wherever it was stopped, the shard set is the same, byte for byte.

    Args:
        source: A folder of images by class, or a tar of one; WebDataset tars; an ``.npz`` or
            ``.npy``; HDF5; Parquet or CSV, one or a folder; or text.
        destination: The shard set to be.
        options: How.
        launch: This process among those that import together; None: as the launcher says.

    Returns:
        The shard set, on rank 0; None on others, which may be done before it is whole.

    Raises:
        Error: The source is none of these, or something in it cannot be read; no index is written.
    """
    if not source.exists():
        raise Error(f"{source} does not exist.", hint="check the path.")
    if make(importer_of(source, options), destination, launch or detect()) is None:
        return None
    from hpctrain.data.shards import ShardSet

    return ShardSet(destination)


def importer_of(source: Path, options: ImportOptions) -> Importer:
    """What reads a source. The libraries of its format are loaded here, no others.

    Raises:
        Error: It is of no kind that can be imported, or a library is missing.
    """
    suffix = source.suffix.lower()
    if source.is_dir():
        names = [file.name.lower() for file in source.iterdir()]
        if any(name.endswith(TABLES) for name in names):
            return _tables(source, options)
        if any(name.endswith(TARS) for name in names):
            from hpctrain.data.importers.webdataset import WebDataset

            return WebDataset(source, options)
        from hpctrain.data.importers.images import FolderImages

        return FolderImages(source, options)
    if suffix in TABLES:
        return _tables(source, options)
    if suffix in (".npz", ".npy"):
        from hpctrain.data.importers.arrays import Npy, Npz

        return (Npz if suffix == ".npz" else Npy)(source, options)
    if suffix in HDF5:
        from hpctrain.data.importers.hdf5 import Hdf5

        return Hdf5(source, options)
    if is_tar(source):
        from hpctrain.data.importers.images import TarImages
        from hpctrain.data.importers.webdataset import WebDataset, is_webdataset

        return (WebDataset if is_webdataset(source) else TarImages)(source, options)
    if suffix in TEXTS:
        from hpctrain.data.importers.text import Text

        return Text(source, options)
    raise Error(
        f"{source} is of a kind that cannot be imported.",
        hint="`hpctrain data import --help` lists the kinds.",
    )


def _tables(source: Path, options: ImportOptions) -> Importer:
    try:
        from hpctrain.data.importers.tables import Tables
    except ImportError as error:
        raise Error(
            f"{source} needs pyarrow to be read, which is not installed ({error}).",
            hint="pip install pyarrow",
        ) from error
    return Tables(source, options)
