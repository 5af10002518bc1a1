"""The four services, in one process over the local channel or apart over sockets, with a publisher they trust."""

from __future__ import annotations

import asyncio
import socket
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hocket import known_bases
from hocket.client.registry import RegistryClient
from hocket.client.router import RouterClient
from hocket.errors import HocketError, Reason
from hocket.identity import digest_of
from hocket.packages import Purpose
from hocket.packages.expert import is_expert
from hocket.rpc.channel import Channels
from hocket.rpc.handlers import Tokens
from hocket.rpc.server import Address, Server
from hocket.trust_folder import TrustFolder
from services.aggregator.app import AggregatorApp
from services.aggregator.settings import AggregatorSettings
from services.expert_worker.app import WorkerApp
from services.expert_worker.settings import WorkerSettings
from services.registry.app import RegistryApp
from services.registry.settings import RegistrySettings
from services.router.app import RouterApp
from services.router.settings import RouterSettings
from services.suite.app import Suite
from services.suite.settings import SuiteSettings
from tests.signing import ACME_SEED, envelope_of, trusted

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    import grpc

    from hocket.mixtures import MixtureRecord
    from hocket.rpc.tls import Tls


@dataclass
class Deployment:
    """A running suite and clients of it.

    Attributes:
        router: Asks the router over a real socket.
        registry: Asks the registry over a real socket.
        channel: To the router, for raw stubs.
        registry_channel: To the registry, likewise.
        trust: The trust folder of registry and worker; it trusts `acme`.
        app: The worker itself; None where it is another process's.
        address: Of the router; empty where nobody has said.
    """

    router: RouterClient
    registry: RegistryClient
    channel: grpc.aio.Channel
    registry_channel: grpc.aio.Channel
    trust: TrustFolder
    app: WorkerApp | None = None
    address: str = ""

    async def publish(self, data: bytes, name: str = "", seed: bytes = ACME_SEED) -> str:
        """Publish under a release of acme's, wait until the router knows it, and return the digest."""
        digest = digest_of(data)
        release = envelope_of(
            data, seed, name or f"acme/p-{digest[7:19]}@1", format="expert" if is_expert(data) else "apr"
        )
        await self.registry.publish(data, release)
        await self.known(digest)
        return digest

    async def put(self, record: MixtureRecord, gate: bytes = b"") -> str:
        """Put a mixture under a release of acme's, and wait until the router knows it."""
        release = envelope_of(
            record.body(), ACME_SEED, f"acme/{record.name}@1", purpose=Purpose.MIXTURE, format="mixture"
        )
        await self.registry.put_mixture(record.body(), release, gate)
        await self.known(record.digest)
        return record.digest

    async def known(self, model: str) -> None:
        async with asyncio.timeout(5):
            while True:
                try:
                    await self.router.get_mixture(model)
                except HocketError as error:
                    if error.reason is Reason.NOT_SERVABLE:  # an adapter expert is no model
                        return
                    assert error.reason in {Reason.UNKNOWN_MODEL, Reason.NOT_READY}, error  # noqa: PT017 - waiting
                    await asyncio.sleep(0.005)
                else:
                    return


def settings_in(folder: Path, base: Path | None = None, **changes: dict[str, Any]) -> SuiteSettings:
    """Settings of a suite that lives in a folder of its own, on free ports.

    Args:
        folder: For its data.
        base: Folder of a base model that the operator has added; None for none.
        changes: Settings by table.
    """
    common = {"data_dir": folder, "trust_dir": folder / "trust"}
    if base is not None:
        known_bases.add(folder / "bases", base)
        text = {"bases_dir": folder / "bases", "slab_bytes": 2**21, "budget_bytes": 2**22}
        changes = {**changes, "worker": {**text, **changes.get("worker", {})}}
    port = {"port": 0, "drain_notice_seconds": 0.0}
    return SuiteSettings(
        RouterSettings(**{**port, **changes.get("router", {})}),
        AggregatorSettings(**{**port, **changes.get("aggregator", {})}),
        RegistrySettings(**{**common, **port, "trust_poll_seconds": 0.05, **changes.get("registry", {})}),
        WorkerSettings(**{**common, **port, "device": "cpu", "compute_threads": 1, **changes.get("worker", {})}),
    )


@asynccontextmanager
async def deployed(
    kind: str, folder: Path, tls: Tls | None = None, base: Path | None = None, **changes: dict[str, Any]
) -> AsyncIterator[Deployment]:
    """A suite of the given kind, ready to answer.

    Args:
        kind: `one process` or `four servers`.
        folder: For its data.
        tls: What everyone speaks TLS with; None for no TLS.
        base: Folder of the worker's base model; None for none.
        changes: Settings by table.
    """
    trust = TrustFolder(folder / "trust")
    trust.add_key(trusted())
    settings = settings_in(folder, base, **changes)
    async with AsyncExitStack() as stack:
        if kind == "one process":
            suite = Suite(settings, tls=tls, metrics=False)
            await suite.start()
            stack.push_async_callback(suite.stop)
            router, registry, worker = str(suite.router_address), str(suite.registry_address), suite._worker
        else:
            router, registry, worker = await _apart(settings, tls, stack)
        channels = Channels(tls=tls)
        stack.push_async_callback(channels.close)
        channel, to_registry = channels.get(router), channels.get(registry)
        yield Deployment(
            RouterClient(channel), RegistryClient(to_registry), channel, to_registry, trust, worker, router
        )


async def _apart(settings: SuiteSettings, tls: Tls | None, stack: AsyncExitStack) -> tuple[str, str, WorkerApp]:
    """Each service behind a port of its own; only sockets between them."""
    channels = Channels(tls=tls)

    async def serve(service: str, app: Any, port: int = 0) -> str:
        await app.start()
        credentials = None if tls is None else tls.server_credentials(service)
        server = Server(app.handlers, Address("127.0.0.1", port), credentials=credentials)
        await server.start()

        async def stop() -> None:
            await server.drain(1.0)
            await app.stop()

        stack.push_async_callback(stop)
        return str(server.address)

    stack.push_async_callback(channels.close)
    registry = await serve("registry", RegistryApp(settings.registry, Tokens()))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {name: getattr(settings.worker, name) for name in settings.worker.__slots__}
    worker = WorkerApp(WorkerSettings(**{**common, "registry": registry}), channels, f"127.0.0.1:{port}")
    await serve("worker", worker, port)
    aggregator = await serve("aggregator", AggregatorApp(settings.aggregator, channels))
    common = {name: getattr(settings.router, name) for name in settings.router.__slots__}
    router = RouterApp(RouterSettings(**{**common, "registry": registry, "aggregators": (aggregator,)}), channels)
    address = await serve("router", router)
    async with asyncio.timeout(10):
        await router.directory.wait_for_worker()
    return address, registry, worker
