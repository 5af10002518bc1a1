"""Talk to a running suite.

    async with connect("127.0.0.1:50051") as router:
        answer = await router.answer("digits", rows)

    async with connect_registry("127.0.0.1:50052", token=token) as registry:
        await registry.publish(data, release)

`hocket.client.blocking` has the same verbs without asyncio. Every refusal is a `hocket.errors.HocketError`; branch on
its `reason`. Services use the typed callers in this package directly, over channels of their own.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

from hocket.client.health import HealthClient
from hocket.client.registry import FetchedMixture, RegistryClient
from hocket.client.router import Answer, Partial, Planned, RouterClient
from hocket.rpc.channel import Channels

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import grpc

__all__ = [
    "REGISTRY_ADDRESS",
    "ROUTER_ADDRESS",
    "Answer",
    "FetchedMixture",
    "HealthClient",
    "Partial",
    "Planned",
    "RegistryClient",
    "RouterClient",
    "connect",
    "connect_health",
    "connect_registry",
]

ROUTER_ADDRESS: Final = "127.0.0.1:50051"
"""Where a suite on this machine answers."""
REGISTRY_ADDRESS: Final = "127.0.0.1:50052"
"""Where a suite on this machine keeps packages and mixtures."""


@asynccontextmanager
async def connect(address: str = ROUTER_ADDRESS, *, timeout_seconds: float = 30.0) -> AsyncIterator[RouterClient]:
    """A client of the router at `address` (`host:port` or `unix:///path`).

    Nothing is sent before the first call, so this succeeds whether or not anybody listens there.

    Args:
        address: Where the router listens.
        timeout_seconds: Deadline of every call.
    """
    async with _channel(address) as channel:
        yield RouterClient(channel, timeout_seconds=timeout_seconds)


@asynccontextmanager
async def connect_registry(
    address: str = REGISTRY_ADDRESS, token: str | None = None, *, timeout_seconds: float = 30.0
) -> AsyncIterator[RegistryClient]:
    """A client of the registry at `address`.

    Args:
        address: Where the registry listens.
        token: The admin token, when the registry asks for one; reading needs none.
        timeout_seconds: Deadline of every call; uploads get more by their size.
    """
    async with _channel(address) as channel:
        yield RegistryClient(channel, token=token, timeout_seconds=timeout_seconds)


@asynccontextmanager
async def connect_health(address: str = ROUTER_ADDRESS, *, timeout_seconds: float = 5.0) -> AsyncIterator[HealthClient]:
    """A client of the health service that every server has.

    Args:
        address: Where any of our servers listens.
        timeout_seconds: Deadline of every call except `watch`.
    """
    async with _channel(address) as channel:
        yield HealthClient(channel, timeout_seconds=timeout_seconds)


@asynccontextmanager
async def _channel(address: str) -> AsyncIterator[grpc.aio.Channel]:
    channels = Channels()
    try:
        yield channels.get(address)
    finally:
        await channels.close()
