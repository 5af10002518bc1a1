"""What a decoded model means to those who serve it: width, columns, labels, range, and whether it can answer."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

import numpy as np

from hocket.errors import HocketError, Reason
from hocket.packages import model as m
from hocket.packages.apr.quantization import weights_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hocket.packages.limits import Limits

_FLOAT32_STEP: Final = 2.0**-23
"""Relative spacing of float32: twice the error of one rounding."""
_FLOAT32_LEAST: Final = 2.0**-149
"""Absolute spacing of the smallest float32 numbers."""
_FLOAT64_BYTES: Final = 8
_WORD_BYTES: Final = 4
"""A float32; also the index of a tree's root, or of a class."""
_NODE_BYTES: Final = 16
"""Feature, threshold and two children; the answer comes on top."""


def is_fitted(model: m.Model) -> bool:
    """Whether every parameter that prediction needs is there."""
    parts: Sequence[object]
    match model:
        case m.MixtureOfExperts(experts=experts):
            parts = [expert if is_fitted(expert) else None for expert in experts]
        case m.GaussianNB():
            parts = (model.class_priors, model.means, model.variances, model.classes)
        case m.KNearestNeighbors():
            parts = (model.x_train, model.y_train)
        case m.DenseNetwork():
            parts = model.layers
        case _ if isinstance(model, m.TreeModel):
            parts = [member.tree for member in _members(model)]
        case _:
            parts = weights_of(model)
    return bool(parts) and all(part is not None for part in parts)


def not_servable(model: m.Model) -> str | None:
    """Why a well-formed model cannot answer, for people; None if it can.

    These are the cases where the reference aborts, or answers 0 or NaN whatever the input.
    """
    if isinstance(model, m.Quantized):
        return "it is a lone quantised tensor, not a model"
    if not is_fitted(model):
        return "the model was never fitted: parameters that prediction needs are absent"
    if width(model) == 0:
        return "the model reads no input"
    why = None
    match model:
        case m.KMeans(n_clusters=0):
            why = "the model has no clusters"
        case m.MixtureOfExperts():
            why = _gate_mismatch(model)
        case m.KNearestNeighbors(k=k, x_train=inputs) if inputs is not None and not 1 <= k <= inputs.shape[0]:
            why = f"the model asks {k} neighbours of {inputs.shape[0]} training rows"
        case m.GaussianNB(variances=variances) if variances is not None and variances.min(initial=1) <= 0:
            why = "a variance is not above 0"
        case m.GaussianNB(class_priors=priors) if priors is not None and not ((priors >= 0).all() and priors.any()):
            why = "the class priors are not probabilities"
    return why


def _gate_mismatch(model: m.MixtureOfExperts) -> str | None:
    features, columns = model.gate.weights.shape
    if any(width(expert) != features for expert in model.experts):
        return f"the gate reads {features} features, but not every expert does"
    if columns != len(model.experts):
        return f"the gate weighs {columns} experts, the mixture has {len(model.experts)}"
    return "the mixture chooses no expert (top_k is 0)" if model.top_k == 0 else None


def width(model: m.Model) -> int | None:
    """Input columns, where the model says it."""
    if isinstance(model, m.TreeModel):
        return model.n_features
    match model:
        case m.MixtureOfExperts(gate=gate):
            return gate.weights.shape[0]
        case m.DenseNetwork(layers=layers):
            return layers[0].weights.shape[0] if layers else None
        case _:
            array = _array(model)
            return None if array is None else array.shape[-1]


def _array(model: m.Model) -> m.Weights | None:
    """The one array of a model that has a column for each feature; None if it is absent, or there is no such array."""
    return model.means if isinstance(model, m.GaussianNB) else next(iter(weights_of(model)), None)


def least_width(model: m.Model) -> int:
    """Fewest input columns the model can read."""
    return width(model) or max((int(tree.feature.max()) + 1 for tree in trees(model)), default=0)


