"""Valid and broken `.apr` bytes for tests."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import msgpack  # type: ignore[import-untyped]  # it comes without type information
import numpy as np
from nacl.signing import SigningKey

from hocket.packages import apr
from hocket.packages.model import (
    Activation,
    DecisionTreeClassifier,
    DecisionTreeRegressor,
    DenseLayer,
    DenseNetwork,
    ElasticNet,
    GaussianNB,
    GradientBoostingClassifier,
    KMeans,
    KNearestNeighbors,
    Lasso,
    LinearRegression,
    LinearSVM,
    LogisticRegression,
    MixtureOfExperts,
    MoeConfig,
    RandomForestClassifier,
    RandomForestRegressor,
    Ridge,
    SoftmaxGate,
    Tree,
)

CREATED_AT = "1764278947"
METADATA = {"created_at": CREATED_AT, "aprender_version": "0.11.0"}
ABOUT: dict[str, Any] = {
    **METADATA,
    "model_name": "churn",
    "training": {"samples": 70000, "duration_ms": 1500, "source": "crm", "seed": 7},
    "hyperparameters": {"alpha": 0.1, "nested": [1, None]},
    "metrics": {f"m{number}": number for number in range(20)},
    "custom": {"theirs": {"x": []}},
    "distillation": "abc",
    "distillation_info": {
        "method": "Ensemble",
        "teacher": {
            "hash": "t0",
            "signature": "sig",
            "model_type": "RandomForest",
            "param_count": 12345,
            "ensemble_teachers": [{"hash": "t1", "model_type": "Knn", "param_count": 2}],
        },
        "params": {"temperature": 2.5, "alpha": 0.5, "epochs": 3},
        "layer_mapping": [{"student_layer": 0, "teacher_layer": 1, "weight": 0.5}],
    },
    "license": {
        "uuid": "6f1b0a52",
        "hash": "sha256:9f",
        "expiry": "2020-01-31",
        "seats": 300,
        "licensee": "Example GmbH",
        "tier": "Enterprise",
    },
    "model_card": {
        "model_id": "acme/churn",
        "name": "Churn",
        "version": "3",
        "author": "ada",
        "created_at": "2025-11-27T00:00:00Z",
        "framework_version": "aprender 0.11.0",
        "description": "d" * 1000,
        "license": "MIT",
        "training_data": {"name": "crm-2025", "samples": 70000},
        "param_count": 3,
        "target_hardware": ["cpu", "cuda"],
        "carbon": {"kg": 0.5},
    },
    "later": "kept",
}
"""Metadata with every part, and with keys that the format does not declare. Its licence has ended."""

FULL: dict[str, Any] = {
    "created_at": "1764278947",
    "aprender_version": "0.11.0",
    "model_name": "everything",
    "description": "ü" * 40,
    "training": {"samples": 70000, "duration_ms": 2**40, "source": "mnist"},
    "hyperparameters": {"alpha": 0.1, "nested": [None, True, -1, -40000, {"a": 1.5}]},
    "metrics": {"accuracy": 1},
    "custom": {"theirs": {"x": []}},
    "distillation": "abc",
    "distillation_info": {
        "method": "Ensemble",
        "teacher": {
            "hash": "h",
            "model_type": "Knn",
            "param_count": 3,
            "ensemble_teachers": [{"hash": "g", "model_type": "Custom", "param_count": 2**33}],
        },
        "params": {"temperature": 2.5, "alpha": 0.5, "beta": 0.25, "epochs": 2**32 - 1, "final_loss": 1.0},
        "layer_mapping": [{"student_layer": 0, "teacher_layer": 1, "weight": 0.5}],
    },
    "license": {
        "uuid": "u",
        "hash": "h",
        "expiry": "2031-01-31T00:00:00Z",
        "seats": 300,
        "licensee": "l",
        "tier": "Team",
    },
    "model_card": {
        "model_id": "m",
        "name": "n",
        "version": "1",
        "created_at": "2025-11-27T00:00:00Z",
        "framework_version": "aprender 0.11.0",
        "training_data": {"name": "t", "samples": 5},
        "target_hardware": ["cpu"],
        "carbon": {"kg": 0.5},
    },
    "later": "kept",
}
"""Metadata with every key of every map of the format."""

Signing = Callable[[bytes], tuple[bytes, bytes]]
# (feature, threshold, left, right), or (answer, samples) for a leaf
Node = tuple[int, float, Any, Any] | tuple[float, int]


QUANTIZABLE = (
    "LinearRegression",
    "Ridge",
    "Lasso",
    "ElasticNet",
    "LogisticRegression",
    "LinearSVM",
    "KMeans",
    "KNearestNeighbors",
    "MixtureOfExperts",
    "DenseNetwork",
)
"""Layouts whose weights can be quantised."""


def floats(*values: Any) -> Any:
    return np.array(values, np.float32)


def grow(root: Node) -> Tree:
    """A tree from nested tuples. It answers columns if every leaf is an int, else values."""
    feature: list[int] = []
    threshold: list[float] = []
    left: list[int] = []
    right: list[int] = []
    value: list[float] = []
    samples: list[int] = []

    def add(node: Any) -> int:
        index = len(feature)
        is_leaf = len(node) == 2
        feature.append(-1 if is_leaf else node[0])
        threshold.append(0.0 if is_leaf else node[1])
        value.append(node[0] if is_leaf else 0)
        samples.append(node[1] if is_leaf else 0)
        left.append(-1)
        right.append(-1)
        if not is_leaf:
            left[index] = add(node[2])
            right[index] = add(node[3])
        return index

    add(root)
    answers: Any = np.array(value, np.int64 if all(isinstance(answer, int) for answer in value) else np.float32)
    return Tree(
        np.array(feature, np.int64),
        np.array(threshold, np.float32),
        np.array(left, np.int64),
        np.array(right, np.int64),
        answers,
        np.array(samples, np.int64),
    )


def chain(depth: int, answer: float = 1) -> Tree:
    """A tree with `depth` splits on the way to its deepest leaf, all leaves alike."""
    nodes = 2 * depth + 1
    split = np.arange(nodes) % 2 == 0
    split[-1] = False
    index = np.arange(nodes)
    value: Any = np.where(split, 0, answer)
    return Tree(
        np.where(split, 0, -1),
        np.zeros(nodes, np.float32),
        np.where(split, index + 1, -1),
        np.where(split, index + 2, -1),
        value if isinstance(answer, int) else value.astype(np.float32),
        np.where(split, 0, 1),
    )


COLUMN_TREE = grow((1, 0.5, (0, 3), (0, -2.0, (1, 2), (2, 4))))
VALUE_TREE = grow((0, 0.25, (-1.5, 3), (1, 1.0, (0.5, 2), (2.0, 1))))


def linear(*coefficients: float, intercept: float = 0.5) -> LinearRegression:
    return LinearRegression(floats(*(coefficients or (2, -1))), intercept)


def logistic(*coefficients: float, intercept: float = 0.5) -> LogisticRegression:
    return LogisticRegression(floats(*(coefficients or (2, -1))), intercept)


def forest(*trees: Tree | None, **more: Any) -> RandomForestClassifier:
    members = tuple(DecisionTreeClassifier(tree) for tree in trees or (COLUMN_TREE, grow((2, 1))))
    return RandomForestClassifier(members, len(members), **more)


def dense(*layers: tuple[Any, Any, str]) -> DenseNetwork:
    """A network of (weights, biases, activation); of two inputs, three hidden units and two labels by default."""
    given = layers or (
        (floats([1, -2, 0.5], [0.25, 1, -1]), floats(0.5, 0, -0.25), "relu"),
        (floats([1, -1], [0.5, 2], [-1.5, 0.75]), floats(0.125, -0.5), "softmax"),
    )
    return DenseNetwork(tuple(DenseLayer(weights, biases, Activation(name)) for weights, biases, name in given))


def neighbors(**more: Any) -> KNearestNeighbors:
    """Five training rows of two classes, of which three vote by default."""
    rows, classes = floats([0, 0], [1, 0], [0, 1], [3, 3], [4, 3]), np.array([0, 0, 1, 1, 1], np.uint64)
    return KNearestNeighbors(**{"k": 3, "x_train": rows, "y_train": classes, **more})


def mixture(*experts: Any, top_k: int = 2, **gate: Any) -> MixtureOfExperts:
    """Two linear experts by default, those of the reference's worked vector."""
    members = experts or (linear(2, -1), linear(0, 3, intercept=-1.0))
    weights = np.array([[1, -1], [0.5, 0.25]], np.float32)
    if len(members) != 2:
        weights = np.linspace(-1, 1, 2 * len(members), dtype=np.float32).reshape(2, -1)
    return MixtureOfExperts(members, SoftmaxGate(**{"weights": weights, "temperature": 0.5, **gate}), MoeConfig(top_k))


