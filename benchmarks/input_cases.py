"""The cases of benchmarks/input.py: the data each reads, and how it is opened and measured.

Each case runs in a process of its own, which benchmarks/input.py starts:

    python -m benchmarks.input_cases JOB RESULT.json

A job is JSON: either data to be made, or one case to be measured. Data are made once, all layouts
from the same raw files; the label of a sample is its number.
"""

from __future__ import annotations

import functools
import importlib
import io
import itertools
import json
import math
import shutil
import statistics
import sys
import tarfile
import time
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from numpy.typing import NDArray

from hpctrain.data.batch import Batch
from hpctrain.data.chunks import ChunkedDataset
from hpctrain.data.loader import Loader
from hpctrain.data.normalize import normalize
from hpctrain.data.prefetch import JOB_BATCHES, JOB_BYTES
from hpctrain.data.shards import ShardSet
from hpctrain.data.writer import ShardWriter

BATCH = 256
WORKERS = 2
SHARDS = 8
MANY_SHARD_SAMPLES = 50
STEP_SECONDS = 0.004
STRETCHES = 3
# By channel, in values of 0 to 255; which ones does not matter, but all use the same.
MEAN = (125.3, 123.0, 113.9)
STD = (63.0, 62.1, 66.7)
DELIVERIES = ("uint8", "float32")
# Samples at a time, where data are made.
AT_A_TIME = 250

Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]
"""Images and labels."""
Epoch = Callable[[], Batches]
"""Calling it is not timed, iterating over what it returns is."""


@dataclass(frozen=True)
class Size:
    """What a sample is, and how many there are."""

    shape: tuple[int, int, int]
    samples: int
    quick_samples: int

    @property
    def bytes(self) -> int:
        """The bytes of a sample."""
        return math.prod(self.shape)


SIZES = {
    "small": Size((32, 32, 3), 50_000, 2_100),
    "large": Size((224, 224, 3), 2_000, 300),
}


