"""A listening server: handlers, health, reflection, and an orderly end."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from hocket.rpc.convert import MESSAGE_BYTES_MAX
from hocket.rpc.health import SERVICE as HEALTH_SERVICE
from hocket.rpc.health import HealthServicer
from hocket.vendored import health_pb2, health_pb2_grpc

if TYPE_CHECKING:
    from hocket.rpc.handlers import Handlers

_REFLECTION_SERVICES: Final = ("grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection")
_LEFTOVER_GRACE_SECONDS: Final = 0.5

_PROBES_MAX: Final = 64
_STREAMS_MIN: Final = 128
_FEEDS_MAX: Final = 4096
"""Calls that nobody counts, feeds, leases and health watches, that a server holds beside those it counts."""
PROBE_PORT_OFFSET: Final = 2000
"""Health without TLS is that many above a port with it."""

_OPTIONS: Final[tuple[tuple[str, Any], ...]] = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_metadata_size", 16 * 1024),
    ("grpc.absolute_max_metadata_size", 32 * 1024),
    # Two servers must not share a port in silence.
    ("grpc.so_reuseport", 0),
    # Our own channels ping every 30 s; other people's keepalive down to 5 s is welcome.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Who pings more often than that a third time is sent away.
    ("grpc.http2.max_ping_strikes", 2),
    # A peer that is gone without a word is noticed.
    ("grpc.keepalive_time_ms", 120_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # Who connects has to speak.
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_connection_idle_ms", 600_000),
    # Now and then callers connect anew, and so find servers that have joined, and take up new certificates. What
    # still runs on the old connection has the grace to end, more than answers in text may take; feeds and leases go
    # on over the next one.
    ("grpc.max_connection_age_ms", 1_800_000),
    ("grpc.max_connection_age_grace_ms", 900_000),
)


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens. Port 0 takes a free one."""

    host: str
    port: int

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        return self.host in {"localhost", "::1"} or self.host.startswith("127.")

    @property
    def is_wildcard(self) -> bool:
        """Whether it means every interface."""
        return self.host in {"0.0.0.0", "::"}  # noqa: S104 - compared with, not bound

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def stop_requested(*, supervised: bool = False) -> asyncio.Event:
    """An event that is set when the process is asked to stop: SIGTERM, or SIGINT from the keyboard.

    Ask for it before anything is started, so that no signal is lost.

    Args:
        supervised: Whether the end of standard input asks for it as well: then the process does not outlive a
            supervisor that holds the other end, however that one has ended.
    """
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked.set)
    if supervised:
        stdin = sys.stdin.fileno()

        def read() -> None:
            if not os.read(stdin, 1):
                loop.remove_reader(stdin)
                asked.set()

        loop.add_reader(stdin, read)
    return asked


class Server:
    """One listening port that serves handlers beside health and reflection.

    With TLS there is a second port, `PROBE_PORT_OFFSET` above, that serves health's Check and List alone, without TLS:
    those who probe, such as Kubernetes, show no certificates.

    Args:
        handlers: What it serves; may be shared with a local channel or another port.
        address: Where it listens.
        reflect: Whether tools may ask for the contracts.
        credentials: What it speaks TLS with (`hocket.rpc.tls.Tls.server_credentials`); None for no TLS.
    """

    def __init__(
        self,
        handlers: Handlers,
        address: Address,
        *,
        reflect: bool = True,
        credentials: grpc.ServerCredentials | None = None,
    ) -> None:
        self.handlers = handlers
        self.address = address
        self.health = HealthServicer()
        # Two limits above the one of the handlers, which answers with advice: on what one connection may have open,
        # and on everything together. Beyond the first a caller waits; beyond the second grpc refuses.
        streams_max = max(_STREAMS_MIN, 2 * handlers.in_flight_max)
        self._server = grpc.aio.server(
            options=(*_OPTIONS, ("grpc.max_concurrent_streams", streams_max)),
            maximum_concurrent_rpcs=handlers.in_flight_max + _FEEDS_MAX,
        )
        self._credentials = credentials
        self._probes: grpc.aio.Server | None = None
        self._reflect = reflect

    async def start(self) -> None:
        """Bind and serve; every service starts out not ready until `set_ready`.

        Raises:
            OSError: A port is taken or the address is not ours.
        """
        names = (*self.handlers.services, HEALTH_SERVICE)
        for service, methods in self.handlers.services.items():
            self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, methods),))
            self.health.set(service, serving=False)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._server)
        if self._reflect:
            # The two protocol versions are identical on the wire; the library registers only the older one.
            # It is not listed either: tools ask for the descriptor of all that is listed, and there is none of v1.
            servicer = reflection.aio.ReflectionServicer(names)
            for service in _REFLECTION_SERVICES:
                method = grpc.stream_stream_rpc_method_handler(
                    servicer.ServerReflectionInfo,
                    request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
                    response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
                )
                handler = grpc.method_handlers_generic_handler(service, {"ServerReflectionInfo": method})
                self._server.add_generic_rpc_handlers((handler,))
        self.address = _listen(self._server, self.address, self._credentials)
        if self._credentials is not None:
            self._probes = grpc.aio.server(options=_OPTIONS, maximum_concurrent_rpcs=_PROBES_MAX)
            self._probes.add_generic_rpc_handlers((self._probe_handler(),))
            _listen(self._probes, Address(self.address.host, self.address.port + PROBE_PORT_OFFSET), None)
            await self._probes.start()
        await self._server.start()

    def _probe_handler(self) -> grpc.GenericRpcHandler:
        """Check and List: a Watch lasts as long as its caller likes, and enough of them would leave probes no room."""
        check = grpc.unary_unary_rpc_method_handler(
            self.health.Check,
            request_deserializer=health_pb2.HealthCheckRequest.FromString,
            response_serializer=health_pb2.HealthCheckResponse.SerializeToString,
        )
        every = grpc.unary_unary_rpc_method_handler(
            self.health.List,
            request_deserializer=health_pb2.HealthListRequest.FromString,
            response_serializer=health_pb2.HealthListResponse.SerializeToString,
        )
        return grpc.method_handlers_generic_handler(HEALTH_SERVICE, {"Check": check, "List": every})

    def set_ready(self, *, ready: bool = True) -> None:
        """Say whether a request sent now would be served."""
        for service in self.handlers.services:
            self.health.set(service, serving=ready)

    async def drain(self, grace_seconds: float) -> None:
        """Stop in order: not ready, no new calls, finish what runs within the grace, then end the rest."""
        self.health.set_all(serving=False)
        self.handlers.draining = True
        await self.handlers.wait_idle(grace_seconds)
        # Before the transport is closed, which would tell their callers nothing.
        self.handlers.end_running()
        # What is left are feeds, leases and health watches, which last as long as their peer.
        await self._server.stop(_LEFTOVER_GRACE_SECONDS)
        if self._probes is not None:
            await self._probes.stop(None)


def _listen(server: grpc.aio.Server, address: Address, credentials: grpc.ServerCredentials | None) -> Address:
    """Bind a server, and say to which port."""
    try:
        if credentials is None:
            port = server.add_insecure_port(str(address))
        else:
            port = server.add_secure_port(str(address), credentials)
    except RuntimeError as error:
        raise OSError(
            f"cannot listen on {address}: is the port in use, by another `hocket up` perhaps? "
            f"Choose another one: --set SERVICE.port=PORT. ({error})"
        ) from error
    return Address(address.host, port)
