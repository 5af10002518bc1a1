"""Each kind of estimator, behind scalers, as a model: formulas of scikit-learn 1.9."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np

from hocket.packages import model as m
from hocket.packages.from_sklearn.reading import Estimator, bad, kind_of, narrow
from hocket.packages.from_sklearn.scaling import Steps, affine, folded
from hocket.packages.from_sklearn.trees import column_tree, mixed_leaves, value_tree

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

Simple: TypeAlias = "tuple[m.Model, NDArray[Any] | None, tuple[str, ...]]"
"""A model, the classes of its columns (None for a regressor), and where its answers differ."""

_BINARY: Final = 2


def _line(estimator: Estimator, steps: Steps) -> tuple[m.Floats, float]:
    """The coefficients `[F]` and the intercept of an estimator with one linear output."""
    raw = estimator.coef_
    rows = np.atleast_2d(np.asarray(raw.toarray() if hasattr(raw, "toarray") else raw, np.float64))
    if len(rows) != 1:
        raise bad(f"the {kind_of(estimator)} has {len(rows)} outputs, an .apr model of its kind has one")
    weights, biases = folded(rows.T, np.reshape(estimator.intercept_, -1), steps)
    return narrow(weights[:, 0]), float(narrow(biases)[0])


def _linear(estimator: Estimator, steps: Steps) -> Simple:
    coefficients, intercept = _line(estimator, steps)
    return m.LinearRegression(coefficients, intercept, _fits_intercept(estimator)), None, ()


def _ridge(estimator: Estimator, steps: Steps) -> Simple:
    coefficients, intercept = _line(estimator, steps)
    return m.Ridge(coefficients, intercept, _penalty(estimator), _fits_intercept(estimator)), None, ()


def _lasso(estimator: Estimator, steps: Steps) -> Simple:
    coefficients, intercept = _line(estimator, steps)
    trained: dict[str, Any] = {"max_iter": int(estimator.max_iter), "tol": float(estimator.tol)}
    model = m.Lasso(coefficients, intercept, _penalty(estimator), _fits_intercept(estimator), **trained)
    return model, None, ()


def _elastic_net(estimator: Estimator, steps: Steps) -> Simple:
    coefficients, intercept = _line(estimator, steps)
    ratio = float(getattr(estimator, "l1_ratio_", estimator.l1_ratio))
    trained: dict[str, Any] = {"max_iter": int(estimator.max_iter), "tol": float(estimator.tol)}
    model = m.ElasticNet(coefficients, intercept, _penalty(estimator), ratio, _fits_intercept(estimator), **trained)
    return model, None, ()


def _logistic(estimator: Estimator, steps: Steps) -> Simple:
    """Binary as it is; more classes as one dense layer with softmax, which is the same formula."""
    scheme = getattr(estimator, "multi_class", "auto")
    several = len(estimator.classes_) > _BINARY
    if scheme not in {"auto", "deprecated"} or (several and estimator.solver == "liblinear"):
        raise bad("one-versus-rest and multi_class have no form in .apr: fit with solver='lbfgs', without multi_class")
    if several:
        weights, biases = folded(np.asarray(estimator.coef_).T, estimator.intercept_, steps)
        layer = m.DenseLayer(narrow(weights), narrow(biases), m.Activation.SOFTMAX)
        return m.DenseNetwork((layer,)), estimator.classes_, ()
    coefficients, intercept = _line(estimator, steps)
    trained: dict[str, Any] = {"max_iter": int(estimator.max_iter), "tol": float(estimator.tol)}
    return m.LogisticRegression(coefficients, intercept, **trained), estimator.classes_, ()


def _svm(estimator: Estimator, steps: Steps) -> Simple:
    if getattr(estimator, "kernel", "linear") != "linear":
        raise bad("an .apr SVM is linear: fit with kernel='linear'")
    return _binary_svm(estimator, steps, float(estimator.C))


def _sgd(estimator: Estimator, steps: Steps) -> Simple:
    if estimator.loss in {"hinge", "squared_hinge", "perceptron"}:
        return _binary_svm(estimator, steps, 1.0)
    if estimator.loss != "log_loss" or len(estimator.classes_) > _BINARY:
        raise bad("of SGDClassifier, .apr has a place for two classes with loss='log_loss' or 'hinge'")
    coefficients, intercept = _line(estimator, steps)
    trained: dict[str, Any] = {"max_iter": int(estimator.max_iter), "tol": float(estimator.tol or 0)}
    return m.LogisticRegression(coefficients, intercept, **trained), estimator.classes_, ()


def _binary_svm(estimator: Estimator, steps: Steps, c: float) -> Simple:
    if len(estimator.classes_) > _BINARY:
        raise bad("an .apr SVM tells two classes apart: fit one of several classes as LogisticRegression")
    weights, bias = _line(estimator, steps)
    trained: dict[str, Any] = {
        "max_iter": max(0, int(estimator.max_iter)),
        "tol": float(estimator.tol or 0),
    }  # -1: no limit
    notes = (
        "it answers 1 for the class it chooses and 0 for the other; scikit-learn answers a distance",
        "a row on the border itself is of the second class; scikit-learn says the first",
    )
    return m.LinearSVM(weights, bias, c, **trained), estimator.classes_, notes


def _tree(estimator: Estimator, steps: Steps) -> Simple:
    _check_one_output(estimator, estimator.n_outputs_)
    depth, width = estimator.max_depth, int(estimator.n_features_in_)
    if hasattr(estimator, "classes_"):
        tree = column_tree(estimator.tree_, steps)
        model: m.Model = m.DecisionTreeClassifier(tree, depth, width)
        return model, estimator.classes_, mixed_leaves([estimator.tree_])
    split, leaf = estimator.min_samples_split, estimator.min_samples_leaf
    least = {
        "min_samples_split": split if isinstance(split, int) else 2,  # a share of the rows has no place
        "min_samples_leaf": leaf if isinstance(leaf, int) else 1,
    }
    return m.DecisionTreeRegressor(value_tree(estimator.tree_, steps), depth, n_features=width, **least), None, ()


def _forest(estimator: Estimator, steps: Steps) -> Simple:
    _check_one_output(estimator, estimator.n_outputs_)
    trees = [member.tree_ for member in estimator.estimators_]
    depth = estimator.max_depth
    trained: dict[str, Any] = {
        "n_estimators": len(trees),
        "max_depth": depth,
        "random_state": _seed(estimator),
        "n_features": int(estimator.n_features_in_),
    }
    if hasattr(estimator, "classes_"):
        voters = tuple(m.DecisionTreeClassifier(column_tree(tree, steps), depth) for tree in trees)
        return m.RandomForestClassifier(voters, **trained), estimator.classes_, mixed_leaves(trees)
    members = tuple(m.DecisionTreeRegressor(value_tree(tree, steps), depth) for tree in trees)
    return m.RandomForestRegressor(members, **trained), None, ()


def _boosted(estimator: Estimator, steps: Steps) -> Simple:
    """A start + rate * sum of trees is the mean of n trees whose leaves are start + n * rate * leaf: a forest."""
    start = 0.0
    if estimator.init_ != "zero":
        if kind_of(estimator.init_) != "DummyRegressor":
            raise bad("a GradientBoostingRegressor that starts from another estimator has no form in .apr")
        start = float(np.ravel(estimator.init_.constant_)[0])
    trees = [member.tree_ for member in estimator.estimators_[:, 0]]
    rate = len(trees) * float(estimator.learning_rate)
    members = tuple(
        m.DecisionTreeRegressor(value_tree(tree, steps, lambda leaves: start + rate * leaves)) for tree in trees
    )
    model = m.RandomForestRegressor(
        members,
        n_estimators=len(trees),
        max_depth=estimator.max_depth,
        random_state=_seed(estimator),
        n_features=int(estimator.n_features_in_),
    )
    # n roundings of at most half a unit in the last place of the sum so far, and one of each leaf.
    largest = np.mean([np.abs(member.tree.value).max() for member in members if member.tree is not None])
    slack = (len(trees) + 2) * 2.0**-24 * largest
    return model, None, (f"trees are added in float32, which moves an answer by up to {slack:.2g}",)


def _kmeans(estimator: Estimator, steps: Steps) -> Simple:
    _no_scaler(steps, "clusters are told apart by distance")
    model = m.KMeans(
        n_clusters=int(estimator.n_clusters),
        centroids=narrow(estimator.cluster_centers_),
        max_iter=int(estimator.max_iter),
        tol=float(estimator.tol),
        random_state=_seed(estimator),
        inertia=float(narrow(estimator.inertia_)),
        n_iter=int(estimator.n_iter_),
    )
    return model, np.arange(model.n_clusters), ()


def _naive_bayes(estimator: Estimator, steps: Steps) -> Simple:
    """Behind scalers every class's density changes by the same factor, so probabilities stay."""
    factor, offset = affine(steps, estimator.theta_.shape[1])
    classes = np.asarray(estimator.classes_)
    numbers = classes if classes.dtype.kind in "iu" and classes.min() >= 0 else np.arange(len(classes))
    model = m.GaussianNB(
        class_priors=narrow(estimator.class_prior_),
        means=narrow((estimator.theta_ - offset) / factor),
        variances=narrow(estimator.var_ / factor**2),
        classes=numbers.astype(np.uint64),
        var_smoothing=float(estimator.var_smoothing),
    )
    return model, classes, ()