@dataclass(frozen=True)
class Data:
    """Samples of one size, in many layouts.

    Attributes:
        root: Where all data are.
        name: Of the size.
        quick: Few of them.
    """

    root: Path
    name: str
    quick: bool

    @property
    def size(self) -> Size:
        """The size, by its name."""
        return SIZES[self.name]

    @property
    def samples(self) -> int:
        """The number of samples."""
        return self.size.quick_samples if self.quick else self.size.samples

    def folder(self, layout: str) -> Path:
        """Return where a layout's files are."""
        return self.root / f"{self.name}-{self.samples}" / layout

    def marker(self, layout: str) -> Path:
        """Return the file that is there once the layout has been made."""
        return self.root / f"{self.name}-{self.samples}" / f"{layout}.made"

    def images(self, layout: str) -> NDArray[np.uint8]:
        """``raw`` or ``counts``, mapped: shape (samples, height, width, channels)."""
        file = self.folder(layout) / "images.bin"
        return np.memmap(file, np.uint8, mode="r", shape=(self.samples, *self.size.shape))

    def labels(self) -> NDArray[np.int64]:
        """Each sample's is its number."""
        return np.arange(self.samples, dtype=np.int64)

    def parts(self, samples: int) -> Iterator[slice]:
        """Yield all samples, so many at a time."""
        for start in range(0, self.samples, samples):
            yield slice(start, min(start + samples, self.samples))

    @property
    def shard_samples(self) -> int:
        """In each of a few shards."""
        return -(-self.samples // SHARDS)


# ---- making the data -----------------------------------------------------------------------------


def make_raw(data: Data, folder: Path) -> None:
    """Make random bytes, which no codec makes smaller; so are photographs, nearly."""
    rng = np.random.default_rng(0)
    with (folder / "images.bin").open("wb") as file:
        for part in data.parts(AT_A_TIME):
            file.write(rng.bytes((part.stop - part.start) * data.size.bytes))
    data.labels().tofile(folder / "labels.bin")


def make_counts(data: Data, folder: Path) -> None:
    """Make counts of mean 1.5, as detectors give them: they compress well."""
    rng = np.random.default_rng(0)
    # The inverse of Poisson's distribution to 16 bits: many times as fast as numpy's own.
    terms = [math.exp(-1.5) * 1.5**k / math.factorial(k) for k in range(30)]
    counts = np.searchsorted(np.cumsum(terms), (np.arange(2**16) + 0.5) / 2**16).astype(np.uint8)
    with (folder / "images.bin").open("wb") as file:
        for part in data.parts(AT_A_TIME):
            values = (part.stop - part.start) * data.size.bytes
            file.write(counts[rng.integers(0, 2**16, values, dtype=np.uint16)].data)


def make_h5(data: Data, folder: Path) -> None:
    """Make one plain HDF5 file, contiguous."""
    with h5py.File(folder / "data.h5", "w") as file:
        file["labels"] = data.labels()
        images = file.create_dataset("images", (data.samples, *data.size.shape), np.uint8)
        for part in data.parts(AT_A_TIME):
            images[part] = data.images("raw")[part]


def make_shards(
    data: Data, folder: Path, *, layout: str = "raw", compression: Any = "none", samples: int = 0
) -> None:
    """Make shards of hpctrain."""
    samples = samples or data.shard_samples
    images, labels = data.images(layout), data.labels()
    folder.rmdir()
    with ShardWriter(
        folder, shard_bytes=samples * data.size.bytes, compression=compression
    ) as writer:
        for part in data.parts(samples):
            writer.write("train", {"image": np.array(images[part]), "label": labels[part]})


def make_mds(data: Data, folder: Path) -> None:
    """Make shards of MosaicML's: arrays of fixed shape, and integers."""
    import_peer("streaming")
    from streaming import MDSWriter

    height, width, channels = data.size.shape
    columns = {"image": f"ndarray:uint8:{height},{width},{channels}", "label": "int"}
    limit = data.shard_samples * (data.size.bytes + 16)
    with MDSWriter(out=str(folder), columns=columns, size_limit=limit) as writer:
        for label, image in enumerate(data.images("raw")):
            writer.write({"image": np.asarray(image), "label": label})


def make_tar(data: Data, folder: Path) -> None:
    """Make shards of WebDataset's: the bytes of each image, and its label as text."""
    images = data.images("raw")
    for number, part in enumerate(data.parts(data.shard_samples)):
        with tarfile.open(folder / f"train-{number:06d}.tar", "w") as archive:
            for label in range(part.start, part.stop):
                for ending, content in (
                    ("bin", images[label].tobytes()),
                    ("cls", str(label).encode()),
                ):
                    entry = tarfile.TarInfo(f"{label:08d}.{ending}")
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))


def make_litdata(data: Data, folder: Path) -> None:
    """Make chunks of LitData's: tensors, and integers."""
    import litdata

    litdata.optimize(
        fn=functools.partial(_litdata_sample, data),
        inputs=list(range(data.samples)),
        output_dir=str(folder),
        chunk_size=data.shard_samples,
        num_workers=1,
        mode="overwrite",
    )


def _litdata_sample(data: Data, number: int) -> dict[str, Any]:
    return {"image": torch.from_numpy(np.array(_mapped_once(data)[number])), "label": number}


@functools.lru_cache
def _mapped_once(data: Data) -> NDArray[np.uint8]:
    return data.images("raw")


LAYOUTS: dict[str, Callable[[Data, Path], None]] = {
    "raw": make_raw,
    "counts": make_counts,
    "h5": make_h5,
    "shards": make_shards,
    "many": functools.partial(make_shards, samples=MANY_SHARD_SAMPLES),
    "lz4": functools.partial(make_shards, layout="counts", compression="lz4"),
    "zstd": functools.partial(make_shards, layout="counts", compression="zstd"),
    "mds": make_mds,
    "tar": make_tar,
    "litdata": make_litdata,
}


