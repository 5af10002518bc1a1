from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from typing import TYPE_CHECKING

import pytest

from hocket.errors import HocketError, Reason
from services.expert_worker.tokenising import SmallestFirst

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SECONDS = 10.0


class Gate:
    """Work that is held until it may go on."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.leave = threading.Event()

    def __call__(self) -> str:
        self.entered.set()
        assert self.leave.wait(SECONDS)
        return "held"


@pytest.fixture
def work() -> Iterator[SmallestFirst]:
    work = SmallestFirst("test", waiting_max=3)
    yield work
    work.stop()


def begin(work: SmallestFirst, size_bytes: int, call: Callable[[], object]) -> asyncio.Task[object]:
    return asyncio.create_task(work.run(size_bytes, call))


async def test_what_work_returns_or_raises_is_told(work: SmallestFirst) -> None:
    assert await work.run(1, lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        await work.run(1, lambda: 1 // 0)
    assert await work.run(1, threading.current_thread) is not threading.current_thread()


async def test_small_pieces_do_not_wait_for_large_ones(work: SmallestFirst) -> None:
    gate, done = Gate(), list[int]()
    first = begin(work, 9, gate)
    await asyncio.to_thread(gate.entered.wait, SECONDS)
    others = [begin(work, size, lambda size=size: done.append(size)) for size in (1000, 10, 100)]  # type: ignore[misc]  # mypy reads no default in a lambda
    await asyncio.sleep(0)
    gate.leave.set()
    await asyncio.gather(first, *others)
    assert done == [10, 100, 1000]


async def test_too_many_are_refused_and_may_come_again(work: SmallestFirst) -> None:
    gate = Gate()
    first = begin(work, 9, gate)
    await asyncio.to_thread(gate.entered.wait, SECONDS)
    others = [begin(work, 1, lambda: 1) for _ in range(3)]
    await asyncio.sleep(0)
    with pytest.raises(HocketError) as refusal:
        await work.run(1, lambda: 1)
    assert refusal.value.reason is Reason.QUEUE_FULL
    assert refusal.value.retry_after_seconds
    gate.leave.set()
    await asyncio.gather(first, *others)
    assert await work.run(1, lambda: 1) == 1


async def test_what_nobody_waits_for_is_left_out(work: SmallestFirst) -> None:
    gate, done = Gate(), list[int]()
    first = begin(work, 9, gate)
    await asyncio.to_thread(gate.entered.wait, SECONDS)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await work.run(1, lambda: done.append(1))
    gate.leave.set()
    await first
    await work.run(2, lambda: done.append(2))
    assert done == [2]


async def test_a_sleeping_thread_keeps_no_text(work: SmallestFirst) -> None:
    class Text:
        pass

    def holding() -> tuple[weakref.ref[Text], Callable[[], int]]:
        text = Text()
        return weakref.ref(text), lambda: id(text)

    known, call = holding()
    await work.run(1, call)
    del call
    await asyncio.sleep(0.02)
    gc.collect()
    assert known() is None


async def test_its_thread_ends_after_what_waits() -> None:
    work = SmallestFirst("ending")
    assert await work.run(1, lambda: 1) == 1
    work.stop()
    for thread in threading.enumerate():
        if thread.name == "ending":
            await asyncio.to_thread(thread.join, SECONDS)
            assert not thread.is_alive()
