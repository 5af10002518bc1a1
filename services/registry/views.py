"""Facts and rows as messages."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from google.protobuf.struct_pb2 import Struct

from hocket.v1.mixture_pb2 import Mixture
from hocket.v1.package_pb2 import EmbeddedSignature, ModelFacts, OutputColumn, OutputRange, Package, Release, TrustState
from services.registry.admission import Shape, State, expert_shape

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from hocket.packages import model
    from services.registry.store import MixtureRow, NameRow, PackageRow, ReleaseRow

_EXACT_INTEGER_MAX: Final = 2**53
"""Beyond this a number of a Struct, which is a double, would be another one."""


def facts_message(facts: model.ModelFacts) -> ModelFacts:
    """What a package holds, without metadata. A width that the package does not say is 0."""
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


def metadata_message(metadata: Mapping[str, Any]) -> Struct:
    """A package's metadata. Integers that a double cannot hold become text, as in protobuf's own JSON."""
    message = Struct()
    message.update(_exact(metadata))
    return message


def package_shape(row: PackageRow) -> tuple[Shape, int]:
    """What each expert of a package means to a mixture, and how many there are."""
    facts = ModelFacts.FromString(row.facts)
    labels = None
    if any(column.dropped or column.HasField("label") for column in facts.columns):
        labels = [None if column.dropped else column.label for column in facts.columns]
    shape = expert_shape(facts.feature_count or None, facts.feature_count_min, labels, len(facts.columns))
    return shape, facts.expert_count


def package_message(row: PackageRow, releases: Iterable[ReleaseRow], metadata: bytes | None = None) -> Package:
    """A package as it now stands.

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
        model=ModelFacts.FromString(row.facts),
    )
    if row.embedded_key_id is not None:
        signature = EmbeddedSignature(key_id=row.embedded_key_id, trusted=row.embedded_trusted)
        message.embedded_signature.CopyFrom(signature)
    if metadata is not None:
        message.model.metadata.ParseFromString(metadata)
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
