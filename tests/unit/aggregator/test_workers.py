"""Channels to workers are kept while there is room, and never closed under a running call."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hocket.errors import HocketError, Reason
from hocket.rpc.convert import matrix_to_tensor
from hocket.rpc.handlers import Handlers
from hocket.rpc.local import LocalChannel
from hocket.v1 import expert_worker_pb2, expert_worker_pb2_grpc
from hocket.v1.tensor_pb2 import Tensor
from hocket.v1.text_pb2 import TextJob
from services.aggregator.workers import Workers

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class Answering(expert_worker_pb2_grpc.ExpertWorkerServiceServicer):
    async def RunText(self, request: Any, context: Any) -> AsyncIterator[expert_worker_pb2.RunTextResponse]:
        del request, context
        yield expert_worker_pb2.RunTextResponse()
        await asyncio.Event().wait()

    async def RunTensor(self, request: Any, context: Any) -> expert_worker_pb2.RunTensorResponse:
        del context
        if request.expert == "hangs":
            await asyncio.Event().wait()
        if request.expert == "answers nothing":
            return expert_worker_pb2.RunTensorResponse()
        return expert_worker_pb2.RunTensorResponse(output=matrix_to_tensor(np.ones((1, 1), np.float32)))


class Counted:
    """Channels that note what is opened and forgotten."""

    def __init__(self) -> None:
        self._handlers = Handlers()
        self._handlers.add(expert_worker_pb2_grpc.add_ExpertWorkerServiceServicer_to_server, Answering())
        self.opened: dict[str, LocalChannel] = {}
        self.forgotten: list[str] = []

    def get(self, address: str) -> LocalChannel:
        if address == "local:elsewhere":
            raise KeyError(address)
        return self.opened.setdefault(address, LocalChannel(self._handlers))

    async def forget(self, address: str) -> None:
        self.forgotten.append(address)
        await self.opened.pop(address).close()


async def run(workers: Workers, address: str, expert: str = "e") -> None:
    await workers.run_tensor(address, expert, Tensor(), time.monotonic() + 5.0, {})


@pytest.fixture
def channels() -> Counted:
    return Counted()


@pytest.fixture
def workers(channels: Counted) -> Workers:
    return Workers(channels, kept_max=2)  # type: ignore[arg-type]  # scripted


async def test_the_worker_used_longest_ago_is_forgotten(workers: Workers, channels: Counted) -> None:
    for address in ("a", "b", "a", "c"):
        await run(workers, address)
    assert (channels.forgotten, sorted(channels.opened)) == (["b"], ["a", "c"])
    await run(workers, "b")
    assert channels.forgotten == ["b", "a"]


async def test_a_worker_with_running_calls_is_not_forgotten(workers: Workers, channels: Counted) -> None:
    hanging = asyncio.create_task(run(workers, "a", "hangs"))
    await asyncio.sleep(0)
    for address in ("b", "c"):
        await run(workers, address)
    assert (channels.forgotten, hanging.done()) == (["b"], False)
    others = [asyncio.create_task(run(workers, address, "hangs")) for address in ("c", "d")]
    await asyncio.sleep(0.01)
    assert (channels.forgotten, sorted(channels.opened)) == (["b"], ["a", "c", "d"])
    for task in (hanging, *others):
        task.cancel()
    await asyncio.wait([hanging, *others])


async def test_a_worker_in_mid_answer_is_not_forgotten_until_the_answer_is_closed(
    workers: Workers, channels: Counted
) -> None:
    async with aclosing(workers.run_text("a", TextJob(), time.monotonic() + 5.0, {})) as answering:
        await anext(answering)
        for address in ("b", "c"):
            await run(workers, address)
        assert channels.forgotten == ["b"]
    await run(workers, "d")
    assert channels.forgotten == ["b", "a"]


async def test_an_address_inside_another_process_cannot_be_reached(workers: Workers) -> None:
    with pytest.raises(HocketError) as caught:
        await run(workers, "local:elsewhere")
    assert caught.value.reason is Reason.UNREACHABLE


async def test_an_answer_that_is_no_tensor_is_bad(workers: Workers) -> None:
    with pytest.raises(HocketError) as caught:
        await run(workers, "a", "answers nothing")
    assert caught.value.reason is Reason.BAD_ANSWER


async def test_a_worker_that_was_never_asked_is_not_known_to_be_away(workers: Workers, channels: Counted) -> None:
    assert not workers.is_away("a")
    assert not channels.opened
    await run(workers, "a")
    assert not workers.is_away("a")
