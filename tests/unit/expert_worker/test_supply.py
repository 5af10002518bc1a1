from __future__ import annotations

import asyncio
import os
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from hocket.errors import HocketError, Reason
from hocket.identity import digest_of
from hocket.packages import Password, Policy, RecipientKey, TrustRoots
from hocket.v1.expert_worker_pb2 import LOAD_STATE_FETCHING, LOAD_STATE_VERIFYING
from services.expert_worker.authority import Standing
from services.expert_worker.cache import CachedPackage, PackageCache
from services.expert_worker.journal import Journal
from services.expert_worker.loader import prepare
from services.expert_worker.revocations import Withdrawn
from services.expert_worker.supply import Supplied, Supply
from tests.builders import ABOUT, apr_bytes, linear, signer
from tests.experts import expert_package
from tests.signing import ACME_ID, ACME_SEED, STRANGER_SEED, ZETA_SEED, envelope_of, roots
from tests.worker_registry import WorkerRegistry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from hocket.packages import Package
    from services.expert_worker.loader import Prepared

DATA = apr_bytes()
RELEASE = envelope_of(DATA)
TRUSTING = Standing(roots())
PASSWORD = Password("correct horse battery staple")
AT_ONCE_MAX = 2


@dataclass
class Setting:
    cache: PackageCache
    executor: ThreadPoolExecutor
    journal: Journal
    registry: WorkerRegistry = field(default_factory=WorkerRegistry)
    steps: list[tuple[int, int, int]] = field(default_factory=list)
    in_use: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        registry = self.registry.client()
        self.supply = Supply(
            self.cache, registry, self.executor, AT_ONCE_MAX, lambda: self.in_use, self.journal, prepare
        )

    async def bring(self, digest: str, standing: Standing = TRUSTING) -> Supplied:
        return await self.supply.bring(digest, standing, lambda *step: self.steps.append(step))

    async def refused(self, digest: str, standing: Standing = TRUSTING) -> HocketError:
        with pytest.raises(HocketError) as refusal:
            await self.bring(digest, standing)
        return refusal.value


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hocket.client.registry._PAUSE_SECONDS", 0.001)


@pytest.fixture
def setting(tmp_path: Path) -> Iterator[Setting]:
    with ThreadPoolExecutor(1) as executor:
        yield Setting(PackageCache(tmp_path / "cache", 2**20), executor, Journal(tmp_path / "journal"))


def revoking(*key_ids: str) -> Standing:
    return replace(TRUSTING, withdrawn=Withdrawn(keys=frozenset(key_ids)))


async def test_a_package_comes_from_the_registry_once_and_then_from_the_cache(setting: Setting) -> None:
    digest = setting.registry.publish(DATA, [RELEASE])
    supplied = await setting.bring(digest)
    assert [str(proof.release) for proof in supplied.proofs] == ["acme/iris@1.0.0"]
    assert supplied.evidence.releases == (RELEASE,)
    assert supplied.prepared.size_bytes == 16
    assert setting.steps == [
        (LOAD_STATE_FETCHING, 0, 0),
        (LOAD_STATE_FETCHING, len(DATA) // 2, len(DATA)),
        (LOAD_STATE_FETCHING, len(DATA), len(DATA)),
        (LOAD_STATE_VERIFYING, 0, len(DATA)),
        (LOAD_STATE_VERIFYING, len(DATA), len(DATA)),
    ]
    setting.registry.refuse(Reason.NOT_READY)
    await setting.bring(digest)
    assert setting.registry.downloads == [digest]


async def test_a_large_package_is_mapped_until_its_experts_are_laid_out_and_no_longer(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.expert_worker.mapping.MAPPED_BYTES_MIN", len(DATA) - 1)
    digest = digest_of(DATA)
    setting.cache.write(digest, DATA, [RELEASE])
    cached = setting.cache.read(digest)
    assert cached is not None
    assert isinstance(cached.data, memoryview)
    path = tmp_path / "cache" / "sha256" / digest[7:9] / digest[7:]
    with pytest.raises(BlockingIOError):
        os.open(path, os.O_WRONLY | os.O_NONBLOCK)

    del cached
    supplied = await setting.bring(digest)

    setting.executor.submit(int).result()  # its thread has let go of what it did last
    os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))  # nothing holds the file any more
    assert supplied.prepared.size_bytes == 16
    assert setting.registry.downloads == []


