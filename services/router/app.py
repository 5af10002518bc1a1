"""The router, wired."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from hocket.client.aggregator import AggregatorClient
from hocket.client.registry import RegistryClient
from hocket.rpc.handlers import Handlers
from hocket.v1 import router_pb2_grpc
from services.router.directory import Directory
from services.router.placement import Loads
from services.router.service import RouterServicer

if TYPE_CHECKING:
    from hocket.rpc.channel import Channels
    from services.router.settings import RouterSettings


class RouterApp:
    """The router's handlers, and the task that follows the registry.

    Args:
        settings: What the operator chose.
        channels: To the registry and the aggregators.
    """

    def __init__(self, settings: RouterSettings, channels: Channels) -> None:
        self.directory = Directory(RegistryClient(channels.get(settings.registry)))
        self.handlers = Handlers(in_flight_max=settings.in_flight_max)
        self.handlers.add(
            router_pb2_grpc.add_RouterServiceServicer_to_server,
            RouterServicer(
                settings,
                self.directory,
                Loads(),
                [AggregatorClient(channels.get(address)) for address in settings.aggregators],
            ),
        )
        self._following: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to follow the registry; `directory.wait_for_worker` says when it can answer."""
        self._following = asyncio.create_task(self.directory.follow())

    async def stop(self) -> None:
        """Stop following."""
        if self._following is not None:
            self._following.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._following
