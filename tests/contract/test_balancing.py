"""Clients of several routers: turns, readiness, and repetition of what nobody has begun to answer."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import pytest

from hocket.client import Answer, RouterClient, connect
from hocket.errors import HocketError, Reason
from hocket.rpc.handlers import Handlers
from hocket.rpc.server import Address, Server
from hocket.v1.router_pb2_grpc import add_RouterServiceServicer_to_server
from tests import certificates
from tests.fakes import ScriptedRouter

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from hocket.rpc.tls import Tls

ROW = [0.5, 1.5]


class Router(ScriptedRouter):
    """Fails its first so many calls, before or after its first event."""

    def __init__(self) -> None:
        super().__init__()
        self.failures = 0
        self.delivers_first = False

    async def Predict(self, request: Any, context: Any) -> AsyncIterator[Any]:
        async for response in super().Predict(request, context):
            if self.delivers_first:
                yield response
            if self.failures:
                self.failures -= 1
                raise HocketError(Reason.NO_REPLICA, "not now")
            if not self.delivers_first:
                yield response

    async def GetMixture(self, request: Any, context: Any) -> Any:
        if self.failures:
            self._note(request)
            self.failures -= 1
            raise HocketError(Reason.NO_REPLICA, "not now")
        return await super().GetMixture(request, context)


class Routers:
    """Ready routers by name, each behind a port that it keeps through all its lives."""

    def __init__(self, stack: AsyncExitStack, tls: Tls | None = None) -> None:
        self._stack = stack
        self._tls = tls
        self.servers: dict[str, Server] = {}
        self.servicers: dict[str, Router] = {}

    async def start(self, name: str) -> None:
        handlers = Handlers()
        servicer = self.servicers.setdefault(name, Router())
        add_RouterServiceServicer_to_server(servicer, handlers)  # type: ignore[arg-type]  # Handlers stands in for a server
        address = self.servers[name].address if name in self.servers else Address("127.0.0.1", 0)
        credentials = None if self._tls is None else self._tls.server_credentials("router")
        server = Server(handlers, address, credentials=credentials)
        await server.start()
        server.set_ready()
        self._stack.push_async_callback(server.drain, 0)
        self.servers[name] = server

    @property
    def target(self) -> str:
        return "ipv4:" + ",".join(str(server.address) for server in self.servers.values())

    def counts(self) -> Counter[str]:
        return Counter({name: len(servicer.requests) for name, servicer in self.servicers.items()})


@pytest.fixture
async def routers() -> AsyncIterator[Routers]:
    async with AsyncExitStack() as stack:
        started = Routers(stack)
        for name in ("one", "two"):
            await started.start(name)
        yield started


async def asked(routers: Routers, seconds: float) -> Counter[str]:
    """How many calls arrive where, in some time."""
    before = routers.counts()
    await asyncio.sleep(seconds)
    return routers.counts() - before


async def test_routers_come_and_go_without_a_failed_call(routers: Routers) -> None:
    answers = 0
    failures: list[HocketError] = []
    ending = asyncio.Event()

    async def ask(client: RouterClient, *, whole: bool) -> None:
        nonlocal answers
        while not ending.is_set():
            try:
                if whole:
                    assert isinstance(await client.answer("digits", ROW), Answer)
                else:
                    await client.get_mixture("digits")
            except HocketError as error:
                failures.append(error)
            answers += 1

    async with connect(routers.target) as client, asyncio.TaskGroup() as tasks:
        for number in range(4):
            tasks.create_task(ask(client, whole=bool(number % 2)))
        both = await asked(routers, 0.3)
        assert min(both["one"], both["two"]) > 0.4 * both.total(), "they take turns"

        routers.servers["one"].set_ready(ready=False)
        await asyncio.sleep(0.1)
        assert (await asked(routers, 0.2))["one"] == 0, "who is not ready is left out"

        routers.servers["one"].set_ready()
        await asyncio.sleep(0.1)
        assert (await asked(routers, 0.2))["one"] > 0

        await routers.servers["one"].drain(1.0)
        assert (await asked(routers, 0.2))["two"] > 0

        await routers.start("one")
        async with asyncio.timeout(5):
            while (await asked(routers, 0.1))["one"] == 0:
                pass

        assert failures == []
        assert answers > 100

        await routers.servers["two"]._server.stop(None)  # in the middle of what it runs
        assert (await asked(routers, 0.3))["one"] > 0
        ending.set()

    # What the router had begun to answer when it was cut off is not asked for again.
    assert len(failures) <= 2
    assert {error.reason for error in failures} <= {Reason.UNREACHABLE}


@pytest.mark.parametrize("failures", [3, 4])
async def test_a_call_is_made_four_times_in_all(routers: Routers, failures: int) -> None:
    routers.servicers["one"].failures = failures
    await routers.servers["two"].drain(0)
    async with connect(routers.target) as client:
        asking = asyncio.create_task(client.get_mixture("digits"))
        if failures < 4:
            assert (await asking).summary.name == "digits"
        else:
            with pytest.raises(HocketError) as caught:
                await asking
            assert caught.value.reason is Reason.NO_REPLICA
    assert routers.counts().total() == 4


@pytest.mark.parametrize("delivers_first", [False, True])
async def test_a_stream_is_asked_for_again_until_its_first_event(routers: Routers, *, delivers_first: bool) -> None:
    servicer = routers.servicers["one"]
    servicer.failures, servicer.delivers_first = 1, delivers_first
    await routers.servers["two"].drain(0)
    async with connect(routers.target) as client:
        asking = asyncio.create_task(client.answer("digits", ROW))
        if delivers_first:
            with pytest.raises(HocketError) as caught:
                await asking
            assert caught.value.reason is Reason.NO_REPLICA
            assert routers.counts().total() == 1
        else:
            assert isinstance(await asking, Answer)
            assert routers.counts().total() == 2


async def test_one_router_gets_each_call_once(routers: Routers) -> None:
    routers.servicers["one"].failures = 1
    async with connect(str(routers.servers["one"].address)) as client:
        with pytest.raises(HocketError) as caught:
            await client.get_mixture("digits")
    assert caught.value.reason is Reason.NO_REPLICA
    assert routers.counts().total() == 1


async def test_routers_are_found_by_a_name(routers: Routers) -> None:
    async with connect(f"dns:///localhost:{routers.servers['one'].address.port}") as client:
        await client.get_mixture("digits")


async def test_when_no_router_is_ready_calls_fail_at_once(routers: Routers) -> None:
    for server in routers.servers.values():
        server.set_ready(ready=False)
    async with connect(routers.target, timeout_seconds=30) as client, asyncio.timeout(10):
        with pytest.raises(HocketError) as caught:
            await client.get_mixture("digits")
    assert caught.value.reason is Reason.UNREACHABLE


async def test_several_addresses_without_their_kind_are_refused() -> None:
    with pytest.raises(HocketError, match="write several routers as ipv4:") as caught:
        async with connect("127.0.0.1:50051,127.0.0.1:50052"):
            pass
    assert caught.value.reason is Reason.BAD_REQUEST


async def test_several_routers_speak_tls(tmp_path: Path) -> None:
    folder = certificates.make(tmp_path / "ours", "router")
    async with AsyncExitStack() as stack:
        routers = Routers(stack, certificates.tls(folder))
        for name in ("one", "two"):
            await routers.start(name)
        async with connect(routers.target, **certificates.files(folder, None)) as client:
            for _ in range(20):
                await client.get_mixture("digits")
        assert min(routers.counts().values()) > 0
