"""The aggregators a router hands its plans to."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from typing import TYPE_CHECKING, Final

from hocket.client.calls import GRPC_STATUS
from hocket.errors import HocketError, Reason
from hocket.rpc.breaker import Breakers, is_fault, patience
from hocket.rpc.budget import RetryBudget
from hocket.rpc.handlers import hand_down
from hocket.telemetry import metrics

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Sequence

    from hocket.client.aggregator import AggregatorClient
    from hocket.v1.aggregator_pb2 import CombineRequest, CombineResponse
    from hocket.v1.expert_worker_pb2 import WorkerLoad

_AWAY: Final = frozenset({Reason.DRAINING, Reason.UNREACHABLE})
_RETRY_SECONDS: Final = 1.0
_RETRIES: Final = metrics.RETRIES.labels("router")


class Aggregators:
    """Asks the least busy, goes past those that are away, and asks one after another until one is there.

    Of those that are equally busy each has its turn. An aggregator that hangs keeps its calls and so gets few more;
    when they end, they count against it: it was silent, where in time it would have said what is missing.

    A call goes to a second aggregator only when the first one itself is out of reach or shutting down and nothing has
    been delivered: an aggregator refuses with other reasons when it is its workers that are away, and it has then
    asked every replica already.

    A text may be silent for long: its worker loads experts, or waits for memory. A caller that leaves meanwhile says
    nothing about the aggregator.

    Args:
        clients: At least one.
        patience_seconds: Silence after which a call that ends without an answer counts against the aggregator; less
            for callers in a hurry.
    """

    def __init__(self, clients: Sequence[AggregatorClient], patience_seconds: float) -> None:
        self._clients = clients
        self._patience_seconds = patience_seconds
        self._in_flight = dict.fromkeys(clients, 0)
        self._turn = 0
        self._budget = RetryBudget("router")
        self._breakers: Breakers[AggregatorClient] = Breakers("router")

    async def combine(
        self, request: CombineRequest, deadline: float, on_load: Callable[[WorkerLoad], None]
    ) -> AsyncGenerator[CombineResponse, None]:
        """As `AggregatorClient.combine`, with a margin before the deadline, in `time.monotonic()` seconds.

        Raises:
            HocketError: As the contract of Combine says; `UNREACHABLE` if no aggregator is there, or one goes away in
                the middle of an answer.
        """
        is_text = request.HasField("text")
        self._turn = (self._turn + 1) % len(self._clients)
        untried = [*self._clients[self._turn :], *self._clients[: self._turn]]
        self._budget.earn()
        while True:
            client = min([*filter(self._is_fit, untried)] or untried, key=self._in_flight.__getitem__)
            untried.remove(client)
            self._in_flight[client] += 1
            probe = self._breakers.enter(client)
            healthy: bool | None = None
            finished = False
            begin = time.monotonic()
            silent = begin + patience(self._patience_seconds, deadline - begin)
            try:
                async with aclosing(client.combine(request, hand_down(deadline - begin), on_load)) as events:
                    async for event in events:
                        healthy = True
                        finished = event.text.HasField("finish")
                        yield event
                return
            except HocketError as error:
                if finished:
                    return  # whoever asked has the whole text: how its call ended means nothing to them
                delivered, healthy = healthy, _is_healthy(error, silent=time.monotonic() >= silent)
                if error.reason not in _AWAY:
                    raise
                if delivered or not untried or not self._budget.spend():
                    raise HocketError(
                        Reason.UNREACHABLE, "no aggregator is there now: try again", retry_after_seconds=_RETRY_SECONDS
                    ) from error
            except (asyncio.CancelledError, GeneratorExit):
                if healthy is None and not is_text and time.monotonic() >= silent:
                    healthy = False
                raise
            finally:
                self._in_flight[client] -= 1
                self._breakers.leave(client, probe, healthy=healthy)
            _RETRIES.inc()

    def _is_fit(self, client: AggregatorClient) -> bool:
        return not client.is_away() and self._breakers.admits(client)


def _is_healthy(error: HocketError, *, silent: bool) -> bool | None:
    """What a failed call says about the aggregator itself: False, or nothing when the failure is one it reports."""
    if error.reason is Reason.DRAINING:
        return False
    failed = is_fault(error) or (silent and error.reason is Reason.DEADLINE)
    return False if GRPC_STATUS in error.metadata and failed else None
