"""The aggregator, wired."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from hocket.rpc.handlers import Handlers
from hocket.v1 import aggregator_pb2_grpc
from services.aggregator.service import AggregatorServicer, tokens_of

if TYPE_CHECKING:
    from hocket.rpc.channel import Channels
    from services.aggregator.settings import AggregatorSettings


class AggregatorApp:
    """The aggregator's handlers. It keeps no state between calls but open channels, which are not its own."""

    def __init__(self, settings: AggregatorSettings, channels: Channels) -> None:
        self.failed = asyncio.Event()
        self.handlers = Handlers(
            in_flight_max=settings.in_flight_max,
            deadlines={"Combine": settings.default_deadline_seconds},
            texts={"Combine": tokens_of},
        )
        self.handlers.add(
            aggregator_pb2_grpc.add_AggregatorServiceServicer_to_server, AggregatorServicer(settings, channels)
        )

    async def start(self) -> None:
        """Nothing to start: the first plan opens what it needs."""

    async def ready(self) -> None:
        """It always is."""

    def leave(self) -> None:
        """Nobody to tell: routers go to another one when it refuses."""

    async def stop(self) -> None:
        """Nothing to stop."""
