"""What is admitted, and whether it still counts. Pure: bytes, rows and trust in, values or one refusal out.

1. An upload rests on a proof that holds now: its release, if it brought one, else the signature inside the file, else
   the policy. A release that proves nothing is refused, even where the signature inside the file would have been
   enough: whoever sent it wanted the name.
2. Only then is anything decoded. What is encrypted stays closed, and counts as what its metadata declares: workers
   compare. What cannot answer is not taken, nor what answers more columns than are sent, nor an adapter that is
   released under another name or version than its manifest says.
3. A mixture's members are here, may serve, agree on the width of the input, and either all score labels or all give
   numbers. Labels are scattered into one ordered list: the record's, else the members' in order.
4. What was admitted is judged again whenever trust changes, each proof as of the moment when it came: that a key's time
   runs out later withdraws nothing, that it leaves the trust folder or is revoked does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final, Self

from hocket.errors import HocketError, Reason
from hocket.identity import ExpertId, check_name, check_version, digest_of
from hocket.mixtures import LABELS_MAX, MEMBERS_MAX, MixtureRecord, SoftmaxGate, gate_tensor, parse_mixture, read_gate
from hocket.packages import (
    Policy,
    Purpose,
    Revocations,
    Subject,
    TrustRoots,
    check_release_name,
    describe_package,
    evaluate,
    verify_release,
)
from hocket.packages.adapter import AdapterFacts
from hocket.packages.apr.quantization import floats
from hocket.packages.model import MixtureOfExperts
from hocket.rpc.convert import COLUMNS_MAX

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

    from hocket.packages import Limits, Proof
    from hocket.packages.model import ModelFacts
    from hocket.packages.opening import PackageFacts

EXPERT_FORMAT: Final = "expert"
MIXTURE_FORMAT: Final = "mixture"
DEPTH_MAX: Final = 2
"""Mixtures inside each other: a mixture of mixtures of experts."""

_OWN_NAME: Final = re.compile(r"apr-[0-9a-f]{16}")
_RELEASE: Final = "release"
_EMBEDDED: Final = "embedded"
_POLICY: Final = "policy"


class State(StrEnum):
    """Whether something may contribute to answers. Spelled as in `hocket.v1.TrustState`."""

    ACTIVE = "ACTIVE"
    YANKED = "YANKED"
    KEY_REVOKED = "KEY_REVOKED"
    UNTRUSTED = "UNTRUSTED"


REFUSALS: Final[Mapping[State, Reason]] = {
    State.YANKED: Reason.YANKED,
    State.KEY_REVOKED: Reason.KEY_REVOKED,
    State.UNTRUSTED: Reason.SIGNER_NOT_TRUSTED,
}
"""Why something in this state is refused."""


@dataclass(frozen=True, slots=True)
class Terms:
    """Who is trusted at one moment.

    Args:
        trust: The keys of the trust folder.
        policy: What the operator accepts beyond proof.
        revoked: Key ids that count no longer.
    """

    trust: TrustRoots
    policy: Policy
    revoked: Revocations


@dataclass(frozen=True, slots=True)
class Shape:
    """What a member means to the mixture around it.

    Args:
        feature_count: Width of its input; None when it does not say.
        feature_count_min: Least width it can read.
        labels: What the columns of its answer score, in order, without dropped ones; None for numbers.
        column_count: Columns of its answer.
        expert_count: Experts in it.
        depth: 0 for an expert, 1 for a mixture of experts, 2 for a mixture of those.
    """

    feature_count: int | None
    feature_count_min: int
    labels: tuple[str, ...] | None
    column_count: int
    expert_count: int = 1
    depth: int = 0

    @classmethod
    def of_document(cls, document: Mapping[str, Any]) -> Self:
        """Read back what was stored as JSON."""
        labels = document["labels"]
        return cls(**{**document, "labels": None if labels is None else tuple(labels)})


@dataclass(frozen=True, slots=True)
class AdmittedMixture:
    """A mixture whose proof holds; its members are not looked at yet.

    Args:
        record: The mixture.
        body: Its canonical JSON.
        proof: What it rests on.
        release: Its release as signed; empty if the proof is another.
    """

    record: MixtureRecord
    body: bytes
    proof: Proof
    release: bytes

    @property
    def subject(self) -> Subject:
        """What its release speaks of."""
        return mixture_subject(digest_of(self.body), len(self.body))


@dataclass(frozen=True, slots=True)
class OwnMixture:
    """The mixture that an `.apr` file holding several experts is by itself.

    Args:
        record: Members are the experts of the file; nothing else is set than what the reference applies.
        gate: The gate tensor.
    """

    record: MixtureRecord
    gate: bytes


@dataclass(frozen=True, slots=True)
class AdmittedPackage:
    """A package whose proof holds and whose content was read; of an encrypted one, what it declares.

    Args:
        facts: What it holds.
        proof: What it rests on.
        release: Its release as signed; empty if the proof is another.
        embedded_key_id: Key of the verified signature inside the file; None if there is none.
        mixture: The mixture that it is by itself; None for a single expert, and for an encrypted gate.
    """

    facts: PackageFacts
    proof: Proof
    release: bytes
    embedded_key_id: str | None
    mixture: OwnMixture | None

    @property
    def subject(self) -> Subject:
        """What its release speaks of."""
        return package_subject(self.facts.digest, self.facts.size_bytes, self.facts.format)


@dataclass(frozen=True, slots=True)
class Dated:
    """A release, and when it came."""

    envelope: bytes
    time: datetime


@dataclass(frozen=True, slots=True)
class Standing:
    """What admitted bytes are worth now.

    Args:
        state: Never YANKED: that is no matter of trust.
        by_policy: Whether nothing but policy admits them.
        releases: State of each release.
        embedded_trusted: Whether the signature inside the file counts.
    """

    state: State
    by_policy: bool
    releases: tuple[State, ...]
    embedded_trusted: bool


def package_subject(digest: str, size_bytes: int, package_format: str) -> Subject:
    """What the release of a package speaks of."""
    return Subject(Purpose.PACKAGE, digest, size_bytes, package_format)


def mixture_subject(digest: str, size_bytes: int) -> Subject:
    """What the release of a mixture speaks of."""
    return Subject(Purpose.MIXTURE, digest, size_bytes, MIXTURE_FORMAT)


def admit_package(
    data: bytes, release: bytes, *, digest: str, terms: Terms, limits: Limits, now: datetime
) -> AdmittedPackage:
    """Open an uploaded package.

    Args:
        data: The whole file.
        release: The DSSE envelope that came with it; empty for none.
        digest: What the file is supposed to be.
        terms: Who is trusted.
        limits: Bounds on sizes.
        now: The time, with its zone.

    Raises:
        HocketError: The refusals of `hocket.packages.describe_package` and of `prove`; `NOT_SERVABLE`; for
            an adapter `NAME_MISMATCH`, or `BAD_REQUEST` if no release could bear the name in its manifest.
    """
    releases = (release,) if release else ()
    opened = describe_package(
        data,
        releases=releases,
        trust=terms.trust,
        policy=terms.policy,
        revoked=terms.revoked,
        now=now,
        limits=limits,
        digest=digest,
    )
    facts, embedded_key_id = opened.facts, opened.provenance.embedded.key_id
    subject = package_subject(facts.digest, facts.size_bytes, facts.format)
    proof = prove(subject, release, embedded_key_id, terms=terms, now=now)
    if facts.not_servable is not None:
        raise HocketError(Reason.NOT_SERVABLE, f"this package cannot answer: {facts.not_servable}", digest=facts.digest)
    if proof.release is not None:
        check_release_name(facts, proof.release)
    if isinstance(facts, AdapterFacts):
        check_name(facts.name)  # one that a release could bear, even where none does
        check_version(facts.version)
    else:
        _check_columns(facts)
    mixture = _own_mixture(facts.digest, opened.model) if isinstance(opened.model, MixtureOfExperts) else None
    return AdmittedPackage(facts, proof, proof.envelope or b"", embedded_key_id, mixture)


def admit_mixture(body: bytes, release: bytes, *, terms: Terms, now: datetime) -> AdmittedMixture:
    """Verify an uploaded mixture, then read it.

    Raises:
        HocketError: The refusals of `prove`; `BAD_MIXTURE` if the body is no mixture, is released under another name
            than its own, or has a name kept for packages' own mixtures (then `NAME_TAKEN`).
    """
    proof = prove(mixture_subject(digest_of(body), len(body)), release, None, terms=terms, now=now)
    record = parse_mixture(body)
    if proof.release is not None and proof.release.name != record.name:
        raise HocketError(
            Reason.BAD_MIXTURE,
            f"the mixture {record.name} is released as {proof.release}: sign it under its own name",
        )
    if _OWN_NAME.fullmatch(record.name):
        raise HocketError(
            Reason.NAME_TAKEN, f"names such as {record.name} are kept for the mixtures that .apr files are"
        )
    return AdmittedMixture(record, body, proof, proof.envelope or b"")


def check_gate(record: MixtureRecord, tensor: bytes) -> None:
    """Pass if these are the bytes of the mixture's gate tensor; none for a gate that needs none.

    Raises:
        HocketError: `DIGEST_MISMATCH` or `BAD_MIXTURE` otherwise.
    """
    if isinstance(record.gate, SoftmaxGate):
        read_gate(record.gate, tensor)
    elif tensor:
        raise HocketError(Reason.BAD_MIXTURE, "this gate needs no tensor: send none")


def prove(subject: Subject, release: bytes, embedded_key_id: str | None, *, terms: Terms, now: datetime) -> Proof:
    """The proof that an upload rests on (rule 1).

    Args:
        subject: The bytes, as measured here.
        release: The DSSE envelope that came with them; empty for none.
        embedded_key_id: Key of the verified signature inside a package; None if there is none.
        terms: Who is trusted.
        now: The time, with its zone.

    Raises:
        HocketError: The refusals of `hocket.packages.evaluate` and `hocket.packages.verify_release`.
    """
    releases = (release,) if release else ()
    proof = evaluate(
        subject,
        releases,
        embedded_key_id,
        trust=terms.trust,
        policy=terms.policy,
        revoked=terms.revoked,
        now=now,
    )[0]
    if release and proof.kind == _EMBEDDED:  # releases come first: this one is no proof, and this says why
        return verify_release(release, subject, trust=terms.trust, revoked=terms.revoked, now=now)
    return proof


def judge(
    subject: Subject, releases: Sequence[Dated], embedded_key_id: str | None, since: datetime, terms: Terms
) -> Standing:
    """What admitted bytes are worth now (rule 4).

    Args:
        subject: The bytes.
        releases: Their releases.
        embedded_key_id: Key of the verified signature inside a package; None if there is none.
        since: When that signature came.
        terms: Who is trusted.
    """
    released = [_verdict(subject, (release.envelope,), None, release.time, terms) for release in releases]
    signed = [_verdict(subject, (), embedded_key_id, since, terms)] if embedded_key_id or not releases else []
    verdicts = {*released, *signed}
    by_policy = verdicts == {_POLICY}
    return Standing(
        state=State.ACTIVE if by_policy else _state(verdicts),
        by_policy=by_policy,
        releases=tuple(_state({verdict}) for verdict in released),
        embedded_trusted=_EMBEDDED in signed,
    )


def expert_shape(
    feature_count: int | None, feature_count_min: int, labels: Sequence[str | None] | None, column_count: int
) -> Shape:
    """The shape of one expert of a package.

    Args:
        feature_count: Width of its input; None when the package does not say.
        feature_count_min: Least width it can read.
        labels: One per column, None for a column to drop; None for a regressor.
        column_count: Columns of its answer.
    """
    if labels is None:
        return Shape(feature_count, feature_count_min, None, column_count)
    shown = tuple(label for label in labels if label is not None)
    return Shape(feature_count, feature_count_min, shown, len(shown))


def align(record: MixtureRecord, members: Sequence[Shape]) -> Shape:
    """The shape of a mixture, if its members fit together (rule 3).

    Args:
        record: The mixture.
        members: The shape of each member, in order.

    Raises:
        HocketError: `MEMBERS_NOT_ALIGNED` if they do not; `BAD_MIXTURE` if they nest too deep or are too many.
    """
    depth = 1 + max(member.depth for member in members)
    if depth > DEPTH_MAX:
        raise HocketError(
            Reason.BAD_MIXTURE,
            "a mixture may contain mixtures of experts, but none that contain mixtures: list their members instead",
        )
    expert_count = sum(member.expert_count for member in members)
    if expert_count > MEMBERS_MAX:
        raise HocketError(Reason.BAD_MIXTURE, f"the mixture has {expert_count} experts in all, more than {MEMBERS_MAX}")
    feature_count, feature_count_min = _width(record, members)
    labels = _labels(record, members)
    column_count = members[0].column_count if labels is None else len(labels)
    return Shape(feature_count, feature_count_min, labels, column_count, expert_count, depth)


def _width(record: MixtureRecord, members: Sequence[Shape]) -> tuple[int | None, int]:
    """The input's width where anyone says it, and the least that all can read."""
    stated = {member.feature_count for member in members if member.feature_count is not None}
    if isinstance(record.gate, SoftmaxGate):
        stated.add(record.gate.features)
    if len(stated) > 1:
        raise _not_aligned(f"they and the gate read inputs of different widths: {', '.join(map(str, sorted(stated)))}")
    width = next(iter(stated), None)
    least = max(member.feature_count_min for member in members)
    if width is not None and least > width:
        raise _not_aligned(f"one of them reads {least} features, the input has {width}")
    return width, least