@pytest.mark.parametrize(
    "seen",
    [None, partial(HocketError, Reason.BAD_PAYLOAD), ValueError, IndexError],
    ids=["nothing", "a refusal", "a value that cannot be", "a place that is not there"],
)
async def test_a_mapped_package_that_somebody_would_change_meanwhile_is_opened_again_from_a_copy(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: Callable[[str], Exception] | None
) -> None:
    monkeypatch.setattr("services.expert_worker.mapping.MAPPED_BYTES_MIN", len(DATA) - 1)
    digest = digest_of(DATA)
    setting.cache.write(digest, DATA, [RELEASE])
    path = tmp_path / "cache" / "sha256" / digest[7:9] / digest[7:]
    opened: list[type] = []
    laid_out: list[weakref.ref[Any]] = []
    open_ = Standing.open

    def watched(package: Package) -> Prepared:
        prepared = prepare(package)
        laid_out.append(weakref.ref(prepared.tensors[0]))
        return prepared

    def disturbed(standing: Standing, digest: str, data: Any, releases: Any) -> Any:
        opened.append(type(data))
        assert not any(tensor() is not None for tensor in laid_out), "what does not count is still in memory"
        if len(opened) == 1:
            with pytest.raises(BlockingIOError):
                os.open(path, os.O_WRONLY | os.O_NONBLOCK)
            if seen is not None:  # by this reader, of what was changed
                raise seen("scripted")
        return open_(standing, digest, data, releases)

    monkeypatch.setattr(Standing, "open", disturbed)
    monkeypatch.setattr(setting.supply, "_prepare", watched)
    assert (await setting.bring(digest)).prepared.size_bytes == 16
    assert opened == [memoryview, bytes]

    await setting.bring(digest)
    assert opened == [memoryview, bytes, memoryview], "nobody waits any more"
    assert setting.registry.downloads == []


async def test_a_bug_in_opening_an_intact_map_is_not_hidden_by_another_try(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.expert_worker.mapping.MAPPED_BYTES_MIN", len(DATA) - 1)
    digest = digest_of(DATA)
    setting.cache.write(digest, DATA, [RELEASE])
    opened: list[type] = []

    def broken(_: Standing, __: str, data: Any, ___: Any) -> Any:
        opened.append(type(data))
        raise ValueError("scripted")

    monkeypatch.setattr(Standing, "open", broken)
    with pytest.raises(ValueError, match="scripted"):
        await setting.bring(digest)
    assert opened == [memoryview]


async def test_a_licence_that_has_ended_is_refused_unless_policy_accepts_it(setting: Setting) -> None:
    data = apr_bytes(metadata=ABOUT)
    digest = setting.registry.publish(data, [envelope_of(data)])

    for _ in range(2):
        assert (await setting.refused(digest)).reason is Reason.LICENCE_EXPIRED

    supplied = await setting.bring(digest, replace(TRUSTING, policy=Policy(allow_expired_licences=True)))
    assert supplied.proofs
    assert setting.registry.downloads == [digest]


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [(Password("another"), Reason.DECRYPTION_FAILED), (RecipientKey(b"\x09" * 32), Reason.WRONG_RECIPIENT)],
)
async def test_a_package_that_a_wrong_credential_does_not_open_is_fetched_once(
    setting: Setting, wrong: Any, reason: Reason
) -> None:
    data = apr_bytes(encryption=PASSWORD)
    digest = setting.registry.publish(data, [envelope_of(data)])

    for _ in range(3):
        refused = await setting.refused(digest, replace(TRUSTING, credentials={digest: wrong}))
        assert refused.reason is reason
    await setting.bring(digest, replace(TRUSTING, credentials={digest: PASSWORD}))

    assert setting.registry.downloads == [digest]


