from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hocket.errors import HocketError, Reason
from hocket.identity import ReleaseName
from services.registry.disk import StorageError, check_database_error
from services.registry.store import MixtureRow, PackageRow, Query, ReleaseRow, SearchRow, Store

if TYPE_CHECKING:
    from collections.abc import Iterator

VERSION_1 = Path(__file__).with_name("version_1.sql").read_text()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "registry.db"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    store = Store(path)
    store.open()
    yield store
    store.close()


def digest(index: int) -> str:
    return f"sha256:{index:064x}"


def package(index: int, **changes: Any) -> PackageRow:
    row = PackageRow(
        digest=digest(index),
        size_bytes=3,
        format="apr",
        facts=b"facts",
        embedded_key_id=None,
        embedded_trusted=False,
        state="ACTIVE",
        by_policy=False,
        publish_time_us=7,
        proof_time_us=7,
        revision=0,
    )
    return replace(row, **changes)


def release(index: int, name: str = "acme/iris@1", key_id: str = "k") -> ReleaseRow:
    named = ReleaseName.parse(name)
    return ReleaseRow(named.publisher, named.name, named.version, key_id, digest(index), b"signed", "ACTIVE", 7)


def mixture(index: int, name: str, gate: int | None = None) -> MixtureRow:
    return MixtureRow(
        digest=digest(index),
        name=name,
        body_bytes=4,
        shape={"labels": ["a"]},
        gate_digest=None if gate is None else digest(gate),
        gate_bytes=0 if gate is None else 8,
        package_digest=None,
        envelope=b"signed",
        publisher="acme",
        version="1",
        key_id="k",
        state="ACTIVE",
        by_policy=False,
        publish_time_us=7,
    )


def insert(store: Store, *indices: int, **changes: Any) -> None:
    with store.begin() as tx:
        for index in indices:
            tx.insert_package(package(index, **changes), b"metadata")
            tx.update_package(digest(index))


class TestOpening:
    def test_what_was_committed_is_there_after_a_restart(self, store: Store, path: Path) -> None:
        insert(store, 1)
        store.close()

        again = Store(path)
        again.open()
        with again.begin() as tx:
            assert tx.package(digest(1)) == package(1, revision=1)
            assert (tx.revision(), tx.metadata(digest(1))) == (1, b"metadata")
        again.close()

    def test_commits_are_durable_and_references_hold(self, store: Store) -> None:
        with store.begin() as tx:
            pragma = {
                name: tx._connection.exec_driver_sql(f"PRAGMA {name}").scalar()
                for name in ("journal_mode", "synchronous", "foreign_keys", "locking_mode")
            }
        assert pragma == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "locking_mode": "exclusive"}

    def test_a_second_registry_on_the_same_file_does_not_start(self, store: Store, path: Path) -> None:
        insert(store, 1)
        second = Store(path)
        with pytest.raises(HocketError, match="another registry") as caught:
            second.open()
        assert caught.value.reason is Reason.NOT_READY

        store.close()
        second.open()
        second.close()

    def test_a_damaged_file_does_not_start(self, path: Path) -> None:
        path.write_bytes(b"this is no database, however long it may be" * 100)

        with pytest.raises(HocketError, match="restore it") as caught:
            Store(path).open()
        assert caught.value.reason is Reason.BLOB_CORRUPT

    def test_damage_within_the_file_is_found_at_start(self, store: Store, path: Path) -> None:
        insert(store, *range(1, 200))
        store.close()
        data = bytearray(path.read_bytes())
        data[8 * 4096 : 9 * 4096] = b"\xff" * 4096
        path.write_bytes(data)

        with pytest.raises(HocketError) as caught:
            Store(path).open()
        assert caught.value.reason is Reason.BLOB_CORRUPT

    def test_a_file_of_another_version_does_not_start(self, store: Store, path: Path) -> None:
        store.close()
        connection = sqlite3.connect(path)
        connection.execute("PRAGMA user_version = 3")
        connection.close()

        with pytest.raises(HocketError, match="version 3"):
            store.open()

    @pytest.mark.parametrize(
        "more",
        ["", "CREATE TABLE package_search (digest VARCHAR PRIMARY KEY); INSERT INTO package_search VALUES ('x')"],
    )
    def test_a_file_of_version_1_is_upgraded_so_that_its_registry_leaves_it_alone(self, path: Path, more: str) -> None:
        connection = sqlite3.connect(path)
        connection.executescript(VERSION_1 + more)
        connection.execute("INSERT INTO revisions VALUES (7)")
        connection.commit()
        connection.close()

        for _ in range(2):
            store = Store(path)
            store.open()
            with store.begin() as tx:
                version = tx._connection.exec_driver_sql("PRAGMA user_version").scalar()
                indexes = tx._connection.exec_driver_sql(
                    "SELECT name FROM sqlite_master WHERE type = 'index'"
                ).scalars()
                assert (version, tx.revision(), "ix_packages_standing" in set(indexes)) == (2, 7, True)
                assert list(tx.packages_after("", Query(words=("a",)), 9)) == []
            store.close()

    def test_a_store_that_is_not_open_says_so(self, path: Path) -> None:
        with pytest.raises(HocketError, match="not open"), Store(path).begin():
            pass