def _labels(record: MixtureRecord, members: Sequence[Shape]) -> tuple[str, ...] | None:
    """The ordered labels of the answer; None for numbers."""
    scored = [member.labels for member in members if member.labels is not None]
    if not scored:
        if record.labels is not None:
            raise _not_aligned("the record lists labels, but they answer with numbers")
        if len({member.column_count for member in members}) > 1:
            raise _not_aligned("they answer with different numbers of columns")
        return None
    if len(scored) < len(members):
        raise _not_aligned("some of them score labels, others answer with numbers")
    union = tuple(dict.fromkeys(label for labels in scored for label in labels))
    if record.labels is None:
        if len(union) > LABELS_MAX:
            raise _not_aligned(f"together they score {len(union)} labels, more than {LABELS_MAX}")
        return union
    listed = frozenset(record.labels)
    if missing := next((label for label in union if label not in listed), None):
        raise _not_aligned(f"the record's labels lack {missing!r}, which one of them scores")
    return record.labels


def _check_columns(facts: ModelFacts) -> None:
    columns = expert_shape(facts.n_features, facts.n_features_min, facts.labels, facts.output_columns).column_count
    if columns > COLUMNS_MAX:
        raise HocketError(
            Reason.NOT_SERVABLE,
            f"this package answers {columns} columns, an answer has at most {COLUMNS_MAX}: "
            "train it with fewer classes or clusters, or drop columns (custom.hocket.labels: null)",
            digest=facts.digest,
        )


