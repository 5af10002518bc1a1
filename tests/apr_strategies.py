"""Models of any size and any numbers, to be drawn by hypothesis."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hocket.packages import model as m
from hocket.packages.apr.quantization import quantized_model
from tests import builders

f32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
penalty = st.floats(0, 2.0**20, width=32, allow_subnormal=False)
u64 = st.integers(0, 2**64 - 1)
optional_u64 = st.none() | u64
WIDTH = st.integers(1, 5)


def vector(size: Any) -> Any:
    return arrays(np.float32, size, elements=f32)


def linear_model(kind: Any, width: int) -> Any:
    settings_of = {"alpha": penalty, "l1_ratio": penalty, "max_iter": u64, "tol": f32, "fit_intercept": st.booleans()}
    known = {name: strategy for name, strategy in settings_of.items() if name in kind.__dataclass_fields__}
    return st.builds(kind, coefficients=vector(width), intercept=f32, **known)


def linear_models(width: int) -> Any:
    return st.sampled_from((m.LinearRegression, m.Ridge, m.Lasso, m.ElasticNet)).flatmap(
        lambda kind: linear_model(kind, width)
    )


def trees(answers: Any) -> Any:
    leaf = st.tuples(answers, st.integers(0, 2**63 - 1))
    node = st.recursive(leaf, lambda below: st.tuples(st.integers(0, 9), f32, below, below), max_leaves=8)
    return node.map(builders.grow)


columns = st.integers(0, 20)
classifiers = st.builds(m.DecisionTreeClassifier, trees(columns), optional_u64)
regressors = st.builds(m.DecisionTreeRegressor, trees(f32), optional_u64, u64, u64)
out_of_bag = st.lists(arrays(np.uint64, st.integers(0, 3)), max_size=3).map(tuple)


def forests(kind: Any, members: Any, targets: Any) -> Any:
    return st.builds(
        kind,
        st.lists(members, min_size=1, max_size=4).map(tuple),
        n_estimators=u64,
        max_depth=optional_u64,
        random_state=optional_u64,
        oob_indices=out_of_bag,
        x_train=st.just(np.ones((2, 10), np.float32)),
        y_train=targets,
        n_features=st.just(10),
    )


@st.composite
def mixtures(draw: Any) -> Any:
    width, count = draw(WIDTH), draw(st.integers(1, 4))
    kind = draw(st.sampled_from((m.LinearRegression, m.Ridge, m.Lasso, m.ElasticNet)))
    return m.MixtureOfExperts(
        tuple(draw(linear_model(kind, width)) for _ in range(count)),
        m.SoftmaxGate(draw(vector((width, count))), draw(st.floats(0.125, 8, width=32))),
        draw(st.builds(m.MoeConfig, u64, f32, f32, f32)),
    )


@st.composite
def clusterings(draw: Any) -> Any:
    clusters = draw(st.integers(1, 4))
    return draw(
        st.builds(
            m.KMeans,
            st.just(clusters),
            vector((clusters, draw(WIDTH))),
            u64,
            f32,
            optional_u64,
            st.none() | arrays(np.uint64, 3),
            f32,
            u64,
        )
    )


@st.composite
def naive_bayes(draw: Any) -> Any:
    shape = draw(st.integers(1, 4)), draw(WIDTH)
    classes = draw(arrays(np.uint64, shape[0], unique=True))
    return m.GaussianNB(draw(vector(shape[0])), draw(vector(shape)), draw(vector(shape)), classes, draw(f32))


@st.composite
def neighbors(draw: Any) -> Any:
    count, metric = draw(st.integers(1, 5)), draw(st.sampled_from(m.Metric))
    power = draw(st.floats(0.125, 8, width=32)) if metric is m.Metric.MINKOWSKI else 2.0
    samples = draw(vector((count, draw(WIDTH))))
    classes = draw(arrays(np.uint64, count, elements=st.integers(0, 9)))
    return m.KNearestNeighbors(draw(u64), samples, classes, metric, power, weighted=draw(st.booleans()))


@st.composite
def networks(draw: Any) -> Any:
    sizes = draw(st.lists(WIDTH, min_size=2, max_size=4))
    layers = [
        m.DenseLayer(draw(vector(shape)), draw(vector(shape[1])), draw(st.sampled_from(m.Activation)))
        for shape in itertools.pairwise(sizes)
    ]
    return m.DenseNetwork(tuple(layers))


def quantised(shape: tuple[int, int]) -> Any:
    """Models with weights of this shape, of a size that fits float16 scales."""
    weights = arrays(np.float32, shape, elements=st.floats(-1e5, 1e5, width=32))
    models = st.one_of(
        weights.map(lambda values: m.LogisticRegression(values[0], 0.5)),
        weights.map(lambda values: m.KMeans(len(values), values)),
        weights.map(lambda values: m.KNearestNeighbors(1, values, np.arange(len(values), dtype=np.uint64))),
        weights.map(lambda values: builders.dense((values, values[0], "relu"))),
        weights.map(lambda values: builders.mixture(*(builders.linear(*row) for row in values.T), weights=values)),
    )
    return st.builds(quantized_model, models, st.sampled_from(m.QuantKind))


MODELS = {
    "linear": WIDTH.flatmap(linear_models),
    "logistic": st.builds(m.LogisticRegression, WIDTH.flatmap(vector), f32, f32, u64, f32),
    "tree classifier": classifiers,
    "tree regressor": regressors,
    "forest classifier": forests(m.RandomForestClassifier, classifiers, st.just(np.array([20], np.uint64))),
    "forest regressor": forests(m.RandomForestRegressor, regressors, st.none() | vector(2)),
    "clustering": clusterings(),
    "mixture": mixtures(),
    "naive bayes": naive_bayes(),
    "neighbours": neighbors(),
    "margin": st.builds(m.LinearSVM, WIDTH.flatmap(vector), f32, f32, f32, u64, f32),
    "boosting": st.builds(
        m.GradientBoostingClassifier,
        st.lists(classifiers, min_size=1, max_size=4).map(tuple),
        f32,
        f32,
        u64,
        u64,
        n_features=st.just(10),
    ),
    "network": networks(),
    "quantised": st.tuples(WIDTH, st.integers(1, 70)).flatmap(quantised),
}
"""Models by family."""