class TestTransactions:
    def test_a_transaction_that_fails_leaves_nothing(self, store: Store) -> None:
        def fail() -> None:
            with store.begin() as tx:
                tx.insert_package(package(1), b"")
                tx.next_revision()
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            fail()
        with store.begin() as tx:
            assert tx.package(digest(1)) is None
            assert tx.revision() == 0

    def test_a_full_disk_is_a_refusal(self, store: Store) -> None:
        with store.begin() as tx:
            pages = tx._connection.exec_driver_sql("PRAGMA page_count").scalar()
            tx._connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")

        with pytest.raises(HocketError) as caught, store.begin() as tx:
            tx.insert_package(package(1), bytes(2**20))
        assert caught.value.reason is Reason.CAPACITY
        with store.begin() as tx:
            assert tx.package(digest(1)) is None

    def test_a_broken_disk_is_the_end_and_a_mistake_of_ours_is_not(self) -> None:
        broken = sqlite3.OperationalError("disk I/O error")
        broken.sqlite_errorcode = sqlite3.SQLITE_IOERR_FSYNC
        mistake = sqlite3.OperationalError("no such table: x")
        mistake.sqlite_errorcode = sqlite3.SQLITE_ERROR

        with pytest.raises(StorageError):
            check_database_error(broken)
        check_database_error(mistake)


class TestPackages:
    def test_pages_follow_digests(self, store: Store) -> None:
        insert(store, 3, 1, 2)
        with store.begin() as tx:
            assert [row.digest for row in tx.packages_after("", Query(), 2)] == [digest(1), digest(2)]
            assert [row.digest for row in tx.packages_after(digest(2), Query(), 2)] == [digest(3)]

    def test_a_publishers_packages_are_those_with_a_release_of_it(self, store: Store) -> None:
        insert(store, 1, 2, 3)
        with store.begin() as tx:
            tx.insert_release(release(1))
            tx.insert_release(release(1, "acme/iris@2"))
            tx.insert_release(release(2, "zeta/iris@1"))

            assert [row.digest for row in tx.packages_after("", Query("acme"), 9)] == [digest(1)]
            assert [row.digest for row in tx.packages_after(digest(1), Query("acme"), 9)] == []

    def test_changes_follow_revisions_and_each_package_comes_once(self, store: Store) -> None:
        insert(store, 1, 2, 3)
        with store.begin() as tx:
            tx.update_package(digest(1), state="YANKED")
            assert [row.digest for row in tx.packages_since(0, 9)] == [digest(2), digest(3), digest(1)]
            assert [row.digest for row in tx.packages_since(2, 1)] == [digest(3)]

    def test_many_digests_are_looked_up_at_once(self, store: Store) -> None:
        insert(store, 1, 1200)
        with store.begin() as tx:
            wanted = [digest(index) for index in range(1201)]
            assert set(tx.packages(wanted)) == {digest(1), digest(1200)}
            assert set(tx.releases(wanted)) == set(wanted)
            assert tx.mixtures(wanted) == {}

    def test_what_a_key_vouches_for_is_found_by_release_and_by_signature(self, store: Store) -> None:
        insert(store, 1, 2, 3)
        insert(store, 4, embedded_key_id="k")
        insert(store, 5, embedded_key_id="k", state="YANKED")
        with store.begin() as tx:
            tx.insert_release(release(1, key_id="k"))
            tx.insert_release(release(2, "acme/iris@2", key_id="other"))

            assert [row.digest for row in tx.packages_to_judge("k")] == [digest(1), digest(4), digest(5)]
            assert len(tx.packages_to_judge(None)) == 5
            assert tx.packages_of_key("k", "ACTIVE") == [digest(1), digest(4)]

    def test_a_release_name_is_found_whatever_key_signed_it(self, store: Store) -> None:
        insert(store, 1)
        with store.begin() as tx:
            tx.insert_release(release(1, key_id="k"))
            tx.insert_release(release(1, key_id="l"))
            tx.update_release(release(1, key_id="l"), state="UNTRUSTED")

            assert tx.released_digest(ReleaseName("acme", "iris", "1")) == digest(1)
            assert tx.released_digest(ReleaseName("acme", "iris", "2")) is None
            assert [row.state for row in tx.releases([digest(1)])[digest(1)]] == ["ACTIVE", "UNTRUSTED"]

    def test_packages_that_nobody_finds_yet_can_be_told(self, store: Store) -> None:
        insert(store, 1, 2, 3)
        with store.begin() as tx:
            tx.insert_search(SearchRow(digest(2), None, None, None, None, "iris", ()))

            assert tx.not_found_count() == 2
            assert [row.digest for row in tx.packages_not_found(9)] == [digest(1), digest(3)]
            assert [row.digest for row in tx.packages_not_found(1)] == [digest(1)]

    def test_experts_of_a_name_are_those_that_may_serve_under_it(self, store: Store) -> None:
        insert(store, 1, 2, 3, format="expert")
        insert(store, 4, format="expert", state="YANKED")
        insert(store, 5, by_policy=True, format="expert")
        insert(store, 6)
        with store.begin() as tx:
            for index in range(1, 6):
                tx.insert_search(SearchRow(digest(index), "sql", "0.9.0", None, None, "", ()))
            tx.insert_release(release(1, "acme/sql@1"))
            tx.insert_release(release(1, "acme/sql@1", key_id="l"))
            tx.insert_release(release(2, "zeta/sql@1"))
            tx.insert_release(replace(release(3, "acme/sql@2"), state="UNTRUSTED"))
            tx.insert_release(release(4, "acme/sql@3"))
            tx.insert_release(release(6, "acme/sql@4"))

            def versions(publisher: str, name: str) -> dict[str, str]:
                return tx.expert_versions(publisher, name, state="ACTIVE", package_format="expert")

            assert versions("acme", "sql") == {digest(1): "1"}
            assert versions("zeta", "sql") == {digest(2): "1"}
            assert versions("", "sql") == {digest(5): "0.9.0"}
            assert versions("acme", "json") == {}


