"""A run from its configuration to its result: the run folder, and the order in which things start.

What a run folder holds::

    config.toml       the configuration as resolved
    metrics.jsonl     one line a record
    tensorboard/      the same for TensorBoard; other loggers and callbacks have files of their own
    checkpoints/      the newest few, and `best`
    result.json       written last, and only at success: its being there is the proof
    interrupted.json  instead of it, where the run was asked to stop before its end
    .lock             held while the run is under way: two runs do not write one folder
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import platform
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from hpctrain.checkpoint.store import CheckpointStore, load_verified
from hpctrain.config import Layer, RunConfig, Section, put, resolve, with_section
from hpctrain.data.stage import stage, unstage
from hpctrain.elastic.membership import Meeting, Progress
from hpctrain.errors import Dismissed, Error, PeerLost
from hpctrain.files import write_text
from hpctrain.run_folder import (
    CONFIG,
    INTERRUPTED,
    INTERRUPTED_CODE,
    RESULT,
    STOP,
    claim,
    new_folder,
    unwritable,
)
from hpctrain.slurm.orphan import end_job
from hpctrain.strategies import STRATEGIES, strategy, strategy_class
from hpctrain.strategies.base import Strategy
from hpctrain.tasks.seeds import set_start_seeds
from hpctrain.tasks.task import Task, load_task, make_task
from hpctrain.train import compiler, gc_control
from hpctrain.train.fingerprint import of_start, of_training
from hpctrain.train.initial_weights import initialize
from hpctrain.train.interruption import Interruption
from hpctrain.train.loggers import loggers_of
from hpctrain.train.loggers.jsonl import plain
from hpctrain.train.loop import Trainer
from hpctrain.train.recorder import OnRankZero, Recorder, RunRecorder
from hpctrain.train.recovery import outlive
from hpctrain.train.state import TrainState
from hpctrain.world.agreement import compare
from hpctrain.world.broadcast import broadcast_json
from hpctrain.world.failure_record import FOLDER
from hpctrain.world.launcher import detect
from hpctrain.world.world import World, init

CHECKPOINTS = "checkpoints"


def configure(layers: list[tuple[str, Layer]]) -> RunConfig:
    """Resolve a run's configuration: the layers given, over the defaults of the task they choose.

    Raises:
        Error: The task cannot be loaded, or a key or value is wrong.
    """
    spec = str(_last(layers, "task"))
    defaults: Layer = {}
    for name, value in load_task(spec).defaults.items():
        put(defaults, name, value)
    layers = [(f"defaults of task {spec}", defaults), *layers]
    return resolve(layers, _kind(str(_last(layers, "strategy")), layers))


def _last(layers: list[tuple[str, Layer]], key: str) -> Any:
    """Return what the last layer that has a key says of it, or the key's default."""
    value: Any = RunConfig.model_fields[key].default
    for _, layer in layers:
        value = layer.get(key, value)
    return value


def _kind(strategy: str, layers: list[tuple[str, Layer]]) -> type[RunConfig]:
    """Return the configuration's class: with the section of the strategy's knobs."""
    kind = RunConfig
    if strategy != "auto" and strategy not in RunConfig.model_fields:
        chosen = strategy_class(strategy)
        kind = with_section(chosen.name, chosen.Config)
    for origin, layer in layers:
        for key in STRATEGIES.names():
            if isinstance(layer.get(key), dict) and key not in kind.model_fields:
                raise Error(
                    f"{origin}: [{key}] has the knobs of another strategy than '{strategy}'.",
                    hint=f"use --strategy {key}, or leave them out.",
                )
    return kind


def _knobs(config: RunConfig, world: World) -> Section | None:
    name = config.strategy
    if name == "auto":
        name = "horovod" if world.size > 1 else "single"
    return config.section(name) or config.section(strategy_class(name).name)


def run(config: RunConfig, say: Callable[[str], None]) -> int:
    """Train, on every rank of the world this process was started in.

    Args:
        config: Resolved; the same on every rank.
        say: Tells the person who watches.

    Returns:
        The exit code: 0, or ``INTERRUPTED_CODE`` where the run was asked to stop.

    Raises:
        Error: The configuration does not fit this machine, data, or world.
        PeerLost: Another rank is gone.
    """
    if config.resume == "auto" and config.out is None:
        raise Error("--resume auto without --out.", hint="say which run to go on with: --out DIR.")
    compiler.import_when_wanted()
    kind = load_task(config.task, config.seed)
    set_start_seeds(config.seed)  # for what is drawn while the task is made, alike on all ranks
    task = make_task(kind, config.options)
    world = init()
    if config.data.stage_dir is not None:
        _stage(config, world, say)
    how = strategy(
        config.strategy,
        world,
        config=_knobs(config, world),
        elastic=config.elastic,
        timeout_seconds=config.timeout_seconds,
    )
    try:
        return _take_part(config, task, how, say)
    except Dismissed as news:
        say(news.message)
        how.world.comm.close()
        return 0


