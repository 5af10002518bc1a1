"""What can be addressed: a lone expert or a mixture, ready to route to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from hocket.errors import HocketError, Reason
from hocket.identity import ExpertId
from hocket.mixtures import MixtureRef, SoftmaxGate
from hocket.v1.package_pb2 import TrustState
from services.router.gating import lone_gate
from services.router.selection import Level

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hocket.mixtures import MixtureRecord
    from hocket.v1.mixture_pb2 import Mixture
    from hocket.v1.package_pb2 import Package, Release
    from services.router.gating import Gate

REFUSALS: Mapping[int, Reason] = {
    TrustState.TRUST_STATE_YANKED: Reason.YANKED,
    TrustState.TRUST_STATE_KEY_REVOKED: Reason.KEY_REVOKED,
    TrustState.TRUST_STATE_UNTRUSTED: Reason.SIGNER_NOT_TRUSTED,
}
"""Why something in a state other than ACTIVE may not serve."""

_Reached: TypeAlias = "tuple[ExpertId, Reason | None]"
"""An expert, and why the way to it is closed."""


def release_name(release: Release) -> str:
    """`publisher/name@version`."""
    return f"{release.publisher}/{release.name}@{release.version}"


def listed_name(package: Package) -> str:
    """The first release that may be used, else the first, else the digest."""
    usable = [release for release in package.releases if release.state not in REFUSALS] or package.releases
    return release_name(usable[0]) if usable else package.digest


@dataclass(frozen=True, slots=True)
class Body:
    """A mixture's fetched body: its record, and its gate ready to weigh."""

    record: MixtureRecord
    gate: Gate


@dataclass(frozen=True, slots=True)
class Leaf:
    """One expert of a model.

    Args:
        expert: Which.
        package: What the registry says about its package.
        columns: For each of its output columns, the column of the answer, or -1.
        output_range: Range of what it adds to any column of the answer, scattered zeros included.
        name: The expert as text.
        refusal: Why it may not run now; None if it may.
    """

    expert: ExpertId
    package: Package
    columns: tuple[int, ...]
    output_range: tuple[float, float] | None
    name: str
    refusal: Reason | None

    @property
    def called(self) -> str:
        """What people call it: the name of its package, and `#ordinal` inside of one with several."""
        several = self.package.model.expert_count > 1
        return listed_name(self.package) + (f"#{self.expert.ordinal}" if several else "")


@dataclass(frozen=True, slots=True)
class Model:
    """A routable model.

    Args:
        name: As listed.
        digest: Of the mixture's body, or the package of a lone expert.
        state: Whether it may serve.
        leaves: Its experts, each once, in member order.
        top: Its gates.
        feature_count: Width of the input; None when no member says.
        feature_count_min: Least width of the input.
        labels: The class each column of the answer scores; empty for regression.
        column_count: Columns of the answer.
        mixture: What the registry says about the mixture; None for a lone expert.
    """

    name: str
    digest: str
    state: TrustState.ValueType
    leaves: tuple[Leaf, ...]
    top: Level
    feature_count: int | None
    feature_count_min: int
    labels: tuple[str, ...]
    column_count: int
    mixture: Mixture | None

    def check_width(self, width: int) -> None:
        """Pass if rows of this width can be answered.

        Raises:
            HocketError: `BAD_TENSOR`.
        """
        if width == self.feature_count or (self.feature_count is None and width >= self.feature_count_min):
            return
        takes = self.feature_count or f"at least {self.feature_count_min}"
        raise HocketError(
            Reason.BAD_TENSOR, f"model {self.name} takes rows of {takes} values, not {width}", field="input.shape[1]"
        )

    def check_servable(self) -> None:
        """Pass if the model may serve.

        Raises:
            HocketError: `YANKED`, `KEY_REVOKED` or `SIGNER_NOT_TRUSTED`.
        """
        if reason := REFUSALS.get(self.state):
            raise HocketError(reason, f"model {self.name} is withdrawn ({reason})", model=self.name)

    @property
    def output_range(self) -> tuple[float, float] | None:
        """Range of every value of the answer, when it is known for every expert."""
        return union_range(self.leaves)


def union_range(leaves: tuple[Leaf, ...]) -> tuple[float, float] | None:
    """The smallest range that holds the ranges of all these experts; None if one of them has none."""
    ranges = [leaf.output_range for leaf in leaves]
    known = [known for known in ranges if known is not None]
    if len(known) < len(ranges):
        return None
    return min(lower for lower, _ in known), max(upper for _, upper in known)


