"""RegistryService: messages in, the catalog's answers out."""

from __future__ import annotations

import asyncio
import base64
import json
from contextlib import aclosing, closing
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

import structlog

from hocket.errors import HocketError, Reason
from hocket.identity import digest_of, is_digest
from hocket.mixtures import SoftmaxGate
from hocket.rpc.channel import LOCAL
from hocket.v1 import registry_pb2
from hocket.v1.mixture_pb2 import Mixture
from hocket.v1.package_pb2 import Package
from hocket.v1.registry_pb2_grpc import RegistryServiceServicer
from services.registry.admission import admit_mixture, admit_package, check_gate
from services.registry.feed import WorkerGone
from services.registry.searching import read_query

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from hocket.rpc.handlers import Context
    from services.registry.admission import AdmittedMixture, AdmittedPackage
    from services.registry.blobs import Draft
    from services.registry.catalog import Catalog
    from services.registry.feed import Feed, Item
    from services.registry.leases import Leases
    from services.registry.store import Query
    from services.registry.threads import Threads
    from services.registry.uploads import Uploads

_PAGE_SIZE: Final = 100
_PAGE_SIZE_MAX: Final = 1000

_log = structlog.get_logger("registry")


class RegistryServicer(RegistryServiceServicer):
    """Keeps packages and mixtures, and tells everyone what has changed.

    Args:
        catalog: What it keeps.
        uploads: How bytes come in.
        leases: Live workers.
        feed: Tells watchers.
        threads: Where blocking work is done.
        epoch: Name of this process.
        lease_seconds: What workers are told.
    """

    def __init__(
        self,
        catalog: Catalog,
        uploads: Uploads,
        leases: Leases,
        feed: Feed,
        threads: Threads,
        *,
        epoch: str,
        lease_seconds: float,
    ) -> None:
        self._catalog = catalog
        self._uploads = uploads
        self._leases = leases
        self._feed = feed
        self._threads = threads
        self._epoch = epoch
        self._renewed = registry_pb2.AnnounceResponse()
        self._renewed.lease.FromMilliseconds(round(lease_seconds * 1000))

    async def PublishPackage(
        self, request_iterator: AsyncIterator[registry_pb2.PublishPackageRequest], context: Context
    ) -> registry_pb2.PublishPackageResponse:
        """Take a package in: bytes to the disk, verified, read, kept."""
        del context
        uploads = self._uploads
        async with uploads.slots, uploads.draft() as draft:
            requests = uploads.timely(request_iterator)
            first = await anext(requests, registry_pb2.PublishPackageRequest())
            if first.WhichOneof("part") != "header":
                raise _no_header()
            header = first.header
            size_bytes_max = self._catalog.limits.package_bytes
            if header.size_bytes > size_bytes_max:
                raise HocketError(
                    Reason.TOO_LARGE,
                    f"the package has {header.size_bytes} bytes, this registry takes at most {size_bytes_max}",
                    field="header.size_bytes",
                )
            digest = await uploads.receive(_package_chunks(requests), draft, header.size_bytes)
            if digest != header.digest:
                raise HocketError(
                    Reason.DIGEST_MISMATCH,
                    f"the bytes that arrived are {digest}, not {header.digest[:80]}: upload them again",
                    field="header.digest",
                )
            admitted = await self._threads.files(self._admit_package, draft, header)
            was_whole = await self._threads.files(self._catalog.blobs.is_whole, digest)
            if admitted.mixture is None:
                package, created = await self._threads.store(self._catalog.publish, admitted, draft, None)
            else:
                async with uploads.draft() as gate:
                    await uploads.keep(admitted.mixture.gate, gate)
                    package, created = await self._threads.store(self._catalog.publish, admitted, draft, gate)
        healed = not (created or was_whole)
        if healed:
            _log.warning("blob_healed", digest=digest)
        return registry_pb2.PublishPackageResponse(package=package, created=created, healed=healed)

    async def DownloadPackage(
        self, request: registry_pb2.DownloadPackageRequest, context: Context
    ) -> AsyncIterator[registry_pb2.DownloadPackageResponse]:
        """The releases, then the bytes from the offset."""
        del context
        package, releases = await self._threads.store(self._catalog.download, request.digest)
        if request.offset > package.size_bytes:
            raise HocketError(
                Reason.BAD_REQUEST,
                f"offset {request.offset} is beyond the end: the package has {package.size_bytes} bytes",
                field="offset",
            )
        with closing(self._catalog.blobs.reader()) as reader:
            await self._threads.files(reader.open, package.digest, package.size_bytes, request.offset)
            header = registry_pb2.DownloadHeader(package=package, releases=releases)
            yield registry_pb2.DownloadPackageResponse(header=header)
            while chunk := await self._threads.files(reader.read):
                yield registry_pb2.DownloadPackageResponse(chunk=chunk)

    async def GetPackage(
        self, request: registry_pb2.GetPackageRequest, context: Context
    ) -> registry_pb2.GetPackageResponse:
        """One package, with its metadata."""
        del context
        package, revision = await self._threads.store(self._catalog.package, request.package)
        return registry_pb2.GetPackageResponse(package=package, revision=revision)

    async def ListPackages(
        self, request: registry_pb2.ListPackagesRequest, context: Context
    ) -> registry_pb2.ListPackagesResponse:
        """One page of packages."""
        del context
        if request.page_size < 0:
            raise HocketError(Reason.BAD_REQUEST, "page_size must not be negative", field="page_size")
        count = min(request.page_size or _PAGE_SIZE, _PAGE_SIZE_MAX)
        query = read_query(request)
        after = _read_token(request.page_token, query)
        page = await self._threads.store(self._catalog.list_packages, after, query, count)
        return registry_pb2.ListPackagesResponse(
            packages=page.packages,
            next_page_token=_write_token(page.last, query),
            revision=page.revision,
        )

    async def YankPackage(
        self, request: registry_pb2.YankPackageRequest, context: Context
    ) -> registry_pb2.YankPackageResponse:
        """Withdraw a digest."""
        del context
        package = await self._threads.store(self._catalog.yank, request.digest, request.explanation)
        return registry_pb2.YankPackageResponse(package=package)

    async def RevokeKey(
        self, request: registry_pb2.RevokeKeyRequest, context: Context
    ) -> registry_pb2.RevokeKeyResponse:
        """Withdraw a key."""
        del context
        key_id, withdrawn = await self._threads.store(self._catalog.revoke, request.key, request.explanation)
        return registry_pb2.RevokeKeyResponse(key_id=key_id, withdrawn_digests=withdrawn)

    async def PutMixture(
        self, request_iterator: AsyncIterator[registry_pb2.PutMixtureRequest], context: Context
    ) -> registry_pb2.PutMixtureResponse:
        """Take a mixture in: body and release verified first, then the gate tensor."""
        del context
        uploads = self._uploads
        async with uploads.slots, uploads.draft() as draft:
            requests = uploads.timely(request_iterator)
            first = await anext(requests, registry_pb2.PutMixtureRequest())
            if first.WhichOneof("part") != "header":
                raise _no_header()
            header = first.header
            admitted = await self._threads.files(
                admit_mixture, header.body, header.release, terms=self._catalog.terms, now=datetime.now(UTC)
            )
            gate = admitted.record.gate
            gate_bytes = gate.tensor_bytes if isinstance(gate, SoftmaxGate) else 0
            await uploads.receive(_gate_chunks(requests), draft, gate_bytes)
            await self._threads.files(_check_gate, admitted, draft)
            mixture = await self._threads.store(
                self._catalog.put_mixture, admitted, draft if gate_bytes else None, header.etag
            )
        return registry_pb2.PutMixtureResponse(mixture=mixture)

    async def FetchMixture(
        self, request: registry_pb2.FetchMixtureRequest, context: Context
    ) -> AsyncIterator[registry_pb2.FetchMixtureResponse]:
        """Body and release, then the gate tensor."""
        del context
        with closing(self._catalog.blobs.reader()) as gate:
            stored = await self._threads.store(self._catalog.mixture, request.mixture, gate)
            header = registry_pb2.FetchMixtureHeader(mixture=stored.mixture, body=stored.body, release=stored.release)
            yield registry_pb2.FetchMixtureResponse(header=header)
            while stored.mixture.gate_bytes and (chunk := await self._threads.files(gate.read)):
                yield registry_pb2.FetchMixtureResponse(gate_chunk=chunk)

    async def DeleteMixture(
        self, request: registry_pb2.DeleteMixtureRequest, context: Context
    ) -> registry_pb2.DeleteMixtureResponse:
        """Free a name."""
        del context
        revision = await self._threads.store(self._catalog.delete_mixture, request.name, request.etag)
        return registry_pb2.DeleteMixtureResponse(revision=revision)

    async def Announce(
        self, request_iterator: AsyncIterator[registry_pb2.AnnounceRequest], context: Context
    ) -> AsyncIterator[registry_pb2.AnnounceResponse]:
        """A lease: renewed by every message."""
        inside = context.peer().startswith(LOCAL)
        async for request in request_iterator:
            if request.worker.address.startswith(LOCAL) and not inside:
                raise HocketError(
                    Reason.BAD_REQUEST,
                    f"{request.worker.address[:80]!r} is inside the worker's process: announce host:port",
                    field="worker.address",
                )
            if self._leases.renew(request.worker, asyncio.get_running_loop().time()):
                self._feed.wake()
            yield self._renewed

    async def Watch(
        self, request: registry_pb2.WatchRequest, context: Context
    ) -> AsyncIterator[registry_pb2.WatchResponse]:
        """The feed."""
        del context
        async with aclosing(self._feed.watch(request.after_revision)) as items:
            async for item in items:
                yield self._response(item)

    def _response(self, item: Item) -> registry_pb2.WatchResponse:
        response = registry_pb2.WatchResponse(revision=item.revision, epoch=self._epoch)
        match item.event:
            case Package() as package:
                response.package.CopyFrom(package)
            case Mixture() as mixture:
                response.mixture.CopyFrom(mixture)
            case registry_pb2.KeyRevocation() as revocation:
                response.revocation.CopyFrom(revocation)
            case registry_pb2.WorkerState() as worker:
                response.worker.CopyFrom(worker)
            case WorkerGone(worker):
                response.worker_gone = worker
            case registry_pb2.Synced() as synced:
                response.synced.CopyFrom(synced)
        return response

    def _admit_package(self, draft: Draft, header: registry_pb2.PublishHeader) -> AdmittedPackage:
        return admit_package(
            draft.read(),
            header.release,
            digest=header.digest,
            terms=self._catalog.terms,
            limits=self._catalog.limits,
            now=datetime.now(UTC),
        )


