"""What a rank does to go on in a world that was formed anew: undo, catch up, and divide again."""

from __future__ import annotations

from collections.abc import Callable

from hpctrain.config import RunConfig
from hpctrain.elastic.membership import Meeting
from hpctrain.strategies.base import DistributedOptimizer, ElasticOptimizer, Strategy
from hpctrain.train.callbacks import Callbacks
from hpctrain.train.checkpointing import Checkpointing
from hpctrain.train.state import TrainState
from hpctrain.train.step_rollback import StepRollback
from hpctrain.world.broadcast import broadcast_tree


class Rejoin:
    """Brings the ranks of a new world to the same state, if the strategy recovers from losses.

    Args:
        strategy: Connected.
        state: What is trained.
        checkpointing: Knows how often the run was started.
        callbacks: Have a state that a rank takes over which joins.
    """

    def __init__(
        self,
        strategy: Strategy,
        state: TrainState,
        checkpointing: Checkpointing,
        callbacks: Callbacks,
    ) -> None:
        self._strategy = strategy
        self._state = state
        self._checkpointing = checkpointing
        self._callbacks = callbacks
        self._rollback = StepRollback(state) if strategy.recovery is not None else None

    def settle(self, config: RunConfig) -> None:
        """Divide batches as this world does, and remember where the next step begins.

        Args:
            config: Resolved; says whether ranks keep their part of a batch.
        """
        self._resize(config)
        self.keep()

    def keep(self) -> None:
        """Keep the state after a step, for the next one to be rolled back to."""
        if self._rollback is not None:
            self._rollback.keep()

    def keep_buffers(self) -> None:
        """Keep the buffers anew: they were averaged since the state was kept."""
        if self._rollback is not None:
            self._rollback.keep_buffers()

    def begin_again(self, optimizer: DistributedOptimizer, *, begun: bool) -> None:
        """Start once more from rank 0's model and optimizer: no step has ended.

        Args:
            optimizer: The wrapped one.
            begun: Whether this rank was in its first step.
        """
        recovery = self._strategy.recovery
        assert isinstance(optimizer, ElasticOptimizer)
        assert self._rollback is not None and recovery is not None
        optimizer.restart()
        if begun:
            self._rollback.undo(counters=False)
        recovery.share(self._state.model, self._state.optimizer)

    def catch_up(
        self,
        optimizer: DistributedOptimizer,
        meeting: Meeting,
        begun: bool,
        count: Callable[[], None],
    ) -> bool:
        """Catch up with the rank that has come farthest, so that no step of its is lost.

        A step ends for some ranks and fails for others, where one of them is lost in the midst of
        it. It counts if it ended for one that is left: that one's state is everybody's.

        Args:
            optimizer: The wrapped one.
            meeting: Of the ranks that go on.
            begun: Whether this rank has begun to train.
            count: Counts what was computed in the step that was under way.

        Returns:
            Whether what is due after the newest step has to be done again: some rank has not.
        """
        world = self._strategy.world
        assert isinstance(optimizer, ElasticOptimizer) and self._rollback is not None
        optimizer.restart()
        newest = meeting.newest
        again = any(0 <= each.attended < newest for each in meeting.progress)
        mine = meeting.progress[world.rank]
        if begun:
            self._rollback.undo(counters=again and mine.step == newest)
        steps = [each.step for each in meeting.progress]
        if min(steps) == newest:
            return again
        root = steps.index(newest)
        mine_to_tell = {
            "state": self._state.state_dict() if world.rank == root else None,
            "launch": self._checkpointing.launch,
            "callbacks": self._callbacks.share() if world.rank == root else None,
        }
        told = broadcast_tree(world.comm, mine_to_tell, root)
        self._checkpointing.launch = told["launch"]
        if mine.step < newest:
            if mine.step >= 0:  # this rank has done its part of the step
                count()
            else:
                self._callbacks.take_over(told["callbacks"])
            self._state.load_state_dict(told["state"])
        return again

    def _resize(self, config: RunConfig) -> None:
        """Have ranks keep their part of a batch, where that is asked for, in another world."""
        if config.elastic.batch == "keep-local":
            first = int(self._state.counters.world[0]["size"])
            batch = config.train.batch_size * self._strategy.world.size / first
            self._state.loader.batch_size = max(1, round(batch))
