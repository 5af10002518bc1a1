"""How calls end that nobody ends: at the server's own deadline, and at the end of its grace; also when nobody reads."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from hocket.errors import HocketError, Reason
from hocket.rpc.channel import Channels
from hocket.rpc.handlers import Handlers
from hocket.rpc.server import Address, Server
from hocket.rpc.status import from_rpc_error
from hocket.v1.aggregator_pb2 import CombineRequest
from hocket.v1.aggregator_pb2_grpc import AggregatorServiceStub
from hocket.v1.expert_worker_pb2 import RunTensorRequest
from hocket.v1.expert_worker_pb2_grpc import ExpertWorkerServiceStub, add_ExpertWorkerServiceServicer_to_server
from services.aggregator.app import AggregatorApp
from services.aggregator.settings import AggregatorSettings
from tests.texts import TextWorker, delta, finish, job, start

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

_DEADLINE_SECONDS = 0.5
_ENDLESS = [start(), *[delta("x" * 65_536)] * 1_000, 60.0]


class Served:
    """An aggregator with one scripted worker inside its process, itself over a socket or inside this process.

    Attributes:
        worker: The worker.
        server: The aggregator's.
        stub: Calls the aggregator.
    """

    def __init__(self, kind: str, stack: AsyncExitStack) -> None:
        self._kind = kind
        self._stack = stack

    async def start(self, script: list[Any], *, deadline_seconds: float = 60.0) -> None:
        self.worker = TextWorker(script)
        channels = Channels({"w0": self.worker.handlers()})
        app = AggregatorApp(AggregatorSettings(default_deadline_seconds=deadline_seconds), channels)
        self.server = Server(app.handlers, Address("127.0.0.1", 0))
        await self.server.start()
        clients = Channels({"aggregator": app.handlers})
        for close in (channels.close, self.end, clients.close):
            self._stack.push_async_callback(close)
        address = "local:aggregator" if self._kind == "local" else str(self.server.address)
        self.stub: Any = AggregatorServiceStub(clients.get(address))

    async def end(self) -> None:
        await self.server.drain(0)

    def ask(self) -> Any:
        """A call without a deadline."""
        return self.stub.Combine(CombineRequest(text=job({"w0": "local:w0"})))

    @property
    def runs(self) -> bool:
        return bool(self.worker.running or self.server.handlers.in_flight)


@pytest.fixture(params=["local", "wire"])
async def served(request: pytest.FixtureRequest) -> AsyncIterator[Served]:
    async with AsyncExitStack() as stack:
        yield Served(str(request.param), stack)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5.0):
        while not condition():  # noqa: ASYNC110 - what is waited for happens elsewhere
            await asyncio.sleep(0.005)


async def rest_of(call: Any) -> list[Any]:
    """The events that are still to be read."""
    rest = []
    while (response := await call.read()) is not grpc.aio.EOF:
        rest.append(response.text)
    return rest


async def refusal_of(call: Any) -> HocketError:
    """How a call ends, when all that was sent has been read."""
    with pytest.raises(grpc.RpcError) as caught:
        await asyncio.wait_for(rest_of(call), 5.0)
    return from_rpc_error(caught.value)


async def test_a_call_that_nobody_reads_ends_at_the_servers_deadline(served: Served) -> None:
    await served.start(_ENDLESS, deadline_seconds=_DEADLINE_SECONDS)
    begin = asyncio.get_running_loop().time()
    call = served.ask()
    assert (await call.read()).text == start()
    assert served.runs
    await until(lambda: not served.runs)
    assert asyncio.get_running_loop().time() - begin < _DEADLINE_SECONDS + 1.0
    assert served.worker.sent < len(_ENDLESS) - 1
    assert (await refusal_of(call)).reason is Reason.DEADLINE


async def test_a_call_whose_caller_sets_a_deadline_may_take_longer_than_the_servers(served: Served) -> None:
    await served.start([start(), 2 * _DEADLINE_SECONDS, finish()], deadline_seconds=_DEADLINE_SECONDS)
    call = served.stub.Combine(CombineRequest(text=job({"w0": "local:w0"})), timeout=10 * _DEADLINE_SECONDS)
    assert await rest_of(call) == [start(), finish()]


@pytest.mark.parametrize(
    ("begun", "reason", "tokens"),
    [([], Reason.DRAINING, None), ([start(), delta("a", tokens=3)], Reason.STREAM_BROKEN, "3")],
)
async def test_what_outlasts_the_grace_is_told_so(
    served: Served, begun: list[Any], reason: Reason, tokens: str | None
) -> None:
    await served.start([*begun, 60.0])
    call = served.ask()
    for event in begun:
        assert (await call.read()).text == event
    await until(lambda: bool(served.worker.running))
    draining = asyncio.create_task(served.server.drain(0.05))
    error = await refusal_of(call)
    assert (error.reason, error.metadata.get("tokens")) == (reason, tokens)
    assert error.metadata["request_id"]
    await draining
    assert not served.runs


async def test_what_ends_within_the_grace_ends_well(served: Served) -> None:
    await served.start([start(), 0.1, finish()])
    call = served.ask()
    assert (await call.read()).text == start()
    draining = asyncio.create_task(served.server.drain(5.0))
    assert await rest_of(call) == [finish()]
    await draining


async def test_a_call_that_nobody_reads_does_not_outlast_the_grace(served: Served) -> None:
    await served.start(_ENDLESS)
    call = served.ask()
    await call.read()
    await asyncio.wait_for(served.server.drain(0.05), 5.0)
    await until(lambda: not served.runs)
    call.cancel()


async def test_a_call_with_one_answer_is_told_of_the_end_of_the_grace() -> None:
    class Slow(TextWorker):
        async def RunTensor(self, request: Any, context: Any) -> Any:
            del request, context
            await asyncio.sleep(60.0)

    handlers = Handlers()
    handlers.add(add_ExpertWorkerServiceServicer_to_server, Slow())
    server = Server(handlers, Address("127.0.0.1", 0))
    await server.start()
    channels = Channels()
    call: Any = ExpertWorkerServiceStub(channels.get(str(server.address))).RunTensor(RunTensorRequest())
    await until(lambda: handlers.in_flight == 1)
    await server.drain(0.05)
    with pytest.raises(grpc.RpcError) as caught:
        await call
    refusal = from_rpc_error(caught.value)
    assert (refusal.reason, refusal.retry_after_seconds) == (Reason.DRAINING, 1.0)
    await channels.close()