def models() -> dict[str, Any]:
    """A small model of every layout, two features each, by name of the layout."""
    samples = floats([0, 1], [2, 3], [4, 5])
    every = [
        linear(),
        Ridge(floats(1, 2), 0.5, alpha=0.25),
        Lasso(floats(1, 2), 0.5, alpha=0.25, fit_intercept=False, max_iter=7, tol=0.5),
        ElasticNet(floats(1, 2), 0.5, alpha=0.25, l1_ratio=0.75, tol=0.5),
        logistic(),
        DecisionTreeClassifier(COLUMN_TREE, max_depth=3, n_features=2),
        DecisionTreeRegressor(VALUE_TREE, min_samples_leaf=3, n_features=2),
        forest(
            random_state=42,
            oob_indices=(np.array([0, 2], np.uint64), np.array([], np.uint64)),
            x_train=samples,
            y_train=np.array([0, 1, 2], np.uint64),
            n_features=2,
        ),
        RandomForestRegressor(
            (DecisionTreeRegressor(VALUE_TREE), DecisionTreeRegressor(grow((0.25, 3)))),
            n_estimators=2,
            max_depth=2,
            n_features=2,
        ),
        KMeans(3, samples, tol=0.5, labels=np.array([0, 1, 2], np.uint64), inertia=0.5, n_iter=4),
        mixture(),
        GradientBoostingClassifier(
            (DecisionTreeClassifier(grow((0, 0.5, (0, 3), (1, 2)))), DecisionTreeClassifier(grow((1, 2)))),
            init_prediction=-0.25,
            learning_rate=0.5,
            n_estimators=2,
            n_features=2,
        ),
        GaussianNB(floats(0.25, 0.75), floats([0, 1], [2, 3]), floats([1, 0.5], [2, 1]), np.array([3, 7], np.uint64)),
        neighbors(),
        LinearSVM(floats(2, -1), 0.5, c=2.0, max_iter=7),
        dense(),
    ]
    return {type(model).__name__: model for model in every}


