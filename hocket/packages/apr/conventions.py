"""Layouts of our own, for families that the reference cannot write.

Naive Bayes, neighbours, linear SVM and boosting lie as the reference's fields would, one after the other. The reference
itself has never written such files; what somebody else's own struct under these type ids holds is refused unless it
lies just so. Dense networks have no such model: their layout is ours alone, so it counts only where the metadata
records it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from hocket.packages import model as m
from hocket.packages.apr.bincode import (
    BOOL,
    F32,
    MATRIX,
    U64,
    U64S,
    VECTOR,
    Codec,
    Reader,
    enumeration,
    option,
    record,
    sequence,
    view_array,
)

if TYPE_CHECKING:
    from hocket.packages.model import Floats


def _read_vectors(reader: Reader) -> Floats:
    """Vectors of one length, as the rows of a matrix, one by one: together they may fill a payload."""
    count = U64.read(reader)
    if count > reader.limits.labels:
        raise reader.too_large("classes", reader.limits.labels)
    matrix = np.zeros((0, 0), np.float32)
    for row in range(count):
        vector = view_array(reader, U64.read(reader), "<f4")
        if not row:
            if count * vector.nbytes > vector.nbytes + reader.rest:
                raise reader.bad(f"{count} classes are announced, {reader.rest} bytes are left after the first")
            matrix = np.empty((count, vector.size), np.float32)
        if vector.size != matrix.shape[1]:
            raise reader.bad("the classes have different numbers of features")
        matrix[row] = vector
    matrix.flags.writeable = False
    return matrix


def _write_vectors(out: bytearray, matrix: Floats) -> None:
    U64.write(out, len(matrix))
    for vector in matrix:
        VECTOR.write(out, vector)


_VECTORS: Final = Codec(_read_vectors, _write_vectors)

NAIVE_BAYES: Final = record(
    m.GaussianNB,
    class_priors=option(VECTOR),
    means=option(_VECTORS),
    variances=option(_VECTORS),
    classes=option(U64S),
    var_smoothing=F32,
)


def svm(weights: Codec[Any]) -> Codec[m.LinearSVM]:
    """A linear SVM with its weights stored so."""
    return record(m.LinearSVM, weights=option(weights), bias=F32, c=F32, learning_rate=F32, max_iter=U64, tol=F32)


def boosting(tree: Codec[m.DecisionTreeClassifier]) -> Codec[m.GradientBoostingClassifier]:
    """Gradient boosting with its trees stored so."""
    return record(
        m.GradientBoostingClassifier,
        n_estimators=U64,
        learning_rate=F32,
        max_depth=U64,
        init_prediction=F32,
        trees=sequence(tree, lambda limits: limits.trees, "trees"),
    )


_METRIC: Final = enumeration(tuple(m.Metric))


def neighbors(inputs: Codec[Any]) -> Codec[m.KNearestNeighbors]:
    """Nearest neighbours with their training inputs stored so. A power follows the one metric that has one."""

    def read(reader: Reader) -> m.KNearestNeighbors:
        k, metric, p = U64.read(reader), _METRIC.read(reader), 2.0
        if metric is m.Metric.MINKOWSKI and (p := F32.read(reader)) <= 0:
            raise reader.bad(f"the power of a Minkowski distance is {p}, it must be above 0")
        weighted = BOOL.read(reader)
        return m.KNearestNeighbors(k, option(inputs).read(reader), option(U64S).read(reader), metric, p, weighted)

    def write(out: bytearray, model: m.KNearestNeighbors) -> None:
        U64.write(out, model.k)
        _METRIC.write(out, model.metric)
        if model.metric is m.Metric.MINKOWSKI:
            F32.write(out, model.p)
        BOOL.write(out, model.weighted)
        option(inputs).write(out, model.x_train)
        option(U64S).write(out, model.y_train)

    return Codec(read, write)


def dense(weights: Codec[Any]) -> Codec[m.DenseNetwork]:
    """A dense network with the weights of its layers stored so."""
    layer = record(m.DenseLayer, activation=enumeration(tuple(m.Activation)), weights=weights, biases=VECTOR)
    return record(m.DenseNetwork, layers=sequence(layer, lambda limits: limits.layers, "layers"))


DENSE: Final = dense(MATRIX)


def check(reader: Reader, model: m.Model) -> None:
    """Return if the parts of a model of these families fit together.

    Raises:
        HocketError: `BAD_PAYLOAD` if they do not, `TOO_LARGE` for a class beyond the limit.
    """
    match model:
        case m.GaussianNB():
            _check_classes(reader, model)
        case m.KNearestNeighbors(x_train=inputs, y_train=columns) if inputs is not None and columns is not None:
            if inputs.shape[0] != columns.size:
                raise reader.bad(f"{inputs.shape[0]} training rows have {columns.size} classes")
            if columns.size and columns.max() >= reader.limits.labels:
                raise reader.too_large("labels", reader.limits.labels)
        case m.DenseNetwork(layers=layers):
            for number, layer in enumerate(layers):
                inputs_of, outputs = layer.weights.shape
                if outputs != layer.biases.size:
                    raise reader.bad(f"layer {number} has {outputs} outputs and {layer.biases.size} biases")
                if number and inputs_of != layers[number - 1].biases.size:
                    raise reader.bad(f"layer {number} reads {inputs_of} values, the one before it gives another number")


def _check_classes(reader: Reader, model: m.GaussianNB) -> None:
    present = [part for part in (model.class_priors, model.means, model.variances, model.classes) if part is not None]
    if any(len(part) > reader.limits.labels for part in present):
        raise reader.too_large("classes", reader.limits.labels)
    if len({len(part) for part in present}) > 1:
        raise reader.bad("priors, means, variances and classes are not of one number of classes")
    if model.means is not None and model.variances is not None and model.means.shape != model.variances.shape:
        raise reader.bad("means and variances are not of one number of features")
    if model.classes is not None and len(np.unique(model.classes)) < model.classes.size:
        raise reader.bad("a class is there twice")
