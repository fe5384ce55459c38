"""Synchronous data parallelism over Horovod's ring all-reduce."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import weakref
from typing import Any, ClassVar

import torch
from torch import nn

from hpctrain.compression.compressor import Compressor, Options
from hpctrain.compression.dense import Dense
from hpctrain.compression.registry import make_compressor
from hpctrain.compression.states import gather_states, load_states
from hpctrain.config import ElasticConfig, HorovodConfig, Section
from hpctrain.elastic.choose import Choice, choose, set_parameters
from hpctrain.elastic.gloo import Gloo
from hpctrain.elastic.membership import MEET_SECONDS, Meeting, Membership, Progress
from hpctrain.errors import Error, PeerLost
from hpctrain.horovod_build import mpi
from hpctrain.process import cores, ended_after, loaded
from hpctrain.strategies.base import (
    ElasticOptimizer,
    Strategy,
    check_shareable,
    check_trainable,
    names_of,
    ordered,
    sparse_tables,
)
from hpctrain.strategies.gradient_averaging import AveragedGradients, call_when_ready
from hpctrain.strategies.horovod_communicator import HorovodCommunicator
from hpctrain.strategies.start import check_alike, share
from hpctrain.world import pmix
from hpctrain.world.agreement import compare
from hpctrain.world.network import both_ways
from hpctrain.world.world import Alone, World

_THREAD_MULTIPLE = 3  # what all implementations call it


def _import() -> Any:
    try:
        import horovod.torch as hvd
    except (ImportError, OSError) as error:
        missing = getattr(error, "name", None) == "horovod"
        raise Error(
            "Horovod is not installed."
            if missing
            else f"Horovod is installed but cannot be loaded: {error}.",
            hint="run `hpctrain horovod build`.",
        ) from error
    return hvd


def _check_device(hvd: Any, device: torch.device) -> None:
    """Refuse GPUs to a Horovod that was built without them."""
    if device.type == "cuda" and not (hvd.cuda_built() or hvd.rocm_built()):
        raise Error(
            f"Horovod was built without GPUs, and this rank trains on {device}.",
            hint="run `hpctrain horovod build --gpu`, or hide the GPUs: CUDA_VISIBLE_DEVICES=''.",
        )


class HorovodOptimizer(ElasticOptimizer):
    """Averages gradients in flat buckets while ``backward()`` still computes earlier layers.

    Each bucket is all-reduced in place in one piece, which leaves nothing for Horovod to fuse and
    makes the sums independent of timing.

    Attributes:
        compressor: How they are sent, with what it has not sent yet.
    """

    def __init__(
        self,
        model: nn.Module,
        inner: torch.optim.Optimizer,
        comm: HorovodCommunicator,
        compressor: Compressor,
        bucket_bytes: int,
        clip_norm: float | None,
    ) -> None:
        super().__init__(inner, clip_norm)
        this = weakref.proxy(self)
        parameters = ordered(model, inner)[::-1]
        self.compressor = compressor
        self.carries_gradients = bool(compressor.takes)
        self._comm = comm
        plain = type(compressor) is Dense  # of one rank, the average is what it has
        self._gradients = AveragedGradients(
            parameters,
            names_of(model, parameters),
            comm,
            compressor,
            bucket_bytes,
            sparse_tables(model),
            lambda part: this.mark(part),
            lambda: plain and comm.alone,
        )
        if not (plain and comm.stays_alone):
            call_when_ready(parameters, self._gradients.ready)

    def no_sync(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which ``backward()`` only accumulates local gradients."""
        return self._gradients.no_sync()

    def synchronize(self) -> None:
        """Wait until every gradient is the world's average.

        ``backward()`` does this at its end, and ``step()`` where there was none. It is of use after
        passes within ``no_sync()`` alone.

        Raises:
            PeerLost: Another rank is gone.
            Error: The other ranks are about something else.
        """
        self._gradients.synchronize()

    def step(self, closure: Any = None) -> float | None:  # type: ignore[override]
        """Clip the averaged gradients, and update the parameters."""
        result = super().step(closure)
        self._gradients.stepped()
        return result

    def restart(self) -> None:
        """Forget the step that failed, and the exchanges that were under way."""
        self._gradients.restart()
        self.zero_grad()

    def strategy_state(self) -> dict[str, Any]:
        """Return what all ranks have not sent yet, on rank 0; every rank calls this."""
        if not self.compressor.takes:
            return {}
        return {"compression": gather_states(self._comm, self.compressor)}

    def load_strategy_state(self, state: dict[str, Any]) -> None:
        """Take up what was not sent yet.

        Args:
            state: As :meth:`strategy_state` gave it on rank 0, maybe of another number of ranks, or
                of another compression.
        """
        load_states(self._comm, self.compressor, state.get("compression", []))

    def statistics(self) -> dict[str, Any]:
        """Return the bytes that all ranks have sent since the last time, beside dense ones."""
        compressor = self.compressor
        sent, dense = compressor.sent_bytes, compressor.dense_bytes
        compressor.sent_bytes = compressor.dense_bytes = 0
        if not sent:
            return {}
        found = {"moved_bytes": sent, "dense_bytes": dense, "compression": dense / sent}
        if compressor.lost:
            found["residuals_lost"] = compressor.lost
        return found

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients; the next ones are put into their buckets as they come."""
        self._gradients.forget_average()
        super().zero_grad(set_to_none)


class HorovodEngine(Strategy):
    """An engine that starts Horovod and puts it under the world; a base of strategies that use it.

    Args:
        world: Who takes part; its communicator is replaced.
        config: Knobs of the strategy; an engine reads none of them.
        elastic: Whether, and how, to outlive losses, where the strategy can.
        timeout_seconds: Longest wait for another rank.

    Attributes:
        recovers: Whether the strategy's ranks can go on when one is lost: their optimizers are
            :class:`~hpctrain.strategies.base.ElasticOptimizer`.
        fault_tolerance: How losses are outlived, and why so.

    Raises:
        Error: Horovod is not there, or its world is not the one that was launched.
    """

    recovers: ClassVar[bool] = False

    def __init__(
        self,
        world: World,
        config: Section | None = None,
        *,
        elastic: ElasticConfig | None = None,
        timeout_seconds: float = 600.0,
    ) -> None:
        super().__init__(world, config, elastic=elastic, timeout_seconds=timeout_seconds)
        self._membership: Membership | None = None
        elastic = elastic or ElasticConfig()
        how = self.fault_tolerance = self._choose(elastic)
        if how.mode == "ulfm":
            os.environ |= {"HOROVOD_CONTROLLER": "mpi", "HOROVOD_CPU_OPERATIONS": "mpi"}
            os.environ["HOROVOD_LOCAL_BY_NAME"] = "1"  # hpctrain's patch, for ranks that join
            os.environ.setdefault("HOROVOD_LOG_LEVEL", "fatal")  # a loss is no error here
            set_parameters(os.environ, elastic.hang_seconds)
        elif how.mode == "gloo":
            self._membership = Gloo(elastic.hang_seconds, timeout_seconds)
        self._hvd = _import()
        _check_device(self._hvd, world.device)
        _set_defaults(world)
        try:
            with _bounded(timeout_seconds, world):
                if os.environ.get("HOROVOD_CONTROLLER", "mpi") == "mpi" and self._hvd.mpi_built():
                    _start_mpi(timeout_seconds)
                if how.mode == "ulfm":
                    mpi.require()
                    from hpctrain.elastic.ulfm import Ulfm

                    self._membership = Ulfm(elastic.hang_seconds)
                if self._membership is None:
                    self._hvd.init()
                elif self.joined is None:
                    self._membership.connect(self._begin)
        except Error:
            raise
        except Exception as error:
            raise Error(
                f"Horovod could not start under {world.launch.name}: {error}.",
                hint="`hpctrain doctor` tries a small launch and says what is wrong.",
            ) from error
        self._comm = HorovodCommunicator(self._hvd, timeout_seconds, self._membership)
        if self.joined is not None:
            world.comm = Alone()  # the others are met later
            return
        launched = world.launch.size
        if self._comm.size != launched and how.mode != "gloo":
            raise Error(
                f"{world.launch.name} started {launched} ranks, but Horovod sees "
                f"{self._comm.size}.",
                hint="under srun use --mpi=pmix (Open MPI) or pmi2 (MPICH); else Horovod was built "
                "on another MPI than the launcher's: run `hpctrain horovod build`.",
            )
        world.comm = self._comm

    def _choose(self, elastic: ElasticConfig) -> Choice:
        if self.recovers:
            return choose(elastic.mode)
        if elastic.mode not in ("off", "auto", "restart"):
            raise Error(
                f"--elastic {elastic.mode}: strategy '{self.name}' cannot go on without a rank.",
                hint="use --elastic restart, or another strategy.",
            )
        return choose("off" if elastic.mode == "auto" else elastic.mode)

    @property
    def joined(self) -> Any:
        """What a process that joins a run under way has to know; None: it began with it."""
        welcome = self._membership.welcome if self._membership is not None else None
        return welcome._asdict() if welcome is not None else None

    @property
    def recovery(self) -> HorovodEngine | None:
        """This strategy itself, if it outlives losses; else None."""
        return self if self._membership is not None else None

    @property
    def membership(self) -> Membership:
        """The engine that knows who takes part, where losses are outlived."""
        assert self._membership is not None
        return self._membership

    def meet(self, progress: Progress) -> Meeting:
        """Form a new world of the ranks that are left, and start Horovod on it."""
        meeting = self.membership.meet(progress, self._begin)
        self.world.comm = self._comm
        return meeting

    def _begin(self) -> None:
        """Start Horovod, perhaps again, on the membership's world."""
        with _bounded(MEET_SECONDS, self.world):
            self._hvd.shutdown()
            self._hvd.init(comm=self.membership.comm)

    def share(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Start every rank from rank 0's model and optimizer state.

        Args:
            model: Overwritten, but on rank 0.
            optimizer: Its state and options are overwritten, but on rank 0.
        """
        share(self.world.comm, model, optimizer)


class Horovod(HorovodEngine):
    """Synchronous data parallelism: gradients are averaged over all ranks, by ring all-reduce.

    Attributes:
        optimizer_class: What wraps the optimizer; a strategy made from this one has its own.
    """

    name = "horovod"
    Config = HorovodConfig
    recovers = True
    optimizer_class: ClassVar[type[HorovodOptimizer]] = HorovodOptimizer

    def __init__(
        self,
        world: World,
        config: Section | None = None,
        *,
        elastic: ElasticConfig | None = None,
        timeout_seconds: float = 600.0,
    ) -> None:
        knobs = config if isinstance(config, HorovodConfig) else HorovodConfig()
        compressor_of(knobs)  # what makes no sense is said before anything starts
        super().__init__(world, knobs, elastic=elastic, timeout_seconds=timeout_seconds)

    def wrap(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        clip_norm: float | None = None,
    ) -> HorovodOptimizer:
        """Start every rank from rank 0's model and optimizer state, and wrap the optimizer.

        Args:
            model: To be trained; overwritten by rank 0's.
            optimizer: Of its parameters; its state is overwritten by rank 0's.
            clip_norm: Largest norm of the averaged gradient; None: no clipping.
        """
        check_trainable(optimizer)
        check_shareable(model, optimizer)
        check_alike(self.world.comm, model, optimizer)
        knobs = {f"horovod.{name}": str(value) for name, value in self.config}
        compare(self.world.comm, knobs, hint="give every rank the same ones.")
        compressor = compressor_of(self.config)
        check_momentum(self.config, optimizer)
        self.share(model, optimizer)
        return self.optimizer_class(
            model, optimizer, self._comm, compressor, self.config.bucket_bytes, clip_norm
        )


def compressor_of(config: HorovodConfig) -> Compressor:
    """Make the compressor that a configuration asks for.

    Raises:
        Error: There is none such.
    """
    options = Options(
        feedback=config.compression_feedback,
        warmup_steps=config.compression_warmup_steps,
        momentum=config.compression_momentum,
        warm_start=config.compression_warm_start,
        min_rate=config.compression_min_rate,
    )
    return make_compressor(config.compression, options)


def check_momentum(config: HorovodConfig, optimizer: torch.optim.Optimizer) -> None:
    """Refuse momentum correction for an optimizer with momentum of its own.

    Args:
        config: Its ``compression_momentum`` counts.
        optimizer: The user's.

    Raises:
        Error: There would be momentum twice.
    """
    if config.compression_momentum and any(
        group.get("momentum") or "betas" in group for group in optimizer.param_groups
    ):
        raise Error(
            f"horovod.compression_momentum takes the place of the optimizer's, and "
            f"{type(optimizer).__name__} has momentum.",
            hint="use plain SGD (optimizer.name=sgd, optimizer.momentum=0), or leave it at 0.",
        )


def _bounded(seconds: float, world: World) -> contextlib.AbstractContextManager[None]:
    """End this process if Horovod's start, which nothing can interrupt, takes longer than that."""
    launch = world.launch
    error = PeerLost(
        f"rank {launch.rank} on {os.uname().nodename} waited {seconds:.0f} s for the "
        f"{launch.size} ranks of {launch.name} to meet.",
        hint="did all of them start? Can their hosts reach each other?",
    )
    return ended_after(seconds, error)


def _start_mpi(timeout_seconds: float) -> None:
    """Have MPI started, and all ranks know it, before Horovod sends anything.

    By way of the library itself: neither Horovod nor mpi4py lets anything happen in between, and
    mpi4py lets no other thread run meanwhile.
    """
    libmpi = loaded("libmpi.so")
    started = ctypes.c_int(1)
    if libmpi is not None:
        libmpi.MPI_Initialized(ctypes.byref(started))
    if libmpi is None or started.value:
        return
    provided = ctypes.c_int()
    libmpi.MPI_Init_thread(None, None, _THREAD_MULTIPLE, ctypes.byref(provided))
    atexit.register(_end_mpi, libmpi)
    pmix.fence(timeout_seconds)


def _end_mpi(libmpi: ctypes.CDLL) -> None:
    ended = ctypes.c_int()
    libmpi.MPI_Finalized(ctypes.byref(ended))
    if not ended.value:
        libmpi.MPI_Finalize()


def _set_defaults(world: World) -> None:
    """Set what Horovod and MPI read once, at their start; the user's own settings stay."""
    # Buckets are whole already: fusing them again would copy, and make sums depend on timing.
    os.environ.setdefault("HOROVOD_FUSION_THRESHOLD", "0")
    both_ways()
    os.environ.setdefault("OMPI_MCA_btl_tcp_links", "4")
    if world.local_size * 2 > cores():
        # A rank computes and communicates; where cores are fewer than that, MPI must not spin.
        os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
