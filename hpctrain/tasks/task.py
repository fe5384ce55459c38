"""The user's side of a run: which model, which loss, which data. And finding it by name."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import sys
import traceback
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from hpctrain.config import DataConfig, OptimizerConfig
from hpctrain.data.batch import Batch
from hpctrain.data.mixture import Mixture, Weighted
from hpctrain.data.shards import ShardSet
from hpctrain.data.source import Source
from hpctrain.data.stage import folder_of
from hpctrain.errors import Error, nearest
from hpctrain.optim.named import Scheduler, optimizer_of
from hpctrain.registry import Registry
from hpctrain.tasks.callbacks.base import Callback
from hpctrain.tasks.seeds import set_start_seeds
from hpctrain.world.launcher import ALONE
from hpctrain.world.world import World

TASKS = Registry(
    "task",
    "hpctrain.tasks",
    {
        "digits": "hpctrain.tasks.digits:Digits",
        "cifar10": "hpctrain.tasks.cifar10:Cifar10",
        "charlm": "hpctrain.tasks.charlm:CharLM",
        "gpt": "hpctrain.tasks.gpt:Gpt",
        "dlrm": "hpctrain.tasks.dlrm:Dlrm",
        "resnet50-synthetic": "hpctrain.tasks.resnet50_synthetic:ResNet50Synthetic",
    },
)

Loss = torch.Tensor | tuple[torch.Tensor, Mapping[str, torch.Tensor | float]]


class Task:
    """What to train. Subclass it and write ``model`` and ``loss``; the rest has defaults.

    With strategy ``mesh`` it may say how its model is divided, by ``stages(model)``,
    ``blocks(model)`` and ``parallelize(model)``: docs/mesh.md.

    Make the subclass a dataclass to give it knobs of its own: its fields are set by
    ``--set options.name=value`` or the table ``[options]`` of a TOML file.

    Attributes:
        defaults: Configuration this task wants unless a user says otherwise, by dotted key, such as
            ``{"optimizer.lr": 0.1}``.
        monitor: The validation metric that picks the best model and stops a run early.
        mode: Whether the monitored metric should be large (``max``) or small (``min``).
        gathers: Whether ``loss`` calls ``self.world.all_gather`` or ``gather_object``. Every rank
            then comes to every pass, with a batch of no samples where it has none.
        world: Who takes part; set by the trainer.

    Example:
        >>> class Line(Task):
        ...     def model(self):
        ...         return nn.Linear(1, 1)
        ...     def loss(self, model, batch):
        ...         return (model(batch["x"]) - batch["y"]).square().mean()
        >>> task = Line()
        >>> batch = {"x": torch.ones(4, 1), "y": torch.zeros(4, 1)}
        >>> task.loss(task.model(), batch).shape
        torch.Size([])
    """

    defaults: ClassVar[dict[str, Any]] = {}
    monitor: ClassVar[str] = "loss"
    mode: ClassVar[Literal["min", "max"]] = "min"
    gathers: ClassVar[bool] = False
    world: World = World(ALONE)

    def model(self) -> nn.Module:
        """Return a new model. Random numbers are seeded before: every rank builds the same one."""
        raise _undefined(self, "model()", "return the network, a torch.nn.Module.")

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the mean loss over a batch's samples; with it, if wanted, further means by name.

        Args:
            model: In training or evaluation mode, as it fits.
            batch: Field name -> tensor of shape (samples, ...), after ``transform``.

        Returns:
            A scalar, or a scalar and a dict of scalars such as ``{"accuracy": ...}``.
        """
        raise _undefined(self, "loss(model, batch)", "return the mean loss over the batch.")

    def weight(self, batch: Batch) -> float | torch.Tensor:
        """Return what a batch counts for in means over batches: by default, its samples.

        Override it where ``loss`` is a mean over something else, such as targets that are not
        padding: then return their number. The gradient, and what is logged, is the mean over all of
        the global batch's, however they are divided over ranks and passes.

        Args:
            batch: As for ``loss``, on the CPU; it may have no samples.

        Returns:
            A number of at least 0.
        """
        return batch.samples

    def metrics(self) -> Mapping[str, Any]:
        """Return metrics of a whole set, by name, such as AUC or F1: no means over samples.

        Each is an object with ``update(...)``, ``compute()`` and ``reset()``, as those of
        torchmetrics are, or a function of all samples' rows, such as
        ``sklearn.metrics.roc_auc_score``. What ``predictions`` gives is passed by name: each takes
        what its parameters are called.
        """
        return {}

    def predictions(self, model: nn.Module, batch: Batch) -> Mapping[str, torch.Tensor]:
        """Return what metrics of a whole set are made of, and ``hpctrain predict`` writes.

        Args:
            model: In evaluation mode; no gradients are recorded.
            batch: As for ``loss``.

        Returns:
            Tensors by name, each with a row for each sample.
        """
        raise _undefined(
            self, "predictions(model, batch)", 'return tensors by name, such as {"preds": ...}.'
        )

    def callbacks(self) -> Sequence[Callback]:
        """Return what else is done at the events of a run; ``--callback`` adds others."""
        return ()

    def data(self, config: DataConfig) -> dict[str, Source]:
        """Return samples by split: ``train``, and maybe ``validation`` and ``test``.

        The default is the shard set at ``data.path``; its split ``validation``, or else ``test``,
        is what the model is validated on. ``test`` is for ``hpctrain evaluate`` and ``predict``.

        Raises:
            Error: No path was given, or no shard set is there.
        """
        paths = [config.path] if config.path else [entry.path for entry in config.mixture]
        if not paths:
            raise Error(
                "this task needs data.",
                hint="give --data DIR, a shard set made by `hpctrain data import SRC DIR`.",
            )
        shards = _open(paths[0], config)
        train: Source = shards.split("train")
        if config.mixture and config.weights is not None:
            raise Error("data.mixture and data.weights cannot be used together.", hint="drop one.")
        if config.mixture:
            train = _mixture(config)
        elif config.weights is not None:
            train = Weighted(train, shards.split("train").column(config.weights))
        sources = {"train": train}
        for name in ("validation", "test"):
            if name in shards.splits and len(shards.splits[name]):
                sources[name] = shards.splits[name]
        if "test" in sources:
            sources.setdefault("validation", sources["test"])
        return sources

    def transform(self, batch: Batch, training: bool) -> Batch:
        """Prepare a batch on the CPU: decode, normalise, and augment where ``training``.

        It runs in the background, on several threads at once. For augmentation draw from
        ``batch.uniform(count)``, which is the same at any world size and after a resume; torch's
        own generator is shared with the training step. Transforms that use it, or that spend their
        time in plain Python, want ``data.worker_kind=process``.

        Args:
            batch: Field name -> tensor of shape (samples, ...), as the source has them.
            training: Whether the batch is trained on; else it is validated or predicted.
        """
        return batch

    def optimizer(self, model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
        """Return the optimizer, at its peak learning rate; the schedule multiplies it.

        The default is what ``[optimizer]`` says, without weight decay on biases and norms (whatever
        has fewer than two dimensions).

        Args:
            model: On its device, in the run's arithmetic.
            config: The section ``[optimizer]``.
        """
        return optimizer_of(config, model)

    def schedule(self, optimizer: torch.optim.Optimizer) -> Scheduler | None:
        """Return a scheduler, such as ``SequentialLR``; None: ``[schedule]`` decides.

        It takes a step after each of the optimizer, or with ``schedule.every=epoch`` after each
        epoch; a ``ReduceLROnPlateau`` after each validation, by the monitored metric.

        Args:
            optimizer: That of ``optimizer()``, at its peak rates.
        """
        return None


def _undefined(task: Task, method: str, hint: str) -> Error:
    return Error(f"task {type(task).__name__} must define {method}.", hint=hint)


def _open(path: Path, config: DataConfig) -> ShardSet:
    staged = folder_of(path, config.stage_dir) if config.stage_dir else None
    return ShardSet(path, on_bad_shard=config.on_bad_shard, staged=staged)


def _mixture(config: DataConfig) -> Mixture:
    return Mixture(
        [_open(entry.path, config).split("train") for entry in config.mixture],
        [entry.weight for entry in config.mixture],
    )


@dataclasses.dataclass(frozen=True)
class TaskTransform:
    """A task's ``transform`` as a loader wants it.

    Another process makes the task anew from this, because a task file's classes cannot be pickled.

    Attributes:
        task: Whose transform it is.
        training: Passed to it.
        spec: What :func:`load_task` finds the task by.
        options: What :func:`make_task` gave it.
        seed: Of the run, for random numbers drawn while the task is made.
    """

    task: Task
    training: bool
    spec: str
    options: dict[str, Any]
    seed: int = 0

    def __call__(self, batch: Batch) -> Batch:
        """The transformed batch."""
        return self.task.transform(batch, self.training)

    def __reduce__(self) -> Any:
        return _transform_anew, (self.training, self.spec, self.options, self.seed)


def _transform_anew(training: bool, spec: str, options: dict[str, Any], seed: int) -> TaskTransform:
    kind = load_task(spec, seed)
    set_start_seeds(seed)  # as where the others were made
    return TaskTransform(make_task(kind, options), training, spec, options, seed)


def load_task(spec: str, seed: int = 0) -> type[Task]:
    """Load the task class of a built-in name, ``file.py[:Name]`` or ``package.module:Name``.

    Random numbers that a file draws while it is loaded are a function of the seed; a module is
    loaded once, with a seed of 0.

    Args:
        spec: Which one.
        seed: Of the run.

    Raises:
        Error: There is none, there are several, or the file raised.
    """
    known = TASKS.place(spec) or spec
    place, colon, name = known.rpartition(":")
    if not colon or name.endswith(".py"):  # a folder's name may have a colon
        place, name = known, ""
    if place.endswith(".py"):
        module = _import_file(Path(place), seed)
    elif name:
        module = _import_module(place)
    else:
        raise Error(
            f"there is no task '{spec}'.",
            hint=f"{nearest(spec, TASKS.names())} Your own: my_task.py[:Name] or package.mod:Name.",
        )
    classes = {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, type)
        and issubclass(value, Task)
        and value.__module__ == module.__name__
    }
    if name:
        if name not in classes:
            raise Error(f"{place} defines no task '{name}'.", hint=nearest(name, classes))
        return classes[name]
    if len(classes) != 1:
        raise Error(
            f"{place} defines {len(classes)} tasks.",
            hint=f"say which: {place}:NAME, one of {', '.join(classes)}."
            if classes
            else "define a class that inherits from hpctrain.Task.",
        )
    return next(iter(classes.values()))


