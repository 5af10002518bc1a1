"""What the registry holds: the store and the blobs, changed together, and judged by the present trust.

Every method runs on the one thread that owns the store, one after the other, so that what it reads stays true until it
has changed it. A change is durable when its method returns: first the blobs, then the row.
"""

from __future__ import annotations

import re
import sqlite3
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

import structlog
from google.protobuf.struct_pb2 import Struct

from hocket.errors import HocketError, Reason
from hocket.identity import ReleaseName, digest_of, is_digest, key_bytes, key_id_of
from hocket.mixtures import MixtureRef, SoftmaxGate
from hocket.packages import DEFAULT_LIMITS, Limits, Policy, TrustRoots
from hocket.packages.adapter import AdapterFacts
from hocket.telemetry import metrics
from hocket.trust_folder import TrustFolder
from hocket.v1.registry_pb2 import KeyRevocation
from services.registry import views
from services.registry.admission import Shape, State, Terms, prove
from services.registry.blobs import Blobs
from services.registry.composing import check_requirements
from services.registry.disk import FOLDER_MODE, disk, sync_folder
from services.registry.members import shape_of
from services.registry.searching import search_row
from services.registry.settling import microseconds, settle_all, settle_own_mixture, settle_package
from services.registry.store import MixtureRow, PackageRow, ReleaseRow, Store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from hocket.mixtures import MixtureRecord
    from hocket.packages import Proof
    from hocket.v1.mixture_pb2 import Mixture
    from hocket.v1.package_pb2 import Package
    from services.registry.admission import AdmittedMixture, AdmittedPackage
    from services.registry.blobs import Draft, Reader
    from services.registry.feed import Change
    from services.registry.store import NameRow, Query, Transaction

RELEASES_MAX: Final = 64
"""Releases of one package: they travel in one message."""
EXPLANATION_LENGTH_MAX: Final = 1024
PAGE_BYTES_MAX: Final = 4 * 2**20
"""A page of packages ends with the package that fills this."""
METADATA_BYTES_MAX: Final = 4 * 2**20
"""Metadata travels in one message, labels in every message about the package."""
METADATA_DEPTH_MAX: Final = 24
"""A message is read if at most 100 messages lie inside each other; each level of metadata takes three."""

_CHANGES_AT_ONCE: Final = 64
_FOUND_AT_ONCE: Final = 64
_KEY_ID: Final = re.compile(r"[0-9a-f]{64}")

_log = structlog.get_logger("registry")


@dataclass(frozen=True, slots=True)
class PackagePage:
    """Some packages, in the order of their digests.

    Args:
        packages: Without metadata.
        last: Digest to go on behind; empty at the end.
        revision: Of the registry.
    """

    packages: Sequence[Package]
    last: str
    revision: int


@dataclass(frozen=True, slots=True)
class StoredMixture:
    """A mixture with its body and proof.

    Args:
        mixture: As it now stands.
        body: Canonical JSON.
        release: As signed; empty if it has none.
    """

    mixture: Mixture
    body: bytes
    release: bytes