def _neighbours(estimator: Estimator, steps: Steps) -> Simple:
    _no_scaler(steps, "neighbours are found by distance")
    _check_one_output(estimator, len(estimator.classes_) if estimator.outputs_2d_ else 1)
    metric, weighting = estimator.effective_metric_, estimator.weights
    own = {key for key, value in (estimator.effective_metric_params_ or {}).items() if value is not None}
    if metric not in {*m.Metric} or own - {"p"}:
        raise bad(f"neighbours in .apr are {', '.join(m.Metric)} ones, not {metric} with parameters of its own")
    if weighting not in {"uniform", "distance"}:
        raise bad("neighbours in .apr weigh all alike or by distance: fit with weights='uniform' or 'distance'")
    if hasattr(estimator._fit_X, "toarray"):  # noqa: SLF001 - the only place of the training rows
        raise bad("the training rows are sparse: fit with an array")
    notes = [
        "the file holds all training rows: whoever has it has them",
        "of training rows equally far, to float32, those stored first count; scikit-learn takes any of them",
    ]
    if weighting == "distance":
        notes.append("a row equal to a training row counts that one as 1 among others; scikit-learn counts it alone")
    model = m.KNearestNeighbors(
        k=int(estimator.n_neighbors),
        x_train=narrow(estimator._fit_X),  # noqa: SLF001 - as above
        y_train=np.asarray(estimator._y).astype(np.uint64),  # noqa: SLF001 - as above, numbers of classes
        metric=m.Metric(metric),
        p=float(estimator.p),
        weighted=weighting == "distance",
    )
    return model, estimator.classes_, tuple(notes)


