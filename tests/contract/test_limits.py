"""What a server allows those who connect: connections, streams, pings, time."""

from __future__ import annotations

import asyncio
import struct
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from hocket.client import RouterClient
from hocket.client.health import Health, HealthClient
from hocket.errors import HocketError, Reason
from hocket.rpc import server as server_module
from hocket.rpc.channel import Channels
from hocket.rpc.handlers import Handlers
from hocket.rpc.server import Address, Server
from hocket.v1.router_pb2_grpc import add_RouterServiceServicer_to_server
from hocket.vendored import health_pb2, health_pb2_grpc
from tests.fakes import ScriptedRouter

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS, PING = 4, 6
FIRST = health_pb2.HealthCheckRequest()


class Router(ScriptedRouter):
    """Notes which connection a call comes over."""

    def __init__(self) -> None:
        super().__init__()
        self.peers: list[str] = []
        self.entered = asyncio.Event()
        self.going_on = asyncio.Event()

    async def GetMixture(self, request: Any, context: Any) -> Any:
        self.peers.append(context.peer())
        return await super().GetMixture(request, context)

    async def Route(self, request: Any, context: Any) -> Any:
        self.entered.set()
        await self.going_on.wait()
        return await super().Route(request, context)


@asynccontextmanager
async def serving(router: Router | None = None, *, in_flight_max: int = 1024) -> AsyncIterator[Server]:
    handlers = Handlers(in_flight_max=in_flight_max)
    add_RouterServiceServicer_to_server(router or Router(), handlers)  # type: ignore[arg-type]  # Handlers stands in for a server
    server = Server(handlers, Address("127.0.0.1", 0))
    await server.start()
    try:
        yield server
    finally:
        await server.drain(0)


@asynccontextmanager
async def connected(server: Server) -> AsyncIterator[grpc.aio.Channel]:
    channels = Channels()
    try:
        yield channels.get(str(server.address))
    finally:
        await channels.close()


def watch(channel: grpc.aio.Channel) -> Any:
    return health_pb2_grpc.HealthStub(channel).Watch(FIRST)


@pytest.fixture
def shortened(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Shortens times that servers are set up with."""

    def shorten(**milliseconds: int) -> None:
        options = dict(server_module._OPTIONS)
        for name, value in milliseconds.items():
            assert value < options[f"grpc.{name}"]
            options[f"grpc.{name}"] = value
        monkeypatch.setattr(server_module, "_OPTIONS", tuple(options.items()))

    return shorten


async def test_one_connection_has_so_many_calls_open_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "_STREAMS_MIN", 2)
    async with serving(in_flight_max=1) as server, connected(server) as channel:
        first, second = watch(channel), watch(channel)
        assert await first.read()
        assert await second.read()
        third = watch(channel)
        waiting = asyncio.create_task(third.read())
        elsewhere = (("grpc.use_local_subchannel_pool", 1),)
        async with grpc.aio.insecure_channel(str(server.address), options=elsewhere) as other:
            assert await HealthClient(other).check() is Health.SERVING
        assert not waiting.done()
        first.cancel()
        assert await asyncio.wait_for(waiting, 5)
        second.cancel()
        third.cancel()


async def test_all_connections_together_have_so_many_calls_open_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "_FEEDS_MAX", 1)
    async with serving(in_flight_max=1) as server, connected(server) as channel:
        first, second = watch(channel), watch(channel)
        assert await first.read()
        assert await second.read()
        with pytest.raises(HocketError, match="limit exceeded") as refused:
            await HealthClient(channel).check()
        assert refused.value.reason is Reason.QUEUE_FULL
        first.cancel()
        await _accepted(HealthClient(channel))
        second.cancel()


async def _accepted(health: HealthClient) -> None:
    """Return when the server has noticed that a call has gone."""
    async with asyncio.timeout(5):
        while True:
            try:
                await health.check()
            except HocketError:
                await asyncio.sleep(0.01)
            else:
                return


async def test_a_connection_without_calls_is_closed(shortened: Any) -> None:
    shortened(max_connection_idle_ms=100)
    async with serving() as server, connected(server) as channel:
        health = HealthClient(channel)
        assert await health.check() is Health.SERVING
        await asyncio.wait_for(channel.wait_for_state_change(grpc.ChannelConnectivity.READY), 5)
        assert channel.get_state() is grpc.ChannelConnectivity.IDLE
        assert await health.check() is Health.SERVING


async def test_old_connections_are_replaced_and_no_call_notices(shortened: Any) -> None:
    shortened(max_connection_age_ms=20)
    router = Router()
    async with serving(router) as server, connected(server) as channel:
        client = RouterClient(channel)
        running = asyncio.create_task(client.route("digits", [1, 2]))
        await router.entered.wait()
        end = asyncio.get_running_loop().time() + 0.5

        async def ask() -> None:
            while asyncio.get_running_loop().time() < end:
                await client.get_mixture("digits")

        await asyncio.gather(*(ask() for _ in range(4)))
        assert len(set(router.peers)) > 5
        router.going_on.set()
        assert (await running).rows, "it has outlived its connection's age, within the grace"


async def test_an_old_connection_ends_with_its_grace(shortened: Any) -> None:
    shortened(max_connection_age_ms=20, max_connection_age_grace_ms=20)
    async with serving() as server, connected(server) as channel:
        call = watch(channel)
        assert await call.read()
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await call.read()
        assert ended.value.code() is grpc.StatusCode.UNAVAILABLE


def frame(kind: int, payload: bytes = b"") -> bytes:
    """An HTTP/2 frame of the whole connection."""
    return struct.pack(">I", len(payload))[1:] + bytes((kind, 0)) + bytes(4) + payload


@pytest.mark.parametrize(("count", "told"), [(3, False), (4, True)])
async def test_who_pings_without_end_is_sent_away(count: int, *, told: bool) -> None:
    async with serving() as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.address.port)
        writer.write(PREFACE + frame(SETTINGS) + frame(PING, bytes(8)) * count)
        received = b""
        try:
            async with asyncio.timeout(0.3):
                while chunk := await reader.read(4096):
                    received += chunk
        except TimeoutError:
            assert not told
        assert (b"too_many_pings" in received) is told
        writer.close()


async def test_who_connects_and_says_nothing_is_sent_away(shortened: Any) -> None:
    shortened(server_handshake_timeout_ms=100)
    async with serving() as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.address.port)
        assert b"handshake timeout" in await asyncio.wait_for(reader.read(), 5)
        writer.close()


@pytest.mark.parametrize(("interval_ms", "told"), [(20, False), (4_999, True)])
async def test_keepalive_is_welcome_at_the_interval_that_the_server_states(
    shortened: Any, interval_ms: int, *, told: bool
) -> None:
    shortened(**{"http2.min_ping_interval_without_data_ms": interval_ms})
    async with serving() as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.address.port)
        writer.write(PREFACE + frame(SETTINGS))
        goes_on = asyncio.create_task(reader.read(-1))
        for _ in range(6):
            writer.write(frame(PING, bytes(8)))
            await asyncio.sleep(0.04)
        await asyncio.wait([goes_on], timeout=0.3)
        assert goes_on.done() is told
        writer.close()
        assert (b"too_many_pings" in await goes_on) is told
