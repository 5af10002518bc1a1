"""From bytes to a package somebody vouches for. Bytes in, a package or one refusal out.

The order is the point. The file is hashed. Releases and the signature embedded in an `.apr` file, whose fixed-size
fields and lengths take it apart, are verified and held against the trusted keys. Only of bytes that passed all that is
any content decompressed and decoded. The magic bytes say which format it is, never a file's name.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from hocket.errors import HocketError, Reason
from hocket.identity import digest_of, key_id_of
from hocket.packages import apr, expert
from hocket.packages.adapter import AdapterFacts
from hocket.packages.apr import about
from hocket.packages.keys import verify
from hocket.packages.limits import DEFAULT_LIMITS, Limits
from hocket.packages.release import ClaimedRelease, Purpose, Subject, read_release, verify_release
from hocket.packages.trust import Policy, Proof, Revocations, TrustRoots

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

    from hocket.identity import ReleaseName
    from hocket.packages.adapter import Adapter
    from hocket.packages.apr import Container
    from hocket.packages.apr.encryption import Credential
    from hocket.packages.model import Model, ModelFacts

_APR: Final = "apr"
_EXPERT: Final = "expert"

PackageFacts: TypeAlias = "ModelFacts | AdapterFacts"
"""What is known about a package: of an `.apr` file, or of an `.expert` file."""

Credentials: TypeAlias = "Mapping[str, Credential]"
"""What opens encrypted packages, by digest or by `publisher/name`."""

NO_CREDENTIALS: Final[Credentials] = MappingProxyType({})
"""Encrypted packages stay closed."""

_MOST_TELLING_FIRST: Final = (
    # somebody trusted signed, and it does not count: a person can act on that
    Reason.KEY_REVOKED,
    Reason.KEY_EXPIRED,
    Reason.NAME_NOT_ALLOWED,
    Reason.DIGEST_MISMATCH,
    # somebody pretends
    Reason.SIGNATURE_INVALID,
    Reason.BAD_RELEASE,
    # nobody trusted said anything
    Reason.SIGNER_NOT_TRUSTED,
    Reason.UNSIGNED,
)
_EXPIRY_CHARS_SHOWN: Final = 40
_NOBODY_VOUCHES: Final = frozenset({Reason.SIGNER_NOT_TRUSTED, Reason.UNSIGNED})


@dataclass(frozen=True, slots=True)
class EmbeddedFacts:
    """The signature inside an `.apr` file, which proves as much as a release; `.expert` files have none of the kind.

    Attributes:
        present: Whether there is one.
        key_id: The key it names; None if absent.
        verified: Whether it is that key's signature of these bytes: says that they are whole, not who made them.
        trusted: Whether it is verified and the key is trusted at the time asked about.
    """

    present: bool = False
    key_id: str | None = None
    verified: bool = False
    trusted: bool = False


@dataclass(frozen=True, slots=True)
class Provenance:
    """Why a package was accepted.

    Attributes:
        proofs: One or more; releases in the order given, then the embedded signature.
        embedded: The signature inside the file.
    """

    proofs: tuple[Proof, ...]
    embedded: EmbeddedFacts


@dataclass(frozen=True, slots=True)
class Package:
    """A package that may serve: a model with its facts, or an adapter with its facts."""

    facts: PackageFacts
    provenance: Provenance
    model: Model | Adapter


@dataclass(frozen=True, slots=True)
class DescribedPackage:
    """A package that somebody vouches for, opened as far as that takes no credential.

    Attributes:
        facts: What it holds; of an encrypted one, what it declares: claims that whoever decrypts it compares.
        provenance: Why it was accepted.
        model: What it holds, decoded; None of an encrypted one.
    """

    facts: PackageFacts
    provenance: Provenance
    model: Model | Adapter | None


@dataclass(frozen=True, slots=True)
class ReleaseFacts:
    """What a release beside an inspected file says.

    Attributes:
        claim: What it claims, true or not.
        refused: Why it proves nothing about the file, or names it otherwise than its manifest; None if it is a proof.
    """

    claim: ClaimedRelease
    refused: Reason | None


@dataclass(frozen=True, slots=True)
class Inspection:
    """Everything a file says about itself, believed or not."""

    facts: PackageFacts
    embedded: EmbeddedFacts
    releases: tuple[ReleaseFacts, ...]


def open_package(  # noqa: PLR0913 - what to open, who counts, and what opens it
    data: bytes | memoryview,
    *,
    releases: Sequence[bytes] = (),
    trust: TrustRoots,
    policy: Policy = Policy(),  # noqa: B008 - frozen
    revoked: Revocations = frozenset(),
    now: datetime,
    limits: Limits = DEFAULT_LIMITS,
    digest: str | None = None,
    credentials: Credentials = NO_CREDENTIALS,
) -> Package:
    """Open a package, in this order: hash, verify, and only then decompress and decode.

    A package is accepted if at least one proof holds, whatever becomes of the others (see `evaluate`). An embedded
    signature has to verify even where another proof holds, though its key need not be trusted then. The signature
    that upstream's tools leave inside an `.expert` file is no proof: it is found in the facts, whatever it is worth.

    An encrypted package is opened with the credential for its digest, else with that for the `publisher/name` of the
    first release that is a proof and has one. A name that is not proven opens nothing, and no second credential is
    tried. Deriving a key from a password takes some 20 ms of a core and 19 MiB: call it from a thread where an event
    loop runs.

    Args:
        data: The whole file.
        releases: The DSSE envelopes that came with it.
        trust: The trusted keys.
        policy: What is accepted beyond proof.
        revoked: Key ids that are trusted no longer.
        now: The time, with its zone.
        limits: Bounds on sizes.
        digest: The digest the bytes are supposed to have, when they were asked for by it.
        credentials: For encrypted packages.

    Raises:
        HocketError: `DIGEST_MISMATCH` if the bytes are not those asked for; for an `.apr` file the container's
            refusals (`hocket.packages.apr.split`) and `SIGNATURE_INVALID` for a broken embedded signature; the
            refusals of `evaluate`; `LICENCE_EXPIRED` (`check_licence`); and the content's
            (`hocket.packages.apr.decode`, `hocket.packages.expert.decode`).
    """
    container, actual, provenance = _vouched(
        data, releases, digest, trust=trust, policy=policy, revoked=revoked, now=now, limits=limits
    )
    if container is None:
        adapter_facts, adapter = expert.decode(data, actual, limits)
        return Package(adapter_facts, provenance, adapter)
    credential = _credential(credentials, actual, provenance.proofs)
    licensed = partial(check_licence, digest=actual, policy=policy, now=now)
    facts, model = apr.decode(container, actual, limits, credential=credential, check=licensed)
    return Package(facts, provenance, model)


def describe_package(
    data: bytes | memoryview,
    *,
    releases: Sequence[bytes] = (),
    trust: TrustRoots,
    policy: Policy = Policy(),  # noqa: B008 - frozen
    revoked: Revocations = frozenset(),
    now: datetime,
    limits: Limits = DEFAULT_LIMITS,
    digest: str | None = None,
) -> DescribedPackage:
    """Open a package as `open_package` does, but an encrypted one without its credential, as far as that goes.

    For those who pass packages on and route to them, and never run one: registries.

    Args:
        data: The whole file.
        releases: The DSSE envelopes that came with it.
        trust: The trusted keys.
        policy: What is accepted beyond proof.
        revoked: Key ids that are trusted no longer.
        now: The time, with its zone.
        limits: Bounds on sizes.
        digest: The digest the bytes are supposed to have, when they were asked for by it.

    Raises:
        HocketError: As `open_package`; `ENCRYPTED` for an encrypted package that does not declare its model.
    """
    container, actual, provenance = _vouched(
        data, releases, digest, trust=trust, policy=policy, revoked=revoked, now=now, limits=limits
    )
    model: Model | Adapter
    if container is None:
        adapter_facts, model = expert.decode(data, actual, limits)
        return DescribedPackage(adapter_facts, provenance, model)
    licensed = partial(check_licence, digest=actual, policy=policy, now=now)
    if not container.header.encrypted:
        facts, model = apr.decode(container, actual, limits, check=licensed)
        return DescribedPackage(facts, provenance, model)
    facts = apr.describe(container, actual, limits)
    if facts.not_servable is not None:
        raise HocketError(
            Reason.ENCRYPTED,
            f"nobody could route to this package: {facts.not_servable} (custom.hocket.parameter_bytes and the like); "
            "encrypt the model again with `hocket apr encrypt`, or publish it in the clear",
            digest=actual,
        )
    licensed(facts.metadata)
    return DescribedPackage(facts, provenance, None)


def _vouched(
    data: bytes | memoryview,
    releases: Sequence[bytes],
    digest: str | None,
    *,
    trust: TrustRoots,
    policy: Policy,
    revoked: Revocations,
    now: datetime,
    limits: Limits,
) -> tuple[Container | None, str, Provenance]:
    """Bytes that somebody vouches for: their container if they are an `.apr` file, their digest, and why."""
    actual = digest_of(data)
    if digest is not None and digest != actual:
        raise HocketError(
            Reason.DIGEST_MISMATCH,
            f"asked for {digest}, got {actual}: fetch the file again",
            expected=digest,
            actual=actual,
        )
    if expert.is_expert(data):
        subject = Subject(Purpose.PACKAGE, actual, len(data), _EXPERT)
        proofs = evaluate(subject, releases, None, trust=trust, policy=policy, revoked=revoked, now=now)
        return None, actual, Provenance(proofs, EmbeddedFacts())
    container = apr.split(data, limits)
    embedded = _embedded_facts(container, trust, revoked, now)
    if embedded.present and not embedded.verified:
        raise HocketError(
            Reason.SIGNATURE_INVALID,
            "the signature inside the file is not one of its content by the key it names: "
            "the file was altered, fetch it from its publisher again",
        )
    subject = Subject(Purpose.PACKAGE, actual, len(data), _APR)
    proofs = evaluate(subject, releases, embedded.key_id, trust=trust, policy=policy, revoked=revoked, now=now)
    return container, actual, Provenance(proofs, embedded)


def _credential(credentials: Credentials, digest: str, proofs: Sequence[Proof]) -> Credential | None:
    """What opens a package: the credential for its digest, else for the first of its proven names that has one."""
    names = [f"{proof.release.publisher}/{proof.release.name}" for proof in proofs if proof.release is not None]
    return next((credentials[address] for address in (digest, *names) if address in credentials), None)


def evaluate(
    subject: Subject,
    releases: Sequence[bytes],
    embedded_key_id: str | None,
    *,
    trust: TrustRoots,
    policy: Policy,
    revoked: Revocations,
    now: datetime,
) -> tuple[Proof, ...]:
    """Every proof that holds for a subject now. Cheap, so that what is resident is judged again when trust changes.

    One proof is enough: a release that is forged, withdrawn or about other bytes proves nothing, and takes nothing
    away from another that does, since anyone could add such a release to any package. When none holds, the reason is
    the most telling of the failures. `policy.allow_unsigned` then accepts what nobody trusted has signed, and
    forgives no other failure.

    Args:
        subject: The bytes, or the mixture, as the caller measured them.
        releases: DSSE envelopes, verified here.
        embedded_key_id: The key whose signature inside the file was verified, when the file was opened; None if there
            is none. Mixtures have none.
        trust: The trusted keys.
        policy: What is accepted beyond proof.
        revoked: Key ids that are trusted no longer.
        now: The time, with its zone.

    Returns:
        At least one proof: releases in the order given, then the embedded signature; or the policy alone.

    Raises:
        HocketError: `KEY_REVOKED`, `KEY_EXPIRED`, `NAME_NOT_ALLOWED`, `DIGEST_MISMATCH`, `SIGNATURE_INVALID`,
            `BAD_RELEASE`, `SIGNER_NOT_TRUSTED` or `UNSIGNED`.
    """
    proofs: list[Proof] = []
    failures: list[HocketError] = []  # copies: the traceback of one itself keeps the whole file in memory
    for envelope in releases:
        try:
            proofs.append(verify_release(envelope, subject, trust=trust, revoked=revoked, now=now))
        except HocketError as error:
            failures.append(error.restated(error.message))
    if embedded_key_id is not None:
        try:
            key = trust.check(embedded_key_id, now, revoked)
            proofs.append(Proof("embedded", key.key_id, key.publisher))
        except HocketError as error:
            failures.append(error.restated(error.message))
    if proofs:
        return tuple(proofs)
    if policy.allow_unsigned and all(error.reason in _NOBODY_VOUCHES for error in failures):
        return (Proof("policy"),)
    raise min(failures, key=_rank, default=_unsigned(subject))


def inspect_package(
    data: bytes,
    releases: Sequence[bytes] = (),
    *,
    trust: TrustRoots = TrustRoots(),  # noqa: B008 - frozen
    revoked: Revocations = frozenset(),
    now: datetime,
    limits: Limits = DEFAULT_LIMITS,
) -> Inspection:
    """Show what a file says, without deciding anything: nothing is refused for want of trust.

    Of an `.apr` file metadata is parsed, the model is not; an `.expert` file is read as a whole.

    Raises:
        HocketError: For bytes that are not a well-formed package or release: the refusals of
            `hocket.packages.apr.split` and `describe`, or of `hocket.packages.expert.decode`; and `BAD_RELEASE`.
    """
    digest = digest_of(data)
    facts: PackageFacts
    if expert.is_expert(data):
        facts, _ = expert.decode(data, digest, limits)
        embedded = EmbeddedFacts()
    else:
        container = apr.split(data, limits)
        facts = apr.describe(container, digest, limits)
        embedded = _embedded_facts(container, trust, revoked, now)
    subject = Subject(Purpose.PACKAGE, digest, len(data), facts.format)
    shown = []
    for envelope in releases:
        claim = read_release(envelope)
        try:
            verify_release(envelope, subject, trust=trust, revoked=revoked, now=now)
            check_release_name(facts, claim.release.name)
            shown.append(ReleaseFacts(claim, None))
        except HocketError as error:
            shown.append(ReleaseFacts(claim, error.reason))
    return Inspection(facts, embedded, tuple(shown))


def check_release_name(facts: PackageFacts, name: ReleaseName) -> None:
    """Return if a release may give this name to a package: an adapter has the one that its manifest says.

    Others are found by that name when they require it, so a second name would be a second meaning.

    Args:
        facts: Of the package.
        name: That its release binds to it, or shall bind.

    Raises:
        HocketError: `NAME_MISMATCH` if manifest and release disagree on name or version.
    """
    if isinstance(facts, AdapterFacts) and (facts.name, facts.version) != (name.name, name.version):
        raise HocketError(
            Reason.NAME_MISMATCH,
            f"the manifest says {facts.name}@{facts.version}, the release {name.name}@{name.version}: release it under "
            "the manifest's name and version, or change the manifest and pack again",
        )


def check_licence(metadata: Mapping[str, Any], digest: str, policy: Policy, now: datetime) -> None:
    """Return if the licence inside an `.apr` file, if there is one, still holds, or policy asks for none.

    Seats are shown to whoever asks, and not counted: nothing here knows what one is.

    Args:
        metadata: Of the package, checked.
        digest: Of the package.
        policy: What is accepted beyond proof.
        now: The time, with its zone.

    Raises:
        HocketError: `LICENCE_EXPIRED` if it has ended, or its end cannot be read.
    """
    licence = about.licence(metadata)
    if licence is None or policy.allow_expired_licences or licence.expired(now) is False:
        return
    what = "is no ISO 8601 date or time" if licence.expired(now) is None else "has passed"
    raise HocketError(
        Reason.LICENCE_EXPIRED,
        f"the end of this package's licence, {str(licence.expiry)[:_EXPIRY_CHARS_SHOWN]!a}, {what}: "
        "ask its publisher for a new one, or set allow_expired_licences",
        digest=digest,
    )


def _embedded_facts(container: Container, trust: TrustRoots, revoked: Revocations, now: datetime) -> EmbeddedFacts:
    embedded = container.signature
    if embedded is None:
        return EmbeddedFacts()
    key_id = key_id_of(embedded.public_key)
    try:
        verify(embedded.public_key, container.signed_bytes, embedded.signature)
    except HocketError:
        return EmbeddedFacts(present=True, key_id=key_id)
    try:
        trust.check(key_id, now, revoked)
    except HocketError:
        return EmbeddedFacts(present=True, key_id=key_id, verified=True)
    return EmbeddedFacts(present=True, key_id=key_id, verified=True, trusted=True)


def _rank(failure: HocketError) -> int:
    return _MOST_TELLING_FIRST.index(failure.reason)


def _unsigned(subject: Subject) -> HocketError:
    return HocketError(
        Reason.UNSIGNED,
        f"nobody vouches for {subject.digest}: publish it with a release by a trusted key (`hocket sign`)",
        digest=subject.digest,
    )
