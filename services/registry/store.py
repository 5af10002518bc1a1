"""Rows that outlive a restart: SQLite, written by one connection on one thread.

The database is in WAL mode with full synchronisation: a commit that returned outlasts a power failure. It is locked
exclusively, so that a second registry on the same folder does not start. Every durable change of a package, a mixture
or a revocation takes the next number of one sequence, the revision, so that the newest state of everything, ordered by
revision, is the history that the feed tells.

Rows in, rows out: nothing here decides anything. States are spelled as in `services.registry.admission.State`.
"""

from __future__ import annotations

import sqlite3
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sql
from sqlalchemy.exc import DatabaseError, OperationalError
from sqlalchemy.pool import StaticPool

from hocket.errors import HocketError, Reason
from services.registry.disk import check_database_error

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from hocket.identity import ReleaseName

SCHEMA_VERSION: Final = 2
"""Version 1 had no search, and no package in it was an adapter: its registry could not read what is here now."""
_READABLE: Final = (0, 1, SCHEMA_VERSION)
"""A new file has version 0; one of version 1 is upgraded in place."""
_LOCK_TIMEOUT_SECONDS: Final = 0.5
_IN_ONE_QUERY: Final = 500
"""Values in one `IN (...)`: SQLite allows 999 in old builds."""

_tables: Final = sql.MetaData()

_revisions: Final = sql.Table("revisions", _tables, sql.Column("newest", sql.BigInteger, nullable=False))

_packages: Final = sql.Table(
    "packages",
    _tables,
    sql.Column("digest", sql.String, primary_key=True),
    sql.Column("size_bytes", sql.BigInteger, nullable=False),
    sql.Column("format", sql.String, nullable=False),
    sql.Column("facts", sql.LargeBinary, nullable=False),
    sql.Column("metadata", sql.LargeBinary, nullable=False),
    sql.Column("embedded_key_id", sql.String, index=True),
    sql.Column("embedded_trusted", sql.Boolean, nullable=False),
    sql.Column("state", sql.String, nullable=False),
    sql.Column("by_policy", sql.Boolean, nullable=False),
    sql.Column("yank_explanation", sql.String, nullable=False),
    sql.Column("publish_time_us", sql.BigInteger, nullable=False),
    sql.Column("proof_time_us", sql.BigInteger, nullable=False),
    sql.Column("revision", sql.BigInteger, nullable=False, unique=True),
)

_standing: Final = sql.Index("ix_packages_standing", _packages.c.digest, _packages.c.state, _packages.c.format)

_releases: Final = sql.Table(
    "releases",
    _tables,
    sql.Column("publisher", sql.String, primary_key=True),
    sql.Column("name", sql.String, primary_key=True),
    sql.Column("version", sql.String, primary_key=True),
    sql.Column("key_id", sql.String, primary_key=True, index=True),
    sql.Column("digest", sql.ForeignKey("packages.digest"), nullable=False, index=True),
    sql.Column("envelope", sql.LargeBinary, nullable=False),
    sql.Column("state", sql.String, nullable=False),
    sql.Column("publish_time_us", sql.BigInteger, nullable=False),
)

_mixtures: Final = sql.Table(
    "mixtures",
    _tables,
    sql.Column("digest", sql.String, primary_key=True),
    sql.Column("name", sql.String, nullable=False, index=True),
    sql.Column("body", sql.LargeBinary, nullable=False),
    sql.Column("body_bytes", sql.BigInteger, nullable=False),
    sql.Column("shape", sql.JSON, nullable=False),
    sql.Column("gate_digest", sql.String, index=True),
    sql.Column("gate_bytes", sql.BigInteger, nullable=False),
    sql.Column("package_digest", sql.ForeignKey("packages.digest"), index=True),
    sql.Column("envelope", sql.LargeBinary, nullable=False),
    sql.Column("publisher", sql.String, nullable=False),
    sql.Column("version", sql.String, nullable=False),
    sql.Column("key_id", sql.String, nullable=False, index=True),
    sql.Column("state", sql.String, nullable=False),
    sql.Column("by_policy", sql.Boolean, nullable=False),
    sql.Column("publish_time_us", sql.BigInteger, nullable=False),
)

