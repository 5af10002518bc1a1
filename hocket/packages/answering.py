"""What a model answers, in numpy and float64: for training gates and checking conversions, where no worker runs.

Workers compute the same on their devices (`services/expert_worker`), and meet the reference's float32 to the last tie;
here sums are exact where the reference rounds, so that rows at a tie may come out on its other side.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from hocket.errors import HocketError, Reason
from hocket.packages import model as m
from hocket.packages.apr.quantization import dequantized_model, floats

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from hocket.packages.model import Model, ModelFacts, Tree

    Numbers = NDArray[np.float64]

_WORKSPACE_VALUES: Final = 2**22
"""Intermediate values of one step: more rows are answered in parts."""
_SAME_PLACE: Final = 1e-10
"""A distance below which a vote counts 1, as in the reference."""


def answer(model: Model, facts: ModelFacts, rows: NDArray[np.float32]) -> NDArray[np.float64]:
    """The answers of a model.

    Args:
        model: As `hocket.packages.apr.decode` yields it.
        facts: Yielded with it.
        rows: float32 `[N, F]`.

    Returns:
        float64 `[N, C]`: a number per row of a regressor, and of a classifier one per label, those that are dropped
        included.

    Raises:
        HocketError: `NOT_SERVABLE` for a model that cannot answer, `BAD_TENSOR` for rows that it cannot read.
    """
    if facts.not_servable is not None:
        raise HocketError(Reason.NOT_SERVABLE, f"the model cannot answer: {facts.not_servable}")
    width = rows.shape[1]
    if width != facts.n_features and (facts.n_features is not None or width < facts.n_features_min):
        needs = facts.n_features or f"{facts.n_features_min} or more"
        raise HocketError(Reason.BAD_TENSOR, f"the rows have {width} columns, the model reads {needs}")
    plain = dequantized_model(model)
    run = _ANSWERING[type(plain)]
    at_once = max(1, _WORKSPACE_VALUES // max(width, facts.output_columns, _widest_step(plain)))
    parts = np.split(rows, range(at_once, len(rows), at_once))
    with np.errstate(over="ignore", under="ignore"):
        return np.concatenate([run(plain, part.astype(np.float64), facts.output_columns) for part in parts])


def _widest_step(model: Model) -> int:
    """The most values that one row becomes on the way to its answer."""
    match model:
        case m.KNearestNeighbors(y_train=classes) if classes is not None:
            return len(classes)
        case m.DenseNetwork():
            return max(layer.weights.shape[1] for layer in model.layers)
        case m.MixtureOfExperts():
            return len(model.experts)
        case _:
            return 1


def _linear(model: m.LinearModel, rows: Numbers, _: int) -> Numbers:
    return _sums(model.coefficients, model.intercept, rows)[:, None]


def _logistic(model: m.LogisticRegression, rows: Numbers, _: int) -> Numbers:
    return _binary(_sigmoid(_sums(model.coefficients, model.intercept, rows)))


def _svm(model: m.LinearSVM, rows: Numbers, _: int) -> Numbers:
    return _binary((_sums(model.weights, model.bias, rows) >= 0).astype(np.float64))


def _sums(weights: m.Weights | None, bias: float, rows: Numbers) -> Numbers:
    sums: Numbers = rows @ _numbers(weights) + bias
    return sums


def _numbers(weights: m.Weights | None) -> Numbers:
    """Parameters that are there, since the model can answer, in float64."""
    assert weights is not None  # noqa: S101 - for the type checker: the model is fitted
    return floats(weights).astype(np.float64)


def _mixture(model: m.MixtureOfExperts, rows: Numbers, _: int) -> Numbers:
    """The heaviest `top_k` experts of each row, of equal ones those that come first, weighed anew."""
    gate = softmax(rows @ _numbers(model.gate.weights) / model.gate.temperature)
    outputs = np.hstack([_linear(expert, rows, 1) for expert in model.experts])
    answers: Numbers = (heaviest(gate, model.top_k) * outputs).sum(axis=1, keepdims=True)
    return answers


def heaviest(weights: Numbers, top_k: int) -> Numbers:
    """Weights `[N, E]` of the `top_k` heaviest of each row, first ones first, summing to 1; the others 0."""
    chosen = np.argsort(-weights, axis=1, kind="stable")[:, :top_k]
    kept = np.zeros_like(weights)
    np.put_along_axis(kept, chosen, np.take_along_axis(weights, chosen, axis=1), axis=1)
    kept /= kept.sum(axis=1, keepdims=True)
    return kept


def softmax(logits: Numbers) -> Numbers:
    """Shares `[N, C]` of each row, summing to 1."""
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares: Numbers = exponentials / exponentials.sum(axis=1, keepdims=True)
    return shares


def _sigmoid(margins: Numbers) -> Numbers:
    return 1 / (1 + np.exp(-margins))


def _binary(p: Numbers) -> Numbers:
    return np.stack((1 - p, p), axis=1)


def _leaves(tree: Tree | None, rows: Numbers) -> NDArray[Any]:
    """What each row's leaf answers: `[N]`."""
    assert tree is not None  # noqa: S101 - as above
    node = np.zeros(len(rows), np.int64)
    every = np.arange(len(rows))
    while (split := tree.feature[node] >= 0).any():
        at, of = node[split], every[split]
        left = rows[of, tree.feature[at]] <= tree.threshold[at]
        node[split] = np.where(left, tree.left[at], tree.right[at])
    return tree.value[node]


