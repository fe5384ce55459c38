"""A model's stages on several ranks, through which micro-batches pass one after another.

torch's own pipeline wants micro-batches of one shape, which the last batch of an epoch is not, and
tells the next stage its shapes by pickle. Here each activation says its shape itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import nn

from hpctrain.data.batch import Batch
from hpctrain.errors import Error
from hpctrain.mesh.passes import Computed, Passes
from hpctrain.mesh.schedules import Action, Schedule, order

_DTYPES = (
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip
_MOST_DIMS = 8
_HEADER = 3 + _MOST_DIMS


class Chunk(nn.Module):
    """A stage: some of a model's layers, one after another.

    Args:
        layers: Those.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the chunk's layers, one after the other."""
        for layer in self.layers:
            x = layer(x)
        return x


class _Asked(Exception):  # noqa: N818 - no error: what the loss function wants of the model
    def __init__(self, argument: torch.Tensor) -> None:
        super().__init__()
        self.argument = argument


class _StandIn:
    """What a task's loss is given in the model's place.

    Args:
        chunk: The last stage; None: the loss is only asked what it would give the model.
        argument: Of the last stage.
    """

    def __init__(self, chunk: nn.Module | None, argument: torch.Tensor | None, training: bool):
        self.training = training
        self._chunk = chunk
        self._argument = argument
        self._calls = 0

    def __call__(self, *arguments: Any, **named: Any) -> torch.Tensor:
        if named or len(arguments) != 1 or not isinstance(arguments[0], torch.Tensor):
            raise Error(
                f"loss() calls the model with {len(arguments) + len(named)} arguments; the first "
                "stage of a pipeline takes one tensor.",
                hint="pass one tensor by its place, or use pp=1.",
            )
        self._calls += 1
        if self._calls > 1:
            raise Error(
                "loss() calls the model twice, which a pipeline cannot.",
                hint="join the samples to one batch, or use pp=1.",
            )
        if self._chunk is None:
            raise _Asked(arguments[0])
        assert self._argument is not None
        return cast(torch.Tensor, self._chunk(self._argument))

    def __getattr__(self, name: str) -> Any:
        raise Error(
            f"loss() uses '{name}' of the model, which is on several ranks of a pipeline.",
            hint="have it only call the model, or use pp=1.",
        )


class _Held(NamedTuple):
    """What a stage keeps of a micro-batch until its backward pass."""

    given: torch.Tensor
    made: torch.Tensor


