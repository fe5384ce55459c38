"""The training loop: every strategy runs through it.

What happens, in order, where it stands, and what callbacks are told (``callbacks.py``)::

    set_up                 splits, model, optimizer, loaders           setup.py
    restore | join         what to go on from                          checkpointing.py
    wrap                   the strategy takes the optimizer over       ../strategies/
                                                                       -> on_start
    for each epoch
      for each batch                                                   ../data/loader.py
        step               forward, backward, all-reduce, update       step.py
        attend             what is due after it, in this order:        after_step.py
                                                                       -> on_step
          interruption     asked to stop? somebody waits to join?      interruption.py
          health           is all finite still?                        nonfinite.py
          log              means over the steps since the last line    run_metrics.py
                                                                       -> on_log
          validate         means over the validation samples           evaluation.py
                                                                       -> on_validation
          save             a checkpoint                                checkpointing.py
                                                                       -> on_checkpoint
    finish                 all ranks have the world's parameters       run_end.py
                                                                       -> on_end

When a rank is lost (:class:`hpctrain.errors.PeerLost`) or wants to join
(:class:`hpctrain.elastic.membership.Regroup`), whichever of these is under way is left;
``recovery.py`` has the world formed anew, and :meth:`Trainer.run` is called again with the meeting.
"""

from __future__ import annotations

from typing import Any

from hpctrain.checkpoint.store import CheckpointStore
from hpctrain.config import RunConfig
from hpctrain.elastic.membership import Meeting, Progress
from hpctrain.strategies.base import DistributedOptimizer, Strategy
from hpctrain.tasks.task import Task
from hpctrain.train.interruption import Interruption
from hpctrain.train.model_setup import begin_training
from hpctrain.train.parts import make_parts
from hpctrain.train.recorder import Recorder
from hpctrain.train.sample_trace import begin_trace
from hpctrain.train.setup import join_world, set_up
from hpctrain.train.state import parameters_sha256


