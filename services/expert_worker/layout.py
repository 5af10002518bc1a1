"""How each kind of model lies in memory for computing: its parameters in a row, and kernels made of them, moved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch

from hocket.packages import model as m
from hocket.packages.apr.facts import trees
from hocket.packages.apr.quantization import part_of
from services.expert_worker.compute import Kernel, Linear, Logistic, Mean, Trees, Votes
from services.expert_worker.families import Boosting, Dense, Layer, Margin, NaiveBayes
from services.expert_worker.neighbours import Nearest, Neighbours, Samples
from services.expert_worker.parameters import VALUES_AT_ONCE, parameter, tensor, weights_type

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from services.expert_worker.parameters import Parameter

LaidOut: TypeAlias = "tuple[tuple[Parameter, ...], Callable[[Sequence[Tensor]], tuple[Kernel, ...]]]"
"""Parameters, and the kernels by ordinal of the same, moved."""


def lay_out(model: m.Model, columns: int, *, half: bool) -> LaidOut:
    """The parameters of a servable model, and what makes its kernels of them.

    Args:
        model: Servable.
        columns: Columns of its answer.
        half: Whether linear models and dense networks hold their weights in float16.
    """
    laid_out: LaidOut
    match model:
        case m.MixtureOfExperts(experts=experts):
            laid_out = _linear(experts, Linear, half=half)
        case m.LinearRegression() | m.Ridge() | m.Lasso() | m.ElasticNet():
            laid_out = _linear((model,), Linear, half=half)
        case m.LogisticRegression():
            laid_out = _linear((model,), Logistic, half=half)
        case m.LinearSVM():
            laid_out = _margin(model, half=half)
        case m.DenseNetwork():
            laid_out = _dense(model, half=half)
        case m.GaussianNB():
            laid_out = _naive_bayes(model)
        case m.KMeans():
            laid_out = _clusters(model)
        case m.KNearestNeighbors():
            laid_out = _neighbours(model, columns)
        case _:
            assert isinstance(model, m.TreeModel)  # noqa: S101 - a lone tensor is not servable
            laid_out = _trees(model, columns)
    return laid_out


def family_of(kernel: Kernel) -> object:
    """What kernels must have in common to share a pass by `stack`: a kernel of another kind shares it with none."""
    return (type(kernel), kernel.weights.dtype) if isinstance(kernel, Linear | Logistic) else kernel


def _margin(model: m.LinearSVM, *, half: bool) -> LaidOut:
    assert model.weights is not None  # noqa: S101 - servable
    weights = parameter(model.weights, weights_type(model.weights, half=half))
    return (weights, tensor(np.array([model.bias], np.float64))), lambda moved: (Margin(*moved),)


def _clusters(model: m.KMeans) -> LaidOut:
    assert model.centroids is not None  # noqa: S101 - servable
    parameters = (parameter(model.centroids, torch.float64), tensor(_squares(model.centroids)))
    return parameters, lambda moved: (Nearest(Samples(moved[0], moved[1])),)


def _linear(
    experts: Sequence[m.LinearModel | m.LogisticRegression], kernel: type[Linear | Logistic], *, half: bool
) -> LaidOut:
    weights = [expert.coefficients for expert in experts if expert.coefficients is not None]
    biases = np.array([[expert.intercept] for expert in experts], np.float64)
    plain = [array for array in weights if not isinstance(array, m.Quantized)]
    parameters: tuple[Parameter, ...]
    if len(plain) == len(weights):  # all in one tensor, to move them at once
        stacked = np.stack(plain)
        parameters = (parameter(stacked, weights_type(stacked, half=half)),)
    else:
        parameters = tuple(parameter(array, weights_type(array, half=half)) for array in weights)

    def kernels(moved: Sequence[Tensor]) -> tuple[Kernel, ...]:
        *given, offsets = moved
        rows = given if given[0].dim() == 1 else given[0].unbind(0)
        return tuple(kernel(*row) for row in zip(rows, offsets.unbind(0), strict=True))

    return (*parameters, tensor(biases)), kernels


def _dense(model: m.DenseNetwork, *, half: bool) -> LaidOut:
    weights = [parameter(layer.weights, weights_type(layer.weights, half=half)) for layer in model.layers]
    biases = [tensor(layer.biases) for layer in model.layers]
    last = model.layers[-1]
    binary = last.activation is m.Activation.LOGISTIC and last.biases.size == 1

    activations = [layer.activation for layer in model.layers]

    def kernels(moved: Sequence[Tensor]) -> tuple[Kernel, ...]:
        layers = zip(moved[: len(activations)], moved[len(activations) :], activations, strict=True)
        return (Dense(tuple(Layer(*layer) for layer in layers), binary),)

    return (*weights, *biases), kernels


def _naive_bayes(model: m.GaussianNB) -> LaidOut:
    assert model.class_priors is not None  # noqa: S101 - servable
    assert model.means is not None  # noqa: S101 - the same
    assert model.variances is not None  # noqa: S101 - the same
    with np.errstate(divide="ignore"):  # a class that never is has a prior of 0
        constants = np.log(model.class_priors.astype(np.float64))
    precisions = torch.empty(model.variances.shape, dtype=torch.float64)
    for some in _rows_in_parts(model.variances):
        variances = model.variances[some].astype(np.float64)
        precisions.numpy()[some] = 0.5 / variances
        constants[some] -= 0.5 * np.log(2 * np.pi * variances).sum(axis=1)
    parameters = (parameter(model.means, torch.float64), precisions, tensor(constants))
    return parameters, lambda moved: (NaiveBayes(*moved),)


def _neighbours(model: m.KNearestNeighbors, columns: int) -> LaidOut:
    assert model.x_train is not None  # noqa: S101 - servable
    assert model.y_train is not None  # noqa: S101 - the same
    parameters = [parameter(model.x_train, torch.float64), tensor(model.y_train.astype(np.int32))]
    if model.metric is m.Metric.EUCLIDEAN:
        parameters.append(tensor(_squares(model.x_train)))
    k, metric, p, weighted = model.k, model.metric, model.p, model.weighted

    def kernels(moved: Sequence[Tensor]) -> tuple[Kernel, ...]:
        rows, classes, *squares = moved
        samples = Samples(rows, squares[0] if squares else None, metric, p)
        return (Neighbours(samples, classes, k, weighted, columns),)

    return tuple(parameters), kernels


def _squares(rows: m.Weights) -> NDArray[np.float64]:
    """float64 `[n]`: the squared length of each row."""
    count, width = rows.shape
    squares = np.empty(count)
    for some in _rows_in_parts(rows):
        exact = part_of(rows, some.start * width, some.stop * width).astype(np.float64).reshape(-1, width)
        squares[some] = (exact * exact).sum(axis=1)
    return squares


def _rows_in_parts(rows: m.Weights) -> Iterator[slice]:
    """The rows of a matrix, as many at once as have `VALUES_AT_ONCE` values."""
    count, width = rows.shape
    step = max(1, VALUES_AT_ONCE // max(1, width))
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def _trees(model: m.TreeModel, columns: int) -> LaidOut:
    table = _Table.of(trees(model))
    answers = np.concatenate([tree.value for tree in table.trees])
    if isinstance(model, m.GradientBoostingClassifier):
        step, start = np.float32(model.learning_rate), model.init_prediction
        steps = tensor(np.where(answers != 0, step, -step))
        return (*table.tensors, steps), lambda moved: (Boosting(table.on(moved), moved[4], start),)
    if isinstance(model, m.DecisionTreeClassifier | m.RandomForestClassifier):
        return (*table.tensors, tensor(answers)), lambda moved: (Votes(table.on(moved), moved[4], columns),)
    return (*table.tensors, tensor(answers)), lambda moved: (Mean(table.on(moved), moved[4]),)


@dataclass(frozen=True, slots=True, eq=False)
class _Table:
    """The nodes of all trees, one after the other."""

    trees: Sequence[m.Tree]
    tensors: tuple[Tensor, ...]
    depth: int

    @classmethod
    def of(cls, trees: Sequence[m.Tree]) -> _Table:
        sizes = np.array([len(tree.feature) for tree in trees])
        roots = np.cumsum(sizes) - sizes
        first = np.repeat(roots, sizes)
        itself = np.arange(sizes.sum())
        feature = np.concatenate([tree.feature for tree in trees])
        is_leaf = feature < 0
        left = np.where(is_leaf, itself, np.concatenate([tree.left for tree in trees]) + first)
        right = np.where(is_leaf, itself, np.concatenate([tree.right for tree in trees]) + first)
        tensors = (
            tensor(roots.astype(np.int32)),
            tensor(np.where(is_leaf, 0, feature).astype(np.int32)),
            tensor(np.concatenate([tree.threshold for tree in trees])),
            tensor(np.stack((right, left), axis=1).reshape(-1).astype(np.int32)),
        )
        return cls(trees, tensors, _depth(roots, is_leaf, left, right))

    def on(self, moved: Sequence[Tensor]) -> Trees:
        roots, feature, threshold, children, *_ = moved
        return Trees(roots, feature, threshold, children, self.depth)


def _depth(
    roots: NDArray[np.int64], is_leaf: NDArray[np.bool_], left: NDArray[np.int64], right: NDArray[np.int64]
) -> int:
    """Splits on the way to the deepest leaf, level by level."""
    level, depth = roots[~is_leaf[roots]], 0
    while len(level):
        depth += 1
        level = np.concatenate((left[level], right[level]))
        level = level[~is_leaf[level]]
    return depth
