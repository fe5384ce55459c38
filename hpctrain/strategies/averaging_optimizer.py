"""Steps by a rank itself, and parameters that ranks agree on once a round."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from hpctrain.compression.dense import Dense
from hpctrain.config import HorovodConfig
from hpctrain.errors import Error
from hpctrain.strategies.averaging_fragments import Fragment, Pending, divided, means_of
from hpctrain.strategies.averaging_knobs import AveragingConfig, outer_optimizer, pull_of
from hpctrain.strategies.base import (
    DistributedOptimizer,
    names_of,
    ordered,
    sparse_tables,
)
from hpctrain.strategies.buffer_averaging import average_buffers
from hpctrain.strategies.gradient_averaging import AveragedGradients, call_when_ready
from hpctrain.strategies.horovod_communicator import HorovodCommunicator
from hpctrain.strategies.state_averaging import State, mean_states, put_states
from hpctrain.world.broadcast import gather_numbers, gather_trees


class AveragingOptimizer(DistributedOptimizer):
    """Steps by a rank's own gradient; at the end of a round, parameters are the world's.

    Gradients are those of the mean loss over this rank's samples of the step: what losses were
    multiplied by (``weight``) is taken back in ``step()``, or before it by ``synchronize()``.

    Args:
        model: Whose buffers are averaged with the parameters.
        inner: The user's optimizer.
        comm: Of the world.
        config: The knobs.
        clip_norm: Largest 2-norm of a rank's own gradient, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        inner: torch.optim.Optimizer,
        comm: HorovodCommunicator,
        config: AveragingConfig,
        clip_norm: float | None = None,
    ) -> None:
        super().__init__(inner, clip_norm)
        self._model = model
        self._comm = comm
        self._config = config
        self._outer = outer_optimizer(config, comm.size)
        self._pull = pull_of(config, comm.size) if config.outer == "easgd" else 0.0
        self._all = [p for p in ordered(model, inner) if p.is_floating_point() or p.is_complex()]
        self._names = dict(zip(self._all, names_of(model, self._all), strict=True))
        self._steps = 0
        self._own = False  # whether gradients are this rank's own already
        self._fragments: list[Fragment] = []
        self._buffer_samples, self._buffer_steps = 0.0, 0  # since buffers were last averaged
        self._rounds = self._moved_bytes = 0  # since the last statistics
        self._gradients: AveragedGradients | None = None
        if config.start:
            self._gradients = self._averaged_gradients()
        else:
            self._begin_rounds()

    def _averaged_gradients(self) -> AveragedGradients:
        """Make what averages gradients before the first round."""
        this = weakref.proxy(self)
        parameters = self._all[::-1]
        gradients = AveragedGradients(
            parameters,
            names_of(self._model, parameters),
            self._comm,
            Dense(),
            HorovodConfig().bucket_bytes,
            sparse_tables(self._model),
            lambda part: this.mark(part),
        )
        call_when_ready(parameters, gradients.ready)
        return gradients

    def _begin_rounds(self) -> None:
        """Begin the rounds: from here on each rank steps by itself."""
        self._gradients = None
        count = self._config.fragments
        self._fragments = [
            Fragment(part, self._config.every * (n + 1) // count, velocity=self._outer.has_velocity)
            for n, part in enumerate(divided(self._all, count))
        ]

    # A step.

    def no_sync(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which ``backward()`` only accumulates local gradients."""
        return contextlib.nullcontext() if self._gradients is None else self._gradients.no_sync()

    @torch.no_grad()
    def synchronize(self) -> None:
        """Make the gradients those of this rank's own samples; before the first round, the world's.

        Raises:
            PeerLost: Another rank is gone.
        """
        if self._gradients is not None:
            self._gradients.synchronize()
        elif not self._own:
            self._own = True
            if self.weight not in (0.0, 1.0):
                for parameter in self._all:
                    if parameter.grad is not None:
                        parameter.grad.div_(self.weight)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, and the exchange of them."""
        self._own = False
        if self._gradients is not None:
            self._gradients.forget_average()
        super().zero_grad(set_to_none)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Clip this rank's gradient, update, and end the rounds that end with this step.

        Raises:
            PeerLost: Another rank is gone.
            Error: The parameters of a rank are no numbers at the end of a round.
        """
        result = super().step(closure)
        self._own = False
        self._steps += 1
        if self._gradients is not None:
            self._gradients.stepped()
            if self._steps >= self._config.start:
                self._begin_rounds()
            return result
        samples = float(self.weight if self.samples is None else self.samples)
        self._buffer_samples += samples
        self._buffer_steps += 1
        rates = self._rates() if self._outer.kind == "slowmo" else {}
        for fragment in self._fragments:
            fragment.count(samples, rates)
        self._end_rounds()
        self.mark("exchange")
        return result

    def _rates(self) -> dict[nn.Parameter, float]:
        return {p: float(group["lr"]) for group in self.inner.param_groups for p in group["params"]}

    # Rounds.

    @torch.no_grad()
    def _end_rounds(self) -> None:
        """Send the fragments whose round is over, and take those in that are due."""
        now = self._steps - self._config.start
        for fragment in self._fragments:  # in the same order on every rank
            if fragment.pending is not None and fragment.pending.due <= now:
                self._receive(fragment)
            if (now - fragment.offset) % self._config.every == 0:
                self._send(fragment, now + self._config.delay)
                if not self._config.delay:
                    self._receive(fragment)
        if now % self._config.every == 0:
            self._rounds += 1
            self._average_buffers()

    def _average_buffers(self) -> None:
        average_buffers(self._comm, [self._model], self._buffer_samples)
        self._buffer_samples, self._buffer_steps = 0.0, 0

    def _send(self, fragment: Fragment, due: int) -> None:
        """Begin to exchange what a round has changed; the next one begins."""
        place, weight, wires = self._fragments.index(fragment), fragment.weight, fragment.wires()
        handles = [
            self._comm.start_sum(wire, f"hpctrain.averaging.{place}.{n}")
            for n, wire in enumerate(wires)
        ]
        self._count_bytes(wires)
        fragment.pending = Pending(due, handles, wires, fragment.begin())
        if self._config.state == "mean":
            means = mean_states(self._comm, fragment.parameters, self.inner.state, weight)
            put_states(fragment.parameters, self.inner.state, means)
            self._count_bytes(
                [v for s in means for v in s.values() if isinstance(v, torch.Tensor) and v.dim()]
            )

    def _count_bytes(self, tensors: Sequence[torch.Tensor]) -> None:
        """Count what a ring all-reduce moves, of all ranks."""
        self._moved_bytes += 2 * (self._comm.size - 1) * sum(each.nbytes for each in tensors)

    def _sums(self, fragment: Fragment) -> list[torch.Tensor]:
        """Wait for what is under way, but leave it to be applied."""
        assert fragment.pending is not None
        for handle in fragment.pending.handles:
            self._comm.wait(handle)
        fragment.pending.handles.clear()
        return fragment.pending.wires

    def _receive(self, fragment: Fragment, *, mixing: float | None = None) -> None:
        """Move the anchor by the mean of all ranks, and the parameters to it."""
        assert fragment.pending is not None
        change, rates = means_of(self._sums(fragment)), fragment.pending.rates
        if not all(bool(each.isfinite().all()) for each in change):
            self._refuse(fragment)
        fragment.pending = None
        mixing = self._config.mixing if mixing is None else mixing
        own = fragment.flats.read() if mixing or self._pull else []
        if self._pull:
            own = [
                torch.lerp(mine, x, self._pull)
                for mine, x in zip(own, fragment.anchor, strict=True)
            ]
        self._outer.move(fragment.anchor, fragment.velocity, change, fragment.flats.each(rates))
        if mixing:
            own = [
                torch.lerp(x, mine, mixing) for mine, x in zip(own, fragment.anchor, strict=True)
            ]
        fragment.flats.write(own or fragment.anchor)
        fragment.alike = not own

    def _refuse(self, fragment: Fragment) -> None:
        """Raise an error, on every rank alike, that says whose parameters are no numbers."""
        good = all(bool(flat.isfinite().all()) for flat in fragment.flats.read())
        rows = gather_numbers(self._comm, [float(good)])
        bad = [str(rank) for rank, row in enumerate(rows) if not row[0]]
        whose = f"of rank {', '.join(bad)} are not" if bad else "are, but their sum is not"
        raise Error(
            f"step {self._steps}: at the end of a round the parameters {whose} finite; no other "
            "rank has taken them over.",
            hint="lower optimizer.lr, set train.clip_norm, or shorten averaging.every.",
        )

    @torch.no_grad()
    def finish(self) -> None:
        """End the rounds under way, so that all ranks have the same parameters."""
        for fragment in self._fragments:
            if fragment.pending is not None:
                self._receive(fragment)
            if fragment.steps:
                self._send(fragment, self._steps)
                self._receive(fragment, mixing=0.0)
            if not fragment.alike:
                fragment.flats.write(fragment.anchor)
                fragment.alike = True
        if self._buffer_steps:
            self._average_buffers()

    # What is saved.

    @property
    def _agreed(self) -> bool:
        """Whether all ranks have the same parameters now."""
        return all(f.alike and not f.steps for f in self._fragments)

    @torch.no_grad()
    def world_parameters(self) -> dict[nn.Parameter, torch.Tensor] | None:
        """Return the mean of the ranks' parameters, or the centre of EASGD."""
        if self._agreed:
            return None
        found: dict[nn.Parameter, torch.Tensor] = {}
        for fragment in self._fragments:
            flats = fragment.anchor
            if not self._pull:
                changes = means_of(self._summed(fragment))
                flats = [x + change for x, change in zip(flats, changes, strict=True)]
            parts = fragment.flats.split(flats)
            found |= {p: v.to(p.dtype) for p, v in zip(fragment.parameters, parts, strict=True)}
        return found

    def _summed(self, fragment: Fragment) -> list[torch.Tensor]:
        """Return the sums over ranks, for a look that changes nothing."""
        wires = fragment.wires()
        for wire in wires:
            self._comm.all_reduce(wire)
        return wires

    @torch.no_grad()
    def world_state(self) -> dict[str, Any]:
        """Return the mean of the ranks' optimizer states."""
        if not self._fragments or (self._config.state == "mean" and self._agreed):
            return self.inner.state_dict()
        means: dict[nn.Parameter, State] = {}
        for fragment in self._fragments:
            states = mean_states(self._comm, fragment.parameters, self.inner.state, fragment.weight)
            means |= dict(zip(fragment.parameters, states, strict=True))
        whole = self.inner.state_dict()
        order = [p for group in self.inner.param_groups for p in group["params"]]
        whole["state"] = {n: means[p] for n, p in enumerate(order) if means[p]}
        return whole

    @torch.no_grad()
    def strategy_state(self) -> dict[str, Any]:
        """Return anchor, velocity and place in the round; of ``state=local``, each rank's own."""
        state: dict[str, Any] = {"steps": self._steps}
        if self._fragments:
            state["rounds"] = [self._round_state(fragment) for fragment in self._fragments]
        if self._fragments and self._config.state == "local":
            state["ranks"] = gather_trees(self._comm, self._local_state())
        return state

    def _round_state(self, fragment: Fragment) -> dict[str, Any]:
        rows = gather_numbers(self._comm, [fragment.samples])
        names = [self._names[p] for p in fragment.parameters]
        pending = fragment.pending
        return {
            "steps": fragment.steps,
            "samples": [row[0] for row in rows],
            "rates": list(fragment.rates),
            "alike": fragment.alike,
            "anchor": dict(zip(names, fragment.flats.split(fragment.anchor), strict=True)),
            "velocity": dict(zip(names, fragment.flats.split(fragment.velocity), strict=True))
            if fragment.velocity
            else {},
            "pending": None
            if pending is None
            else {
                "due": pending.due,
                "wires": list(self._sums(fragment)),
                "rates": pending.rates,
            },
        }

    def _local_state(self) -> dict[str, Any]:
        parameters = {self._names[p]: p.detach() for p in self._all}
        return {
            "parameters": parameters,
            "optimizer": self.inner.state_dict(),
            "buffers": [self._buffer_samples, self._buffer_steps],
        }

    @torch.no_grad()
    def load_strategy_state(self, state: dict[str, Any]) -> None:
        """Go on in the midst of a round.

        With the states of as many ranks, each goes on from its own; else all from the mean.
        """
        self._steps = state["steps"]
        if self._steps < self._config.start:
            return
        self._begin_rounds()
        rounds, ranks = state.get("rounds", []), state.get("ranks", [])
        if not rounds:
            return
        own = self._config.state == "local" and len(ranks) == self._comm.size
        if own:
            mine = ranks[self._comm.rank]
            for parameter in self._all:
                parameter.copy_(mine["parameters"][self._names[parameter]])
            self.inner.load_state_dict(mine["optimizer"])
            self._buffer_samples, self._buffer_steps = mine["buffers"]
        velocity = {name: v for each in rounds for name, v in each["velocity"].items()}
        same = [list(each["anchor"]) for each in rounds] == [
            [self._names[p] for p in fragment.parameters] for fragment in self._fragments
        ]
        for n, fragment in enumerate(self._fragments):
            names = [self._names[p] for p in fragment.parameters]
            if fragment.velocity and velocity:
                fragment.velocity = fragment.flats.fill([velocity[name] for name in names])
            if same:
                self._load_round(fragment, rounds[n], own=own)
        if own and not same:
            self._level()

    def _load_round(self, fragment: Fragment, saved: dict[str, Any], *, own: bool) -> None:
        names = [self._names[p] for p in fragment.parameters]
        fragment.anchor = fragment.flats.fill([saved["anchor"][name] for name in names])
        fragment.steps, fragment.rates = saved["steps"], list(saved["rates"])
        if own:
            fragment.samples = saved["samples"][self._comm.rank]
            fragment.alike = saved["alike"]
        else:
            fragment.samples = sum(saved["samples"]) / self._comm.size
        if (pending := saved["pending"]) is not None:
            wires = [
                wire.to(x.device, copy=True)
                for wire, x in zip(pending["wires"], fragment.anchor, strict=True)
            ]
            fragment.pending = Pending(pending["due"], [], wires, list(pending["rates"]))

    def _level(self) -> None:
        """Begin rounds anew from the mean of the ranks, because they are divided otherwise now."""
        for fragment in self._fragments:
            flats = fragment.flats.read()
            for flat in flats:
                self._comm.all_reduce(flat.div_(self._comm.size))
            fragment.flats.write(flats)
            fragment.anchor = fragment.flats.read()

    def statistics(self) -> dict[str, Any]:
        """Return the rounds that ended since the last time, and the bytes sent for them."""
        values = {"rounds": self._rounds, "moved_bytes": self._moved_bytes}
        self._rounds = self._moved_bytes = 0
        return values if self._fragments else {}
