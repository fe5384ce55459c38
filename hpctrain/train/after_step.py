"""What is due after a step, in one order: stop or go on, look, log, validate, save."""

from __future__ import annotations

from typing import Any

from hpctrain.config import RunConfig
from hpctrain.elastic.membership import Regroup
from hpctrain.mesh.passes import Computed
from hpctrain.strategies.base import Agreement, DistributedOptimizer, Strategy
from hpctrain.train.callbacks import Callbacks
from hpctrain.train.checkpointing import Checkpointing
from hpctrain.train.evaluation import Evaluation, check_agreed
from hpctrain.train.extent import Extent
from hpctrain.train.interruption import Interruption
from hpctrain.train.membership_log import MembershipLog
from hpctrain.train.model_setup import UnusedParameters
from hpctrain.train.nonfinite import Health
from hpctrain.train.recorder import Recorder, Silent
from hpctrain.train.rejoin import Rejoin
from hpctrain.train.run_metrics import RunMetrics
from hpctrain.train.state import Counters, TrainState


class AfterStep:
    """Does what is due after a step.

    Where a rank is lost meanwhile it is done again, by all that are left.

    Args:
        config: Resolved.
        strategy: Connected.
        state: What is trained.
        extent: How long the run is.
        health: Whether all is finite.
        metrics: Of the run.
        evaluation: Validates.
        checkpointing: Saves.
        changes: Who was lost, and who joined.
        rejoin: Remembers what a loss would have to undo.
        callbacks: Are told.

    Attributes:
        attended: The last step after which all that was due is done.
        recorder: Takes what happens.
        interruption: How the run is asked to stop.
        came_late: Whether this rank joined, and has not asked yet what the metrics are called.
    """

    def __init__(
        self,
        config: RunConfig,
        strategy: Strategy,
        state: TrainState,
        extent: Extent,
        health: Health,
        metrics: RunMetrics,
        evaluation: Evaluation,
        checkpointing: Checkpointing,
        changes: MembershipLog,
        rejoin: Rejoin,
        callbacks: Callbacks,
    ) -> None:
        self._config = config
        self._strategy = strategy
        self._world = strategy.world
        self._state = state
        self._extent = extent
        self._health = health
        self._metrics = metrics
        self._evaluation = evaluation
        self._checkpointing = checkpointing
        self._changes = changes
        self._rejoin = rejoin
        self._callbacks = callbacks
        self._unused: UnusedParameters | None = None
        self._regroups = False
        self._leads = False  # whether rank 0 is this one, where it alone validates and saves
        self.attended = 0
        self.recorder: Recorder = Silent()
        self.interruption = Interruption()
        self.came_late = False

    def begin(self) -> None:
        """Begin at the present step: whatever was due after those before it counts as done."""
        self.attended = self._state.counters.step
        self._leads = self._world.leads
        if self.attended == 0:
            self._unused = UnusedParameters(self._state.model)

    def restart(self, newest: int, *, again: bool) -> None:
        """Go on in a world that was formed anew.

        Args:
            newest: The step that all have come to.
            again: Whether what is due after it is to be done again.
        """
        self.attended = min(newest, self.attended) if again else newest
        self._extent.interrupted = self._extent.interrupted and not again
        self._regroups = False
        self.interruption.restart(newest)

    def count(self, computed: list[Computed]) -> None:
        """Count a step in: add its metrics, after dropping those that were logged already.

        Args:
            computed: Means over samples, and how many samples those are.
        """
        if self._strategy.agreement.in_step:
            self._changes.told()
        self._metrics.count(computed)
        self._health.count(computed)

    def attend(self, optimizer: DistributedOptimizer, *, epoch_ended: bool) -> None:
        """Do what is due after the step that has ended.

        Args:
            optimizer: The wrapped one.
            epoch_ended: Whether the step was an epoch's last.

        Raises:
            PeerLost: Another rank is gone.
            Regroup: Somebody is to join.
            Error: What was computed is no number, ranks differ, or nothing can be written.
        """
        counters, config, agreement = self._state.counters, self._config, self._strategy.agreement
        self._learn_names()
        self.recorder.advance(counters.step)
        self.tell(optimizer)
        self._tell_unused()
        self._callbacks.tell("on_step")
        self._listen()
        last = self._extent.complete
        logs = last or counters.step % config.log.every_steps == 0
        validates = last or self._due(config.train.validate_every_steps, epoch_ended)
        saves = self._due(config.checkpoint.every_steps, epoch_ended)
        if last and agreement is Agreement.AT_ROUNDS:
            optimizer.finish()
        if logs or validates or saves or self._extent.finished:
            self._health.look(self._world.comm if agreement.in_step else None, self.recorder.say)
        if logs:
            self._metrics.log(optimizer, self.recorder, self._extent.epochs)
            self._callbacks.tell("on_log")
        if last and not agreement.in_step:
            return  # the others are not there yet
        if agreement is Agreement.ALWAYS and (validates or saves or self._extent.finished):
            check_agreed(self._strategy, self._state)
        improved = validates and self.validate(optimizer)
        if saves or improved or self._extent.finished:
            self._checkpointing.save(optimizer, best=improved)
        if (validates or saves) and not self._extent.finished:
            self.tell(optimizer)
        self.attended = counters.step
        if validates or saves or self._extent.finished:
            self._checkpointing.settled()
        if validates or saves:
            self._rejoin.keep_buffers()
        if self._regroups and not self._extent.finished:
            self._regroups = False
            raise Regroup

    def validate(self, optimizer: DistributedOptimizer) -> bool:
        """Validate, where this rank takes part; True where the model is the best so far.

        Args:
            optimizer: The wrapped one.
        """
        if not self._leads and self._evaluation.takes_part and not self._strategy.agreement.in_step:
            self._succeed()
        return self._evaluation.validate(optimizer, self.recorder, self._checkpointing.agree)

    def tell(self, optimizer: DistributedOptimizer | None) -> None:
        """Record who was lost, and who joined.

        Args:
            optimizer: The wrapped one, if there is one already.
        """
        counters = self._state.counters
        if optimizer is not None:
            self._changes.note(counters, optimizer.changes())
        self._changes.tell(counters, self.recorder)

    def _due(self, every_steps: int | None, epoch_ended: bool) -> bool:
        if every_steps is None:
            return epoch_ended
        return self._state.counters.step % every_steps == 0

    def _learn_names(self) -> None:
        """Learn, after a late rank's first step, metric names that others met the step before."""
        if self.came_late:
            self.came_late = False
            joined: Any = self._strategy.joined
            self._metrics.names = joined["metrics"]

    def _tell_unused(self) -> None:
        """Warn, once, of parameters that no rank's first step used."""
        if self._unused is None:
            return
        together = self._strategy.agreement.in_step and not self._strategy.newcomers
        warning = self._unused.warning(self._world.comm if together else None)
        self._unused = None
        if warning:
            self.recorder.say(f"warning: {warning}")

    def _listen(self) -> None:
        """Whether the run is asked to stop, or somebody waits to join."""
        interruption, counters = self.interruption, self._state.counters
        ends = self._callbacks.ends
        if not self._strategy.agreement.in_step:
            if ends:
                self._stop_early(ends)
            if ends or interruption.noticed():
                self._world.comm.stop()
            return
        recovery = self._strategy.recovery
        waiting = recovery.membership.waiting if recovery is not None else lambda: False
        look = interruption.look(self._world.comm, counters.step, waiting, ends=bool(ends))
        self._regroups = look.waiting
        if look.ends and not self._extent.finished:
            self._stop_early(ends or "a callback of another rank asked for it")
        if look.stop and not self._extent.finished:
            self._extent.interrupted = True

    def _stop_early(self, why: str) -> None:
        counters = self._state.counters
        if not counters.stopped_early:
            counters.stopped_early = True
            self.recorder.say(f"stopped early at step {counters.step}: {why}")

    def _succeed(self) -> None:
        """Rank 0 is lost, and this is now: what it alone knew is in its last checkpoint."""
        self._leads = True
        newest = self._checkpointing.newest()
        if newest is not None:
            mine, its = self._state.counters, Counters(**newest["counters"])
            mine.best, mine.validations_since_best = its.best, its.validations_since_best
            mine.metrics = its.metrics | mine.metrics
