"""scikit-learn estimators as `.apr` models."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression

from hocket.packages import model as m


def to_apr(estimator: Any) -> m.LogisticRegression | m.RandomForestClassifier:  # noqa: ANN401 - scikit-learn is untyped
    """The `.apr` model that answers as a fitted estimator does.

    A forest in `.apr` counts one vote per tree, where scikit-learn averages the leaves: the winner can differ where
    leaves are mixed.

    Raises:
        TypeError: For any other estimator.
    """
    if isinstance(estimator, LogisticRegression):
        return m.LogisticRegression(
            coefficients=estimator.coef_[0].astype(np.float32), intercept=float(np.float32(estimator.intercept_[0]))
        )
    if isinstance(estimator, RandomForestClassifier):
        trees = tuple(
            m.DecisionTreeClassifier(_tree(member.tree_), max_depth=estimator.max_depth)
            for member in estimator.estimators_
        )
        return m.RandomForestClassifier(
            trees,
            n_estimators=len(trees),
            max_depth=estimator.max_depth,
            random_state=estimator.random_state,
            n_features=estimator.n_features_in_,
        )
    raise TypeError(f"cannot export {type(estimator).__name__}")


def _tree(tree: Any) -> m.Tree:  # noqa: ANN401 - scikit-learn is untyped
    """Both formats keep nodes in preorder and send x <= threshold to the left."""
    leaf = tree.children_left < 0
    # scikit-learn compares float32 inputs with float64 thresholds: rounding down keeps every decision.
    threshold = tree.threshold.astype(np.float32)
    threshold = np.where(threshold > tree.threshold, np.nextafter(threshold, np.float32(-np.inf)), threshold)
    return m.Tree(
        feature=np.where(leaf, -1, tree.feature).astype(np.int64),
        threshold=np.where(leaf, np.float32(0), threshold),
        left=tree.children_left.astype(np.int64),
        right=tree.children_right.astype(np.int64),
        value=np.where(leaf, tree.value[:, 0, :].argmax(axis=1), 0).astype(np.int64),
        n_samples=np.where(leaf, tree.n_node_samples, 0).astype(np.int64),
    )