def _take_part(config: RunConfig, task: Task, how: Strategy, say: Callable[[str], None]) -> int:
    if config.world_size is not None and how.joined is None:
        how.world.require(config.world_size)
    if how.serves:
        gc_control.leave_alone()
        how.serve()
        return 0
    try:
        return _Run(config, task, how, say).work()
    except Dismissed:
        raise
    except BaseException as error:
        if how.recovery is None or not isinstance(error, PeerLost):
            code = error.exit_code if isinstance(error, Error) else 1
            reason = f"rank {how.world.launch.rank}: {type(error).__name__}: {error}"
            how.world.comm.abort(reason, code)
        raise


class _Run:
    """A rank's way through a run."""

    def __init__(
        self, config: RunConfig, task: Task, how: Strategy, say: Callable[[str], None]
    ) -> None:
        self._config = config
        self._task = task
        self._how = how
        self._say = say
        self._world = how.world
        self._trainer: Trainer | None = None
        self._recorder: Recorder | None = None
        self._interruption: Interruption | None = None
        self._loggers = loggers_of(config.log.loggers, tensorboard=config.log.tensorboard)
        self._out = Path()
        self._lock: IO[str] | None = None

    def work(self) -> int:
        """Do the run, and return the exit code."""
        how = self._how
        joins = how.joined is not None
        if how.joined is not None:
            self._join(how.joined)
        stages = [self._start, self._wrap, self._train, self._finish]
        try:
            outlive(how.recovery, stages, self._progress, begin=2 if joins else 0, joins=joins)
        finally:
            if self._recorder is not None:
                self._recorder.close()
            if self._lock is not None:
                self._lock.close()
            if how.recovery is not None and self._world.leads:
                end_job(how.recovery.membership.lost_hosts)
        self._world.comm.close()
        return INTERRUPTED_CODE if self._made().interrupted else 0

    def _progress(self, stage: int) -> Progress:
        return self._trainer.progress(stage) if self._trainer else Progress(stage, -1, -1)

    def _made(self) -> Trainer:
        assert self._trainer is not None
        return self._trainer

    def _make(self, out: Path) -> Trainer:
        config = self._config
        self._out = out
        self._store = CheckpointStore(out / CHECKPOINTS, config.checkpoint.keep)
        if self._trainer is None:
            self._trainer = Trainer(config, self._task, self._how, self._store)
        return self._trainer

    def _join(self, joined: dict[str, Any]) -> None:
        """Take part in a run that is under way."""
        trainer = self._make(Path(joined["out"]))
        if self._how.recovery is None:
            trainer.join(joined)
        else:
            trainer.wrap()

    def _start(self, meeting: Meeting | None) -> None:
        """Take over rank 0's checkpoint, if there is one."""
        config, world = self._config, self._world
        compare(world.comm, of_start(config, self._task))
        prepares = world.leads
        if prepares and self._lock is None:
            self._claim()
        mine = os.fsencode(self._out).decode("utf-8", "surrogateescape") if prepares else ""
        out = Path(broadcast_json(world.comm, mine))
        store = CheckpointStore(out / CHECKPOINTS, config.checkpoint.keep)
        trainer = self._make(out)
        state = trainer.state
        snapshot = _prepare(out, config, store, self._say, state) if prepares else None
        compare(world.comm, of_training(state.model, state.optimizer, trainer.splits))
        while not trainer.restore(snapshot, prepared=prepares):
            # Rank 0 was lost; it is another now.
            if world.leads and not prepares:
                snapshot = _prepare(out, config, store, self._say, state)
                prepares = True
        if meeting is not None:
            trainer.note(meeting)

    def _claim(self) -> None:
        """Hold the run folder, on rank 0; where that was lost before, it may hold it still."""
        config, elastic = self._config, self._how.recovery
        if self._trainer is None:
            self._out = config.out or new_folder(config.task)
        try:
            self._lock = claim(self._out)
        except Error:
            if elastic is None or elastic.membership.generation == 0:
                raise

    def _wrap(self, meeting: Meeting | None) -> None:
        if meeting is not None:
            self._made().note(meeting)
        self._made().wrap()

    def _train(self, meeting: Meeting | None) -> None:
        config, trainer, out = self._config, self._made(), self._out
        if self._recorder is None or self._interruption is None:
            self._recorder = OnRankZero(
                self._world,
                lambda: RunRecorder(
                    out, trainer.steps, self._loggers, config.model_dump(mode="json")
                ),
            )
            alone = self._how.newcomers and self._how.recovery is None
            every = config.log.every_steps if alone else None
            self._interruption = Interruption(out, config.interrupt.signal, every)
            elastic = self._how.recovery
            if elastic is not None:
                elastic.membership.begin(out, config.elastic.workers)
            if self._how.joined is None:
                self._announce(self._recorder)
            gc_control.leave_alone()
        try:
            trainer.run(self._recorder, self._interruption, meeting)
        except BaseException:
            with contextlib.suppress(Error):
                self._store.wait()  # whatever ended the run, what is being saved is worth having
            raise

    def _announce(self, recorder: Recorder) -> None:
        trainer, how = self._made(), self._how
        start = trainer.state.counters
        recorder.say(
            f"{self._config.task}: {how.name} on {_ranks(self._world)}, {self._world.device.type}, "
            f"step {start.step} of {trainer.steps}, in {self._out}"
        )
        for warning in [*trainer.warnings, *how.warnings(trainer.steps)]:
            recorder.say(f"warning: {warning}")
        if how.fault_tolerance is not None and how.fault_tolerance.mode != "off":
            recorder.say(f"elastic: {how.fault_tolerance.mode}: {how.fault_tolerance.why}")
        for change in start.world[-1:]:
            values = {"size": change["size"], "reason": change["reason"], "steps": trainer.steps}
            # All processes of this host count, servers too. A rank may be bound to some cores.
            local = self._world.launch.local_size
            values["oversubscribed"] = local > (os.cpu_count() or 1)
            recorder.write("event", start.step, values)

    def _finish(self, meeting: Meeting | None) -> None:
        """Finish the run when every rank has come to its end: write the result, unstage data."""
        world, trainer, config = self._world, self._made(), self._config
        if meeting is not None and self._recorder is not None:
            trainer.note(meeting)
            trainer.tell(self._recorder)
        world.comm.barrier()
        if trainer.interrupted:
            world.once(lambda: _interrupt(self._out, trainer, self._say))
            return
        digest = trainer.parameters_sha256()
        world.once(lambda: _complete(self._out, trainer, digest, self._say))
        if config.data.stage_dir is not None and world.local_rank == 0:
            for path in _shard_sets(config):
                unstage(path, config.data.stage_dir)