def lone_model(package: Package, ordinal: int, name: str) -> Model:
    """A mixture of one: the expert at `ordinal` of a package."""
    expert = ExpertId(package.digest, ordinal)
    labels = _shown_labels(package)
    return Model(
        name=name,
        digest=package.digest,
        state=package.state,
        leaves=(_leaf(expert, package, labels, None),),
        top=Level(lone_gate(), (0,), 1),
        feature_count=package.model.feature_count or None,
        feature_count_min=package.model.feature_count_min,
        labels=labels,
        column_count=len(labels) or len(package.model.columns),
        mixture=None,
    )


def mixture_model(
    mixture: Mixture, bodies: Mapping[str, Body], states: Mapping[str, int], packages: Mapping[str, Package]
) -> Model:
    """A mixture, its nested mixtures resolved.

    What is reached through a withdrawn inner mixture counts as missing, like a withdrawn expert.

    Args:
        mixture: What the registry says about it.
        bodies: Bodies by digest, its own and those it nests.
        states: States of the nested mixtures, by digest.
        packages: Packages by digest.

    Raises:
        KeyError: A body or a package it needs is not known here yet.
    """
    body = bodies[mixture.digest]
    reached: dict[_Reached, int] = {}
    top = _level(body, bodies, states, reached, None)
    members = [packages[expert.digest] for expert, _ in reached]
    widths = [member.model.feature_count for member in members]
    labels = body.record.labels or tuple(dict.fromkeys(label for member in members for label in _shown_labels(member)))
    return Model(
        name=mixture.name,
        digest=mixture.digest,
        state=mixture.state,
        leaves=tuple(
            _leaf(expert, package, labels, refusal) for (expert, refusal), package in zip(reached, members, strict=True)
        ),
        top=top,
        feature_count=_gate_width(body, bodies) or next((w for w in widths if w), None),
        feature_count_min=max(member.model.feature_count_min for member in members),
        labels=labels,
        column_count=len(labels) or len(members[0].model.columns),
        mixture=mixture,
    )


def _gate_width(body: Body, bodies: Mapping[str, Body]) -> int | None:
    """Width that a softmax gate of the mixture, or of one inside it, takes."""
    if isinstance(body.record.gate, SoftmaxGate):
        return body.record.gate.features
    nested = (member for member in body.record.members if isinstance(member, MixtureRef))
    return next((width for member in nested if (width := _gate_width(bodies[member.digest], bodies))), None)


def _level(
    body: Body,
    bodies: Mapping[str, Body],
    states: Mapping[str, int],
    reached: dict[_Reached, int],
    refusal: Reason | None,
) -> Level:
    """The gates of a body, and the experts they reach, each numbered by its place among all that are reached.

    An expert counts twice where a withdrawn inner mixture reaches it and something else does: the weight that comes
    through the withdrawn gate is missing, the other is not.
    """
    record = body.record
    members: list[int | Level] = []
    for member in record.members:
        if isinstance(member, MixtureRef):
            withdrawn = refusal or REFUSALS.get(states[member.digest])
            members.append(_level(bodies[member.digest], bodies, states, reached, withdrawn))
        else:
            members.append(reached.setdefault((member, refusal), len(reached)))
    return Level(body.gate, tuple(members), record.top_k, record.capacity_factor)


def _leaf(expert: ExpertId, package: Package, labels: tuple[str, ...], refusal: Reason | None) -> Leaf:
    """An expert's place in the answer: scattered by label, or column by column for regressors."""
    facts = package.model
    if labels:
        places = {label: place for place, label in enumerate(labels)}
        columns = tuple(-1 if column.dropped else places[column.label] for column in facts.columns)
    else:
        columns = tuple(range(len(facts.columns)))
    output_range = None
    if facts.HasField("output_range"):
        lower, upper = facts.output_range.lower, facts.output_range.upper
        scattered = len(set(columns) - {-1}) < len(labels)
        output_range = (min(lower, 0.0), max(upper, 0.0)) if scattered else (lower, upper)
    return Leaf(expert, package, columns, output_range, str(expert), refusal or REFUSALS.get(package.state))


def _shown_labels(package: Package) -> tuple[str, ...]:
    return tuple(column.label for column in package.model.columns if column.HasField("label") and not column.dropped)