async def test_a_package_without_a_credential_is_asked_for_again_since_a_release_may_name_one(
    setting: Setting,
) -> None:
    data = apr_bytes(encryption=PASSWORD)
    digest = setting.registry.publish(data, [envelope_of(data)])
    holding = replace(TRUSTING, credentials={"zeta/iris": PASSWORD})

    assert (await setting.refused(digest, holding)).reason is Reason.ENCRYPTED
    await setting.bring(digest, replace(TRUSTING, credentials={digest: PASSWORD}))
    assert (await setting.refused(digest, holding)).reason is Reason.ENCRYPTED
    setting.registry.publish(data, [envelope_of(data), envelope_of(data, ZETA_SEED, "zeta/iris@1.0.0")])

    assert (await setting.bring(digest, holding)).proofs


async def test_a_package_that_has_no_other_releases_than_it_had_is_not_downloaded_again(setting: Setting) -> None:
    data = apr_bytes(encryption=PASSWORD)
    digest = setting.registry.publish(data, [envelope_of(data)])
    holding = replace(TRUSTING, credentials={"zeta/iris": PASSWORD})

    def chunks() -> int:
        return sum(state == LOAD_STATE_FETCHING and done_bytes > 0 for state, done_bytes, _ in setting.steps)

    for _ in range(3):
        assert (await setting.refused(digest, holding)).reason is Reason.ENCRYPTED
    assert (await setting.refused(digest, revoking(ACME_ID))).reason is Reason.KEY_REVOKED
    assert (len(setting.registry.downloads), chunks()) == (4, 2), "asked for, and stopped at the header"

    setting.registry.publish(data, [envelope_of(data), envelope_of(data, ZETA_SEED, "zeta/other@1.0.0")])
    for _ in range(2):
        assert (await setting.refused(digest, holding)).reason is Reason.ENCRYPTED
    assert (len(setting.registry.downloads), chunks()) == (6, 4), "a release is new, and then known"


async def test_without_a_registry_what_is_not_cached_is_unreachable(setting: Setting) -> None:
    digest = setting.registry.publish(DATA, [RELEASE])
    for reason in (Reason.DRAINING, Reason.DEADLINE, Reason.QUEUE_FULL, Reason.INTERNAL):
        setting.registry.refuse(reason)
        assert (await setting.refused(digest)).reason is Reason.UNREACHABLE


async def test_what_the_registry_says_about_a_package_is_passed_on(setting: Setting) -> None:
    assert (await setting.refused("sha256:" + "0" * 64)).reason is Reason.UNKNOWN_PACKAGE
    digest = setting.registry.publish(DATA, [RELEASE])
    setting.registry.corrupt = True
    assert (await setting.refused(digest)).reason is Reason.BLOB_CORRUPT
    assert setting.cache.read(digest) is None


async def test_a_yanked_digest_is_refused_before_anything_is_read(setting: Setting) -> None:
    digest = setting.registry.publish(DATA, [RELEASE])
    standing = replace(TRUSTING, withdrawn=Withdrawn(digests=frozenset({digest})))
    assert (await setting.refused(digest, standing)).reason is Reason.YANKED
    assert setting.registry.downloads == []


async def test_an_adapter_expert_is_refused_with_words_and_fetched_once(setting: Setting) -> None:
    data = expert_package("expert-sql", "1.0.0")
    digest = setting.registry.publish(data, [envelope_of(data, name="acme/expert-sql@1.0.0", format="expert")])
    for _ in range(2):
        refused = await setting.refused(digest)
        assert (refused.reason, "answers text" in refused.message) == (Reason.NOT_SERVABLE, True)
    assert setting.registry.downloads == [digest]
    unsigned = setting.registry.publish(expert_package("expert-x", "1.0.0"))
    assert (await setting.refused(unsigned)).reason is Reason.UNSIGNED


async def test_a_corrupt_cache_entry_is_dropped_and_fetched_again(setting: Setting) -> None:
    digest = setting.registry.publish(DATA, [RELEASE])
    setting.cache.write(digest, DATA[:-1] + b"?", [RELEASE])
    assert (await setting.bring(digest)).proofs
    cached = setting.cache.read(digest)
    assert cached is not None
    assert cached.data == DATA


