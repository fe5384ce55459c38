"""Import what people have as a shard set: images, arrays, tables, text, WebDataset, HDF5."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from hpctrain.data.folder_tree import Tree, walk
from hpctrain.data.importers.import_plan import Importer, ImportOptions
from hpctrain.data.importers.tar import TARS, is_tar, reading
from hpctrain.data.importers.work import make
from hpctrain.errors import Error
from hpctrain.registry import Registry
from hpctrain.world.launcher import Launch, detect

if TYPE_CHECKING:
    from hpctrain.data.shards import ShardSet

__all__ = ["ImportOptions", "import_data", "look"]

TEXT_TABLES = (".csv", ".tsv", ".jsonl", ".ndjson")
TABLES = (
    ".parquet",
    ".arrow",
    ".feather",
    ".ipc",
    *TEXT_TABLES,
    *(f"{suffix}.gz" for suffix in TEXT_TABLES),
)
HDF5 = (".h5", ".hdf5", ".hdf")
TEXTS = (".txt", ".md")
HEAD_BYTES = 2**16


def import_data(
    source: Path,
    destination: Path,
    options: ImportOptions,
    launch: Launch | None = None,
    say: Callable[[str], None] | None = None,
) -> ShardSet | None:
    """Make a shard set of what ``source`` holds; several ranks share the work.

    An import that was stopped is gone on with where it was. Whatever the number of ranks, and
    wherever it was stopped, the shard set is the same, byte for byte.

    Args:
        source: A folder of images by class, or a tar of one; WebDataset tars; an ``.npz`` or
            ``.npy``; HDF5; Parquet, Arrow, CSV or JSON Lines, one or a folder; or text.
        destination: The shard set to be.
        options: How.
        launch: This process among those that import together; None: as the launcher says.
        say: Gets the lines of the summary, on rank 0, before samples are read.

    Returns:
        The shard set, on rank 0; None on others, which may be done before it is whole.

    Raises:
        Error: The source is none of these, or something in it cannot be read; no index is written.
    """
    _check(source)

    def open_as(kind: str | None) -> Importer:
        return importer(kind, source, options) if kind else open_source(source, options)

    if make(open_as, source, destination, launch or detect(), say) is None:
        return None
    from hpctrain.data.shards import ShardSet

    return ShardSet(destination)


def look(source: Path, options: ImportOptions) -> list[str]:
    """Return the summary of a source that an import would begin with; nothing is written.

    Args:
        source: As of :func:`import_data`.
        options: How it would be imported.

    Raises:
        Error: It could not be imported.
    """
    _check(source)
    with reading(source):
        return open_source(source, options).survey().summary(options)


def _check(source: Path) -> None:
    if not source.exists():
        raise Error(f"{source} does not exist.", hint="check the path.")
    if not source.is_dir() and not source.is_file():
        raise Error(f"{source} is a pipe, socket or device.", hint="give a file or a folder.")


def open_source(source: Path, options: ImportOptions) -> Importer:
    """Return the importer that reads a source.

    Args:
        source: A file or folder.
        options: How to import it; ``kind`` None: what it holds tells.

    Raises:
        Error: It is of no kind that can be imported, or of several; or a library is missing.
    """
    if (outside := _kind_from_outside(source, options)) is not None:
        return importer(outside, source, options)
    if source.is_dir():
        tree = walk(source)
        return importer(options.kind or _kind_of_folder(source, tree), source, options, tree)
    return importer(_kind_of_file(source, options), source, options)


def _kind_of_file(source: Path, options: ImportOptions) -> str:
    if options.kind in ("tables", "text"):
        return options.kind
    name = source.name.lower()
    if options.kind is None and name.endswith(TABLES):
        return "tables"
    if options.kind is None and name.endswith((".npz", ".npy")):
        return name[-3:]
    if options.kind is None and name.endswith(HDF5):
        return "hdf5"
    if is_tar(source):
        from hpctrain.data.importers.webdataset import is_webdataset

        found = options.kind or ("webdataset" if is_webdataset(source) else "images")
        return "webdataset" if found == "webdataset" else "tar"
    if options.kind is None and name.endswith(TEXTS):
        return "text"
    if options.kind is None and not source.suffix:
        return _kind_of_content(source)
    raise Error(
        f"{source} is of a kind that cannot be imported"
        + (f" as {options.kind}." if options.kind else "."),
        hint="`hpctrain data import --help` lists the kinds.",
    )


def _kind_of_content(source: Path) -> str:
    """Tell the kind of a file whose name does not."""
    with reading(source), source.open("rb") as file:
        head = file.read(HEAD_BYTES)
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            return kind
    if b"\0" in head:
        raise Error(
            f"{source} is no text, and of no other kind that is known by its content.",
            hint="name it by what it is, or give --kind text for rows of its bytes.",
        )
    return "text"


_MAGIC = {b"\x89HDF\r\n\x1a\n": "hdf5", b"PK": "npz", b"\x93NUMPY": "npy", b"PAR1": "tables"}


def _kind_of_folder(source: Path, tree: Tree) -> str:
    from hpctrain.data.importers.images import is_image

    names = tree.files
    held = {
        "images": [name for name in names if is_image(name)],
        "webdataset": [name for name in names if name.lower().endswith(TARS)],
        "tables": [name for name in names if name.lower().endswith(TABLES)],
    }
    kinds = [kind for kind, files in held.items() if files]
    if len(kinds) > 1:
        listing = ", ".join(f"{len(held[k])} for {k} ({held[k][0]}, ...)" for k in kinds)
        raise Error(
            f"{source} holds files of several kinds: {listing}.",
            hint=" or ".join(f"--kind {kind}" for kind in kinds) + " says which to take.",
        )
    return kinds[0] if kinds else "images"


def importer(kind: str, source: Path, options: ImportOptions, tree: Tree | None = None) -> Importer:
    """Return the importer of a kind; the libraries of its format are loaded here, no others.

    Args:
        kind: A name of ``IMPORTERS``, or "images" for a folder of them.
        source: The source.
        options: How to import it.
        tree: What is below the source, if that is known.

    Raises:
        Error: A library is missing.
    """
    name = "folder" if kind == "images" else kind
    try:
        found = IMPORTERS.get(name)
    except Error as error:
        if kind != "tables" or not isinstance(error.__cause__, ImportError):
            raise
        raise Error(
            f"{source} needs pyarrow to be read, which is not installed ({error.__cause__}).",
            hint="pip install pyarrow",
        ) from error
    made: Importer = found(source, options, kind, tree)
    return made


def _kind_from_outside(source: Path, options: ImportOptions) -> str | None:
    """An importer that is not hpctrain's, if one is asked for, or claims the source."""
    own = IMPORTERS.names(builtin_alone=True)
    if options.kind is not None:
        return options.kind if options.kind not in (*KINDS, *own) else None
    others = [name for name in IMPORTERS.names() if name not in own]
    return next((name for name in others if IMPORTERS.get(name).claims(source)), None)


KINDS = ("images", "webdataset", "tables", "text")
"""What a source can be said to be, where it could be read in several ways."""

IMPORTERS = Registry(
    "importer",
    "hpctrain.importers",
    {
        "folder": "hpctrain.data.importers.images:FolderImages",
        "tar": "hpctrain.data.importers.images:TarImages",
        "webdataset": "hpctrain.data.importers.webdataset:WebDataset",
        "tables": "hpctrain.data.importers.tables:Tables",
        "npz": "hpctrain.data.importers.arrays:Npz",
        "npy": "hpctrain.data.importers.arrays:Npy",
        "hdf5": "hpctrain.data.importers.hdf5:Hdf5",
        "text": "hpctrain.data.importers.text:Text",
    },
)
