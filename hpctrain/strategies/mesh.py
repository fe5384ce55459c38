"""Models larger than a rank: replicas of which each is divided over several ranks.

A mesh has three axes. Replicas (``dp``) read different samples; their parameters, gradients and
optimizer states may be sharded over them (``shard``), by torch's FSDP2. Stages of a pipeline
(``pp``) compute some of the layers each. Tensor-parallel ranks (``tp``) compute parts of each
matrix, by torch's DTensor styles. All of it goes over MPI, by the process group of
:mod:`hpctrain.distributed`.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch import nn

from hpctrain.config import ElasticConfig, RunConfig, Section
from hpctrain.errors import Error, PeerLost
from hpctrain.horovod_build import mpi
from hpctrain.mesh.shape import Shape, fitted
from hpctrain.process import cores, ended_after
from hpctrain.strategies.base import (
    DistributedOptimizer,
    Strategy,
    check_shareable,
    check_trainable,
    sparse_tables,
)
from hpctrain.strategies.sharded import check_elementwise
from hpctrain.strategies.start import check_alike, share
from hpctrain.world.network import both_ways
from hpctrain.world.world import World

if TYPE_CHECKING:
    from hpctrain.strategies.mesh_optimizer import MeshOptimizer


class MeshConfig(Section):
    """A mesh of ranks."""

    dp: int | None = Field(
        None, ge=1, description="Replicas, which read different samples. Unset: all ranks allow."
    )
    pp: int = Field(1, ge=1, description="Stages of a pipeline, each on ranks of its own.")
    tp: int = Field(1, ge=1, description="Ranks that compute parts of each matrix.")
    shard: Literal["none", "optimizer", "gradients", "parameters"] = Field(
        "none",
        description="What is divided over replicas: nothing; the optimizer's state; gradients, "
        "too; parameters, too, which are gathered block by block.",
    )
    schedule: Literal["gpipe", "1f1b", "interleaved"] = Field(
        "1f1b", description="In which order a pipeline computes micro-batches."
    )
    microbatches: int | None = Field(
        None, ge=1, description="Parts of a pass in a pipeline. Unset: 4 a stage."
    )
    virtual: int = Field(
        1, ge=1, description="Stages on each rank of a pipeline, with `interleaved`."
    )

    @property
    def parts(self) -> int:
        """Into how many micro-batches a pipeline cuts each pass."""
        return self.microbatches or 4 * self.pp


def check_knobs(config: MeshConfig) -> None:
    """Refuse knobs that do not go together, or that nothing would read.

    Args:
        config: Each knob is in its range.

    Raises:
        Error: The first that do not.
    """
    if config.pp == 1 and config.model_fields_set & {"schedule", "microbatches", "virtual"}:
        raise Error(
            "mesh.schedule, microbatches and virtual are of a pipeline, and mesh.pp is 1.",
            hint="leave them out, or choose --mesh pp=2.",
        )
    if config.virtual > 1 and config.schedule != "interleaved":
        raise Error(
            f"mesh.virtual = {config.virtual} with mesh.schedule = {config.schedule}.",
            hint="use --set mesh.schedule=interleaved.",
        )
    if config.schedule == "interleaved" and config.parts % config.pp:
        raise Error(
            f"mesh.microbatches = {config.parts} is no multiple of mesh.pp = {config.pp}, which "
            "`interleaved` needs.",
            hint="choose a multiple, or mesh.schedule=1f1b.",
        )


class Mesh(Strategy):
    """Models larger than a rank: replicas, shards, pipelines and divided matrices, over MPI.

    Args:
        world: Who takes part; its communicator is replaced, and its rank and size are those of
            replicas.
        config: How the ranks are arranged.
        elastic: Refused, but ``restart``.
        timeout_seconds: Longest wait for another rank.

    Attributes:
        shape: Of the mesh.
        device_mesh: The same, as torch has it, with the axes ``pp``, ``dp`` and ``tp``.
        task: The user's side, where there is one; it may say how its model is divided.

    Raises:
        Error: The ranks are not as many as the mesh takes, or MPI is not there.
    """

    name = "mesh"
    Config = MeshConfig

    def __init__(
        self,
        world: World,
        config: Section | None = None,
        *,
        elastic: ElasticConfig | None = None,
        timeout_seconds: float = 600.0,
    ) -> None:
        super().__init__(world, config, elastic=elastic, timeout_seconds=timeout_seconds)
        check_knobs(self.config)
        self.shape: Shape = fitted(
            world.launch.size, dp=self.config.dp, pp=self.config.pp, tp=self.config.tp
        )
        if elastic is not None and elastic.mode in ("ulfm", "gloo"):
            raise Error(
                f"--elastic {elastic.mode}: strategy 'mesh' cannot go on without a rank.",
                hint="use --elastic restart, or --strategy horovod.",
            )
        if world.device.type != "cpu":
            raise Error(
                f"strategy 'mesh' computes on CPUs, and this rank has {world.device}.",
                hint="hide the GPUs: CUDA_VISIBLE_DEVICES=''.",
            )
        self.task: Any = None
        self._timeout = timedelta(seconds=timeout_seconds)
        self._wrapped: MeshOptimizer | None = None
        self._connect()

    def _connect(self) -> None:
        """Start MPI, torch.distributed on it, and the groups of the mesh."""
        world, launch = self.world, self.world.launch
        mpi.require()
        both_ways()
        if world.local_size * 2 > cores():
            os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
        late = PeerLost(
            f"rank {launch.rank} on {os.uname().nodename} waited {self.timeout_seconds:.0f} s for "
            f"the {launch.size} ranks of {launch.name} to meet.",
            hint="did all of them start? Can their hosts reach each other?",
        )
        with ended_after(self.timeout_seconds, late):
            from mpi4py import MPI
            from torch.distributed.device_mesh import init_device_mesh

            from hpctrain.distributed import init_process_group
            from hpctrain.mesh.communicator import MeshCommunicator

            if launch.size != MPI.COMM_WORLD.size:
                raise Error(
                    f"{launch.name} started {launch.size} ranks, but MPI sees "
                    f"{MPI.COMM_WORLD.size}.",
                    hint="under srun use --mpi=pmix (Open MPI) or pmi2 (MPICH).",
                )
            init_process_group(timeout_seconds=self.timeout_seconds)
            self.device_mesh = init_device_mesh(
                "cpu", tuple(self.shape), mesh_dim_names=self.shape._fields
            )
            for axis in self.shape._fields:
                self.device_mesh.get_group(axis).set_timeout(self._timeout)
        world.comm = MeshCommunicator(self.shape, world.local_rank, world.local_size)
        world.replica = self.shape.place(launch.rank).dp, self.shape.dp

    @property
    def joint_passes(self) -> bool:
        """Whether replicas exchange within passes: where they gather parameters."""
        return bool(self.config.shard != "none")

    @property
    def replicates(self) -> bool:
        """Whether every rank holds the whole model."""
        return self.shape.dp == self.shape.size and self.config.shard == "none"

    def prepare(self, config: RunConfig, task: Any) -> None:
        """Refuse what this mesh cannot do of a run, and remember how the task's model is divided.

        Args:
            config: Of the run.
            task: The user's side.

        Raises:
            Error: The first thing.
        """
        self.task = task
        train = config.train
        divided = self.shape.pp * self.shape.tp > 1
        called = {each.partition(",")[0] for each in train.callbacks}
        looks = sorted({"samples", "statistics"} & called)
        for refused, what in (
            (not self.replicates and bool(looks), f"callback '{''.join(looks[:1])}'"),
            (train.ema_decay is not None, "train.ema_decay"),
            (divided and train.sync_batchnorm, "train.sync_batchnorm"),
            (divided and config.log.trace_samples, "--trace-samples"),
            (divided and bool(task.metrics()), "metrics() of a whole set"),
            (divided and task.gathers, "world.all_gather()"),
        ):
            if refused:
                raise Error(
                    f"{what} cannot be used with strategy 'mesh' of {self.shape}.",
                    hint="leave it out, or use --strategy horovod or sharded.",
                )

    def wrap(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        clip_norm: float | None = None,
    ) -> DistributedOptimizer:
        """Start from rank 0's model and optimizer state, and divide both over the mesh.

        Args:
            model: What is trained; its modules are sharded and divided in place.
            optimizer: Of its parameters.
            clip_norm: Largest 2-norm of the whole model's gradient; None: no clipping.

        Raises:
            Error: The model, or the optimizer, cannot be divided so.
        """
        from hpctrain.mesh.division import divide
        from hpctrain.mesh.pipeline import Pipeline
        from hpctrain.strategies.mesh_optimizer import MeshOptimizer

        check_trainable(optimizer)
        check_shareable(model, optimizer)
        self._check(model, optimizer)
        check_alike(self.world.comm, model, optimizer)
        share(self.world.comm, model, optimizer)
        division = divide(
            model,
            self.task,
            self.device_mesh,
            self.shape,
            self.shape.place(self.world.comm.rank),
            shard=self.config.shard,
            chunks=self.config.virtual,
        )
        pipeline = None
        if self.shape.pp > 1:
            stages = self.device_mesh["pp"].get_group()
            config = self.config
            pipeline = Pipeline(division.chunks, stages, config.schedule, config.parts)
        self._wrapped = MeshOptimizer(
            optimizer,
            division,
            pipeline,
            self.world.comm,
            self.shape,
            self.device_mesh["dp"].get_group(),
            self.config.shard,
            self._timeout,
            clip_norm,
        )
        return self._wrapped

    def check_parameters(self, model: nn.Module) -> None:
        """Refuse ranks that hold other values of the same part of a parameter.

        Raises:
            Error: The first parameter that differs, and whose it is.
        """
        assert self._wrapped is not None
        self._wrapped.check_parameters()

    def _check(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Refuse what cannot be divided.

        Raises:
            Error: The first thing.
        """
        if self.config.shard != "none" or self.shape.tp > 1:
            check_elementwise(optimizer, self.name)
        if sparse_tables(model):
            raise Error(
                "strategy 'mesh' knows no sparse gradients of embeddings.",
                hint="make them with sparse=False, or use --strategy horovod.",
            )
        known = set(model.parameters())
        if any(p not in known for group in optimizer.param_groups for p in group["params"]):
            raise Error(
                "the optimizer has parameters that are not the model's.",
                hint="make them part of the model.",
            )
        for name, module in model.named_modules():
            if self.shape.pp > 1 and getattr(module, "track_running_stats", False):
                raise Error(
                    f"'{name}' ({type(module).__name__}) keeps statistics of batches, which a "
                    "pipeline cuts into micro-batches.",
                    hint="use LayerNorm or GroupNorm, or pp=1.",
                )
