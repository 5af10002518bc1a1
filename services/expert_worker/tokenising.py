"""Where texts become tokens: beside the event loop, one at a time, the smallest first."""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Final, TypeVar

from hocket.errors import HocketError, Reason

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")
_WAITING_MAX: Final = 64
_RETRY_SECONDS: Final = 0.5


class SmallestFirst:
    """One thread for work whose size is known beforehand: a large piece is held up by small ones, never the reverse.

    What is being done when a smaller piece comes is finished first. What nobody waits for any more is left out.

    Args:
        name: Of the thread.
        waiting_max: Pieces that wait; the next one is refused as `QUEUE_FULL`.
    """

    def __init__(self, name: str, waiting_max: int = _WAITING_MAX) -> None:
        self._waiting_max = waiting_max
        self._queue: queue.PriorityQueue[tuple[float, int, Future[Any], Callable[[], Any]]] = queue.PriorityQueue()
        self._numbers = itertools.count()
        threading.Thread(target=self._work, name=name, daemon=True).start()

    async def run(self, size_bytes: int, work: Callable[[], T]) -> T:
        """What `work` returns or raises.

        Raises:
            HocketError: `QUEUE_FULL`.
        """
        if self._queue.qsize() >= self._waiting_max:
            raise HocketError(
                Reason.QUEUE_FULL,
                f"{self._waiting_max} texts already wait to be prepared: try another worker, or again later",
                retry_after_seconds=_RETRY_SECONDS,
            )
        future: Future[T] = Future()
        self._queue.put((size_bytes, next(self._numbers), future, work))
        return await asyncio.wrap_future(future)

    def stop(self) -> None:
        """End the thread after what waits."""
        self._queue.put((float("inf"), next(self._numbers), Future(), lambda: None))

    def _work(self) -> None:
        size = 0.0
        while size != float("inf"):
            size, _, future, work = self._queue.get()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except BaseException as error:  # noqa: BLE001 - whatever it is, whoever waits gets it
                    future.set_exception(error)
            del future, work  # while the thread sleeps it would keep a text
