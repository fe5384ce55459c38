"""The one training loop: every strategy runs through it."""

from __future__ import annotations

import contextlib
import math
import time
from typing import Any, NamedTuple

import torch
from torch import nn

from hpctrain.checkpoint.store import CheckpointStore
from hpctrain.config import RunConfig
from hpctrain.data.batch import Batch
from hpctrain.data.loader import Loader
from hpctrain.elastic.membership import Meeting, Progress, Regroup
from hpctrain.errors import Error
from hpctrain.optim.schedule import factor, peak_scale
from hpctrain.strategies.base import (
    Change,
    DistributedOptimizer,
    ElasticOptimizer,
    Strategy,
    parameters_of,
)
from hpctrain.tasks.checks import (
    Read,
    check_defined,
    checked_loss,
    model_of,
    no_means,
    optimizer_of,
    splits_of,
    warnings_of,
)
from hpctrain.tasks.seeds import set_seeds, set_start_seeds
from hpctrain.tasks.task import Task, TaskTransform
from hpctrain.train.buffer_averaging import average_buffers
from hpctrain.train.interruption import Interruption
from hpctrain.train.membership_log import MembershipLog
from hpctrain.train.metrics import Meter, total
from hpctrain.train.model_setup import (
    UnusedParameters,
    averaged,
    begin_training,
    evaluating,
    prepared,
)
from hpctrain.train.nonfinite import HINT, Watch, all_finite
from hpctrain.train.recorder import Recorder
from hpctrain.train.sample_trace import SampleTrace, launches
from hpctrain.train.state import Counters, TrainState
from hpctrain.train.step_rollback import StepRollback
from hpctrain.train.step_timer import PARTS, StepTimer
from hpctrain.train.sync_batchnorm import has_batchnorm, synchronize_batchnorm
from hpctrain.world.agreement import check_tensors
from hpctrain.world.broadcast import broadcast_tree
from hpctrain.world.launcher import ALONE
from hpctrain.world.world import Alone, Even, World

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bf16": torch.float32}
"""Of samples."""

SKIPPED_IN_A_ROW = 100
"""Steps left out one after the other, because their gradients are not finite, that end a run."""


class _Mark(NamedTuple):
    """The state of things at a log line, from which the next one counts."""

    seconds: float
    step: int
    samples: int
    input_wait_seconds: float
    lost: int
    parts: dict[str, float]