def apr_bytes(model: Any = None, **options: Any) -> bytes:
    """A valid file, the same bytes at every call unless encrypted; options are those of `apr.write`."""
    if "metadata" not in options:
        options.setdefault("created_at", CREATED_AT)
    return apr.write(linear() if model is None else model, **{"signing": None, **options})


def signer(seed: bytes = b"\x07" * 32) -> Signing:
    """What `apr.write` wants as `signing`."""
    key = SigningKey(seed)
    return lambda message: (key.sign(message).signature, bytes(key.verify_key))


def raw_apr(
    payload: bytes,
    metadata: Mapping[str, Any] | bytes = METADATA,
    *,
    magic: bytes = b"APRN",
    version: tuple[int, int] = (1, 0),
    model_type_id: int = 1,
    uncompressed_bytes: int | None = None,
    compression_id: int = 0,
    flags: int = 0,
    reserved: bytes = bytes(10),
    after_payload: bytes = b"",
) -> bytes:
    """A file put together without the writer, so that any part of it can be wrong. The checksum is right."""
    section = metadata if isinstance(metadata, bytes) else msgpack.packb(metadata)
    size = len(payload) if uncompressed_bytes is None else uncompressed_bytes
    header = struct.pack(
        "<4s2BH3I2B10s",
        magic,
        *version,
        model_type_id,
        len(section),
        len(payload),
        size,
        compression_id,
        flags,
        reserved,
    )
    return sealed(header + section + payload + after_payload)


def sealed(body: bytes) -> bytes:
    """`body` with its checksum behind it."""
    return body + struct.pack("<I", zlib.crc32(body))


def edited(data: bytes, offset: int, new: bytes) -> bytes:
    """A file with some bytes replaced and the checksum set right again."""
    return sealed(data[:offset] + new + data[offset + len(new) : -4])


def same(one: Any, other: Any) -> bool:
    """Whether two models hold the same float32 values, arrays and types included."""
    if is_dataclass(one) and type(one) is type(other):
        return all(same(getattr(one, field.name), getattr(other, field.name)) for field in fields(one))
    if isinstance(one, np.ndarray):
        return isinstance(other, np.ndarray) and one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, tuple):
        return isinstance(other, tuple) and len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float):
        return isinstance(other, float) and np.float32(one) == np.float32(other)
    return type(one) is type(other) and one == other
