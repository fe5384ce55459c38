"""In which order a rank of a pipeline computes its micro-batches.

Stage s is on rank s modulo the number of ranks, as its chunk s // ranks. Messages are sent without
waiting for who receives them, so an order in which each thing is computed after what it needs never
stops.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Schedule = Literal["gpipe", "1f1b", "interleaved"]


class Action(NamedTuple):
    """A pass of one micro-batch through one chunk of a rank.

    Attributes:
        forward: Or backward.
        chunk: Which of the rank's.
        microbatch: Which one.
    """

    forward: bool
    chunk: int
    microbatch: int


def order(
    schedule: Schedule, rank: int, ranks: int, microbatches: int, chunks: int = 1
) -> list[Action]:
    """Return what a rank computes, in order.

    ``gpipe`` (Huang et al., arXiv:1811.06965) computes all forward passes first. ``1f1b``
    (Narayanan et al., arXiv:2104.04473, like the next) begins with backward passes as soon as it
    can, so that stage i keeps activations of ``ranks - i`` micro-batches only. ``interleaved``
    does so with several chunks a rank, which makes pauses at begin and end shorter by that factor.

    Args:
        schedule: Which one.
        rank: Of the pipeline's ranks.
        ranks: How many.
        microbatches: How many. ``interleaved`` needs a multiple of ``ranks``, and is ``gpipe``
            for other numbers.
        chunks: Of each rank; 1 with ``1f1b``.

    Example:
        >>> ["FB"[not a.forward] + str(a.microbatch) for a in order("1f1b", 0, 2, 3)]
        ['F0', 'F1', 'B0', 'F2', 'B1', 'B2']
    """
    if schedule == "gpipe" or (microbatches % ranks and schedule == "interleaved"):
        pairs = [(chunk, number) for chunk in range(chunks) for number in range(microbatches)]
        back = [(chunks - 1 - chunk, number) for chunk, number in pairs]
        return [Action(True, *pair) for pair in pairs] + [Action(False, *pair) for pair in back]
    total = microbatches * chunks
    block = ranks * chunks

    def forward(n: int) -> Action:
        return Action(True, n % block // ranks, n // block * ranks + n % ranks)

    def backward(n: int) -> Action:
        return Action(False, chunks - 1 - n % block // ranks, n // block * ranks + n % ranks)

    if schedule == "1f1b":
        ahead = ranks - 1 - rank
    else:
        ahead = 2 * (ranks - 1 - rank) + (chunks - 1) * ranks
    ahead = min(ahead, total)
    actions = [forward(n) for n in range(ahead)]
    for n in range(total - ahead):
        actions += [forward(ahead + n), backward(n)]
    return actions + [backward(n) for n in range(total - ahead, total)]