def _complete(out: Path, trainer: Trainer, digest: str, say: Callable[[str], None]) -> None:
    _write(out / RESULT, json.dumps(_result(trainer, digest), indent=2) + "\n")
    metrics = trainer.state.counters.metrics
    final = " ".join(f"{name} {value:.4f}" for name, value in metrics.items())
    say(f"completed: {final}\n{out / RESULT}")


def _interrupt(out: Path, trainer: Trainer, say: Callable[[str], None]) -> None:
    step = trainer.state.counters.step
    (out / STOP).unlink(missing_ok=True)
    _write(out / INTERRUPTED, json.dumps({"step": step, "steps": trainer.steps}) + "\n")
    say(
        f"interrupted: step {step} of {trainer.steps} is saved; to go on: --out {out} --resume auto"
    )


def _shard_sets(config: RunConfig) -> list[Path]:
    return [path for path in (config.data.path, *(e.path for e in config.data.mixture)) if path]


def _stage(config: RunConfig, world: World, say: Callable[[str], None]) -> None:
    """Copy the shards to this node's own storage; one of its ranks does, the others wait."""
    assert config.data.stage_dir is not None
    for path in _shard_sets(config):
        staged = stage(path, config.data.stage_dir, timeout_seconds=config.timeout_seconds)
        if world.launch.local_rank == 0:
            say(f"{os.uname().nodename}: staged {path}: {staged}")


def _ranks(world: World) -> str:
    size = world.comm.size
    return "1 rank" if size == 1 else f"{size} ranks under {world.launch.name}"


