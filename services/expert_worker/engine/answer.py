"""The stream of one answer, as the event loop reads it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable

    from services.expert_worker.engine.sequence import Event


@dataclass(frozen=True, slots=True)
class Dropped:
    """The thread has let go of a sequence: because it is whole or nobody reads it, or because of this error."""

    error: Exception | None


class Answer:
    """The events of one answer, as they come: a start, deltas, a finish. Belongs to the event loop.

    Whoever has it reads it to its end or closes it. Cancelling whoever waits for the next event closes it, too.

    Attributes:
        token_count_max: Most tokens that it may have: what was asked for, or as many as the context has room for.
    """

    def __init__(
        self, token_count_max: int, batch: int, read: Callable[[int], None], cancel: Callable[[], None]
    ) -> None:
        self.token_count_max = token_count_max
        self._batch = batch
        self._calls: tuple[Callable[[int], None], Callable[[], None]] | None = read, cancel
        """How to tell the engine what has been read, and that the rest is not wanted. None once the engine has let go
        of the answer: what is left to read of it then holds none of its experts in memory."""
        self._items: asyncio.Queue[Event | Dropped] = asyncio.Queue()
        self._read_count = 0
        self._over = False

    def put(self, item: Event | Dropped) -> None:
        """Have an item read after those that are there. For the engine."""
        self._items.put_nowait(item)
        if isinstance(item, Dropped):
            self._calls = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        """The next event.

        Raises:
            HocketError: Why there will be no more: `DRAINING`, `DEVICE_MEMORY`, `BAD_ANSWER`, `NOT_READY`.
            StopAsyncIteration: The last one was the finish, or the answer is closed.
        """
        if self._over:
            raise StopAsyncIteration
        try:
            item = await self._items.get()
        except asyncio.CancelledError:
            await self.aclose()
            raise
        if isinstance(item, Dropped):
            self._over = True
            if item.error is not None:
                raise item.error
            raise StopAsyncIteration
        # Said in batches: whoever has read everything has fewer left to say than let a sequence pause.
        self._read_count += 1
        if self._read_count == self._batch:
            self._read_count = 0
            if self._calls is not None:
                self._calls[0](self._batch)
        return item

    async def aclose(self) -> None:
        """End the answer here: within one step the engine drops it and gives back what it holds."""
        if not self._over:
            if self._calls is not None:
                self._calls[1]()
            self._items.put_nowait(Dropped(None))  # whoever waits wakes up
            self._over = True