class Catalog:
    """Packages, mixtures and revocations.

    Any method that touches the disk may raise `services.registry.disk.StorageError`.

    Args:
        data_dir: Folder of `registry.db` and `blobs/`; made if need be.
        trust_dir: The trust folder.
        policy: What is admitted beyond proof.
        package_bytes_max: Largest package.
        on_change: Told the newest revision after each durable change.

    Attributes:
        blobs: The bytes. Drafts and readers may be used on any thread.
        limits: Bounds on packages.
        terms: Who is trusted now; replaced, never changed, so that any thread may read it.
    """

    def __init__(
        self,
        data_dir: Path,
        trust_dir: Path,
        *,
        policy: Policy,
        package_bytes_max: int,
        on_change: Callable[[int], None],
    ) -> None:
        self.blobs = Blobs(data_dir / "blobs")
        self.limits: Limits = replace(
            DEFAULT_LIMITS,
            package_bytes=package_bytes_max,
            metadata_bytes=METADATA_BYTES_MAX,
            metadata_depth=METADATA_DEPTH_MAX,
        )
        self.terms = Terms(TrustRoots(), policy, frozenset())
        self._data_dir = data_dir
        self._store = Store(data_dir / "registry.db")
        self._trust_folder = TrustFolder(trust_dir)
        self._on_change = on_change
        self._settled = False

    def open(self) -> None:
        """Open what is on disk, and judge it by the trust folder as it is now.

        Raises:
            HocketError: `NOT_READY` or `BLOB_CORRUPT` if the store cannot be used.
        """
        with disk():
            self._data_dir.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
            sync_folder(self._data_dir.parent)
        self._store.open()
        self.blobs.open()
        self._let_all_be_found()
        with self._store.begin() as tx:
            revoked = frozenset(row.key_id for row in tx.revocations_since(0))
        self.terms = replace(self.terms, revoked=revoked)
        self._set_trust(self._trust_folder.read())
        with self._store.begin() as tx:
            revision, by_policy_count = tx.revision(), tx.by_policy_count()
        _log.info("registry_open", data_dir=str(self._data_dir), revision=revision, sqlite=sqlite3.sqlite_version)
        if self.terms.policy.allow_unsigned:
            _log.warning("unsigned_allowed", admitted_count=by_policy_count)
        if self.terms.policy.allow_expired_licences:
            _log.warning("expired_licences_allowed")

    def close(self) -> None:
        """Let go of the store."""
        self._store.close()

    # Packages

    def publish(self, admitted: AdmittedPackage, draft: Draft, gate: Draft | None) -> tuple[Package, bool]:
        """Keep a package that was admitted, or the release that it came with.

        Args:
            admitted: The package.
            draft: Its bytes.
            gate: The gate tensor of the mixture that it is by itself.

        Returns:
            The package, and whether there was anything new about it.

        Raises:
            HocketError: `YANKED`, `VERSION_TAKEN`, `TOO_LARGE`, `NAME_TAKEN`, or a refusal of `prove` or of
                `check_requirements`.
        """
        digest, now = admitted.facts.digest, datetime.now(UTC)
        with self._store.begin() as tx:
            # Again, because trust may have changed since.
            proof = prove(admitted.subject, admitted.release, admitted.embedded_key_id, terms=self.terms, now=now)
            known = tx.package(digest)
            created = known is None
            if known is None:
                _insert_package(tx, admitted, now)
            elif known.state == State.YANKED:
                raise HocketError(Reason.YANKED, f"{digest} was yanked for good: publish other bytes", digest=digest)
            if proof.release is None:
                tx.touch_package(digest, microseconds(now))
            else:
                created |= _keep_release(tx, digest, proof, proof.release, now)
            row, releases = _package(tx, digest)
            settle_package(tx, row, releases, self.terms, changed=created)
            if created and isinstance(admitted.facts, AdapterFacts):
                check_requirements(tx, admitted.facts, proof.publisher or "")
            draft.commit()
            if gate is not None:
                gate.commit()
            package, revision = views.package_message(*_package(tx, digest)), tx.revision()
        if created:
            _log.info("published", digest=digest, release=str(proof.release or ""), revision=revision)
        _note_policy(proof, digest)
        self._on_change(revision)
        return package, created

    def package(self, address: str) -> tuple[Package, int]:
        """One package with its metadata, and the registry's revision.

        Args:
            address: Digest or `publisher/name@version`.

        Raises:
            HocketError: `UNKNOWN_PACKAGE`, or `BAD_REQUEST` if the address is neither.
        """
        with self._store.begin() as tx:
            digest = address if is_digest(address) else tx.released_digest(ReleaseName.parse(address))
            if digest is None:
                raise _unknown_package(address)
            return views.package_message(*_package(tx, digest), tx.metadata(digest)), tx.revision()

    def download(self, digest: str) -> tuple[Package, list[bytes]]:
        """A package without its metadata, and its releases as signed.

        Raises:
            HocketError: `UNKNOWN_PACKAGE`.
        """
        with self._store.begin() as tx:
            row, releases = _package(tx, digest)
            return views.package_message(row, releases), [release.envelope for release in releases]

    def list_packages(self, after: str, query: Query, count: int) -> PackagePage:
        """Packages by digest.

        Args:
            after: Digest to go on behind; empty to begin.
            query: Which ones.
            count: How many at most.
        """
        messages: list[Package] = []
        size_bytes = 0
        with self._store.begin() as tx:
            rows, more = _some(tx.packages_after(after, query, count + 1), count)
            releases = tx.releases([row.digest for row in rows])
            for row in rows:
                if size_bytes >= PAGE_BYTES_MAX:
                    break
                messages.append(views.package_message(row, releases[row.digest]))
                size_bytes += messages[-1].ByteSize()
            last = messages[-1].digest if more or len(messages) < len(rows) else ""
            return PackagePage(messages, last, tx.revision())

    def yank(self, digest: str, explanation: str) -> Package:
        """Withdraw a package for good.

        Raises:
            HocketError: `UNKNOWN_PACKAGE`, or `BAD_REQUEST` for an explanation that is too long.
        """
        _check_explanation(explanation)
        with self._store.begin() as tx:
            row, _ = _package(tx, digest)
            if row.state != State.YANKED:
                tx.update_package(digest, state=State.YANKED, yank_explanation=explanation)
                settle_own_mixture(tx, digest, State.YANKED, by_policy=row.by_policy)
            package, revision = views.package_message(*_package(tx, digest)), tx.revision()
        _log.info("yanked", digest=digest, explanation=explanation, revision=revision)
        self._on_change(revision)
        return package

    # Trust

    def revoke(self, key: str, explanation: str) -> tuple[str, list[str]]:
        """Withdraw whatever rests on a key, for good.

        Args:
            key: `ed25519:<64 hex>`, or a key id.
            explanation: Why, for people.

        Returns:
            The key's id, and the digests of the packages that have lost their last proof by it.

        Raises:
            HocketError: `BAD_REQUEST` if this is no key, or for an explanation that is too long.
        """
        _check_explanation(explanation)
        key_id = key if _KEY_ID.fullmatch(key) else key_id_of(key_bytes(key))
        terms = replace(self.terms, revoked=self.terms.revoked | {key_id})
        with self._store.begin() as tx:
            if key_id not in self.terms.revoked:
                tx.insert_revocation(key_id, explanation)
                settle_all(tx, terms, key_id)
            withdrawn, revision = tx.packages_of_key(key_id, State.KEY_REVOKED), tx.revision()
        self.terms = terms
        _log.info("key_revoked", key_id=key_id, explanation=explanation, revision=revision)
        self._on_change(revision)
        return key_id, withdrawn

    def follow_trust(self) -> None:
        """Judge everything again if the trust folder has changed."""
        if self._trust_folder.changed() or not self._settled:
            self._set_trust(self._trust_folder.read())

    # Mixtures

    def put_mixture(self, admitted: AdmittedMixture, gate: Draft | None, etag: str) -> Mixture:
        """Let a mixture's name stand for a body that was admitted.

        Args:
            admitted: The mixture.
            gate: Its gate tensor; None if the gate needs none.
            etag: Digest of the mixture it replaces; empty for whatever is there.

        Raises:
            HocketError: `NAME_TAKEN`, `VERSION_TAKEN`, `ETAG_STALE`, or a refusal of `prove` or of `members.shape_of`.
        """
        record, now = admitted.record, datetime.now(UTC)
        with self._store.begin() as tx:
            # Again, because trust may have changed since.
            proof = prove(admitted.subject, admitted.release, None, terms=self.terms, now=now)
            name = tx.name(record.name)
            current = _current(tx, name)
            _check_owner(current, proof)
            if name is None or current is None or not _is_same(current, admitted):
                if etag and (current is None or current.digest != etag):
                    raise _stale(record.name)
                _bind_version(tx, admitted, proof)
                current = _mixture_row(admitted, proof, shape_of(tx, record), now)
                children = [member.digest for member in record.members if isinstance(member, MixtureRef)]
                tx.put_mixture(current, admitted.body, children)
                name = tx.set_name(record.name, current.digest)
            unused = tx.drop_unused_mixtures()
            if gate is not None:
                gate.commit()
            mixture, revision = views.mixture_message(current, name), tx.revision()
        self._forget(unused)
        _log.info("mixture_put", name=mixture.name, digest=mixture.digest, revision=revision)
        _note_policy(proof, mixture.digest)
        self._on_change(revision)
        return mixture

    def mixture(self, address: str, gate: Reader) -> StoredMixture:
        """One mixture with everything that makes it one.

        Args:
            address: Name, or digest of a body.
            gate: Opened on its gate tensor, if the gate has one: later it may have been removed.

        Raises:
            HocketError: `UNKNOWN_MIXTURE`, or `BLOB_CORRUPT` if what is stored is not what was put.
        """
        with self._store.begin() as tx:
            row = tx.mixture(address) if is_digest(address) else _current(tx, tx.name(address))
            if row is None:
                raise _unknown_mixture(address)
            body = tx.body(row.digest)
            if digest_of(body) != row.digest:
                raise HocketError(
                    Reason.BLOB_CORRUPT,
                    f"the stored body of {row.name} is damaged: delete the mixture, and put it again",
                )
            if row.gate_digest is not None:
                gate.open(row.gate_digest, row.gate_bytes)
            return StoredMixture(views.mixture_message(row, tx.name(row.name)), body, row.envelope)

    def delete_mixture(self, name: str, etag: str) -> int:
        """Free a mixture's name, and return the revision of that.

        Raises:
            HocketError: `UNKNOWN_MIXTURE`, `ETAG_STALE`, or `MIXTURE_IN_USE`.
        """
        with self._store.begin() as tx:
            named = tx.name(name)
            row = _current(tx, named)
            if named is None or row is None:
                raise _unknown_mixture(name)
            if etag and etag != row.digest:
                raise _stale(name)
            if row.package_digest is not None:
                raise HocketError(
                    Reason.MIXTURE_IN_USE, f"{name} is the package {row.package_digest} itself: yank that instead"
                )
            if parents := tx.parents(row.digest):
                raise HocketError(
                    Reason.MIXTURE_IN_USE, f"{name} is a member of {', '.join(parents[:5])}: change that first"
                )
            revision = tx.delete_name(named).revision
            unused = tx.drop_unused_mixtures()
        self._forget(unused)
        _log.info("mixture_deleted", name=name, revision=revision)
        self._on_change(revision)
        return revision

    # The feed

    def changes(self, after_revision: int) -> list[tuple[int, Change]]:
        """The next changes after a revision, in order, each package, mixture and revocation in its newest state."""
        count = _CHANGES_AT_ONCE
        found: list[tuple[int, Change]] = []
        with self._store.begin() as tx:
            packages = list(tx.packages_since(after_revision, count))
            releases = tx.releases([row.digest for row in packages])
            found += [(row.revision, views.package_message(row, releases[row.digest])) for row in packages]
            names = tx.names_since(after_revision, count)
            mixtures = tx.mixtures([name.last_digest for name in names])
            found += [(name.revision, views.name_message(name, mixtures.get(name.last_digest))) for name in names]
            found += [
                (row.revision, KeyRevocation(key_id=row.key_id, explanation=row.explanation))
                for row in tx.revocations_since(after_revision, count)
            ]
        return sorted(found, key=lambda change: change[0])[:count]

    # Inside

    def _let_all_be_found(self) -> None:
        """Let packages be found that a registry which knew no search has left."""
        with self._store.begin() as tx:
            package_count = tx.not_found_count()
        if package_count == 0:
            return
        _log.info("search_filling", package_count=package_count)
        more = True
        while more:
            with self._store.begin() as tx:
                rows = tx.packages_not_found(_FOUND_AT_ONCE)
                for row in rows:
                    metadata = Struct.FromString(tx.metadata(row.digest))
                    tx.insert_search(search_row(row.digest, views.stored_facts(row), metadata))
            more = bool(rows)
        _log.info("search_filled", package_count=package_count)

    def _set_trust(self, trust: TrustRoots) -> None:
        self._settled = False
        self.terms = replace(self.terms, trust=trust)
        with self._store.begin() as tx:
            settle_all(tx, self.terms)
            revision = tx.revision()
        self._settled = True
        _log.info("trust_read", key_count=len(trust.keys), revision=revision)
        self._on_change(revision)

    def _forget(self, gates: Sequence[str]) -> None:
        for gate in gates:
            self.blobs.remove(gate)


