from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from hocket.client import Answer, connect, connect_health, connect_registry
from hocket.client.health import Health
from hocket.errors import HocketError, Reason
from hocket.rpc.handlers import Handlers
from hocket.rpc.server import Address, Server
from hocket.v1.registry_pb2_grpc import add_RegistryServiceServicer_to_server
from hocket.v1.router_pb2_grpc import add_RouterServiceServicer_to_server
from tests.fakes import ScriptedRegistry, ScriptedRouter

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

ROUTER = "hocket.v1.RouterService"


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    handlers = Handlers()
    add_RouterServiceServicer_to_server(ScriptedRouter(), handlers)  # type: ignore[arg-type]  # Handlers stands in for a server
    add_RegistryServiceServicer_to_server(ScriptedRegistry(), handlers)  # type: ignore[arg-type]  # Handlers stands in for a server
    server = Server(handlers, Address("127.0.0.1", 0))
    await server.start()
    server.set_ready()
    yield server
    await server.drain(0)


async def test_a_router_and_a_registry_are_reached_by_address(server: Server) -> None:
    async with connect(str(server.address)) as router, connect_registry(str(server.address)) as registry:
        answer = await router.answer("digits", [0.5, 1.5])
        assert isinstance(answer, Answer)
        assert [package async for package in registry.list_packages()] == []


async def test_a_server_tells_the_state_of_every_service(server: Server) -> None:
    async with connect_health(str(server.address)) as health:
        assert (await health.list_services())[ROUTER] is Health.SERVING
        server.set_ready(ready=False)
        assert await health.check(ROUTER) is Health.NOT_SERVING
        assert await health.check() is Health.SERVING
        assert await health.check("nobody") is Health.SERVICE_UNKNOWN


async def test_a_watch_tells_every_change_and_ends_with_its_reader(server: Server) -> None:
    async with connect_health(str(server.address)) as health:
        states = health.watch(ROUTER)
        assert await anext(states) is Health.SERVING
        server.set_ready(ready=False)
        assert await anext(states) is Health.NOT_SERVING
        await states.aclose()


async def test_a_server_that_is_not_there_is_unreachable() -> None:
    async with connect_health("127.0.0.1:1", timeout_seconds=1) as health:
        for question in (health.check(), health.list_services()):
            with pytest.raises(HocketError) as refused:
                await question
            assert refused.value.reason is Reason.UNREACHABLE
