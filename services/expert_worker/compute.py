"""The arithmetic of experts: parameters on a device, rows in, answers out.

Linear models and trees are here, `neighbours.py` has what compares rows with stored ones, `families.py` the rest.

A kernel takes float32 `[n, F]` on its device and answers float32 `[n, C]`. Rows are independent: on a CPU a row has
the same answer, bit for bit, whatever rows share its pass; on CUDA the float64 sums of linear kernels and naive Bayes
may add in another order, which moves an answer by at most F * 2**-53 * sum |x_i w_i| before it is rounded to float32.
Trees, votes, clusters, neighbours, margins and the layers of networks are exact everywhere.

Sources of the formulas: the `.apr` reference (`docs/packages.md`), whose float32 answers linear kernels meet within
1e-6 * max(1, |bias| + sum |x_i w_i|), and trees, votes, clusters, neighbours and margins exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

_WORKSPACE_VALUES: Final = 2**20
"""Intermediate values of one step: passes over more are done in parts."""

_WIDE: Final = 2**15
"""Width from which torch may split the sum of a single row between threads (its grain size)."""


class Kernel(Protocol):
    """One expert, ready to run."""

    @property
    def work_per_row(self) -> int:
        """Elementary operations that one row takes, roughly."""

    def __call__(self, rows: Tensor) -> Tensor:
        """Answer rows: float32 `[n, F]`, contiguous on the kernel's device, to float32 `[n, C]`."""


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """y = x . weights + bias: products in float32, their sum in float64.

    Args:
        weights: float32 or float16 `[F]`; or `[n, F]`, the weights of each row.
        bias: float64 `[1]`, the intercept; or `[n, 1]`.
    """

    weights: Tensor
    bias: Tensor

    @property
    def work_per_row(self) -> int:
        """One product per feature."""
        return self.weights.shape[-1]

    def __call__(self, rows: Tensor) -> Tensor:
        """float32 `[n, 1]`."""
        return row_sums(rows * self.weights).add_(self.bias).to(torch.float32)


@dataclass(frozen=True, slots=True, eq=False)
class Logistic:
    """p = 1 / (1 + exp(-(x . weights + bias))), the sum and the sigmoid in float64.

    Args:
        weights: float32 or float16 `[F]`; or `[n, F]`, the weights of each row.
        bias: float64 `[1]`, the intercept; or `[n, 1]`.
    """

    weights: Tensor
    bias: Tensor

    @property
    def work_per_row(self) -> int:
        """One product per feature."""
        return self.weights.shape[-1]

    def __call__(self, rows: Tensor) -> Tensor:
        """float32 `[n, 2]`: 1 - p, p."""
        margins = row_sums(rows * self.weights).add_(self.bias)
        # torch.sigmoid rounds differently at the end of its input than inside it; these three do not.
        p = margins.neg_().exp_().add_(1).reciprocal_()
        return torch.cat((1 - p, p), dim=1).to(torch.float32)


def stack(kernels: Sequence[Linear] | Sequence[Logistic], counts: Sequence[int]) -> Kernel:
    """One kernel for rows of several: `counts[i]` rows of `kernels[i]`, one after the other.

    A mixture asks several small experts at once; together they cost little more than one of them.
    """
    weights = torch.stack([kernel.weights for kernel in kernels])
    bias = torch.stack([kernel.bias for kernel in kernels])
    if (total := sum(counts)) > len(kernels):
        repeats = torch.tensor(counts).to(weights.device, non_blocking=True)
        weights = weights.repeat_interleave(repeats, dim=0, output_size=total)
        bias = bias.repeat_interleave(repeats, dim=0, output_size=total)
    return type(kernels[0])(weights, bias)