def _note_policy(proof: Proof, digest: str) -> None:
    """Count and log what nothing but policy admits."""
    if proof.kind == "policy":
        metrics.UNSIGNED_USES.labels("registry").inc()
        _log.warning("unsigned_admitted", digest=digest)


def _some(rows: Iterator[PackageRow], count: int) -> tuple[list[PackageRow], bool]:
    """The first rows, as many as a page may hold, and whether there are more."""
    found: list[PackageRow] = []
    size_bytes = 0
    for row in rows:
        if len(found) == count or size_bytes >= PAGE_BYTES_MAX:
            return found, True
        found.append(row)
        size_bytes += len(row.facts)
    return found, False


def _insert_package(tx: Transaction, admitted: AdmittedPackage, now: datetime) -> None:
    """Add a package that is not judged yet, and the mixture that it is by itself."""
    facts = admitted.facts
    message, metadata = views.facts_message(facts), views.metadata_message(facts.metadata)
    row = PackageRow(
        digest=facts.digest,
        size_bytes=facts.size_bytes,
        format=facts.format,
        facts=message.SerializeToString(),
        embedded_key_id=admitted.embedded_key_id,
        embedded_trusted=False,
        state=State.UNTRUSTED,
        by_policy=False,
        publish_time_us=microseconds(now),
        proof_time_us=microseconds(now),
        revision=0,
    )
    tx.insert_package(row, metadata.SerializeToString())
    tx.insert_search(search_row(row.digest, message, metadata))
    if admitted.mixture is not None:
        _insert_own_mixture(tx, row, admitted.mixture.record)


