"""When a run saves its state, and what it goes on from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hpctrain.checkpoint.store import CheckpointStore
from hpctrain.errors import Error
from hpctrain.strategies.base import Agreement, DistributedOptimizer, Strategy
from hpctrain.strategies.buffer_averaging import average_buffers
from hpctrain.tables.table import tables_of
from hpctrain.train.callbacks import Callbacks
from hpctrain.train.evaluation import check_agreed
from hpctrain.train.nonfinite import Health, all_finite
from hpctrain.train.run_metrics import RunMetrics
from hpctrain.train.sample_trace import launches
from hpctrain.train.state import Counters, TrainState
from hpctrain.world.broadcast import broadcast_tree
from hpctrain.world.logs import logger

LOG = logger(__name__)


class Checkpointing:
    """Saves a run's state on rank 0, and gives every rank what a checkpoint holds.

    Args:
        strategy: Connected.
        state: What is trained.
        store: Where checkpoints go; rank 0 alone writes there.
        metrics: Of the run.
        health: Whether the parameters are fit for a checkpoint.
        callbacks: May have a state of their own, and are told.

    Attributes:
        launch: How often the run was started before.
        strategy_state: What the strategy is to go on from, until it has it.
        tables: Where the rows of tables are to be read from, until they are.
    """

    def __init__(
        self,
        strategy: Strategy,
        state: TrainState,
        store: CheckpointStore,
        metrics: RunMetrics,
        health: Health,
        callbacks: Callbacks,
    ) -> None:
        self._strategy = strategy
        self._world = strategy.world
        self._state = state
        self._store = store
        self._metrics = metrics
        self._health = health
        self._callbacks = callbacks
        self._averaged_at = 0  # samples of this rank when buffers were last the world's
        self.launch = 0
        self.strategy_state: dict[str, Any] = {}
        self.tables: dict[str, Any] = {}

    def restore(self, snapshot: Any | None, *, prepared: bool) -> dict[str, Any] | None:
        """Take over rank 0's snapshot, if it has one; what other ranks pass is ignored.

        Args:
            snapshot: To go on from.
            prepared: Whether this rank has looked for one.

        Returns:
            What a rank has to know that joins later; None: rank 0 has not looked for a snapshot,
            because the one that had is lost.
        """
        folder = self._store.folder.parent
        launch = launches(folder) if self._world.leads else 0
        mine = {"snapshot": snapshot, "prepared": prepared, "launch": launch}
        told = broadcast_tree(self._world.comm, mine)
        if not told["prepared"]:
            return None
        self.launch = told["launch"]
        found = told["snapshot"]
        counters = self._state.counters = Counters()
        reason = "start"
        if found is not None:
            has = bool(tables_of(self._state.model))
            self._state.load_state_dict(found)
            counters = self._state.counters
            self._callbacks.load_state_dict(found.get("callbacks", {}))
            self.strategy_state = found.get("strategy", {}).get(self._strategy.name, {})
            # A checkpoint of a model without tables is refused by a model with some.
            self.tables = found.get("tables") or (
                {"folder": str(folder), "files": 0} if has else {}
            )
            reason = f"resumed at step {counters.step}"
        size = self._world.size
        counters.world.append({"step": counters.step, "size": size, "reason": reason})
        return {
            "out": str(folder.resolve()),
            "loader": self._state.loader.state_dict(),
            "step": counters.step,
            "samples": counters.samples,
        }

    def hand_over(self, optimizer: DistributedOptimizer) -> None:
        """Give the strategy what it is to go on from."""
        if self.strategy_state:
            optimizer.load_strategy_state(self.strategy_state)
            self.strategy_state = {}
        if self.tables:
            optimizer.restore_tables(Path(self.tables["folder"]), self.tables["files"])
            self.tables = {}

    @torch.no_grad()
    def save(self, optimizer: DistributedOptimizer, *, best: bool) -> None:
        """Save the state that the world has; every rank calls this, or rank 0 alone.

        Nothing is saved that is not finite: it would push good checkpoints out.

        Args:
            optimizer: The wrapped one.
            best: Whether it is the best so far.
        """
        self.agree()
        if self._health.unfit:
            return
        if not self._strategy.agreement.in_step and not self._world.leads:
            return
        self._save(optimizer, best=best)
        if not self._health.unfit:
            self._callbacks.tell("on_checkpoint")

    def _save(self, optimizer: DistributedOptimizer, *, best: bool) -> None:
        snapshot = optimizer.snapshot()
        if self._strategy.agreement is Agreement.AT_ROUNDS:
            check_agreed(self._strategy, self._state, snapshot.parameters)
        if not self._world.leads:
            return
        state = self._state.state_dict()
        if snapshot.parameters is not None:
            if not all_finite(snapshot.parameters.values()):
                self._health.unfit = True
                return
            named = self._state.model.named_parameters(remove_duplicate=False)
            values = snapshot.parameters
            state["model"].update({name: values[p] for name, p in named if p in values})
        state["optimizer"] = snapshot.optimizer
        if snapshot.strategy:
            state["strategy"] = {self._strategy.name: snapshot.strategy}
        if callbacks := self._callbacks.state_dict():
            state["callbacks"] = callbacks
        step = self._state.counters.step
        LOG.info("checkpoint of step %d%s", step, ", the best so far" if best else "")
        rows = None
        if optimizer.tables and not self._store.has(step):
            rows = self._store.pending(step)
            state["tables"] = {"files": self._keep(optimizer, rows)}
        self._store.save(step, state, best=best, beside=rows)

    def _keep(self, optimizer: DistributedOptimizer, folder: Path) -> int:
        """Have the rows of tables written; nothing that they are of changes meanwhile."""
        try:
            return optimizer.keep_tables(folder)
        except OSError as error:
            raise Error(
                f"cannot write rows of tables to {folder}: {error}.",
                hint="make room (or raise the quota), then go on with --resume auto: the "
                "checkpoints before it are whole.",
            ) from error

    def settled(self) -> None:
        """Note that what was due after a step is done: buffers are averaged up to here."""
        self._averaged_at = self._metrics.consumed

    def agree(self) -> None:
        """Make the world's what each rank's batches gave it a little different.

        Such are running statistics, and where ranks agree at rounds the averaged weights: the mean
        of averages is the average of means.
        """
        agreement, comm = self._strategy.agreement, self._world.comm
        if comm.size == 1 or not agreement.in_step:
            return
        ema = self._state.ema
        modules = [m for m in (self._state.model, ema) if m is not None]
        average_buffers(comm, modules, self._metrics.consumed - self._averaged_at)
        if ema is not None and agreement is Agreement.AT_ROUNDS:
            for parameter in ema.parameters():
                if parameter.is_floating_point() or parameter.is_complex():
                    comm.all_reduce(parameter.data)
                    parameter.data /= comm.size

    def newest(self, say: Callable[[Any], None] = lambda damage: None) -> Any | None:
        """Return the newest good checkpoint of this run, if there is one.

        Args:
            say: Told of damaged ones.
        """
        return self._store.newest(say) if self._store.steps() else None

    def wait(self) -> None:
        """Wait until what was saved is on disk."""
        self._store.wait()