@dataclass(frozen=True, slots=True, eq=False)
class Trees:
    """The nodes of all trees of a model in one table, so that one step moves every row in every tree.

    A leaf is its own child on both sides.

    Args:
        roots: int32 `[T]`, the first node of each tree.
        feature: int32 `[nodes]`, the column a node compares.
        threshold: float32 `[nodes]`.
        children: int32 `[2 * nodes]`, per node its right, then its left child.
        depth: Steps that take every row to a leaf.
    """

    roots: Tensor
    feature: Tensor
    threshold: Tensor
    children: Tensor
    depth: int

    @property
    def work_per_row(self) -> int:
        """One comparison per level of each tree."""
        return len(self.roots) * (self.depth + 1)

    @property
    def rows_at_once(self) -> int:
        """Rows to take through the trees in one go."""
        return rows_at_once(len(self.roots))

    def leaves(self, rows: Tensor) -> Tensor:
        """The leaf each row reaches in each tree: int32 `[n, T]`, indices of nodes."""
        count, width = rows.shape
        values = rows.reshape(-1)
        start = torch.arange(count, dtype=torch.int32, device=rows.device).mul_(width)
        start = start.repeat_interleave(len(self.roots))
        node = self.roots.repeat(count)
        for _ in range(self.depth):
            seen = values.index_select(0, self.feature.index_select(0, node).add_(start))
            left = seen <= self.threshold.index_select(0, node)
            node = self.children.index_select(0, node.mul_(2).add_(left))
        return node.view(count, -1)


@dataclass(frozen=True, slots=True, eq=False)
class Votes:
    """Each tree votes for a column: p(column) = votes / trees. A single tree answers one-hot.

    Args:
        trees: The voters.
        column: int64 `[nodes]`, the column a leaf votes for.
        columns: Output columns, C.
    """

    trees: Trees
    column: Tensor
    columns: int

    @property
    def work_per_row(self) -> int:
        """That of the trees."""
        return self.trees.work_per_row

    def __call__(self, rows: Tensor) -> Tensor:
        """float32 `[n, C]`."""
        voters = len(self.trees.roots)
        votes = torch.zeros((len(rows), self.columns), dtype=torch.float32, device=rows.device)
        one = torch.ones((1, 1), dtype=torch.float32, device=rows.device)
        for part, counts in zip(*(torch.split(whole, self.trees.rows_at_once) for whole in (rows, votes)), strict=True):
            chosen = self.column[self.trees.leaves(part)]
            counts.scatter_add_(1, chosen, one.expand(chosen.shape))
        return votes.div_(voters)


@dataclass(frozen=True, slots=True, eq=False)
class Mean:
    """The mean of the trees' values: a float32 running sum in file order, divided by their number.

    Args:
        trees: The trees.
        value: float32 `[nodes]`, what a leaf answers.
    """

    trees: Trees
    value: Tensor

    @property
    def work_per_row(self) -> int:
        """That of the trees."""
        return self.trees.work_per_row

    def __call__(self, rows: Tensor) -> Tensor:
        """float32 `[n, 1]`."""
        voters = len(self.trees.roots)
        sums = [
            running_sum(self.value[self.trees.leaves(part)].cpu().numpy())
            for part in torch.split(rows, self.trees.rows_at_once)
        ]
        return torch.from_numpy(np.concatenate(sums) / np.float32(voters)).unsqueeze(1)


def rows_at_once(values_per_row: int) -> int:
    """Rows to compute in one go, when each takes so many intermediate values."""
    return max(1, _WORKSPACE_VALUES // max(1, values_per_row))


def row_sums(products: Tensor) -> Tensor:
    """float64 `[n, 1]`: the sum of each row of `[n, F]`, in an order that only F decides (on a CPU)."""
    count, width = products.shape
    if count == 1 and width >= _WIDE:
        # torch shares out several sums between threads, but cuts a single one in pieces.
        return products.repeat(2, 1).sum(-1, keepdim=True, dtype=torch.float64)[:1]
    return products.sum(-1, keepdim=True, dtype=torch.float64)


def running_sum(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """float32 `[n]`: each row of `[n, F]` added from left to right in float32, as the reference does.

    `accumulate` is the one sum of numpy and torch that promises this order.
    """
    with np.errstate(over="ignore"):
        return np.add.accumulate(values, axis=1, dtype=np.float32)[:, -1]
