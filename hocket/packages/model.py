"""Values that package readers yield: models as numpy arrays, and the facts about a package.

Nothing here computes, reads or verifies. Array fields read from a package are read-only. Floats are float32 values
held as Python floats. A parameter that the file leaves absent is None: the model was never fitted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Mapping

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]
Counts = NDArray[np.uint64]


class QuantKind(StrEnum):
    """How 32 neighbouring values share one float16 scale."""

    Q8_0 = "q8_0"
    """8 bits each: whole numbers -127 to 127."""
    Q4_0 = "q4_0"
    """4 bits each: whole numbers -8 to 7."""


@dataclass(frozen=True, slots=True)
class Quantized:
    """float32 values as quantised blocks, in place of an array; `hocket.packages.apr.quantization` makes them.

    Attributes:
        kind: What a block looks like.
        shape: Of the array.
        blocks: The blocks of 32 values, row by row, the last one padded.
    """

    kind: QuantKind
    shape: tuple[int, ...]
    blocks: bytes

    @property
    def size(self) -> int:
        """How many values they stand for."""
        return math.prod(self.shape)


Weights = Floats | Quantized


@dataclass(frozen=True, slots=True, eq=False)
class LinearRegression:
    """y = x . coefficients + intercept. `coefficients` is float32 [F], or as many quantised values."""

    coefficients: Weights | None
    intercept: float
    fit_intercept: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class Ridge:
    """A linear model trained with an L2 penalty `alpha`; predicts like `LinearRegression`."""

    coefficients: Weights | None
    intercept: float
    alpha: float
    fit_intercept: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class Lasso:
    """A linear model trained with an L1 penalty `alpha`; predicts like `LinearRegression`."""

    coefficients: Weights | None
    intercept: float
    alpha: float
    fit_intercept: bool = True
    max_iter: int = 1000
    tol: float = 1e-4


@dataclass(frozen=True, slots=True, eq=False)
class ElasticNet:
    """A linear model trained with both penalties; predicts like `LinearRegression`."""

    coefficients: Weights | None
    intercept: float
    alpha: float
    l1_ratio: float
    fit_intercept: bool = True
    max_iter: int = 1000
    tol: float = 1e-4


LinearModel = LinearRegression | Ridge | Lasso | ElasticNet


@dataclass(frozen=True, slots=True, eq=False)
class LogisticRegression:
    """Binary: p(column 1) = sigmoid(intercept + x . coefficients), p(column 0) = 1 - p(column 1)."""

    coefficients: Weights | None
    intercept: float
    learning_rate: float = 0.01
    max_iter: int = 1000
    tol: float = 1e-4


@dataclass(frozen=True, slots=True, eq=False)
class Tree:
    """A binary decision tree as flat arrays, one entry per node; node 0 is the root.

    A row goes to `left` where x[feature] <= threshold, else to `right` (NaN goes right). Readers yield nodes in
    preorder, so that the left child of split i is i + 1.

    Attributes:
        feature: int64 [nodes], the input column a split compares; -1 marks a leaf.
        threshold: float32 [nodes]; 0 in a leaf.
        left: int64 [nodes], index of the left child; -1 in a leaf.
        right: int64 [nodes], index of the right child; -1 in a leaf.
        value: [nodes], what a leaf answers: int64 column for classifiers, float32 for regressors; 0 in a split.
        n_samples: int64 [nodes], training rows that reached a leaf; 0 in a split.
    """

    feature: Integers
    threshold: Floats
    left: Integers
    right: Integers
    value: Integers | Floats
    n_samples: Integers


@dataclass(frozen=True, slots=True, eq=False)
class DecisionTreeClassifier:
    """One tree whose leaves are output columns. `n_features` is the input width where it is known."""

    tree: Tree | None
    max_depth: int | None = None
    n_features: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class DecisionTreeRegressor:
    """One tree whose leaves are values. `n_features` is the input width where it is known."""

    tree: Tree | None
    max_depth: int | None = None
    min_samples_split: int = 2
    min_samples_leaf: int = 1
    n_features: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class RandomForestClassifier:
    """One vote per tree: p(column) = votes / trees; the class is the smallest column with most votes.

    Attributes:
        trees: The voters.
        n_estimators: Trees asked for when training.
        max_depth: Depth limit when training.
        random_state: Seed when training.
        oob_indices: Per tree, the training rows it did not see, uint64.
        x_train: Training inputs, float32 [rows, F]. Genuine files carry them; prediction does not need them.
        y_train: Training columns, uint64 [rows].
        n_features: Input width where it is known.
    """

    trees: tuple[DecisionTreeClassifier, ...]
    n_estimators: int
    max_depth: int | None = None
    random_state: int | None = None
    oob_indices: tuple[Counts, ...] = ()
    x_train: Floats | None = None
    y_train: Counts | None = None
    n_features: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class RandomForestRegressor:
    """The mean over the trees. Attributes as in `RandomForestClassifier`, but `y_train` is float32 [rows]."""

    trees: tuple[DecisionTreeRegressor, ...]
    n_estimators: int
    max_depth: int | None = None
    random_state: int | None = None
    oob_indices: tuple[Counts, ...] = ()
    x_train: Floats | None = None
    y_train: Floats | None = None
    n_features: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class KMeans:
    """The nearest centroid by squared distance, the lowest index at ties.

    Attributes:
        n_clusters: Clusters, and output columns.
        centroids: float32 [n_clusters, F], or quantised.
        max_iter: Iteration limit when training.
        tol: Convergence tolerance when training.
        random_state: Seed when training.
        labels: Cluster of each training row, uint64 [rows]; not output labels.
        inertia: Sum of squared distances when training ended.
        n_iter: Iterations that training took.
    """

    n_clusters: int
    centroids: Weights | None
    max_iter: int = 300
    tol: float = 1e-4
    random_state: int | None = None
    labels: Counts | None = None
    inertia: float = 0.0
    n_iter: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class SoftmaxGate:
    """softmax(x . weights / temperature). `weights` is float32 [F, E], or quantised; `temperature` is above 0."""

    weights: Weights
    temperature: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class MoeConfig:
    """What an `.apr` mixture stores beside its gate. Only `top_k` has an effect on prediction."""

    top_k: int = 1
    capacity_factor: float = 1.0
    expert_dropout: float = 0.0
    load_balance_weight: float = 0.01


@dataclass(frozen=True, slots=True, eq=False)
class MixtureOfExperts:
    """Linear experts of one kind behind a softmax gate; the heaviest `top_k` are weighed and summed."""

    experts: tuple[LinearModel, ...]
    gate: SoftmaxGate
    config: MoeConfig

    @property
    def top_k(self) -> int:
        """How many experts are chosen: a stored number above the expert count means all."""
        return min(self.config.top_k, len(self.experts))


@dataclass(frozen=True, slots=True, eq=False)
class GaussianNB:
    """Naive Bayes: p(column c) ~ class_priors[c] * prod_i normal(x_i; means[c, i], variances[c, i]).

    Attributes:
        class_priors: float32 [C].
        means: float32 [C, F].
        variances: float32 [C, F], smoothing included.
        classes: What each column stands for, uint64 [C]: a column's label, if none is recorded.
        var_smoothing: Smoothing when training.
    """

    class_priors: Floats | None
    means: Floats | None
    variances: Floats | None
    classes: Counts | None
    var_smoothing: float = 1e-9


class Metric(StrEnum):
    """A distance. Numbered in this order in a file."""

    EUCLIDEAN = "euclidean"
    """The square root of the sum of (x - c)**2."""
    MANHATTAN = "manhattan"
    """The sum of |x - c|."""
    MINKOWSKI = "minkowski"
    """The p-th root of the sum of |x - c|**p."""


@dataclass(frozen=True, slots=True, eq=False)
class KNearestNeighbors:
    """The `k` training rows nearest to the input vote for their columns; of rows equally far, those stored first.

    Attributes:
        k: How many vote.
        x_train: Training inputs, float32 [rows, F], or quantised.
        y_train: Training columns, uint64 [rows].
        metric: What is near.
        p: Of `MINKOWSKI`, above 0; another metric has no use for it.
        weighted: Whether a vote counts 1 / distance (1 where that is below 1e-10); else each counts the same.
    """

    k: int
    x_train: Weights | None
    y_train: Counts | None
    metric: Metric = Metric.EUCLIDEAN
    p: float = 2.0
    weighted: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class LinearSVM:
    """Binary: column 1 where bias + x . weights >= 0, else column 0. `weights` is float32 [F], or quantised."""

    weights: Weights | None
    bias: float
    c: float = 1.0
    learning_rate: float = 0.01
    max_iter: int = 1000
    tol: float = 1e-4


@dataclass(frozen=True, slots=True, eq=False)
class GradientBoostingClassifier:
    """Binary: p(column 1) = sigmoid(init_prediction + learning_rate * sum of steps), column 0 the rest.

    A tree's step is +1 where it answers another column than 0, else -1.

    Attributes:
        trees: The trees, in the order in which their steps are added.
        init_prediction: Where the sum starts.
        learning_rate: How much a step counts.
        n_estimators: Trees asked for when training.
        max_depth: Depth limit when training.
        n_features: Input width where it is known.
    """

    trees: tuple[DecisionTreeClassifier, ...]
    init_prediction: float
    learning_rate: float = 0.1
    n_estimators: int = 100
    max_depth: int = 3
    n_features: int | None = None


class Activation(StrEnum):
    """What a layer does to its sums. Numbered in this order in a file."""

    IDENTITY = "identity"
    LOGISTIC = "logistic"
    TANH = "tanh"
    RELU = "relu"
    SOFTMAX = "softmax"
    EXP = "exp"


@dataclass(frozen=True, slots=True, eq=False)
class DenseLayer:
    """activation(x . weights + biases).

    Attributes:
        weights: float32 [inputs, outputs], or quantised: scikit-learn's `coefs_`.
        biases: float32 [outputs].
        activation: Of each output; `SOFTMAX` over all of them.
    """

    weights: Weights
    biases: Floats
    activation: Activation


@dataclass(frozen=True, slots=True, eq=False)
class DenseNetwork:
    """Dense layers, one after the other: scikit-learn's MLPs, and multinomial logistic regression in one layer.

    The last layer's activation says what it answers: `SOFTMAX` a probability per column; `LOGISTIC` one too, and with a
    single output p(column 1), column 0 being the rest; any other a number per output.
    """

    layers: tuple[DenseLayer, ...]


Regressor = LinearModel | DecisionTreeRegressor | RandomForestRegressor
TreeModel = (
    DecisionTreeClassifier
    | DecisionTreeRegressor
    | RandomForestClassifier
    | RandomForestRegressor
    | GradientBoostingClassifier
)
Model = (
    LinearModel
    | LogisticRegression
    | TreeModel
    | KMeans
    | MixtureOfExperts
    | GaussianNB
    | KNearestNeighbors
    | LinearSVM
    | DenseNetwork
    | Quantized
)
"""What a package may hold. A lone `Quantized` is a tensor, not something that answers."""


@dataclass(frozen=True, slots=True)
class Section:
    """A named range of a package's bytes."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What is known about a package from its bytes. Says nothing about trust.

    Attributes:
        format: `apr`.
        digest: Identity of the file, `sha256:<hex>`.
        size_bytes: Of the whole file.
        format_version: As stored, `1.0`.
        model_type_id: As stored; it does not decide the layout.
        model_type: Name of that id.
        compression: `none`, `zstd` or `lz4`.
        flags: Names of the header bits that are set, lowest first.
        encrypted: Whether the payload is ciphertext; then everything about the model is unknown.
        signed: Whether an embedded signature is present; not whether it verifies.
        name: The metadata's `model_name`.
        metadata: The whole metadata as JSON-able values, in file order, unknown keys kept.
        sections: Where each part of the file lies.
        layout: Of the payload: class name of the model (`Ridge`, `MixtureOfExperts`), within `Quantized<...>` if its
            weights are quantised; `QuantizedBlock` for a lone tensor; None when encrypted.
        expert_layout: Class name of a mixture's experts.
        quantization: Kind of the quantised blocks, `q8_0` or `q4_0`; None if there are none.
        n_features: Input width where the package says it.
        n_features_min: Least input width the model can read.
        output_columns: Columns the model answers with, counting those whose label is None.
        labels: One per output column of a classifier, None for a column to drop; None for regressors.
        output_range: Least and greatest value any output can take, where that is known.
        expert_count: 1, or the experts inside a mixture.
        parameter_bytes: What a worker takes from its budget to hold the experts, exactly: parameters laid out for
            computing, without a gate. What was never fitted counts nothing. A worker that halves takes less, and is
            sent no more than what fits it by this.
        not_servable: Why the model cannot answer, for people; None when it can.
    """

    format: str
    digest: str
    size_bytes: int
    format_version: str
    model_type_id: int
    model_type: str
    compression: str
    flags: tuple[str, ...]
    encrypted: bool
    signed: bool
    name: str | None
    metadata: Mapping[str, Any]
    sections: tuple[Section, ...]
    layout: str | None = None
    expert_layout: str | None = None
    quantization: str | None = None
    n_features: int | None = None
    n_features_min: int = 0
    output_columns: int = 0
    labels: tuple[str | None, ...] | None = None
    output_range: tuple[float, float] | None = None
    expert_count: int = 1
    parameter_bytes: int = 0
    not_servable: str | None = None
