"""Our layouts of families that the reference cannot write, byte by byte, and what their facts say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hocket.errors import HocketError, Reason
from hocket.packages import apr
from hocket.packages import model as m
from hocket.packages.limits import DEFAULT_LIMITS
from tests import builders
from tests.builders import dense, floats, grow, neighbors

PRIORS = "01 0200000000000000 0000803e 0000403f"
MEANS = "01 0200000000000000 0200000000000000 00000000 0000803f 0200000000000000 00000040 00004040"
VARIANCES = "01 0200000000000000 0200000000000000 0000803f 0000003f 0200000000000000 00000040 0000803f"
CLASSES = "01 0200000000000000 0300000000000000 0700000000000000"
SMOOTHING = "5f708930"
POINTS = "01 0400000000000000 00000000 00000000 0000803f 00000040 0200000000000000 0200000000000000"
COLUMNS = "01 0200000000000000 0000000000000000 0100000000000000"
LAYER_1 = "03000000 0200000000000000 0000803f 000000c0 0200000000000000 0100000000000000 0100000000000000 0000003f"
LAYER_2 = "01000000 0100000000000000 00000040 0100000000000000 0100000000000000 0100000000000000 000080be"
BAYES = m.GaussianNB(floats(0.25, 0.75), floats([0, 1], [2, 3]), floats([1, 0.5], [2, 1]), np.array([3, 7], np.uint64))
PAIR = m.KNearestNeighbors(1, floats([0, 0], [1, 2]), np.array([0, 1], np.uint64))
STUMP = "01 00000000 0000000000000000 0000003f 01000000 0000000000000000 0300000000000000 01000000 0100000000000000"

WORKED: dict[str, tuple[int, str, m.Model]] = {
    "GaussianNB": (8, PRIORS + MEANS + VARIANCES + CLASSES + SMOOTHING, BAYES),
    "KNearestNeighbors": (9, f"0100000000000000 00000000 00 {POINTS} {COLUMNS}", PAIR),
    "manhattan, weighted": (
        9,
        f"0100000000000000 01000000 01 {POINTS} {COLUMNS}",
        replace(PAIR, metric=m.Metric.MANHATTAN, weighted=True),
    ),
    "minkowski": (
        9,
        f"0100000000000000 02000000 00004040 00 {POINTS} {COLUMNS}",
        replace(PAIR, metric=m.Metric.MINKOWSKI, p=3.0),
    ),
    "LinearSVM": (
        10,
        "01 0200000000000000 00000040 000080bf 0000003f 0000803f 0ad7233c e803000000000000 17b7d138",
        m.LinearSVM(floats(2, -1), 0.5),
    ),
    "GradientBoostingClassifier": (
        5,
        f"6400000000000000 cdcccc3d 0300000000000000 000080be 0100000000000000 {STUMP} 0200000000000000 00",
        m.GradientBoostingClassifier((m.DecisionTreeClassifier(grow((0, 0.5, (0, 3), (1, 2)))),), -0.25),
    ),
    "DenseNetwork": (
        0x20,
        f"0200000000000000 {LAYER_1} {LAYER_2}",
        dense((floats([1], [-2]), floats(0.5), "relu"), (floats([2]), floats(-0.25), "logistic")),
    ),
}


def decode(payload: str, type_id: int, **hocket: Any) -> tuple[m.ModelFacts, Any]:
    metadata = {**builders.METADATA, "custom": {"hocket": hocket}}
    return apr.decode(apr.split(builders.raw_apr(bytes.fromhex(payload), metadata, model_type_id=type_id)), "sha256:")


def facts(model: m.Model, **options: Any) -> m.ModelFacts:
    return apr.decode(apr.split(builders.apr_bytes(model, **options)), "sha256:")[0]


def refusal(action: Any, *args: Any, **named: Any) -> HocketError:
    with pytest.raises(HocketError) as error:
        action(*args, **named)
    return error.value


@pytest.mark.parametrize("name", WORKED)
def test_fields_lie_in_the_order_of_their_declaration(name: str) -> None:
    type_id, payload, model = WORKED[name]

    found, again = decode(payload, type_id, layout=type(model).__name__)

    assert found.layout == type(model).__name__
    assert builders.same(again, model)
    written = builders.apr_bytes(model, compression="none")
    assert bytes(apr.split(written).payload) == bytes.fromhex(payload)
    assert apr.split(written).header.model_type_id == type_id
    assert found.not_servable is None


@pytest.mark.parametrize("name", [name for name in WORKED if name != "DenseNetwork"])
def test_their_type_id_alone_says_what_they_are(name: str) -> None:
    type_id, payload, model = WORKED[name]

    assert decode(payload, type_id)[0].layout == type(model).__name__


def test_a_dense_network_counts_only_where_the_metadata_says_so() -> None:
    type_id, payload, _ = WORKED["DenseNetwork"]

    assert refusal(decode, payload, type_id).reason is Reason.UNSUPPORTED_LAYOUT
    assert decode(payload, 0xFF, layout="DenseNetwork")[0].layout == "DenseNetwork"


@pytest.mark.parametrize(
    ("payload", "type_id", "why"),
    [
        (PRIORS + MEANS[:-9], 8, "are left"),
        (
            PRIORS
            + "01 0200000000000000 0200000000000000 00000000 0000803f 0100000000000000 00000040"
            + VARIANCES
            + CLASSES
            + SMOOTHING,
            8,
            "different numbers of features",
        ),
        ("01 0100000000000000 0000803e" + MEANS + VARIANCES + CLASSES + SMOOTHING, 8, "not of one number of classes"),
        (
            PRIORS
            + MEANS
            + "01 0200000000000000 0100000000000000 0000803f 0100000000000000 00000040"
            + CLASSES
            + SMOOTHING,
            8,
            "not of one number of features",
        ),
        (PRIORS + MEANS + VARIANCES + CLASSES.replace("07000000", "03000000") + SMOOTHING, 8, "twice"),
        (PRIORS + MEANS + VARIANCES.replace("0000003f", "0000c07f") + CLASSES + SMOOTHING, 8, "not finite"),
        (PRIORS + MEANS + VARIANCES + CLASSES + "0000c07f", 8, "not finite"),
        (f"0100000000000000 03000000 00 {POINTS} {COLUMNS}", 9, "3 is none of euclidean, manhattan, minkowski"),
        (f"0100000000000000 02000000 00000000 00 {POINTS} {COLUMNS}", 9, "must be above 0"),
        (f"0100000000000000 02000000 0000c07f 00 {POINTS} {COLUMNS}", 9, "not finite"),
        (f"0100000000000000 00000000 02 {POINTS} {COLUMNS}", 9, "boolean is 2"),
        (f"0100000000000000 00000000 00 {POINTS} 01 0100000000000000 0000000000000000", 9, "2 training rows have 1"),
        (f"0100000000000000 00000000 00 {POINTS} {COLUMNS[:-16]} 0000010000000000", 9, "more than 65536 labels"),
        ("01 0200000000000000 00000040 0000c07f 0000003f 0000803f 0ad7233c e803000000000000 17b7d138", 10, "finite"),
    ],
)
def test_each_damage_of_a_payload_is_told(payload: str, type_id: int, why: str) -> None:
    error = refusal(decode, payload, type_id)

    assert why in error.message
    assert error.reason in {Reason.BAD_PAYLOAD, Reason.TOO_LARGE}


@pytest.mark.parametrize(
    ("payload", "why"),
    [
        (f"0100000000000000 {LAYER_1.replace('03000000', '06000000', 1)}", "6 is none of identity, logistic"),
        (f"0100000000000000 {LAYER_1[:-26]} 0200000000000000 0000003f 0000003f", "1 outputs and 2 biases"),
        (f"0200000000000000 {LAYER_2} {LAYER_1}", "layer 1 reads 2 values"),
        (f"0100000000000000 {LAYER_1} 00", "1 bytes follow"),
        ("ffffffffffffffff", "layers are announced"),
    ],
)
def test_layers_that_do_not_fit_together_are_refused(payload: str, why: str) -> None:
    assert why in refusal(decode, payload, 0x20, layout="DenseNetwork").message


@pytest.mark.parametrize(
    ("model", "labels", "columns"),
    [
        (BAYES, ("3", "7"), 2),
        (m.LinearSVM(floats(1), 0.5), ("0", "1"), 2),
        (neighbors(), ("0", "1"), 2),
        (neighbors(y_train=np.array([0, 0, 4, 1, 1], np.uint64)), ("0", "1", "2", "3", "4"), 5),
        (builders.models()["GradientBoostingClassifier"], ("0", "1"), 2),
        (dense(), ("0", "1"), 2),
        (dense((floats([1], [2]), floats(0), "logistic")), ("0", "1"), 2),
        (dense((floats([1, 1, 1]), floats(0, 0, 0), "logistic")), ("0", "1", "2"), 3),
        (dense((floats([1, 1, 1]), floats(0, 0, 0), "identity")), None, 3),
        (dense((floats([1]), floats(0), "exp")), None, 1),
    ],
)
def test_columns_and_their_labels(model: m.Model, labels: Any, columns: int) -> None:
    found = facts(model)

    assert (found.labels, found.output_columns) == (labels, columns)
    assert found.output_range == (None if labels is None else (0.0, 1.0))
    if labels is not None:
        names = [f"class {column}" for column in range(columns)]
        assert facts(model, labels=names).labels == tuple(names)
        assert refusal(facts, model, labels=[*names, "more"]).reason is Reason.BAD_METADATA


def test_the_range_of_a_tangent_is_known() -> None:
    assert facts(dense((floats([1]), floats(0), "tanh"))).output_range == (-1.0, 1.0)


@pytest.mark.parametrize(
    ("model", "width"),
    [
        (BAYES, 2),
        (neighbors(), 2),
        (m.LinearSVM(floats(1, 2, 3), 0.5), 3),
        (dense(), 2),
        (builders.models()["GradientBoostingClassifier"], 2),
    ],
)
def test_the_width_of_the_input_is_known(model: m.Model, width: int) -> None:
    assert facts(model).n_features == width


def test_boosted_trees_need_the_width_that_their_splits_do() -> None:
    boosted = builders.models()["GradientBoostingClassifier"]

    bare = facts(replace(boosted, n_features=None))
    assert (bare.n_features, bare.n_features_min) == (None, 1)
    wide = replace(boosted, trees=(m.DecisionTreeClassifier(builders.COLUMN_TREE),), n_features=1)
    assert refusal(facts, wide).reason is Reason.BAD_PAYLOAD


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (replace(BAYES, class_priors=None), "never fitted"),
        (replace(BAYES, variances=floats([1, 0], [2, 1])), "a variance is not above 0"),
        (replace(BAYES, class_priors=floats(0, 0)), "not probabilities"),
        (replace(BAYES, class_priors=floats(-1, 2)), "not probabilities"),
        (neighbors(y_train=None), "never fitted"),
        (neighbors(x_train=None), "never fitted"),
        (neighbors(k=0), "asks 0 neighbours of 5"),
        (neighbors(k=6), "asks 6 neighbours of 5"),
        (neighbors(x_train=np.zeros((0, 0), np.float32), y_train=np.zeros(0, np.uint64)), "reads no input"),
        (m.LinearSVM(None, 0.5), "never fitted"),
        (m.LinearSVM(np.zeros(0, np.float32), 0.5), "reads no input"),
        (m.GradientBoostingClassifier((), 0.0), "never fitted"),
        (m.GradientBoostingClassifier((m.DecisionTreeClassifier(None),), 0.0), "never fitted"),
        (m.DenseNetwork(()), "never fitted"),
        (dense((np.zeros((0, 2), np.float32), floats(0, 0), "softmax")), "reads no input"),
    ],
)
def test_a_model_that_cannot_answer_says_why(model: m.Model, why: str) -> None:
    assert why in (facts(model).not_servable or "")


def test_classes_are_counted_before_they_are_compared() -> None:
    def limited(classes: list[int], most: int) -> m.Model:
        payload = bytes.fromhex(f"00 00 00 01 0300000000000000 {np.array(classes, '<u8').tobytes().hex()} {SMOOTHING}")
        container = apr.split(builders.raw_apr(payload, model_type_id=8))
        return apr.decode(container, "sha256:", replace(DEFAULT_LIMITS, labels=most))[1]

    assert refusal(limited, [3, 3, 3], 2).message == "the model has more than 2 classes"
    assert "twice" in refusal(limited, [3, 3, 3], 3).message
    assert limited([3, 4, 5], 3) is not None


def test_a_class_that_never_is_does_no_harm() -> None:
    assert facts(replace(BAYES, class_priors=floats(0, 1))).not_servable is None


def test_later_releases_trees_carry_their_width_inside_boosting_too() -> None:
    payload = f"6400000000000000 cdcccc3d 0300000000000000 000080be 0100000000000000 {STUMP} 0200000000000000 00"

    assert decode(payload, 5)[0].n_features is None
    assert decode(payload + "01 0400000000000000", 5)[0].n_features == 4
