"""The registry's caller: packages and mixtures in and out, the feed, and a worker's lease."""

from __future__ import annotations

import asyncio
import hashlib
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

import grpc

from hocket.client.calls import call_metadata, chunks_of, refusals
from hocket.errors import HocketError, Reason, Situation
from hocket.mixtures import GATE_BYTES_MAX
from hocket.v1 import registry_pb2
from hocket.v1.registry_pb2_grpc import RegistryServiceStub

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator

    from hocket.v1.mixture_pb2 import Mixture
    from hocket.v1.package_pb2 import Package
    from hocket.v1.registry_pb2_grpc import RegistryServiceAsyncStub

    Progress = Callable[[int, int], None]
    """Told the bytes moved so far, and all of them."""

DOWNLOAD_BYTES_MAX: Final = 2 * 2**30
"""Largest package that is taken into memory unless the caller says otherwise."""

_SLOWEST_BYTES_PER_SECOND: Final = 2**20
_PAGE_SIZE: Final = 500
_TRIES_WITHOUT_PROGRESS: Final = 3
_PAUSE_SECONDS: Final = 0.1
_REPEATS_MAX: Final = 3
_STATUS_LOST: Final = "Internal error from Core"
_WORTH_RESUMING: Final = frozenset({Situation.UNAVAILABLE, Situation.TIMED_OUT})

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class FetchedMixture:
    """A mixture with everything that makes it one. Unchecked: hold `body` and `gate` against the digests.

    Args:
        mixture: Name, digest, state, sizes.
        body: Canonical JSON; its SHA-256 is the mixture digest.
        release: DSSE envelope; empty for a mixture made from a package.
        gate: FP32 `[F, E]`, little-endian, row-major; empty when the gate needs no tensor.
    """

    mixture: Mixture
    body: bytes
    release: bytes
    gate: bytes