def _insert_own_mixture(tx: Transaction, package: PackageRow, record: MixtureRecord) -> None:
    if tx.name(record.name) is not None:
        raise HocketError(Reason.NAME_TAKEN, f"{record.name} is another package's own mixture")
    shape, _ = views.package_shape(package)
    body = record.body()
    row = MixtureRow(
        digest=digest_of(body),
        name=record.name,
        body_bytes=len(body),
        shape=asdict(replace(shape, expert_count=len(record.members), depth=1)),
        gate_digest=_gate_digest(record),
        gate_bytes=_gate_bytes(record),
        package_digest=package.digest,
        envelope=b"",
        publisher="",
        version="",
        key_id="",
        state=package.state,
        by_policy=package.by_policy,
        publish_time_us=package.publish_time_us,
    )
    tx.put_mixture(row, body, ())
    tx.set_name(record.name, row.digest)


def _keep_release(tx: Transaction, digest: str, proof: Proof, name: ReleaseName, now: datetime) -> bool:
    """Add a release, or note that it came again; whether it is new."""
    taken = tx.released_digest(name)
    if taken not in {None, digest}:
        raise HocketError(
            Reason.VERSION_TAKEN,
            f"{name} is {taken}: what was published under a version stays; publish this as a new version",
        )
    release = ReleaseRow(
        publisher=name.publisher,
        name=name.name,
        version=name.version,
        key_id=proof.key_id or "",
        digest=digest,
        envelope=proof.envelope or b"",
        state=State.UNTRUSTED,
        publish_time_us=microseconds(now),
    )
    known = tx.releases([digest])[digest]
    if any(other.key == release.key for other in known):
        tx.update_release(release, publish_time_us=release.publish_time_us)
        return False
    if len(known) == RELEASES_MAX:
        raise HocketError(Reason.TOO_LARGE, f"{digest} has {RELEASES_MAX} releases, the most there may be")
    tx.insert_release(release)
    return True


