"""The byte budget of one memory: what is taken, who waits for room and whose turn it is, and who makes room.

Everything here runs in the event loop, so no lock guards a state.

When what is idle cannot make enough room, loads wait until something ends, and whichever then fits goes on, the longest
waiting first: one that is too large for now is passed by others, for a while. Then it has the turn: nobody else gets
room in that memory until it has, and of what is in use as much leaves, as soon as its requests end, as is missing;
whoever wants that from then on waits behind it.

Who makes room is decided by GreedyDual-Size (Cao and Irani 1997): each use, when it begins and when it ends, gives an
entry the worth of bringing it back, for each of its bytes, on top of the inflation, the most that one that left was
worth. So what was used longest ago leaves first among equals, and a large entry before a small one, which takes nearly
as long to bring back.

What has left is taken until nobody holds it any more, and others get its bytes only then; until then it is lingering.
"""

from __future__ import annotations

import asyncio
import gc
import math
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

if TYPE_CHECKING:
    import weakref
    from collections.abc import Callable, Collection, Iterator, Sequence

_RELOAD_SECONDS: Final = 0.002
"""Of bringing back an empty entry from the cache on disk: opening it and checking what vouches for it."""
_RELOAD_BYTES_PER_SECOND: Final = 5e8
"""Beside that: reading, hashing and decoding."""
_LINGERING_SECONDS: Final = 0.002
"""After that, and twice and four times it, and so on, is looked whether what has left is held by nobody any more."""
_COLLECTING_SECONDS: Final = 1.0
"""What lingers for so long is held by garbage, as the frames of an exception are; then it is looked this often."""


class Entry(Protocol):
    """What may be evicted.

    Attributes:
        size_bytes: What it takes.
        in_use_count: Requests that run on it.
        worth: What `Budget.worth` said when it was last used.
    """

    size_bytes: int
    in_use_count: int
    worth: float


EntryT = TypeVar("EntryT", bound=Entry)


def _now() -> float:
    return asyncio.get_running_loop().time()


@dataclass(slots=True, eq=False)
class Wait:
    """Somebody waits for room in a memory.

    Attributes:
        digests: For these: one load's, or those of a set that is gathered.
        is_wanted: Says whether a request waits for it; who is not wanted has no turn.
        begin_time: Since when, on the loop's clock.
    """

    digests: frozenset[str]
    is_wanted: Callable[[], bool]
    begin_time: float = field(default_factory=_now)