class RegistryClient:
    """Calls one registry. Every method raises what the registry refused as `HocketError`.

    Args:
        channel: To the registry; stays the caller's to close.
        token: Bearer token: the admin token for what changes things, the worker token for `announce`.
        timeout_seconds: Deadline of a call. Uploads get a second more per MiB; a download has it per attempt.
    """

    def __init__(self, channel: grpc.aio.Channel, *, token: str | None = None, timeout_seconds: float = 30.0) -> None:
        self._stub: RegistryServiceAsyncStub = RegistryServiceStub(channel)
        self._token = token
        self._timeout_seconds = timeout_seconds

    async def publish(
        self, data: bytes | memoryview, release: bytes = b"", *, on_progress: Progress | None = None
    ) -> registry_pb2.PublishPackageResponse:
        """Upload a package. An answer means that it is stored and survives power loss there.

        Args:
            data: The whole file.
            release: The DSSE envelope; empty when an embedded signature vouches for the bytes.
            on_progress: Told after each chunk that was handed to the transport.
        """
        digest = f"sha256:{(await asyncio.to_thread(hashlib.sha256, data)).hexdigest()}"
        header = registry_pb2.PublishHeader(digest=digest, size_bytes=len(data), release=release)

        def requests() -> Iterator[registry_pb2.PublishPackageRequest]:
            yield registry_pb2.PublishPackageRequest(header=header)
            for chunk in _told(data, on_progress):
                yield registry_pb2.PublishPackageRequest(chunk=chunk)

        with refusals():
            return await _uploaded(lambda: self._stub.PublishPackage(requests(), **self._options(len(data))))

    async def get_package(self, package: str) -> Package:
        """Describe one package, with its metadata.

        Args:
            package: Digest or `publisher/name@version`.
        """
        with refusals():
            request = registry_pb2.GetPackageRequest(package=package)
            return (await self._stub.GetPackage(request, **self._options())).package

    async def list_packages(
        self, *, publisher: str = "", capability: str = "", base: str = "", text: str = ""
    ) -> AsyncGenerator[Package, None]:
        """Packages by digest, without metadata: all, or those that every filter given is true of.

        Args:
            publisher: Has released it.
            capability: What an adapter can do, such as `task:text2sql`.
            base: What an adapter rides on: its digest, or its name, of which the last part counts.
            text: Words that all occur in its names, publishers, description, tags, capabilities or labels.
        """
        token = ""
        while True:
            request = registry_pb2.ListPackagesRequest(
                page_size=_PAGE_SIZE,
                page_token=token,
                publisher=publisher,
                capability=capability,
                base=base,
                text=text,
            )
            with refusals():
                page = await self._stub.ListPackages(request, **self._options())
            for package in page.packages:
                yield package
            token = page.next_page_token
            if not token:
                return

    async def download(
        self,
        digest: str,
        *,
        size_bytes_max: int = DOWNLOAD_BYTES_MAX,
        on_header: Callable[[registry_pb2.DownloadHeader], None] | None = None,
        on_progress: Progress | None = None,
    ) -> tuple[registry_pb2.DownloadHeader, bytes]:
        """Fetch a package, with every release of it. A broken stream is taken up again where it broke.

        Args:
            digest: `sha256:<64 hex>`.
            size_bytes_max: Most bytes to take into memory.
            on_header: Told what comes before the bytes of each attempt; a refusal that it raises ends the download.
            on_progress: Told after each chunk.

        Raises:
            HocketError: What the registry refused; `TOO_LARGE` beyond `size_bytes_max`; `BLOB_CORRUPT` if the bytes
                are not those of the digest; the failure of the last of three attempts that brought nothing.
        """
        download = _Download(digest, size_bytes_max, on_header, on_progress)
        failures = 0
        while True:
            before = download.received_bytes
            request = registry_pb2.DownloadPackageRequest(digest=digest, offset=before)
            try:
                await self._receive(self._stub.DownloadPackage(request, **self._options()), download.take)
                return await download.finish()
            except HocketError as error:
                failures = 0 if download.received_bytes > before else failures + 1
                if error.situation not in _WORTH_RESUMING or failures == _TRIES_WITHOUT_PROGRESS:
                    raise
            await asyncio.sleep(_PAUSE_SECONDS * 2**failures)

    async def yank(self, digest: str, explanation: str = "") -> Package:
        """Withdraw a digest for good."""
        request = registry_pb2.YankPackageRequest(digest=digest, explanation=explanation)
        with refusals():
            return (await self._stub.YankPackage(request, **self._options())).package

    async def revoke_key(self, key: str, explanation: str = "") -> registry_pb2.RevokeKeyResponse:
        """Withdraw everything that rests on a key, for good.

        Args:
            key: `ed25519:<64 hex>`, or a key id.
            explanation: Why, for people.
        """
        request = registry_pb2.RevokeKeyRequest(key=key, explanation=explanation)
        with refusals():
            return await self._stub.RevokeKey(request, **self._options())

    async def put_mixture(
        self,
        body: bytes,
        release: bytes = b"",
        gate: bytes | memoryview = b"",
        *,
        etag: str = "",
        on_progress: Progress | None = None,
    ) -> Mixture:
        """Store a mixture under its name.

        Args:
            body: Canonical JSON (`MixtureRecord.body`).
            release: The DSSE envelope over the body's digest.
            gate: The gate tensor (`gate_tensor`); empty when the gate needs none.
            etag: Digest of the version this replaces; empty to create, or to replace whatever is there.
            on_progress: Told after each chunk of the gate that was handed to the transport.
        """
        header = registry_pb2.PutMixtureHeader(body=body, release=release, etag=etag)

        def requests() -> Iterator[registry_pb2.PutMixtureRequest]:
            yield registry_pb2.PutMixtureRequest(header=header)
            for chunk in _told(gate, on_progress):
                yield registry_pb2.PutMixtureRequest(gate_chunk=chunk)

        with refusals():
            response = await _uploaded(lambda: self._stub.PutMixture(requests(), **self._options(len(gate))))
        return response.mixture

    async def fetch_mixture(self, mixture: str) -> FetchedMixture:
        """Fetch a mixture's body, release and gate tensor.

        Args:
            mixture: Name, or digest of a body.

        Raises:
            HocketError: What the registry refused; `TOO_LARGE` if it announces a gate beyond every limit;
                `BLOB_CORRUPT` if the gate has another size than announced.
        """
        parts = _MixtureParts()
        request = registry_pb2.FetchMixtureRequest(mixture=mixture)
        await self._receive(self._stub.FetchMixture(request, **self._options()), parts.take)
        return parts.finish()

    async def delete_mixture(self, name: str, etag: str = "") -> int:
        """Free a mixture's name, and return the revision of the deletion.

        Args:
            name: What clients address.
            etag: Digest of the version to delete; empty for whatever is there.
        """
        request = registry_pb2.DeleteMixtureRequest(name=name, etag=etag)
        with refusals():
            return (await self._stub.DeleteMixture(request, **self._options())).revision

    async def watch(self, after_revision: int = 0) -> AsyncGenerator[registry_pb2.WatchResponse, None]:
        """The feed: what has changed after a revision, a `synced` mark, then every change, until it breaks.

        Args:
            after_revision: The last revision seen; 0 for everything.
        """
        request = registry_pb2.WatchRequest(after_revision=after_revision)
        call = self._stub.Watch(request, metadata=call_metadata(self._token))
        async with aclosing(_responses(call)) as responses:
            async for response in responses:
                yield response

    async def announce(
        self, states: AsyncIterator[registry_pb2.WorkerState]
    ) -> AsyncGenerator[registry_pb2.AnnounceResponse, None]:
        """Hold a worker's lease: each state sent replaces the one before and renews it, until the stream breaks."""

        async def requests() -> AsyncIterator[registry_pb2.AnnounceRequest]:
            async for state in states:
                yield registry_pb2.AnnounceRequest(worker=state)

        call = self._stub.Announce(requests(), metadata=call_metadata(self._token))
        async with aclosing(_responses(call)) as responses:
            async for response in responses:
                yield response

    def _options(self, size_bytes: int = 0) -> dict[str, Any]:
        timeout = self._timeout_seconds + size_bytes / _SLOWEST_BYTES_PER_SECOND
        return {"timeout": timeout, "metadata": call_metadata(self._token)}

    async def _receive(self, call: Any, take: Callable[[Any], None]) -> None:  # noqa: ANN401 - a call of any message
        async with aclosing(_responses(call)) as responses:
            async for response in responses:
                take(response)


