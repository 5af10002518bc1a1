"""The registry as its callers meet it, inside one process and over a socket."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
from contextlib import aclosing, asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from hocket.errors import HocketError, Reason
from hocket.identity import ExpertId, digest_of, key_text
from hocket.mixtures import parse_mixture
from hocket.packages import Purpose, public_key_of
from hocket.rpc.handlers import Tokens
from hocket.rpc.status import from_rpc_error
from hocket.telemetry import metrics
from hocket.v1 import registry_pb2
from hocket.v1.package_pb2 import TrustState
from hocket.v1.registry_pb2_grpc import RegistryServiceStub
from services.registry import catalog as catalog_module
from services.registry.app import RegistryApp
from tests.builders import apr_bytes, linear, mixture, raw_apr, signer
from tests.registries import (
    Running,
    fixed,
    gated,
    labelled,
    mixture_release,
    numbers,
    process_in,
    running,
    settings_in,
)
from tests.signing import (
    ACME_ID,
    ACME_SEED,
    STRANGER_SEED,
    ZETA_SEED,
    envelope_of,
    forged,
    trusted,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
    from pathlib import Path

    from hocket.client.registry import RegistryClient


DATA = labelled("a", "b")
OTHER = labelled("c", "d", weight=2.0)
UNKNOWN = "sha256:" + "0" * 64


@pytest.fixture(params=["local", "socket"])
async def registry(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Running]:
    """A registry that must still work when the test is over, whatever it was asked."""
    async with running(tmp_path, request.param, trust_poll_seconds=0.1) as registry:
        yield registry
        data = numbers(12345.0)
        assert await registry.publish(data, "zeta/afterwards@1", ZETA_SEED) == digest_of(data)
        await registry.app.handlers.wait_idle(5)
        assert list((registry.settings.data_dir / "blobs" / "incoming").iterdir()) == []


async def refusal_of(call: Awaitable[Any]) -> Reason:
    with pytest.raises(HocketError) as caught:
        await call
    return caught.value.reason


def state(name: str) -> int:
    return TrustState.Value(f"TRUST_STATE_{name}")


async def until(check: Callable[[], Awaitable[bool]], seconds: float = 5.0) -> None:
    async with asyncio.timeout(seconds):
        while not await check():  # noqa: ASYNC110 - what is waited for is in files, and tells nobody
            await asyncio.sleep(0.02)


def upload(header: registry_pb2.PublishHeader | None, *chunks: bytes) -> Iterator[registry_pb2.PublishPackageRequest]:
    """An upload by hand, for what the client would not send."""
    if header is not None:
        yield registry_pb2.PublishPackageRequest(header=header)
    for chunk in chunks:
        yield registry_pb2.PublishPackageRequest(chunk=chunk)


async def send(registry: Running, requests: Any, method: str = "PublishPackage") -> Any:
    call = getattr(RegistryServiceStub(registry.channels.get(registry.address)), method)
    try:
        return await call(requests, timeout=5)
    except grpc.RpcError as error:
        raise from_rpc_error(error) from None


def header_of(data: bytes, **changes: Any) -> registry_pb2.PublishHeader:
    fields = {"digest": digest_of(data), "size_bytes": len(data), "release": envelope_of(data), **changes}
    return registry_pb2.PublishHeader(**fields)


class TestPublishing:
    async def test_a_package_is_described_by_digest_and_by_release(self, registry: Running) -> None:
        client = registry.client()
        told: list[tuple[int, int]] = []

        response = await client.publish(DATA, envelope_of(DATA), on_progress=lambda *done: told.append(done))

        assert response.created
        assert told[-1] == (len(DATA), len(DATA))
        by_digest = await client.get_package(digest_of(DATA))
        assert by_digest == await client.get_package("acme/iris@1.0.0")
        assert (by_digest.size_bytes, by_digest.format, by_digest.state) == (len(DATA), "apr", state("ACTIVE"))
        (release,) = by_digest.releases
        assert (release.publisher, release.name, release.version, release.key_id) == ("acme", "iris", "1.0.0", ACME_ID)
        assert [column.label for column in by_digest.model.columns] == ["a", "b"]
        assert by_digest.model.metadata["aprender_version"] == "0.11.0"
        assert not response.package.model.HasField("metadata")

    async def test_publishing_again_changes_nothing(self, registry: Running) -> None:
        client = registry.client()
        first = await client.publish(DATA, envelope_of(DATA))
        before = len(await registry.seen())

        again = await client.publish(DATA, envelope_of(DATA))

        assert (first.created, again.created) == (True, False)
        assert again.package == first.package
        assert len(await registry.seen()) == before

    async def test_many_may_publish_the_same_at_once(self, registry: Running) -> None:
        client = registry.client()

        responses = await asyncio.gather(*[client.publish(DATA, envelope_of(DATA)) for _ in range(8)])

        assert sum(response.created for response in responses) == 1

    async def test_a_digest_may_carry_several_releases(self, registry: Running) -> None:
        client = registry.client()
        await client.publish(DATA, envelope_of(DATA))

        second = await client.publish(DATA, envelope_of(DATA, ZETA_SEED, "zeta/flower@2"))

        assert second.created
        assert [f"{release.publisher}/{release.name}" for release in second.package.releases] == [
            "acme/iris",
            "zeta/flower",
        ]
        assert (await client.get_package("zeta/flower@2")).digest == digest_of(DATA)

    async def test_a_version_keeps_its_bytes(self, registry: Running) -> None:
        client = registry.client()
        await client.publish(DATA, envelope_of(DATA))

        taken = client.publish(OTHER, envelope_of(OTHER))

        assert await refusal_of(taken) is Reason.VERSION_TAKEN
        assert await refusal_of(client.get_package(digest_of(OTHER))) is Reason.UNKNOWN_PACKAGE
        assert (await client.publish(OTHER, envelope_of(OTHER, name="acme/iris@1.0.1"))).created

    @pytest.mark.parametrize(
        ("release", "reason"),
        [
            (b"", Reason.UNSIGNED),
            (b"{}", Reason.BAD_RELEASE),
            (forged(DATA), Reason.SIGNATURE_INVALID),
            (envelope_of(DATA, STRANGER_SEED), Reason.SIGNER_NOT_TRUSTED),
            (envelope_of(DATA, ZETA_SEED), Reason.NAME_NOT_ALLOWED),
            (envelope_of(OTHER), Reason.DIGEST_MISMATCH),
        ],
    )
    async def test_what_nobody_trusted_vouches_for_is_refused(
        self, registry: Running, release: bytes, reason: Reason
    ) -> None:
        client = registry.client()

        assert await refusal_of(client.publish(DATA, release)) is reason
        assert await refusal_of(client.get_package(digest_of(DATA))) is Reason.UNKNOWN_PACKAGE
        assert list(registry.settings.data_dir.joinpath("blobs").rglob("*.*")) == []
        assert (await client.publish(DATA, envelope_of(DATA))).created

    async def test_a_key_counts_only_within_its_time(self, registry: Running) -> None:
        client = registry.client()
        registry.trust.add_key(trusted(not_after=datetime.now(UTC)))
        late = client.publish(OTHER, envelope_of(OTHER))
        await asyncio.sleep(0.3)

        assert await refusal_of(late) is Reason.KEY_EXPIRED
        registry.trust.add_key(trusted(not_after=datetime.now(UTC) + timedelta(hours=1)))
        await until(lambda: _succeeds(client.publish(OTHER, envelope_of(OTHER))))

    async def test_a_trusted_signature_inside_the_file_makes_it_addressable_by_digest(self, registry: Running) -> None:
        client = registry.client()
        strange, good = (apr_bytes(linear(), signing=signer(seed)) for seed in (STRANGER_SEED, ACME_SEED))

        package = (await client.publish(good)).package

        assert (package.embedded_signature.key_id, package.embedded_signature.trusted) == (ACME_ID, True)
        assert (list(package.releases), package.state) == ([], state("ACTIVE"))
        assert await refusal_of(client.publish(strange)) is Reason.SIGNER_NOT_TRUSTED

    async def test_damaged_and_unservable_files_are_refused_under_a_good_release(self, registry: Running) -> None:
        client = registry.client()
        cases = {
            DATA[:-1] + b"x": Reason.BAD_CHECKSUM,
            b"PK" + DATA: Reason.BAD_MAGIC,
            apr_bytes(mixture(top_k=0)): Reason.NOT_SERVABLE,
            raw_apr(b"sealed", flags=1): Reason.ENCRYPTED,
        }
        for data, reason in cases.items():
            assert await refusal_of(client.publish(data, envelope_of(data))) is reason


class TestUploads:
    async def test_bytes_that_are_not_those_announced_are_refused(self, registry: Running) -> None:
        wrong = upload(header_of(DATA, digest=digest_of(OTHER)), DATA)

        assert await refusal_of(send(registry, wrong)) is Reason.DIGEST_MISMATCH
        assert (await send(registry, upload(header_of(DATA), DATA))).created

    @pytest.mark.parametrize("size_bytes", [0, len(DATA) - 1, len(DATA) + 1])
    async def test_another_number_of_bytes_than_announced_is_refused(self, registry: Running, size_bytes: int) -> None:
        assert await refusal_of(send(registry, upload(header_of(DATA, size_bytes=size_bytes), DATA))) is (
            Reason.BAD_REQUEST
        )

    async def test_an_upload_begins_with_its_header_and_goes_on_with_chunks(self, registry: Running) -> None:
        header = header_of(DATA)
        for requests in (
            upload(None),
            upload(None, DATA),
            iter([*upload(header), *upload(header)]),
            upload(header, bytes(2**20 + 1)),
        ):
            assert await refusal_of(send(registry, requests)) is Reason.BAD_REQUEST

    async def test_chunks_may_be_of_any_size(self, registry: Running) -> None:
        chunks = [b"", DATA[:1], DATA[1:2], DATA[2:], b""]

        assert (await send(registry, upload(header_of(DATA), *chunks))).created

    @pytest.mark.parametrize("over", ["local", "socket"])
    async def test_a_package_beyond_the_limit_is_refused_before_it_is_sent(self, tmp_path: Path, over: str) -> None:
        async with running(tmp_path, over, package_bytes_max=len(DATA)) as registry:
            assert (await registry.client().publish(DATA, envelope_of(DATA))).created
            beyond = upload(header_of(OTHER, size_bytes=len(DATA) + 1))
            assert await refusal_of(send(registry, beyond)) is Reason.TOO_LARGE

    @pytest.mark.parametrize("over", ["local", "socket"])
    async def test_an_upload_that_falls_silent_gives_its_place_to_the_next(self, tmp_path: Path, over: str) -> None:
        async with running(tmp_path, over, uploads_max=1, upload_idle_seconds=0.2) as registry:

            async def silent() -> AsyncIterator[registry_pb2.PublishPackageRequest]:
                yield registry_pb2.PublishPackageRequest(header=header_of(OTHER))
                await asyncio.Event().wait()

            stalled = asyncio.ensure_future(refusal_of(send(registry, silent())))
            await asyncio.sleep(0.05)
            assert await registry.publish(DATA) == digest_of(DATA)
            assert await stalled is Reason.DEADLINE
            assert list((registry.settings.data_dir / "blobs" / "incoming").iterdir()) == []

    @pytest.mark.parametrize("chunks_before", [0, 1, 20])
    async def test_an_upload_that_is_cancelled_leaves_nothing(self, registry: Running, chunks_before: int) -> None:
        begun = asyncio.Event()

        async def endless() -> AsyncIterator[registry_pb2.PublishPackageRequest]:
            yield registry_pb2.PublishPackageRequest(header=header_of(DATA, size_bytes=2**30))
            for sent in itertools.count():
                if sent == chunks_before:
                    begun.set()
                yield registry_pb2.PublishPackageRequest(chunk=bytes(2**16))

        call = asyncio.ensure_future(send(registry, endless()))
        await begun.wait()
        call.cancel()
        await asyncio.wait([call])


class TestDownloads:
    async def test_bytes_come_back_with_every_release(self, registry: Running) -> None:
        client = registry.client()
        for name, seed in (("acme/iris@1.0.0", ACME_SEED), ("zeta/flower@2", ZETA_SEED)):
            await registry.publish(DATA, name, seed)
        told: list[tuple[int, int]] = []

        header, data = await client.download(digest_of(DATA), on_progress=lambda *done: told.append(done))

        assert data == DATA
        assert list(header.releases) == [envelope_of(DATA), envelope_of(DATA, ZETA_SEED, "zeta/flower@2")]
        assert not header.package.model.HasField("metadata")
        assert told[-1] == (len(DATA), len(DATA))

    async def test_a_download_goes_on_from_any_offset(self, registry: Running) -> None:
        data = apr_bytes(linear(*[float(index) for index in range(2**18)]), compression="none")
        digest = await registry.publish(data)
        stub = RegistryServiceStub(registry.channels.get(registry.address))
        for offset in (0, 1, 2**19 + 5, len(data) - 1, len(data)):
            request = registry_pb2.DownloadPackageRequest(digest=digest, offset=offset)
            header, *chunks = [response async for response in stub.DownloadPackage(request, timeout=5)]
            assert header.header.package.digest == digest
            assert b"".join(chunk.chunk for chunk in chunks) == data[offset:]

    async def test_what_is_not_there_cannot_be_downloaded(self, registry: Running) -> None:
        client = registry.client()
        digest = await registry.publish(DATA)
        stub = RegistryServiceStub(registry.channels.get(registry.address))
        beyond = registry_pb2.DownloadPackageRequest(digest=digest, offset=len(DATA) + 1)

        assert await refusal_of(client.download(UNKNOWN)) is Reason.UNKNOWN_PACKAGE
        assert await refusal_of(client.download("iris")) is Reason.UNKNOWN_PACKAGE
        with pytest.raises(Exception, match="beyond the end"):
            _ = [response async for response in stub.DownloadPackage(beyond, timeout=5)]

    async def test_a_damaged_blob_is_reported_and_healed_by_publishing_again(self, registry: Running) -> None:
        client = registry.client()
        digest = await registry.publish(DATA)
        path = registry.settings.data_dir / "blobs" / "sha256" / digest[7:9] / digest[7:]
        path.write_bytes(DATA[:-1] + bytes([DATA[-1] ^ 1]))

        assert await refusal_of(client.download(digest)) is Reason.BLOB_CORRUPT
        path.unlink()
        assert await refusal_of(client.download(digest)) is Reason.BLOB_CORRUPT
        healed = await client.publish(DATA, envelope_of(DATA))
        assert (healed.created, healed.healed) == (False, True)
        assert (await client.download(digest))[1] == DATA
        assert not (await client.publish(DATA, envelope_of(DATA))).healed


class TestLooking:
    async def test_what_is_unknown_or_misspelled_says_so(self, registry: Running) -> None:
        client = registry.client()

        assert await refusal_of(client.get_package(UNKNOWN)) is Reason.UNKNOWN_PACKAGE
        assert await refusal_of(client.get_package("acme/iris@1.0.0")) is Reason.UNKNOWN_PACKAGE
        assert await refusal_of(client.get_package("acme/iris")) is Reason.BAD_REQUEST
        assert await refusal_of(client.yank(UNKNOWN)) is Reason.UNKNOWN_PACKAGE
        assert await refusal_of(client.fetch_mixture("digits")) is Reason.UNKNOWN_MIXTURE
        assert await refusal_of(client.fetch_mixture(UNKNOWN)) is Reason.UNKNOWN_MIXTURE
        assert await refusal_of(client.delete_mixture("digits")) is Reason.UNKNOWN_MIXTURE

    async def test_lists_come_in_pages_by_digest(self, registry: Running) -> None:
        digests = [await registry.publish(numbers(index), f"acme/n@{index}") for index in range(5)]
        zeta = await registry.publish(numbers(9), "zeta/n@9", ZETA_SEED)

        def page(size: int, token: str = "", publisher: str = "acme") -> Awaitable[Any]:
            request = registry_pb2.ListPackagesRequest(page_size=size, page_token=token, publisher=publisher)
            return send(registry, request, "ListPackages")

        first = await page(2)
        second = await page(2, first.next_page_token)
        third = await page(2, second.next_page_token)
        assert [len(found.packages) for found in (first, second, third)] == [2, 2, 1]
        found = [package.digest for some in (first, second, third) for package in some.packages]
        assert (found, third.next_page_token) == (sorted(digests), "")
        assert (await page(5)).next_page_token == ""
        everything = [package.digest async for package in registry.client().list_packages()]
        assert everything == sorted([*digests, zeta])
        assert await refusal_of(page(-1)) is Reason.BAD_REQUEST
        assert await refusal_of(page(2, first.next_page_token, "zeta")) is Reason.BAD_REQUEST
        for token in ("?", "bm8=", "WzFd", "WyJhY21lIiwgMV0="):
            assert await refusal_of(page(2, token)) is Reason.BAD_REQUEST


class TestWithdrawing:
    async def test_a_yanked_package_stays_yanked(self, registry: Running) -> None:
        client = registry.client()
        digest = await registry.publish(DATA)

        first, again = await client.yank(digest, "wrong labels"), await client.yank(digest)

        assert first == again
        assert first.state == state("YANKED")
        assert await refusal_of(client.publish(DATA, envelope_of(DATA))) is Reason.YANKED
        assert (await client.download(digest))[0].package.state == state("YANKED")
        assert await refusal_of(client.yank(digest, "x" * 1025)) is Reason.BAD_REQUEST

    async def test_a_revoked_key_withdraws_what_rests_on_it_alone(self, registry: Running) -> None:
        client = registry.client()
        inside = apr_bytes(linear(), signing=signer(ACME_SEED))
        alone, both = await registry.publish(DATA), await registry.publish(OTHER, "acme/other@1")
        await registry.publish(OTHER, "zeta/other@1", ZETA_SEED)
        embedded = (await client.publish(inside)).package.digest
        others = await registry.publish(numbers(), "zeta/n@1", ZETA_SEED)

        first = await client.revoke_key(key_text(public_key_of(ACME_SEED)), "laptop lost")
        again = await client.revoke_key(ACME_ID)

        assert first == again
        assert (first.key_id, list(first.withdrawn_digests)) == (ACME_ID, sorted([alone, embedded]))
        states = {package.digest: package.state async for package in client.list_packages()}
        assert states == {
            alone: state("KEY_REVOKED"),
            both: state("ACTIVE"),
            embedded: state("KEY_REVOKED"),
            others: state("ACTIVE"),
        }
        assert await refusal_of(client.publish(numbers(7), envelope_of(numbers(7)))) is Reason.KEY_REVOKED
        assert [release.state for release in (await client.get_package(both)).releases] == [
            state("KEY_REVOKED"),
            state("ACTIVE"),
        ]

    async def test_a_withdrawn_package_serves_again_under_another_key(self, registry: Running) -> None:
        client = registry.client()
        digest = await registry.publish(DATA)
        await client.revoke_key(ACME_ID)
        registry.trust.add_key(trusted(STRANGER_SEED, "acme"))
        await until(lambda: _succeeds(client.publish(DATA, envelope_of(DATA, STRANGER_SEED))))

        package = await client.get_package(digest)

        assert package.state == state("ACTIVE")
        assert [release.version for release in package.releases] == ["1.0.0", "1.0.0"]

    async def test_keys_that_nobody_knows_can_be_revoked_but_not_what_is_no_key(self, registry: Running) -> None:
        client = registry.client()

        assert (await client.revoke_key("ab" * 32)).key_id == "ab" * 32
        for text in ("", "ab", "AB" * 32, "ed25519:" + "ab" * 31):
            assert await refusal_of(client.revoke_key(text)) is Reason.BAD_REQUEST
        assert await refusal_of(client.revoke_key("ab" * 32, "x" * 1025)) is Reason.BAD_REQUEST

    async def test_revocations_outlive_a_restart(self, tmp_path: Path) -> None:
        async with running(tmp_path) as registry:
            digest = await registry.publish(DATA)
            await registry.client().revoke_key(ACME_ID, "lost")
        async with running(tmp_path) as registry:
            client = registry.client()
            assert (await client.get_package(digest)).state == state("KEY_REVOKED")
            assert await refusal_of(client.publish(DATA, envelope_of(DATA))) is Reason.KEY_REVOKED

    async def test_a_key_that_leaves_the_trust_folder_withdraws_and_one_that_returns_restores(
        self, registry: Running
    ) -> None:
        client = registry.client()
        digest = await registry.publish(DATA)
        record = fixed("digits", DATA)
        await registry.put(record)

        async def stands(name: str) -> bool:
            package, fetched = await client.get_package(digest), await client.fetch_mixture("digits")
            return {package.state, package.releases[0].state, fetched.mixture.state} == {state(name)}

        (key,) = registry.trust.remove_key(ACME_ID)
        await until(lambda: stands("UNTRUSTED"))
        assert await refusal_of(client.publish(DATA, envelope_of(DATA))) is Reason.SIGNER_NOT_TRUSTED
        registry.trust.add_key(key)
        await until(lambda: stands("ACTIVE"))

    async def test_a_look_at_the_trust_folder_that_fails_is_not_the_last(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with running(tmp_path, trust_poll_seconds=0.05) as registry:
            client = registry.client()
            digest = await registry.publish(DATA)
            failed = asyncio.Event()

            def fail() -> None:
                registry.app._loop.call_soon_threadsafe(failed.set)  # type: ignore[union-attr]  # it runs
                raise ZeroDivisionError

            with monkeypatch.context() as patch:
                patch.setattr(registry.app._catalog, "follow_trust", fail)
                await asyncio.wait_for(failed.wait(), 5)
            registry.trust.remove_key(ACME_ID)

            async def withdrawn() -> bool:
                return (await client.get_package(digest)).state == state("UNTRUSTED")

            await until(withdrawn)

    async def test_what_happened_to_the_trust_folder_meanwhile_counts_after_a_restart(self, tmp_path: Path) -> None:
        async with running(tmp_path) as registry:
            digest = await registry.publish(DATA)
            registry.trust.remove_key(ACME_ID)
        async with running(tmp_path) as registry:
            assert (await registry.client().get_package(digest)).state == state("UNTRUSTED")


class TestUnsigned:
    @pytest.mark.parametrize("over", ["local", "socket"])
    async def test_the_policy_admits_counts_and_shows_it(self, tmp_path: Path, over: str) -> None:
        counter = metrics.UNSIGNED_USES.labels("registry")
        before = counter._value.get()
        async with running(tmp_path, over, allow_unsigned=True) as registry:
            client = registry.client()
            package = (await client.publish(DATA)).package
            mixture = await client.put_mixture(fixed("digits", DATA).body())
            assert (package.state, package.unsigned_by_policy) == (state("ACTIVE"), True)
            assert (mixture.state, mixture.unsigned_by_policy) == (state("ACTIVE"), True)
            assert not mixture.HasField("release")
            assert counter._value.get() == before + 2

            signed = (await client.publish(DATA, envelope_of(DATA))).package
            assert (signed.state, signed.unsigned_by_policy) == (state("ACTIVE"), False)
            taken = client.put_mixture(fixed("digits", DATA).body(), mixture_release(fixed("digits", DATA)))
            assert await refusal_of(taken) is Reason.NAME_TAKEN

    async def test_taking_the_policy_back_withdraws(self, tmp_path: Path) -> None:
        async with running(tmp_path, allow_unsigned=True) as registry:
            digest = (await registry.client().publish(DATA)).package.digest
        async with running(tmp_path) as registry:
            assert (await registry.client().get_package(digest)).state == state("UNTRUSTED")


class TestMixtures:
    async def test_a_mixture_comes_back_as_it_was_put(self, registry: Running) -> None:
        client = registry.client()
        for data, name in ((DATA, "acme/iris@1.0.0"), (OTHER, "acme/other@1")):
            await registry.publish(data, name)
        record, gate = gated("digits", DATA, OTHER)
        told: list[tuple[int, int]] = []

        put = await client.put_mixture(
            record.body(), mixture_release(record), gate, on_progress=lambda *done: told.append(done)
        )

        assert (put.name, put.digest, put.state) == ("digits", record.digest, state("ACTIVE"))
        assert (put.release.publisher, put.release.name, put.release.key_id) == ("acme", "digits", ACME_ID)
        assert (put.body_bytes, put.gate_bytes) == (len(record.body()), len(gate))
        assert told[-1] == (len(gate), len(gate))
        for address in ("digits", record.digest):
            fetched = await client.fetch_mixture(address)
            assert fetched.mixture == put
            assert (fetched.body, fetched.release, fetched.gate) == (record.body(), mixture_release(record), gate)

    async def test_members_must_be_here_and_may_serve(self, registry: Running) -> None:
        await registry.publish(DATA)
        for record, reason in (
            (fixed("digits", DATA, OTHER), Reason.UNKNOWN_PACKAGE),
            (fixed("digits", f"{digest_of(DATA)}#1"), Reason.UNKNOWN_EXPERT),
            (fixed("digits", "@" + UNKNOWN), Reason.UNKNOWN_MIXTURE),
        ):
            assert await refusal_of(registry.put(record)) is reason
        assert await registry.put(fixed("digits", DATA))
        await registry.client().yank(digest_of(DATA))
        assert await refusal_of(registry.put(fixed("letters", DATA))) is Reason.YANKED

    async def test_members_that_cannot_be_combined_are_refused(self, registry: Running) -> None:
        await registry.publish(DATA)
        await registry.publish(OTHER, "acme/other@1")
        await registry.publish(numbers(), "acme/numbers@1")

        for record in (fixed("m", DATA, numbers()), fixed("m", DATA, OTHER, labels=("a", "b", "c"))):
            assert await refusal_of(registry.put(record)) is Reason.MEMBERS_NOT_ALIGNED
        wide, tensor = gated("m", DATA, OTHER, features=3)
        assert await refusal_of(registry.put(wide, tensor)) is Reason.MEMBERS_NOT_ALIGNED
        assert await registry.put(fixed("m", DATA, OTHER, labels=("d", "c", "b", "a", "z")))

    async def test_a_gate_that_is_not_the_one_named_is_refused(self, registry: Running) -> None:
        await registry.publish(DATA)
        await registry.publish(OTHER, "acme/other@1")
        record, gate = gated("digits", DATA, OTHER)

        assert await refusal_of(registry.put(record, gate[:-1] + b"x")) is Reason.DIGEST_MISMATCH
        assert await refusal_of(registry.put(record, gate[:-4])) is Reason.BAD_REQUEST
        assert await refusal_of(registry.put(record, gate + gate)) is Reason.BAD_REQUEST
        assert await refusal_of(registry.put(fixed("digits", DATA), gate)) is Reason.BAD_REQUEST
        assert await registry.put(record, gate) == record.digest

    async def test_a_body_or_release_that_is_not_sound_is_refused(self, registry: Running) -> None:
        client = registry.client()
        await registry.publish(DATA)
        record = fixed("digits", DATA)
        misnamed = mixture_release(record, name="acme/letters@1")
        part = registry_pb2.PutMixtureHeader(body=record.body(), release=mixture_release(record))
        header = registry_pb2.PutMixtureRequest(header=part)
        body = record.body().replace(b'"digits"', b'"digits" ')
        loose = envelope_of(body, name="acme/digits@1", purpose=Purpose.MIXTURE, format="mixture")
        for put, reason in (
            (client.put_mixture(record.body()), Reason.UNSIGNED),
            (client.put_mixture(record.body(), mixture_release(record, STRANGER_SEED)), Reason.SIGNER_NOT_TRUSTED),
            (client.put_mixture(record.body(), misnamed), Reason.BAD_MIXTURE),
            (client.put_mixture(record.body(), envelope_of(record.body())), Reason.BAD_RELEASE),
            (send(registry, iter([registry_pb2.PutMixtureRequest()]), "PutMixture"), Reason.BAD_REQUEST),
            (send(registry, iter([header, header]), "PutMixture"), Reason.BAD_REQUEST),
        ):
            assert await refusal_of(put) is reason
        assert await refusal_of(client.put_mixture(body, loose)) is Reason.BAD_MIXTURE

    async def test_a_version_stays_what_was_signed_under_it(self, registry: Running) -> None:
        await registry.publish(DATA)
        await registry.publish(OTHER, "acme/other@1")
        first, second = fixed("digits", DATA), fixed("digits", OTHER)
        client = registry.client()
        await client.put_mixture(first.body(), mixture_release(first, name="acme/digits@1"))
        await client.put_mixture(first.body(), mixture_release(first, name="acme/digits@1"))
        again = client.put_mixture(second.body(), mixture_release(second, name="acme/digits@1"))
        assert await refusal_of(again) is Reason.VERSION_TAKEN
        await client.put_mixture(second.body(), mixture_release(second, name="acme/digits@2"))
        third = fixed("digits", DATA, OTHER)
        for is_there in (True, False):  # also when nothing of that name is left
            again = client.put_mixture(third.body(), mixture_release(third, name="acme/digits@1"))
            assert await refusal_of(again) is Reason.VERSION_TAKEN
            if is_there:
                await client.delete_mixture("digits")
        await client.put_mixture(first.body(), mixture_release(first, name="acme/digits@1"))

    async def test_an_etag_says_what_is_replaced(self, registry: Running) -> None:
        await registry.publish(DATA)
        await registry.publish(OTHER, "acme/other@1")
        first, second, third = (fixed("digits", *members) for members in ([DATA], [OTHER], [DATA, OTHER]))

        assert await refusal_of(registry.put(first, etag=UNKNOWN)) is Reason.ETAG_STALE
        await registry.put(first)
        await registry.put(second, etag=first.digest)
        assert await refusal_of(registry.put(third, etag=first.digest)) is Reason.ETAG_STALE
        await registry.put(second, etag=first.digest)  # the same again, as after a lost answer
        await registry.put(third)
        client = registry.client()
        assert await refusal_of(client.delete_mixture("digits", second.digest)) is Reason.ETAG_STALE
        assert await client.delete_mixture("digits", third.digest) > 0

    async def test_putting_the_same_again_changes_nothing(self, registry: Running) -> None:
        await registry.publish(DATA)
        record = fixed("digits", DATA)
        await registry.put(record)
        before = await registry.seen()

        await registry.put(record)

        assert await registry.seen() == before

    async def test_a_name_belongs_to_its_publisher_until_it_is_deleted(self, registry: Running) -> None:
        client = registry.client()
        await registry.publish(DATA)
        record = fixed("digits", DATA)
        await registry.put(record)
        zetas = mixture_release(record, ZETA_SEED, "zeta/digits@1")

        assert await refusal_of(client.put_mixture(record.body(), zetas)) is Reason.NAME_TAKEN
        await client.delete_mixture("digits")
        assert await refusal_of(client.fetch_mixture("digits")) is Reason.UNKNOWN_MIXTURE
        assert (await client.put_mixture(record.body(), zetas)).release.publisher == "zeta"

    async def test_mixtures_nest_and_stay_while_they_are_nested(self, registry: Running) -> None:
        client = registry.client()
        await registry.publish(DATA)
        await registry.publish(OTHER, "acme/other@1")
        inner, gate = gated("inner", DATA, OTHER)
        await registry.put(inner, gate)
        outer = fixed("outer", "@" + inner.digest, DATA)
        await registry.put(outer)

        assert await refusal_of(registry.put(fixed("third", "@" + outer.digest))) is Reason.BAD_MIXTURE
        assert await refusal_of(client.delete_mixture("inner")) is Reason.MIXTURE_IN_USE
        newer = fixed("inner", OTHER)
        await registry.put(newer)
        old = await client.fetch_mixture(inner.digest)
        assert (old.body, old.gate, old.mixture.revision) == (inner.body(), gate, 0)
        assert (await client.fetch_mixture("inner")).body == newer.body()
        await client.delete_mixture("inner")
        await client.delete_mixture("outer")
        assert await refusal_of(client.fetch_mixture(inner.digest)) is Reason.UNKNOWN_MIXTURE
        assert not list((registry.settings.data_dir / "blobs").rglob(digest_of(gate)[7:]))

    async def test_a_revoked_key_withdraws_its_mixtures(self, registry: Running) -> None:
        client = registry.client()
        await registry.publish(DATA, "zeta/iris@1", ZETA_SEED)
        record = fixed("digits", DATA)
        await registry.put(record)

        await client.revoke_key(ACME_ID)

        assert (await client.fetch_mixture("digits")).mixture.state == state("KEY_REVOKED")
        assert (await client.get_package(digest_of(DATA))).state == state("ACTIVE")
        assert await refusal_of(registry.put(record)) is Reason.KEY_REVOKED

    async def test_a_file_of_several_experts_is_a_mixture_by_itself(self, registry: Running) -> None:
        client = registry.client()
        data = apr_bytes(mixture())
        digest = await registry.publish(data)
        name = f"apr-{digest[7:23]}"

        fetched = await client.fetch_mixture(name)

        record = parse_mixture(fetched.body)
        assert record.members == (ExpertId(digest, 0), ExpertId(digest, 1))
        assert (fetched.mixture.package_digest, fetched.release) == (digest, b"")
        assert not fetched.mixture.HasField("release")
        assert digest_of(fetched.gate) == record.gate.weights
        assert await refusal_of(client.delete_mixture(name)) is Reason.MIXTURE_IN_USE
        again = client.put_mixture(fetched.body, mixture_release(record))
        assert await refusal_of(again) is Reason.NAME_TAKEN
        await registry.put(fixed("m", f"{digest}#1"))
        await registry.put(fixed("n", "@" + fetched.mixture.digest))
        await client.yank(digest)
        assert (await client.fetch_mixture(name)).mixture.state == state("YANKED")


class TestWatching:
    async def test_the_feed_tells_everything_then_changes(self, registry: Running) -> None:
        client = registry.client()
        await registry.publish(DATA)
        async with aclosing(client.watch()) as feed:
            first, mark = await take(feed, 2)
            assert (first.package.digest, first.revision) == (digest_of(DATA), mark.revision)
            assert mark.WhichOneof("event") == "synced"

            await registry.put(fixed("digits", DATA))
            (put,) = await take(feed, 1)
            assert (put.mixture.name, put.mixture.revision) == ("digits", put.revision)
            await client.revoke_key("ab" * 32, "lost")
            (revoked,) = await take(feed, 1)
            assert (revoked.revocation.key_id, revoked.revocation.explanation) == ("ab" * 32, "lost")
            await client.yank(digest_of(DATA))
            (yanked,) = await take(feed, 1)
            assert yanked.package.state == state("YANKED")
            await client.delete_mixture("digits")
            (deleted,) = await take(feed, 1)
            assert (deleted.mixture.name, deleted.mixture.deleted) == ("digits", True)
            assert len({item.epoch for item in (first, mark, put, revoked, yanked, deleted)}) == 1

    async def test_the_feed_goes_on_after_a_break(self, registry: Running, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(catalog_module, "_CHANGES_AT_ONCE", 3)
        for index in range(8):
            await registry.publish(numbers(index), f"acme/n@{index}")
        seen = await registry.seen()
        revisions = [item.revision for item in seen]
        assert revisions == sorted(revisions)
        assert len(seen) == 9

        rest = await registry.seen(seen[4].revision)

        assert rest == seen[5:]
        assert await refusal_of(registry.seen(seen[-1].revision + 1)) is Reason.REVISION_UNKNOWN

    async def test_a_restart_keeps_revisions_and_begins_an_epoch(self, tmp_path: Path) -> None:
        async with running(tmp_path) as registry:
            await registry.publish(DATA)
            before = await registry.seen()
        async with running(tmp_path) as registry:
            after = await registry.seen()
        assert [item.revision for item in before] == [item.revision for item in after]
        assert before[0].package == after[0].package
        assert before[0].epoch != after[0].epoch

    async def test_a_registry_that_stops_tells_its_watchers(self, tmp_path: Path) -> None:
        async with running(tmp_path) as registry, aclosing(registry.client().watch()) as feed:
            await take(feed, 1)
            registry.app._feed.close()
            assert await refusal_of(anext(feed)) is Reason.DRAINING


class TestWorkers:
    @pytest.mark.parametrize("over", ["local", "socket"])
    async def test_a_worker_is_listed_until_its_lease_ends(self, tmp_path: Path, over: str) -> None:
        async with (
            running(tmp_path, over, lease_seconds=0.4) as registry,
            aclosing(registry.client().watch()) as feed,
        ):
            await take(feed, 1)
            async with announced(registry, worker()) as renewals:
                (renewal,) = await take(renewals, 1)
                assert renewal.lease.ToMilliseconds() == 400
                (came,) = await take(feed, 1)
                assert came.worker == worker()
            broke = asyncio.get_running_loop().time()
            (went,) = await take(feed, 1)
            assert went.worker_gone == "worker-a"
            assert asyncio.get_running_loop().time() - broke > 0.2

    async def test_live_workers_are_told_whatever_the_revision(self, registry: Running) -> None:
        await registry.publish(DATA)
        async with announced(registry, worker(), worker(draining=True)) as renewals:
            await take(renewals, 2)
            state, mark = await registry.seen(after_revision=1)
            assert state.worker.draining
            assert mark.WhichOneof("event") == "synced"

    async def test_a_state_that_cannot_be_true_is_refused(self, registry: Running) -> None:
        async with announced(registry, worker(address="")) as renewals:
            assert await refusal_of(anext(renewals)) is Reason.BAD_REQUEST

    async def test_an_address_inside_a_process_is_believed_only_there(self, registry: Running) -> None:
        async with announced(registry, worker(address="local:worker")) as renewals:
            if registry.address.startswith("local:"):
                assert (await anext(renewals)).HasField("lease")
            else:
                assert await refusal_of(anext(renewals)) is Reason.BAD_REQUEST


class TestTokens:
    @pytest.mark.parametrize("over", ["local", "socket"])
    async def test_changing_things_needs_the_admin_token(self, tmp_path: Path, over: str) -> None:
        tokens = Tokens(admin="admin-secret", worker="worker-secret")
        async with running(tmp_path, over, tokens) as registry:
            record = fixed("digits", DATA)

            def changes(client: RegistryClient) -> list[Awaitable[Any]]:
                return [
                    client.publish(DATA, envelope_of(DATA)),
                    client.put_mixture(record.body(), mixture_release(record)),
                    client.delete_mixture("digits"),
                    client.yank(digest_of(DATA)),
                    client.revoke_key(ACME_ID),
                ]

            for change in changes(registry.client()) + changes(registry.client("wrong")):
                assert await refusal_of(change) is Reason.TOKEN_REQUIRED
            for change in changes(registry.client("worker-secret")):
                assert await refusal_of(change) is Reason.TOKEN_NOT_ALLOWED
            for change in changes(registry.client("admin-secret")):
                await change
            assert (await registry.client().get_package(digest_of(DATA))).digest

    @pytest.mark.parametrize("over", ["local", "socket"])
    async def test_announcing_needs_the_worker_token(self, tmp_path: Path, over: str) -> None:
        tokens = Tokens(admin="admin-secret", worker="worker-secret")
        async with running(tmp_path, over, tokens) as registry:
            for token, reason in ((None, Reason.TOKEN_REQUIRED), ("admin-secret", Reason.TOKEN_NOT_ALLOWED)):
                async with announced(registry, worker(), token=token) as renewals:
                    assert await refusal_of(anext(renewals)) is reason
            async with announced(registry, worker(), token="worker-secret") as renewals:
                assert (await anext(renewals)).HasField("lease")


class TestDurability:
    async def test_what_was_acknowledged_survives_a_killed_process(self, tmp_path: Path) -> None:
        """Thirty uploads at once; the process is killed after the tenth answer, and the folder opened again."""
        async with process_in(tmp_path) as (process, client):
            await client.publish(DATA, envelope_of(DATA, ZETA_SEED, "zeta/iris@1"))
            record = fixed("digits", DATA)
            await client.put_mixture(record.body(), mixture_release(record, ZETA_SEED, "zeta/digits@1"))
            await client.revoke_key("ab" * 32)
            acknowledged: list[str] = []

            async def publish(index: int) -> None:
                data = numbers(index)
                response = await client.publish(data, envelope_of(data, name=f"acme/n@{index}"))
                acknowledged.append(response.package.digest)
                if len(acknowledged) == 10:
                    process.send_signal(signal.SIGKILL)

            outcomes = await asyncio.gather(*[publish(index) for index in range(30)], return_exceptions=True)
        assert any(isinstance(outcome, HocketError) for outcome in outcomes)
        assert len(acknowledged) >= 10

        async with running(tmp_path) as registry:
            survived = registry.client()
            listed = [package.digest async for package in survived.list_packages()]
            assert set(listed) >= {*acknowledged, digest_of(DATA)}
            for digest in listed:
                await survived.download(digest)
            assert (await survived.fetch_mixture("digits")).body == record.body()
            assert [item.revocation.key_id for item in await registry.seen()].count("ab" * 32) == 1
            assert list((tmp_path / "data" / "blobs" / "incoming").iterdir()) == []

    async def test_a_registry_that_cannot_start_can_be_stopped(self, tmp_path: Path) -> None:
        settings = settings_in(tmp_path)
        settings.data_dir.mkdir()
        (settings.data_dir / "registry.db").write_bytes(b"no database" * 1000)
        app = RegistryApp(settings, Tokens())

        assert await refusal_of(app.start()) is Reason.BLOB_CORRUPT
        await app.stop()

    async def test_a_disk_that_does_not_confirm_stops_all_changes(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with running(tmp_path) as registry:
            digest = await registry.publish(DATA)

            def broken(_descriptor: int) -> None:
                raise OSError(5, "Input/output error")

            monkeypatch.setattr(os, "fsync", broken)
            assert await refusal_of(registry.publish(OTHER, "acme/other@1")) is Reason.INTERNAL
            monkeypatch.undo()

            assert registry.app.failed.is_set()
            assert await refusal_of(registry.publish(OTHER, "acme/other@1")) is Reason.NOT_READY
            assert await refusal_of(registry.client().yank(digest)) is Reason.NOT_READY
        async with running(tmp_path) as registry:
            assert await registry.publish(OTHER, "acme/other@1")


def worker(**changes: Any) -> registry_pb2.WorkerState:
    return registry_pb2.WorkerState(
        **{"worker": "worker-a", "address": "127.0.0.1:50054", "device": "cpu", "formats": ["apr"], **changes}
    )


@asynccontextmanager
async def announced(
    registry: Running, *states: registry_pb2.WorkerState, token: str | None = None
) -> AsyncIterator[AsyncGenerator[registry_pb2.AnnounceResponse, None]]:
    """A lease that lasts as long as the block."""

    async def say() -> AsyncIterator[registry_pb2.WorkerState]:
        for state in states:
            yield state
        await asyncio.Event().wait()

    async with aclosing(registry.client(token).announce(say())) as renewals:
        yield renewals


async def take(feed: AsyncGenerator[Any, None], count: int) -> list[Any]:
    async with asyncio.timeout(5):
        return [await anext(feed) for _ in range(count)]


async def _succeeds(call: Awaitable[Any]) -> bool:
    try:
        await call
    except HocketError:
        return False
    return True
