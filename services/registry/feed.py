"""The feed: everything as it is, then every change, to each watcher at its own pace.

A watcher is a position, not a queue. Durable changes are read from the store in the order of their revisions, each
package, mixture and revocation once, in its newest state; so a slow watcher skips what was overtaken, costs no memory,
and can go on after a break from the last revision it saw. Live workers have no revisions: a watcher is told the
difference between the workers it knows and those that are live.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from hocket.errors import HocketError, Reason
from hocket.v1.mixture_pb2 import Mixture
from hocket.v1.package_pb2 import Package
from hocket.v1.registry_pb2 import KeyRevocation, Synced, WorkerState

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence

Change: TypeAlias = Package | Mixture | KeyRevocation
"""The newest state of something durable."""


@dataclass(frozen=True, slots=True)
class WorkerGone:
    """A worker whose lease has ended."""

    worker: str


@dataclass(frozen=True, slots=True)
class Item:
    """One item of the feed.

    Args:
        revision: Watching again after this revision misses nothing durable.
        event: What has changed; `Synced` once, when everything that was there has been told.
    """

    revision: int
    event: Change | WorkerState | WorkerGone | Synced


class Feed:
    """Wakes watchers, and tells each of them what it does not know yet. Lives in one event loop.

    Args:
        changes: The next changes after a revision, in order, each with its own; empty when there are none.
        live: The live workers by name. A state that has not changed is the same object.
    """

    def __init__(
        self,
        changes: Callable[[int], Awaitable[Sequence[tuple[int, Change]]]],
        live: Callable[[], Mapping[str, WorkerState]],
    ) -> None:
        self._changes = changes
        self._live = live
        self._revision = 0
        self._woken = asyncio.Event()
        self._closed = False

    def advance(self, revision: int) -> None:
        """The store has reached a revision."""
        self._revision = max(self._revision, revision)
        self.wake()

    def wake(self) -> None:
        """Something has changed: let watchers look."""
        woken, self._woken = self._woken, asyncio.Event()
        woken.set()

    def close(self) -> None:
        """End every watcher."""
        self._closed = True
        self.wake()

    async def watch(self, after_revision: int) -> AsyncGenerator[Item, None]:
        """What has changed after a revision, `Synced`, then every change.

        Live workers are told from the beginning, whatever the revision: who was not told before `Synced` is gone.

        Raises:
            HocketError: `REVISION_UNKNOWN` if the revision lies ahead of history, `DRAINING` when the feed closes.
        """
        if after_revision > self._revision:
            raise HocketError(
                Reason.REVISION_UNKNOWN,
                f"this registry is at revision {self._revision}, {after_revision} is ahead of it: watch from 0",
            )
        position = after_revision
        told: Mapping[str, WorkerState] = {}
        synced = False
        while not self._closed:
            woken = self._woken
            while self._revision > position and (changes := await self._changes(position)):
                for revision, change in changes:
                    position = revision
                    yield Item(position, change)
            live = self._live()
            for name, state in live.items():
                if told.get(name) is not state:
                    yield Item(position, state)
            for name in told.keys() - live.keys():
                yield Item(position, WorkerGone(name))
            told = live
            if not synced:
                synced = True
                yield Item(position, Synced())
            await woken.wait()
        raise HocketError(Reason.DRAINING, "this registry is shutting down: watch again in a moment")