class Budget:
    """Bytes of one memory.

    Args:
        total_bytes: What may be taken.
        setting: The operator's setting that says so.
        patience_seconds: How long one that does not fit may be passed by those that do.

    Attributes:
        total_bytes: As given.
        setting: As given.
        used_bytes: What is taken.
        lingering_bytes: Of these, what has left and is still held by somebody for a moment.
        waits: Who waits for room, the first in order first.
    """

    def __init__(self, total_bytes: int, setting: str = "worker.budget_bytes", patience_seconds: float = 2.0) -> None:
        self.total_bytes = total_bytes
        self.setting = setting
        self.used_bytes = 0
        self.lingering_bytes = 0
        self.waits: list[Wait] = []
        self._patience_seconds = patience_seconds
        self._inflation = 0.0
        self._changed = asyncio.Event()

    def take(self, size_bytes: int) -> bool:
        """Take so much, if it is free."""
        if self.used_bytes + size_bytes > self.total_bytes:
            return False
        self.used_bytes += size_bytes
        return True

    def free(self, size_bytes: int) -> None:
        """Give back so much."""
        self.used_bytes -= size_bytes
        self.wake()

    @contextmanager
    def freed_on_failure(self, size_bytes: int) -> Iterator[None]:
        """Do something with memory already taken; if it fails, give the memory back."""
        try:
            yield
        except BaseException:
            self.free(size_bytes)
            raise

    def free_when_gone(self, size_bytes: int, owners: Sequence[weakref.ref[Any]]) -> None:
        """Give back so much once it is really there: the engine's threads hold an expert a moment longer.

        Args:
            size_bytes: How much.
            owners: Objects whose memory it is.
        """
        self.lingering_bytes += size_bytes
        self._look(size_bytes, owners, _LINGERING_SECONDS)

    def _look(self, size_bytes: int, owners: Sequence[weakref.ref[Any]], pause_seconds: float) -> None:
        if all(owner() is None for owner in owners):
            self.lingering_bytes -= size_bytes
            self.free(size_bytes)
            return
        longer_seconds = min(2 * pause_seconds, _COLLECTING_SECONDS)
        if pause_seconds < longer_seconds == _COLLECTING_SECONDS:
            gc.collect()
        asyncio.get_running_loop().call_later(pause_seconds, self._look, size_bytes, owners, longer_seconds)

    @property
    def turn(self) -> Wait | None:
        """Who goes before everybody else: the first of those who wait, once it has waited long enough."""
        first = next((wait for wait in self.waits if wait.is_wanted()), None)
        if first is None or _now() - first.begin_time < self._patience_seconds:
            return None
        return first

    @contextmanager
    def waiting(self, wait: Wait) -> Iterator[None]:
        """Be in the order of those who wait, behind those who are there already."""
        self.waits.append(wait)
        try:
            yield
        finally:
            self.waits.remove(wait)
            self.wake()

    def put_first(self, wait: Wait) -> None:
        """Let one who waits go before everybody else who does."""
        self.waits.remove(wait)
        self.waits.insert(0, wait)

    def wake(self) -> None:
        """Say that there may be room, or another turn."""
        self._changed.set()

    async def until_changed(self, seconds: float = math.inf) -> None:
        """Return when there may be room, or another turn, and now and then, at the latest after so many seconds."""
        self._changed.clear()
        # All are woken, not this one alone: who begins to wait again does so behind the others.
        alarm = asyncio.get_running_loop().call_later(min(seconds, self._patience_seconds / 2), self._changed.set)
        try:
            await self._changed.wait()
        finally:
            alarm.cancel()

    def worth(self, size_bytes: int) -> float:
        """What an entry of that size that is used now is worth: seconds to bring it back for each byte; no unit."""
        seconds = _RELOAD_SECONDS + size_bytes / _RELOAD_BYTES_PER_SECOND
        return self._inflation + seconds / max(1, size_bytes)

    def victims(self, size_bytes: int, entries: Collection[EntryT]) -> list[EntryT]:
        """Who is evicted to make room for so much at once; nobody, if all that are idle are together too small.

        Whoever asks lets them go.

        Args:
            size_bytes: How much.
            entries: Of these, the idle ones, the least worth first, and among equals in this order.
        """
        idle = [entry for entry in entries if not entry.in_use_count]
        missing_bytes = self._missing_bytes(size_bytes)
        if sum(entry.size_bytes for entry in idle) < missing_bytes:
            return []
        return self._chosen(idle, missing_bytes)

    def leavers(self, size_bytes: int, entries: Collection[EntryT], leaving_bytes: int) -> list[EntryT]:
        """Who is evicted so that there is room for so much once the requests that run on them have ended.

        Whoever asks lets them go.

        Args:
            size_bytes: How much.
            entries: Of these, the idle ones first, then as `victims`.
            leaving_bytes: What others, evicted before and still in use, are going to free.
        """
        return self._chosen(entries, self._missing_bytes(size_bytes) - leaving_bytes)

    def _missing_bytes(self, size_bytes: int) -> int:
        """What somebody has to give up before so much can be had."""
        return self.used_bytes + size_bytes - self.total_bytes - self.lingering_bytes

    def _chosen(self, entries: Collection[EntryT], missing_bytes: int) -> list[EntryT]:
        """As many as it takes."""
        chosen: list[EntryT] = []
        for entry in sorted(entries, key=lambda entry: (entry.in_use_count > 0, entry.worth)):
            if missing_bytes <= 0:
                break
            chosen.append(entry)
            self._inflation = max(self._inflation, entry.worth)  # one in use for long has the worth of its last use
            missing_bytes -= entry.size_bytes
        return chosen
