"""Messages of the contract in words for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from hocket.cli import output
from hocket.identity import ExpertId, short_name
from hocket.v1.package_pb2 import (
    ADAPTER_KIND_DORA,
    ADAPTER_KIND_IA3,
    ADAPTER_KIND_LORA,
    ADAPTER_KIND_SOFT_PROMPT,
    UPSTREAM_OUTCOME_INVALID,
    UPSTREAM_OUTCOME_VALID,
    UPSTREAM_OUTCOME_WEIGHTS_ONLY,
    TrustState,
)
from hocket.versions import Version

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from hocket.v1.package_pb2 import (
        AdapterFacts,
        AdapterKind,
        BaseModel,
        ModelFacts,
        OutputRange,
        Package,
        Release,
        UpstreamOutcome,
        UpstreamSignature,
    )
    from hocket.v1.router_pb2 import MemberInfo

_ADAPTERS: Final[Mapping[AdapterKind.ValueType, str]] = {
    ADAPTER_KIND_LORA: "LoRA",
    ADAPTER_KIND_DORA: "DoRA",
    ADAPTER_KIND_IA3: "IA3",
    ADAPTER_KIND_SOFT_PROMPT: "soft prompt",
}
_UPSTREAM: Final[Mapping[UpstreamOutcome.ValueType, str]] = {
    UPSTREAM_OUTCOME_VALID: "covers every file",
    UPSTREAM_OUTCOME_WEIGHTS_ONLY: "covers every file but the manifest",
    UPSTREAM_OUTCOME_INVALID: "IS NOT VALID",
}
_NO_VERSION: Final = Version.parse("0")


def release_name(release: Release) -> str:
    """`publisher/name@version`."""
    return f"{release.publisher}/{release.name}@{release.version}"


def package_name(package: Package) -> str:
    """What people call a package: its first release, or its digest in short, with an adapter's own name."""
    if package.releases:
        return release_name(package.releases[0])
    own = f" ({package.adapter.name}@{package.adapter.version})" if package.HasField("adapter") else ""
    return output.short(package.digest) + own


def by_name(package: Package) -> tuple[str, Version]:
    """What packages are sorted by: name, then version."""
    if package.releases:
        first = package.releases[0]
        return f"{first.publisher}/{first.name}", Version.parse(first.version)
    return package_name(package), _NO_VERSION


def all_names(package: Package) -> str:
    """Every release of a package, by name."""
    return ", ".join(dict.fromkeys(map(release_name, package.releases))) or package_name(package)


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


def adapter_of(adapter: AdapterFacts) -> str:
    """`DoRA adapter`, or what it is called else."""
    kind = _ADAPTERS.get(adapter.kind, "unknown")
    return kind if adapter.kind == ADAPTER_KIND_SOFT_PROMPT else f"{kind} adapter"


def summary_of(package: Package) -> tuple[str, str, str]:
    """What a package is, what it takes, and what it answers."""
    if package.HasField("adapter"):
        return adapter_of(package.adapter), f"text (base model {base_name(package.adapter.base.name)})", "text"
    model = package.model
    return kind_of(model), features_of(model), columns_of(model)


def features_of(model: ModelFacts) -> str:
    """`4 features`, or `at least 4 features` of a model that only says which it reads."""
    count = model.feature_count or model.feature_count_min
    return f"{'' if model.feature_count else 'at least '}{count} feature{'' if count == 1 else 's'}"


def base_name(name: str) -> str:
    """The last part of a base's name, which may be a path on somebody's disk."""
    return short_name(name) or name


def base_text(base: BaseModel) -> str:
    """A base, and how far it is pinned down."""
    if base.digest:
        return f"{base_name(base.name)}, exactly {base.digest}"
    return f"{base_name(base.name)} (by name: the package does not say which weights exactly)"


def upstream_text(signature: UpstreamSignature) -> str:
    """What the signature that the format's own tools have left inside is worth."""
    if (worth := _UPSTREAM.get(signature.outcome)) is None:
        return "none"
    key = f", by key {output.short(signature.key_id)}" if signature.key_id else ""
    claim = f", said to be {signature.publisher}'s" if signature.publisher else ""
    why = f": {signature.explanation}" if signature.explanation else ""
    return f"{worth}{key}{claim}{why} (shown, never decisive)"


def grammar_text(*, inside: bool, used: bool, problem: str | None = None) -> str | None:
    """What becomes of a package's grammar; None if there is none inside.

    Args:
        inside: Whether there is one.
        used: Whether answers follow it where nobody says otherwise.
        problem: Why they cannot; None if they can, or that was not looked at.
    """
    if not inside:
        return None
    if problem is not None:
        return f"INSIDE, AND BROKEN: {problem}" + (" (every answer is refused)" if used else " (not used)")
    return "inside, answers follow it" if used else "inside, not used: the manifest does not say use_grammar"


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
