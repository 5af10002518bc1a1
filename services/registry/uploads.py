"""Bytes on their way in: so many at once, as many as they said, and without long silences."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final, TypeVar

from hocket.errors import HocketError, Reason

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from services.registry.blobs import Blobs, Draft
    from services.registry.threads import Threads

CHUNK_BYTES_MAX: Final = 2**20
"""Largest chunk of an upload."""

M = TypeVar("M")


class Uploads:
    """Takes bytes in.

    Args:
        blobs: Where to.
        threads: Where the work is done.
        count_max: Uploads at once; the next one waits.
        idle_seconds: Longest silence within one.

    Attributes:
        slots: An upload waits for one, and keeps it to its end.
    """

    def __init__(self, blobs: Blobs, threads: Threads, *, count_max: int, idle_seconds: float) -> None:
        self._blobs = blobs
        self._threads = threads
        self.slots = asyncio.Semaphore(count_max)
        self._idle_seconds = idle_seconds

    @asynccontextmanager
    async def draft(self) -> AsyncIterator[Draft]:
        """A draft that is gone afterwards, unless it was committed."""
        draft = self._blobs.draft()
        try:
            yield draft
        finally:
            await self._threads.files(draft.discard)

    async def timely(self, messages: AsyncIterator[M]) -> AsyncIterator[M]:
        """The messages of an upload, while they keep coming.

        Raises:
            HocketError: `DEADLINE` after too long a silence.
        """
        while True:
            try:
                async with asyncio.timeout(self._idle_seconds):
                    message = await anext(messages)
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise HocketError(
                    Reason.DEADLINE, f"nothing was sent for {self._idle_seconds:g} seconds: upload again"
                ) from None
            yield message

    async def receive(self, chunks: AsyncIterator[bytes], draft: Draft, size_bytes: int) -> str:
        """Bring an upload to the disk.

        Args:
            chunks: Its bytes.
            draft: Where to.
            size_bytes: How many there are to be.

        Returns:
            The digest of the bytes.

        Raises:
            HocketError: `BAD_REQUEST` for more bytes or fewer, or a chunk too large; `CAPACITY` if the disk is full.
        """
        async for chunk in chunks:
            if len(chunk) > CHUNK_BYTES_MAX:
                raise HocketError(Reason.BAD_REQUEST, f"a chunk has at most {CHUNK_BYTES_MAX} bytes", field="chunk")
            if draft.size_bytes + len(chunk) > size_bytes:
                raise HocketError(Reason.BAD_REQUEST, f"more bytes were sent than the {size_bytes} announced")
            await self._threads.files(draft.write, chunk)
        if draft.size_bytes < size_bytes:
            raise HocketError(
                Reason.BAD_REQUEST, f"the upload ended after {draft.size_bytes} of {size_bytes} bytes: send it again"
            )
        return await self._threads.files(draft.finish)

    async def keep(self, data: bytes, draft: Draft) -> None:
        """Bring bytes at hand to the disk."""
        await self._threads.files(draft.write, data)
        await self._threads.files(draft.finish)