class Trainer:
    """Trains one task under one configuration.

    Args:
        config: Resolved.
        task: The user's side.
        strategy: Connected: how the world's replicas agree.
        store: Where checkpoints go; rank 0 alone writes there.

    Attributes:
        interrupted: Whether the run was asked to stop, and did before its end.
        splits: The task's samples.
        warnings: What the task or the configuration has, and nothing reads.
    """

    def __init__(
        self, config: RunConfig, task: Task, strategy: Strategy, store: CheckpointStore
    ) -> None:
        self.config = config
        self.task = task
        self.store = store
        self.world: World = strategy.world
        self.device = self.world.device
        self.dtype = DTYPES[config.train.dtype]
        if config.train.deterministic:
            torch.use_deterministic_algorithms(True)
        check_defined(task)
        if config.train.nonfinite == "skip" and strategy.name == "ps":
            raise Error(
                "train.nonfinite=skip cannot be used with strategy 'ps': when the world's gradient "
                "is known, the servers have used it.",
                hint="use stop or allow, or --strategy horovod.",
            )
        set_start_seeds(config.seed)  # the same start on every rank
        read = Read(config)
        self.splits = splits_of(task, read)
        self._validation = self._validates()
        set_start_seeds(config.seed)
        model = prepared(model_of(task, self.world.size), self.device, config.train.dtype)
        if config.train.sync_batchnorm:
            self._synchronize_batchnorm(model, strategy)
        optimizer = optimizer_of(task, model, read)
        self.warnings = [*warnings_of(task), *read.unread(task)]
        scale = peak_scale(config.optimizer, config.train.batch_size)
        self._peaks = [group["lr"] * scale for group in optimizer.param_groups]
        self._loader = Loader(
            self.splits["train"],
            config.train.batch_size,
            world=self.world,
            seed=config.seed,
            shuffle=config.data.order,
            transform=self._transform(training=True),
            workers=config.data.workers,
            worker_kind=config.data.worker_kind,
            timeout_seconds=config.timeout_seconds,
            drop_last=config.data.drop_last,
            # BatchNorm's statistics are of two samples at least.
            least_part=1 if config.train.sync_batchnorm or not has_batchnorm(model) else 2,
        )
        self._train_meter = Meter()
        self._validation_meter = Meter()
        self._laps = StepTimer(self.device)
        self._mark = _Mark(0.0, 0, 0, 0.0, 0, {})
        self._start: dict[str, Any] = {}
        self._consumed = 0  # samples of this rank
        self._changes = MembershipLog(self.world)
        self._leads = False  # whether rank 0 is this one, where it alone validates and saves
        self._lost = 0  # samples of all ranks whose shards cannot be read
        self.interrupted = False
        self.optimizer: DistributedOptimizer | None = None
        self._begun = False
        self._attended = 0  # the last step after which all that was due is done
        self._computed: list[tuple[dict[str, Any], int]] = []  # means of a step
        self._next_mark: _Mark | None = None
        self._regroups = False
        self._came_late = False  # and has not asked yet what the metrics are called
        self._launch = 0  # how often the run was started before
        self._ledger: SampleTrace | None = None
        self.state = TrainState(model, optimizer, self._loader)
        if config.train.ema_decay is not None:
            self.state.ema = averaged(model, config.train.ema_decay)
        self.state.check()
        self._watch = Watch(model)
        self._skipped_in_a_row = 0
        self._unfit = False  # for a checkpoint: a parameter is not finite
        self._averaged_at = 0  # samples of this rank when buffers were last the world's
        self._unused: UnusedParameters | None = None
        self.strategy = strategy
        self._elastic = strategy.elastic
        self._committed = StepRollback(self.state) if self._elastic is not None else None

    def _validates(self) -> Loader | None:
        """The validation samples, if there are any; always in their own order."""
        config, samples = self.config, self.splits.get("validation")
        if samples is None:
            for key in ("patience", "validate_every_steps"):
                if getattr(config.train, key) is not None:
                    raise Error(
                        f"train.{key} is set, but task {type(self.task).__name__} has no "
                        "validation samples.",
                        hint="have data() give a split 'validation', or leave it unset.",
                    )
            return None
        return Loader(
            samples,
            config.train.batch_size,
            world=World(ALONE),
            shuffle="none",
            transform=self._transform(training=False),
            workers=config.data.workers,
            worker_kind=config.data.worker_kind,
            timeout_seconds=config.timeout_seconds,
        )

    def _transform(self, *, training: bool) -> TaskTransform:
        config = self.config
        return TaskTransform(self.task, training, config.task, config.options, config.seed)

    def _synchronize_batchnorm(self, model: nn.Module, strategy: Strategy) -> None:
        if not strategy.lockstep or strategy.name == "ps":
            raise Error(
                f"train.sync_batchnorm cannot be used with strategy '{strategy.name}'.",
                hint="use --strategy horovod.",
            )
        synchronize_batchnorm(model, self.world)

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

    def restore(self, snapshot: Any | None, *, prepared: bool = True) -> bool:
        """Take over rank 0's snapshot, if it has one; what other ranks pass is ignored.

        Args:
            snapshot: To go on from.
            prepared: Whether this rank has looked for one.

        Returns:
            Whether rank 0 has looked for one. If not, the one that had is lost.
        """
        launch = launches(self.store.folder.parent) if self.world.rank == 0 else 0
        mine = {"snapshot": snapshot, "prepared": prepared, "launch": launch}
        told = broadcast_tree(self.world.comm, mine)
        if not told["prepared"]:
            return False
        self._launch = told["launch"]
        found = told["snapshot"]
        self.state.counters = Counters()
        if found is not None:
            self.state.load_state_dict(found)
            reason = f"resumed at step {self.state.counters.step}"
        else:
            reason = "start"
        self.state.counters.world.append(
            {"step": self.state.counters.step, "size": self.world.size, "reason": reason}
        )
        counters = self.state.counters
        self._start = {
            "out": str(self.store.folder.parent.resolve()),
            "loader": self._loader.state_dict(),
            "step": counters.step,
            "samples": counters.samples,
        }
        self._remember()
        return True

    def _remember(self) -> None:
        """Have the world keep what a rank has to know that joins later."""
        if self.world.rank == 0:
            self.world.comm.remember({**self._start, "metrics": self._meter_names()})

    def _meter_names(self) -> list[list[str]]:
        return [self._train_meter.names, self._validation_meter.names]

    def join(self, start: dict[str, Any]) -> None:
        """Begin where the others began; ``run`` then skips what they did since."""
        self._start = start
        self._loader.load_state_dict(start["loader"])
        self.state.counters.step, self.state.counters.samples = start["step"], start["samples"]
        self._came_late = True

    def wrap(self) -> None:
        """Start every rank from rank 0's model and optimizer, and wrap the optimizer."""
        if self.optimizer is None:
            self.optimizer = self.strategy.wrap(
                self.state.model, self.state.optimizer, clip_norm=self.config.train.clip_norm
            )
            self.optimizer.mark = self._laps.lap
            self.optimizer.overlaps = True
        elif self._elastic is not None:
            # Once more: another rank was lost before all had begun. No step has ended.
            assert isinstance(self.optimizer, ElasticOptimizer) and self._committed is not None
            self.optimizer.restart()
            if self._begun:
                self._committed.undo(counters=False)
                self._begun = False
            self._elastic.share(self.state.model, self.state.optimizer)

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
        if self.optimizer is None:
            self.wrap()
        optimizer = self.optimizer
        assert optimizer is not None
        counters = self.state.counters
        lockstep = self.strategy.lockstep
        if not self._begun and (meeting is None or meeting.newest < 0):
            self._begin(optimizer)
            meeting = None
        if meeting is not None:
            self._catch_up(meeting, recorder, interruption)
            counters = self.state.counters
        while not self.finished:
            self._laps.lap("other")
            for batch in self._loader:
                self._laps.lap("input")
                self._step(optimizer, batch)
                epoch_ended = batch.stop == self._loader.samples
                self._attend(recorder, interruption, epoch_ended=epoch_ended)
                self._laps.lap("other")
                if self.finished:
                    break
        if not lockstep:
            optimizer.finish()
            heard = interruption is not None and interruption.heard()
            told = torch.tensor([float(heard), float(counters.step < self.steps)])
            self.world.comm.all_reduce(told)
            self.interrupted = bool((told > 0).all()) and not counters.stopped_early
            self.world.once(lambda: self._conclude(optimizer, recorder))
        self.tell(recorder)
        if not self.interrupted:
            self._fit()
        self.store.wait()

    def _begin(self, optimizer: DistributedOptimizer) -> None:
        self._skip(optimizer.missed)
        begin_training(self.state.model)
        if self.state.counters.step == 0:
            self._unused = UnusedParameters(self.state.model)
        self._attended = self.state.counters.step
        self._laps.lap("other")
        self._mark = self._now()
        self._changes.begin()
        self._leads = self.world.rank == 0
        self._begun = True
        self._resize()
        if self._committed is not None:
            self._committed.keep()
        if self.config.log.trace_samples:
            self._trace()

    def _trace(self) -> None:
        if not self.strategy.lockstep or self.config.data.weights is not None:
            raise Error(
                "samples cannot be traced where ranks do not go in lockstep, or where samples are "
                "drawn by weight.",
                hint="drop --trace-samples.",
            )
        number = self._elastic.membership.number if self._elastic else self.world.rank
        self._ledger = SampleTrace(self.store.folder.parent, number, self._launch)

    def _world(self) -> tuple[int, list[int]]:
        """How often the world was formed anew, and who is in it."""
        if self._elastic is None:
            return 0, list(range(self.world.size))
        membership = self._elastic.membership
        return membership.generation, [member.number for member in membership.members]

    def _attend(
        self, recorder: Recorder, interruption: Interruption | None, *, epoch_ended: bool
    ) -> None:
        """After a step: do what is due. It may be done again, where a rank is lost meanwhile."""
        optimizer, counters = self.optimizer, self.state.counters
        assert optimizer is not None
        lockstep = self.strategy.lockstep
        if self._came_late:
            # Not earlier: the others may have learned it at the very step before this rank's first.
            self._came_late = False
            metrics = self.strategy.joined["metrics"]
            self._train_meter.names, self._validation_meter.names = metrics
        recorder.advance(counters.step)
        self.tell(recorder)
        if self._unused is not None:
            self._tell_unused(self._unused, recorder)
        if interruption is not None:
            self._listen(interruption)
        last = counters.step >= self.steps
        logs = last or counters.step % self.config.log.every_steps == 0
        validates = last or self._due(self.config.train.validate_every_steps, epoch_ended)
        saves = self._due(self.config.checkpoint.every_steps, epoch_ended)
        if logs or validates or saves or self.finished:
            self._look(recorder)
        if logs:
            self._log(optimizer, recorder)
        if last and not lockstep:
            return  # the others are not there yet
        if lockstep and (validates or saves or self.finished):
            check_tensors(self.world.comm, self.state.model.named_parameters())
        improved = False
        if validates:
            improved = self._validate(optimizer, recorder)
        if saves or improved or self.finished:
            self._save(optimizer, best=improved)
        if (validates or saves) and not self.finished:
            self.tell(recorder)
        self._attended = counters.step
        if validates or saves or improved or self.finished:
            self._averaged_at = self._consumed
        if self._committed is not None and (validates or saves):
            self._committed.keep_buffers()
        if self._regroups and not self.finished:
            self._regroups = False
            raise Regroup

    def _tell_unused(self, unused: UnusedParameters, recorder: Recorder) -> None:
        alike = self.strategy.lockstep and self._elastic is None and self.config.ps.workers is None
        names = unused.names(self.world.comm if alike else None)
        self._unused = None
        if names:
            shown = ", ".join(f"'{name}'" for name in names[:4]) + (
                ", ..." if len(names) > 4 else ""
            )
            recorder.say(f"warning: no gradient came to {shown} in the first step; is that meant?")

    def _look(self, recorder: Recorder) -> None:
        """Look, together where ranks go in lockstep, whether all is finite still.

        Raises:
            Error: It is not, and that is to end the run.
        """
        counters = self.state.counters
        seen = self._watch.look(self.world.comm if self.strategy.lockstep else None)
        self._unfit = bool(seen.parameter)
        counters.nonfinite_losses += seen.losses
        if not seen:
            return
        if self.config.train.nonfinite == "stop":
            raise Error(f"step {counters.step}: {seen}.", hint=HINT)
        recorder.say(f"warning: step {counters.step}: {seen}.")

    def _fit(self) -> None:
        """Refuse to call a run completed that trained nothing.

        Raises:
            Error: Its parameters are not finite, or every step was left out.
        """
        counters = self.state.counters
        if self._unfit:
            raise Error("the run's parameters are not finite at its end.", hint=HINT)
        if counters.skipped_steps and counters.skipped_steps >= counters.step:
            raise Error("every step was left out: no gradient was finite.", hint=HINT)

    def _catch_up(
        self, meeting: Meeting, recorder: Recorder, interruption: Interruption | None
    ) -> None:
        """Stand where the one stands that has come farthest; no step of his is lost.

        A step ends for some ranks and fails for others, where one of them is lost in the midst of
        it. It counts if it ended for one that is left: that one's state is everybody's.
        """
        optimizer, comm = self.optimizer, self.world.comm
        assert isinstance(optimizer, ElasticOptimizer) and self._committed is not None
        optimizer.restart()
        newest = meeting.newest
        again = any(0 <= each.attended < newest for each in meeting.progress)
        mine = meeting.progress[self.world.rank]
        if self._begun:
            self._committed.undo(counters=again and mine.step == newest)
        steps = [each.step for each in meeting.progress]
        if min(steps) < newest:
            root = steps.index(newest)
            state = self.state.state_dict() if self.world.rank == root else None
            told = broadcast_tree(comm, {"state": state, "launch": self._launch}, root)
            self._launch = told["launch"]
            if mine.step < newest:
                if mine.step >= 0:  # this rank has done its part of the step
                    self._count()
                self.state.load_state_dict(told["state"])
        if not self._begun:
            self._begin(optimizer)
        self._attended = min(newest, self._attended) if again else newest
        self.interrupted = self.interrupted and not again
        self._regroups = False
        self._train_meter.names, self._validation_meter.names = [], []
        if interruption is not None:
            interruption.restart(newest)
        self.note(meeting)
        self._resize()
        self._committed.keep()
        if again:
            cursor, samples = self._loader.cursor, self._loader.samples
            self._attend(recorder, interruption, epoch_ended=cursor >= samples)

    def _conclude(self, optimizer: DistributedOptimizer, recorder: Recorder) -> None:
        self.tell(recorder)
        self._save(optimizer, best=not self.interrupted and self._validate(optimizer, recorder))
        self.store.wait()

    def _listen(self, interruption: Interruption) -> None:
        step = self.state.counters.step
        if not self.strategy.lockstep:
            if interruption.noticed():
                self.world.comm.stop()
            return
        look = interruption.look(self.world.comm, step, self._waiting)
        self._regroups = look.waiting
        if look.stop and not self.finished:
            self.interrupted = True

    def _waiting(self) -> bool:
        return self._elastic is not None and self._elastic.membership.waiting()

    def tell(self, recorder: Recorder) -> None:
        """After a step: record who was lost, and who joined."""
        counters = self.state.counters
        if self.optimizer is not None:
            self._changes.note(counters, self.optimizer.changes())
        self._changes.tell(counters, recorder)

    def _log(self, optimizer: DistributedOptimizer, recorder: Recorder) -> None:
        """Record the train metrics since the last time, over all ranks."""
        counters = self.state.counters
        lockstep = self.strategy.lockstep
        known = self._meter_names()
        metrics = self._train_meter.read(self.world.comm, lockstep=lockstep)
        if self._meter_names() != known:
            self._remember()
        counters.metrics |= {f"train_{name}": value for name, value in metrics.items()}
        if counters.nonfinite_losses:
            counters.metrics["nonfinite_losses"] = counters.nonfinite_losses
        if counters.skipped_steps:
            counters.metrics["skipped_steps"] = counters.skipped_steps
        now, before = self._now(), self._mark
        self._next_mark = now
        seconds, steps = now.seconds - before.seconds, now.step - before.step
        sums = total(
            self.world.comm,
            {
                "input_wait_seconds": now.input_wait_seconds - before.input_wait_seconds,
                "samples": float(now.samples - before.samples),
                "lost_samples": float(now.lost - before.lost),
                "steps": float(steps),
                **{part: now.parts[part] - before.parts[part] for part in PARTS},
            },
            lockstep=lockstep,
        )
        statistics = optimizer.statistics()
        if not sums:  # another rank has them
            return
        waited = sums["input_wait_seconds"]
        values: dict[str, Any] = {"epoch": round(self.epochs, 3), **metrics}
        values["lr"] = optimizer.param_groups[0]["lr"]
        for name in ("nonfinite_losses", "skipped_steps"):
            if name in counters.metrics:
                values[name] = counters.metrics[name]
        if optimizer.grad_norm is not None:
            values["grad_norm"] = float(optimizer.grad_norm)
        values["samples_per_second"] = sums["samples"] / seconds
        # Means over ranks: how long a step stood still for its batch.
        values["input_wait_ms"] = 1e3 * waited / sums["steps"]
        values["input_wait_share"] = waited / self.world.size / seconds
        self._lost += int(sums["lost_samples"])
        if self._lost:
            values["lost_samples"] = self._lost
            counters.metrics["lost_samples"] = self._lost
        recorder.write("train", counters.step, values)
        # Means over the steps of all ranks.
        timing = {f"{part}_ms": 1e3 * sums[part] / sums["steps"] for part in PARTS}
        recorder.write("timing", counters.step, timing)
        if statistics:
            recorder.write("exchange", counters.step, statistics)

    def _now(self) -> _Mark:
        loader = self._loader
        step = self.state.counters.step
        parts = self._laps.read()
        return _Mark(
            time.monotonic(), step, self._consumed, loader.wait_seconds, loader.lost, parts
        )

    def _due(self, every_steps: int | None, epoch_ended: bool) -> bool:
        if every_steps is None:
            return epoch_ended
        return self.state.counters.step % every_steps == 0

    def note(self, meeting: Meeting) -> None:
        """Have it recorded who is no longer there, and who came."""
        left = f"{self.world.size} ranks"
        lost = [Change(each.number, "worker", each.host, "ended", left) for each in meeting.lost]
        joined = [Change(each.number, "worker", each.host, None, left) for each in meeting.joined]
        self._changes.note(self.state.counters, lost + joined)

    def _step(self, optimizer: DistributedOptimizer, batch: Batch) -> None:
        counters = self.state.counters
        set_seeds(self.config.seed, counters.step, self.world.rank)
        multiplier = self._multiplier(batch)
        for group, peak in zip(optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * multiplier
        optimizer.zero_grad()
        optimizer.weight = batch.weight
        self._computed = []
        if self._ledger is not None:
            self._ledger.begin(counters.step + 1, self._world()[0], self._loader.epoch, batch)
        parts = self._parts(batch)
        for number, part in enumerate(parts, start=1):
            with contextlib.nullcontext() if number == len(parts) else optimizer.no_sync():
                loss, means = self._loss(self.state.model, part, training=True)
                (loss * part.weight).backward()
            if part.samples:
                self._computed.append((means, part.samples))
        self._laps.lap("compute")
        if self.config.train.nonfinite == "skip" and not self._gradients_are_finite(optimizer):
            self._leave_out(optimizer)
        else:
            self._skipped_in_a_row = 0
            # A rank without samples steps too: the others wait for its zeros.
            optimizer.step()
            if self.state.ema is not None:
                self.state.ema.update_parameters(self.state.model)
        self._count()
        counters.step += 1
        counters.samples += batch.global_samples
        if self._ledger is not None:
            self._ledger.end(counters.step, *self._world())
        self._skip(optimizer.missed)
        if self._committed is not None:
            self._committed.keep()

    def _parts(self, batch: Batch) -> list[Batch]:
        """This rank's samples of a batch, pass by pass; it may have none."""
        passes = self._passes()
        if self.config.train.sync_batchnorm:  # every rank comes to every exchange of statistics
            return list(batch.split(passes, empty=True))
        return list(batch.split(max(1, min(passes, batch.samples // self._loader.least_part))))

    def _gradients_are_finite(self, optimizer: DistributedOptimizer) -> bool:
        """Whether the world's gradient is: the same on every rank; waits for the device."""
        optimizer.synchronize()
        parameters = self.state.model.parameters()
        return all_finite(p.grad for p in parameters if p.requires_grad and p.grad is not None)

    def _leave_out(self, optimizer: DistributedOptimizer) -> None:
        """Let a step change nothing.

        Raises:
            Error: So many were left out one after the other that no more is to be hoped for.
        """
        counters = self.state.counters
        optimizer.zero_grad()
        self._laps.lap("update")
        counters.skipped_steps += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row >= SKIPPED_IN_A_ROW:
            raise Error(
                f"step {counters.step + 1}: {self._skipped_in_a_row} steps in a row had a gradient "
                "that is not finite.",
                hint=HINT,
            )

    def _count(self) -> None:
        """A step is done: what was computed in it counts, and what was logged before is over."""
        if self.strategy.lockstep:
            self._changes.told()
        self._train_meter.settle()
        self._watch.settle()
        self._mark, self._next_mark = self._next_mark or self._mark, None
        for means, samples in self._computed:
            self._train_meter.add(means, samples)
            self._watch.add(self.state.counters.step + 1, means["loss"])
            self._consumed += samples

    def _multiplier(self, batch: Batch) -> float:
        """Of the peak learning rate, at a step."""
        schedule, loader, train = self.config.schedule, self._loader, self.config.train
        if loader.batch_size == train.batch_size:
            if train.steps is not None:
                return factor(schedule, self.state.counters.step, train.steps, len(loader))
            # Not by steps done: with another batch size, before a resume, there were others.
            step = loader.epoch * len(loader) + batch.start // loader.batch_size
            return factor(schedule, step, train.epochs * len(loader), len(loader))
        # Batches have changed with the world: as far as the run is, with steps as at first.
        epoch_steps = -(-loader.samples // train.batch_size)
        step = round((loader.epoch + batch.start / loader.samples) * epoch_steps)
        steps = train.steps or train.epochs * epoch_steps
        return factor(schedule, step, steps, epoch_steps) * loader.batch_size / train.batch_size

    def _resize(self) -> None:
        """Have ranks keep their part of a batch, where that is asked for, in another world."""
        if self.config.elastic.batch == "keep-local":
            first = int(self.state.counters.world[0]["size"])
            batch = self.config.train.batch_size * self.world.size / first
            self._loader.batch_size = max(1, round(batch))

    def _passes(self) -> int:
        """In how many passes a rank takes its part of a batch: more on a world that has shrunk."""
        passes = self.config.train.accumulate
        if self._elastic is not None and self.config.elastic.batch == "keep-global":
            passes *= -(-int(self.state.counters.world[0]["size"]) // self.world.size)
        return passes

    def _skip(self, steps: int) -> None:
        """The others went on without this rank: take up the batch that they are at."""
        counters, loader = self.state.counters, self._loader
        steps = min(steps, self.steps - counters.step)
        counters.step += steps
        for _ in range(steps):
            start = loader.cursor if loader.cursor < loader.samples else 0
            if loader.cursor >= loader.samples:
                loader.epoch += 1
            loader.cursor = min(start + loader.batch_size, loader.samples)
            counters.samples += loader.cursor - start

    def _loss(
        self, model: nn.Module, batch: Batch, *, training: bool
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        bf16 = self.config.train.dtype == "bf16"
        try:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
                result = self.task.loss(model, batch.to(self.device, self.dtype))
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise Error(
                f"BatchNorm cannot take statistics of one sample: step "
                f"{self.state.counters.step + 1}, a batch of {batch.global_samples}.",
                hint="data.drop_last=true leaves an epoch's incomplete batch out; else use another "
                "batch size, fewer ranks or train.sync_batchnorm=true.",
            ) from error
        loss, means = checked_loss(self.task, result, training=training)
        return loss, {"loss": loss.detach(), **means}

    def _validate(self, optimizer: DistributedOptimizer, recorder: Recorder) -> bool:
        """Measure on the validation samples, each once; True where it is the best so far."""
        lockstep = self.strategy.lockstep
        loader = self._validation
        if loader is None or not (lockstep or self.world.rank == 0):
            return False
        counters = self.state.counters
        if not lockstep and not self._leads:
            self._succeed()
        self._average_buffers()
        model = self.state.model if self.state.ema is None else self.state.ema
        loader.world.comm = Even(self.world.comm) if lockstep else Alone()
        loader.epoch = loader.cursor = 0
        self._validation_meter.clear()
        snapshot = None if lockstep else optimizer.snapshot()
        with evaluating(model), torch.no_grad(), parameters_of(snapshot):
            for batch in loader:
                for part in batch.split(self.config.train.accumulate):
                    means = self._loss(model, part, training=False)[1]
                    self._validation_meter.add(means, part.samples)
        known = self._meter_names()
        metrics = self._validation_meter.read(self.world.comm if lockstep else Alone())
        if self._meter_names() != known:
            self._remember()
        recorder.write("validation", counters.step, metrics)
        if counters.best is None and (warning := no_means(metrics)):
            recorder.say(f"warning: {warning}")
        for name, value in metrics.items():
            if not math.isfinite(value):
                recorder.say(f"warning: step {counters.step}: val_{name} is {value}.")
        counters.metrics |= {f"val_{name}": value for name, value in metrics.items()}
        improved = counters.judge(
            {f"val_{name}": value for name, value in metrics.items()},
            self.task,
            self.config.train.patience,
        )
        if counters.stopped_early and not lockstep:
            self.world.comm.stop()
        return improved

    def _succeed(self) -> None:
        """Rank 0 is lost, and this is now: what it alone knew is in its last checkpoint."""
        self._leads = True
        newest = self.store.newest(lambda damage: None) if self.store.steps() else None
        if newest is not None:
            mine, its = self.state.counters, Counters(**newest["counters"])
            mine.best, mine.validations_since_best = its.best, its.validations_since_best
            mine.metrics = its.metrics | mine.metrics

    def _save(self, optimizer: DistributedOptimizer, *, best: bool) -> None:
        self._average_buffers()
        if self._unfit:
            return  # it would push good ones out
        if self.world.rank != 0:
            return
        state = self.state.state_dict()
        snapshot = optimizer.snapshot()
        if snapshot is not None:
            if not all_finite(snapshot.parameters.values()):
                self._unfit = True
                return
            named = self.state.model.named_parameters(remove_duplicate=False)
            values = snapshot.parameters
            state["model"].update({name: values[p] for name, p in named if p in values})
            state["optimizer"] = snapshot.optimizer
        self.store.save(self.state.counters.step, state, best=best)

    def _average_buffers(self) -> None:
        """Make running statistics the world's: each rank's batches gave it slightly other ones."""
        if self.world.size == 1 or not self.strategy.lockstep:
            return
        modules = [m for m in (self.state.model, self.state.ema) if m is not None]
        average_buffers(self.world.comm, modules, self._consumed - self._averaged_at)
