"""Top-k, capacity, renormalisation: from a weight per member to a weight per chosen expert.

A model is a tree of gates, one level deep for most. Weights of nested levels multiply unnormalised, and each row is
normalised once, at the end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from hocket.errors import HocketError, Reason

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from services.router.gating import Gate


@dataclass(frozen=True, slots=True)
class Level:
    """One gate and its members.

    Args:
        gate: Input to a weight per member.
        members: A leaf, by its place in the model's list of experts, or another level.
        top_k: Members that answer per row.
        capacity_factor: Head-room before load moves down the ranking; None: it never does.

    Attributes:
        leaves: The members as an array, intp `[E]`, where none of them is a level.
    """

    gate: Gate
    members: tuple[int | Level, ...]
    top_k: int
    capacity_factor: float | None = None
    leaves: NDArray[np.intp] | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        flat = all(isinstance(member, int) for member in self.members)
        object.__setattr__(self, "leaves", np.array(self.members, dtype=np.intp) if flat else None)


@dataclass(frozen=True, slots=True)
class Load:
    """How busy the experts of a model are, for levels with a capacity factor.

    Args:
        in_flight: Requests that run on a leaf now.
        in_flight_max: Requests for the model that the router may run: the L of capacity factors.
    """

    in_flight: Callable[[int], int]
    in_flight_max: int


@dataclass(frozen=True, slots=True)
class Selection:
    """Which experts answer which rows.

    Args:
        weights: float64 `[N, leaves]`: 0 where an expert is not chosen; each row sums to 1.
        overflowed: Leaves that the gate preferred, but that were full.
    """

    weights: NDArray[np.float64]
    overflowed: set[int] = field(default_factory=set)


def select(level: Level, rows: NDArray[np.float32], leaf_count: int, load: Load, top_k: int | None = None) -> Selection:
    """Choose the best members for each row, level by level.

    Args:
        level: The model's top level.
        rows: float32 `[N, F]`.
        leaf_count: Experts of the model.
        load: For levels with a capacity factor.
        top_k: Members of the top level that answer, in place of its own number.

    Raises:
        HocketError: `CAPACITY` if every member of a capacity-limited level is full.
    """
    weights = np.zeros((len(rows), leaf_count))
    chosen = np.zeros((len(rows), leaf_count), dtype=bool)
    overflowed: set[int] = set()

    def descend(level: Level, at: NDArray[np.intp], factor: NDArray[np.float64], top_k: int) -> None:
        member_weights = level.gate.weigh(rows[at])
        ranking, full = _rank(level, member_weights, top_k, load)
        overflowed.update(full)
        if level.leaves is not None:
            place = at[:, None], level.leaves[ranking]
            weights[place] += factor[:, None] * member_weights[np.arange(len(at))[:, None], ranking]
            chosen[place] = True
            return
        for member in np.unique(ranking):
            here = (ranking == member).any(axis=1)
            passed_on = factor[here] * member_weights[here, member]
            below = level.members[member]
            if isinstance(below, Level):
                descend(below, at[here], passed_on, below.top_k)
            else:
                weights[at[here], below] += passed_on
                chosen[at[here], below] = True

    descend(level, np.arange(len(rows)), np.ones(len(rows)), top_k or level.top_k)
    sums = weights.sum(axis=1, keepdims=True)
    if not sums.all():  # every chosen weight of a row has underflowed: they count alike
        weights = np.where(sums > 0, weights, chosen)
        sums = weights.sum(axis=1, keepdims=True)
    return Selection(weights / sums, overflowed)


def _rank(level: Level, weights: NDArray[np.float64], top_k: int, load: Load) -> tuple[NDArray[np.intp], set[int]]:
    """The chosen members of each row, `[n, k]`, best first, and the leaves passed over because they are full.

    The sort is stable: equal weights keep the earlier member first.
    """
    ranking = np.argsort(-weights, axis=1, kind="stable")[:, :top_k]
    if level.capacity_factor is None:
        return ranking, set()
    count = len(level.members)
    limit = math.ceil(level.capacity_factor * top_k * load.in_flight_max / count)
    full = np.array([isinstance(leaf, int) and load.in_flight(leaf) >= limit for leaf in level.members])
    if not full[ranking].any():
        return ranking, set()
    if full.all():
        raise HocketError(
            Reason.CAPACITY,
            f"each of the {count} experts already runs {limit} requests",
            retry_after_seconds=0.1,
        )
    passed_over = {
        leaf for place in np.unique(ranking) if full[place] and isinstance(leaf := level.members[place], int)
    }
    open_first = np.argsort(np.where(full, 1.0, -weights), axis=1, kind="stable")
    return open_first[:, : min(top_k, count - int(full.sum()))], passed_over


def scores(level: Level, rows: NDArray[np.float32], leaf_count: int) -> NDArray[np.float64]:
    """The gate's whole opinion: float64 `[N, leaves]`, each row summing to 1, before any selection."""
    total = np.zeros((len(rows), leaf_count))

    def descend(level: Level, factor: NDArray[np.float64]) -> None:
        weights = level.gate.weigh(rows)
        for place, below in enumerate(level.members):
            passed_on = factor * weights[:, place]
            if isinstance(below, Level):
                descend(below, passed_on)
            else:
                total[:, below] += passed_on

    descend(level, np.ones(len(rows)))
    total /= total.sum(axis=1, keepdims=True)
    return total
