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


def gate_weights(gate: Any, row: Any) -> Any:
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
    """[N]: how far an answer may be from the reference's, by linear output: 1e-6 * max(1, |bias| + sum |x w|).

    Naive Bayes likewise, by what the logarithm of a probability is a sum of.
    """
    if isinstance(model, m.GaussianNB):
        means: Any = model.means
        variances: Any = model.variances
        terms = (rows[:, None] - means) ** 2 / (2 * variances) + np.abs(np.log(variances)) + 1
        return 1e-6 * np.maximum(1, terms.sum(axis=2).max(axis=1))
    if not isinstance(model, m.LinearModel | m.LogisticRegression | m.MixtureOfExperts):
        return np.full(len(rows), 1e-6)
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


def _naive_bayes(model: Any, row: Any, _: int) -> Any:
    scores = []
    for prior, means, variances in zip(model.class_priors, model.means, model.variances, strict=True):
        score = np.log(prior)
        for x, mean, variance in zip(row, means, variances, strict=True):
            score += f32(-0.5) * np.log(f32(2 * np.pi) * variance) - (x - mean) * (x - mean) / (f32(2) * variance)
        scores.append(score)
    exponentials = [np.exp(score - max(scores)) for score in scores]
    return [exponential / sum(exponentials) for exponential in exponentials]


def _neighbors(model: Any, row: Any, columns: int) -> Any:
    distances = [_METRICS[model.metric](row, other, f32(model.p)) for other in model.x_train]
    votes = np.zeros(columns, f32)
    voters = sorted(range(len(distances)), key=distances.__getitem__)[: model.k]  # a stable sort
    alike = not model.weighted or np.isinf(distances[voters[0]])  # the reference answers NaN where all are that far
    for nearest in voters:
        near = alike or distances[nearest] < f32(1e-10)
        votes[int(model.y_train[nearest])] += f32(1) if near else f32(1) / distances[nearest]
    return votes / sum(votes)


def _power(value: Any, exponent: Any) -> Any:
    return f32(np.float64(value) ** np.float64(exponent))


_METRICS: dict[m.Metric, Any] = {
    m.Metric.EUCLIDEAN: lambda one, other, _: np.sqrt(_distance(one, other)),
    m.Metric.MANHATTAN: lambda one, other, _: _summed(abs(x - c) for x, c in zip(one, other, strict=True)),
    m.Metric.MINKOWSKI: lambda one, other, p: _power(
        _summed(_power(abs(x - c), p) for x, c in zip(one, other, strict=True)), f32(1) / p
    ),
}


def _margin(model: Any, row: Any, _: int) -> Any:
    above = _dot(f32(model.bias), row, model.weights) >= 0
    return [f32(not above), f32(above)]


def _boosted(model: Any, row: Any, _: int) -> Any:
    total = f32(model.init_prediction)
    for tree in model.trees:
        total += f32(model.learning_rate) if _leaf(tree.tree, row) else -f32(model.learning_rate)
    p = f32(1) / (f32(1) + np.exp(-total))
    return [f32(1) - p, p]


def _network(model: Any, row: Any, _: int) -> Any:
    """In float64, as scikit-learn computes."""
    values = row.astype(np.float64)
    for layer in model.layers:
        values = _ACTIVATIONS[layer.activation](values @ layer.weights.astype(np.float64) + layer.biases)
    binary = model.layers[-1].activation is m.Activation.LOGISTIC and len(values) == 1
    return [1 - values[0], values[0]] if binary else values


_ACTIVATIONS: dict[m.Activation, Any] = {
    m.Activation.IDENTITY: lambda values: values,
    m.Activation.LOGISTIC: lambda values: 1 / (1 + np.exp(-values)),
    m.Activation.TANH: np.tanh,
    m.Activation.RELU: lambda values: np.maximum(values, 0),
    m.Activation.SOFTMAX: lambda values: np.exp(values - values.max()) / np.exp(values - values.max()).sum(),
    m.Activation.EXP: np.exp,
}

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
    m.GaussianNB: _naive_bayes,
    m.KNearestNeighbors: _neighbors,
    m.LinearSVM: _margin,
    m.GradientBoostingClassifier: _boosted,
    m.DenseNetwork: _network,
}


def _dot(start: Any, row: Any, coefficients: Any) -> Any:
    for x, w in zip(row, coefficients, strict=True):
        start += x * w
    return start


def _distance(row: Any, centroid: Any) -> Any:
    return _summed((x - c) * (x - c) for x, c in zip(row, centroid, strict=True))


def _summed(terms: Any) -> Any:
    total = f32(0)
    for term in terms:
        total += term
    return total


def _leaf(tree: Any, row: Any) -> Any:
    node = 0
    while tree.feature[node] >= 0:
        node = (tree.left if row[tree.feature[node]] <= tree.threshold[node] else tree.right)[node]
    return tree.value[node]