def _tree_class(model: m.DecisionTreeClassifier, rows: Numbers, columns: int) -> Numbers:
    chosen: Numbers = np.eye(columns)[_leaves(model.tree, rows)]
    return chosen


def _tree_value(model: m.DecisionTreeRegressor, rows: Numbers, _: int) -> Numbers:
    return _leaves(model.tree, rows).astype(np.float64)[:, None]


def _votes(model: m.RandomForestClassifier, rows: Numbers, columns: int) -> Numbers:
    return sum((_tree_class(tree, rows, columns) for tree in model.trees), np.zeros(1)) / len(model.trees)


def _mean(model: m.RandomForestRegressor, rows: Numbers, _: int) -> Numbers:
    return sum((_tree_value(tree, rows, 1) for tree in model.trees), np.zeros(1)) / len(model.trees)


def _boosted(model: m.GradientBoostingClassifier, rows: Numbers, _: int) -> Numbers:
    margins = np.full(len(rows), model.init_prediction)
    for member in model.trees:
        margins += np.where(_leaves(member.tree, rows) != 0, model.learning_rate, -model.learning_rate)
    return _binary(_sigmoid(margins))


def _distances(points: Numbers, rows: Numbers, power: float) -> Numbers:
    """Sums of |x - c|**power: `[N, K]`."""
    at_once = max(1, _WORKSPACE_VALUES // max(1, rows.size))
    blocks = np.split(points, range(at_once, len(points), at_once))
    return np.hstack([(np.abs(rows[:, None] - block) ** power).sum(axis=2) for block in blocks])


def _nearest(model: m.KMeans, rows: Numbers, columns: int) -> Numbers:
    nearest: Numbers = np.eye(columns)[_distances(_numbers(model.centroids), rows, 2).argmin(axis=1)]
    return nearest


def _neighbours(model: m.KNearestNeighbors, rows: Numbers, columns: int) -> Numbers:
    assert model.y_train is not None  # noqa: S101 - as above
    power = {m.Metric.EUCLIDEAN: 2.0, m.Metric.MANHATTAN: 1.0}.get(model.metric, model.p)
    distances = _distances(_numbers(model.x_train), rows, power) ** (1 / power)
    chosen = np.argsort(distances, axis=1, kind="stable")[:, : model.k]
    near = np.take_along_axis(distances, chosen, axis=1)
    weights = np.ones_like(near)
    if model.weighted:
        weights = np.where(near < _SAME_PLACE, 1.0, 1 / np.maximum(near, _SAME_PLACE))
    votes = np.zeros((len(rows), columns))
    np.add.at(votes, (np.arange(len(rows))[:, None], model.y_train[chosen].astype(np.int64)), weights)
    votes /= votes.sum(axis=1, keepdims=True)
    return votes


def _naive_bayes(model: m.GaussianNB, rows: Numbers, _: int) -> Numbers:
    classes = zip(_numbers(model.class_priors), _numbers(model.means), _numbers(model.variances), strict=True)
    with np.errstate(divide="ignore"):  # a class that cannot be has the logarithm -inf
        logs = [
            np.log(prior) - 0.5 * (np.log(2 * np.pi * variance) + (rows - mean) ** 2 / variance).sum(axis=1)
            for prior, mean, variance in classes
        ]
    return softmax(np.stack(logs, axis=1))


def _network(model: m.DenseNetwork, rows: Numbers, _: int) -> Numbers:
    values = rows
    for layer in model.layers:
        values = _ACTIVATIONS[layer.activation](values @ _numbers(layer.weights) + layer.biases)
    single = layer.activation is m.Activation.LOGISTIC and values.shape[1] == 1
    return _binary(values[:, 0]) if single else values


_ANSWERING: Final[dict[type, Callable[[Any, Numbers, int], Numbers]]] = {
    m.LinearRegression: _linear,
    m.Ridge: _linear,
    m.Lasso: _linear,
    m.ElasticNet: _linear,
    m.LogisticRegression: _logistic,
    m.LinearSVM: _svm,
    m.DecisionTreeClassifier: _tree_class,
    m.DecisionTreeRegressor: _tree_value,
    m.RandomForestClassifier: _votes,
    m.RandomForestRegressor: _mean,
    m.GradientBoostingClassifier: _boosted,
    m.KMeans: _nearest,
    m.KNearestNeighbors: _neighbours,
    m.GaussianNB: _naive_bayes,
    m.DenseNetwork: _network,
    m.MixtureOfExperts: _mixture,
}
_ACTIVATIONS: Final[dict[m.Activation, Callable[[Numbers], Numbers]]] = {
    m.Activation.IDENTITY: lambda values: values,
    m.Activation.LOGISTIC: _sigmoid,
    m.Activation.TANH: np.tanh,
    m.Activation.RELU: lambda values: np.maximum(values, 0),
    m.Activation.SOFTMAX: softmax,
    m.Activation.EXP: np.exp,
}
