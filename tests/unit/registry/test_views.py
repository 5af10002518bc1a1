from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from google.protobuf.json_format import MessageToDict
from hypothesis import given, settings
from hypothesis import strategies as st

from hocket.packages import apr
from hocket.v1.package_pb2 import Package
from hocket.v1.registry_pb2 import GetPackageResponse
from services.registry import views
from services.registry.catalog import METADATA_DEPTH_MAX
from tests.builders import apr_bytes, models
from tests.registries import labelled

if TYPE_CHECKING:
    from hocket.packages.model import ModelFacts


def facts_of(data: bytes) -> ModelFacts:
    facts, _ = apr.decode(apr.split(data), "sha256:" + "0" * 64)
    return facts


def test_columns_say_what_they_score() -> None:
    message = views.facts_message(facts_of(labelled("cat", None)))

    assert [(column.label, column.dropped) for column in message.columns] == [("cat", False), ("", True)]
    assert not message.columns[1].HasField("label")


def test_a_regressor_has_one_column_without_a_label() -> None:
    message = views.facts_message(facts_of(apr_bytes()))

    assert [(column.HasField("label"), column.dropped) for column in message.columns] == [(False, False)]
    assert not message.HasField("output_range")


@pytest.mark.parametrize("layout", sorted(models()))
def test_every_layout_can_be_described(layout: str) -> None:
    message = views.facts_message(facts_of(apr_bytes(models()[layout])))

    assert (message.layout, message.feature_count, message.feature_count_min) == (layout, 2, 2)
    assert message.expert_count == (2 if layout == "MixtureOfExperts" else 1)


@settings(max_examples=100, deadline=None)
@given(lower=st.floats(-1e39, 1e39), span=st.floats(0, 1e38))
def test_a_range_never_shrinks_by_rounding(lower: float, span: float) -> None:
    upper = lower + span
    message = views.facts_message(replace(facts_of(apr_bytes()), output_range=(lower, upper))).output_range

    assert message.lower <= lower
    assert upper <= message.upper
    if abs(lower) < 1e38:
        assert math.isclose(message.lower, lower, rel_tol=1e-6, abs_tol=float(np.finfo(np.float32).tiny))


def test_metadata_keeps_every_kind_of_value() -> None:
    metadata = {
        "text": "a",
        "number": 1.5,
        "truth": True,
        "nothing": None,
        "list": [1, "b", {"c": 2}],
        "exact": 2**53,
        "inexact": [2**53 + 1, -(2**63)],
    }

    shown = MessageToDict(views.metadata_message(metadata))

    assert shown == {**metadata, "inexact": ["9007199254740993", "-9223372036854775808"]}


def test_metadata_of_the_greatest_depth_can_still_be_read_by_a_client() -> None:
    """Parsers give up at 100 messages inside each other, and each level takes three of them."""
    metadata: dict[str, object] = {}
    innermost = metadata
    for _ in range(METADATA_DEPTH_MAX - 1):
        innermost["in"] = innermost = {}
    package = Package()
    package.model.metadata.CopyFrom(views.metadata_message(metadata))

    sent = GetPackageResponse(package=package).SerializeToString()

    assert GetPackageResponse.FromString(sent).package == package