class Trainer:
    """Trains one task under one configuration.

    Args:
        config: Resolved.
        task: The user's side.
        strategy: Connected: how the world's replicas agree.
        store: Where checkpoints go; rank 0 alone writes there.

    Attributes:
        optimizer: The wrapped one, after :meth:`wrap`.
        splits: The task's samples.
        state: What is trained: model, optimizer, place in the data, counters.
        warnings: What the task or the configuration has, and nothing reads.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from hpctrain.strategies.single import Single
        >>> from hpctrain.tasks.digits import Digits
        >>> from hpctrain.world.launcher import ALONE
        >>> from hpctrain.world.world import World
        >>> config = RunConfig(task="digits", train={"steps": 3})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = CheckpointStore(Path(folder), keep=1)
        ...     trainer = Trainer(config, Digits(), Single(World(ALONE)), store)
        >>> trainer.steps, len(trainer.splits["validation"])
        (3, 359)
    """

    def __init__(
        self, config: RunConfig, task: Task, strategy: Strategy, store: CheckpointStore
    ) -> None:
        self.config, self.task, self.strategy, self.store = config, task, strategy, store
        self.world = strategy.world
        self.optimizer: DistributedOptimizer | None = None
        join_world(task, strategy)
        setup = set_up(config, task, strategy)
        self.splits, self.state, self.warnings = setup.splits, setup.state, setup.warnings
        self._parts = make_parts(config, task, strategy, store, setup)
        self._begun = False

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self._parts.extent.steps

    @property
    def epochs(self) -> float:
        """Passes over the data done so far; whole at the end of an epoch."""
        return self._parts.extent.epochs

    @property
    def interrupted(self) -> bool:
        """Whether the run was asked to stop, and did before its end."""
        return self._parts.extent.interrupted

    def parameters_sha256(self) -> str:
        """Return a hash of the parameters, on rank 0; every rank calls this after the last step."""
        assert self.optimizer is not None
        values = None if self.strategy.replicates else self.optimizer.world_parameters()
        return parameters_sha256(self.state.model, values) if self.world.leads else ""

    def restore(self, snapshot: Any | None, *, prepared: bool = True) -> bool:
        """Take over rank 0's snapshot, if it has one; what other ranks pass is ignored.

        Args:
            snapshot: To go on from.
            prepared: Whether this rank has looked for one.

        Returns:
            Whether rank 0 has looked for one. If not, the one that had is lost.
        """
        start = self._parts.checkpointing.restore(snapshot, prepared=prepared)
        if start is None:
            return False
        self._parts.metrics.start = start
        self._parts.metrics.remember()
        return True

    def join(self, start: dict[str, Any]) -> None:
        """Begin where the others began; ``run`` then skips what they did since.

        Args:
            start: What the others know of it.
        """
        self._parts.metrics.start = start
        self.state.loader.load_state_dict(start["loader"])
        self.state.counters.step, self.state.counters.samples = start["step"], start["samples"]
        self._parts.after_step.came_late = True

    def wrap(self) -> None:
        """Start every rank from rank 0's model and optimizer, and wrap the optimizer."""
        if self.optimizer is None:
            self.optimizer = self.strategy.wrap(
                self.state.model, self.state.optimizer, clip_norm=self.config.train.clip_norm
            )
            self._parts.callbacks.run.optimizer = self.optimizer
            self.optimizer.mark = self._parts.timer.lap
            self.optimizer.overlaps = True
        elif self.strategy.recovery is not None:
            # Once more: another rank was lost before all had begun. No step has ended.
            self._parts.rejoin.begin_again(self.optimizer, begun=self._begun)
            self._begun = False
        self._parts.checkpointing.hand_over(self.optimizer)

    def run(
        self,
        recorder: Recorder,
        interruption: Interruption | None = None,
        meeting: Meeting | None = None,
    ) -> None:
        """Train from the present state to the end of the run, or until asked to stop.

        Args:
            recorder: Takes what happens.
            interruption: How it is asked to stop.
            meeting: Of the ranks that go on, after a loss.

        Raises:
            PeerLost: Another rank is gone.
            Regroup: Somebody is to join.
            Error: Samples or checkpoints cannot be read or written.
        """
        after_step = self._parts.after_step
        after_step.recorder = self._parts.callbacks.run.recorder = recorder
        after_step.interruption = interruption or Interruption()
        if self.optimizer is None:
            self.wrap()
        assert self.optimizer is not None
        if not self._begun and (meeting is None or meeting.newest < 0):
            self._begin(self.optimizer)
        elif meeting is not None:
            self._catch_up(self.optimizer, meeting)
        while not self._parts.extent.finished:
            self._train_epoch(self.optimizer)
        self._parts.end.finish(self.optimizer)

    def _begin(self, optimizer: DistributedOptimizer) -> None:
        parts = self._parts
        parts.extent.skip(optimizer.missed)
        begin_training(self.state.model)
        parts.after_step.begin()
        parts.timer.lap("other")
        parts.metrics.begin()
        parts.changes.begin()
        self._begun = True
        parts.rejoin.settle(self.config)
        if self.config.log.trace_samples:
            launch = parts.checkpointing.launch
            parts.step.trace = begin_trace(self.config, self.strategy, self.store, launch)
        parts.callbacks.start()

    def _train_epoch(self, optimizer: DistributedOptimizer) -> None:
        """Take an epoch's steps, or those that are left of it."""
        parts, loader = self._parts, self.state.loader
        parts.timer.lap("other")
        for batch in loader:
            parts.timer.lap("input")
            parts.step.take(optimizer, batch)
            parts.after_step.count(parts.step.computed)
            parts.step.count(batch)
            parts.extent.skip(optimizer.missed)
            parts.rejoin.keep()
            parts.after_step.attend(optimizer, epoch_ended=batch.stop == loader.samples)
            parts.timer.lap("other")
            if parts.extent.finished:
                break

    def _catch_up(self, optimizer: DistributedOptimizer, meeting: Meeting) -> None:
        """Go on in a world that was formed anew, from the farthest step that somebody has taken."""
        parts, loader = self._parts, self.state.loader
        again = parts.rejoin.catch_up(
            optimizer, meeting, self._begun, lambda: parts.after_step.count(parts.step.computed)
        )
        if not self._begun:
            self._begin(optimizer)
        parts.after_step.restart(meeting.newest, again=again)
        parts.metrics.names = [[], []]
        self.note(meeting)
        parts.rejoin.settle(self.config)
        if again:
            parts.after_step.attend(optimizer, epoch_ended=loader.cursor >= loader.samples)

    def progress(self, stage: int) -> Progress:
        """Return how far this rank has come, in that stage of the run."""
        step = self.state.counters.step
        ends = (step, self._parts.after_step.attended) if self._begun else (-1, -1)
        return Progress(stage, *ends)

    def note(self, meeting: Meeting) -> None:
        """Have it recorded who is no longer there, and who came."""
        self._parts.changes.note_meeting(self.state.counters, meeting)

    def tell(self, recorder: Recorder) -> None:
        """Record who was lost, and who joined."""
        self._parts.after_step.recorder = recorder
        self._parts.after_step.tell(self.optimizer)