async def test_a_corrupt_cache_entry_is_not_served_without_a_registry(setting: Setting) -> None:
    digest = setting.registry.publish(DATA, [RELEASE])
    setting.cache.write(digest, DATA[:-1] + b"?", [RELEASE])
    setting.registry.refuse(Reason.NOT_READY)
    assert (await setting.refused(digest)).reason is Reason.UNREACHABLE


@pytest.mark.parametrize("worthless", [(), (b"garbage",), (envelope_of(DATA, STRANGER_SEED),)])
async def test_a_cached_package_nobody_vouches_for_is_asked_for_again(
    setting: Setting, worthless: tuple[bytes, ...]
) -> None:
    digest = setting.registry.publish(DATA, [RELEASE])
    setting.cache.write(digest, DATA, worthless)
    assert (await setting.bring(digest)).proofs
    cached = setting.cache.read(digest)
    assert cached is not None
    assert cached.releases == (RELEASE,)


async def test_a_newer_release_by_another_key_saves_a_cached_package(setting: Setting) -> None:
    digest = setting.registry.publish(DATA, [RELEASE])
    await setting.bring(digest)
    assert (await setting.refused(digest, revoking(ACME_ID))).reason is Reason.KEY_REVOKED
    setting.registry.publish(DATA, [RELEASE, envelope_of(DATA, ZETA_SEED, "zeta/iris@1.0.0")])
    supplied = await setting.bring(digest, revoking(ACME_ID))
    assert [str(proof.release) for proof in supplied.proofs] == ["zeta/iris@1.0.0"]


async def test_without_a_registry_the_cached_package_is_refused_for_what_it_lacks(setting: Setting) -> None:
    digest = setting.registry.publish(DATA, [RELEASE])
    await setting.bring(digest)
    setting.registry.refuse(Reason.NOT_READY)
    assert (await setting.refused(digest, revoking(ACME_ID))).reason is Reason.KEY_REVOKED


@pytest.mark.parametrize(
    ("releases", "standing", "reason"),
    [
        ((), TRUSTING, Reason.UNSIGNED),
        ((envelope_of(DATA, STRANGER_SEED),), TRUSTING, Reason.SIGNER_NOT_TRUSTED),
        ((RELEASE,), Standing(TrustRoots()), Reason.SIGNER_NOT_TRUSTED),
        ((RELEASE,), revoking(ACME_ID), Reason.KEY_REVOKED),
        ((envelope_of(DATA + b"?"),), TRUSTING, Reason.DIGEST_MISMATCH),
    ],
)
async def test_a_package_this_worker_does_not_trust_is_refused_whatever_the_registry_thinks(
    setting: Setting, releases: tuple[bytes, ...], standing: Standing, reason: Reason
) -> None:
    digest = setting.registry.publish(DATA, releases)
    assert (await setting.refused(digest, standing)).reason is reason
    assert setting.cache.read(digest) is None
    setting.registry.publish(DATA, [RELEASE])
    await setting.bring(digest)


async def test_an_embedded_signature_by_a_trusted_key_is_proof(setting: Setting) -> None:
    data = apr_bytes(signing=signer(ACME_SEED))
    supplied = await setting.bring(setting.registry.publish(data))
    assert [(proof.kind, proof.key_id) for proof in supplied.proofs] == [("embedded", ACME_ID)]
    assert supplied.evidence.embedded_key_id == ACME_ID
    strange = setting.registry.publish(apr_bytes(signing=signer(STRANGER_SEED)))
    assert (await setting.refused(strange)).reason is Reason.SIGNER_NOT_TRUSTED


async def test_policy_alone_may_admit_what_nobody_signed(setting: Setting) -> None:
    digest = setting.registry.publish(DATA)
    supplied = await setting.bring(digest, Standing(policy=Policy(allow_unsigned=True)))
    assert [proof.kind for proof in supplied.proofs] == ["policy"]
    assert (await setting.refused(digest)).reason is Reason.UNSIGNED


