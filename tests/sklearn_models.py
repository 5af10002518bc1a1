"""Estimators of every kind that is converted, what they learn from, and rows that none of them has seen."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import pytest
from sklearn.base import clone, is_classifier, is_regressor
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.datasets import load_iris
from sklearn.ensemble import (
    ExtraTreesClassifier,
    ExtraTreesRegressor,
    GradientBoostingRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.linear_model import (
    ARDRegression,
    BayesianRidge,
    ElasticNet,
    ElasticNetCV,
    HuberRegressor,
    Lasso,
    LassoCV,
    LinearRegression,
    LogisticRegression,
    LogisticRegressionCV,
    Ridge,
    RidgeCV,
    SGDClassifier,
    SGDRegressor,
)
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.svm import SVC, LinearSVC, LinearSVR
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor, ExtraTreeClassifier, ExtraTreeRegressor

from hocket.packages import model as m

FLOWERS: Final = load_iris()
X: Final = FLOWERS.data.astype(np.float32).astype(np.float64)
SPECIES: Final = np.array([str(FLOWERS.target_names[target]) for target in FLOWERS.target])
X2: Final = X[FLOWERS.target != 0]
TWO: Final = SPECIES[FLOWERS.target != 0]
LENGTH: Final = X[:, 0] + 3 * X[:, 1] - X[:, 2]
BETWEEN: Final = (X + np.random.default_rng(5).normal(0, 0.1, X.shape)).astype(np.float32).astype(np.float64)
"""Rows that no estimator has seen."""

WARNINGS: Final = pytest.mark.filterwarnings(
    "ignore::sklearn.exceptions.ConvergenceWarning",
    "ignore:The (default value|fitted attributes) .*will:FutureWarning",
)
"""A mark for tests: models that are not trained to the end answer alike, and what later releases will do is theirs."""

REGRESSORS: Final[dict[str, tuple[Any, type]]] = {
    "LinearRegression": (LinearRegression(), m.LinearRegression),
    "without intercept": (LinearRegression(fit_intercept=False), m.LinearRegression),
    "Ridge": (Ridge(0.5), m.Ridge),
    "RidgeCV": (RidgeCV(), m.Ridge),
    "Lasso": (Lasso(0.01), m.Lasso),
    "LassoCV": (LassoCV(cv=3), m.Lasso),
    "ElasticNet": (ElasticNet(0.01, l1_ratio=0.25), m.ElasticNet),
    "ElasticNetCV": (ElasticNetCV(cv=3), m.ElasticNet),
    "HuberRegressor": (HuberRegressor(), m.LinearRegression),
    "BayesianRidge": (BayesianRidge(), m.LinearRegression),
    "ARDRegression": (ARDRegression(), m.LinearRegression),
    "LinearSVR": (LinearSVR(random_state=0), m.LinearRegression),
    "SGDRegressor": (SGDRegressor(eta0=0.001, random_state=0), m.LinearRegression),
    "DecisionTreeRegressor": (DecisionTreeRegressor(max_depth=5, random_state=0), m.DecisionTreeRegressor),
    "a tree of the best leaves": (DecisionTreeRegressor(max_leaf_nodes=9, random_state=0), m.DecisionTreeRegressor),
    "a tree that splits by shares": (DecisionTreeRegressor(min_samples_leaf=0.1), m.DecisionTreeRegressor),
    "ExtraTreeRegressor": (ExtraTreeRegressor(max_depth=5, random_state=0), m.DecisionTreeRegressor),
    "RandomForestRegressor": (RandomForestRegressor(8, max_depth=4, random_state=0), m.RandomForestRegressor),
    "ExtraTreesRegressor": (ExtraTreesRegressor(8, max_depth=4, random_state=0), m.RandomForestRegressor),
    "GradientBoostingRegressor": (GradientBoostingRegressor(n_estimators=20), m.RandomForestRegressor),
    "boosting from zero": (GradientBoostingRegressor(n_estimators=20, init="zero"), m.RandomForestRegressor),
    "MLPRegressor of counts": (MLPRegressor("poisson", (8,), max_iter=100, random_state=0), m.DenseNetwork),
    "MLPRegressor": (MLPRegressor(hidden_layer_sizes=(8, 4), max_iter=300, random_state=0), m.DenseNetwork),
}
"""Those that answer a number, and what each becomes."""

EXACT: Final[dict[str, tuple[Any, type]]] = {
    "LogisticRegression": (LogisticRegression(), m.LogisticRegression),
    "LogisticRegressionCV": (LogisticRegressionCV(Cs=2, cv=3), m.LogisticRegression),
    "SGDClassifier": (SGDClassifier(loss="log_loss", random_state=0), m.LogisticRegression),
    "GaussianNB": (GaussianNB(), m.GaussianNB),
    "KNeighborsClassifier": (KNeighborsClassifier(7), m.KNearestNeighbors),
    "neighbours by distance": (KNeighborsClassifier(5, weights="distance", metric="manhattan"), m.KNearestNeighbors),
    "neighbours by a power": (KNeighborsClassifier(5, weights="distance", p=3), m.KNearestNeighbors),
    "MLPClassifier": (MLPClassifier((6,), "tanh", max_iter=200, random_state=0), m.DenseNetwork),
    "logistic MLPClassifier": (MLPClassifier((6,), "logistic", max_iter=50, random_state=0), m.DenseNetwork),
    "identity MLPClassifier": (MLPClassifier((6,), "identity", max_iter=50, random_state=0), m.DenseNetwork),
    "full-grown tree": (DecisionTreeClassifier(random_state=0), m.DecisionTreeClassifier),
    "full-grown tree of the best leaves": (
        DecisionTreeClassifier(max_leaf_nodes=10**6, random_state=0),
        m.DecisionTreeClassifier,
    ),
    "full-grown random tree": (ExtraTreeClassifier(random_state=0), m.DecisionTreeClassifier),
    "full-grown trees": (ExtraTreesClassifier(8, random_state=0), m.RandomForestClassifier),
}
"""Those that answer probabilities, and what each becomes; of several classes a LogisticRegression becomes a network."""

CHOOSING: Final = (LinearSVC(), SVC(kernel="linear"), SGDClassifier(loss="hinge", random_state=0))
"""Those of which only the class that they choose is the same."""

CLUSTERING: Final = (KMeans(3, random_state=0, n_init=1), MiniBatchKMeans(3, random_state=0, n_init=1))


def fitted(estimator: Any, classes: int = 3) -> Any:
    """Another one like it, that has learned from the flowers of two or three species."""
    x, kinds = (X2, TWO) if classes == 2 else (X, SPECIES)
    if is_classifier(estimator):
        return clone(estimator).fit(x, kinds)
    return clone(estimator).fit(X, LENGTH) if is_regressor(estimator) else clone(estimator).fit(X)


def of_each_kind() -> dict[str, Any]:
    """One fitted estimator of each kind, by the name of its class."""
    mixed = RandomForestClassifier(3, max_depth=2, random_state=0)
    every = [each for each, _ in (*REGRESSORS.values(), *EXACT.values())]
    return {type(each).__name__: fitted(each, classes=2) for each in (*every, *CHOOSING, *CLUSTERING, mixed)}
