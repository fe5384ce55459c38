"""The seam that every strategy stands behind: one class, which wraps an optimizer."""

from __future__ import annotations

import contextlib
import enum
import inspect
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, cast

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from hpctrain.config import ElasticConfig, RunConfig, Section
from hpctrain.data.batch import Batch
from hpctrain.elastic.choose import Choice
from hpctrain.elastic.membership import Meeting, Membership, Progress
from hpctrain.errors import Error
from hpctrain.mesh.passes import Computed, Passes
from hpctrain.tables import files
from hpctrain.tables.table import Table, tables_of
from hpctrain.world.agreement import check_tensors
from hpctrain.world.world import World


class Agreement(enum.Enum):
    """When all ranks have the same parameters."""

    ALWAYS = "after every step"
    AT_ROUNDS = "every so many steps"
    ON_SERVERS = "those of the servers, which no rank waits for"

    @property
    def in_step(self) -> bool:
        """Whether all ranks take each step together, so that they can talk after it."""
        return self is not Agreement.ON_SERVERS


class Snapshot(NamedTuple):
    """What a checkpoint holds, as the world has it at one moment.

    Attributes:
        parameters: By parameter, its values; None: as this rank's model has them.
        optimizer: As ``state_dict()`` of the user's optimizer has it, in one process.
        strategy: The strategy's own: a tree of tensors and plain values.
    """

    parameters: dict[nn.Parameter, torch.Tensor] | None
    optimizer: dict[str, Any]
    strategy: dict[str, Any]


class Change(NamedTuple):
    """A rank that is lost, and that the others go on without, or one that joined them.

    Attributes:
        rank: Its number.
        role: ``worker``, ``server``, or both.
        host: Its host's name, or nothing where that is not known.
        lost: How a loss was noticed; None: it joined.
        all: Who goes on.
    """

    rank: int
    role: str
    host: str
    lost: str | None
    all: str

    def __str__(self) -> str:
        where = f" on {self.host}" if self.host else ""
        what = "joined" if self.lost is None else f"was lost ({self.lost})"
        return f"{self.role} {self.rank}{where} {what}; going on with {self.all}"


