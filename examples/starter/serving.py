"""A suite with a kit in it, ready to be asked."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from examples.running import suite
from examples.starter.demo import known
from hocket.client import connect, connect_registry

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from examples.running import Running
    from examples.starter.kit import Kit
    from hocket.client import RouterClient


@asynccontextmanager
async def serving(kit: Kit, folder: Path) -> AsyncIterator[tuple[Running, RouterClient]]:
    """Start a suite, publish every expert of a kit once it is verified, and wait until the router knows them.

    Args:
        kit: Base, experts and trust.
        folder: For the suite's data.

    Yields:
        The suite, and a client of its router.

    Raises:
        HocketError: An expert is not what its publisher signed.
    """
    kit.prepare(folder)
    async with (
        suite(folder) as running,
        connect(running.router) as router,
        connect_registry(running.registry) as registry,
    ):
        experts = [kit.verified(path) for path in kit.experts()]
        for expert in experts:
            await registry.publish(expert.data, expert.release)
        await known(router, [expert.facts.digest for expert in experts])
        yield running, router