class TestMixtures:
    def put(self, store: Store, index: int, name: str, *children: int, gate: int | None = None) -> list[str]:
        with store.begin() as tx:
            tx.put_mixture(mixture(index, name, gate), b"body", [digest(child) for child in children])
            tx.set_name(name, digest(index))
            return tx.drop_unused_mixtures()

    def test_a_mixture_that_was_replaced_is_forgotten_with_its_gate(self, store: Store) -> None:
        self.put(store, 1, "m", gate=8)

        assert self.put(store, 2, "m", gate=9) == [digest(8)]
        with store.begin() as tx:
            assert tx.mixture(digest(1)) is None
            assert tx.mixture(digest(2)) == mixture(2, "m", gate=9)
            assert tx.body(digest(2)) == b"body"

    def test_a_gate_that_another_mixture_needs_stays(self, store: Store) -> None:
        self.put(store, 1, "m", gate=8)
        self.put(store, 2, "n", gate=8)

        assert self.put(store, 3, "m", gate=9) == []

    def test_a_mixture_stays_while_one_in_use_nests_it(self, store: Store) -> None:
        self.put(store, 1, "inner", gate=8)
        self.put(store, 2, "outer", 1)
        self.put(store, 3, "inner")
        with store.begin() as tx:
            assert tx.mixture(digest(1)) is not None
            assert tx.parents(digest(1)) == ["outer"]
            assert tx.parents(digest(3)) == []

        assert self.put(store, 4, "outer", 3) == [digest(8)]
        with store.begin() as tx:
            assert tx.mixture(digest(1)) is None

    def test_a_name_that_was_deleted_is_remembered(self, store: Store) -> None:
        self.put(store, 1, "m")
        with store.begin() as tx:
            name = tx.name("m")
            assert name is not None
            gone = tx.delete_name(name)
            tx.drop_unused_mixtures()
            assert (gone.digest, gone.last_digest, gone.revision) == (None, digest(1), 2)
            assert tx.names_since(1, 9) == [gone]
            assert tx.mixture(digest(1)) is None

        self.put(store, 1, "m")
        with store.begin() as tx:
            assert [name.digest for name in tx.names_since(0, 9)] == [digest(1)]

    def test_a_changed_state_is_news_of_the_name_and_of_what_nests_it(self, store: Store) -> None:
        self.put(store, 1, "inner")
        self.put(store, 2, "outer", 1)
        self.put(store, 3, "alone")
        with store.begin() as tx:
            before = tx.revision()
            tx.update_mixture(digest(1), state="KEY_REVOKED", by_policy=False)
            assert {name.name for name in tx.names_since(before, 9)} == {"inner", "outer"}
            row = tx.mixture(digest(1))
            assert row is not None
            assert row.state == "KEY_REVOKED"

    def test_a_new_proof_replaces_the_old_one_of_the_same_body(self, store: Store) -> None:
        self.put(store, 1, "inner")
        self.put(store, 2, "outer", 1)
        with store.begin() as tx:
            tx.put_mixture(replace(mixture(2, "outer"), envelope=b"again", key_id="l"), b"body", [digest(1)])
            row = tx.mixture(digest(2))
            assert row is not None
            assert (row.envelope, row.key_id) == (b"again", "l")
            assert [found.digest for found in tx.mixtures_to_judge("l")] == [digest(2)]
            assert [found.digest for found in tx.mixtures_to_judge(None)] == [digest(1), digest(2)]


def test_revocations_follow_revisions(store: Store) -> None:
    with store.begin() as tx:
        tx.insert_revocation("k", "lost")
        tx.insert_revocation("l", "")
        assert [(row.key_id, row.explanation) for row in tx.revocations_since(0)] == [("k", "lost"), ("l", "")]
        assert [row.key_id for row in tx.revocations_since(1, 9)] == ["l"]