class Pipeline:
    """This rank's stages of a model.

    Args:
        chunks: This rank's stages: those whose number is this rank's modulo the ranks.
        group: Of the ranks, in the order of the stages.
        schedule: In which order micro-batches are computed.
        microbatches: Parts of each batch; fewer where a replica has fewer samples.
    """

    def __init__(
        self, chunks: Sequence[nn.Module], group: Any, schedule: Schedule, microbatches: int
    ) -> None:
        self._chunks = list(chunks)
        self._group = group
        self._rank, self._ranks = dist.get_rank(group), dist.get_world_size(group)
        self._peers = dist.get_process_group_ranks(group)
        self._last = self._ranks * len(self._chunks) - 1
        self._schedule = schedule
        self._microbatches = microbatches
        self._under_way: list[tuple[Any, torch.Tensor]] = []

    @property
    def reports(self) -> bool:
        """Whether this rank computes the loss."""
        return self._rank == self._last % self._ranks

    def forward_backward(self, passes: Passes, batch: Batch, factor: float) -> list[Computed]:
        """Compute the gradients of a batch.

        Args:
            passes: Gives the loss.
            batch: The replica's samples, the same on all ranks of the pipeline; maybe none.
            factor: What the loss of the batch is multiplied by.

        Returns:
            Means over the samples of each micro-batch, on the rank of the last stage.

        Raises:
            PeerLost: Another rank is gone.
            Error: The task's loss does not fit a pipeline.
        """
        parts, actions = self._work(batch)
        whole = passes.weight(batch)
        held: dict[tuple[int, int], _Held] = {}
        computed: list[Computed] = []
        for forward, chunk, number in actions:
            if forward:
                part = parts[number]
                share = passes.weight(part) / whole if whole else 0.0
                held[chunk, number] = self._forward(passes, part, chunk, computed, factor * share)
            else:
                self._backward(held.pop((chunk, number)), chunk)
        self._finish()
        return computed

    def evaluate(self, passes: Passes, batch: Batch) -> list[Computed]:
        """Compute means over a batch; without gradients.

        Args:
            passes: Gives the loss.
            batch: The replica's samples, the same on all ranks of the pipeline; maybe none.
        """
        parts, actions = self._work(batch)
        computed: list[Computed] = []
        for forward, chunk, number in actions:
            if forward:
                self._forward(passes, parts[number], chunk, computed, None)
        self._finish()
        return computed

    def _work(self, batch: Batch) -> tuple[list[Batch], list[Action]]:
        """Return micro-batches, as many in every replica, and in which order they are computed."""
        count = max(1, min(self._microbatches, batch.least))
        actions = order(self._schedule, self._rank, self._ranks, count, len(self._chunks))
        return list(batch.split(count, empty=True)), actions

    def _stage(self, chunk: int) -> int:
        return self._rank + self._ranks * chunk

    def _forward(
        self,
        passes: Passes,
        part: Batch,
        chunk: int,
        computed: list[Computed],
        factor: float | None,
    ) -> _Held:
        """Compute a micro-batch's way through a chunk; without a factor, for its means alone."""
        training = factor is not None
        stage, module = self._stage(chunk), self._chunks[chunk]
        given = (
            _first_input(passes, part, training)
            if stage == 0
            else self._receive_activation(stage, training)
        )
        if stage < self._last:
            with passes.arithmetic():
                made = module(given)
            self._send_activation(made, stage + 1)
            return _Held(given, made)
        stand_in: Any = _StandIn(module, given, module.training)
        loss, means = passes.loss(stand_in, part, training=training)
        if part.samples:
            computed.append(Computed(means, part.samples, passes.weight(part)))
        return _Held(given, loss if factor is None else loss * factor)

    def _backward(self, held: _Held, chunk: int) -> None:
        stage = self._stage(chunk)
        if not held.made.requires_grad:
            return
        gradient = None
        if stage < self._last:
            gradient = torch.empty(held.made.shape, dtype=held.made.dtype)
            self._receive(gradient, stage + 1, _tag(stage, forward=False))
        torch.autograd.backward(held.made, gradient)
        if stage > 0 and held.given.requires_grad:
            mine = held.given.grad
            assert mine is not None
            self._send(mine, stage - 1, _tag(stage - 1, forward=False))
            held.given.grad = None

    def _send_activation(self, made: torch.Tensor, stage: int) -> None:
        if not isinstance(made, torch.Tensor) or made.dim() > _MOST_DIMS:
            raise Error(
                f"stage {stage - 1} of the pipeline gives {type(made).__name__}, not a tensor of "
                f"at most {_MOST_DIMS} dimensions.",
                hint="have each layer of stages() return one tensor.",
            )
        header = torch.zeros(_HEADER, dtype=torch.int64)
        given = [_DTYPES.index(made.dtype), int(made.requires_grad), made.dim(), *made.shape]
        header[: len(given)] = torch.tensor(given)
        tag = _tag(stage, forward=True)
        self._send(header, stage, tag)
        self._send(made.detach(), stage, tag)

    def _receive_activation(self, stage: int, training: bool) -> torch.Tensor:
        tag = _tag(stage, forward=True)
        header = torch.empty(_HEADER, dtype=torch.int64)
        self._receive(header, stage - 1, tag)
        kind, requires_grad, dims, *sizes = header.tolist()
        given = torch.empty(sizes[:dims], dtype=_DTYPES[kind])
        self._receive(given, stage - 1, tag)
        return given.requires_grad_(bool(requires_grad) and training)

    def _send(self, tensor: torch.Tensor, stage: int, tag: int) -> None:
        data = tensor.contiguous()
        work = dist.isend(data, self._peers[stage % self._ranks], group=self._group, tag=tag)
        self._under_way.append((work, data))
        self._under_way = [(w, t) for w, t in self._under_way if w and not w.is_completed()]

    def _receive(self, tensor: torch.Tensor, stage: int, tag: int) -> None:
        dist.recv(tensor, self._peers[stage % self._ranks], group=self._group, tag=tag)

    def _finish(self) -> None:
        """Wait until all that was sent has left."""
        for work, _ in self._under_way:
            work.wait()
        self._under_way.clear()


def _first_input(passes: Passes, part: Batch, training: bool) -> torch.Tensor:
    stand_in: Any = _StandIn(None, None, training)
    try:
        passes.loss(stand_in, part, training=training)
    except _Asked as asked:
        return asked.argument
    raise Error("loss() does not call the model.", hint="a pipeline needs it to; else use pp=1.")


def _tag(stage: int, *, forward: bool) -> int:
    """Return the tag of messages to a stage, one for each direction."""
    return 2 * stage + forward