def with_width(model: m.Model, recorded: object, limits: Limits) -> m.Model:
    """The model with its input width filled in from wherever the package has it.

    Trees store no width before 0.13. A forest's training data tells it, and `custom.hocket.n_features` may.

    Args:
        model: As decoded.
        recorded: `custom.hocket.n_features`, None if absent.
        limits: Bounds the width.

    Raises:
        HocketError: `BAD_METADATA` if the recorded width is no width or not the model's, `BAD_PAYLOAD` if the model
            disagrees with itself, `TOO_LARGE` beyond the limit.
    """
    found = {width(model)}
    if isinstance(model, m.RandomForestClassifier | m.RandomForestRegressor | m.GradientBoostingClassifier):
        found |= {tree.n_features for tree in model.trees}
    if isinstance(model, m.RandomForestClassifier | m.RandomForestRegressor):
        found.add(None if model.x_train is None else model.x_train.shape[1])
    known = {features for features in found if features is not None}
    if len(known) > 1:
        raise HocketError(Reason.BAD_PAYLOAD, f"the model stores several input widths: {sorted(known)}")
    if recorded is not None:
        if not isinstance(recorded, int) or isinstance(recorded, bool) or recorded not in (known or range(1, 2**63)):
            raise HocketError(Reason.BAD_METADATA, "custom.hocket.n_features is not the width of the model's input")
        known = {recorded}
    n_features = next(iter(known), None)
    if max(n_features or 0, least_width(model)) > limits.features:
        raise HocketError(Reason.TOO_LARGE, f"the model reads more than {limits.features} features")
    if n_features is None or not isinstance(model, m.TreeModel):
        return model
    if least_width(replace(model, n_features=None)) > n_features:
        raise HocketError(Reason.BAD_PAYLOAD, f"a tree splits on a feature beyond the input's {n_features} columns")
    return replace(model, n_features=n_features)


def labels(model: m.Model, recorded: object, limits: Limits) -> tuple[str | None, ...] | None:
    """One label per output column of a classifier; None for a regressor, which has one column without a label.

    The number of columns is 2 for what is binary, the clusters of k-means, the classes of naive Bayes, the outputs of a
    dense network, else one past the largest class of the training data when that is stored. A tree without it has as
    many as are recorded, or leaves need.

    Args:
        model: As decoded.
        recorded: `custom.hocket.labels`: strings, integers, or null for a column to drop; None if absent, then
            columns are labelled by their index, or by the classes that naive Bayes stores.
        limits: Bounds their number and length.

    Raises:
        HocketError: `BAD_METADATA` for labels that are malformed, repeated or not one per column, `BAD_PAYLOAD` for
            a leaf beyond the training data's classes, `TOO_LARGE` beyond a limit.
    """
    columns = _columns(model)
    if columns is None:
        if recorded is not None:
            raise HocketError(
                Reason.BAD_METADATA, "custom.hocket.labels are for classifiers, this model is a regressor"
            )
        return None
    fixed, count = columns
    least = 0 if isinstance(model, m.GradientBoostingClassifier) else _largest_leaf(model) + 1
    if least > count:
        raise HocketError(Reason.BAD_PAYLOAD, f"a leaf answers column {least - 1} of {count}")
    if max(count, len(recorded) if isinstance(recorded, list) else 0) > limits.labels:
        raise HocketError(Reason.TOO_LARGE, f"the model has more than {limits.labels} labels")
    if recorded is None:
        stored = model.classes if isinstance(model, m.GaussianNB) else None
        return tuple(map(str, range(count) if stored is None else stored.tolist()))
    if not isinstance(recorded, list) or len(recorded) < count or (fixed and len(recorded) > count):
        raise HocketError(
            Reason.BAD_METADATA,
            f"custom.hocket.labels must list one label for each of the {count} output columns",
        )
    return label_names(recorded, limits)


def label_names(recorded: object, limits: Limits) -> tuple[str | None, ...]:
    """Recorded labels as text.

    Args:
        recorded: `custom.hocket.labels`: a list of strings, integers, or null for a column to drop.
        limits: Bounds their number and length.

    Raises:
        HocketError: `BAD_METADATA` for labels that are malformed or repeated, or if there is none; `TOO_LARGE` beyond a
            limit.
    """
    if not isinstance(recorded, list):
        raise HocketError(Reason.BAD_METADATA, "custom.hocket.labels must be a list")
    if len(recorded) > limits.labels:
        raise HocketError(Reason.TOO_LARGE, f"the model has more than {limits.labels} labels")
    names = tuple(_label(label, limits) for label in recorded)
    kept = [name for name in names if name is not None]
    if not kept or len(set(kept)) < len(kept):
        raise HocketError(Reason.BAD_METADATA, "custom.hocket.labels must name at least one label, each once")
    return names


def output_columns(model: m.Model, names: tuple[str | None, ...] | None) -> int:
    """How many columns a model answers with.

    Args:
        model: As decoded.
        names: Its `labels`.
    """
    if names is None:
        return model.layers[-1].biases.size if isinstance(model, m.DenseNetwork) and model.layers else 1
    return len(names)