def source_of(layout: str) -> str:
    """Return the raw files that a layout is made from."""
    return "counts" if layout in ("counts", "lz4", "zstd") else "raw"


def make(data: Data, layout: str) -> None:
    """Make a layout, and what it is made from, unless they are there."""
    for each in (source_of(layout), layout):
        if not data.marker(each).exists():
            shutil.rmtree(data.folder(each), ignore_errors=True)
            data.folder(each).mkdir(parents=True)
            LAYOUTS[each](data, data.folder(each))
            data.marker(each).touch()


# ---- opening them --------------------------------------------------------------------------------


class Finish:
    """Images as they come, or normalised in the main process, always into the same memory."""

    def __init__(self, data: Data, delivery: str) -> None:
        self._out = torch.empty(BATCH, *data.size.shape) if delivery == "float32" else None

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Return a batch; it is valid until the next."""
        if self._out is None:
            return images
        return normalize(images, MEAN, STD, out=self._out[: len(images)])


def gathered(
    data: Data,
    delivery: str,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    buffers: int = 1,
) -> Epoch:
    """Gather samples at random on one thread, into one and the same batch, or some in turn.

    Args:
        data: Which samples.
        delivery: ``uint8`` or ``float32``.
        images: All of them.
        labels: Theirs.
        buffers: Batches whose memory is used in turn.
    """
    rng = np.random.default_rng(0)
    rows = images.reshape(data.samples, -1)
    memory = [np.empty((BATCH, data.size.bytes), np.uint8) for _ in range(buffers)]
    numbers = np.empty(BATCH, np.int64)
    turns = itertools.cycle(zip(memory, [Finish(data, delivery) for _ in memory], strict=True))

    def epoch() -> Batches:
        return batches(rng.permutation(data.samples))

    def batches(order: NDArray[np.int64]) -> Batches:
        for part in data.parts(BATCH):
            count = part.stop - part.start
            batch, finish = next(turns)
            # Without a mode other than "raise", numpy gathers into a buffer first.
            np.take(rows, order[part], axis=0, out=batch[:count], mode="clip")
            np.take(labels, order[part], out=numbers[:count], mode="clip")
            taken = torch.from_numpy(batch[:count]).view(count, *data.size.shape)
            yield finish(taken), torch.from_numpy(numbers[:count])

    return epoch


def open_memory(data: Data, delivery: str, buffers: int = 1) -> Epoch:
    """Open samples in memory, which any loader is limited by; the first batch reads everything."""
    folder = data.folder("raw")
    images = np.fromfile(folder / "images.bin", np.uint8)
    labels = np.fromfile(folder / "labels.bin", np.int64)
    return gathered(data, delivery, images, labels, buffers)


def open_rotating(data: Data, delivery: str) -> Epoch:
    """Open samples in memory, and gather into as much memory in turn as hpctrain's loader does.

    One batch that is written again and again stays in the processor's cache. A loader that makes
    batches ahead of time writes each into other memory.
    """
    batch_bytes = BATCH * data.size.bytes * (4 if delivery == "float32" else 1)
    of_job = max(1, min(JOB_BATCHES, JOB_BYTES // batch_bytes))
    return open_memory(data, delivery, buffers=(WORKERS + 1) * of_job)


def open_memmap(data: Data, delivery: str) -> Epoch:
    """Open a mapped raw file."""
    labels = np.memmap(data.folder("raw") / "labels.bin", np.int64, mode="r")
    return gathered(data, delivery, data.images("raw"), labels)


def open_h5py(data: Data, delivery: str) -> Epoch:
    """Read sample by sample with h5py; the labels, which is kind, all at once."""
    file = h5py.File(data.folder("h5") / "data.h5", "r")
    images, labels = file["images"], file["labels"][:]
    rng = np.random.default_rng(0)
    batch = np.empty((BATCH, *data.size.shape), np.uint8)
    finish = Finish(data, delivery)

    def epoch() -> Batches:
        return batches(rng.permutation(data.samples))

    def batches(order: NDArray[np.int64]) -> Batches:
        for part in data.parts(BATCH):
            chosen = order[part]
            for place, number in enumerate(chosen.tolist()):
                batch[place] = images[number]
            yield (
                finish(torch.from_numpy(batch[: len(chosen)])),
                torch.from_numpy(labels[chosen]),
            )

    return epoch


class H5Samples(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """The usual recipe: the file is opened in each worker, when it is first asked for a sample."""

    def __init__(self, path: Path, samples: int) -> None:
        self._path = path
        self._samples = samples
        self._file: h5py.File | None = None

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, number: int) -> tuple[torch.Tensor, int]:
        if self._file is None:
            self._file = h5py.File(self._path, "r")
            self._images = self._file["images"]
            self._labels = self._file["labels"][:].tolist()
        return torch.from_numpy(self._images[number]), self._labels[number]


def open_dataloader(data: Data, delivery: str) -> Epoch:
    """Open the DataLoader of torch over an HDF5 file."""
    loader = torch.utils.data.DataLoader(
        H5Samples(data.folder("h5") / "data.h5", data.samples),
        batch_size=BATCH,
        shuffle=True,
        num_workers=WORKERS,
        persistent_workers=True,
    )
    finish = Finish(data, delivery)

    def epoch() -> Batches:
        for images, labels in loader:
            yield finish(images), labels

    return epoch


def open_streaming(data: Data, delivery: str) -> Epoch:
    """Open MosaicML Streaming, shuffled as it does by default."""
    from streaming import StreamingDataset

    dataset = StreamingDataset(local=str(data.folder("mds")), shuffle=True, batch_size=BATCH)
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=BATCH, num_workers=WORKERS, persistent_workers=True
    )
    finish = Finish(data, delivery)

    def epoch() -> Batches:
        for batch in loader:
            yield finish(batch["image"]), batch["label"]

    return epoch


def open_webdataset(data: Data, delivery: str) -> Epoch:
    """Open WebDataset: shards are shuffled, then samples in a buffer; workers make the batches.

    Decoding is as cheap as can be: the bytes as they are.
    """
    import webdataset

    shards = sorted(map(str, data.folder("tar").glob("*.tar")))
    dataset = (
        webdataset.WebDataset(shards, shardshuffle=len(shards))
        .shuffle(1000)
        .to_tuple("bin", "cls")
        .map_tuple(functools.partial(_image_of, data.size.shape), int)
        .batched(BATCH)
    )
    loader = webdataset.WebLoader(
        dataset, batch_size=None, num_workers=WORKERS, persistent_workers=True
    )
    finish = Finish(data, delivery)

    def epoch() -> Batches:
        for images, labels in loader:
            yield finish(images), labels

    return epoch


def _image_of(shape: tuple[int, ...], content: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(content, np.uint8).reshape(shape)


def open_litdata(data: Data, delivery: str, workers: int = WORKERS) -> Epoch:
    """Open LitData, shuffled as it does by default.

    Samples are decoded one by one. By default many are at a time, which for arrays in shuffled
    order takes several times as long.
    """
    from litdata import StreamingDataLoader, StreamingDataset

    loader = StreamingDataLoader(
        StreamingDataset(str(data.folder("litdata")), shuffle=True, batch_decode=0),
        batch_size=BATCH,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    finish = Finish(data, delivery)

    def epoch() -> Batches:
        for batch in loader:
            yield finish(batch["image"]), batch["label"]

    return epoch


def open_hpctrain(data: Data, delivery: str, layout: str = "shards") -> Epoch:
    """Open hpctrain's loader as it is by default; a transform normalises, as one would do it."""
    loader = Loader(
        ShardSet(data.folder(layout)).split("train"),
        BATCH,
        transform=normalized if delivery == "float32" else None,
    )

    def epoch() -> Batches:
        for batch in loader:
            yield batch["image"], batch["label"]

    return epoch


