"""Typed caller of grpc.health.v1: whether a server, and each service in it, would serve a request now."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Final

import grpc

from hocket.client.calls import refusals
from hocket.vendored import health_pb2, health_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping

    from hocket.vendored.health_pb2_grpc import HealthAsyncStub

_Status: Final = health_pb2.HealthCheckResponse.ServingStatus


class Health(StrEnum):
    """What a server says about a service."""

    SERVING = "SERVING"
    NOT_SERVING = "NOT_SERVING"
    SERVICE_UNKNOWN = "SERVICE_UNKNOWN"
    """The server has no service of that name."""
    UNKNOWN = "UNKNOWN"
    """The server does not say."""


class HealthClient:
    """Asks one server about its health.

    Args:
        channel: To the server.
        timeout_seconds: Deadline of every call except `watch`.
    """

    def __init__(self, channel: grpc.aio.Channel, *, timeout_seconds: float = 5.0) -> None:
        self._stub: HealthAsyncStub = health_pb2_grpc.HealthStub(channel)
        self._timeout_seconds = timeout_seconds

    async def check(self, service: str = "") -> Health:
        """The state of one service; "" is the process, which lives if it answers.

        Raises:
            HocketError: `UNREACHABLE` or `DEADLINE` if nobody answers, another reason if the server refuses.
        """
        request = health_pb2.HealthCheckRequest(service=service)
        try:
            response = await self._stub.Check(request, timeout=self._timeout_seconds)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                return Health.SERVICE_UNKNOWN
            with refusals():
                raise
        return _health(response)

    async def list_services(self) -> Mapping[str, Health]:
        """The state of every service, by name; "" is the process.

        Raises:
            HocketError: As `check`.
        """
        with refusals():
            response = await self._stub.List(health_pb2.HealthListRequest(), timeout=self._timeout_seconds)
        return {service: _health(status) for service, status in sorted(response.statuses.items())}

    async def watch(self, service: str = "") -> AsyncGenerator[Health, None]:
        """The state of one service now, and again after every change, until the server goes away.

        Raises:
            HocketError: As `check`; `UNREACHABLE` when the server goes away.
        """
        call = self._stub.Watch(health_pb2.HealthCheckRequest(service=service))
        try:
            with refusals():
                async for response in call:
                    yield _health(response)
        finally:
            call.cancel()


def _health(response: health_pb2.HealthCheckResponse) -> Health:
    return Health(_Status.Name(response.status))
