"""Prefetch: make batches in the background, on threads or processes, and hand them out in order."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import (
    BrokenExecutor,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
)
from concurrent.futures import TimeoutError as FutureTimeout
from copy import copy
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from hpctrain.data.batch import Batch, cut
from hpctrain.data.buffers import Buffers
from hpctrain.data.chunks import BadShard
from hpctrain.data.order import VERSION, Order, Shuffle, of_version
from hpctrain.data.random import key
from hpctrain.data.read_plan import Plan, Span
from hpctrain.data.source import OFFSETS, Arrays, Source, native
from hpctrain.errors import Error
from hpctrain.world.world import Part

# A job is as many batches as take about this long, within limits: waking a thread for each small
# batch, and having threads contend for Python's lock, would cost as much as making it.
JOB_SECONDS = 0.005
JOB_BATCHES = 16
JOB_BYTES = 10 * 2**20


class Epoch(NamedTuple):
    """The arguments of :meth:`Source.order`: what an epoch's order depends on."""

    seed: int
    number: int
    shuffle: Shuffle
    lanes: int
    version: int = VERSION

    def order(self, source: Source) -> Order:
        """Return a source's order of this epoch, by the rules of this version."""
        order = source.order(self.seed, self.number, self.shuffle, self.lanes)
        return of_version(order, self.version)

    def following(self, lanes: int) -> Epoch:
        """Return the next epoch, with other lanes."""
        return self._replace(number=self.number + 1, lanes=lanes)


class Maker:
    """Makes a rank's parts of global batches from a source.

    Args:
        source: Of the samples.
        transform: Applied to each batch.
        buffers: Where batches' memory comes from.
    """

    def __init__(
        self, source: Source, transform: Callable[[Batch], Batch] | None, buffers: Buffers
    ) -> None:
        self.source = source
        self.transform = transform
        self.buffers = buffers

    def make(self, plan: Plan, span: Span) -> list[Batch]:
        """Make this rank's parts of the batches of a span.

        Args:
            plan: Of the epoch: which samples fall to this rank.
            span: The batches.

        Raises:
            BadShard: A shard cannot be read, and is not to be skipped.
        """
        # The samples of several small batches are gathered in one go; the batches are parts of it.
        places = span.batches()
        positions, indices, bounds = plan.batches(span)
        arrays, kept = self._take(indices)
        lost = [0] * len(places)
        if kept is not None:
            positions = positions[kept]
            lost = [int((~kept[i:j]).sum()) for i, j in itertools.pairwise(bounds)]
            bounds = np.concatenate([[0], np.cumsum(kept)])[bounds].tolist()
        batches = []
        for number, (start, stop) in enumerate(places):
            first, last = bounds[number], bounds[number + 1]
            batch = Batch(
                {name: native(array) for name, array in cut(arrays, first, last).items()},
                order=plan.order,
                start=start,
                stop=stop,
                positions=positions[first:last],
                world_size=plan.part.size,
                lost=lost[number],
                buffers=self.buffers,
            )
            batches.append(transformed(batch, self.transform) if self.transform else batch)
        return batches

    def _take(self, indices: NDArray[np.int64]) -> tuple[Arrays, NDArray[np.bool_] | None]:
        """Take the samples that can be read, and tell which of those asked for; None: all."""
        readable = self.source.readable(indices)
        while True:
            try:
                if readable is None or readable.all():
                    return self.source.take(indices, self.buffers.empty), None
                return self.source.take(indices[readable], self.buffers.empty), readable
            except BadShard:
                # Found out only now; where it is to be skipped, the source has made a note of it.
                before, readable = readable, self.source.readable(indices)
                if readable is None or (before is not None and (before == readable).all()):
                    raise


