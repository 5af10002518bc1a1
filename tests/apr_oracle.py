"""The reference's predictions, slowly: float32, one operation after the other, in its order."""

from __future__ import annotations

from typing import Any

import numpy as np

from hocket.packages import model as m

f32 = np.float32


def predict(model: Any, rows: Any, columns: int = 1) -> Any:
    """Answers of a model.

    Args:
        model: Any layout.
        rows: float32 [N, F].
        columns: Output columns of a tree or forest classifier.

    Returns:
        float32 [N, C]: a value, a probability per column, or one-hot for clusters.
    """
    return np.array([_row(model, row, columns) for row in np.asarray(rows, f32)], f32)


def gate_weights(gate: m.SoftmaxGate, row: Any) -> Any:
    """float32 [E]: softmax of the gate for one row."""
    logits = []
    for weights in gate.weights.T:
        logit = f32(0)
        for x, w in zip(row, weights, strict=False):
            logit += x * w
        logits.append(logit / f32(gate.temperature))
    exponentials = [np.exp(logit - max(logits)) for logit in logits]
    total = f32(0)
    for exponential in exponentials:
        total += exponential
    return np.array([exponential / total for exponential in exponentials], f32)


def tolerance(model: Any, rows: Any) -> Any:
    """[N]: how far an answer may be from the reference's, by linear output: 1e-6 * max(1, |bias| + sum |x w|)."""
    experts: Any = model.experts if isinstance(model, m.MixtureOfExperts) else (model,)
    scale = [np.abs(expert.intercept) + np.abs(rows) @ np.abs(expert.coefficients) for expert in experts]
    return 1e-6 * np.maximum(1, np.max(scale, axis=0))


def _row(model: Any, row: Any, columns: int) -> Any:
    return _ROWS[type(model)](model, row, columns)


def _linear(model: Any, row: Any, _: int) -> Any:
    return [_dot(f32(0), row, model.coefficients) + f32(model.intercept)]


def _logistic(model: Any, row: Any, _: int) -> Any:
    p = f32(1) / (f32(1) + np.exp(-_dot(f32(model.intercept), row, model.coefficients)))
    return [f32(1) - p, p]


def _tree_value(model: Any, row: Any, _: int) -> Any:
    return [_leaf(model.tree, row)]


def _tree_class(model: Any, row: Any, columns: int) -> Any:
    return np.eye(columns, dtype=f32)[_leaf(model.tree, row)]


def _forest_value(model: Any, row: Any, _: int) -> Any:
    total = f32(0)
    for tree in model.trees:
        total += _leaf(tree.tree, row)
    return [total / f32(len(model.trees))]


def _forest_class(model: Any, row: Any, columns: int) -> Any:
    votes = np.zeros(columns, f32)
    for tree in model.trees:
        votes[_leaf(tree.tree, row)] += 1
    return votes / f32(len(model.trees))


def _cluster(model: Any, row: Any, _: int) -> Any:
    distances = [_distance(row, centroid) for centroid in model.centroids]
    return np.eye(len(distances), dtype=f32)[int(np.argmin(distances))]


def _mixture(model: Any, row: Any, _: int) -> Any:
    weights = gate_weights(model.gate, row)
    chosen = sorted(range(len(weights)), key=lambda expert: -weights[expert])[: model.top_k]
    total, answer = f32(0), f32(0)
    for expert in chosen:
        total += weights[expert]
    for expert in chosen:
        answer += weights[expert] / total * _row(model.experts[expert], row, 1)[0]
    return [answer]


_ROWS = {
    m.LinearRegression: _linear,
    m.Ridge: _linear,
    m.Lasso: _linear,
    m.ElasticNet: _linear,
    m.LogisticRegression: _logistic,
    m.DecisionTreeRegressor: _tree_value,
    m.DecisionTreeClassifier: _tree_class,
    m.RandomForestRegressor: _forest_value,
    m.RandomForestClassifier: _forest_class,
    m.KMeans: _cluster,
    m.MixtureOfExperts: _mixture,
}


def _dot(start: Any, row: Any, coefficients: Any) -> Any:
    for x, w in zip(row, coefficients, strict=True):
        start += x * w
    return start


def _distance(row: Any, centroid: Any) -> Any:
    total = f32(0)
    for x, c in zip(row, centroid, strict=True):
        total += (x - c) * (x - c)
    return total


def _leaf(tree: Any, row: Any) -> Any:
    node = 0
    while tree.feature[node] >= 0:
        node = (tree.left if row[tree.feature[node]] <= tree.threshold[node] else tree.right)[node]
    return tree.value[node]
