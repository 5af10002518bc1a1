"""Whether two experts spoil each other's answers when they are composed."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from hocket.evaluation.intervals import drop_interval

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hocket.evaluation.intervals import Interval


class Compatibility(StrEnum):
    """What is known about how much worse an expert is with a partner."""

    COMPATIBLE = "compatible"
    INCOMPATIBLE = "incompatible"
    UNCLEAR = "unclear"


@dataclass(frozen=True, slots=True)
class Change:
    """What a partner does to an expert's answers to its own questions.

    Attributes:
        expert: Whose questions they are.
        partner: Who is composed with it.
        count: Questions.
        alone: The mean score of the expert alone.
        together: That of both composed.
        drop: The interval of alone less together.
        verdict: `compatible` if all of the interval is at most the tolerance, `incompatible` if all of it is more,
            otherwise `unclear`: more questions would tell.
    """

    expert: str
    partner: str
    count: int
    alone: float
    together: float
    drop: Interval
    verdict: Compatibility


def compare(expert: str, partner: str, alone: Sequence[float], together: Sequence[float], tolerance: float) -> Change:
    """Compare the scores of an expert with those of it and a partner.

    Args:
        expert: Whose questions they are.
        partner: Who is composed with it.
        alone: Scores of the expert, one for each question; at least one.
        together: Those of both, in the same order.
        tolerance: How much lower the mean may be.
    """
    drop = drop_interval(alone, together)
    verdict = Compatibility.UNCLEAR
    if drop.high <= tolerance:
        verdict = Compatibility.COMPATIBLE
    elif drop.low > tolerance:
        verdict = Compatibility.INCOMPATIBLE
    count = len(alone)
    return Change(expert, partner, count, sum(alone) / count, sum(together) / count, drop, verdict)
