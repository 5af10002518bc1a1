"""Text through aggregator and worker, the same over sockets and inside one process: who reads sets the pace."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack, aclosing
from typing import TYPE_CHECKING, Any, Self

import pytest

from hocket.client.aggregator import AggregatorClient
from hocket.errors import HocketError, Reason
from hocket.rpc.channel import Channels
from hocket.rpc.server import Address, Server
from hocket.v1 import expert_worker_pb2, plan_pb2
from hocket.v1.aggregator_pb2 import CombineRequest
from services.aggregator.app import AggregatorApp
from services.aggregator.settings import AggregatorSettings
from tests.texts import TextWorker, answer, delta, job, start

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable

    from hocket.rpc.handlers import Handlers
    from hocket.v1.aggregator_pb2 import CombineResponse
    from hocket.v1.text_pb2 import TextJob

_EVENT_BYTES = 16_384
_AHEAD_BYTES = 6 * 2**20
"""What a producer may be ahead of its reader on each hop over a socket: the transport's window grows to 4 MiB."""
_AHEAD_EVENTS = 20
"""The same on each hop inside a process."""
_PROMPT_SECONDS = 5.0


class Hops:
    """A client, an aggregator and workers, joined by sockets or inside this process.

    Attributes:
        addresses: Of the workers, by name.
        loads: What the client was told of their loads.
    """

    def __init__(self, kind: str, stack: AsyncExitStack) -> None:
        self._kind = kind
        self._stack = stack
        self._local: dict[str, Handlers] = {}
        self._channels = Channels(self._local)
        stack.push_async_callback(self._channels.close)
        self._client: AggregatorClient | None = None
        self.addresses: dict[str, str] = {}
        self.loads: list[expert_worker_pb2.WorkerLoad] = []

    async def serve(self, name: str, handlers: Handlers) -> str:
        """The address at which these are served."""
        if self._kind == "local":
            self._local[name] = handlers
            return f"local:{name}"
        server = Server(handlers, Address("127.0.0.1", 0))
        await server.start()
        self._stack.push_async_callback(server.drain, 0)
        return str(server.address)

    async def add(self, worker: TextWorker) -> None:
        name = f"w{len(self.addresses)}"
        self.addresses[name] = await self.serve(name, worker.handlers())

    async def answer(self, text: TextJob | None = None, **also: Any) -> AsyncGenerator[CombineResponse, None]:
        if self._client is None:
            app = AggregatorApp(AggregatorSettings(), self._channels)
            self._client = AggregatorClient(self._channels.get(await self.serve("aggregator", app.handlers)))
        request = CombineRequest(text=text or job(self.addresses), **also)
        async with aclosing(self._client.combine(request, 30.0, self.loads.append)) as events:
            async for event in events:
                yield event