def _prepare(
    out: Path,
    config: RunConfig,
    store: CheckpointStore,
    say: Callable[[str], None],
    state: TrainState,
) -> Any | None:
    """Read the checkpoint to start from, and make the run folder; on rank 0 alone.

    What is found is read into the state's own tensors as far as it fits, which spares a copy.
    """
    snapshot = _snapshot(out, config, store, say, state)
    if snapshot is None and config.init.source is not None:
        initialize(state.model, config.init, say)
    try:
        store.folder.mkdir(parents=True, exist_ok=True)
        # Who looks after a job has removed an old `stop`; a new one may be there already.
        for name in (RESULT, INTERRUPTED, *(() if FOLDER in os.environ else (STOP,))):
            (out / name).unlink(missing_ok=True)
        store.clean()
    except OSError as error:
        raise unwritable(out, error) from error
    _write(out / CONFIG, config.to_toml())
    return snapshot


def _snapshot(
    out: Path,
    config: RunConfig,
    store: CheckpointStore,
    say: Callable[[str], None],
    state: TrainState,
) -> Any | None:
    if config.resume is None:
        if store.steps():
            raise Error(
                f"{out} already holds a run with {len(store.steps())} checkpoints.",
                hint="go on with it by --resume auto, or choose another --out.",
            )
        return None
    if config.resume == "auto":
        newest = store.newest(
            lambda damage: say(f"{damage} Going back to the one before."), state.tensors()
        )
        return newest and _with_tables(newest, store.path(newest["counters"]["step"]))
    try:
        return _with_tables(
            load_verified(Path(config.resume), state.tensors()), Path(config.resume)
        )
    except Error as error:
        raise Error(error.message, hint="name another checkpoint, or use --resume auto.") from error


def _with_tables(snapshot: Any, folder: Path) -> Any:
    """Say where the rows of a checkpoint's tables are: servers read them."""
    if isinstance(snapshot, dict) and snapshot.get("tables"):
        snapshot["tables"]["folder"] = str(folder.resolve())
    return snapshot


def _write(path: Path, text: str) -> None:
    try:
        write_text(path, text)
    except OSError as error:
        raise unwritable(path, error) from error


def _result(trainer: Trainer, digest: str) -> dict[str, Any]:
    counters = trainer.state.counters
    epochs = trainer.epochs
    packages = ("hpctrain", "torch", "horovod", "numpy", "h5py")
    return {
        "status": "completed",
        "task": trainer.config.task,
        "strategy": trainer.strategy.name,
        "steps": counters.step,
        "epochs": int(epochs) if epochs == int(epochs) else epochs,
        "samples": counters.samples,
        "stopped_early": counters.stopped_early,
        "metrics": {"final": plain(counters.metrics), "best": counters.best},
        "parameters_sha256": digest,
        "world": counters.world,
        "versions": {
            "python": platform.python_version(),
            **{name: version for name in packages if (version := _version(name))},
        },
        "host": os.uname().nodename,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def fit(
    task: type[Task] | str,
    settings: Mapping[str, Any] | None = None,
    *,
    out: Path | str | None = None,
    resume: bool = False,
) -> Path:
    """Train a task from a notebook or a script; `hpctrain train` in a function.

    In a script that a launcher starts, every rank calls it.

    >>> import hpctrain, tempfile
    >>> from hpctrain.tasks.digits import Digits
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     run = hpctrain.fit(Digits, {"train.steps": 3}, out=folder + "/run")
    ...     model = hpctrain.load(run)
    hpctrain.tasks.digits:Digits: single on 1 rank, cpu, step 0 of 3, in ...

    Args:
        task: The class, which may be defined in a notebook's cell, or what `hpctrain train` takes.
        settings: Keys of `hpctrain config`, such as ``{"train.epochs": 3}``.
        out: The run folder; None: a new one in ``runs/``.
        resume: Whether to go on from the newest good checkpoint in ``out``.

    Returns:
        The run folder, which :func:`hpctrain.load` reads.

    Raises:
        Error: A setting is wrong, or what the task gives; the class is defined within a function;
            several ranks were not told which folder.
    """
    if out is None and detect().size > 1:
        raise Error("several ranks train into one folder.", hint="fit(..., out=DIR).")
    if isinstance(task, type):
        if "<locals>" in task.__qualname__:
            raise Error(
                f"task {task.__name__} is defined within a function.",
                hint="define it at the top of a module or of a notebook's cell.",
            )
        task = f"{task.__module__}:{task.__qualname__}"
    given: Layer = {"task": task, "out": str(out or new_folder(task))}
    if resume:
        given["resume"] = "auto"
    for name, value in (settings or {}).items():
        put(given, name, value)
    config = configure([("fit()", given)])
    try:
        run(config, print)
    finally:
        gc.unfreeze()  # what a run leaves behind is not the whole process's, as it is otherwise
    assert config.out is not None
    return config.out
