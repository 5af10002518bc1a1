"""A listening server: handlers, health, reflection, and an orderly end."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from hocket.rpc.convert import MESSAGE_BYTES_MAX
from hocket.rpc.health import SERVICE as HEALTH_SERVICE
from hocket.rpc.health import HealthServicer
from hocket.vendored import health_pb2_grpc

if TYPE_CHECKING:
    from hocket.rpc.handlers import Handlers

_REFLECTION_SERVICES: Final = ("grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection")
_LEFTOVER_GRACE_SECONDS: Final = 0.5

_OPTIONS: Final = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_metadata_size", 16 * 1024),
    ("grpc.absolute_max_metadata_size", 32 * 1024),
    # Two servers must not share a port in silence.
    ("grpc.so_reuseport", 0),
    # Our own channels ping every 30 s; other people's keepalive down to 5 s is welcome.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
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

    Args:
        handlers: What it serves; may be shared with a local channel or another port.
        address: Where it listens.
        reflect: Whether tools may ask for the contracts.
    """

    def __init__(self, handlers: Handlers, address: Address, *, reflect: bool = True) -> None:
        self.handlers = handlers
        self.address = address
        self.health = HealthServicer()
        self._server = grpc.aio.server(options=_OPTIONS)
        self._reflect = reflect

    async def start(self) -> None:
        """Bind and serve; every service starts out not ready until `set_ready`.

        Raises:
            OSError: The port is taken or the address is not ours.
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
        try:
            port = self._server.add_insecure_port(str(self.address))
        except RuntimeError as error:
            raise OSError(
                f"cannot listen on {self.address}: is the port in use, by another `hocket up` perhaps? "
                f"Choose another one. ({error})"
            ) from error
        self.address = Address(self.address.host, port)
        await self._server.start()

    def set_ready(self, *, ready: bool = True) -> None:
        """Say whether a request sent now would be served."""
        for service in self.handlers.services:
            self.health.set(service, serving=ready)

    async def drain(self, grace_seconds: float) -> None:
        """Stop in order: not ready, no new calls, finish what runs within the grace, then end the rest."""
        self.health.set_all(serving=False)
        self.handlers.draining = True
        await self.handlers.wait_idle(grace_seconds)
        # What is left are feeds, leases and health watches, which last as long as their peer.
        await self._server.stop(_LEFTOVER_GRACE_SECONDS)
