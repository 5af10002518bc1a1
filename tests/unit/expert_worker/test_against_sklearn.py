"""What scikit-learn has fitted, converted and laid out on a device, answers as scikit-learn answers."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install 'hocket[examples]'")

from sklearn.ensemble import GradientBoostingRegressor
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.svm import LinearSVC
from sklearn.tree import DecisionTreeRegressor

from hocket.packages.from_sklearn import convert
from tests.sklearn_models import (
    BETWEEN,
    CHOOSING,
    CLUSTERING,
    EXACT,
    LENGTH,
    REGRESSORS,
    TWO,
    WARNINGS,
    X,
    fitted,
)
from tests.worker_numerics import answer, lone

pytestmark = WARNINGS


def answers(estimator: Any) -> Any:
    """Of a worker, to rows that the estimator has not seen."""
    (expert,) = convert(estimator, name="x").experts
    return answer(lone(expert.model, labels=expert.labels), BETWEEN)


@pytest.mark.parametrize("name", REGRESSORS)
def test_a_regressor(name: str) -> None:
    estimator = fitted(REGRESSORS[name][0])

    np.testing.assert_allclose(answers(estimator)[:, 0], estimator.predict(BETWEEN), rtol=5e-6, atol=5e-6)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("name", EXACT)
def test_a_classifier(name: str, classes: int) -> None:
    if name == "SGDClassifier" and classes == 3:
        pytest.skip("it is of two classes alone")
    estimator = fitted(EXACT[name][0], classes)

    np.testing.assert_allclose(answers(estimator), estimator.predict_proba(BETWEEN), rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("estimator", CHOOSING)
def test_a_linear_svm(estimator: Any) -> None:
    estimator = fitted(estimator, classes=2)

    np.testing.assert_array_equal(estimator.classes_[answers(estimator).argmax(axis=1)], estimator.predict(BETWEEN))


@pytest.mark.parametrize("estimator", CLUSTERING)
def test_clusters(estimator: Any) -> None:
    estimator = fitted(estimator)

    np.testing.assert_array_equal(answers(estimator).argmax(axis=1), estimator.predict(BETWEEN))


@pytest.mark.parametrize("weights", ["uniform", "distance"])
@pytest.mark.parametrize(
    ("metric", "p"), [("euclidean", 2), ("manhattan", 1), ("minkowski", 1.5), ("minkowski", 3), ("minkowski", 2)]
)
def test_nearest_neighbours(weights: str, metric: str, p: float) -> None:
    estimator = fitted(KNeighborsClassifier(7, weights=weights, metric=metric, p=p))

    np.testing.assert_allclose(answers(estimator), estimator.predict_proba(BETWEEN), atol=1e-5)


@pytest.mark.parametrize("activation", ["identity", "logistic", "tanh", "relu"])
@pytest.mark.parametrize("classes", [2, 3])
def test_a_classifying_perceptron(activation: str, classes: int) -> None:
    network = MLPClassifier((9, 5), activation=activation, solver="lbfgs", max_iter=40, random_state=3)
    estimator = fitted(network, classes)

    np.testing.assert_allclose(answers(estimator), estimator.predict_proba(BETWEEN), atol=1e-5)


def test_a_predicting_perceptron() -> None:
    network = MLPRegressor(hidden_layer_sizes=(8,), activation="tanh", solver="lbfgs", max_iter=40, random_state=3)
    estimator = fitted(network)

    np.testing.assert_allclose(answers(estimator)[:, 0], estimator.predict(BETWEEN), rtol=1e-5, atol=1e-5)


def test_many_boosted_trees_differ_by_no_more_than_their_note_says() -> None:
    estimator = GradientBoostingRegressor(n_estimators=500, random_state=0).fit(X, LENGTH - LENGTH.mean())
    (expert,) = convert(estimator, name="x").experts

    off = np.abs(answers(estimator)[:, 0] - estimator.predict(BETWEEN))

    [told] = [float(number) for note in expert.notes for number in re.findall(r"float32.* up to (\S+)", note)]
    assert off.max() < told < 0.01


def test_a_tree_that_was_fitted_on_rows_with_missing_values_answers_alike_to_whole_ones() -> None:
    holed = X.copy()
    holed[np.quantile(LENGTH, 0.7) < LENGTH, 0] = np.nan
    holed[::7, 2] = np.nan
    estimator = DecisionTreeRegressor(random_state=0).fit(holed, LENGTH)
    assert np.isinf(estimator.tree_.threshold).any(), "it asks whether a value is missing"

    np.testing.assert_allclose(answers(estimator)[:, 0], estimator.predict(BETWEEN), rtol=1e-6)


def test_a_row_on_the_border_of_an_svm_is_of_the_second_class_as_its_note_says() -> None:
    estimator = fitted(LinearSVC(), classes=2)
    estimator.coef_, estimator.intercept_ = np.array([[1.0, 0, 0, 0]]), np.zeros(1)
    (expert,) = convert(estimator, name="x").experts

    rows = np.array([[0, 1, 1, 1], [-1e-30, 0, 0, 0]], np.float32)

    assert answer(lone(expert.model), rows)[:, 1].tolist() == [1, 0]
    assert estimator.predict(rows).tolist() == [TWO[0], TWO[0]]
    assert any("a row on the border itself is of the second class" in note for note in expert.notes)


def test_of_neighbours_equally_far_those_stored_first_count_as_their_note_says() -> None:
    rows, kinds = np.array([[1.0], [-1.0], [3.0]]), ["b", "a", "a"]
    (expert,) = convert(KNeighborsClassifier(1).fit(rows, kinds), name="x").experts

    assert expert.labels == ("a", "b")
    assert answer(lone(expert.model), [[0.0]]).tolist() == [[0, 1]]
    assert any("those stored first count" in note for note in expert.notes)