def transformed(batch: Batch, transform: Callable[[Batch], Batch]) -> Batch:
    """Apply a transform to a batch, and check what it returns.

    Args:
        batch: Of some samples.
        transform: As somebody wrote it.

    Raises:
        Error: It returned something else, or a field that has no longer a row for each sample.
    """
    result: Any = transform(batch)
    if isinstance(result, dict) and not isinstance(result, Batch):
        result = batch.of_fields(result)
    if not isinstance(result, Batch):
        what = "None (is a `return` missing?)" if result is None else f"a {type(result).__name__}"
        raise Error(f"transform() returned {what}.", hint="return batch.replace(name=tensor, ...).")
    for name, tensor in result.items():
        if name not in batch or name + OFFSETS in result or name.endswith(OFFSETS):
            continue  # new ones may be what they like
        rows = len(tensor) if tensor.ndim else 0
        if rows != result.samples:
            raise Error(
                f"field '{name}' has {rows} rows after transform(), for {result.samples} samples.",
                hint="keep a row for each sample, in their order.",
            )
    return result


class ReadAhead:
    """A queue of batches that are prefetched, across the ends of epochs.

    Args:
        maker: Makes them.
        workers: How many jobs run at a time; 0: none, a batch is made when it is asked for.
        kind: ``thread`` or ``process``.
        timeout_seconds: Longest wait for a batch.
    """

    def __init__(self, maker: Maker, workers: int, kind: str, timeout_seconds: float) -> None:
        self._maker = maker
        self._workers = workers
        self._processes = kind == "process"
        self._timeout_seconds = timeout_seconds
        self._pool: Executor | None = None
        self._owner = os.getpid()
        self._plans: dict[tuple[Epoch, Part], Plan] = {}
        # Jobs under way, in order, then batches of the first job that is done.
        self._jobs: deque[tuple[Plan, Span, Future[tuple[list[Batch], float]]]] = deque()
        self._ready: deque[Batch] = deque()
        self._job_batches = 1
        # What will be asked for next if nothing changes, and what is to be submitted next.
        self._expected: tuple[Epoch, int, int, Part] | None = None
        self._next: tuple[Epoch, int]

    def get(self, epoch: Epoch, start: int, batch_size: int, part: Part) -> Batch:
        """Return the batch that starts at a position; prefetch those after it.

        Args:
            epoch: Which one.
            start: Position of the global batch's first sample.
            batch_size: Of the global batch, in samples.
            part: Of it, this rank's.

        Raises:
            BadShard: A shard cannot be read.
            Error: The batch took too long, or its process died.
        """
        if os.getpid() != self._owner:
            self._begin_anew()
        if self._workers == 0:
            plan = self._plan(epoch, part)
            return self._maker.make(plan, Span(start, plan.order.samples, batch_size).first(1))[0]
        # An epoch that nothing was made ahead of has no jobs.
        if self._expected != (epoch, start, batch_size, part) or self._next[0] < epoch:
            self._forget()
            self._next = (epoch, start)
        if not self._ready:
            self._submit(batch_size, part)
            self._receive(part.rank)
            self._submit(batch_size, part)
        batch = self._ready.popleft()
        ended = batch.stop == self._plan(epoch, part).order.samples
        then = (epoch.following(batch_size), 0) if ended else (epoch, batch.stop)
        self._expected = (*then, batch_size, part)
        return batch

    def _plan(self, epoch: Epoch, part: Part) -> Plan:
        found = self._plans.get((epoch, part))
        if found is None:
            while len(self._plans) > 1:  # this epoch's and the next one's are wanted
                del self._plans[next(iter(self._plans))]
            found = Plan(epoch.order(self._maker.source), part)
            self._plans[epoch, part] = found
        return found

    def _submit(self, batch_size: int, part: Part) -> None:
        """Keep every worker busy."""
        while len(self._jobs) < self._workers:
            epoch, start = self._next
            plan = self._plan(epoch, part)
            if start >= plan.order.samples:
                if epoch.shuffle == "none":  # an evaluation, which may be the only one
                    return
                self._next = (epoch.following(batch_size), 0)
                continue
            span = Span(start, plan.order.samples, batch_size).first(self._job_batches)
            self._next = (epoch, span.stop)
            pool = self._pool or self._start()
            if self._processes:
                future = pool.submit(_make_in_process, epoch, span, part)
            else:
                future = pool.submit(_make, self._maker, plan, span)
            self._jobs.append((plan, span, future))

    def _receive(self, rank: int) -> None:
        plan, span, future = self._jobs.popleft()
        try:
            batches, seconds = future.result(self._timeout_seconds)
        except FutureTimeout as error:
            self.close()
            raise Error(
                f"rank {rank}: the samples from position {span.start} were not ready after "
                f"{self._timeout_seconds:g} s.",
                hint="does the file system hang? timeout_seconds allows for more.",
            ) from error
        except BrokenExecutor as error:
            self.close()
            raise Error(
                f"rank {rank}: a data worker process died while making the samples from position "
                f"{span.start}.",
                hint="was it short of memory? Use fewer workers, or data.worker_kind=thread.",
            ) from error
        size = sum(tensor.nbytes for tensor in batches[0].values())
        most = min(JOB_SECONDS * len(batches) / max(seconds, 1e-6), JOB_BYTES / max(size, 1))
        self._job_batches = max(1, min(JOB_BATCHES, int(most)))
        if self._processes:
            batches = [batch.attach(plan.order, self._maker.buffers) for batch in batches]
        self._ready.extend(batches)

    def _start(self) -> Executor:
        if self._processes:
            self._pool = ProcessPoolExecutor(
                self._workers,
                # Not forked: MPI, CUDA and threads do not live through a fork.
                multiprocessing.get_context("spawn"),
                initializer=_begin_process,
                # The transform first: a task file's own source is found only once it is loaded.
                initargs=(self._maker.transform, self._maker.source),
            )
        else:
            self._pool = ThreadPoolExecutor(
                self._workers, "hpctrain-data", initializer=_begin_thread
            )
        return self._pool

    def _forget(self) -> None:
        """Drop what is under way: it is for another place, or another part."""
        for _, _, future in self._jobs:
            future.cancel()
        self._jobs.clear()
        self._ready.clear()
        self._expected = None

    def _begin_anew(self) -> None:
        """After a fork: the threads are not in this process, and locks may be held for ever."""
        maker = self._maker
        self._maker = Maker(copy(maker.source), maker.transform, Buffers(maker.buffers.pinned))
        self._plans.clear()
        self._jobs.clear()
        self._ready.clear()
        self._pool, self._owner, self._expected = None, os.getpid(), None

    def close(self) -> None:
        """End threads and processes, as soon as they have done what they are at."""
        self._forget()
        pool, self._pool = self._pool, None
        if isinstance(pool, ProcessPoolExecutor):
            # Held until its processes have ended: one that is collected before, with jobs that were
            # cancelled, never ends them (Python up to 3.11.4).
            end = partial(pool.shutdown, cancel_futures=True)
            threading.Thread(target=end, name="hpctrain-data-end", daemon=True).start()
        elif pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)