_nested: Final = sql.Table(
    "nested_mixtures",
    _tables,
    sql.Column("parent", sql.ForeignKey("mixtures.digest"), primary_key=True),
    sql.Column("child", sql.ForeignKey("mixtures.digest"), primary_key=True, index=True),
)

_names: Final = sql.Table(
    "mixture_names",
    _tables,
    sql.Column("name", sql.String, primary_key=True),
    sql.Column("digest", sql.ForeignKey("mixtures.digest"), unique=True),
    sql.Column("last_digest", sql.String, nullable=False),
    sql.Column("revision", sql.BigInteger, nullable=False, unique=True),
)

_mixture_versions: Final = sql.Table(  # outlives the mixtures: a version stays what was signed under it
    "mixture_versions",
    _tables,
    sql.Column("publisher", sql.String, primary_key=True),
    sql.Column("name", sql.String, primary_key=True),
    sql.Column("version", sql.String, primary_key=True),
    sql.Column("digest", sql.String, nullable=False),
)

_search: Final = sql.Table(  # what packages are found by: one row for each of them
    "package_search",
    _tables,
    sql.Column("digest", sql.ForeignKey("packages.digest"), primary_key=True),
    sql.Column("expert_name", sql.String, index=True),
    sql.Column("expert_version", sql.String),
    sql.Column("base_name", sql.String, index=True),
    sql.Column("base_digest", sql.String, index=True),
    sql.Column("text", sql.String, nullable=False),
)

_capabilities: Final = sql.Table(
    "package_capabilities",
    _tables,
    sql.Column("capability", sql.String, primary_key=True),
    sql.Column("digest", sql.ForeignKey("packages.digest"), primary_key=True),
)

_revocations: Final = sql.Table(
    "revocations",
    _tables,
    sql.Column("key_id", sql.String, primary_key=True),
    sql.Column("explanation", sql.String, nullable=False),
    sql.Column("revision", sql.BigInteger, nullable=False, unique=True),
)


@dataclass(frozen=True, slots=True)
class PackageRow:
    """A package.

    Args:
        digest: Identity of the file.
        size_bytes: Of the file.
        format: Container format.
        facts: Serialized `hocket.v1.ModelFacts`, of an `.expert` file `AdapterFacts`, without metadata.
        embedded_key_id: Key of the verified signature inside the file; None if there is none.
        embedded_trusted: Whether that key counts.
        state: Whether it may serve.
        by_policy: Whether nothing but `allow_unsigned` admits it.
        publish_time_us: When it first came, in microseconds since 1970.
        proof_time_us: When it last came without a release, so that the signature inside it was its proof.
        revision: Of its last change.
    """

    digest: str
    size_bytes: int
    format: str
    facts: bytes
    embedded_key_id: str | None
    embedded_trusted: bool
    state: str
    by_policy: bool
    publish_time_us: int
    proof_time_us: int
    revision: int


