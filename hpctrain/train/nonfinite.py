"""Losses, gradients and parameters that are no numbers: noticed without waiting for a device.

Losses of the steps since the last look are kept as they are, and looked at together, where the
ranks come together anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import nn

from hpctrain.errors import Error
from hpctrain.mesh.passes import Computed
from hpctrain.train.state import Counters
from hpctrain.world.broadcast import gather_numbers
from hpctrain.world.world import Communicator

HINT = (
    "look at the samples of that step, lower optimizer.lr, or set train.clip_norm; "
    "train.nonfinite=skip leaves such steps out. Checkpoints from before are kept."
)


class Seen(NamedTuple):
    """What a look found, on all ranks that took part in it.

    Attributes:
        losses: How many were not finite, each rank's counting by itself.
        step: Of the first of them; 0: there was none.
        rank: Whose it was.
        parameter: The first that is not finite; nothing: all are.
    """

    losses: int
    step: int
    rank: int
    parameter: str

    def __bool__(self) -> bool:
        return self.losses > 0 or bool(self.parameter)

    def __str__(self) -> str:
        parts = []
        if self.losses:
            times = "" if self.losses == 1 else f" {self.losses} times, first"
            parts.append(f"the loss was not finite{times} at step {self.step} on rank {self.rank}")
        if self.parameter:
            parts.append(f"parameter '{self.parameter}' is no longer finite")
        return " and ".join(parts)


class Watch:
    """Looks for what is not finite.

    Args:
        model: Its trained parameters count, but those that begin so, such as masks.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameters = [
            (name, parameter)
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and all_finite([parameter])
        ]
        self._losses: list[tuple[int, torch.Tensor]] = []
        self._seen = 0  # of the losses

    def add(self, step: int, loss: torch.Tensor) -> None:
        """Keep the loss of one pass of a step, to be looked at later; the GPU is not waited for.

        Args:
            step: The step it is of, counted from 1.
            loss: Mean over that pass's samples of this rank, a scalar; it is detached.
        """
        self._losses.append((step, loss.detach()))

    def look(self, comm: Communicator | None) -> Seen:
        """Look at the losses since :meth:`settle`, and at the parameters.

        Args:
            comm: Of the ranks that look together; None: this one alone.
        """
        losses = [loss for _, loss in self._losses]
        good = torch.stack(losses).isfinite().tolist() if losses else []
        bad = [step for (step, _), finite in zip(self._losses, good, strict=True) if not finite]
        tensors = [parameter for _, parameter in self._parameters]
        place = 0
        if not all_finite(tensors):
            place = 1 + next(n for n, each in enumerate(tensors) if not all_finite([each]))
        self._seen = len(losses)
        mine = [float(len(bad)), float(bad[0] if bad else 0), float(place)]
        table = [mine] if comm is None else gather_numbers(comm, mine)
        step, rank = min(((row[1], r) for r, row in enumerate(table) if row[0]), default=(0.0, 0))
        first = min((int(row[2]) for row in table if row[2]), default=0)
        name = self._parameters[first - 1][0] if first else ""
        return Seen(int(sum(row[0] for row in table)), int(step), rank, name)

    def settle(self) -> None:
        """Forget the losses that were looked at."""
        del self._losses[: self._seen]
        self._seen = 0


class Health:
    """Whether the losses and parameters of a run are finite, and what follows where not.

    Args:
        model: Its parameters.
        counters: Gives those of the run.
        mode: ``stop``, ``skip`` or ``allow``.

    Attributes:
        unfit: For a checkpoint: a parameter is not finite.
    """

    def __init__(self, model: nn.Module, counters: Callable[[], Counters], mode: str) -> None:
        self._watch = Watch(model)
        self._counters = counters
        self._mode = mode
        self.unfit = False

    def count(self, computed: list[Computed]) -> None:
        """Count the losses of a step in, before the step counts.

        Args:
            computed: By its passes.
        """
        self._watch.settle()
        for each in computed:
            self._watch.add(self._counters().step + 1, each.means["loss"])

    def look(self, comm: Communicator | None, say: Callable[[str], None]) -> None:
        """Look whether all is finite still.

        Args:
            comm: Of the ranks that look together; None: this one alone.
            say: Tells the person who watches.

        Raises:
            Error: It is not, and that is to end the run.
        """
        counters = self._counters()
        seen = self._watch.look(comm)
        self.unfit = bool(seen.parameter)
        counters.nonfinite_losses += seen.losses
        if not seen:
            return
        if self._mode == "stop":
            raise Error(f"step {counters.step}: {seen}.", hint=HINT)
        say(f"warning: step {counters.step}: {seen}.")

    def check_end(self) -> None:
        """Refuse to call a run completed that trained nothing.

        Raises:
            Error: Its parameters are not finite, or every step was left out.
        """
        counters = self._counters()
        if self.unfit:
            raise Error("the run's parameters are not finite at its end.", hint=HINT)
        if counters.skipped_steps and counters.skipped_steps >= counters.step:
            raise Error("every step was left out: no gradient was finite.", hint=HINT)


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether no element is infinite or no number; waits for the tensors' device."""
    dense = []
    for tensor in tensors:
        if nn.parameter.is_lazy(tensor):
            continue
        tensor = tensor.detach()
        if tensor.layout == torch.sparse_coo:
            tensor = tensor._values()
        if tensor.numel() and (tensor.is_floating_point() or tensor.is_complex()):
            dense.append(torch.view_as_real(tensor) if tensor.is_complex() else tensor)
    largest = [torch.linalg.vector_norm(each, float("inf")) for each in dense]
    return not largest or bool(torch.stack([each.double() for each in largest]).isfinite().all())
