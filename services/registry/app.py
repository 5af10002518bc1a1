"""The registry, wired: everything but its port."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import structlog

from hocket.packages import Policy
from hocket.rpc.handlers import Handlers, Tokens
from hocket.v1.registry_pb2_grpc import add_RegistryServiceServicer_to_server
from services.registry.catalog import Catalog
from services.registry.disk import StorageError
from services.registry.feed import Feed
from services.registry.leases import Leases
from services.registry.service import RegistryServicer
from services.registry.threads import Threads
from services.registry.uploads import Uploads

if TYPE_CHECKING:
    from services.registry.settings import RegistrySettings

_log: Final = structlog.get_logger("registry")

_ADMIN_METHODS: Final = frozenset({"PublishPackage", "YankPackage", "RevokeKey", "PutMixture", "DeleteMixture"})
_WORKER_METHODS: Final = frozenset({"Announce"})
_READING_THREADS: Final = 4
"""Beside those that uploads may keep busy for seconds."""
_LOOKS_PER_LEASE: Final = 10


class RegistryApp:
    """One registry in this event loop.

    Args:
        settings: What the operator chose.
        tokens: The admin and the worker token; which methods need them is decided here.

    Attributes:
        handlers: What a server or a local channel serves.
        failed: Set when the disk has failed: the process has to stop, and start again from what the disk holds.
    """

    def __init__(self, settings: RegistrySettings, tokens: Tokens) -> None:
        self._settings = settings
        self._threads = Threads(settings.uploads_max + _READING_THREADS)
        self._catalog = Catalog(
            settings.data_dir,
            settings.trust_dir,
            policy=Policy(
                allow_unsigned=settings.allow_unsigned, allow_expired_licences=settings.allow_expired_licences
            ),
            package_bytes_max=settings.package_bytes_max,
            on_change=self._tell,
        )
        self._leases = Leases(settings.lease_seconds, settings.workers_max)
        self._feed = Feed(lambda revision: self._threads.store(self._catalog.changes, revision), self._leases.live)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: tuple[asyncio.Task[None], ...] = ()
        self.failed = self._threads.failed
        self.handlers = Handlers(
            tokens=replace(tokens, admin_methods=_ADMIN_METHODS, worker_methods=_WORKER_METHODS),
            in_flight_max=settings.in_flight_max,
            unlimited=frozenset({"Announce", "Watch"}),
        )
        servicer = RegistryServicer(
            self._catalog,
            Uploads(
                self._catalog.blobs,
                self._threads,
                count_max=settings.uploads_max,
                idle_seconds=settings.upload_idle_seconds,
            ),
            self._leases,
            self._feed,
            self._threads,
            epoch=uuid.uuid4().hex,
            lease_seconds=settings.lease_seconds,
        )
        self.handlers.add(add_RegistryServiceServicer_to_server, servicer)

    async def start(self) -> None:
        """Open what is on disk, and begin to watch leases and the trust folder.

        Raises:
            HocketError: `NOT_READY` if another process has the folder, `BLOB_CORRUPT` if the database is damaged.
            OSError: The disk fails.
        """
        self._loop = asyncio.get_running_loop()
        try:
            await self._threads.store(self._catalog.open)
        except StorageError as error:
            raise OSError(str(error)) from error
        self._tasks = (asyncio.create_task(self._expire_leases()), asyncio.create_task(self._follow_trust()))

    async def ready(self) -> None:
        """It is, once it is open."""

    def leave(self) -> None:
        """Nobody to tell: who follows its feed goes on without it."""

    async def stop(self) -> None:
        """End every feed, finish what runs, and close the store."""
        self.handlers.draining = True
        self._feed.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._threads.close(self._catalog.close)

    def _tell(self, revision: int) -> None:
        """Called on the store's thread."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._feed.advance, revision)

    async def _expire_leases(self) -> None:
        while True:
            await asyncio.sleep(self._settings.lease_seconds / _LOOKS_PER_LEASE)
            if self._leases.expire(asyncio.get_running_loop().time()):
                self._feed.wake()

    async def _follow_trust(self) -> None:
        while not self.failed.is_set():
            await asyncio.sleep(self._settings.trust_poll_seconds)
            try:
                await self._threads.store(self._catalog.follow_trust)
            except Exception:  # noqa: BLE001 - whatever it was, the next look may succeed, and must happen
                _log.exception("trust_not_followed")