def _package(tx: Transaction, digest: str) -> tuple[PackageRow, list[ReleaseRow]]:
    """A package and its releases."""
    row = tx.package(digest)
    if row is None:
        raise _unknown_package(digest)
    return row, tx.releases([digest])[digest]


def _current(tx: Transaction, name: NameRow | None) -> MixtureRow | None:
    """The mixture that a name stands for."""
    return None if name is None or name.digest is None else tx.mixture(name.digest)


def _mixture_row(admitted: AdmittedMixture, proof: Proof, shape: Shape, now: datetime) -> MixtureRow:
    record = admitted.record
    return MixtureRow(
        digest=admitted.subject.digest,
        name=record.name,
        body_bytes=len(admitted.body),
        shape=asdict(shape),
        gate_digest=_gate_digest(record),
        gate_bytes=_gate_bytes(record),
        package_digest=None,
        envelope=admitted.release,
        publisher=proof.publisher or "",
        version="" if proof.release is None else proof.release.version,
        key_id=proof.key_id or "",
        state=State.ACTIVE,
        by_policy=proof.kind == "policy",
        publish_time_us=microseconds(now),
    )


def _is_same(current: MixtureRow, admitted: AdmittedMixture) -> bool:
    """Whether exactly this is here already, and serves."""
    return (current.digest, current.envelope, current.state) == (
        admitted.subject.digest,
        admitted.release,
        State.ACTIVE,
    )


