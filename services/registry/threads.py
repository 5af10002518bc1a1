"""Where blocking work is done, so that the event loop never waits for a disk."""

from __future__ import annotations

import asyncio
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import TYPE_CHECKING, ParamSpec, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

P = ParamSpec("P")
T = TypeVar("T")


class Threads:
    """One thread that alone touches the store, and some for files, hashing and decoding.

    Args:
        workers: How many of the latter.
    """

    def __init__(self, workers: int) -> None:
        self._writer = ThreadPoolExecutor(1, "registry-store")
        self._pool = ThreadPoolExecutor(workers, "registry-files")

    async def store(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Do something with the store; one after the other, in the order of the calls."""
        return await _finish(self._writer, lambda: work(*args, **kwargs))

    async def files(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Do something that takes time and does not touch the store."""
        return await _finish(self._pool, lambda: work(*args, **kwargs))

    def close(self) -> None:
        """Wait for what runs, and end the threads."""
        self._writer.shutdown()
        self._pool.shutdown()


async def _finish(executor: Executor, work: Callable[[], T]) -> T:
    """Run to the end even when the caller is cancelled: a thread cannot be, and who tidies up must not meet it."""
    future = asyncio.get_running_loop().run_in_executor(executor, work)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        await asyncio.wait([future])
        future.cancelled() or future.exception()  # seen, so that nobody logs it as forgotten
        raise
