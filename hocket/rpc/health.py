"""grpc.health.v1: whether this process, and each service in it, would serve a request now."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import grpc

from hocket.vendored import health_pb2, health_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from hocket.rpc.handlers import Context

SERVICE: Final = "grpc.health.v1.Health"
_Response: Final = health_pb2.HealthCheckResponse


class HealthServicer(health_pb2_grpc.HealthServicer):
    """Check, List and Watch over a table of service names.

    The name "" means the process: alive and able to answer. A service name means readiness: a request sent now
    would be served.
    """

    def __init__(self) -> None:
        self._serving: dict[str, bool] = {"": True}
        self._changed = asyncio.Event()

    def set(self, service: str, *, serving: bool) -> None:
        """Record a service's readiness and wake everyone who watches."""
        self._serving[service] = serving
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def set_all(self, *, serving: bool) -> None:
        """Record the same readiness for every service known, the process included."""
        for service in tuple(self._serving):
            self.set(service, serving=serving)

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Context) -> health_pb2.HealthCheckResponse:
        """Current state of one service; NOT_FOUND for a name this process does not know."""
        if request.service not in self._serving:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no service {request.service[:100]!r} here")
        return _Response(status=self._status(request.service))

    async def List(self, request: health_pb2.HealthListRequest, context: Context) -> health_pb2.HealthListResponse:
        """Current state of every service."""
        del request, context
        statuses = {service: _Response(status=self._status(service)) for service in self._serving}
        return health_pb2.HealthListResponse(statuses=statuses)

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """State of one service now, and again on every change; SERVICE_UNKNOWN while nobody has named it."""
        del context
        last: health_pb2.HealthCheckResponse.ServingStatus.ValueType | None = None
        while True:
            changed = self._changed
            status = self._status(request.service)
            if status != last:
                last = status
                yield _Response(status=status)
            await changed.wait()

    def _status(self, service: str) -> health_pb2.HealthCheckResponse.ServingStatus.ValueType:
        serving = self._serving.get(service)
        if serving is None:
            return _Response.SERVICE_UNKNOWN
        return _Response.SERVING if serving else _Response.NOT_SERVING