@dataclass(frozen=True, slots=True)
class SearchRow:
    """What a package is found by, besides the names of its releases. Made by `services.registry.searching`.

    Args:
        digest: The package.
        expert_name: An adapter's own name; None for other packages.
        expert_version: An adapter's own version; None for other packages.
        base_name: Normalised name of the base it rides on.
        base_digest: Digest of that base; None if it does not say.
        text: What it says about itself, folded.
        capabilities: Folded, each once.
    """

    digest: str
    expert_name: str | None
    expert_version: str | None
    base_name: str | None
    base_digest: str | None
    text: str
    capabilities: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Query:
    """Which packages are wanted: those that all of this is true of. Spelled as in `SearchRow`; empty for any.

    Args:
        publisher: Has released it.
        capability: One of its capabilities.
        base_name: Of the base it rides on.
        base_digest: Of the base it rides on.
        words: Each occurs in its text, or in the publisher or the name of a release.
    """

    publisher: str = ""
    capability: str = ""
    base_name: str = ""
    base_digest: str = ""
    words: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ReleaseRow:
    """A signed name of a package. One name may be signed by several keys, each time for the same bytes.

    Args:
        publisher: Who published.
        name: What.
        version: Which.
        key_id: The key that signed.
        digest: The package.
        envelope: As signed.
        state: Whether it counts.
        publish_time_us: When it last came, in microseconds since 1970.
    """

    publisher: str
    name: str
    version: str
    key_id: str
    digest: str
    envelope: bytes
    state: str
    publish_time_us: int

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What there is one of: a name, signed by a key."""
        return self.publisher, self.name, self.version, self.key_id


@dataclass(frozen=True, slots=True)
class MixtureRow:
    """A mixture and its proof. Kept while its name stands for it, or a mixture in use nests it.

    Args:
        digest: SHA-256 of the body.
        name: What clients address.
        body_bytes: Size of its body.
        shape: What nests it needs to know (`services.registry.admission.Shape`), as a JSON object.
        gate_digest: Blob of the gate tensor; None if the gate needs none.
        gate_bytes: Its size.
        package_digest: The `.apr` mixture it was made from, on whose proof it rests; None for others.
        envelope: Its release as signed; empty if it has none.
        publisher: Of the release; empty if it has none.
        version: Of the release.
        key_id: Of the release.
        state: Whether it may serve.
        by_policy: Whether nothing but `allow_unsigned` admits it.
        publish_time_us: When this release of it came, in microseconds since 1970.
    """

    digest: str
    name: str
    body_bytes: int
    shape: dict[str, Any]
    gate_digest: str | None
    gate_bytes: int
    package_digest: str | None
    envelope: bytes
    publisher: str
    version: str
    key_id: str
    state: str
    by_policy: bool
    publish_time_us: int


@dataclass(frozen=True, slots=True)
class NameRow:
    """What a mixture's name stands for.

    Args:
        name: What clients address.
        digest: The mixture; None once the name was deleted.
        last_digest: The mixture it stands for, or last stood for.
        revision: Of the last change of the name or its mixture.
    """

    name: str
    digest: str | None
    last_digest: str
    revision: int


@dataclass(frozen=True, slots=True)
class RevocationRow:
    """A revoked key.

    Args:
        key_id: Which.
        explanation: Why, for people.
        revision: When.
    """

    key_id: str
    explanation: str
    revision: int


class Store:
    """The database. Open, use and close it on one thread.

    Args:
        path: `registry.db`; made if need be, in a folder that exists.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._engine = sql.create_engine("sqlite://", creator=self._connect, poolclass=StaticPool)
        self._connection: sql.Connection | None = None

    def open(self) -> None:
        """Lock the file, check it, make the tables of a new one, and upgrade an old one.

        Raises:
            HocketError: `NOT_READY` if another process has it; `BLOB_CORRUPT` if it fails SQLite's integrity check
                or is of another version of the registry.
        """
        try:
            self._connection = self._engine.connect()
            version = self._check(self._connection)
            with self._connection.begin():
                if version == 1:  # search tables that are there all the same lack columns; they are filled again
                    _tables.drop_all(self._connection, [_capabilities, _search])
                _tables.create_all(self._connection)
                _standing.create(self._connection, checkfirst=True)  # of tables that are there, it is not made above
                self._connection.exec_driver_sql(f"PRAGMA user_version = {SCHEMA_VERSION}")
                if self._connection.scalar(sql.select(_revisions.c.newest)) is None:
                    self._connection.execute(_revisions.insert().values(newest=0))
        except OperationalError as error:
            self.close()
            raise HocketError(
                Reason.NOT_READY, f"cannot open {self._path} ({error.orig}): does another registry use this folder?"
            ) from error
        except DatabaseError as error:
            self.close()
            raise self._damaged(str(error.orig)) from error
        except HocketError:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the file."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        self._engine.dispose()

    @contextmanager
    def begin(self) -> Iterator[Transaction]:
        """A transaction: committed at the end, undone when an exception leaves it.

        Raises:
            HocketError: `CAPACITY` if the disk is full, `NOT_READY` before `open`.
            StorageError: The disk fails.
        """
        if self._connection is None:
            raise HocketError(Reason.NOT_READY, "the registry is not open")
        try:
            with self._connection.begin():
                yield Transaction(self._connection)
        except DatabaseError as error:
            check_database_error(error.orig)
            raise

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, timeout=_LOCK_TIMEOUT_SECONDS)
        try:
            for pragma in ("locking_mode=EXCLUSIVE", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
                connection.execute(f"PRAGMA {pragma}").close()
        except sqlite3.Error:
            connection.close()
            raise
        return connection

    def _check(self, connection: sql.Connection) -> int:
        """The version of the file, if it is sound and can be read."""
        with connection.begin():
            found = connection.exec_driver_sql("PRAGMA integrity_check").scalar()
            if found != "ok":
                raise self._damaged(str(found))
            version = int(connection.exec_driver_sql("PRAGMA user_version").scalar_one())
            if version not in _READABLE:
                raise self._damaged(f"it has version {version}, this registry reads {SCHEMA_VERSION}")
            return version

    def _damaged(self, what: str) -> HocketError:
        return HocketError(
            Reason.BLOB_CORRUPT, f"{self._path} cannot be used: {what[:200]}; restore it from a backup, or move it away"
        )


class Transaction:
    """What can be asked and changed within one transaction."""

    def __init__(self, connection: sql.Connection) -> None:
        self._connection = connection

    # Revisions

    def revision(self) -> int:
        """The newest revision; 0 before anything happened."""
        return int(self._connection.execute(sql.select(_revisions.c.newest)).scalar_one())

    def next_revision(self) -> int:
        """Take the next revision for one change."""
        self._connection.execute(_revisions.update().values(newest=_revisions.c.newest + 1))
        return self.revision()

    # Packages

    def package(self, digest: str) -> PackageRow | None:
        """One package."""
        return next(self._package_rows(_packages.c.digest == digest), None)

    def packages(self, digests: Sequence[str]) -> dict[str, PackageRow]:
        """Those of these packages that are here, by digest."""
        found = {}
        for start in range(0, len(digests), _IN_ONE_QUERY):
            some = digests[start : start + _IN_ONE_QUERY]
            found.update({row.digest: row for row in self._package_rows(_packages.c.digest.in_(some))})
        return found

    def packages_after(self, digest: str, query: Query, count: int) -> Iterator[PackageRow]:
        """Packages by digest, from the first one behind `digest`.

        Args:
            digest: Empty to begin.
            query: Which ones.
            count: How many at most.
        """
        wanted = (_packages.c.digest > digest) & _matching(query)
        return self._package_rows(wanted, order=_packages.c.digest, count=count)

    def expert_versions(self, publisher: str, name: str, *, state: str, package_format: str) -> dict[str, str]:
        """The version of each package, by digest, that holds an adapter expert of this name.

        Args:
            publisher: Who has released it so, by a release in that state; empty for what policy alone admits.
            name: Of the expert.
            state: Of package and release.
            package_format: Of adapter experts.
        """
        released = sql.select(_releases.c.version, _releases.c.digest).join(_packages)
        query = released.where(_releases.c.publisher == publisher, _releases.c.name == name, _releases.c.state == state)
        if not publisher:
            unsigned = sql.select(_search.c.expert_version, _search.c.digest).join(_packages)
            query = unsigned.where(_search.c.expert_name == name, _packages.c.by_policy)
        serving = query.where(_packages.c.state == state, _packages.c.format == package_format)
        rows = self._connection.execute(serving)
        return {digest: version for version, digest in rows.all()}

    def packages_since(self, revision: int, count: int) -> Iterator[PackageRow]:
        """Packages changed after a revision, in that order."""
        return self._package_rows(_packages.c.revision > revision, order=_packages.c.revision, count=count)

    def packages_to_judge(self, key_id: str | None) -> list[PackageRow]:
        """Packages whose standing may change: all, or only those that a key vouches for."""
        wanted = sql.true() if key_id is None else _vouched_for(key_id)
        return list(self._package_rows(wanted, order=_packages.c.digest))

    def packages_of_key(self, key_id: str, state: str) -> list[str]:
        """Digests of the packages in a state that a key has vouched for."""
        wanted = _vouched_for(key_id) & (_packages.c.state == state)
        query = sql.select(_packages.c.digest).where(wanted).order_by(_packages.c.digest)
        return list(self._connection.execute(query).scalars())

    def by_policy_count(self) -> int:
        """Packages and mixtures that nothing but policy admits."""
        count = sql.func.count
        return sum(
            self._connection.execute(sql.select(count()).where(table.c.by_policy)).scalar_one()
            for table in (_packages, _mixtures)
        )

    def metadata(self, digest: str) -> bytes:
        """The serialized metadata of a package."""
        query = sql.select(_packages.c.metadata).where(_packages.c.digest == digest)
        return bytes(self._connection.execute(query).scalar_one())

    def insert_package(self, row: PackageRow, metadata: bytes) -> None:
        """Add a package, which nobody finds yet.

        Args:
            row: The package.
            metadata: Serialized `google.protobuf.Struct`.
        """
        self._connection.execute(_packages.insert().values(**asdict(row), metadata=metadata, yank_explanation=""))

    def insert_search(self, row: SearchRow) -> None:
        """Let a package be found."""
        values = asdict(row)
        capabilities = values.pop("capabilities")
        self._connection.execute(_search.insert().values(**values))
        if capabilities:
            pairs = [{"capability": capability, "digest": row.digest} for capability in capabilities]
            self._connection.execute(_capabilities.insert(), pairs)

    def not_found_count(self) -> int:
        """How many packages nobody finds yet: a registry that knew no search has left them."""
        return int(self._connection.execute(sql.select(sql.func.count()).where(_not_found())).scalar_one())

    def packages_not_found(self, count: int) -> list[PackageRow]:
        """Some of them."""
        return list(self._package_rows(_not_found(), order=_packages.c.digest, count=count))

    def update_package(self, digest: str, **values: Any) -> None:  # noqa: ANN401 - columns have types of their own
        """Change columns of a package, and give it the next revision."""
        revision = self.next_revision()
        changed = _packages.update().where(_packages.c.digest == digest).values(**values, revision=revision)
        self._connection.execute(changed)

    def touch_package(self, digest: str, proof_time_us: int) -> None:
        """Note that a package came again without a release."""
        touched = _packages.update().where(_packages.c.digest == digest).values(proof_time_us=proof_time_us)
        self._connection.execute(touched)

    # Releases

    def releases(self, digests: Iterable[str]) -> dict[str, list[ReleaseRow]]:
        """The releases of these packages, each by name, version and key."""
        wanted = list(digests)
        found: dict[str, list[ReleaseRow]] = {digest: [] for digest in wanted}
        columns = _releases.c
        for start in range(0, len(wanted), _IN_ONE_QUERY):
            query = (
                sql.select(_releases)
                .where(columns.digest.in_(wanted[start : start + _IN_ONE_QUERY]))
                .order_by(columns.publisher, columns.name, columns.version, columns.key_id)
            )
            for mapping in self._connection.execute(query).mappings():
                row = ReleaseRow(**mapping)
                found[row.digest].append(row)
        return found

    def released_digest(self, name: ReleaseName) -> str | None:
        """The package that a release name is bound to."""
        query = sql.select(_releases.c.digest).where(
            _releases.c.publisher == name.publisher, _releases.c.name == name.name, _releases.c.version == name.version
        )
        return self._connection.execute(query.limit(1)).scalar()

    def bind_mixture_version(self, name: ReleaseName, digest: str) -> str:
        """The body that a mixture's version stands for: this one, if it is the first."""
        version = {"publisher": name.publisher, "name": name.name, "version": name.version}
        query = sql.select(_mixture_versions.c.digest).filter_by(**version)
        bound = self._connection.execute(query).scalar()
        if bound is None:
            self._connection.execute(_mixture_versions.insert().values(**version, digest=digest))
            return digest
        return str(bound)

    def insert_release(self, row: ReleaseRow) -> None:
        """Add a release."""
        self._connection.execute(_releases.insert().values(**asdict(row)))

    def update_release(self, row: ReleaseRow, **values: Any) -> None:  # noqa: ANN401 - columns have types of their own
        """Change columns of a release."""
        key = sql.tuple_(*_releases.primary_key.columns)
        self._connection.execute(_releases.update().where(key == row.key).values(**values))

    # Mixtures

    def mixture(self, digest: str) -> MixtureRow | None:
        """One mixture by the digest of its body."""
        return next(self._mixture_rows(_mixtures.c.digest == digest), None)

    def mixtures(self, digests: Sequence[str]) -> dict[str, MixtureRow]:
        """Those of these mixtures that are here, by digest."""
        found = {}
        for start in range(0, len(digests), _IN_ONE_QUERY):
            some = digests[start : start + _IN_ONE_QUERY]
            found.update({row.digest: row for row in self._mixture_rows(_mixtures.c.digest.in_(some))})
        return found

    def mixtures_to_judge(self, key_id: str | None) -> list[MixtureRow]:
        """Mixtures with a proof of their own: all, or only those that a key vouches for."""
        wanted: sql.ColumnElement[bool] = _mixtures.c.package_digest.is_(None)
        if key_id is not None:
            wanted &= _mixtures.c.key_id == key_id
        return list(self._mixture_rows(wanted))

    def body(self, digest: str) -> bytes:
        """The body of a mixture."""
        query = sql.select(_mixtures.c.body).where(_mixtures.c.digest == digest)
        return bytes(self._connection.execute(query).scalar_one())

    def mixture_of_package(self, digest: str) -> MixtureRow | None:
        """The mixture that was made from a package."""
        return next(self._mixture_rows(_mixtures.c.package_digest == digest), None)

    def put_mixture(self, row: MixtureRow, body: bytes, children: Iterable[str]) -> None:
        """Add a mixture, or replace the proof of one that is here.

        Args:
            row: The mixture.
            body: Canonical JSON.
            children: Digests of the mixtures it nests.
        """
        values = asdict(row)
        proof = {name: values[name] for name in ("envelope", "publisher", "version", "key_id")}
        standing = {name: values[name] for name in ("state", "by_policy", "publish_time_us")}
        replaced = _mixtures.update().where(_mixtures.c.digest == row.digest).values(**proof, **standing)
        if self._connection.execute(replaced).rowcount:
            return
        self._connection.execute(_mixtures.insert().values(**values, body=body))
        if pairs := [{"parent": row.digest, "child": child} for child in children]:
            self._connection.execute(_nested.insert(), pairs)

    def update_mixture(self, digest: str, *, state: str, by_policy: bool) -> None:
        """Change the state of a mixture. What stands for it, or nests it, gets the next revision."""
        changed = _mixtures.update().where(_mixtures.c.digest == digest).values(state=state, by_policy=by_policy)
        self._connection.execute(changed)
        for name in self._names_over(digest):
            moved = _names.update().where(_names.c.name == name).values(revision=self.next_revision())
            self._connection.execute(moved)

    def name(self, name: str) -> NameRow | None:
        """What a name stands for, or stood for."""
        return next(self._name_rows(_names.c.name == name), None)

    def names_since(self, revision: int, count: int) -> list[NameRow]:
        """Names changed after a revision, in that order."""
        return list(self._name_rows(_names.c.revision > revision, count=count))

    def set_name(self, name: str, digest: str) -> NameRow:
        """Let a name stand for a mixture."""
        return self._set_name(NameRow(name, digest, digest, self.next_revision()))

    def delete_name(self, row: NameRow) -> NameRow:
        """Let a name stand for nothing."""
        return self._set_name(NameRow(row.name, None, row.last_digest, self.next_revision()))

    def parents(self, digest: str) -> list[str]:
        """Names of the mixtures that nest this one."""
        query = (
            sql.select(_names.c.name)
            .join(_nested, _nested.c.parent == _names.c.digest)
            .where(_nested.c.child == digest)
            .order_by(_names.c.name)
        )
        return list(self._connection.execute(query).scalars())

    def drop_unused_mixtures(self) -> list[str]:
        """Forget mixtures that no name stands for and none in use nests.

        Returns:
            Digests of gate tensors that no mixture needs any more.
        """
        named = sql.select(_names.c.digest).where(_names.c.digest.is_not(None))
        nested = sql.select(_nested.c.child).where(_nested.c.parent.in_(named))
        unused = list(
            self._connection.execute(
                sql.select(_mixtures.c.digest, _mixtures.c.gate_digest).where(
                    _mixtures.c.digest.not_in(named), _mixtures.c.digest.not_in(nested)
                )
            )
        )
        digests = [digest for digest, _ in unused]
        self._connection.execute(_nested.delete().where(_nested.c.parent.in_(digests)))
        self._connection.execute(_mixtures.delete().where(_mixtures.c.digest.in_(digests)))
        gates = {gate for _, gate in unused if gate is not None}
        needed = set(self._connection.execute(sql.select(_mixtures.c.gate_digest)).scalars())
        return sorted(gates - needed)

    # Revocations

    def revocations_since(self, revision: int, count: int | None = None) -> list[RevocationRow]:
        """Keys revoked after a revision, in that order."""
        query = sql.select(_revocations).where(_revocations.c.revision > revision).order_by(_revocations.c.revision)
        return [RevocationRow(**mapping) for mapping in self._connection.execute(query.limit(count)).mappings()]

    def insert_revocation(self, key_id: str, explanation: str) -> None:
        """Revoke a key."""
        row = RevocationRow(key_id, explanation, self.next_revision())
        self._connection.execute(_revocations.insert().values(**asdict(row)))

    # Inside

    def _package_rows(
        self,
        wanted: sql.ColumnElement[bool],
        order: sql.ColumnElement[Any] | None = None,
        count: int | None = None,
    ) -> Iterator[PackageRow]:
        columns = [column for column in _packages.c if column.name not in {"metadata", "yank_explanation"}]
        query = sql.select(*columns).where(wanted).order_by(order).limit(count)
        return (PackageRow(**mapping) for mapping in self._connection.execute(query).mappings())

    def _mixture_rows(self, wanted: sql.ColumnElement[bool]) -> Iterator[MixtureRow]:
        columns = [column for column in _mixtures.c if column.name != "body"]
        query = sql.select(*columns).where(wanted).order_by(_mixtures.c.digest)
        return (MixtureRow(**mapping) for mapping in self._connection.execute(query).mappings())

    def _name_rows(self, wanted: sql.ColumnElement[bool], count: int | None = None) -> Iterator[NameRow]:
        query = sql.select(_names).where(wanted).order_by(_names.c.revision).limit(count)
        return (NameRow(**mapping) for mapping in self._connection.execute(query).mappings())

    def _set_name(self, row: NameRow) -> NameRow:
        values = asdict(row)
        moved = _names.update().where(_names.c.name == row.name).values(**values)
        if not self._connection.execute(moved).rowcount:
            self._connection.execute(_names.insert().values(**values))
        return row

    def _names_over(self, digest: str) -> list[str]:
        query = sql.select(_names.c.name).where(_names.c.digest == digest)
        return [*self._connection.execute(query).scalars(), *self.parents(digest)]


def _not_found() -> sql.ColumnElement[bool]:
    """Packages without a search row."""
    return _packages.c.digest.not_in(sql.select(_search.c.digest))


def _matching(query: Query) -> sql.ColumnElement[bool]:
    """Packages that a query wants. Words are looked for in one package after the other, until a page is full."""
    wanted: sql.ColumnElement[bool] = sql.true()
    if query.publisher:
        released = sql.select(_releases.c.digest).where(_releases.c.publisher == query.publisher)
        wanted &= _packages.c.digest.in_(released)
    if query.capability:
        capable = sql.select(_capabilities.c.digest).where(_capabilities.c.capability == query.capability)
        wanted &= _packages.c.digest.in_(capable)
    for column, value in ((_search.c.base_name, query.base_name), (_search.c.base_digest, query.base_digest)):
        if value:
            wanted &= _packages.c.digest.in_(sql.select(_search.c.digest).where(column == value))
    for word in query.words:
        said = _search.c.text.contains(word, autoescape=True)
        released_so = [column.contains(word, autoescape=True) for column in (_releases.c.publisher, _releases.c.name)]
        wanted &= _of_package(_search, said) | _of_package(_releases, sql.or_(*released_so))
    return wanted


def _of_package(table: sql.Table, wanted: sql.ColumnElement[bool]) -> sql.ColumnElement[bool]:
    """Whether a row of another table that belongs to the package is wanted."""
    return sql.exists().where(table.c.digest == _packages.c.digest, wanted).correlate(_packages)


def _vouched_for(key_id: str) -> sql.ColumnElement[bool]:
    """Packages with a release by a key, or with its signature inside."""
    released = sql.select(_releases.c.digest).where(_releases.c.key_id == key_id)
    return (_packages.c.embedded_key_id == key_id) | _packages.c.digest.in_(released)