@pytest.mark.parametrize(
    ("model", "reason"),
    [(replace(linear(), coefficients=None), Reason.NOT_SERVABLE), (b"not a package at all", Reason.BAD_MAGIC)],
)
async def test_what_cannot_serve_is_refused_and_fetched_once(setting: Setting, model: Any, reason: Reason) -> None:
    data = model if isinstance(model, bytes) else apr_bytes(model)
    digest = setting.registry.publish(data, [envelope_of(data)])
    for _ in range(3):
        assert (await setting.refused(digest)).reason is reason
    assert setting.registry.downloads == [digest]


async def test_a_cached_file_that_is_no_package_is_not_fetched_again(setting: Setting) -> None:
    data = b"not a package at all"
    digest = setting.registry.publish(data, [envelope_of(data)])
    setting.cache.write(digest, data, [envelope_of(data)])
    assert (await setting.refused(digest)).reason is Reason.BAD_MAGIC
    assert setting.registry.downloads == []


async def test_only_so_many_downloads_are_in_memory_at_once_and_they_hold_up_nothing_that_is_cached(
    setting: Setting,
) -> None:
    cached = setting.registry.publish(DATA, [RELEASE])
    await setting.bring(cached)
    setting.registry.hold = asyncio.Event()
    others = [apr_bytes(linear(n, n)) for n in range(1, 6)]
    digests = [setting.registry.publish(data, [envelope_of(data)]) for data in others]
    loads = [asyncio.create_task(setting.bring(digest)) for digest in digests]
    await setting.registry.until(lambda: len(setting.registry.downloads) > AT_ONCE_MAX)
    await asyncio.sleep(0.05)
    assert len(setting.registry.downloads) == 1 + AT_ONCE_MAX
    await setting.bring(cached)
    setting.registry.hold.set()
    assert len(await asyncio.gather(*loads)) == len(digests)


async def test_only_so_many_packages_from_the_cache_are_in_memory_at_once(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = setting.registry.publish(DATA, [RELEASE])
    await setting.bring(digest)
    reads, read = [], setting.cache.read
    go_on = threading.Event()

    def hold(which: str, **options: Any) -> CachedPackage | None:
        reads.append(which)
        go_on.wait(10)
        return read(which, **options)

    monkeypatch.setattr(setting.cache, "read", hold)
    with ThreadPoolExecutor(8) as executor:
        setting.supply._executor = executor
        loads = [asyncio.create_task(setting.bring(digest)) for _ in range(5)]
        await setting.registry.until(lambda: len(reads) >= AT_ONCE_MAX)
        await asyncio.sleep(0.05)
        assert len(reads) == AT_ONCE_MAX
        go_on.set()
        await asyncio.gather(*loads)
    assert len(reads) == 5


async def test_a_full_cache_keeps_what_is_in_use(setting: Setting) -> None:
    setting.cache = setting.supply._cache = PackageCache(setting.cache._folder, 0)
    digest = setting.registry.publish(DATA, [RELEASE])
    setting.in_use = frozenset({digest})
    await setting.bring(digest)
    assert setting.cache.read(digest) is not None
    other = apr_bytes(linear(7, 7))
    await setting.bring(setting.registry.publish(other, [envelope_of(other)]))
    assert setting.cache.read(digest_of(other)) is None
    assert setting.cache.read(digest) is not None


async def test_what_was_loaded_while_a_key_was_valid_is_judged_as_of_then(setting: Setting) -> None:
    digest = setting.registry.publish(DATA, [RELEASE])
    before = datetime.now(UTC)
    evidence = (await setting.bring(digest)).evidence
    assert before <= evidence.time <= datetime.now(UTC)
    over = Standing(roots(not_after=datetime.now(UTC)))
    assert over.judge(evidence)
    assert (await setting.refused(digest, over)).reason is Reason.KEY_EXPIRED
    with pytest.raises(HocketError) as refusal:
        Standing(roots(not_after=before)).judge(evidence)
    assert refusal.value.reason is Reason.KEY_EXPIRED
