"""What scikit-learn fits, and these families hold, answers as scikit-learn answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hocket.packages import model as m
from tests.builders import dense
from tests.worker_numerics import answer, lone

pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install 'hocket[examples]'")

from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.svm import LinearSVC

pytestmark = pytest.mark.filterwarnings("ignore:lbfgs failed to converge")  # what is half trained will do

RNG = np.random.default_rng(17)
WIDTH = 6
CENTRES = RNG.normal(size=(3, WIDTH)) * 2


def points(count: int) -> tuple[Any, Any]:
    """float32 `[count, F]` in three clouds, and which each is in."""
    classes = RNG.integers(3, size=count)
    return (CENTRES[classes] + RNG.normal(size=(count, WIDTH))).astype(np.float32), classes


TRAINING, CLASSES = points(300)
ROWS, _ = points(200)


def narrow(array: Any) -> Any:
    return np.asarray(array, np.float32)


def test_naive_bayes() -> None:
    fitted = GaussianNB().fit(TRAINING, CLASSES)
    model = m.GaussianNB(
        narrow(fitted.class_prior_), narrow(fitted.theta_), narrow(fitted.var_), fitted.classes_.astype(np.uint64)
    )

    np.testing.assert_allclose(answer(lone(model), ROWS), fitted.predict_proba(ROWS), atol=2e-5)


@pytest.mark.parametrize("weights", ["uniform", "distance"])
@pytest.mark.parametrize(
    ("metric", "p"), [("euclidean", 2), ("manhattan", 1), ("minkowski", 1.5), ("minkowski", 3), ("minkowski", 2)]
)
def test_nearest_neighbours(weights: str, metric: str, p: float) -> None:
    fitted = KNeighborsClassifier(7, weights=weights, metric=metric, p=p).fit(TRAINING, CLASSES)
    model = m.KNearestNeighbors(
        7, TRAINING, CLASSES.astype(np.uint64), m.Metric(metric), float(p), weighted=weights == "distance"
    )

    np.testing.assert_allclose(answer(lone(model), ROWS), fitted.predict_proba(ROWS), atol=1e-5)


def test_a_linear_svm() -> None:
    fitted = LinearSVC().fit(TRAINING, CLASSES == 1)
    model = m.LinearSVM(narrow(fitted.coef_[0]), float(np.float32(fitted.intercept_[0])))
    clear = np.abs(fitted.decision_function(ROWS)) > 1e-4

    assert (answer(lone(model), ROWS)[clear, 1] == fitted.predict(ROWS)[clear]).all()
    assert clear.sum() > 190


@pytest.mark.parametrize("activation", ["identity", "logistic", "tanh", "relu"])
@pytest.mark.parametrize("classes", [2, 3])
def test_a_classifying_perceptron(activation: str, classes: int) -> None:
    network = MLPClassifier((9, 5), activation=activation, solver="lbfgs", max_iter=40, random_state=3)
    fitted = network.fit(TRAINING, np.minimum(CLASSES, classes - 1))

    given = answer(lone(perceptron(fitted)), ROWS)

    assert given.shape == (200, classes)
    np.testing.assert_allclose(given, fitted.predict_proba(ROWS), atol=1e-5)


@pytest.mark.parametrize("outputs", [1, 2])
def test_a_predicting_perceptron(outputs: int) -> None:
    targets = TRAINING[:, :outputs] * 2 + TRAINING[:, 2:3]
    network = MLPRegressor(hidden_layer_sizes=(8,), activation="tanh", solver="lbfgs", max_iter=40, random_state=3)
    fitted = network.fit(TRAINING, targets if outputs > 1 else targets[:, 0])

    given = answer(lone(perceptron(fitted)), ROWS)

    np.testing.assert_allclose(given, fitted.predict(ROWS).reshape(200, outputs), rtol=1e-5, atol=1e-5)


def test_multinomial_logistic_regression_is_a_network_of_one_layer() -> None:
    fitted = LogisticRegression().fit(TRAINING, CLASSES)
    model = dense((narrow(fitted.coef_.T), narrow(fitted.intercept_), "softmax"))

    np.testing.assert_allclose(answer(lone(model), ROWS), fitted.predict_proba(ROWS), atol=1e-6)


def perceptron(fitted: Any) -> m.DenseNetwork:
    names = [fitted.activation] * (len(fitted.coefs_) - 1) + [fitted.out_activation_]
    layers = zip(fitted.coefs_, fitted.intercepts_, names, strict=True)
    return dense(*((narrow(weights), narrow(biases), name) for weights, biases, name in layers))
