"""How far a measured score can be trusted: intervals of 95 %."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

_Z: Final = 1.959963984540054
"""Of the normal distribution: 95 % lie within."""


class Interval(NamedTuple):
    """Where the true value is in 95 of 100 cases.

    Attributes:
        low: Its lower end.
        high: Its upper end.
    """

    low: float
    high: float


def wilson_interval(right: float, count: int) -> Interval:
    """The interval of a share (E. B. Wilson, 1927; no continuity correction).

    Args:
        right: The sum of the scores, each 0 to 1. For scores between (F1) the interval is wider than it need be, since
            nothing between 0 and 1 varies more than what is either.
        count: Of how many; without any, nothing is known.

    Returns:
        Within 0 and 1.
    """
    if count == 0:
        return Interval(0.0, 1.0)
    share, z2 = right / count, _Z * _Z / count
    middle = (share + z2 / 2) / (1 + z2)
    half = _Z * math.sqrt(max(share * (1 - share), 0.0) / count + z2 / count / 4) / (1 + z2)
    return Interval(max(middle - half, 0.0), min(middle + half, 1.0))


def drop_interval(before: Sequence[float], after: Sequence[float]) -> Interval:
    """The interval of how much lower the mean of scores is, on the same questions.

    The adjusted interval for matched pairs (A. Agresti, Y. Min, "Simple improved confidence intervals for comparing
    matched proportions", 2005): four half pairs are added, one of a drop, one of a rise and two of neither, so that
    few questions without a change are no proof.

    Args:
        before: Scores of 0 to 1, one for each question.
        after: Those of the other, in the same order.

    Returns:
        Within -1 and 1; above 0 is a drop.
    """
    drops = [one - other for one, other in zip(before, after, strict=True)]
    count = len(drops) + 2
    mean = math.fsum(drops) / count
    variance = (math.fsum(drop * drop for drop in drops) + 1) / count - mean * mean
    half = _Z * math.sqrt(max(variance, 0.0) / count)
    return Interval(max(mean - half, -1.0), min(mean + half, 1.0))
