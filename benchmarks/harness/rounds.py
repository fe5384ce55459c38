"""Cases that take turns, round after round, and a record of what a case's rounds gave.

Whatever else a machine does while a benchmark runs then falls on all cases alike, so that ratios
within a round can be compared where times cannot.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

Round = dict[str, Any]
"""What a case gave in a round: measures; or why it ``failed``."""
Record = dict[str, Any]
K = TypeVar("K")
R = TypeVar("R")


def in_turn(
    cases: Mapping[K, Callable[[], R]],
    rounds: int,
    *,
    warm_up: int = 0,
    turn_back: bool = False,
    tell: Callable[[int, K, R], None] = lambda number, case, result: None,
) -> dict[K, list[R]]:
    """Run all cases one after the other, as many times as there are rounds.

    Args:
        cases: What runs a case once, by its name.
        rounds: How many count.
        warm_up: Rounds before these, which do not.
        turn_back: Whether every other round goes from the last case to the first, so that none
            always comes after the same one.
        tell: Called after each run that counts: the round from 0 on, the case, and its result.

    Returns:
        The results of each case, in the order of rounds.
    """
    results: dict[K, list[R]] = {name: [] for name in cases}
    for number in range(-warm_up, rounds):
        order = list(cases)[:: -1 if turn_back and number % 2 else 1]
        for name in order:
            result = cases[name]()
            if number >= 0:
                results[name].append(result)
                tell(number, name, result)
    return results


def spread_of(key: str, values: Sequence[float]) -> dict[str, float]:
    """Return a measure of several rounds: the median, the least and the largest; {} of none."""
    if not values:
        return {}
    ends = min(values), max(values)
    return {key: statistics.median(values), f"{key}_min": ends[0], f"{key}_max": ends[1]}


def compared(
    rounds: Sequence[Round],
    base: Sequence[Round],
    name: str,
    ratio: Callable[[Round, Round], float],
) -> list[Round]:
    """Add to each round of a case its ratio to another case's run of the same round.

    Args:
        rounds: Of the case.
        base: Of the other one.
        name: The key of the ratio.
        ratio: Computes it from the two; asked only where neither failed.
    """
    return [
        each if "failed" in each or "failed" in other else {**each, name: ratio(each, other)}
        for each, other in zip(rounds, base, strict=True)
    ]


def record_of(variables: Record, rounds: Sequence[Round], *, lists: Collection[str] = ()) -> Record:
    """Return the record of a case, over all of its rounds that did not fail.

    It begins with the independent variables and the number of rounds. A number becomes its median,
    least and largest; what is true or false is true if it always was; ``failed`` has the reasons
    of the rounds that failed.

    Args:
        variables: What sets the case apart from others.
        rounds: What it gave.
        lists: Keys whose values are kept as they are, in a list.
    """
    good = [each for each in rounds if "failed" not in each]
    record = {**variables, "rounds": len(good)}
    for key in dict.fromkeys(key for each in good for key in each):
        values = [each[key] for each in good if key in each]
        if key in lists:
            record[key] = values
        elif isinstance(values[0], bool):
            record[key] = all(values)
        elif isinstance(values[0], int | float):
            record |= spread_of(key, values)
    failures = [each["failed"] for each in rounds if "failed" in each]
    return {**record, "failed": failures} if failures else record


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the lower quartile, the median and the upper one; of one value, that."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high
