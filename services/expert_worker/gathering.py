"""Several packages for one request: all of them, or none.

While they are loaded nothing is held, so that no two requests can each wait for what the other has; only one at a time,
in the order of their arrival, gathers what it finds and keeps it. It begins behind those who have the turn before it,
and once it holds something it is the first of all: what it still wants takes no heed of turns, and nobody else has one.
"""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from typing import TYPE_CHECKING

from hocket.errors import HocketError, Reason
from services.expert_worker.budget import Wait
from services.expert_worker.residency import still_loading

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.expert_worker.residency import Residency, ResidentPackage


class Gathering:
    """Gives requests several packages each. One for a residency.

    Args:
        residency: Where the packages are; those of a request lie in host memory.
    """

    def __init__(self, residency: Residency) -> None:
        self._residency = residency
        self._keeping = asyncio.Lock()  # lets in whoever waits longest

    async def acquire(self, digests: Sequence[str], seconds: float) -> list[ResidentPackage]:
        """Packages, each now in use by the caller until its `release`: all of them, or none.

        Args:
            digests: Which, each once.
            seconds: How long to wait.

        Returns:
            In the order of `digests`.

        Raises:
            HocketError: As `Residency.acquire`; `DEVICE_MEMORY` if they exceed the budget together.
        """
        if (found := self._residency.get_all(digests)) is not None:
            return found
        if len(digests) == 1:
            return [await self._residency.acquire(digests[0], seconds)]
        end_time = asyncio.get_running_loop().time() + seconds
        try:
            async with asyncio.timeout_at(end_time):
                await self._bring_all(digests, end_time)
                if (found := self._residency.get_all(digests)) is not None:
                    return found
                return await self._gather(digests, end_time)  # some have made room for others since
        except TimeoutError:
            raise still_loading(digests[0]) from None

    async def _bring_all(self, digests: Sequence[str], end_time: float) -> None:
        """Have each loaded once, all at the same time, and hold none of them.

        What is slow, or cannot be loaded at all, shows here, and holds up nobody else.
        """
        host = self._residency.host

        async def size_bytes(digest: str) -> int:
            package = await self._residency.acquire(digest, end_time - asyncio.get_running_loop().time())
            self._residency.release(package)
            return package.size_bytes if package.budget is host else 0

        bringing = [asyncio.create_task(size_bytes(digest)) for digest in digests]
        try:
            total = sum(await asyncio.gather(*bringing))
        finally:
            for task in bringing:
                task.cancel()
            await asyncio.gather(*bringing, return_exceptions=True)
        if total > (most_bytes := self._residency.most_bytes(digests, host)):
            raise HocketError(
                Reason.DEVICE_MEMORY,
                f"these {len(digests)} experts take {total} bytes together, the whole budget is "
                f"{most_bytes} beside what is pinned: ask for fewer, raise {host.setting}, or use a "
                "machine with more memory",
            )

    async def _gather(self, digests: Sequence[str], end_time: float) -> list[ResidentPackage]:
        """All of them, keeping those that are there while the others come back: one set at a time, in its turn."""
        host, wait = self._residency.host, Wait(frozenset(digests), lambda: True)
        with host.waiting(wait):  # here and at the lock in one order, so that whoever has the turn can go on
            async with self._keeping:
                while host.turn not in (None, wait):
                    await host.until_changed()
                host.put_first(wait)
                return await self._keep_all(digests, end_time)

    async def _keep_all(self, digests: Sequence[str], end_time: float) -> list[ResidentPackage]:
        with ExitStack() as undo:
            held: dict[str, ResidentPackage] = {}

            def hold(package: ResidentPackage) -> None:
                held[package.digest] = package
                undo.callback(self._residency.release, package)

            for digest in digests:
                if (package := self._residency.get(digest)) is not None:
                    hold(package)
            for digest in digests:
                if digest not in held:
                    hold(await self._residency.acquire(digest, end_time - asyncio.get_running_loop().time()))
            undo.pop_all()
            return [held[digest] for digest in digests]
