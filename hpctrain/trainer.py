"""The one training loop: every strategy runs through it."""

from __future__ import annotations

import contextlib
import random
import time
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from hpctrain.changes import Changes
from hpctrain.checkpoint import CheckpointStore
from hpctrain.config import RunConfig
from hpctrain.data.batch import Batch
from hpctrain.data.loader import Loader
from hpctrain.data.random import key
from hpctrain.elastic.committed import Committed
from hpctrain.elastic.ledger import Ledger, launches
from hpctrain.elastic.membership import Meeting, Progress, Regroup
from hpctrain.errors import Error
from hpctrain.interruption import Interruption
from hpctrain.laps import PARTS, Laps
from hpctrain.launcher import ALONE
from hpctrain.meter import Meter, total
from hpctrain.recorder import Recorder
from hpctrain.schedule import factor, peak_scale
from hpctrain.state import Counters, TrainState
from hpctrain.strategies.base import (
    Change,
    DistributedOptimizer,
    ElasticOptimizer,
    Strategy,
    parameters_of,
)
from hpctrain.strategies.broadcast import broadcast_tree
from hpctrain.task import Task, TaskTransform
from hpctrain.world import Even, World

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bf16": torch.float32}


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
        sources = task.data(config.data)
        self._seed(step=-1, rank=0)  # the same start on every rank
        model = task.model().to(self.device, self.dtype)
        optimizer = task.optimizer(model, config.optimizer)
        scale = peak_scale(config.optimizer, config.train.batch_size)
        self._peaks = [group["lr"] * scale for group in optimizer.param_groups]
        self._loader = Loader(
            sources["train"],
            config.train.batch_size,
            world=self.world,
            seed=config.seed,
            shuffle=config.data.order,
            transform=TaskTransform(task, True, config.task, config.options),
            workers=config.data.workers,
            worker_kind=config.data.worker_kind,
            timeout_seconds=config.timeout_seconds,
        )
        self._validation = sources.get("validation")
        self._train_meter = Meter()
        self._validation_meter = Meter()
        self._laps = Laps(self.device)
        self._mark = _Mark(0.0, 0, 0, 0.0, 0, {})
        self._start: dict[str, Any] = {}
        self._consumed = 0  # samples of this rank
        self._changes = Changes(self.world)
        self._leads = False  # whether rank 0 is this one, where it alone validates and saves
        self._lost = 0  # samples of all ranks whose shards cannot be read
        self.interrupted = False
        self.optimizer: DistributedOptimizer | None = None
        self._begun = False
        self._attended = 0  # the last step after which all that was due is done
        self._computed: list[tuple[dict[str, torch.Tensor], int]] = []  # means of a step
        self._next_mark: _Mark | None = None
        self._regroups = False
        self._came_late = False  # and has not asked yet what the metrics are called
        self._launch = 0  # how often the run was started before
        self._ledger: Ledger | None = None
        self.state = TrainState(model, optimizer, self._loader)
        if config.train.ema_decay is not None:
            self.state.ema = AveragedModel(
                model,
                multi_avg_fn=get_ema_multi_avg_fn(config.train.ema_decay),
                use_buffers=True,
            )
        self.strategy = strategy
        self._elastic = strategy.elastic
        self._committed = Committed(self.state) if self._elastic is not None else None

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        train, loader = self.config.train, self._loader
        if train.steps is not None:
            return train.steps
        if loader.batch_size == train.batch_size:
            return train.epochs * len(loader)
        left = -(-(loader.samples - loader.cursor) // loader.batch_size)
        left += (train.epochs - 1 - loader.epoch) * len(loader)
        return self.state.counters.step + left

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
        self.store.wait()

    def _begin(self, optimizer: DistributedOptimizer) -> None:
        self._skip(optimizer.missed)
        self.state.model.train()
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
        self._ledger = Ledger(self.store.folder.parent, number, self._launch)

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
        if interruption is not None:
            self._listen(interruption)
        last = counters.step >= self.steps
        if last or counters.step % self.config.log.every_steps == 0:
            self._log(optimizer, recorder)
        if last and not lockstep:
            return  # the others are not there yet
        improved = False
        validates = last or self._due(self.config.train.validate_every_steps, epoch_ended)
        if validates:
            improved = self._validate(optimizer, recorder)
        due = self._due(self.config.checkpoint.every_steps, epoch_ended)
        if due or improved or self.finished:
            self._save(optimizer, best=improved)
        if (validates or due) and not self.finished:
            self.tell(recorder)
        self._attended = counters.step
        if self._committed is not None and (validates or due):
            self._committed.keep_buffers()
        if self._regroups and not self.finished:
            self._regroups = False
            raise Regroup

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
        self._seed(counters.step, self.world.rank)
        multiplier = self._multiplier(batch)
        for group, peak in zip(optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * multiplier
        optimizer.zero_grad()
        optimizer.weight = batch.weight
        self._computed = []
        if self._ledger is not None:
            self._ledger.begin(counters.step + 1, self._world()[0], self._loader.epoch, batch)
        parts = list(batch.split(self._passes()))
        for number, part in enumerate(parts, start=1):
            with contextlib.nullcontext() if number == len(parts) else optimizer.no_sync():
                loss, means = self._loss(self.state.model, part)
                (loss * part.weight).backward()
            self._computed.append((means, part.samples))
        self._laps.lap("compute")
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

    def _count(self) -> None:
        """A step is done: what was computed in it counts, and what was logged before is over."""
        if self.strategy.lockstep:
            self._changes.told()
        self._train_meter.settle()
        self._mark, self._next_mark = self._next_mark or self._mark, None
        for means, samples in self._computed:
            self._train_meter.add(means, samples)
            self._consumed += samples

    def _multiplier(self, batch: Batch) -> float:
        """Of the peak learning rate, at a step."""
        schedule, loader, train = self.config.schedule, self._loader, self.config.train
        if loader.batch_size == train.batch_size:
            return factor(schedule, self.state.counters.step, self.steps, len(loader))
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

    def _loss(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        bf16 = self.config.train.dtype == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            result = self.task.loss(model, batch.to(self.device, self.dtype))
        loss, means = result if isinstance(result, tuple) else (result, {})
        return loss, {"loss": loss, **means}

    def _validate(self, optimizer: DistributedOptimizer, recorder: Recorder) -> bool:
        """Measure on the validation samples, each once; True where it is the best so far."""
        lockstep = self.strategy.lockstep
        if self._validation is None or not (lockstep or self.world.rank == 0):
            return False
        counters = self.state.counters
        if not lockstep and not self._leads:
            self._succeed()
        self._average_buffers()
        model = self.state.model if self.state.ema is None else self.state.ema
        training = model.training
        model.eval()
        world = World(ALONE)
        if lockstep:
            world.comm = Even(self.world.comm)
        loader = Loader(
            self._validation,
            self.config.train.batch_size,
            world=world,
            shuffle="none",
            transform=TaskTransform(self.task, False, self.config.task, self.config.options),
            workers=self.config.data.workers,
            timeout_seconds=self.config.timeout_seconds,
        )
        self._validation_meter.clear()
        with torch.no_grad(), parameters_of(None if lockstep else optimizer.snapshot()):
            for batch in loader:
                for part in batch.split(self.config.train.accumulate):
                    self._validation_meter.add(self._loss(model, part)[1], part.samples)
        model.train(training)
        known = self._meter_names()
        metrics = self._validation_meter.read(world.comm)
        if self._meter_names() != known:
            self._remember()
        recorder.write("validation", counters.step, metrics)
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
        if self.world.rank != 0:
            return
        state = self.state.state_dict()
        snapshot = optimizer.snapshot()
        if snapshot is not None:
            named = self.state.model.named_parameters(remove_duplicate=False)
            values = snapshot.parameters
            state["model"] |= {name: values[p] for name, p in named if p in values}
            state["optimizer"] = snapshot.optimizer
        self.store.save(self.state.counters.step, state, best=best)

    def _average_buffers(self) -> None:
        """Make running statistics the world's: each rank's batches gave it slightly other ones."""
        if self.world.size == 1 or not self.strategy.lockstep:
            return
        modules = [m for m in (self.state.model, self.state.ema) if m is not None]
        buffers = [b for module in modules for b in module.buffers() if b.is_floating_point()]
        if buffers:
            flat = torch.cat([buffer.detach().double().view(-1) for buffer in buffers])
            self.world.comm.all_reduce(flat)
            flat /= self.world.size
            for buffer, mean in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
                buffer.copy_(mean.view_as(buffer))

    def _seed(self, step: int, rank: int) -> None:
        """Random numbers as a function of (seed, step, rank): nothing to save, nothing to lose."""
        seed = key(self.config.seed, step, rank)
        # Not torch.manual_seed: it notes a stack trace for every kind of device it cannot reach.
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)
        random.seed(seed)