def normalized(batch: Batch) -> Batch:
    """Return a batch with its images normalised: a transform."""
    images = batch["image"]
    return batch.replace(image=normalize(images, MEAN, STD, out=batch.empty(*images.shape)))


# ---- measuring -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One way of getting batches, or a limit of it.

    Attributes:
        layout: What it reads.
        open: Begins; None for limits that deliver no batches.
        package: That has to be installed, by the name of its distribution.
        module: The same, by the name it is imported by.
        versus: The case whose speed this one's is divided by.
        sizes, deliveries: That it is measured with.
        first_only: Only the time to the first batch counts.
    """

    layout: str
    open: Callable[[Data, str], Epoch] | None = None
    package: str = ""
    module: str = ""
    versus: str = "memory"
    sizes: tuple[str, ...] = tuple(SIZES)
    deliveries: tuple[str, ...] = DELIVERIES
    first_only: bool = False


_LITDATA_0 = functools.partial(open_litdata, workers=0)
_LZ4 = functools.partial(open_hpctrain, layout="lz4")
_ZSTD = functools.partial(open_hpctrain, layout="zstd")
_MANY = functools.partial(open_hpctrain, layout="many")
CASES = {
    "memory": Case("raw", open_memory),
    "rotating": Case("raw", open_rotating),
    "memmap": Case("raw", open_memmap),
    "h5py": Case("h5", open_h5py),
    "dataloader": Case("h5", open_dataloader),
    "streaming": Case("mds", open_streaming, "mosaicml-streaming", "streaming"),
    "webdataset": Case("tar", open_webdataset, "webdataset", "webdataset"),
    "litdata": Case("litdata", open_litdata, "litdata", "litdata"),
    "litdata-0": Case("litdata", _LITDATA_0, "litdata", "litdata"),  # without workers
    "hpctrain": Case("shards", open_hpctrain),
    "lz4": Case("lz4", versus="", deliveries=("uint8",)),
    "hpctrain-lz4": Case("lz4", _LZ4, versus="lz4", deliveries=("uint8",)),
    "zstd": Case("zstd", versus="", deliveries=("uint8",)),
    "hpctrain-zstd": Case("zstd", _ZSTD, versus="zstd", deliveries=("uint8",)),
    "hpctrain-open": Case(
        "many", _MANY, versus="", sizes=("small",), deliveries=("uint8",), first_only=True
    ),
}
PEERS = ("h5py", "dataloader", "streaming", "webdataset", "litdata", "litdata-0")


def import_peer(module: str) -> None:
    """Import it before anything is timed, and clear up what may have been left behind."""
    if module == "streaming":
        # Its own image folders need a torchvision that fits torch exactly; nothing here needs them.
        sys.modules.setdefault("streaming.vision", types.ModuleType("streaming.vision"))
        importlib.import_module("streaming.base.util").clean_stale_shared_memory()
    importlib.import_module(module)


def measure(name: str, data: Data, delivery: str) -> dict[str, Any]:
    """Measure everything about one case, in this process.

    Returns:
        ``best`` and ``median``, the samples a second of stretches; whether an epoch was ``exact``;
        ``first_batch_ms``; and for small uint8 ``stall_ms``.
    """
    torch.set_num_threads(1)
    case = CASES[name]
    if case.module:
        import_peer(case.module)
    for path in sorted(data.folder(case.layout).rglob("*")):
        if path.is_file():
            path.read_bytes()  # into the page cache
    seconds, steps = (0.07, 20) if data.quick else (1.0, 200)
    if case.open is None:
        return speeds(decompression(data, case.layout), seconds)
    began = time.perf_counter()
    epoch = case.open(data, delivery)
    batches = epoch()
    first = next(batches)
    record: dict[str, Any] = {"first_batch_ms": 1e3 * (time.perf_counter() - began)}
    # The epoch's rest is not timed: it checks, and lets memory and mappings be touched once.
    record["exact"] = exact(itertools.chain([first], batches), data, delivery, case.layout)
    if not record["exact"] and name.startswith("hpctrain"):
        raise AssertionError("an epoch was not each sample exactly once")
    del first, batches
    if case.first_only:
        return record
    record |= speeds(lambda: delivered(epoch()), seconds)
    if (data.name, delivery) == ("small", "uint8"):
        record["stall_ms"] = 1e3 * stall_seconds(epoch, steps)
    return record


def speeds(epoch: Callable[[], tuple[int, float]], seconds: float) -> dict[str, Any]:
    """Measure three stretches of whole epochs, each for at least so long.

    A loader may make the next epoch's first batches before this one ends. So single short epochs
    say little, and there is one that is not timed before the first stretch.

    Args:
        epoch: Returns samples, and the seconds they took.
        seconds: For which a stretch lasts at least.
    """
    epoch()
    rates: list[float] = []
    for _ in range(STRETCHES):
        samples, total = 0, 0.0
        while total < seconds:
            count, took = epoch()
            samples, total = samples + count, total + took
        rates.append(samples / total)
    return {"best": max(rates), "median": statistics.median(rates)}


def delivered(batches: Batches) -> tuple[int, float]:
    """Return the samples of an epoch, and the seconds it takes."""
    samples, began = 0, time.perf_counter()
    for _, labels in batches:
        samples += len(labels)
    return samples, time.perf_counter() - began


def stall_seconds(epoch: Epoch, steps: int) -> float:
    """Return the mean wait for a batch of who takes 4 ms for each, ends of epochs included."""
    waited, taken = 0.0, 0
    while True:
        batches = epoch()
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            waited += time.perf_counter() - began
            if batch is None:
                break
            taken += 1
            if taken == steps:
                return waited / steps
            time.sleep(STEP_SECONDS)


def exact(batches: Batches, data: Data, delivery: str, layout: str) -> bool:
    """Return whether these are all samples, each once; images are looked at once a batch."""
    images_on_disk = data.images(source_of(layout))
    seen, right = [], True
    for images, labels in batches:
        numbers = labels.numpy().copy()
        seen.append(numbers)
        expected = images_on_disk[numbers[-1]].astype(np.float64)
        if delivery == "float32":
            expected = (expected - MEAN) / STD
        kind = torch.float32 if delivery == "float32" else torch.uint8
        right &= images.dtype == kind and images.shape == (len(numbers), *data.size.shape)
        right &= bool(np.allclose(images[-1].numpy(), expected, atol=1e-4))
    return right and np.array_equal(np.sort(np.concatenate(seen)), data.labels())


def decompression(data: Data, layout: str) -> Callable[[], tuple[int, float]]:
    """Return what decompresses all of a shard set's images, and does nothing else with them.

    On as many threads as the loader has, each into one and the same memory of its own.

    Returns:
        A function that returns samples, and the seconds they took.
    """
    index = ShardSet(data.folder(layout)).index
    chunks: list[tuple[ChunkedDataset, int]] = []
    for shard in index.splits["train"].shards:
        path = data.folder(layout) / shard.path
        dataset = ChunkedDataset(path, "samples/image", index.fields["image"], known=True)
        chunks += [(dataset, number) for number in range(-(-dataset.rows // dataset.block))]
    block = max(dataset.block for dataset, _ in chunks)
    buffers = [np.empty((block, data.size.bytes), np.uint8) for _ in range(WORKERS)]
    pool = ThreadPoolExecutor(WORKERS)

    def all_once() -> tuple[int, float]:
        began = time.perf_counter()
        rest = iter(chunks)  # each thread takes what comes next

        def work(out: NDArray[np.uint8]) -> None:
            for dataset, number in rest:
                dataset.read(number, out)

        list(pool.map(work, buffers))
        return data.samples, time.perf_counter() - began

    return all_once


def main() -> None:
    """Do one job."""
    job = json.loads(sys.argv[1])
    data = Data(Path(job["root"]), job["size"], job["quick"])
    result: dict[str, Any] = {}
    if "layout" in job:
        make(data, job["layout"])
    else:
        result = measure(job["case"], data, job["delivery"])
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
