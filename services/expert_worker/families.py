"""Naive Bayes, margins, boosting and dense networks. `compute.py` says what a kernel is, and what it promises.

What decides is exact or nearly so: classes of a margin fall as in the reference, which adds in float32 from left to
right, and the sums of a network's layers are rounded once. So here, too, a row answers the same in any company.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from hocket.packages.model import Activation
from services.expert_worker.compute import row_sums, rows_at_once, running_sum

if TYPE_CHECKING:
    from torch import Tensor

    from services.expert_worker.compute import Trees

_FLOAT32_MAX: Final = float(np.finfo(np.float32).max)
_FLOAT64_BITS: Final = 53
_PAIRS_SHARE: Final = 64
"""If one sum of so many is unsure, adding up its terms takes about as long as exact products of all."""


@dataclass(frozen=True, slots=True, eq=False)
class NaiveBayes:
    """p(c) ~ exp(constants[c] - sum_i (x_i - means[c, i])**2 * precisions[c, i]), in float64.

    Args:
        means: float64 `[C, F]`.
        precisions: float64 `[C, F]`, 1 / (2 * variance).
        constants: float64 `[C]`, ln(prior) - sum_i ln(2 pi variance_i) / 2; minus infinity for a class that never is.
    """

    means: Tensor
    precisions: Tensor
    constants: Tensor

    @property
    def work_per_row(self) -> int:
        """Two products per feature and class."""
        return 2 * self.means.numel()

    def __call__(self, rows: Tensor) -> Tensor:
        """float32 `[n, C]`."""
        size = rows_at_once(self.means.numel())
        return torch.cat([self._answer(part) for part in torch.split(rows, size)])

    def _answer(self, rows: Tensor) -> Tensor:
        width = self.means.shape[1]
        exact = rows.to(torch.float64).unsqueeze(1)
        at_once = rows_at_once(width)
        parts = zip(torch.split(self.means, at_once), torch.split(self.precisions, at_once), strict=True)
        sums = [
            row_sums((exact - means).square_().mul_(precisions).view(-1, width)).view(len(rows), -1)
            for means, precisions in parts
        ]
        scores = torch.cat(sums, dim=1).neg_().add_(self.constants)
        return _softmax(scores).to(torch.float32)


@dataclass(frozen=True, slots=True, eq=False)
class Margin:
    """One-hot of column 1 where bias + x . weights >= 0, else of column 0: a linear SVM.

    Args:
        weights: float32 or float16 `[F]`.
        bias: float64 `[1]`, a float32 value.
    """

    weights: Tensor
    bias: Tensor

    @property
    def work_per_row(self) -> int:
        """One product per feature, and its size."""
        return 2 * self.weights.numel()

    def __call__(self, rows: Tensor) -> Tensor:
        """float32 `[n, 2]`."""
        products = rows * self.weights
        margins = row_sums(products).add_(self.bias).squeeze(1)
        # How far the reference's float32 sum may be from this one, twice over: as in `neighbours.py`.
        scale = row_sums(products.abs()).squeeze(1) + self.bias.abs()
        width = self.weights.numel()
        near = margins.abs() <= scale * ((width + 3) * 2.0**-23)
        beyond = scale >= _FLOAT32_MAX / 2  # there its sum may be infinite, or no number
        unsure = (near | beyond).nonzero().squeeze(1)
        above = margins >= 0
        if len(unsure):
            bias = self.bias.to(torch.float32).expand(len(unsure), 1)
            sums = running_sum(torch.cat((bias, products[unsure]), dim=1).cpu().numpy())
            above[unsure] = torch.from_numpy(sums >= 0).to(rows.device)
        return torch.stack((~above, above), dim=1).to(torch.float32)


@dataclass(frozen=True, slots=True, eq=False)
class Boosting:
    """p = sigmoid(start + sum of the trees' steps): a float32 running sum in file order, the sigmoid in float64.

    Args:
        trees: The trees.
        step: float32 `[nodes]`, what a leaf adds.
        start: Where the sum starts, a float32 value.
    """

    trees: Trees
    step: Tensor
    start: float

    @property
    def work_per_row(self) -> int:
        """That of the trees."""
        return self.trees.work_per_row

    def __call__(self, rows: Tensor) -> Tensor:
        """float32 `[n, 2]`: 1 - p, p."""
        sums = []
        for part in torch.split(rows, self.trees.rows_at_once):
            steps = self.step[self.trees.leaves(part)].cpu().numpy()
            start = np.full((len(steps), 1), self.start, np.float32)
            sums.append(running_sum(np.concatenate((start, steps), axis=1)))
        return _two(torch.from_numpy(np.concatenate(sums)).unsqueeze(1).to(torch.float64)).to(rows.device)


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """activation(x . weights + biases).

    Args:
        weights: float32 or float16 `[inputs, outputs]`.
        biases: float32 `[outputs]`.
        activation: Of the sums.
    """

    weights: Tensor
    biases: Tensor
    activation: Activation

    def __call__(self, rows: Tensor) -> Tensor:
        """float32 `[n, outputs]`. Nothing is infinite, since the next layer could make no number of that."""
        sums = _sums(rows, self.weights, self.biases).clamp_(-_FLOAT32_MAX, _FLOAT32_MAX)
        match self.activation:
            case Activation.IDENTITY:
                return sums
            case Activation.RELU:
                return sums.clamp_(min=0)
            case Activation.LOGISTIC:
                return _sigmoid(sums.to(torch.float64)).to(torch.float32)
            case Activation.TANH:
                return torch.tanh(sums.to(torch.float64)).to(torch.float32)
            case Activation.EXP:
                return torch.exp(sums.to(torch.float64)).clamp_(max=_FLOAT32_MAX).to(torch.float32)
            case Activation.SOFTMAX:
                return _softmax(sums.to(torch.float64)).to(torch.float32)


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """Layers, one after the other.

    Args:
        layers: One at least.
        binary: Whether the one output is p(column 1), to be answered as two columns.
    """

    layers: tuple[Layer, ...]
    binary: bool

    @property
    def work_per_row(self) -> int:
        """One product per weight."""
        return sum(layer.weights.numel() for layer in self.layers)

    def __call__(self, rows: Tensor) -> Tensor:
        """float32 `[n, C]`."""
        last = len(self.layers) - 1
        for layer in self.layers[:last]:
            rows = layer(rows)
        final = self.layers[last]
        if self.binary:
            return _two(_sums(rows, final.weights, final.biases).to(torch.float64))
        return final(rows)


def _sums(rows: Tensor, weights: Tensor, biases: Tensor) -> Tensor:
    """Each x . weights + biases as the exact sum, rounded to float64 and then to float32: float32 `[n, outputs]`.

    The order in which a matrix product adds depends on how many rows it has, which must not change an answer. So its
    float64 sum counts only where its rounding error cannot change the float32 it is rounded to; other sums, which are
    few unless somebody has made them cancel, are made exactly.

    Args:
        rows: float32 `[n, inputs]`.
        weights: float32 or float16 `[inputs, outputs]`.
        biases: float32 `[outputs]`.
    """
    width = len(weights)
    exact, at_once = rows.to(torch.float64), rows_at_once(max(width, len(rows)))
    lengths = torch.linalg.vector_norm(exact, dim=1, keepdim=True)
    answers = []
    for some, offsets in zip(torch.split(weights, at_once, dim=1), torch.split(biases, at_once), strict=True):
        columns, starts = some.to(torch.float64), offsets.to(torch.float64)
        sums = torch.addmm(starts, exact, columns)
        # Cauchy-Schwarz bounds sum |x_i w_i|, of which n roundings may lose n * 2**-53 each way; twice over.
        slack = (lengths * torch.linalg.vector_norm(columns, dim=0) + starts.abs()) * ((width + 4) * 2.0**-51)
        rounded = (sums - slack).to(torch.float32)
        unsure = rounded != (sums + slack).to(torch.float32)
        row, column = unsure.nonzero(as_tuple=True)
        if len(row) * _PAIRS_SHARE <= unsure.numel():
            rounded[row, column] = _exact_sums(exact, columns, starts, row, column).to(rows.device)
        else:
            rounded = _exact_product(exact, columns, starts).to(rows.device)
        answers.append(rounded.add_(0.0))  # a zero has one sign
    return torch.cat(answers, dim=1)


def _exact_sums(rows: Tensor, columns: Tensor, starts: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """float32 `[pairs]`: products of float32 values are exact in float64, and `fsum` rounds their sum once."""
    found: list[float] = []
    size = rows_at_once(rows.shape[1])
    for some, others in zip(torch.split(row, size), torch.split(column, size), strict=True):
        terms = torch.cat((rows[some] * columns.T[others], starts[others].unsqueeze(1)), dim=1)
        found += map(math.fsum, terms.tolist())
    return torch.tensor(found, dtype=torch.float64).to(torch.float32)


def _exact_product(rows: Tensor, columns: Tensor, starts: Tensor) -> Tensor:
    """float32 `[n, outputs]`: all sums, the same as `_exact_sums` makes, in the time of a few matrix products.

    Rows and columns are taken apart into whole numbers so short that a float64 product of such matrices is exact in any
    order (Ozaki, Ogita, Oishi and Rump, "Error-free transformations of matrix multiplication", 2012). What `fsum` adds
    are a few such products instead of all terms.

    Args:
        rows: float64 `[n, inputs]`, float32 values.
        columns: float64 `[inputs, outputs]`, float32 values.
        starts: float64 `[outputs]`.
    """
    bits = (_FLOAT64_BITS - (len(columns) - 1).bit_length()) // 2  # inputs * 2**bits * 2**bits <= 2**53
    left, right = _in_pieces(rows, 1, bits), _in_pieces(columns, 0, bits)
    found: list[float] = []
    at_once = rows_at_once(len(starts) * (len(left) * len(right) + 1))
    for begin in range(0, len(rows), at_once):
        some = slice(begin, begin + at_once)
        terms = [starts.expand(len(rows[some]), -1)]
        terms += [(piece[some] @ other).mul_(unit[some] * scale) for piece, unit in left for other, scale in right]
        found += map(math.fsum, torch.stack(terms, dim=2).view(-1, len(terms)).tolist())
    return torch.tensor(found, dtype=torch.float64).view(len(rows), -1).to(torch.float32)


def _in_pieces(values: Tensor, dim: int, bits: int) -> list[tuple[Tensor, Tensor]]:
    """Matrices of whole numbers up to 2**bits, and powers of two for each row or column.

    Times these, the matrices add up to `values` exactly.

    Args:
        values: float64 `[n, m]`, float32 values: their 24 bits, wherever they lie, end the loop.
        dim: Along which values share a power of two.
        bits: Of a whole number.
    """
    largest = values.abs().amax(dim, keepdim=True)
    unit = torch.where(largest > 0, largest / torch.frexp(largest).mantissa, 1.0)  # a power of two, and larger
    rest = values / unit
    pieces = []
    while rest.any():
        unit = unit * 2.0**-bits
        rest = rest * 2.0**bits
        whole = rest.round()
        rest = rest - whole
        pieces.append((whole, unit))
    return pieces


def _sigmoid(values: Tensor) -> Tensor:
    """1 / (1 + exp(-x)), from float64 in place. `torch.sigmoid` rounds otherwise at the end of its input."""
    return values.neg_().exp_().add_(1).reciprocal_()


def _two(margins: Tensor) -> Tensor:
    """float32 `[n, 2]`: 1 - p, p of float64 margins `[n, 1]`."""
    p = _sigmoid(margins)
    return torch.cat((1 - p, p), dim=1).to(torch.float32)


def _softmax(scores: Tensor) -> Tensor:
    """float64 `[n, C]` from scores that may be minus infinity, but not all of a row."""
    shifted = (scores - scores.max(dim=1, keepdim=True).values).exp_()
    return shifted.div_(row_sums(shifted))
