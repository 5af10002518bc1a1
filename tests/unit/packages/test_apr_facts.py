from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hocket.errors import HocketError, Reason
from hocket.identity import digest_of
from hocket.packages import apr
from hocket.packages.limits import DEFAULT_LIMITS
from hocket.packages.model import (
    DecisionTreeClassifier,
    DecisionTreeRegressor,
    KMeans,
    LinearRegression,
    ModelFacts,
    MoeConfig,
    RandomForestClassifier,
    RandomForestRegressor,
)
from tests import apr_oracle, builders

KMEANS = builders.models()["KMeans"]
STUMP = DecisionTreeClassifier(builders.grow((0, 0.5, (0, 1), (2, 1))))


def facts(model: Any, **options: Any) -> ModelFacts:
    data = builders.apr_bytes(model, **options)
    return apr.decode(apr.split(data), digest_of(data))[0]


def refusal(model: Any, **options: Any) -> Reason:
    with pytest.raises(HocketError) as error:
        facts(model, **options)
    return error.value.reason


def trained(*classes: int) -> RandomForestClassifier:
    return builders.forest(STUMP.tree, y_train=np.array(classes, np.uint64))


def test_the_facts_of_a_file() -> None:
    data = builders.apr_bytes(builders.mixture(), name="pair", signing=builders.signer())
    found, _ = apr.decode(apr.split(data), digest_of(data))

    assert (found.format, found.digest, found.size_bytes) == ("apr", digest_of(data), len(data))
    assert (found.format_version, found.model_type_id, found.model_type) == ("1.0", 0x40, "MixtureOfExperts")
    assert (found.layout, found.expert_layout, found.expert_count) == ("MixtureOfExperts", "LinearRegression", 2)
    assert (found.compression, found.flags, found.encrypted, found.signed) == ("zstd", ("SIGNED",), False, True)
    assert (found.name, found.n_features, found.n_features_min, found.output_columns) == ("pair", 2, 2, 1)
    assert (found.labels, found.output_range, found.parameter_bytes) == (None, None, 32)
    assert found.not_servable is None
    assert found.metadata["custom"] == {"hocket": {"expert_layout": "LinearRegression", "layout": "MixtureOfExperts"}}


@pytest.mark.parametrize(
    ("model", "labels"),
    [
        (builders.logistic(), ("0", "1")),
        (KMEANS, ("0", "1", "2")),
        (STUMP, ("0", "1", "2")),
        (builders.forest(STUMP.tree), ("0", "1", "2")),
        (trained(0, 3), ("0", "1", "2", "3")),
        (trained(), ("0", "1", "2")),
        (builders.linear(), None),
        (builders.mixture(), None),
        (builders.models()["RandomForestRegressor"], None),
    ],
)
def test_columns_are_labelled_by_their_index_unless_labels_are_recorded(model: Any, labels: Any) -> None:
    found = facts(model)

    assert found.labels == labels
    assert found.output_columns == (1 if labels is None else len(labels))


@pytest.mark.parametrize(
    ("model", "labels"),
    [
        (builders.logistic(), ["no", "yes"]),
        (builders.logistic(), [None, 7]),
        (KMEANS, ["a", "b", None]),
        (STUMP, ["a", "b", "c"]),
        (STUMP, ["a", "b", "c", "a class no leaf answers"]),
        (trained(0, 3), ["a", "b", "c", "d"]),
    ],
)
def test_recorded_labels_name_the_columns(model: Any, labels: list[Any]) -> None:
    found = facts(model, labels=labels)

    assert found.labels == tuple(None if label is None else str(label) for label in labels)
    assert found.output_columns == len(labels)
    assert found.metadata["custom"]["hocket"]["labels"] == labels


@pytest.mark.parametrize(
    ("model", "labels"),
    [
        (builders.logistic(), ["yes"]),
        (builders.logistic(), ["no", "yes", "maybe"]),
        (builders.logistic(), ["yes", "yes"]),
        (builders.logistic(), ["1", 1]),
        (builders.logistic(), [None, None]),
        (builders.logistic(), ["no", ""]),
        (builders.logistic(), ["no", True]),
        (builders.logistic(), ["no", 0.5]),
        (KMEANS, ["a", "b"]),
        (STUMP, ["a", "b"]),
        (trained(0, 3), ["a", "b", "c"]),
        (trained(0, 3), ["a", "b", "c", "d", "e"]),
        (builders.linear(), ["price"]),
        (builders.mixture(), ["price"]),
    ],
)
def test_labels_that_do_not_name_each_column_once_are_refused(model: Any, labels: list[Any]) -> None:
    assert refusal(model, labels=labels) is Reason.BAD_METADATA


def test_labels_must_be_a_list() -> None:
    metadata = {**builders.METADATA, "custom": {"hocket": {"labels": {"0": "no"}}}}

    assert refusal(builders.logistic(), metadata=metadata) is Reason.BAD_METADATA


def test_a_leaf_beyond_the_training_data_is_refused() -> None:
    assert refusal(trained(0, 1)) is Reason.BAD_PAYLOAD
    assert facts(trained(0, 2)).output_columns == 3


