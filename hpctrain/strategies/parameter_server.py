"""Data parallelism through a parameter server: synchronous, asynchronous and in between."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hpctrain import process
from hpctrain.config import ElasticConfig, PsConfig, Section
from hpctrain.errors import Error
from hpctrain.ps.consistency import consistency_of
from hpctrain.ps.endpoint import Endpoint
from hpctrain.strategies.base import (
    Agreement,
    Strategy,
    check_shareable,
    check_trainable,
)
from hpctrain.strategies.ps_communicator import PsCommunicator
from hpctrain.strategies.ps_optimizer import PsOptimizer
from hpctrain.strategies.start import check_alike, share_rest
from hpctrain.tables.table import tables_of
from hpctrain.world.agreement import compare
from hpctrain.world.world import World


class ParameterServer(Strategy):
    """A parameter server: some ranks hold the parameters, others compute gradients.

    Making it divides the ranks into workers and servers.

    Args:
        world: Who was launched; on a worker, its communicator becomes that of the workers.
        config: Servers, consistency, and the rest.
        elastic: Not read: servers forget lost workers by themselves.
        timeout_seconds: Longest wait for another rank.

    Raises:
        Error: The ranks do not fit, or MPI sees others than were launched.
    """

    name = "ps"
    Config = PsConfig
    averages_gradients = False
    holds_tables = True

    def __init__(
        self,
        world: World,
        config: Section | None = None,
        *,
        elastic: ElasticConfig | None = None,
        timeout_seconds: float = 600.0,
    ) -> None:
        super().__init__(world, config, elastic=elastic, timeout_seconds=timeout_seconds)
        launched = world.launch.size
        self.ends = Endpoint(self.config, launched=launched, timeout_seconds=timeout_seconds)
        if not consistency_of(self.config).same_weights:
            self.agreement = Agreement.ON_SERVERS
        self._wrapped = False
        self._clocks: int | None = None
        if self.ends.record is not None and not self.serves:
            place = self.ends.roles.workers.index(self.ends.me)
            self._clocks = self.ends.record.about.clocks[place]
            # How many there are makes a difference to the last bits.
            torch.set_num_threads(self.ends.record.about.threads[place])
        if not self.serves:
            world.comm = PsCommunicator(self.ends, world.launch.local_rank, world.launch.local_size)
            self.ends.start()

    @property
    def stopped(self) -> bool:
        """Whether another worker ended the training early."""
        client = self.ends.client
        if client is not None and self._clocks is not None:
            return client.clock >= self._clocks  # when the news came then
        return client is not None and client.stopped

    @property
    def joined(self) -> Any:
        """What a worker that joins a run under way has to know; None: this one began with it."""
        if self.ends.recruit is None or self.ends.client is None:
            return None
        return self.ends.client.ask("recall").value

    @property
    def newcomers(self) -> bool:
        """Whether workers may join."""
        return self.config.workers is not None

    @property
    def serves(self) -> bool:
        """Whether this rank holds parameters, and trains nothing."""
        return self.ends.client is None

    def serve(self) -> None:
        """Serve until every worker has left.

        Raises:
            PeerLost: The run cannot go on.
        """
        self.ends.serve()
        process.mpi_is_whole = not self.ends.lost

    def wrap(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        clip_norm: float | None = None,
    ) -> PsOptimizer:
        """Start every worker from the first one's model and optimizer state; wrap the optimizer.

        Args:
            model: To be trained; overwritten by the first worker's.
            optimizer: Of its parameters; the servers take over its rule and state.
            clip_norm: Largest norm of the gradient; None: no clipping.

        Raises:
            Error: The optimizer is none that the servers know, this rank serves, or the strategy
                has wrapped one already.
        """
        check_trainable(optimizer)
        check_shareable(model, optimizer, tables=True)
        comm = self.world.comm
        if not isinstance(comm, PsCommunicator):
            raise Error(
                f"rank {self.ends.me} is a server, which trains nothing.",
                hint="on such ranks call strategy.serve() instead: `if strategy.serves: "
                "strategy.serve()`; or use PsConfig(colocate=True).",
            )
        tables = tables_of(model)
        if tables:
            check_tables(self.config)
        if self._wrapped:
            raise Error(
                "this parameter server trains a model already.",
                hint="give one optimizer the parameters of all models, as groups; or make another "
                "strategy for the next model, with PsConfig(colocate=True); or use horovod.",
            )
        if self.ends.recruit is None:
            check_alike(comm, model, optimizer)
            specs = {f"table '{t.spec.name}'": t.spec.describe() for t in tables}
            compare(comm, specs, hint="build the same tables, of the same seed, on every rank.")
            share_rest(comm, model, optimizer)
        wrapped = PsOptimizer(model, optimizer, self.ends, comm, clip_norm)
        self._wrapped = True
        return wrapped


def check_tables(config: PsConfig) -> None:
    """Refuse what rows of tables do not have.

    Raises:
        Error: It was asked for.
    """
    refused = {
        f"ps.replicas={config.replicas}": config.replicas > 1,
        "ps.workers": config.workers is not None,
        "ps.record_order": config.record_order is not None,
        "ps.replay": config.replay is not None,
        f"ps.consistency={config.consistency}": consistency_of(config).backups > 0,
    }
    for name, wanted in refused.items():
        if wanted:
            raise Error(
                f"{name} is not for models with embedding tables.",
                hint="leave it out: rows of tables have one copy at most, no recorded order and no "
                "late workers, and wait for every worker's push or for none.",
            )