def _check_gate(admitted: AdmittedMixture, draft: Draft) -> None:
    check_gate(admitted.record, draft.read())


async def _package_chunks(requests: AsyncIterator[registry_pb2.PublishPackageRequest]) -> AsyncIterator[bytes]:
    async for request in requests:
        if request.WhichOneof("part") != "chunk":
            raise _no_chunk()
        yield request.chunk


async def _gate_chunks(requests: AsyncIterator[registry_pb2.PutMixtureRequest]) -> AsyncIterator[bytes]:
    async for request in requests:
        if request.WhichOneof("part") != "gate_chunk":
            raise _no_chunk()
        yield request.gate_chunk


def _no_header() -> HocketError:
    return HocketError(Reason.BAD_REQUEST, "the first message of an upload is its header", field="header")


def _no_chunk() -> HocketError:
    return HocketError(Reason.BAD_REQUEST, "after its header, an upload has nothing but chunks", field="chunk")


def _write_token(last: str, query: Query) -> str:
    """A page token: where the list goes on, and which list. Empty at its end."""
    return base64.urlsafe_b64encode(json.dumps([_name(query), last]).encode()).decode() if last else ""


def _read_token(token: str, query: Query) -> str:
    """The digest to go on behind; empty to begin.

    Raises:
        HocketError: `BAD_REQUEST` for a token that is not ours, or of another list.
    """
    if not token:
        return ""
    try:
        listed, last = json.loads(base64.urlsafe_b64decode(token))
    except (ValueError, TypeError, RecursionError):
        listed, last = None, None
    if listed != _name(query) or not (isinstance(last, str) and is_digest(last)):
        raise HocketError(
            Reason.BAD_REQUEST, "this page token belongs to another list: begin without one", field="page_token"
        )
    return last


def _name(query: Query) -> str:
    """A short name of a list, the same for the same query."""
    return digest_of(repr(query).encode())