def test_labels_have_limits() -> None:
    most = DEFAULT_LIMITS.label_chars

    assert facts(builders.logistic(), labels=["no", "y" * most]).output_columns == 2
    assert refusal(builders.logistic(), labels=["no", "y" * (most + 1)]) is Reason.TOO_LARGE
    assert refusal(trained(0, DEFAULT_LIMITS.labels)) is Reason.TOO_LARGE
    assert facts(trained(0, DEFAULT_LIMITS.labels - 1)).output_columns == DEFAULT_LIMITS.labels
    assert refusal(STUMP, labels=list(range(DEFAULT_LIMITS.labels + 1))) is Reason.TOO_LARGE


def test_a_tree_s_width_is_recorded_by_our_writer() -> None:
    assert (facts(STUMP).n_features, facts(STUMP).n_features_min) == (None, 1)
    assert facts(replace(STUMP, n_features=9)).n_features == 9
    samples = np.zeros((2, 4), np.float32)
    assert facts(builders.forest(STUMP.tree, x_train=samples)).n_features == 4
    assert "n_features" not in facts(builders.linear()).metadata["custom"]["hocket"]


@pytest.mark.parametrize("recorded", [0, -1, True, "2", 2.0, 1, 3])
def test_a_recorded_width_that_is_not_the_model_s_is_refused(recorded: object) -> None:
    metadata = {**builders.METADATA, "custom": {"hocket": {"n_features": recorded}}}

    assert refusal(builders.linear(), metadata=metadata) is Reason.BAD_METADATA


def test_a_tree_that_splits_beyond_its_width_is_refused() -> None:
    assert refusal(DecisionTreeClassifier(builders.COLUMN_TREE, n_features=1)) is Reason.BAD_PAYLOAD
    assert refusal(builders.forest(n_features=2, x_train=np.zeros((1, 3), np.float32))) is Reason.BAD_PAYLOAD
    assert refusal(replace(STUMP, n_features=DEFAULT_LIMITS.features + 1)) is Reason.TOO_LARGE
    assert facts(DecisionTreeClassifier(builders.COLUMN_TREE, n_features=2)).n_features_min == 2


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (LinearRegression(None, 0.0), "never fitted"),
        (LinearRegression(np.zeros(0, np.float32), 0.0), "reads no input"),
        (DecisionTreeRegressor(None), "never fitted"),
        (RandomForestRegressor((), 10), "never fitted"),
        (builders.forest(builders.COLUMN_TREE, None), "never fitted"),
        (KMeans(2, None), "never fitted"),
        (KMeans(0, np.zeros((0, 2), np.float32)), "no clusters"),
        (builders.mixture(builders.linear(), LinearRegression(None, 0.0)), "never fitted"),
        (builders.mixture(builders.linear(1, 2, 3), builders.linear(1, 2, 3)), "gate reads 2 features"),
        (builders.mixture(builders.linear(1, 2), builders.linear(1, 2, 3)), "gate reads 2 features"),
        (builders.mixture(weights=np.ones((2, 3), np.float32)), "gate weighs 3 experts"),
        (builders.mixture(weights=np.ones((2, 1), np.float32)), "gate weighs 1 experts"),
        (builders.mixture(top_k=0), "top_k is 0"),
    ],
)
def test_a_model_that_cannot_answer_is_decoded_and_says_why(model: Any, why: str) -> None:
    assert why in (facts(model).not_servable or "")


@pytest.mark.parametrize("model", builders.models().values(), ids=builders.models())
def test_a_sound_model_can_be_served(model: Any) -> None:
    assert facts(model).not_servable is None


def test_a_stored_top_k_beyond_the_experts_means_all() -> None:
    mixture = replace(builders.mixture(), config=MoeConfig(top_k=2**64 - 1))

    assert facts(mixture).not_servable is None
    assert mixture.top_k == 2


def test_the_range_of_a_tree_is_that_of_its_leaves() -> None:
    assert facts(DecisionTreeRegressor(builders.VALUE_TREE)).output_range == (-1.5, 2.0)
    assert facts(builders.logistic()).output_range == (0.0, 1.0)
    assert facts(builders.linear()).output_range is None


def test_the_range_of_a_forest_contains_its_answers() -> None:
    rng = np.random.default_rng(7)
    trees = [builders.grow((0, 0.0, (float(a), 1), (float(b), 1))) for a, b in rng.normal(3, 1e-3, (200, 2))]
    forest = RandomForestRegressor(tuple(DecisionTreeRegressor(tree) for tree in trees), 200)

    low, high = facts(forest).output_range or (0, 0)

    rows = rng.normal(0, 1, (4, 1))
    answers = apr_oracle.predict(forest, rows)
    assert (low <= answers).all()
    assert (answers <= high).all()
    assert high - low < 1e-2, "and says something"


def test_a_forest_of_equal_leaves_stays_within_its_range_in_spite_of_rounding() -> None:
    value = float(np.float32(0.1))
    forest = RandomForestRegressor((DecisionTreeRegressor(builders.grow((value, 1))),) * 1000, 1000)

    low, high = facts(forest).output_range or (0, 0)
    answer = float(apr_oracle.predict(forest, [[0.0]])[0, 0])

    assert answer != value
    assert low <= answer <= high
