from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hocket.errors import HocketError, Reason
from hocket.packages import Password, RecipientKey, apr
from hocket.packages.model import (
    DecisionTreeClassifier,
    LinearRegression,
    MixtureOfExperts,
    MoeConfig,
    Ridge,
    SoftmaxGate,
    Tree,
)
from tests import builders


def refusal(model: Any = None, **options: Any) -> Reason:
    with pytest.raises(HocketError) as error:
        apr.write(builders.linear() if model is None else model, **options)
    return error.value.reason


def read(data: bytes) -> tuple[Any, Any]:
    return apr.decode(apr.split(data), "sha256:")


@pytest.mark.parametrize(("name", "compression_id"), [("none", 0), ("zstd", 1), ("zstd-max", 2)])
def test_each_compression_is_written_and_read_back(name: Any, compression_id: int) -> None:
    data = builders.apr_bytes(compression=name)

    assert apr.split(data).header.compression_id == compression_id
    assert builders.same(read(data)[1], builders.linear())


def test_the_same_arguments_give_the_same_bytes() -> None:
    assert builders.apr_bytes() == builders.apr_bytes()


def test_the_time_of_writing_is_filled_in() -> None:
    facts, _ = read(apr.write(builders.linear()))

    assert abs(int(facts.metadata["created_at"]) - time.time()) < 60
    assert facts.metadata["aprender_version"] == "0.11.0"


def test_given_metadata_is_stored_verbatim() -> None:
    metadata = {
        "custom": {"b": 1, "a": 2},
        "created_at": "2025-11-27",
        "unknown": [1],
        "aprender_version": "0.13.0",
        "license": {"tier": "Team", "uuid": "u", "hash": "h", "theirs": {"x": None}},
    }

    facts, _ = read(builders.apr_bytes(metadata=metadata))

    assert list(facts.metadata.items()) == list(metadata.items())
    assert list(facts.metadata["license"]) == ["tier", "uuid", "hash", "theirs"]


@pytest.mark.parametrize("field", [{"name": "x"}, {"labels": ["a", "b"]}, {"created_at": "0"}])
def test_whole_metadata_and_a_field_of_it_exclude_each_other(field: dict[str, Any]) -> None:
    assert refusal(metadata=builders.METADATA, **field) is Reason.BAD_REQUEST


@pytest.mark.parametrize(("part", "flag"), [("license", "LICENSED"), ("model_card", "HAS_MODEL_CARD")])
def test_a_licence_or_a_card_sets_its_flag_however_the_file_is_stored(part: str, flag: str) -> None:
    metadata = {**builders.METADATA, part: builders.ABOUT[part]}

    for stored in ({}, {"signing": builders.signer()}, {"encryption": Password("x")}):
        data = builders.apr_bytes(metadata=metadata, **stored)
        flags = set(apr.describe(apr.split(data), "sha256:").flags)
        assert flags - {"SIGNED", "ENCRYPTED"} == {flag}
        data = builders.apr_bytes(metadata=builders.METADATA, **stored)
        assert not set(apr.describe(apr.split(data), "sha256:").flags) - {"SIGNED", "ENCRYPTED"}


def test_another_type_id_may_be_chosen() -> None:
    facts, _ = read(builders.apr_bytes(model_type_id=0xFF))

    assert (facts.model_type, facts.layout) == ("Custom", "LinearRegression")
    assert refusal(model_type_id=0x77) is Reason.UNSUPPORTED_TYPE


def test_the_signature_covers_header_metadata_and_payload() -> None:
    seen: list[bytes] = []

    def signing(message: bytes) -> tuple[bytes, bytes]:
        seen.append(message)
        return b"s" * 64, b"k" * 32

    container = apr.split(builders.apr_bytes(signing=signing))

    assert seen == [bytes(container.signed_bytes)]
    assert container.signature == apr.EmbeddedSignature(b"s" * 64, b"k" * 32)


def test_a_signer_must_answer_a_signature_and_a_key() -> None:
    assert refusal(signing=lambda _: (b"", b"")) is Reason.BAD_REQUEST


def test_what_is_encrypted_is_signed_unless_its_author_says_that_it_is_not() -> None:
    model, to = builders.linear(), RecipientKey(b"\x09" * 32).recipient

    assert refusal(encryption=to) is Reason.BAD_REQUEST
    assert apr.split(apr.write(model, encryption=to, signing=builders.signer())).signature is not None
    assert apr.split(apr.write(model, encryption=to, signing=None)).signature is None
    assert apr.split(apr.write(model)).signature is None


def test_an_unknown_compression_is_refused() -> None:
    assert refusal(compression="gzip") is Reason.BAD_REQUEST
    assert read(builders.apr_bytes(compression="lz4"))[0].compression == "lz4"


@pytest.mark.parametrize(
    "model",
    [
        builders.linear(intercept=float("nan")),
        builders.linear(intercept=1e39),
        builders.linear(float("inf"), 1),
        LinearRegression(np.array([1e300]), 0.0),
        LinearRegression(np.array(["x"]), 0.0),
        LinearRegression(builders.floats(1), None),  # type: ignore[arg-type] # on purpose
        Ridge(builders.floats(1), 0.0, alpha="x"),  # type: ignore[arg-type] # on purpose
        replace(builders.models()["Lasso"], max_iter=-1),
        replace(builders.models()["KMeans"], n_clusters=2),
        builders.mixture(temperature=0.0),
    ],
)
def test_a_model_that_no_reader_would_accept_is_not_written(model: Any) -> None:
    assert refusal(model) is Reason.BAD_PAYLOAD


def test_a_model_without_a_layout_is_not_written() -> None:
    gate = SoftmaxGate(np.ones((2, 2), np.float32))

    assert refusal(object()) is Reason.UNSUPPORTED_LAYOUT
    assert refusal(MixtureOfExperts((), gate, MoeConfig())) is Reason.UNSUPPORTED_LAYOUT
    for experts in ((builders.linear(), builders.models()["Ridge"]), (builders.logistic(),) * 2):
        assert refusal(MixtureOfExperts(experts, gate, MoeConfig())) is Reason.UNSUPPORTED_LAYOUT  # type: ignore[arg-type] # on purpose


def test_a_tree_may_be_numbered_in_any_order() -> None:
    other_order = Tree(
        np.array([1, -1, 0, -1, -1]),
        np.array([0.5, 0, -2, 0, 0], np.float32),
        np.array([1, -1, 4, -1, -1]),
        np.array([2, -1, 3, -1, -1]),
        np.array([0, 0, 0, 2, 1]),
        np.array([0, 3, 0, 4, 2]),
    )

    _, model = read(builders.apr_bytes(DecisionTreeClassifier(other_order)))

    assert builders.same(model.tree, builders.COLUMN_TREE)


@pytest.mark.parametrize(
    "change",
    [
        {"right": np.array([0, -1, 4, -1, -1])},
        {"right": np.array([5, -1, 4, -1, -1])},
        {"right": np.array([-1, -1, 4, -1, -1])},
        {"right": np.array([3, -1, 4, -1, -1])},
        {"value": np.array([0, -1, 0, 1, 2])},
        {"value": np.array([0, 0.5, 0, 1, 2])},
        {"threshold": np.array([0.5])},
    ],
)
def test_arrays_that_form_no_tree_are_not_written(change: dict[str, Any]) -> None:
    tree = replace(builders.COLUMN_TREE, **change)

    assert refusal(DecisionTreeClassifier(tree)) is Reason.BAD_PAYLOAD
