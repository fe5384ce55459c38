"""The training loop: every strategy runs through it.

What happens, in order, and where it stands::

    set_up                 splits, model, optimizer, loaders           setup.py
    restore | join         what to go on from                          checkpointing.py
    wrap                   the strategy takes the optimizer over       ../strategies/
    for each epoch
      for each batch                                                   ../data/loader.py
        step               forward, backward, all-reduce, update       step.py
        attend
          interruption     asked to stop? somebody waits to join?      interruption.py
          health           is all finite still?                        nonfinite.py
          log              means over the steps since the last line    run_metrics.py
          validate         means over the validation samples           evaluation.py
          save             a checkpoint                                checkpointing.py
    finish                 all ranks have the world's parameters

When a rank is lost (:class:`hpctrain.errors.PeerLost`) or wants to join
(:class:`hpctrain.elastic.membership.Regroup`), whichever of these is under way is left;
``recovery.py`` has the world formed anew, and :meth:`Trainer.run` is called again with the meeting.
"""

from __future__ import annotations

from typing import Any

import torch

from hpctrain.checkpoint.store import CheckpointStore
from hpctrain.config import RunConfig
from hpctrain.data.batch import Batch
from hpctrain.elastic.membership import Meeting, Progress, Regroup
from hpctrain.errors import Error
from hpctrain.strategies.base import Agreement, DistributedOptimizer, Strategy
from hpctrain.tasks.task import Task
from hpctrain.train.checkpointing import Checkpointing
from hpctrain.train.evaluation import Evaluation, check_agreed
from hpctrain.train.interruption import Interruption
from hpctrain.train.membership_log import MembershipLog
from hpctrain.train.model_setup import UnusedParameters, begin_training
from hpctrain.train.nonfinite import Health
from hpctrain.train.recorder import Recorder, Silent
from hpctrain.train.rejoin import Rejoin, skip
from hpctrain.train.run_metrics import RunMetrics
from hpctrain.train.sample_trace import SampleTrace
from hpctrain.train.setup import join_world, set_up
from hpctrain.train.state import Counters, parameters_sha256
from hpctrain.train.step import TrainStep
from hpctrain.train.step_timer import StepTimer


