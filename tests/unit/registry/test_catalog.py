"""What the service cannot bring about: races, damage, limits."""

from __future__ import annotations

import asyncio
import threading
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest

from hocket.errors import HocketError, Reason
from hocket.identity import digest_of
from hocket.packages import Policy, public_key_of
from hocket.packages.trust import TrustedKey
from hocket.v1.mixture_pb2 import Mixture
from hocket.v1.package_pb2 import Package, TrustState
from services.registry import catalog as catalog_module
from services.registry.admission import admit_mixture, admit_package
from services.registry.catalog import Catalog
from services.registry.store import Query, Transaction
from services.registry.threads import Threads
from tests.builders import apr_bytes, mixture
from tests.registries import fixed, labelled, mixture_release, numbers, trust_in
from tests.signing import ACME_ID, ACME_SEED, ZETA_SEED, envelope_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from services.registry.admission import AdmittedMixture, AdmittedPackage
    from services.registry.store import ReleaseRow

DATA = labelled("a", "b")


class Shelf:
    """A catalog without the service around it."""

    def __init__(self, folder: Path) -> None:
        self.trust = trust_in(folder)
        self.revisions: list[int] = []
        self.catalog = Catalog(
            folder / "data",
            folder / "trust",
            policy=Policy(),
            package_bytes_max=2**20,
            on_change=self.revisions.append,
        )
        self.catalog.open()

    def admitted(self, data: bytes = DATA, name: str = "acme/iris@1", seed: bytes = ACME_SEED) -> AdmittedPackage:
        return admit_package(
            data,
            envelope_of(data, seed, name),
            digest=digest_of(data),
            terms=self.catalog.terms,
            limits=self.catalog.limits,
            now=datetime.now(UTC),
        )

    def admitted_mixture(self, *members: bytes) -> AdmittedMixture:
        record = fixed("digits", *members)
        release = mixture_release(record)
        return admit_mixture(record.body(), release, terms=self.catalog.terms, now=datetime.now(UTC))

    def keep(self, admitted: AdmittedPackage, data: bytes = DATA) -> tuple[Package, bool]:
        tensor = None if admitted.mixture is None else admitted.mixture.gate
        with drafts(self.catalog, data, tensor) as (draft, gate):
            return self.catalog.publish(admitted, draft, gate)

    def publish(self, data: bytes = DATA, name: str = "acme/iris@1", seed: bytes = ACME_SEED) -> Package:
        return self.keep(self.admitted(data, name, seed), data)[0]

    def refusal_of(self, call: Any, *arguments: Any) -> Reason:
        with pytest.raises(HocketError) as caught:
            call(*arguments)
        return caught.value.reason


@contextmanager
def drafts(catalog: Catalog, *contents: bytes | None) -> Iterator[Any]:
    """Drafts of these contents, gone afterwards."""
    made = [None if data is None else catalog.blobs.draft() for data in contents]
    for draft, data in zip(made, contents, strict=True):
        if draft is not None and data is not None:
            draft.write(data)
            draft.finish()
    try:
        yield made
    finally:
        for draft in made:
            if draft is not None:
                draft.discard()


@pytest.fixture
def shelf(tmp_path: Path) -> Iterator[Shelf]:
    shelf = Shelf(tmp_path)
    yield shelf
    shelf.catalog.close()


def test_a_key_revoked_between_admission_and_keeping_counts(shelf: Shelf) -> None:
    shelf.publish()
    package, record = shelf.admitted(numbers(), "acme/numbers@1"), shelf.admitted_mixture(DATA)

    shelf.catalog.revoke(ACME_ID, "")

    assert shelf.refusal_of(shelf.keep, package, numbers()) is Reason.KEY_REVOKED
    assert shelf.refusal_of(shelf.catalog.put_mixture, record, None, "") is Reason.KEY_REVOKED
    assert shelf.refusal_of(shelf.catalog.package, digest_of(numbers())) is Reason.UNKNOWN_PACKAGE


def test_members_withdrawn_between_admission_and_keeping_count(shelf: Shelf) -> None:
    shelf.publish(seed=ZETA_SEED, name="zeta/iris@1")
    record = shelf.admitted_mixture(DATA)
    shelf.trust.remove_key(shelf.catalog.package("zeta/iris@1")[0].releases[0].key_id)
    shelf.catalog.follow_trust()

    assert shelf.refusal_of(shelf.catalog.put_mixture, record, None, "") is Reason.SIGNER_NOT_TRUSTED