def _columns(model: m.Model) -> tuple[bool, int] | None:
    """Whether the number of output columns is fixed, and that number or the least; None for a regressor."""
    columns: tuple[bool, int] | None = None
    match model:
        case m.LogisticRegression() | m.LinearSVM() | m.GradientBoostingClassifier():
            columns = True, 2
        case m.KMeans():
            columns = True, model.n_clusters
        case m.GaussianNB(classes=classes):
            columns = True, 0 if classes is None else classes.size
        case m.DenseNetwork(layers=(*_, m.DenseLayer(activation=m.Activation.LOGISTIC, biases=biases))):
            columns = True, max(biases.size, 2)
        case m.DenseNetwork(layers=(*_, m.DenseLayer(activation=m.Activation.SOFTMAX, biases=biases))):
            columns = True, biases.size
        case m.KNearestNeighbors(y_train=classes):
            columns = True, 0 if classes is None or not classes.size else int(classes.max()) + 1
        case m.RandomForestClassifier(y_train=classes) if classes is not None and classes.size:
            columns = True, int(classes.max()) + 1
        case m.DecisionTreeClassifier() | m.RandomForestClassifier():
            columns = False, _largest_leaf(model) + 1
    return columns


def _largest_leaf(model: m.Model) -> int:
    return max((int(tree.value.max()) for tree in trees(model)), default=-1)


def _label(label: object, limits: Limits) -> str | None:
    if label is None:
        return None
    if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
        raise HocketError(Reason.BAD_METADATA, "custom.hocket.labels must be strings, integers or null")
    if len(str(label)) > limits.label_chars:
        raise HocketError(Reason.TOO_LARGE, f"a label is longer than {limits.label_chars} characters")
    return str(label)


def output_range(model: m.Model) -> tuple[float, float] | None:
    """Least and greatest value an output can take; None where inputs decide.

    A forest's mean lies between the means of its trees' least and greatest leaves. The bounds are widened by the
    rounding of a float32 sum of n terms and a division, at most n * 2**-24 of the mean magnitude, twice over.
    """
    match model:
        case m.DecisionTreeRegressor() | m.RandomForestRegressor() if is_fitted(model):
            answers = [tree.value[tree.feature < 0].astype(np.float64) for tree in trees(model)]
            count = len(answers)
            rounding = 0.0
            if count > 1:
                magnitude = sum(float(np.abs(leaves).max()) for leaves in answers) / count
                rounding = count * _FLOAT32_STEP * magnitude + _FLOAT32_LEAST
            low = sum(float(leaves.min()) for leaves in answers) / count
            high = sum(float(leaves.max()) for leaves in answers) / count
            return low - rounding, high + rounding
        case m.DenseNetwork(layers=(*_, m.DenseLayer(activation=m.Activation.TANH))):
            return -1.0, 1.0
        case _:
            return None if _columns(model) is None else (0.0, 1.0)


def parameter_bytes(model: m.Model) -> int:
    """Bytes that a worker takes to hold the fitted experts, laid out for computing (`docs/packages.md` has the rule).

    Routers compare this with the budgets of workers, so it is what `services.expert_worker.loader` lays out, exactly.
    """
    match model:
        case m.MixtureOfExperts():
            return sum(parameter_bytes(expert) for expert in model.experts)
        case m.DenseNetwork(layers=layers):
            return _WORD_BYTES * sum(layer.weights.size + layer.biases.size for layer in layers)
        case _ if isinstance(model, m.TreeModel):
            steps = isinstance(model, m.GradientBoostingClassifier)  # a leaf says which way, in a float32
            return sum(
                _WORD_BYTES + len(tree.feature) * (_NODE_BYTES + (_WORD_BYTES if steps else tree.value.itemsize))
                for tree in trees(model)
            )
        case _:
            array = _array(model)
            return 0 if array is None else _array_bytes(model, array)


def _array_bytes(model: m.Model, array: m.Weights) -> int:
    """Of a model that holds one array, and what goes with each of its rows."""
    rows = array.shape[0]
    match model:
        case m.KMeans():
            return _FLOAT64_BYTES * (array.size + rows)
        case m.KNearestNeighbors():
            squares = rows if model.metric is m.Metric.EUCLIDEAN else 0
            return _FLOAT64_BYTES * (array.size + squares) + _WORD_BYTES * rows
        case m.GaussianNB():
            return _FLOAT64_BYTES * (2 * array.size + rows)
        case _:
            return _WORD_BYTES * array.size + _FLOAT64_BYTES


def trees(model: m.Model) -> list[m.Tree]:
    """The trees of a tree or forest, without those never fitted; none for other models."""
    members = _members(model) if isinstance(model, m.TreeModel) else ()
    return [member.tree for member in members if member.tree is not None]


def _members(model: m.TreeModel) -> Sequence[m.DecisionTreeClassifier | m.DecisionTreeRegressor]:
    return (model,) if isinstance(model, m.DecisionTreeClassifier | m.DecisionTreeRegressor) else model.trees