@pytest.fixture(params=["local", "wire"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def hops(kind: str) -> AsyncIterator[Hops]:
    async with AsyncExitStack() as stack:
        yield Hops(kind, stack)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5.0):
        while not condition():  # noqa: ASYNC110 - what is waited for happens elsewhere
            await asyncio.sleep(0.005)


async def stands_still(worker: TextWorker) -> int:
    """How many events a worker has said when it says no more."""
    async with asyncio.timeout(10.0):
        while True:
            sent = worker.sent
            await asyncio.sleep(0.15)
            if worker.sent == sent:
                return sent


async def refusal_of(answering: AsyncGenerator[CombineResponse, None]) -> HocketError:
    with pytest.raises(HocketError) as caught:
        async for _ in answering:
            pass
    return caught.value


async def test_an_answer_comes_event_by_event_and_ends_with_the_workers_load(hops: Hops) -> None:
    worker = TextWorker()
    worker.load.in_flight_count = 3
    await hops.add(worker)
    assert [event.text async for event in hops.answer()] == answer()
    assert (worker.jobs, hops.loads) == ([job(hops.addresses)], [worker.load])


async def test_an_event_arrives_while_the_worker_works_on_the_next(hops: Hops) -> None:
    await hops.add(TextWorker([start(), 60.0]))
    async with aclosing(hops.answer()) as answering, asyncio.timeout(5.0):
        assert (await anext(answering)).text == start()


@pytest.mark.parametrize("reason", [Reason.QUEUE_FULL, Reason.DRAINING])
async def test_a_busy_or_leaving_worker_is_followed_by_the_next(hops: Hops, reason: Reason) -> None:
    await hops.add(TextWorker([reason]))
    await hops.add(TextWorker(answer("w1")))
    assert [event.text async for event in hops.answer()] == answer("w1")


async def test_a_refusal_of_the_worker_arrives_with_its_facts(hops: Hops) -> None:
    await hops.add(TextWorker([HocketError(Reason.QUEUE_FULL, "full", retry_after_seconds=1.5, waiting="9")]))
    refusal = await refusal_of(hops.answer())
    assert (refusal.reason, refusal.retry_after_seconds, refusal.metadata["waiting"]) == (Reason.QUEUE_FULL, 1.5, "9")


@pytest.mark.parametrize(
    "also",
    [
        {"plan": plan_pb2.Plan(model="m")},
        {"input": {"datatype": "FP32"}},
        {"partials": True},
        {"min_coverage": 0.0},
        {"on_missing": plan_pb2.ON_MISSING_FAIL},
    ],
    ids=lambda also: next(iter(also)),
)
async def test_a_text_job_stands_alone(hops: Hops, also: dict[str, Any]) -> None:
    await hops.add(TextWorker())
    assert (await refusal_of(hops.answer(**also))).reason is Reason.BAD_REQUEST
    assert len([event async for event in hops.answer()]) == len(answer())


async def test_a_plan_is_checked_before_anybody_is_asked(hops: Hops) -> None:
    worker = TextWorker()
    await hops.add(worker)
    text = job(hops.addresses)
    text.plan.base = "qwen"
    assert (await refusal_of(hops.answer(text))).field == "text.plan.base"
    assert worker.jobs == []


async def test_a_slow_reader_holds_the_worker_back(hops: Hops, kind: str) -> None:
    hop_events = _AHEAD_EVENTS if kind == "local" else _AHEAD_BYTES // _EVENT_BYTES
    worker = TextWorker([start(), *[delta("x" * _EVENT_BYTES)] * 5_000])
    await hops.add(worker)
    async with aclosing(hops.answer()) as answering:
        assert [(await anext(answering)).text.WhichOneof("event") for _ in range(3)] == ["start", "delta", "delta"]
        sent = await stands_still(worker)
        assert 3 < sent <= 3 + 2 * hop_events
        for _ in range(sent):
            await anext(answering)
        await until(lambda: worker.sent > sent)  # it goes on when there is room
        await stands_still(worker)
        begin = time.monotonic()
    await until(lambda: not worker.running)
    assert time.monotonic() - begin < _PROMPT_SECONDS


async def test_a_slow_reader_holds_nobody_else_back(hops: Hops) -> None:
    worker = TextWorker([start(), *[delta("x" * _EVENT_BYTES)] * 5_000])
    await hops.add(worker)
    async with aclosing(hops.answer()) as slow:
        await anext(slow)
        await stands_still(worker)
        worker.script = answer()
        async with asyncio.timeout(5.0):
            assert [event.text async for event in hops.answer()] == answer()


@pytest.mark.parametrize("script", [[60.0], [start(), 60.0], [start(), delta("one"), 60.0]])
async def test_a_reader_that_goes_ends_the_work_at_once(hops: Hops, script: list[Any]) -> None:
    worker = TextWorker(script)
    await hops.add(worker)
    answering = hops.answer()
    for _ in script[:-1]:
        await anext(answering)
    waiting = asyncio.create_task(anext(answering))
    await until(lambda: bool(worker.running))
    begin = time.monotonic()
    waiting.cancel()
    await asyncio.wait([waiting])
    await until(lambda: not worker.running)
    assert time.monotonic() - begin < _PROMPT_SECONDS


# Only sockets break.


class Wire:
    """Carries bytes between a port of its own and a server, until it is cut: to both ends a process has died."""

    def __init__(self, address: str) -> None:
        self._host, _, self._port = address.rpartition(":")
        self._writers: list[asyncio.StreamWriter] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_exception: object) -> None:
        self.cut()
        await asyncio.gather(*self._tasks)

    def cut(self) -> None:
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(self._host, int(self._port))
        self._writers += [writer, far_writer]
        for source, sink in ((reader, far_writer), (far_reader, writer)):
            self._tasks.add(asyncio.create_task(self._carry(source, sink)))

    async def _carry(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(65_536):
                sink.write(data)
                await sink.drain()
        except OSError:
            pass  # cut


@pytest.fixture
async def sockets() -> AsyncIterator[Hops]:
    async with AsyncExitStack() as stack:
        yield Hops("wire", stack)


async def test_a_worker_that_dies_in_mid_answer_breaks_the_stream(sockets: Hops) -> None:
    await sockets.add(TextWorker([start(), delta("one", tokens=2), 60.0]))
    await sockets.add(TextWorker(answer("w1")))
    async with Wire(sockets.addresses["w0"]) as wire:
        sockets.addresses["w0"] = wire.address
        answering = sockets.answer()
        assert [(await anext(answering)).text for _ in range(2)] == [start(), delta("one", tokens=2)]
        wire.cut()
        refusal = await refusal_of(answering)
    assert refusal.reason is Reason.STREAM_BROKEN
    assert (refusal.metadata["worker"], refusal.metadata["tokens"]) == ("w0", "2")


async def test_a_worker_that_dies_before_it_answers_is_followed_by_the_next(sockets: Hops) -> None:
    dying = TextWorker([60.0])
    await sockets.add(dying)
    await sockets.add(TextWorker(answer("w1")))
    async with Wire(sockets.addresses["w0"]) as wire:
        sockets.addresses["w0"] = wire.address
        answering = asyncio.create_task(anext(sockets.answer()))
        await until(lambda: bool(dying.running))
        wire.cut()
        assert (await answering).text == start("w1")


async def test_a_worker_that_is_not_there_is_followed_by_the_next(sockets: Hops) -> None:
    await sockets.add(TextWorker())
    async with Wire(sockets.addresses["w0"]) as wire:
        address = wire.address
    sockets.addresses = {"gone": address, **sockets.addresses}
    assert [event.text async for event in sockets.answer()] == answer()
    refusal = await refusal_of(sockets.answer(job({"gone": address})))
    assert (refusal.reason, refusal.metadata["expert_reason"]) == (Reason.NO_REPLICA, "UNREACHABLE")
