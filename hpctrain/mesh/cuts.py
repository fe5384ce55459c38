"""A sequence of layers cut into stages of nearly equal cost."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from hpctrain.errors import Error


def balanced(costs: Sequence[float], stages: int) -> list[range]:
    """Cut layers into contiguous stages whose costliest is as cheap as can be.

    By dynamic programming over the place of the last cut, in O(stages n^2). Of equally good
    divisions it is the one whose sum of squares is least, so that the other stages are even, too.

    Args:
        costs: Of each layer, in order.
        stages: How many; each gets one layer at least.

    Returns:
        The layers of each stage.

    Raises:
        Error: There are more stages than layers.

    Example:
        >>> balanced([5, 1, 1, 1, 1, 1], 2)
        [range(0, 1), range(1, 6)]
    """
    n = len(costs)
    if stages > n:
        raise Error(
            f"{n} layers cannot be cut into {stages} stages.",
            hint="choose fewer stages (mesh.pp, mesh.virtual), or give stages() more parts.",
        )
    sums = [0.0, *itertools.accumulate(costs)]
    # By number of layers: the costliest stage, the sum of squares, and where the last one begins.
    best: list[tuple[float, float, int]] = [(sums[k], sums[k] ** 2, 0) for k in range(n + 1)]
    tables = [best]
    for stage in range(2, stages + 1):
        before, best = best, [(float("inf"), float("inf"), 0)] * (n + 1)
        for end in range(stage, n + 1):
            best[end] = min(
                (max(most, last := sums[end] - sums[start]), squares + last**2, start)
                for start in range(stage - 1, end)
                for most, squares, _ in (before[start],)
            )
        tables.append(best)
    cuts, end = [], n
    for table in reversed(tables):
        start = table[end][2]
        cuts.append(range(start, end))
        end = start
    return cuts[::-1]
