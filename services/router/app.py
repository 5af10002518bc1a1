"""The router, wired."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from hocket.client.aggregator import AggregatorClient
from hocket.client.registry import RegistryClient
from hocket.rpc.handlers import Handlers
from hocket.v1 import router_pb2_grpc
from services.router.aggregators import Aggregators
from services.router.directory import Directory
from services.router.kept import Kept
from services.router.placement import Loads
from services.router.service import RouterServicer, tokens_of

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
        kept = None if settings.data_dir is None else Kept(settings.data_dir / "router.view")
        self.directory = Directory(RegistryClient(channels.get(settings.registry)), kept)
        self.handlers = Handlers(
            in_flight_max=settings.in_flight_max,
            deadlines={
                "Predict": settings.default_deadline_seconds,
                "Generate": settings.generate_deadline_seconds,
            },
            texts={"Generate": tokens_of},
        )
        self.handlers.add(
            router_pb2_grpc.add_RouterServiceServicer_to_server,
            RouterServicer(
                settings,
                self.directory,
                Loads(),
                Aggregators(
                    [AggregatorClient(channels.get(address)) for address in settings.aggregators],
                    settings.patience_seconds,
                ),
            ),
        )
        self.failed = asyncio.Event()
        self._tasks: tuple[asyncio.Task[None], ...] = ()

    async def start(self) -> None:
        """Begin to follow the registry."""
        self._tasks = (asyncio.create_task(self.directory.follow()), asyncio.create_task(self.directory.keep()))

    async def ready(self) -> None:
        """Return when it knows a worker."""
        await self.directory.wait_for_worker()

    def leave(self) -> None:
        """Nobody to tell: clients watch its health."""

    async def stop(self) -> None:
        """Stop following."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
