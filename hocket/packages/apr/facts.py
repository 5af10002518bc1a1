"""What a decoded model means to those who serve it: width, columns, labels, range, and whether it can answer."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

import numpy as np

from hocket.errors import HocketError, Reason
from hocket.packages import model as m

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hocket.packages.limits import Limits

_FLOAT32_STEP: Final = 2.0**-23
"""Relative spacing of float32: twice the error of one rounding."""
_FLOAT32_LEAST: Final = 2.0**-149
"""Absolute spacing of the smallest float32 numbers."""
_FLOAT64_BYTES: Final = 8
_ROOT_BYTES: Final = 4
_NODE_BYTES: Final = 16
"""Feature, threshold and two children; the answer comes on top."""


def is_fitted(model: m.Model) -> bool:
    """Whether every parameter that prediction needs is there."""
    match model:
        case m.MixtureOfExperts():
            return bool(model.experts) and all(is_fitted(expert) for expert in model.experts)
        case m.KMeans():
            return model.centroids is not None
        case m.DecisionTreeClassifier() | m.DecisionTreeRegressor():
            return model.tree is not None
        case m.RandomForestClassifier() | m.RandomForestRegressor():
            return bool(model.trees) and all(tree.tree is not None for tree in model.trees)
        case _:
            return model.coefficients is not None


def not_servable(model: m.Model) -> str | None:
    """Why a well-formed model cannot answer, for people; None if it can.

    These are the cases where the reference aborts, or answers 0 whatever the input.
    """
    if not is_fitted(model):
        return "the model was never fitted: parameters that prediction needs are absent"
    if width(model) == 0:
        return "the model reads no input"
    if isinstance(model, m.KMeans) and model.n_clusters == 0:
        return "the model has no clusters"
    return _gate_mismatch(model) if isinstance(model, m.MixtureOfExperts) else None


def _gate_mismatch(model: m.MixtureOfExperts) -> str | None:
    features, columns = model.gate.weights.shape
    if any(width(expert) != features for expert in model.experts):
        return f"the gate reads {features} features, but not every expert does"
    if columns != len(model.experts):
        return f"the gate weighs {columns} experts, the mixture has {len(model.experts)}"
    return "the mixture chooses no expert (top_k is 0)" if model.top_k == 0 else None


def width(model: m.Model) -> int | None:
    """Input columns, where the model says it."""
    match model:
        case m.MixtureOfExperts():
            return len(model.gate.weights)
        case m.KMeans():
            return None if model.centroids is None else model.centroids.shape[1]
        case m.LogisticRegression() | m.LinearRegression() | m.Ridge() | m.Lasso() | m.ElasticNet():
            return None if model.coefficients is None else model.coefficients.size
        case _:
            return model.n_features


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
    if isinstance(model, m.RandomForestClassifier | m.RandomForestRegressor):
        found |= {tree.n_features for tree in model.trees}
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

    The number of columns is 2 for logistic regression, the clusters of k-means, else one past the largest class of
    the training data when that is stored. A tree without it has as many as are recorded, or leaves need.

    Args:
        model: As decoded.
        recorded: `custom.hocket.labels`: strings, integers, or null for a column to drop; None if absent, then
            columns are labelled by their index.
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
    least = 1 + max((int(tree.value.max()) for tree in trees(model)), default=-1)
    fixed, count = columns
    if least > count:
        raise HocketError(Reason.BAD_PAYLOAD, f"a leaf answers column {least - 1} of {count}")
    if max(count, len(recorded) if isinstance(recorded, list) else 0) > limits.labels:
        raise HocketError(Reason.TOO_LARGE, f"the model has more than {limits.labels} labels")
    if recorded is None:
        return tuple(str(column) for column in range(count))
    if not isinstance(recorded, list) or len(recorded) < count or (fixed and len(recorded) > count):
        raise HocketError(
            Reason.BAD_METADATA,
            f"custom.hocket.labels must list one label for each of the {count} output columns",
        )
    names = tuple(_label(label, limits) for label in recorded)
    kept = [name for name in names if name is not None]
    if not kept or len(set(kept)) < len(kept):
        raise HocketError(Reason.BAD_METADATA, "custom.hocket.labels must name at least one label, each once")
    return names


def _columns(model: m.Model) -> tuple[bool, int] | None:
    """Whether the number of output columns is fixed, and that number or the least; None for a regressor."""
    match model:
        case m.LogisticRegression():
            return True, 2
        case m.KMeans():
            return True, model.n_clusters
        case m.RandomForestClassifier(y_train=classes) if classes is not None and classes.size:
            return True, int(classes.max()) + 1
        case m.DecisionTreeClassifier() | m.RandomForestClassifier():
            return False, 1 + max((int(tree.value.max()) for tree in trees(model)), default=-1)
        case _:
            return None


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
        case _:
            return None if _columns(model) is None else (0.0, 1.0)


def parameter_bytes(model: m.Model) -> int:
    """Bytes that a worker takes to hold the fitted experts, laid out for computing (`docs/packages.md` has the rule).

    Routers compare this with the budgets of workers, so it is what `services.expert_worker.loader` lays out, exactly.
    """
    match model:
        case m.MixtureOfExperts():
            return sum(parameter_bytes(expert) for expert in model.experts)
        case m.KMeans():
            return 0 if model.centroids is None else _FLOAT64_BYTES * (model.centroids.size + len(model.centroids))
        case m.LogisticRegression() | m.LinearRegression() | m.Ridge() | m.Lasso() | m.ElasticNet():
            return 0 if model.coefficients is None else model.coefficients.nbytes + _FLOAT64_BYTES
        case _:
            return sum(_ROOT_BYTES + len(tree.feature) * (_NODE_BYTES + tree.value.itemsize) for tree in trees(model))


def trees(model: m.Model) -> list[m.Tree]:
    """The trees of a tree or forest, without those never fitted; none for other models."""
    match model:
        case m.DecisionTreeClassifier() | m.DecisionTreeRegressor():
            members: Sequence[m.DecisionTreeClassifier | m.DecisionTreeRegressor] = (model,)
        case m.RandomForestClassifier() | m.RandomForestRegressor():
            members = model.trees
        case _:
            members = ()
    return [member.tree for member in members if member.tree is not None]
