"""Where blocking work is done, so that the event loop never waits for a disk."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import structlog

from hocket.errors import HocketError, Reason
from services.registry.disk import StorageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Executor

P = ParamSpec("P")
T = TypeVar("T")

_log = structlog.get_logger("registry")


class Threads:
    """One thread that alone touches the store, and some for files, hashing and decoding.

    Args:
        workers: How many of the latter.

    Attributes:
        failed: Set when the disk has failed. From then on the store is not touched, and the process has to stop.
    """

    def __init__(self, workers: int) -> None:
        self.failed = asyncio.Event()
        self._writer = ThreadPoolExecutor(1, "registry-store")
        self._pool = ThreadPoolExecutor(workers, "registry-files")

    async def store(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Do something with the store; one after the other, in the order of the calls.

        Raises:
            HocketError: `NOT_READY` once the disk has failed.
        """
        if self.failed.is_set():
            raise HocketError(Reason.NOT_READY, "this registry's disk has failed: it has to be started again")
        return await self._finish(self._writer, lambda: work(*args, **kwargs))

    async def files(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Do something that takes time and does not touch the store."""
        return await self._finish(self._pool, lambda: work(*args, **kwargs))

    async def close(self, last: Callable[[], None]) -> None:
        """Wait for what runs, do one last thing with the store, and end the threads."""
        await self._finish(self._writer, last)
        for executor in (self._writer, self._pool):
            await asyncio.to_thread(executor.shutdown)

    async def _finish(self, executor: Executor, work: Callable[[], T]) -> T:
        """Run to the end even when the caller is cancelled: a thread cannot be, and who tidies up must not meet it."""
        running = asyncio.get_running_loop().run_in_executor(executor, work)
        running.add_done_callback(self._note)
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            await asyncio.wait([running])
            raise

    def _note(self, done: asyncio.Future[T]) -> None:
        problem = None if done.cancelled() else done.exception()
        if isinstance(problem, StorageError) and not self.failed.is_set():
            self.failed.set()
            _log.critical("storage_failed", problem=str(problem))
