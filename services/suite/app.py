"""The composition root: the same four services and contracts as everywhere, without sockets between them."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from hocket.rpc.channel import LOCAL, Channels
from hocket.rpc.handlers import Tokens
from hocket.rpc.program import METRICS_PORT_OFFSET, drain
from hocket.rpc.server import Address, Server
from hocket.telemetry.metrics import serve_metrics
from services.aggregator.app import AggregatorApp
from services.expert_worker.app import WorkerApp
from services.registry.app import RegistryApp
from services.router.app import RouterApp

if TYPE_CHECKING:
    from collections.abc import Callable

    from hocket.rpc.handlers import Handlers
    from hocket.rpc.tls import Tls
    from services.suite.settings import SuiteSettings

_READY_SECONDS_MAX: Final = 60.0


class Suite:
    """All four services in one event loop, serving the router's and the registry's ports.

    Args:
        settings: Of each service.
        admin_token: Guards what changes things; None leaves it open.
        worker_token: Guards Announce; None leaves it open.
        tls: What the ports speak TLS with; None for no TLS.
        metrics: Whether to serve `/metrics` beside each port.
    """

    def __init__(
        self,
        settings: SuiteSettings,
        *,
        admin_token: str | None = None,
        worker_token: str | None = None,
        tls: Tls | None = None,
        metrics: bool = True,
    ) -> None:
        local: dict[str, Handlers] = {}
        self._channels = Channels(local)
        tokens = Tokens(admin=admin_token, worker=worker_token)
        self._registry = RegistryApp(settings.registry, tokens)
        local["registry"] = self._registry.handlers
        worker = replace(settings.worker, registry=f"{LOCAL}registry", name=settings.worker.name or "worker")
        self._worker = WorkerApp(worker, self._channels, f"{LOCAL}worker", worker_token, tokens)
        local["worker"] = self._worker.handlers
        self._aggregator = AggregatorApp(settings.aggregator, self._channels)
        local["aggregator"] = self._aggregator.handlers
        router = replace(settings.router, registry=f"{LOCAL}registry", aggregators=(f"{LOCAL}aggregator",))
        self._router = RouterApp(router, self._channels)
        self._servers = tuple(
            (
                Server(
                    handlers,
                    Address(table.host, table.port),
                    credentials=None if tls is None else tls.server_credentials(service),
                ),
                table,
            )
            for service, handlers, table in (
                ("router", self._router.handlers, settings.router),
                ("registry", self._registry.handlers, settings.registry),
            )
        )
        self._metrics = metrics
        self._stop_metrics: list[Callable[[], None]] = []
        self._is_ready = False

    @property
    def router_address(self) -> Address:
        """Where clients call."""
        return self._servers[0][0].address

    @property
    def registry_address(self) -> Address:
        """Where publishers call."""
        return self._servers[1][0].address

    @property
    def failures(self) -> tuple[asyncio.Event, ...]:
        """One is set when the registry's disk or the worker's device has failed: the process has to end."""
        return self._registry.failed, self._worker.failed

    async def start(self) -> None:
        """Start in the order of dependence; return when a request would be served.

        Raises:
            OSError: A port is taken.
            TimeoutError: The router has not heard of the worker in a minute.
        """
        for app in (self._registry, self._worker, self._aggregator, self._router):
            await app.start()
        for server, _ in self._servers:
            await server.start()
            if self._metrics:
                self._stop_metrics.append(serve_metrics(server.address.host, server.address.port + METRICS_PORT_OFFSET))
        try:
            async with asyncio.timeout(_READY_SECONDS_MAX):
                await self._router.directory.wait_for_worker()
        except TimeoutError:
            raise TimeoutError(f"the worker was not heard of in {_READY_SECONDS_MAX:g} seconds: see the log") from None
        for server, _ in self._servers:
            server.set_ready()
        self._is_ready = True

    async def stop(self) -> None:
        """Drain the ports, as a process of one service does, then stop the services in reverse.

        Also what a `start` that was cancelled has come to.
        """
        is_serving = self._is_ready and not any(failure.is_set() for failure in self.failures)
        await drain(self._servers, give_notice=is_serving)
        for stop in self._stop_metrics:
            await asyncio.to_thread(stop)
        for app in (self._router, self._aggregator, self._worker, self._registry):
            await app.stop()
        await self._channels.close()