def make_task(kind: type[Task], options: dict[str, Any]) -> Task:
    """Make a task of a class, with its options set.

    Args:
        kind: The class; options are its fields, where it is a dataclass.
        options: Values by name, as the table ``[options]`` has them.

    Raises:
        Error: An option is unknown or of the wrong type.
    """
    fields: list[str] = []
    if dataclasses.is_dataclass(kind):
        fields = [field.name for field in dataclasses.fields(kind)]
    for option in options:
        if option not in fields:
            raise Error(
                f"task {kind.__name__} has no option '{option}'.",
                hint=nearest(option, fields) if fields else "it has none.",
            )
    if not fields:
        try:
            return kind()
        except TypeError as error:
            if "required positional argument" not in str(error):
                raise
            raise Error(
                f"task {kind.__name__} cannot be made: {error}.",
                hint="make it a dataclass: its fields are set by --set options.name=value.",
            ) from error
    try:
        task: Task = TypeAdapter(kind).validate_python(options)
    except ValidationError as error:
        first = error.errors()[0]
        raise Error(
            f"options.{'.'.join(map(str, first['loc']))} = {first['input']!r}: {first['msg']}.",
            hint=f"see the fields of {kind.__name__}.",
        ) from error
    return task


def _import_file(path: Path, seed: int) -> Any:
    if not path.is_file():
        raise Error(f"task file {path} does not exist.", hint="check the path.")
    folder = path.resolve().parent
    if (folder / "__init__.py").is_file():
        names = [path.stem]
        while (folder / "__init__.py").is_file():
            names.insert(0, folder.name)
            folder = folder.parent
        _look_in(folder)
        return _import_module(".".join(names), str(path))
    # A package of its own, so that it may import its neighbours as `.helpers` too.
    package = types.ModuleType("hpctrain_task_folder")
    package.__path__ = [str(folder)]
    sys.modules[package.__name__] = package
    name = f"{package.__name__}.hpctrain_task_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    _look_in(folder)  # a task may have helpers beside it
    loader = spec.loader
    set_start_seeds(seed)
    _run_import(str(path), lambda: loader.exec_module(module))
    return module


def _import_module(name: str, what: str = "") -> Any:
    if not name.startswith("hpctrain."):
        _look_in(Path.cwd())  # as `python -m` does
    if name not in sys.modules:
        set_start_seeds(0)
    return _run_import(what or name, lambda: importlib.import_module(name))


def _look_in(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _run_import(what: str, action: Any) -> Any:
    """Run the user's code at start-up; what it raises is a one-line error with its place."""
    try:
        return action()
    except Exception as error:
        text, line = str(error), ""
        if isinstance(error, SyntaxError):
            text, place, number = error.msg, error.filename, error.lineno
        else:
            # Not Python's own steps from one import to the next.
            frames = [
                frame
                for frame in traceback.extract_tb(error.__traceback__)
                if not frame.filename.startswith("<frozen")
            ]
            place, number = (frames[-1].filename, frames[-1].lineno) if frames else (None, None)
        if place is not None:
            line = f", line {number} of {Path(place).name}"
        raise Error(
            f"task {what} cannot be loaded: {type(error).__name__}: {text}{line}.",
            hint=f"try `python {what}`." if what.endswith(".py") else "is it installed?",
        ) from error
