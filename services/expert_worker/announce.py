"""The worker's lease with its registry: where it is and what it holds, told on every change and before it ends."""

from __future__ import annotations

import asyncio
import contextlib
from contextlib import aclosing
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from hocket.client.registry import RegistryClient
    from hocket.v1.registry_pb2 import WorkerState

_FIRST_PAUSE_SECONDS: Final = 1.0
"""Until the registry has said how long a lease is."""
_PAUSE_SECONDS_MIN: Final = 0.05
_RENEWALS_PER_LEASE: Final = 3


class Announcer:
    """Holds the lease.

    Args:
        registry: Whom to tell.
        state: The worker's whole state now.

    Attributes:
        known: Set when the registry has first heard.
    """

    def __init__(self, registry: RegistryClient, state: Callable[[], WorkerState]) -> None:
        self._registry = registry
        self._state = state
        self._changed = asyncio.Event()
        self._told = asyncio.Event()
        self.known = asyncio.Event()
        self._pause_seconds = _FIRST_PAUSE_SECONDS

    def notice(self) -> None:
        """The state has changed: tell the registry soon. Changes close to each other are told together."""
        self._changed.set()

    async def hold(self) -> None:
        """Hold the lease until the stream breaks.

        Raises:
            HocketError: Why it broke.
        """
        async with aclosing(self._registry.announce(self._states())) as renewals:
            async for renewal in renewals:
                lease_seconds = renewal.lease.ToNanoseconds() / 1e9
                self._pause_seconds = max(_PAUSE_SECONDS_MIN, lease_seconds / _RENEWALS_PER_LEASE)
                self._told.set()
                self.known.set()

    async def tell(self, seconds: float) -> None:
        """Tell the current state, and wait for the registry to have heard, `seconds` at most."""
        self._told.clear()
        self.notice()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._told.wait()

    async def _states(self) -> AsyncIterator[WorkerState]:
        while True:
            self._changed.clear()
            yield self._state()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._pause_seconds):
                    await self._changed.wait()