def test_a_package_that_is_refused_leaves_no_blob(shelf: Shelf, tmp_path: Path) -> None:
    shelf.publish()

    assert shelf.refusal_of(shelf.keep, shelf.admitted(numbers()), numbers()) is Reason.VERSION_TAKEN

    blobs = [path.name for path in (tmp_path / "data" / "blobs").rglob("*") if path.is_file()]
    assert blobs == [digest_of(DATA).removeprefix("sha256:")]


def test_a_package_has_so_many_releases_and_no_more(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog_module, "RELEASES_MAX", 3)
    for index in range(3):
        package = shelf.publish(name=f"acme/iris@{index}")

    assert len(package.releases) == 3
    assert shelf.refusal_of(shelf.publish, DATA, "acme/iris@last") is Reason.TOO_LARGE
    assert shelf.keep(shelf.admitted(name="acme/iris@0"))[1] is False


def test_a_page_of_packages_asks_for_their_releases_at_once(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    data = [labelled("a", "b", weight=float(weight)) for weight in range(1, 6)]
    for index, each in enumerate(data):
        shelf.publish(each, f"acme/iris@{index}")
    asked: list[list[str]] = []
    releases = Transaction.releases

    def counted(tx: Transaction, digests: list[str]) -> dict[str, list[ReleaseRow]]:
        asked.append(digests)
        return releases(tx, digests)

    monkeypatch.setattr(Transaction, "releases", counted)

    page = shelf.catalog.list_packages("", Query(), 4)

    assert [len(digests) for digests in asked] == [4]
    assert [len(package.releases) for package in page.packages] == [1, 1, 1, 1]
    rest = shelf.catalog.list_packages(page.last, Query(), 4)
    assert sorted(package.digest for package in [*page.packages, *rest.packages]) == sorted(map(digest_of, data))
    assert rest.last == ""


def test_a_page_ends_with_the_package_that_fills_it(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    for index in range(3):
        shelf.publish(labelled("a", "b", weight=index + 1.0), f"acme/iris@{index}")
    whole = shelf.catalog.list_packages("", Query(), 9).packages
    facts_bytes = whole[0].model.ByteSize()

    for bytes_max, count in ((1, 1), (facts_bytes + 1, 1), (whole[0].ByteSize() + 1, 2)):
        monkeypatch.setattr(catalog_module, "PAGE_BYTES_MAX", bytes_max)
        page = shelf.catalog.list_packages("", Query(), 9)
        assert (len(page.packages), page.last) == (count, whole[count - 1].digest)


def test_each_change_is_told_with_its_revision(shelf: Shelf) -> None:
    assert shelf.revisions == [0]
    shelf.publish()
    shelf.catalog.put_mixture(shelf.admitted_mixture(DATA), None, "")
    shelf.catalog.yank(digest_of(DATA), "")

    assert shelf.revisions == sorted(set(shelf.revisions))
    changes = shelf.catalog.changes(0)
    assert [revision for revision, _ in changes][-1] == shelf.revisions[-1]
    assert [type(change) for _, change in changes] == [Mixture, Package]


def test_what_was_yanked_stays_so_while_its_proofs_come_and_go(shelf: Shelf) -> None:
    digest = shelf.publish().digest
    shelf.catalog.yank(digest, "")

    shelf.catalog.revoke(ACME_ID, "")

    package, _ = shelf.catalog.package(digest)
    assert package.state == TrustState.TRUST_STATE_YANKED
    assert package.releases[0].state == TrustState.TRUST_STATE_KEY_REVOKED


def test_a_package_and_the_mixture_it_is_change_together(shelf: Shelf) -> None:
    data = apr_bytes(mixture())
    package = shelf.publish(data)
    name = f"apr-{package.digest[7:23]}"

    def states() -> set[int]:
        with closing(shelf.catalog.blobs.reader()) as gate:
            mixture_state = shelf.catalog.mixture(name, gate).mixture.state
        return {shelf.catalog.package(package.digest)[0].state, mixture_state}

    assert states() == {TrustState.TRUST_STATE_ACTIVE}
    (key,) = shelf.trust.remove_key(ACME_ID)
    shelf.catalog.follow_trust()
    assert states() == {TrustState.TRUST_STATE_UNTRUSTED}
    shelf.trust.add_key(key)
    shelf.catalog.follow_trust()
    assert states() == {TrustState.TRUST_STATE_ACTIVE}
    shelf.catalog.revoke(ACME_ID, "")
    assert states() == {TrustState.TRUST_STATE_KEY_REVOKED}
    shelf.catalog.yank(package.digest, "")
    assert states() == {TrustState.TRUST_STATE_YANKED}


def test_a_trust_folder_that_did_not_change_is_not_read_again(shelf: Shelf) -> None:
    told = len(shelf.revisions)

    shelf.catalog.follow_trust()

    assert len(shelf.revisions) == told


def test_trust_that_could_not_be_written_down_is_tried_again(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = shelf.publish().digest
    shelf.trust.remove_key(ACME_ID)

    def full(*_arguments: object) -> None:
        raise HocketError(Reason.CAPACITY, "full")

    with monkeypatch.context() as patch:
        patch.setattr(catalog_module, "settle_all", full)
        assert shelf.refusal_of(shelf.catalog.follow_trust) is Reason.CAPACITY
    assert ACME_ID not in shelf.catalog.terms.trust.keys
    assert shelf.catalog.package(digest)[0].state == TrustState.TRUST_STATE_ACTIVE

    shelf.catalog.follow_trust()

    assert shelf.catalog.package(digest)[0].state == TrustState.TRUST_STATE_UNTRUSTED


def test_a_name_signed_again_by_another_key_of_its_publisher_is_a_new_proof(shelf: Shelf) -> None:
    shelf.publish()
    shelf.trust.add_key(TrustedKey(public_key_of(b"\x09" * 32), "acme"))
    shelf.catalog.follow_trust()

    package, created = shelf.keep(shelf.admitted(seed=b"\x09" * 32))

    assert (created, len(package.releases)) == (True, 2)
    shelf.catalog.revoke(ACME_ID, "")
    assert shelf.catalog.package("acme/iris@1")[0].state == TrustState.TRUST_STATE_ACTIVE


def test_a_damaged_body_is_reported_and_healed_by_deleting_and_putting_again(shelf: Shelf) -> None:
    shelf.publish()
    shelf.catalog.put_mixture(shelf.admitted_mixture(DATA), None, "")
    with shelf.catalog._store.begin() as tx:
        tx._connection.exec_driver_sql("UPDATE mixtures SET body = x'00'")
    gate = shelf.catalog.blobs.reader()

    assert shelf.refusal_of(shelf.catalog.mixture, "digits", gate) is Reason.BLOB_CORRUPT
    shelf.catalog.delete_mixture("digits", "")
    shelf.catalog.put_mixture(shelf.admitted_mixture(DATA), None, "")
    assert digest_of(shelf.catalog.mixture("digits", gate).body) == shelf.admitted_mixture(DATA).subject.digest


def test_two_packages_cannot_be_the_same_mixture(shelf: Shelf) -> None:
    """Their names hold 64 bits of their digests; nobody has found such a pair, so one is made up."""
    data = apr_bytes(mixture())
    shelf.publish()
    shelf.catalog.put_mixture(shelf.admitted_mixture(DATA), None, "")
    with shelf.catalog._store.begin() as tx:
        name = f"apr-{digest_of(data)[7:23]}"
        tx._connection.exec_driver_sql(f"UPDATE mixture_names SET name = '{name}'")  # noqa: S608 - ours

    assert shelf.refusal_of(shelf.publish, data, "acme/moe@1") is Reason.NAME_TAKEN


async def test_work_that_nobody_waits_for_is_finished_before_anyone_goes_on() -> None:
    threads = Threads(1)
    started, release, finished = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        started.set()
        release.wait(5)
        finished.set()

    task = asyncio.ensure_future(threads.files(work))
    await asyncio.to_thread(started.wait, 5)
    task.cancel()
    await asyncio.sleep(0.01)
    assert not task.done()
    release.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert finished.is_set()
    await threads.close(lambda: None)