class Trainer:
    """Trains one task under one configuration.

    Args:
        config: Resolved.
        task: The user's side.
        strategy: Connected: how the world's replicas agree.
        store: Where checkpoints go; rank 0 alone writes there.

    Attributes:
        interrupted: Whether the run was asked to stop, and did before its end.
        optimizer: The wrapped one, after :meth:`wrap`.
        splits: The task's samples.
        state: What is trained: model, optimizer, place in the data, counters.
        warnings: What the task or the configuration has, and nothing reads.
    """

    def __init__(
        self, config: RunConfig, task: Task, strategy: Strategy, store: CheckpointStore
    ) -> None:
        self.config = config
        self.task = task
        self.strategy = strategy
        self.store = store
        self.world = strategy.world
        join_world(task, strategy)
        self.splits, self.state, validation, peaks, self.warnings = set_up(config, task, strategy)
        self._loader = self.state.loader
        self._timer = StepTimer(self.world.device)
        self._health = Health(self.state.model, lambda: self.state.counters, config.train.nonfinite)
        self._metrics = RunMetrics(strategy, self.state, self._timer)
        self._step = TrainStep(config, task, strategy, self.state, peaks, self._timer)
        self._evaluation = Evaluation(
            config, task, strategy, self.state, validation, self._step, self._metrics
        )
        self._checkpointing = Checkpointing(
            strategy, self.state, store, self._metrics, self._health
        )
        self._changes = MembershipLog(self.world)
        self._rejoin = Rejoin(strategy, self.state, self._checkpointing)
        self._recorder: Recorder = Silent()
        self._interruption: Interruption | None = None
        self._unused: UnusedParameters | None = None
        self.optimizer: DistributedOptimizer | None = None
        self.interrupted = False
        self._begun = False
        self._attended = 0  # the last step after which all that was due is done
        self._regroups = False
        self._leads = False  # whether rank 0 is this one, where it alone validates and saves
        self._came_late = False  # and has not asked yet what the metrics are called

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        train, loader = self.config.train, self._loader
        if train.steps is not None:
            return train.steps
        left = -(-(loader.samples - loader.cursor) // loader.batch_size)
        left += (train.epochs - 1 - loader.epoch) * len(loader)
        return self.state.counters.step + max(left, 0)

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        counters = self.state.counters
        ended = counters.step >= self.steps or counters.stopped_early
        return ended or self.strategy.stopped or self.interrupted

    @property
    def epochs(self) -> float:
        """Passes over the data done so far; whole at the end of an epoch."""
        return self._loader.epoch + self._loader.cursor / self._loader.samples

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
        start = self._checkpointing.restore(snapshot, prepared=prepared)
        if start is None:
            return False
        self._metrics.start = start
        self._metrics.remember()
        return True

    def join(self, start: dict[str, Any]) -> None:
        """Begin where the others began; ``run`` then skips what they did since."""
        self._metrics.start = start
        self._loader.load_state_dict(start["loader"])
        self.state.counters.step, self.state.counters.samples = start["step"], start["samples"]
        self._came_late = True

    def wrap(self) -> None:
        """Start every rank from rank 0's model and optimizer, and wrap the optimizer."""
        if self.optimizer is None:
            self.optimizer = self.strategy.wrap(
                self.state.model, self.state.optimizer, clip_norm=self.config.train.clip_norm
            )
            self.optimizer.mark = self._timer.lap
            self.optimizer.overlaps = True
        elif self.strategy.recovery is not None:
            # Once more: another rank was lost before all had begun. No step has ended.
            self._rejoin.begin_again(self.optimizer, begun=self._begun)
            self._begun = False
        self._checkpointing.hand_over(self.optimizer)

    def progress(self, stage: int) -> Progress:
        """How far this rank has come, in that stage of the run."""
        step = self.state.counters.step
        return Progress(stage, step, self._attended) if self._begun else Progress(stage, -1, -1)

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
        self._recorder, self._interruption = recorder, interruption
        if self.optimizer is None:
            self.wrap()
        assert self.optimizer is not None
        if not self._begun and (meeting is None or meeting.newest < 0):
            self._begin(self.optimizer)
            meeting = None
        if meeting is not None:
            self._catch_up(self.optimizer, meeting)
        while not self.finished:
            self._timer.lap("other")
            for batch in self._loader:
                self._timer.lap("input")
                self._take_step(self.optimizer, batch)
                self._attend(epoch_ended=batch.stop == self._loader.samples)
                self._timer.lap("other")
                if self.finished:
                    break
        self._finish(self.optimizer)
        self.tell(recorder)
        if not self.interrupted:
            self._health.check_end()
        self.store.wait()

    def _begin(self, optimizer: DistributedOptimizer) -> None:
        skip(self.state, min(optimizer.missed, self.steps - self.state.counters.step))
        begin_training(self.state.model)
        if self.state.counters.step == 0:
            self._unused = UnusedParameters(self.state.model)
        self._attended = self.state.counters.step
        self._timer.lap("other")
        self._metrics.begin()
        self._changes.begin()
        self._leads = self.world.leads
        self._begun = True
        self._rejoin.resize(self.config)
        self._rejoin.keep()
        if self.config.log.trace_samples:
            self._step.trace = self._trace()

    def _trace(self) -> SampleTrace:
        if not self.strategy.agreement.in_step or self.config.data.weights is not None:
            raise Error(
                "samples cannot be traced where ranks do not take steps together, or where samples "
                "are drawn by weight.",
                hint="drop --trace-samples.",
            )
        recovery = self.strategy.recovery
        number = recovery.membership.number if recovery is not None else self.world.rank
        return SampleTrace(self.store.folder.parent, number, self._checkpointing.launch)

    def _take_step(self, optimizer: DistributedOptimizer, batch: Batch) -> None:
        self._step.take(optimizer, batch)
        self._count()
        self._step.count(batch)
        skip(self.state, min(optimizer.missed, self.steps - self.state.counters.step))
        self._rejoin.keep()

    def _count(self) -> None:
        """A step is done: what was computed in it counts, and what was logged before is over."""
        if self.strategy.agreement.in_step:
            self._changes.told()
        self._metrics.count(self._step.computed)
        self._health.count(self._step.computed)

    def _attend(self, *, epoch_ended: bool) -> None:
        """After a step: do what is due. It may be done again, where a rank is lost meanwhile."""
        optimizer, counters, config = self.optimizer, self.state.counters, self.config
        assert optimizer is not None
        agreement, recorder = self.strategy.agreement, self._recorder
        if self._came_late:
            # Not earlier: the others may have learned it at the very step before this rank's first.
            self._came_late = False
            self._metrics.names = self.strategy.joined["metrics"]
        recorder.advance(counters.step)
        self.tell(recorder)
        self._tell_unused()
        self._listen()
        last = counters.step >= self.steps
        logs = last or counters.step % config.log.every_steps == 0
        validates = last or self._due(config.train.validate_every_steps, epoch_ended)
        saves = self._due(config.checkpoint.every_steps, epoch_ended)
        if last and agreement is Agreement.AT_ROUNDS:
            optimizer.finish()
        if logs or validates or saves or self.finished:
            self._health.look(self.world.comm if agreement.in_step else None, recorder.say)
        if logs:
            self._metrics.log(optimizer, recorder, self.epochs)
        if last and not agreement.in_step:
            return  # the others are not there yet
        if agreement is Agreement.ALWAYS and (validates or saves or self.finished):
            check_agreed(self.strategy, self.state)
        improved = validates and self._validate(optimizer)
        if saves or improved or self.finished:
            self._checkpointing.save(optimizer, best=improved)
        if (validates or saves) and not self.finished:
            self.tell(recorder)
        self._attended = counters.step
        if validates or saves or improved or self.finished:
            self._checkpointing.settled()
        if validates or saves:
            self._rejoin.keep_buffers()
        if self._regroups and not self.finished:
            self._regroups = False
            raise Regroup

    def _due(self, every_steps: int | None, epoch_ended: bool) -> bool:
        if every_steps is None:
            return epoch_ended
        return self.state.counters.step % every_steps == 0

    def _validate(self, optimizer: DistributedOptimizer) -> bool:
        """Whether the model is the best so far."""
        if not self._leads and self._evaluation.takes_part and not self.strategy.agreement.in_step:
            self._succeed()
        return self._evaluation.validate(optimizer, self._recorder, self._checkpointing.agree)

    def _succeed(self) -> None:
        """Rank 0 is lost, and this is now: what it alone knew is in its last checkpoint."""
        self._leads = True
        newest = self._checkpointing.newest()
        if newest is not None:
            mine, its = self.state.counters, Counters(**newest["counters"])
            mine.best, mine.validations_since_best = its.best, its.validations_since_best
            mine.metrics = its.metrics | mine.metrics

    def _listen(self) -> None:
        """Whether the run is asked to stop, or somebody waits to join."""
        interruption, step = self._interruption, self.state.counters.step
        if interruption is None:
            return
        if not self.strategy.agreement.in_step:
            if interruption.noticed():
                self.world.comm.stop()
            return
        recovery = self.strategy.recovery
        waiting = recovery.membership.waiting if recovery is not None else lambda: False
        look = interruption.look(self.world.comm, step, waiting)
        self._regroups = look.waiting
        if look.stop and not self.finished:
            self.interrupted = True

    def _finish(self, optimizer: DistributedOptimizer) -> None:
        """After this rank's last step: have the parameters that the world has come to."""
        agreement, counters = self.strategy.agreement, self.state.counters
        if agreement is Agreement.AT_ROUNDS and not self.interrupted:
            optimizer.finish()
            check_agreed(self.strategy, self.state)
        if not agreement.in_step:
            optimizer.finish()
            heard = self._interruption is not None and self._interruption.heard()
            told = torch.tensor([float(heard), float(counters.step < self.steps)])
            self.world.comm.all_reduce(told)
            self.interrupted = bool((told > 0).all()) and not counters.stopped_early
            self.world.once(lambda: self._conclude(optimizer))

    def _conclude(self, optimizer: DistributedOptimizer) -> None:
        """Validate and save at the end, on rank 0, where it has done so alone."""
        self.tell(self._recorder)
        best = not self.interrupted and self._validate(optimizer)
        self._checkpointing.save(optimizer, best=best)
        self.store.wait()

    def _catch_up(self, optimizer: DistributedOptimizer, meeting: Meeting) -> None:
        """Go on in a world that was formed anew, from the farthest step that somebody has taken."""
        newest = meeting.newest
        again = any(0 <= each.attended < newest for each in meeting.progress)
        self._rejoin.catch_up(optimizer, meeting, again, self._begun, self._count)
        if not self._begun:
            self._begin(optimizer)
        self._attended = min(newest, self._attended) if again else newest
        self.interrupted = self.interrupted and not again
        self._regroups = False
        self._metrics.names = [[], []]
        if self._interruption is not None:
            self._interruption.restart(newest)
        self.note(meeting)
        self._rejoin.resize(self.config)
        self._rejoin.keep()
        if again:
            self._attend(epoch_ended=self._loader.cursor >= self._loader.samples)

    def note(self, meeting: Meeting) -> None:
        """Have it recorded who is no longer there, and who came."""
        self._changes.note_meeting(self.state.counters, meeting)

    def tell(self, recorder: Recorder) -> None:
        """After a step: record who was lost, and who joined."""
        counters = self.state.counters
        if self.optimizer is not None:
            self._changes.note(counters, self.optimizer.changes())
        self._changes.tell(counters, recorder)

    def _tell_unused(self) -> None:
        """Once: warn of parameters that no rank's first step used."""
        if self._unused is None:
            return
        together = self.strategy.agreement.in_step and not self.strategy.newcomers
        warning = self._unused.warning(self.world.comm if together else None)
        self._unused = None
        if warning:
            self._recorder.say(f"warning: {warning}")