def _check_owner(current: MixtureRow | None, proof: Proof) -> None:
    if current is not None and current.publisher != (proof.publisher or ""):
        owner = current.publisher or "somebody unsigned"
        raise HocketError(Reason.NAME_TAKEN, f"the mixture {current.name} belongs to {owner}: choose another name")


def _bind_version(tx: Transaction, admitted: AdmittedMixture, proof: Proof) -> None:
    if proof.release is None:
        return
    bound = tx.bind_mixture_version(proof.release, admitted.subject.digest)
    if bound != admitted.subject.digest:
        raise HocketError(
            Reason.VERSION_TAKEN,
            f"{proof.release} is {bound}: what was signed under a version stays; sign this as a new version",
        )


def _gate_digest(record: MixtureRecord) -> str | None:
    return record.gate.weights if isinstance(record.gate, SoftmaxGate) else None


def _gate_bytes(record: MixtureRecord) -> int:
    return record.gate.tensor_bytes if isinstance(record.gate, SoftmaxGate) else 0


def _check_explanation(explanation: str) -> None:
    if len(explanation) > EXPLANATION_LENGTH_MAX:
        raise HocketError(
            Reason.BAD_REQUEST, f"an explanation has at most {EXPLANATION_LENGTH_MAX} characters", field="explanation"
        )


def _unknown_package(address: str) -> HocketError:
    return HocketError(Reason.UNKNOWN_PACKAGE, f"this registry has no package {address[:200]!r}")


def _unknown_mixture(address: str) -> HocketError:
    return HocketError(Reason.UNKNOWN_MIXTURE, f"this registry has no mixture {address[:200]!r}")


def _stale(name: str) -> HocketError:
    return HocketError(
        Reason.ETAG_STALE, f"the mixture {name} has changed, or is not there: fetch it, then decide again"
    )
