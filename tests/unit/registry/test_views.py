from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from google.protobuf.json_format import MessageToDict
from hypothesis import given, settings
from hypothesis import strategies as st

from hocket.bases import BaseModel
from hocket.packages import adapter, apr
from hocket.packages.adapter import AdapterKind, Outcome
from hocket.requirements import Constraints
from hocket.v1 import package_pb2
from hocket.v1.package_pb2 import Package
from hocket.v1.registry_pb2 import GetPackageResponse
from services.registry import views
from services.registry.catalog import METADATA_DEPTH_MAX
from services.registry.store import PackageRow, ReleaseRow
from tests.builders import apr_bytes, models
from tests.registries import labelled

if TYPE_CHECKING:
    from hocket.packages.model import ModelFacts


def facts_of(data: bytes) -> ModelFacts:
    facts, _ = apr.decode(apr.split(data), "sha256:" + "0" * 64)
    return facts


def test_columns_say_what_they_score() -> None:
    message = views.model_message(facts_of(labelled("cat", None)))

    assert [(column.label, column.dropped) for column in message.columns] == [("cat", False), ("", True)]
    assert not message.columns[1].HasField("label")


def test_a_regressor_has_one_column_without_a_label() -> None:
    message = views.model_message(facts_of(apr_bytes()))

    assert [(column.HasField("label"), column.dropped) for column in message.columns] == [(False, False)]
    assert not message.HasField("output_range")


@pytest.mark.parametrize("layout", sorted(models()))
def test_every_layout_can_be_described(layout: str) -> None:
    message = views.model_message(facts_of(apr_bytes(models()[layout])))

    assert (message.layout, message.feature_count, message.feature_count_min) == (layout, 2, 2)
    assert message.expert_count == (2 if layout == "MixtureOfExperts" else 1)


@settings(max_examples=100, deadline=None)
@given(lower=st.floats(-1e39, 1e39), span=st.floats(0, 1e38))
def test_a_range_never_shrinks_by_rounding(lower: float, span: float) -> None:
    upper = lower + span
    message = views.model_message(replace(facts_of(apr_bytes()), output_range=(lower, upper))).output_range

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


def adapter_facts(**changes: object) -> adapter.AdapterFacts:
    facts = adapter.AdapterFacts(
        digest="sha256:" + "1" * 64,
        size_bytes=3,
        format_version="2.0",
        compression="gzip",
        name="expert-sql",
        version="1.0.0",
        description="Turns questions into SQL",
        kind=AdapterKind.DORA,
        base=BaseModel("Qwen/Qwen3-0.6B"),
        capabilities=("task:text2sql",),
        tags=("sql",),
        constraints=Constraints(6, None, ("expert-json@>=0.4.0",), ("zeta/expert-x",)),
        signature=adapter.UpstreamSignature(Outcome.INVALID, explanation="altered"),
        metadata={"name": "expert-sql"},
        sections=(),
        rank=12,
        target_modules=("q_proj",),
        routing=adapter.Routing(("sql",), ("cypher",), "language=sql", 0.85),
        warnings=("no license",),
    )
    return replace(facts, **changes)  # type: ignore[arg-type]  # any of its fields


def stored(facts: adapter.AdapterFacts) -> PackageRow:
    message = views.facts_message(facts).SerializeToString()
    return PackageRow(
        digest=facts.digest,
        size_bytes=3,
        format="expert",
        facts=message,
        embedded_key_id=None,
        embedded_trusted=False,
        state="ACTIVE",
        by_policy=False,
        publish_time_us=7,
        proof_time_us=7,
        revision=1,
    )


def released(state: str) -> ReleaseRow:
    return ReleaseRow("acme", "expert-sql", "1.0.0", "k", "sha256:" + "1" * 64, b"", state, 7)


def test_an_adapter_is_described_whole() -> None:
    package = views.package_message(stored(adapter_facts()), [released("ACTIVE")])

    assert (package.format, package.WhichOneof("contents")) == ("expert", "adapter")
    shown = package.adapter
    assert (shown.name, shown.version, shown.kind, shown.rank) == (
        "expert-sql",
        "1.0.0",
        package_pb2.ADAPTER_KIND_DORA,
        12,
    )
    assert (shown.base.name, shown.base.digest, shown.license) == ("Qwen/Qwen3-0.6B", "", "")
    assert (shown.constraints.load_order, shown.constraints.max_chain) == (6, 0)
    assert list(shown.constraints.requirements) == ["expert-json@>=0.4.0"]
    assert shown.upstream_signature.outcome == package_pb2.UPSTREAM_OUTCOME_INVALID
    assert shown.upstream_signature.explanation == "altered"
    assert (list(shown.routing.keywords), shown.routing.router_hint) == (["sql"], "language=sql")
    assert math.isclose(shown.routing.priority, 0.85, rel_tol=1e-6)
    silent = views.adapter_message(adapter_facts(routing=adapter.Routing(("sql",))))
    assert not silent.routing.HasField("priority")
    assert not shown.HasField("metadata")


@pytest.mark.parametrize("kind", AdapterKind)
@pytest.mark.parametrize("outcome", Outcome)
def test_every_kind_of_adapter_and_signature_has_a_name_in_the_contract(kind: AdapterKind, outcome: Outcome) -> None:
    message = views.adapter_message(adapter_facts(kind=kind, signature=adapter.UpstreamSignature(outcome)))

    assert package_pb2.AdapterKind.Name(message.kind) == f"ADAPTER_KIND_{kind.name}"
    assert package_pb2.UpstreamOutcome.Name(message.upstream_signature.outcome) == f"UPSTREAM_OUTCOME_{outcome.name}"


@pytest.mark.parametrize(
    ("states", "shown"),
    [
        (["ACTIVE"], True),
        (["UNTRUSTED", "ACTIVE"], True),
        (["KEY_REVOKED"], False),
        (["UNTRUSTED"], False),
        ([], False),
    ],
)
def test_routing_hints_are_shown_while_a_trusted_release_vouches_for_them(states: list[str], *, shown: bool) -> None:
    package = views.package_message(stored(adapter_facts()), [released(state) for state in states])

    assert package.adapter.HasField("routing") is shown
    assert list(package.adapter.capabilities) == ["task:text2sql"]


def test_the_manifest_is_metadata_of_an_adapter() -> None:
    metadata = views.metadata_message({"name": "expert-sql", "own": [1]}).SerializeToString()

    package = views.package_message(stored(adapter_facts()), [], metadata)

    assert MessageToDict(package.adapter.metadata) == {"name": "expert-sql", "own": [1]}