def _own_mixture(digest: str, model: MixtureOfExperts) -> OwnMixture:
    weights = floats(model.gate.weights)
    tensor = gate_tensor(weights)
    features, experts = weights.shape
    gate = SoftmaxGate(features, experts, digest_of(tensor), model.gate.temperature)
    record = MixtureRecord(
        name=f"apr-{digest.removeprefix('sha256:')[:16]}",
        members=tuple(ExpertId(digest, ordinal) for ordinal in range(experts)),
        gate=gate,
        top_k=model.top_k,
    )
    return OwnMixture(record, tensor)


def _verdict(
    subject: Subject, releases: tuple[bytes, ...], embedded_key_id: str | None, now: datetime, terms: Terms
) -> str:
    """The kind of one proof, or the reason why it is none."""
    try:
        proofs = evaluate(
            subject,
            releases,
            embedded_key_id,
            trust=terms.trust,
            policy=terms.policy,
            revoked=terms.revoked,
            now=now,
        )
    except HocketError as error:
        return error.reason
    return proofs[0].kind


def _state(verdicts: set[str]) -> State:
    if verdicts & {_RELEASE, _EMBEDDED}:
        return State.ACTIVE
    return State.KEY_REVOKED if Reason.KEY_REVOKED in verdicts else State.UNTRUSTED


def _not_aligned(what: str) -> HocketError:
    return HocketError(Reason.MEMBERS_NOT_ALIGNED, f"the members cannot be combined: {what}")
