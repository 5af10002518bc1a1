"""The weighted sum, and nothing else.

Outputs are summed in float64, in plan order - by (digest, ordinal) - whatever order they arrived in, so the final
bits depend on the plan and the answers alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

_BOUND_SLACK: Final = 1e-12
"""Widening of the bounds, relative to their size: far above the rounding of a float64 sum, far below FP32."""


@dataclass(frozen=True, slots=True)
class Share:
    """The part of the answer one expert is planned for.

    Args:
        rows: Rows of the answer, ascending, int64 `[n]`; `slice(None)` for all of them.
        weights: Planned weight in each of them, float64 `[n]`.
        columns: For each column of the expert's output, the column of the answer it adds to, or -1; int64 `[C]`.
            `slice(None)` when the output is the whole answer, column by column.
    """

    rows: NDArray[np.int64] | slice
    weights: NDArray[np.float64]
    columns: NDArray[np.int64] | slice

    def add(self, total: NDArray[np.float64], output: NDArray[np.float32]) -> None:
        """Add the weighted output, float32 `[n, C]`, to float64 `[N, columns]`."""
        columns = self.columns
        if not isinstance(columns, slice):
            kept = columns >= 0
            columns, output = columns[kept], output[:, kept]
        weighted = self.weights[:, None] * output
        if isinstance(self.rows, slice) or isinstance(columns, slice):
            total[self.rows, columns] += weighted
        else:
            total[self.rows[:, None], columns] += weighted


@dataclass(frozen=True, slots=True)
class Combined:
    """A weighted mean over the experts present.

    Args:
        value: float32 `[N, C]`; 0 in rows nobody has answered.
        coverage: float64 `[N]`: planned weight that is present, as a share of all planned weight of the row.
        weights: For each share its weights as they are in the value, float64 `[n]`: renormalised over the experts
            present, 0 for the missing.
        lower: float32 `[N, C]` that no completion ends below, when the output range is known.
        upper: float32 `[N, C]` that no completion ends above.
    """

    value: NDArray[np.float32]
    coverage: NDArray[np.float64]
    weights: list[NDArray[np.float64]]
    lower: NDArray[np.float32] | None
    upper: NDArray[np.float32] | None


def combine(
    shares: Sequence[Share],
    outputs: Sequence[NDArray[np.float32] | None],
    shape: tuple[int, int],
    output_range: tuple[float, float] | None,
) -> Combined:
    """The weighted mean of the outputs present.

    `y = sum_e w_e y_e / sum_e w_e` per row, over the experts e whose output is present. With a known output range
    `[a, b]`, coverage c and S the sum over all planned weight, every completion of the row lies in
    `[S + (1 - c) a, S + (1 - c) b]`, also one that leaves experts out and renormalises: S / c - S is
    `(1 - c) S / c`, and S / c lies in `[a, b]`.

    Args:
        shares: Every planned expert, in plan order.
        outputs: Beside each share its output, float32 `[n, C]`, or None while it is missing.
        shape: Rows and columns of the answer.
        output_range: Range of every value, scattered zeros included.
    """
    total = np.zeros(shape)
    present = np.zeros(shape[0])
    planned = np.zeros(shape[0])
    for share, output in zip(shares, outputs, strict=True):
        planned[share.rows] += share.weights
        if output is None:
            continue
        present[share.rows] += share.weights
        share.add(total, output)
    coverage = np.divide(present, planned, out=np.zeros_like(present), where=planned > 0)
    value = np.divide(total, present[:, None], out=np.zeros(shape), where=present[:, None] > 0).astype(np.float32)
    weights = [
        share.weights / present[share.rows] if output is not None else np.zeros(len(share.weights))
        for share, output in zip(shares, outputs, strict=True)
    ]
    if output_range is None:
        return Combined(value, coverage, weights, None, None)
    share_of_all = total / np.where(planned > 0, planned, 1.0)[:, None]
    missing = (1.0 - coverage)[:, None]
    lower, upper = (share_of_all + missing * bound for bound in output_range)
    slack = _BOUND_SLACK * max(1.0, *map(abs, output_range))
    return Combined(value, coverage, weights, _floor(lower - slack), _ceiling(upper + slack))


def _floor(values: NDArray[np.float64]) -> NDArray[np.float32]:
    rounded = values.astype(np.float32)
    return np.where(rounded > values, np.nextafter(rounded, np.float32(-np.inf)), rounded)


def _ceiling(values: NDArray[np.float64]) -> NDArray[np.float32]:
    rounded = values.astype(np.float32)
    return np.where(rounded < values, np.nextafter(rounded, np.float32(np.inf)), rounded)
