"""A registry as a worker sees it, scripted: packages, a feed, leases, and every way in which they fail."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hocket.client.registry import RegistryClient
from hocket.errors import HocketError, Reason
from hocket.identity import digest_of
from hocket.rpc.handlers import Handlers
from hocket.rpc.local import LocalChannel
from hocket.v1 import package_pb2, registry_pb2
from hocket.v1.registry_pb2_grpc import RegistryServiceServicer, add_RegistryServiceServicer_to_server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

LEASE_SECONDS = 0.3
TIMEOUT_SECONDS = 10.0


@dataclass
class WorkerRegistry(RegistryServiceServicer):
    """Keeps the contract of DownloadPackage, Watch and Announce, and trusts everyone.

    Attributes:
        blobs: Bytes and releases by digest.
        history: What the feed says, by revision, from 1.
        epoch: The registry's life.
        refusal: Raised by every rpc while set, and by open feeds and leases at their next item.
        corrupt: Whether downloads bring other bytes.
        hold: Downloads wait for it while set.
        downloads: Digests, as they were asked for.
        watches: Revisions, as they were asked for.
        states: What workers have announced.
        tokens: The credentials they came with.
    """

    blobs: dict[str, tuple[bytes, tuple[bytes, ...]]] = field(default_factory=dict)
    history: list[registry_pb2.WatchResponse] = field(default_factory=list)
    epoch: str = "first"
    refusal: HocketError | None = None
    corrupt: bool = False
    hold: asyncio.Event | None = None
    downloads: list[str] = field(default_factory=list)
    watches: list[int] = field(default_factory=list)
    states: list[registry_pb2.WorkerState] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.handlers = Handlers(unlimited=frozenset({"Watch", "Announce"}))
        self.handlers.add(add_RegistryServiceServicer_to_server, self)

    def client(self, token: str | None = None) -> RegistryClient:
        return RegistryClient(LocalChannel(self.handlers), token=token, timeout_seconds=TIMEOUT_SECONDS)

    def publish(self, data: bytes, releases: Sequence[bytes] = ()) -> str:
        digest = digest_of(data)
        self.blobs[digest] = (data, tuple(releases))
        self.tell(package=package_pb2.Package(digest=digest, state=package_pb2.TRUST_STATE_ACTIVE))
        return digest

    def yank(self, digest: str) -> None:
        self.tell(package=package_pb2.Package(digest=digest, state=package_pb2.TRUST_STATE_YANKED))

    def revoke(self, key_id: str) -> None:
        self.tell(revocation=registry_pb2.KeyRevocation(key_id=key_id))

    def tell(self, **event: Any) -> None:
        self.history.append(registry_pb2.WatchResponse(revision=len(self.history) + 1, **event))
        self._wake()

    def refuse(self, reason: Reason | None) -> None:
        """Begin to fail; None: work again."""
        self.refusal = None if reason is None else HocketError(reason, "scripted")
        self._wake()

    async def until(self, condition: Any) -> None:
        """Wait until something holds that follows from what workers do here."""
        async with asyncio.timeout(TIMEOUT_SECONDS):
            while not condition():  # noqa: ASYNC110 - some of it happens in threads and files
                await asyncio.sleep(0.005)

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _check(self) -> None:
        if self.refusal is not None:
            raise HocketError(self.refusal.reason, self.refusal.message)

    async def DownloadPackage(
        self, request: registry_pb2.DownloadPackageRequest, context: Any
    ) -> AsyncIterator[registry_pb2.DownloadPackageResponse]:
        del context
        self.downloads.append(request.digest)
        self._check()
        if self.hold is not None:
            await self.hold.wait()
        if request.digest not in self.blobs:
            raise HocketError(Reason.UNKNOWN_PACKAGE, "scripted")
        data, releases = self.blobs[request.digest]
        if self.corrupt:
            data = bytes(len(data))
        package = package_pb2.Package(digest=request.digest, size_bytes=len(data))
        yield registry_pb2.DownloadPackageResponse(
            header=registry_pb2.DownloadHeader(package=package, releases=releases)
        )
        half = len(data) // 2
        for chunk in (data[:half], data[half:]):
            yield registry_pb2.DownloadPackageResponse(chunk=chunk)

    async def Watch(
        self, request: registry_pb2.WatchRequest, context: Any
    ) -> AsyncIterator[registry_pb2.WatchResponse]:
        del context
        self.watches.append(request.after_revision)
        sent = request.after_revision
        if sent > len(self.history):
            raise HocketError(Reason.REVISION_UNKNOWN, "scripted")
        synced = False
        while True:
            changed = self._changed
            self._check()
            for event in self.history[sent:]:
                event.epoch = self.epoch
                yield event
            sent = len(self.history)
            if not synced:
                yield registry_pb2.WatchResponse(revision=sent, epoch=self.epoch, synced=registry_pb2.Synced())
                synced = True
            await changed.wait()

    async def Announce(
        self, request_iterator: AsyncIterator[registry_pb2.AnnounceRequest], context: Any
    ) -> AsyncIterator[registry_pb2.AnnounceResponse]:
        self.tokens.append(dict(context.invocation_metadata()).get("authorization", ""))
        self._check()
        async for request in request_iterator:
            self._check()
            self.states.append(request.worker)
            response = registry_pb2.AnnounceResponse()
            response.lease.FromMilliseconds(round(LEASE_SECONDS * 1000))
            yield response
