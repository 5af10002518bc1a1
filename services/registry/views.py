"""Facts and rows as messages."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from google.protobuf.struct_pb2 import Struct

from hocket.packages import adapter
from hocket.v1.mixture_pb2 import Mixture
from hocket.v1.package_pb2 import (
    AdapterFacts,
    AdapterKind,
    BaseModel,
    Constraints,
    EmbeddedSignature,
    ModelFacts,
    OutputColumn,
    OutputRange,
    Package,
    Release,
    RoutingHints,
    TrustState,
    UpstreamOutcome,
    UpstreamSignature,
)
from services.registry.admission import EXPERT_FORMAT, Shape, State, expert_shape

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hocket.packages import model
    from hocket.packages.opening import PackageFacts
    from services.registry.store import MixtureRow, NameRow, PackageRow, ReleaseRow

_EXACT_INTEGER_MAX: Final = 2**53
"""Beyond this a number of a Struct, which is a double, would be another one."""


def facts_message(facts: PackageFacts) -> ModelFacts | AdapterFacts:
    """What a package holds, without metadata."""
    return adapter_message(facts) if isinstance(facts, adapter.AdapterFacts) else model_message(facts)


def stored_facts(row: PackageRow) -> ModelFacts | AdapterFacts:
    """What a package holds, as `facts_message` has said it."""
    return (AdapterFacts if row.format == EXPERT_FORMAT else ModelFacts).FromString(row.facts)


def model_message(facts: model.ModelFacts) -> ModelFacts:
    """What an `.apr` file holds, without metadata. A width that it does not say is 0."""
    message = ModelFacts(
        format_version=facts.format_version,
        model_type_id=facts.model_type_id,
        model_type=facts.model_type,
        layout=facts.layout or "",
        expert_layout=facts.expert_layout or "",
        name=facts.name or "",
        compression=facts.compression,
        encrypted=facts.encrypted,
        flags=facts.flags,
        feature_count=facts.n_features or 0,
        feature_count_min=facts.n_features_min,
        columns=_columns(facts),
        expert_count=facts.expert_count,
        parameter_bytes=facts.parameter_bytes,
    )
    if facts.output_range is not None:
        lower, upper = facts.output_range
        message.output_range.CopyFrom(OutputRange(lower=_round(lower, -math.inf), upper=_round(upper, math.inf)))
    return message


def adapter_message(facts: adapter.AdapterFacts) -> AdapterFacts:
    """What an `.expert` file holds, without metadata, and its routing hints whoever vouches for them."""
    base, constraints, signature = facts.base, facts.constraints, facts.signature
    message = AdapterFacts(
        format_version=facts.format_version,
        name=facts.name,
        version=facts.version,
        description=facts.description,
        kind=AdapterKind.Value(f"ADAPTER_KIND_{facts.kind.name}"),
        base=BaseModel(
            name=base.name,
            digest=base.digest or "",
            weights_sha256=base.weights_sha256 or "",
            quantization=base.quantization or "",
            prompt_template=base.prompt_template or "",
        ),
        rank=facts.rank,
        target_modules=facts.target_modules,
        soft_prompt_tokens=facts.soft_prompt_tokens,
        capabilities=facts.capabilities,
        tags=facts.tags,
        constraints=Constraints(
            load_order=constraints.load_order,
            max_chain=constraints.max_chain or 0,
            requirements=constraints.requires,
            incompatible_with=constraints.incompatible_with,
        ),
        has_grammar=facts.has_grammar,
        uses_grammar=facts.uses_grammar,
        license=facts.license or "",
        compression=facts.compression,
        parameter_bytes=facts.parameter_bytes,
        upstream_signature=UpstreamSignature(
            outcome=UpstreamOutcome.Value(f"UPSTREAM_OUTCOME_{signature.outcome.name}"),
            key_id=signature.key_id or "",
            publisher=signature.publisher or "",
            created_at=signature.created_at or "",
            explanation=signature.explanation or "",
        ),
        warnings=facts.warnings,
    )
    if (routing := facts.routing) is not None:
        message.routing.CopyFrom(
            RoutingHints(
                keywords=routing.keywords,
                exclude_keywords=routing.exclude_keywords,
                router_hint=routing.router_hint or "",
                priority=routing.priority,
            )
        )
    return message


def metadata_message(metadata: Mapping[str, Any]) -> Struct:
    """A package's metadata. Integers that a double cannot hold become text, as in protobuf's own JSON."""
    message = Struct()
    message.update(_exact(metadata))
    return message


def package_shape(row: PackageRow) -> tuple[Shape, int]:
    """What each expert of an `.apr` file means to a mixture, and how many there are."""
    facts = ModelFacts.FromString(row.facts)
    labels = None
    if any(column.dropped or column.HasField("label") for column in facts.columns):
        labels = [None if column.dropped else column.label for column in facts.columns]
    shape = expert_shape(facts.feature_count or None, facts.feature_count_min, labels, len(facts.columns))
    return shape, facts.expert_count


def package_message(row: PackageRow, releases: Sequence[ReleaseRow], metadata: bytes | None = None) -> Package:
    """A package as it now stands. Of an adapter, routing hints only while a trusted release vouches for them.

    Args:
        row: The package.
        releases: Its releases.
        metadata: Its serialized metadata; None to leave it out.
    """
    message = Package(
        digest=row.digest,
        size_bytes=row.size_bytes,
        format=row.format,
        state=_state(row.state),
        releases=[
            Release(
                publisher=release.publisher,
                name=release.name,
                version=release.version,
                key_id=release.key_id,
                state=_state(release.state),
            )
            for release in releases
        ],
        unsigned_by_policy=row.by_policy,
    )
    facts = stored_facts(row)
    if metadata is not None:
        facts.metadata.ParseFromString(metadata)
    if isinstance(facts, AdapterFacts):
        if all(release.state != State.ACTIVE for release in releases):
            facts.ClearField("routing")  # nobody trusted answers for these words
        message.adapter.CopyFrom(facts)
    else:
        message.model.CopyFrom(facts)
    if row.embedded_key_id is not None:
        signature = EmbeddedSignature(key_id=row.embedded_key_id, trusted=row.embedded_trusted)
        message.embedded_signature.CopyFrom(signature)
    message.publish_time.FromMicroseconds(row.publish_time_us)
    return message


def mixture_message(row: MixtureRow, name: NameRow | None) -> Mixture:
    """A mixture as it now stands.

    Args:
        row: The mixture.
        name: What its name stands for now. The revision is 0 if that is another mixture.
    """
    message = Mixture(
        name=row.name,
        digest=row.digest,
        revision=name.revision if name is not None and name.digest == row.digest else 0,
        package_digest=row.package_digest or "",
        state=_state(row.state),
        body_bytes=row.body_bytes,
        gate_bytes=row.gate_bytes,
        unsigned_by_policy=row.by_policy,
    )
    if row.envelope:
        message.release.CopyFrom(
            Release(
                publisher=row.publisher,
                name=row.name,
                version=row.version,
                key_id=row.key_id,
                state=_state(State.UNTRUSTED if row.by_policy else row.state),
            )
        )
    return message


def name_message(name: NameRow, row: MixtureRow | None) -> Mixture:
    """What a mixture's name now stands for.

    Args:
        name: The name.
        row: The mixture it stands for; of a deleted name not needed.
    """
    if name.digest is None or row is None:
        return Mixture(name=name.name, digest=name.last_digest, revision=name.revision, deleted=True)
    return mixture_message(row, name)


def _columns(facts: model.ModelFacts) -> list[OutputColumn]:
    if facts.labels is None:
        return [OutputColumn() for _ in range(facts.output_columns)]
    return [OutputColumn(dropped=True) if label is None else OutputColumn(label=label) for label in facts.labels]


def _round(value: float, outward: float) -> float:
    """The float32 at `value`, or the next one outward: a bound must not move inward."""
    with np.errstate(over="ignore"):
        near = np.float32(value)
    inward = float(near) > value if outward < 0 else float(near) < value  # as doubles: float32 would hide it
    return float(np.nextafter(near, np.float32(outward)) if inward else near)


def _exact(value: Any) -> Any:  # noqa: ANN401 - JSON-able values
    if isinstance(value, dict):
        return {key: _exact(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_exact(item) for item in value]
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > _EXACT_INTEGER_MAX:
        return str(value)
    return value


def _state(state: str) -> TrustState.ValueType:
    return TrustState.Value(f"TRUST_STATE_{state}")