class DistributedOptimizer(torch.optim.Optimizer):
    """An optimizer around the user's own, which makes the replicas agree in ``step()``.

    Groups, state and hooks are the inner optimizer's, so learning-rate schedulers, gradient
    scalers and checkpoints work on either alike. Gradients become the *average over ranks*; where
    ranks hold different numbers of samples, multiply each loss by ``batch.weight`` (see
    :class:`hpctrain.data.batch.Batch`), and the average is the global batch's own.

    Attributes:
        inner: The user's optimizer.
        clip_norm: Largest 2-norm of the agreed gradient, or None.
        grad_norm: That norm before clipping at the last step; None without clipping.
        weight: What this step's losses are multiplied by in all (``batch.weight``); to be set
            before ``backward()`` where a strategy may have to leave out some ranks.
        samples: How many samples this step's losses are of, on this rank, or what the task has them
            count for; None: as ``weight`` says, as a share of the global batch. Read where
            parameters are averaged by samples.
        carries_gradients: Whether what was left out of earlier gradients is added to later ones, so
            that all have to be on one scale.
        missed: Steps of the world that went by without this rank, at its last one.
        overlaps: Whether gradients may be sent while ``backward()`` still computes, because nobody
            looks at them or changes them before ``step()``, and each step has one pass outside of
            ``no_sync()``. Read by the parameter server; the trainer says so.
        needs_closure: Whether the user's optimizer evaluates the loss by itself, as LBFGS does.
        tables: The model's embedding tables, which are updated beside its parameters.
        rate_factor: What the schedule multiplies learning rates by at this step: tables have rates
            of their own.
        mark: Called when a part of a step has ended, with its name: of
            :data:`hpctrain.train.step_timer.PARTS`.
    """

    # Gradients are to be unscaled before they are clipped, which the inner optimizer cannot know.
    _step_supports_amp_scaling = False
    carries_gradients = False

    def __init__(self, inner: torch.optim.Optimizer, clip_norm: float | None = None) -> None:
        # The base class's own start is left out on purpose: it would make a second set of groups.
        self.inner = inner
        # Who goes on using the inner one alone has gradients averaged still: this lives as long.
        inner.__dict__["_wrapped_by"] = self
        self.clip_norm = clip_norm
        self.needs_closure = needs_closure(inner)
        self.grad_norm: torch.Tensor | None = None
        self.weight = 1.0
        self.samples: float | None = None
        self.missed = 0
        self.overlaps = False
        self.tables: list[Table] = []
        self.rate_factor = 1.0
        self.mark: Callable[[str], None] = lambda part: None

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # during unpickling and copying, before it is set
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.inner!r})"

    def forward_backward(
        self, passes: Passes, model: nn.Module, batch: Batch, factor: float
    ) -> list[Computed]:
        """Compute a pass's gradients, and add them to those of the passes before.

        Args:
            passes: Gives the loss.
            model: What is trained.
            batch: This rank's samples; maybe none.
            factor: What the loss is multiplied by.

        Returns:
            Means over samples of this rank's, to be recorded.
        """
        loss, means = passes.loss(model, batch, training=True)
        (loss * factor).backward()
        return [Computed(means, batch.samples, passes.weight(batch))] if batch.samples else []

    def evaluate(self, passes: Passes, model: nn.Module, batch: Batch) -> list[Computed]:
        """Compute means over a batch, without gradients.

        Args:
            passes: Gives the loss.
            model: In evaluation mode: the one that is trained, or its average.
            batch: This rank's samples; maybe none.
        """
        means = passes.loss(model, batch, training=False)[1]
        return [Computed(means, batch.samples, passes.weight(batch))] if batch.samples else []

    def gradients(self, model: nn.Module) -> list[torch.Tensor]:
        """Return the gradients that this rank knows, after :meth:`synchronize`.

        Args:
            model: What is trained.
        """
        parameters = (p for p in model.parameters() if p.requires_grad)
        return [p.grad for p in parameters if p.grad is not None]

    def synchronize(self) -> None:
        """Make the gradients the world's average; called by ``step()``, or before by the user."""

    def no_sync(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which ``backward()`` only accumulates local gradients."""
        return contextlib.nullcontext()

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Agree with the other ranks, clip, and update the parameters.

        Raises:
            PeerLost: Another rank is gone.
            Error: A closure was given or is needed: each evaluation would need an agreement.
        """
        if closure is not None or self.needs_closure:
            raise _closure_error(self.inner, "across ranks, or without a closure")
        self.synchronize()
        self.mark("exchange")
        self._clip()
        result = self.inner.step()
        for table in self.tables:
            table.step(self.rate_factor)
        self.mark("update")
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of parameters, and those of tables' rows."""
        self.inner.zero_grad(set_to_none)
        for table in self.tables:
            table.forget()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the wrapped optimizer."""
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the inner optimizer's state."""
        self.inner.load_state_dict(state_dict)

    def world_parameters(self) -> dict[nn.Parameter, torch.Tensor] | None:
        """Return what "the model" means where ranks differ; None: what each rank has.

        It is what is validated and saved. Where ranks take steps together every rank calls this, at
        the same step, and all get the same bits; else rank 0 alone.
        """
        return None

    def world_state(self) -> dict[str, Any]:
        """Return the optimizer's state as a single process would have it, on rank 0.

        Called like :meth:`world_parameters`; other ranks may return anything.
        """
        return self.inner.state_dict()

    def keep_tables(self, folder: Path) -> int:
        """Write the rows of the model's tables into a folder; return how many files of them.

        Called like :meth:`world_parameters`, on rank 0.

        Args:
            folder: Made if it is not there.

        Raises:
            OSError: It could not be written.
        """
        stores = {table.spec.name: table.store for table in self.tables if table.store is not None}
        files.finish(files.write(folder, 0, stores))
        return 1

    def restore_tables(self, folder: Path, count: int) -> None:
        """Take over the rows of a checkpoint, before the first step; every rank calls this.

        Args:
            folder: Of the checkpoint.
            count: How many files of rows it has.

        Raises:
            Error: A file is missing or damaged, or of other tables.
        """
        files.load(folder, count, self.tables)

    def strategy_state(self) -> dict[str, Any]:
        """Return what else has to be saved to go on, on rank 0: tensors and plain values.

        Called like :meth:`world_parameters`; other ranks may return anything.
        """
        return {}

    def load_strategy_state(self, state: dict[str, Any]) -> None:
        """Take up what :meth:`strategy_state` gave on rank 0; every rank is given all of it.

        Args:
            state: Tensors are on the CPU. It may be of a run on another number of ranks.
        """

    def snapshot(self) -> Snapshot:
        """Return what a checkpoint holds; called like :meth:`world_parameters`."""
        return Snapshot(self.world_parameters(), self.world_state(), self.strategy_state())

    def on_all_ranks(self, holds: bool) -> bool:
        """Whether something holds of the agreed gradient, as far as any rank knows it.

        Every rank asks this at the same step, where ranks agree on gradients.

        Args:
            holds: Whether it does of what this rank knows: here, all of it.
        """
        return holds

    def finish(self) -> None:
        """Wait for the other ranks' last steps, and take the world's parameters.

        Where ranks agree at rounds they all call this after the last step, maybe twice, and have
        afterwards what :meth:`world_parameters` gave.
        """

    def changes(self) -> list[Change]:
        """Return who was lost or has joined since the last call."""
        return []

    def statistics(self) -> dict[str, Any]:
        """Return what the strategy has measured since the last call, for the recorder."""
        return {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse a further group: the strategy has laid out its exchange already.

        Raises:
            Error: Always.
        """
        raise Error(
            "a wrapped optimizer takes no more parameters.",
            hint="add the group to the plain optimizer, then wrap it.",
        )

    def _clip(self) -> None:
        if self.clip_norm is not None:
            self.grad_norm = nn.utils.clip_grad_norm_(self._parameters(), self.clip_norm)

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self.inner.param_groups for p in group["params"]]


class Strategy(ABC):
    """How replicas agree on parameters. Making one connects the world.

    A strategy of one's own is one subclass, chosen by ``--strategy package.module:Class``, or by a
    name where its package declares an entry point of the group ``hpctrain.strategies``. What it has
    to do is :meth:`wrap`: return an optimizer that acts in ``backward()`` and ``step()``. Its ranks
    talk by ``world.comm``, which an engine puts there, such as the base
    :class:`hpctrain.strategies.horovod.HorovodEngine`.

    Args:
        world: Who takes part; an engine replaces its communicator.
        config: The strategy's own knobs, of the class :attr:`Config`; None: their defaults.
        elastic: Whether, and how, to outlive losses.
        timeout_seconds: Longest wait for another rank.

    Attributes:
        name: What it is called, and the section of the configuration that holds its knobs.
        Config: The class of that section.
        agreement: When all ranks have the same parameters.
        averages_gradients: Whether each rank knows the world's gradient before the update, and all
            ranks come to each forward and backward pass together. What needs that is refused
            elsewhere: ``train.nonfinite=skip``, ``train.sync_batchnorm``.
        takes_closures: Whether ``step(closure)`` may evaluate the loss again and again, as LBFGS
            wants it.
        fault_tolerance: How losses are outlived, where that was to be chosen.
        holds_tables: Whether a model may have embedding tables (:class:`hpctrain.Table`).

    Example:
        >>> from hpctrain.world.launcher import ALONE
        >>> class Plain(Strategy):
        ...     name = "plain"
        ...     def wrap(self, model, optimizer, *, clip_norm=None):
        ...         return DistributedOptimizer(optimizer, clip_norm)
        >>> model = nn.Linear(2, 1)
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> optimizer = Plain(World(ALONE)).wrap(model, sgd, clip_norm=1.0)
        >>> model(torch.ones(3, 2)).sum().backward()
        >>> optimizer.step()
        >>> round(float(optimizer.grad_norm), 2)
        5.2
    """

    name: ClassVar[str]
    Config: ClassVar[type[Section]] = Section
    averages_gradients: ClassVar[bool] = True
    takes_closures: ClassVar[bool] = False
    holds_tables: ClassVar[bool] = False
    agreement: Agreement = Agreement.ALWAYS
    fault_tolerance: Choice | None = None

    def __init__(
        self,
        world: World,
        config: Section | None = None,
        *,
        elastic: ElasticConfig | None = None,
        timeout_seconds: float = 600.0,
    ) -> None:
        self.world = world
        self.config: Any = config if config is not None else self.Config()
        self.timeout_seconds = timeout_seconds

    def prepare(self, config: RunConfig, task: Any) -> None:  # noqa: B027 - most have nothing to do
        """Learn what is to be trained, and refuse what cannot be; called before a model is made.

        Args:
            config: Of the run.
            task: The user's side.

        Raises:
            Error: The first thing that this strategy cannot do.
        """

    @abstractmethod
    def wrap(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        clip_norm: float | None = None,
    ) -> DistributedOptimizer:
        """Start every replica from rank 0's model and optimizer state, and wrap the optimizer.

        Args:
            model: What is trained.
            optimizer: Of its parameters.
            clip_norm: Largest 2-norm of the gradient that parameters are updated by, or None.
        """

    @property
    def joint_passes(self) -> bool:
        """Whether ranks with different samples exchange within forward and backward passes.

        Then each comes to each of them, with no samples if need be.
        """
        return False

    @property
    def replicates(self) -> bool:
        """Whether every rank has the whole model; else ``world_parameters()`` gives rank 0 all."""
        return True

    def check_parameters(self, model: nn.Module) -> None:
        """Refuse ranks that say that they always agree, and do not; every rank calls this.

        Args:
            model: What is trained.

        Raises:
            Error: The first parameter that differs, and whose it is.
        """
        check_tensors(self.world.comm, model.named_parameters())

    @property
    def recovery(self) -> Recovery | None:
        """How the world is formed anew when a rank is lost or joins; None: a loss ends the run."""
        return None

    @property
    def stopped(self) -> bool:
        """Whether another rank ended the training early."""
        return False

    @property
    def joined(self) -> Any:
        """What was remembered for ranks that join a run under way; None: this one began with it."""
        return None

    @property
    def newcomers(self) -> bool:
        """Whether ranks may join at any step, which know nothing that the others agreed on."""
        return self.recovery is not None

    def warnings(self, steps: int) -> list[str]:
        """Return what is to be said at the start of a run, such as that its knobs do not suit it.

        Args:
            steps: Of the whole run.
        """
        return []

    @property
    def serves(self) -> bool:
        """Whether this rank trains nothing, and has to :meth:`serve` instead."""
        return False

    def serve(self) -> None:
        """Do what a rank does that trains nothing, until the run is over."""
        raise NotImplementedError


class ElasticOptimizer(DistributedOptimizer):
    """An optimizer that can begin a step anew, in another world."""

    def restart(self) -> None:
        """Forget the step that failed."""


class Recovery(Protocol):
    """What forms the world anew when a rank is lost, or wants to join."""

    @property
    def membership(self) -> Membership:
        """Who takes part."""

    def meet(self, progress: Progress) -> Meeting:
        """Form a new world; every rank calls this.

        Raises:
            PeerLost: This rank cannot go on.
        """

    def share(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Start every replica from rank 0's, once more.

        Args:
            model: What is trained; overwritten, but on rank 0.
            optimizer: Of its parameters; its state is overwritten, but on rank 0.
        """


def _closure_error(optimizer: torch.optim.Optimizer, where: str) -> Error:
    return Error(
        f"optimizer.step(closure) is not supported {where} ({type(optimizer).__name__}).",
        hint="use an optimizer that steps once per gradient (not LBFGS); on one rank, in a loop of "
        "your own, optimizer.step(closure) works.",
    )


def no_tables(strategy: str, name: str) -> Error:
    """Return why a strategy does not train a model with a table.

    Args:
        strategy: Its name.
        name: The table's.
    """
    return Error(
        f"{strategy} holds no embedding tables, and this model has '{name}'.",
        hint="use --strategy ps, or one process; a table that fits into each rank can be an "
        "nn.EmbeddingBag(sparse=True).",
    )


def check_shareable(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, tables: bool = False
) -> None:
    """Refuse what cannot be trained across ranks.

    Args:
        model: The model.
        optimizer: To be wrapped.
        tables: Whether the model may have embedding tables.

    Raises:
        Error: The optimizer evaluates the model by itself, or a parameter has no shape yet.
    """
    if needs_closure(optimizer):
        raise _closure_error(optimizer, "across ranks")
    for table in () if tables else tables_of(model):
        raise no_tables("this strategy", table.spec.name)
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if is_lazy(tensor):
            raise Error(
                f"'{name}' has no shape yet: its module is lazy.",
                hint="run the model once on a batch of the right shape before wrapping.",
            )


def check_trainable(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer without parameters.

    Raises:
        Error: Nothing to train.
    """
    if not any(p.requires_grad for group in optimizer.param_groups for p in group["params"]):
        raise Error(
            "the optimizer has no parameter that requires a gradient.",
            hint="give it model.parameters(), and leave some unfrozen.",
        )


def needs_closure(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer evaluates the model by itself, and so cannot step without a closure."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is closure.empty


def ordered(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Return the optimizer's parameters, those of the model first, in its order.

    Args:
        model: The model.
        optimizer: Of its parameters, and maybe others.
    """
    given = dict.fromkeys(p for group in optimizer.param_groups for p in group["params"])
    return list(dict.fromkeys([*(p for p in model.parameters() if p in given), *given]))


def names_of(model: nn.Module, parameters: Sequence[nn.Parameter]) -> list[str]:
    """Return the parameters' names in the model; those of others are numbered.

    Args:
        model: The model.
        parameters: Of it, and maybe others; all ranks give them in the same order.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [names.get(p, f"parameter {n} of no module") for n, p in enumerate(parameters)]


def sparse_tables(model: nn.Module) -> dict[nn.Parameter, int]:
    """Return the embeddings whose gradients are sparse, with the length of a row."""
    return {
        cast(nn.Parameter, module.weight): module.weight.shape[1]
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse
    }


@contextlib.contextmanager
def having(parameters: Mapping[nn.Parameter, torch.Tensor] | None) -> Iterator[None]:
    """Give a model other values within this; afterwards it has its own again.

    Args:
        parameters: By parameter, its values; None: the model keeps its own.
    """
    if parameters is None:
        yield
        return
    own = {parameter: parameter.detach().clone() for parameter in parameters}
    for parameter, value in parameters.items():
        parameter.copy_(value)
    try:
        yield
    finally:
        for parameter, value in own.items():
            parameter.copy_(value)