def _perceptron(estimator: Estimator, steps: Steps) -> Simple:
    classes = getattr(estimator, "classes_", None)
    if classes is None or estimator.out_activation_ == "logistic":
        _check_one_output(estimator, estimator.n_outputs_)
    last = len(estimator.coefs_) - 1
    layers = []
    for index, (coefficients, intercepts) in enumerate(zip(estimator.coefs_, estimator.intercepts_, strict=True)):
        weights, biases = folded(coefficients, intercepts, () if index else steps)
        activation = m.Activation(estimator.out_activation_ if index == last else estimator.activation)
        layers.append(m.DenseLayer(narrow(weights), narrow(biases), activation))
    return m.DenseNetwork(tuple(layers)), classes, ()


def _check_one_output(estimator: Estimator, outputs: int) -> None:
    if outputs != 1:
        raise bad(f"the {kind_of(estimator)} answers {outputs} questions at once: fit one for each")


def _no_scaler(steps: Steps, because: str) -> None:
    if steps:
        raise bad(f"a scaler cannot be folded here, for {because}: scale the rows beforehand, or fit without a scaler")


def _fits_intercept(estimator: Estimator) -> bool:
    return bool(getattr(estimator, "fit_intercept", True))


def _penalty(estimator: Estimator) -> float:
    return float(narrow(np.mean(estimator.alpha_ if hasattr(estimator, "alpha_") else estimator.alpha)))


def _seed(estimator: Estimator) -> int | None:
    seed = estimator.random_state
    return int(seed) if isinstance(seed, int | np.integer) and seed >= 0 else None


WHY_NOT: Final = {
    "GradientBoostingClassifier": "its leaves are real numbers, an .apr file's vote by one step each; fit a "
    "RandomForestClassifier, or an MLPClassifier",
    "HistGradientBoostingRegressor": "it sorts values into bins first; fit a GradientBoostingRegressor",
    "HistGradientBoostingClassifier": "it sorts values into bins first; fit a RandomForestClassifier",
    "KNeighborsRegressor": "neighbours in .apr vote for classes; fit a RandomForestRegressor",
}

CONVERTERS: Final[dict[str, Callable[[Any, Steps], Simple]]] = {
    "ARDRegression": _linear,
    "BayesianRidge": _linear,
    "DecisionTreeClassifier": _tree,
    "DecisionTreeRegressor": _tree,
    "ElasticNet": _elastic_net,
    "ElasticNetCV": _elastic_net,
    "ExtraTreeClassifier": _tree,
    "ExtraTreeRegressor": _tree,
    "ExtraTreesClassifier": _forest,
    "ExtraTreesRegressor": _forest,
    "GaussianNB": _naive_bayes,
    "GradientBoostingRegressor": _boosted,
    "HuberRegressor": _linear,
    "KMeans": _kmeans,
    "KNeighborsClassifier": _neighbours,
    "Lasso": _lasso,
    "LassoCV": _lasso,
    "LinearRegression": _linear,
    "LinearSVC": _svm,
    "LinearSVR": _linear,
    "LogisticRegression": _logistic,
    "LogisticRegressionCV": _logistic,
    "MLPClassifier": _perceptron,
    "MLPRegressor": _perceptron,
    "MiniBatchKMeans": _kmeans,
    "RandomForestClassifier": _forest,
    "RandomForestRegressor": _forest,
    "Ridge": _ridge,
    "RidgeCV": _ridge,
    "SGDClassifier": _sgd,
    "SGDRegressor": _linear,
    "SVC": _svm,
}
