"""Messages of the contract in words for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hocket.cli import output
from hocket.identity import ExpertId
from hocket.v1.package_pb2 import TrustState

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from hocket.v1.package_pb2 import ModelFacts, OutputRange, Package, Release
    from hocket.v1.router_pb2 import MemberInfo


def release_name(release: Release) -> str:
    """`publisher/name@version`."""
    return f"{release.publisher}/{release.name}@{release.version}"


def package_name(package: Package) -> str:
    """What people call a package: its first release, or its digest in short."""
    return release_name(package.releases[0]) if package.releases else output.short(package.digest)


def expert_names(members: Iterable[MemberInfo]) -> Mapping[str, str]:
    """What people call each expert, by the expert's id: its package, and `#ordinal` inside of one with several."""
    names = {}
    for member in members:
        ordinal = ExpertId.parse(member.expert).ordinal
        several = member.package.model.expert_count > 1
        names[member.expert] = package_name(member.package) + (f"#{ordinal}" if several else "")
    return names


def kind_of(model: ModelFacts) -> str:
    """`RandomForestClassifier`, or `4 x Ridge` for a package of several experts."""
    kind = model.expert_layout or model.layout or model.model_type
    return f"{model.expert_count} x {kind}" if model.expert_count > 1 else kind


def columns_of(model: ModelFacts) -> str:
    """What an expert answers: its labels, or one number."""
    labels = [column.label for column in model.columns if column.HasField("label") and not column.dropped]
    return labels_text(labels)


def labels_text(labels: Sequence[str]) -> str:
    """A few labels; `one number` for none."""
    shown = 8
    if not labels:
        return "one number"
    more = f" and {len(labels) - shown} more" if len(labels) > shown else ""
    return ", ".join(labels[:shown]) + more


def range_text(output_range: OutputRange) -> str:
    """`0 to 1`."""
    return f"{output_range.lower:g} to {output_range.upper:g}"


def state_of(state: TrustState.ValueType) -> str:
    """`active`, `yanked`, `key revoked` or `untrusted`."""
    return TrustState.Name(state).removeprefix("TRUST_STATE_").lower().replace("_", " ")


def standing_of(package: Package) -> str:
    """The state of a package, and `UNSIGNED` where only the registry's policy admits it."""
    return state_of(package.state) + (", UNSIGNED" if package.unsigned_by_policy else "")


def signers_of(package: Package) -> str:
    """Who vouches for a package: publishers with their keys, the signature inside, or nobody."""
    signers = [f"{release.publisher} ({output.short(release.key_id)})" for release in package.releases]
    if package.HasField("embedded_signature"):
        trusted = "" if package.embedded_signature.trusted else ", not trusted"
        signers.append(f"inside ({output.short(package.embedded_signature.key_id)}{trusted})")
    if package.unsigned_by_policy:
        signers.append("NOBODY (policy)")
    return ", ".join(dict.fromkeys(signers))
