"""Experts that compare a row with stored ones: clusters, and nearest neighbours.

The reference adds the terms of a distance in float32 from left to right, and of equal distances the one stored first is
nearer. Here float64 distances decide wherever float32 rounding cannot change the outcome; only what is closer together
than that goes through the float32 arithmetic, in its order. So the choice is the reference's exactly, on any device; of
a Minkowski distance as far as its C library rounds powers to the nearest float32, as glibc's nearly always does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from hocket.packages.model import Metric
from services.expert_worker.compute import row_sums, rows_at_once, running_sum

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

_FLOAT32_MAX: Final = float(np.finfo(np.float32).max)
_HERE: Final = np.float32(1e-10)
"""A neighbour nearer than that counts as one at distance 1 (aprender 0.11.0)."""
_POWER_COST: Final = 16
"""What a power takes, in products."""


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """Rows to compare with.

    Args:
        rows: float64 `[m, F]`, float32 values.
        squares: float64 `[m]`, the squared length of each; None unless the metric is Euclidean.
        metric: What is near.
        p: Of a Minkowski distance.
    """

    rows: Tensor
    squares: Tensor | None
    metric: Metric = Metric.EUCLIDEAN
    p: float = 2.0

    @property
    def work_per_row(self) -> int:
        """One product per feature and sample."""
        return self.rows.numel() * (_POWER_COST if self.metric is Metric.MINKOWSKI else 1)

    def sums(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The sums under the root of each distance, and how far the reference's may be from them.

        n float32 roundings are within n * 2**-24, relative to the sum, and terms below the smallest number within
        2**-150 each; the expansion |x|**2 + |c|**2 - 2 x . c loses up to n * 2**-53 of the lengths. Every term twice
        over, for second orders. A power multiplies the rounding of what it is taken of, and its root makes one number
        of sums that are that much closer together.

        Args:
            rows: float32 `[n, F]`.

        Returns:
            float64 `[n, m]`, twice.
        """
        width = rows.shape[1]
        exact = rows.to(torch.float64)
        if self.squares is not None:
            lengths = (exact * exact).sum(-1, keepdim=True) + self.squares
            sums = torch.addmm(lengths, exact, self.rows.T, alpha=-2).clamp_(min=0)
            return sums, sums * ((width + 8) * 2.0**-23) + lengths * ((width + 4) * 2.0**-51) + width * 2.0**-148
        if self.metric is Metric.MANHATTAN:
            sums = torch.cdist(exact, self.rows, p=1.0)
            return sums, sums * ((width + 8) * 2.0**-23) + width * 2.0**-148
        sums = torch.cdist(exact, self.rows, p=self.p).pow_(self.p)
        least = width * 2.0**-146 + (2.0**-120) ** self.p  # a root below 1 takes more sums for 0
        return sums, sums * ((width + 8 + 8 * self.p) * 2.0**-23) + least

    def possible(self, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The sums, and which samples may be among the `count` nearest: float64 and bool `[n, m]`."""
        sums, slack = self.sums(rows)
        highest = sums + slack
        least = highest.amin(1, keepdim=True) if count == 1 else highest.kthvalue(count, 1, keepdim=True).values
        # Beyond float32 the reference's distance is infinite, and infinities tie.
        infinite = _FLOAT32_MAX ** min(self.p, 1) if self.metric is Metric.MINKOWSKI else _FLOAT32_MAX
        return sums, ((sums - slack) <= least) | (least >= infinite / 2)

    def nearest(self, rows: Tensor, possible: Tensor, count: int, *, rooted: bool) -> tuple[Tensor, Tensor]:
        """The reference's choice among the possible samples of each row, and their distances, the nearest first.

        Args:
            rows: float32 `[n, F]`.
            possible: bool `[n, m]`, at least `count` in each row.
            count: How many to choose.
            rooted: Whether sums are compared, or their roots, which makes more of them equal.

        Returns:
            int64 and float32 `[n, count]`, on the host.
        """
        row, sample = possible.nonzero(as_tuple=True)
        size = rows_at_once(rows.shape[1])
        parts = zip(torch.split(row, size), torch.split(sample, size), strict=True)
        found = [self._reference(rows[some], self.rows[others], rooted=rooted) for some, others in parts]
        row_of, sample_of, distances = row.cpu().numpy(), sample.cpu().numpy(), np.concatenate(found)
        order = np.lexsort((sample_of, distances, row_of))
        _, first = np.unique(row_of[order], return_index=True)
        chosen = order[first[:, None] + np.arange(count)]
        return torch.from_numpy(sample_of[chosen]), torch.from_numpy(distances[chosen])

    def _reference(self, rows: Tensor, samples: Tensor, *, rooted: bool) -> NDArray[np.float32]:
        """float32 `[n]`: the distance of each pair in the reference's arithmetic."""
        difference = (rows - samples.to(torch.float32)).abs().cpu().numpy()
        with np.errstate(over="ignore", under="ignore"):
            match self.metric:
                case Metric.EUCLIDEAN:
                    sums = running_sum(difference * difference)
                    return np.sqrt(sums) if rooted else sums
                case Metric.MANHATTAN:
                    return running_sum(difference)
                case Metric.MINKOWSKI:
                    sums = running_sum(_power(difference, np.float32(self.p)))
                    return _power(sums, np.float32(1) / np.float32(self.p))


@dataclass(frozen=True, slots=True, eq=False)
class Nearest:
    """One-hot of the nearest centroid, the lowest at ties.

    Args:
        centroids: K of them.
    """

    centroids: Samples

    @property
    def work_per_row(self) -> int:
        """That of the distances."""
        return self.centroids.work_per_row

    def __call__(self, rows: Tensor) -> Tensor:
        """float32 `[n, K]`."""
        columns = len(self.centroids.rows)
        nearest = torch.cat([self._nearest(part) for part in torch.split(rows, rows_at_once(columns))])
        answer = torch.zeros((len(rows), columns), dtype=torch.float32, device=rows.device)
        return answer.scatter_(1, nearest, 1.0)

    def _nearest(self, rows: Tensor) -> Tensor:
        """int64 `[n, 1]`."""
        sums, possible = self.centroids.possible(rows, 1)
        nearest = sums.argmin(dim=1, keepdim=True)
        unsure = (possible.sum(dim=1) > 1).nonzero().squeeze(1)
        if len(unsure):
            chosen, _ = self.centroids.nearest(rows[unsure], possible[unsure], 1, rooted=False)
            nearest[unsure] = chosen.to(rows.device)
        return nearest


@dataclass(frozen=True, slots=True, eq=False)
class Neighbours:
    """The `k` nearest training rows vote: p(column) = its votes / all votes.

    Args:
        samples: m training rows.
        classes: int32 `[m]`, the column each votes for.
        k: How many vote, m at most.
        weighted: Whether a vote counts 1 / distance, in float32.
        columns: Output columns, C.
    """

    samples: Samples
    classes: Tensor
    k: int
    weighted: bool
    columns: int

    @property
    def work_per_row(self) -> int:
        """That of the distances."""
        return self.samples.work_per_row

    def __call__(self, rows: Tensor) -> Tensor:
        """float32 `[n, C]`."""
        size = rows_at_once(max(len(self.classes), self.columns))
        return torch.cat([self._votes(part) for part in torch.split(rows, size)])

    def _votes(self, rows: Tensor) -> Tensor:
        _, possible = self.samples.possible(rows, self.k)
        voters = torch.empty((len(rows), self.k), dtype=torch.int64, device=rows.device)
        votes = torch.ones((len(rows), self.k), dtype=torch.float64, device=rows.device)
        unsure = possible.sum(dim=1) > self.k
        if self.weighted:  # every distance counts
            unsure = torch.ones_like(unsure)
        voters[~unsure] = possible[~unsure].nonzero()[:, 1].view(-1, self.k)
        if unsure.any():
            chosen, distances = self.samples.nearest(rows[unsure], possible[unsure], self.k, rooted=True)
            voters[unsure] = chosen.to(rows.device)
            if self.weighted:
                votes = _weights(distances.numpy()).to(rows.device)
        counts = torch.zeros((len(rows), self.columns), dtype=torch.float64, device=rows.device)
        counts.scatter_add_(1, self.classes[voters].to(torch.int64), votes)
        return counts.div_(row_sums(votes)).to(torch.float32)


def _power(values: NDArray[np.float32], exponent: np.float32) -> NDArray[np.float32]:
    """`powf`, rounded to the nearest: on some processors numpy's own is some units in the last place off."""
    return (values.astype(np.float64) ** np.float64(exponent)).astype(np.float32)


def _weights(distances: NDArray[np.float32]) -> Tensor:
    """float64 `[n, k]`: what the vote of a neighbour at each distance counts; at infinity they count alike."""
    here = distances < _HERE
    weights = np.where(here, np.float32(1), np.float32(1) / np.where(here, np.float32(1), distances))
    weights[~weights.any(axis=1)] = 1
    return torch.from_numpy(weights.astype(np.float64))
