"""Typed caller of AggregatorService."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hocket.client.calls import call_metadata, is_away, refusals
from hocket.rpc.handlers import LOAD_KEY
from hocket.v1 import aggregator_pb2_grpc, expert_worker_pb2

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    import grpc

    from hocket.v1 import aggregator_pb2


class AggregatorClient:
    """Runs plans on one aggregator.

    Args:
        channel: To the aggregator.
    """

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = aggregator_pb2_grpc.AggregatorServiceStub(channel)
        self._channel = channel

    def is_away(self) -> bool:
        """Whether the aggregator is known to be out of reach just now."""
        return is_away(self._channel)

    async def combine(
        self,
        request: aggregator_pb2.CombineRequest,
        timeout_seconds: float,
        on_load: Callable[[expert_worker_pb2.WorkerLoad], None],
    ) -> AsyncGenerator[aggregator_pb2.CombineResponse, None]:
        """Partials, if the request asks for them, then the final value; of a text job its events.

        An event is read when it is asked for, so a slow reader holds back who computes. Closing the generator early
        cancels the call.

        Args:
            request: Plan and input, or a text job.
            timeout_seconds: Deadline of the call.
            on_load: Given each worker's report when the call has ended well.

        Raises:
            HocketError: As the contract of Combine says.
        """
        call = self._stub.Combine(request, timeout=timeout_seconds, metadata=call_metadata())
        try:
            with refusals():
                async for response in call:
                    yield response
                for key, value in await call.trailing_metadata() or ():
                    if key == LOAD_KEY and isinstance(value, bytes):
                        on_load(expert_worker_pb2.WorkerLoad.FromString(value))
        finally:
            call.cancel()