def _make(maker: Maker, plan: Plan, span: Span) -> tuple[list[Batch], float]:
    began = time.perf_counter()
    batches = maker.make(plan, span)
    return batches, time.perf_counter() - began


def _begin_thread() -> None:
    """Let torch compute on this thread alone: the others are for the training step.

    Not by ``torch.set_num_threads``, which also tells MKL, and that for all threads.
    """
    torch.get_num_threads()  # torch would otherwise set this thread's limit anew when it computes
    threadpool_limits(1, user_api="openmp")


class _Process:
    """What a worker process keeps."""

    maker: Maker
    key: tuple[Epoch, Part] | None = None
    plan: Plan


def _begin_process(transform: Callable[[Batch], Batch] | None, source: Source) -> None:
    torch.set_num_threads(1)
    _Process.maker = Maker(source, transform, Buffers())


def _make_in_process(epoch: Epoch, span: Span, part: Part) -> tuple[list[Batch], float]:
    if _Process.key != (epoch, part):
        _Process.key = (epoch, part)
        _Process.plan = Plan(epoch.order(_Process.maker.source), part)
    began = time.perf_counter()
    batches = []
    for start, stop in span.batches():
        seed = key(epoch.seed, epoch.number, start, part.rank)
        torch.manual_seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)
        random.seed(seed)
        batches += _Process.maker.make(_Process.plan, Span(start, stop, span.batch_size))
    return batches, time.perf_counter() - began