class _Download:
    """The bytes of one download, over as many streams as it takes."""

    def __init__(
        self,
        digest: str,
        size_bytes_max: int,
        on_header: Callable[[registry_pb2.DownloadHeader], None] | None,
        on_progress: Progress | None,
    ) -> None:
        self._digest = digest
        self._size_bytes_max = size_bytes_max
        self._on_header = on_header
        self._on_progress = on_progress
        self._header: registry_pb2.DownloadHeader | None = None
        self._chunks: list[bytes] = []
        self.received_bytes = 0

    def take(self, response: registry_pb2.DownloadPackageResponse) -> None:
        if response.WhichOneof("part") == "header":
            self._header = response.header
            if self._header.package.size_bytes > self._size_bytes_max:
                raise HocketError(
                    Reason.TOO_LARGE,
                    f"{self._digest} has {self._header.package.size_bytes} bytes, more than {self._size_bytes_max}",
                )
            if self._on_header is not None:
                self._on_header(self._header)
            return
        total_bytes = 0 if self._header is None else self._header.package.size_bytes
        self._chunks.append(response.chunk)
        self.received_bytes += len(response.chunk)
        if self.received_bytes > total_bytes:
            raise self._corrupt()
        if self._on_progress is not None:
            self._on_progress(self.received_bytes, total_bytes)

    async def finish(self) -> tuple[registry_pb2.DownloadHeader, bytes]:
        return await asyncio.to_thread(self._check)

    def _check(self) -> tuple[registry_pb2.DownloadHeader, bytes]:
        data = b"".join(self._chunks)
        if self._header is None or f"sha256:{hashlib.sha256(data).hexdigest()}" != self._digest:
            raise self._corrupt()
        return self._header, data

    def _corrupt(self) -> HocketError:
        return HocketError(
            Reason.BLOB_CORRUPT,
            f"the registry's bytes are not those of {self._digest}: publish the package there again",
            digest=self._digest,
        )


class _MixtureParts:
    """A mixture on its way in."""

    def __init__(self) -> None:
        self._header = registry_pb2.FetchMixtureHeader()
        self._chunks: list[bytes] = []
        self._missing_bytes = 0

    def take(self, response: registry_pb2.FetchMixtureResponse) -> None:
        if response.WhichOneof("part") == "header":
            self._header = response.header
            self._missing_bytes = self._header.mixture.gate_bytes
            if self._missing_bytes > GATE_BYTES_MAX:
                raise HocketError(Reason.TOO_LARGE, f"a gate of {self._missing_bytes} bytes is beyond every limit")
            return
        self._chunks.append(response.gate_chunk)
        self._missing_bytes -= len(response.gate_chunk)
        if self._missing_bytes < 0:
            raise self._corrupt()

    def finish(self) -> FetchedMixture:
        if self._missing_bytes:
            raise self._corrupt()
        return FetchedMixture(self._header.mixture, self._header.body, self._header.release, b"".join(self._chunks))

    def _corrupt(self) -> HocketError:
        return HocketError(
            Reason.BLOB_CORRUPT, "the registry's gate has another size than it says: put the mixture there again"
        )


def _told(data: bytes | memoryview, on_progress: Progress | None) -> Iterator[bytes]:
    """The chunks of `data`; when the next one is asked for, the one before has been taken."""
    sent_bytes = 0
    for chunk in chunks_of(data):
        yield chunk
        sent_bytes += len(chunk)
        if on_progress is not None:
            on_progress(sent_bytes, len(data))


async def _uploaded(upload: Callable[[], Awaitable[T]]) -> T:
    """The answer to an upload.

    grpc.aio loses the status of a call that is refused in the very moment in which it sends. Nothing was done then, so
    the same call is made again to hear why.
    """
    for _ in range(_REPEATS_MAX):
        try:
            return await upload()
        except grpc.RpcError as error:
            if error.details() != _STATUS_LOST:
                raise
    return await upload()


async def _responses(call: Any) -> AsyncGenerator[Any, None]:  # noqa: ANN401 - a call of any message
    """The responses of a stream. Leaving early cancels the call."""
    try:
        with refusals():
            async for response in call:
                yield response
    finally:
        call.cancel()
