from __future__ import annotations

import asyncio
import threading
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from hocket.errors import HocketError, Reason
from services.expert_worker.batching import Answer, Batcher
from services.expert_worker.journal import Journal, _read
from services.expert_worker.loader import Expert
from tests.builders import floats
from tests.worker_numerics import answer, on_device, random_models

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

CPU = torch.device("cpu")
TIMEOUT_SECONDS = 10.0


@dataclass(eq=False)
class Kernel:
    """Doubles its rows and remembers each pass; its script runs first, and may fail."""

    script: Callable[[Any], object] = len
    work_per_row: int = 1
    package: bytes = bytes(32)
    passes: list[list[float]] = field(default_factory=list)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        self.passes.append(rows[:, 0].tolist())
        self.script(rows)
        return rows * 2

    def expert(self) -> Expert:
        return Expert(
            self, 1, wider=False, columns=1, work_per_row=self.work_per_row, family=self, package=self.package
        )


class Gate:
    """Holds the compute thread inside a pass."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.leave = threading.Event()
        self.kernel = Kernel(self._hold)

    def _hold(self, _rows: Any) -> None:
        self.entered.set()
        assert self.leave.wait(TIMEOUT_SECONDS)

    async def hold(self, batcher: Batcher) -> asyncio.Future[Answer]:
        future = batcher.submit(self.kernel.expert(), floats([0]), nothing)
        assert await asyncio.to_thread(self.entered.wait, TIMEOUT_SECONDS)
        return future


def nothing() -> None:
    pass


def batching(queue_max: int = 100) -> Batcher:
    return Batcher(CPU, 1, queue_max, Journal(Path("kept in memory")))


@asynccontextmanager
async def running(queue_max: int = 100) -> AsyncIterator[Batcher]:
    batcher = batching(queue_max)
    batcher.start()
    try:
        yield batcher
    finally:
        await batcher.stop()


async def settled(future: asyncio.Future[Answer]) -> Any:
    async with asyncio.timeout(TIMEOUT_SECONDS):
        return (await future).output.tolist()


async def test_an_answer_belongs_to_its_request() -> None:
    async with running() as batcher:
        expert = Kernel().expert()
        futures = [batcher.submit(expert, floats([place], [-place]), nothing) for place in range(5)]
        assert [await settled(future) for future in futures] == [[[2 * n], [-2 * n]] for n in range(5)]


async def test_requests_of_one_turn_share_a_pass_and_wake_the_loop_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running() as batcher:
        deliveries: list[int] = []
        settle = batcher._settle

        def count(outcomes: Any) -> None:
            deliveries.append(1)
            settle(outcomes)

        monkeypatch.setattr(batcher, "_settle", count)
        one, other = Kernel(), Kernel()
        first, second = one.expert(), other.expert()

        async def ask(expert: Expert, value: float) -> Any:
            return await settled(batcher.submit(expert, floats([value]), nothing))

        calls = [(first, 1.0), (second, 2.0), (first, 3.0), (second, 4.0)]
        assert await asyncio.gather(*(ask(*call) for call in calls)) == [[[2.0]], [[4.0]], [[6.0]], [[8.0]]]
        assert (one.passes, other.passes, len(deliveries)) == ([[1.0, 3.0]], [[2.0, 4.0]], 1)


async def test_small_requests_for_experts_of_one_kind_share_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    rng = np.random.default_rng(2)
    line, curve, members, *_ = (on_device(model) for model in random_models(rng, 3))
    asked = [
        (expert, rng.normal(size=(n, 3)).astype(np.float32)) for n, expert in enumerate((*members, *line, *curve), 1)
    ]
    async with running() as batcher:
        compute = batcher._pass

        def count(jobs: Any) -> Any:
            passes.append(len(jobs))
            return compute(jobs)

        monkeypatch.setattr(batcher, "_pass", count)
        for values, expected in ((2**13, [1, 4]), (9, [1, 1, 3])):
            monkeypatch.setattr("services.expert_worker.batching._SMALL_VALUES", values)
            passes.clear()
            futures = [batcher.submit(expert, rows, nothing) for expert, rows in asked]
            for (expert, rows), future in zip(asked, futures, strict=True):
                assert (await future).output.tobytes() == answer(expert, rows).tobytes()
            assert sorted(passes) == expected


async def test_what_queues_up_during_a_pass_is_the_next_batch() -> None:
    async with running() as batcher:
        gate, kernel = Gate(), Kernel()
        await gate.hold(batcher)
        expert = kernel.expert()
        futures = []
        for place in range(3):
            futures.append(batcher.submit(expert, floats([place]), nothing))
            await asyncio.sleep(0)
        gate.leave.set()
        await asyncio.gather(*futures)
        assert kernel.passes == [[0.0, 1.0, 2.0]]


async def test_answers_do_not_wait_for_a_long_pass_of_their_batch() -> None:
    async with running() as batcher:
        gate, short = Gate(), Kernel()
        gate.kernel.work_per_row = 2**21
        long = batcher.submit(gate.kernel.expert(), floats([0]), nothing)
        quick = batcher.submit(short.expert(), floats([1]), nothing)
        assert await settled(quick) == [[2.0]]
        assert gate.entered.wait(TIMEOUT_SECONDS)
        assert not long.done()
        gate.leave.set()
        await long


async def test_a_request_whose_caller_has_gone_is_not_computed() -> None:
    async with running() as batcher:
        gate, kernel = Gate(), Kernel()
        held = await gate.hold(batcher)
        done: list[str] = []
        expert = kernel.expert()
        gone = batcher.submit(expert, floats([1]), lambda: done.append("gone"))
        stays = batcher.submit(expert, floats([2]), lambda: done.append("stays"))
        gone.cancel()
        await asyncio.sleep(0)
        assert not done
        gate.leave.set()
        assert await settled(stays) == [[4.0]]
        await held
        assert kernel.passes == [[2.0]]
        assert done == ["gone", "stays"]


async def test_an_expert_stays_in_use_until_its_pass_ends_even_if_the_caller_has_gone() -> None:
    async with running() as batcher:
        gate, done = Gate(), asyncio.Event()
        future = batcher.submit(gate.kernel.expert(), floats([1]), done.set)
        assert await asyncio.to_thread(gate.entered.wait, TIMEOUT_SECONDS)
        future.cancel()
        await asyncio.sleep(0.01)
        assert not done.is_set()
        gate.leave.set()
        async with asyncio.timeout(TIMEOUT_SECONDS):
            await done.wait()


async def test_a_request_that_fails_fails_alone() -> None:
    def refuse_thirteen(rows: Any) -> None:
        if (rows == 13).any():
            raise ValueError("unlucky")

    async with running() as batcher:
        expert = Kernel(refuse_thirteen).expert()
        futures = [batcher.submit(expert, floats([value]), nothing) for value in (1, 13, 2)]
        assert await settled(futures[0]) == [[2.0]]
        with pytest.raises(ValueError, match="unlucky"):
            await settled(futures[1])
        assert await settled(futures[2]) == [[4.0]]


async def test_a_bug_fails_the_batch_and_not_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running() as batcher:
        sound, buggy = Kernel().expert(), Kernel(work_per_row=2**21).expert()
        done: list[str] = []
        run = batcher._run
        monkeypatch.setattr(batcher, "_run", lambda jobs: run(jobs) if jobs[0].expert is sound else 1 / 0)
        first = batcher.submit(sound, floats([1]), lambda: done.append("first"))
        second = batcher.submit(buggy, floats([1]), lambda: done.append("second"))
        assert await settled(first) == [[2.0]]
        with pytest.raises(ZeroDivisionError):
            await settled(second)
        assert await settled(batcher.submit(sound, floats([3]), nothing)) == [[6.0]]
        assert done == ["first", "second"]


async def test_no_memory_for_a_pass_is_a_refusal_that_can_be_retried() -> None:
    def exhaust(_rows: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    async with running() as batcher:
        with pytest.raises(HocketError) as refusal:
            await settled(batcher.submit(Kernel(exhaust).expert(), floats([1]), nothing))
        assert refusal.value.reason is Reason.DEVICE_MEMORY
        assert refusal.value.retry_after_seconds


async def test_a_row_that_answers_nan_leaves_its_mates_alone() -> None:
    class Poisoned(Kernel):
        def __call__(self, rows: torch.Tensor) -> torch.Tensor:
            return torch.log(rows)

    async with running() as batcher:
        expert = Poisoned().expert()
        futures = [batcher.submit(expert, floats([value]), nothing) for value in (1, -1)]
        assert await settled(futures[0]) == [[0.0]]
        assert np.isnan(await settled(futures[1])).all()


async def test_a_full_queue_refuses_the_next_until_one_is_settled() -> None:
    async with running(queue_max=2) as batcher:
        gate, kernel = Gate(), Kernel()
        held = await gate.hold(batcher)
        waiting = batcher.submit(kernel.expert(), floats([1]), nothing)
        with pytest.raises(HocketError) as refusal:
            batcher.submit(kernel.expert(), floats([2]), nothing)
        assert refusal.value.reason is Reason.QUEUE_FULL
        assert refusal.value.retry_after_seconds
        waiting.cancel()  # it still takes a place: the thread has not let go of it
        with pytest.raises(HocketError):
            batcher.submit(kernel.expert(), floats([2]), nothing)
        gate.leave.set()
        await held
        assert await settled(batcher.submit(Kernel().expert(), floats([3]), nothing)) == [[6.0]]


async def test_a_pass_stays_within_the_limits_of_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.expert_worker.batching.VALUES_MAX", 3)
    async with running() as batcher:
        kernel = Kernel()
        expert = kernel.expert()
        futures = [batcher.submit(expert, floats([n], [n]), nothing) for n in range(2)]
        futures += [batcher.submit(expert, floats([5]), nothing)]
        assert [await settled(future) for future in futures] == [[[0], [0]], [[2], [2]], [[10]]]
        assert sorted(kernel.passes) == [[0, 0], [1, 1, 5]]


async def test_one_expert_fills_half_of_the_queue_and_others_the_rest() -> None:
    async with running(queue_max=5) as batcher:
        gate, other = Gate(), Kernel().expert()
        held = await gate.hold(batcher)
        slow = gate.kernel.expert()
        waiting = [batcher.submit(slow, floats([1]), nothing) for _ in range(2)]
        with pytest.raises(HocketError, match="for this expert") as refusal:
            batcher.submit(slow, floats([1]), nothing)
        assert refusal.value.reason is Reason.QUEUE_FULL
        assert refusal.value.retry_after_seconds
        waiting += [batcher.submit(other, floats([1]), nothing) for _ in range(2)]
        with pytest.raises(HocketError, match="for cpu"):
            batcher.submit(Kernel().expert(), floats([1]), nothing)
        gate.leave.set()
        await asyncio.gather(held, *waiting)
        assert await settled(batcher.submit(slow, floats([2]), nothing)) == [[4.0]]
        assert not batcher._unsettled_of


async def test_a_queue_of_one_place_is_one_experts_too() -> None:
    async with running(queue_max=1) as batcher:
        assert await settled(batcher.submit(Kernel().expert(), floats([1]), nothing)) == [[2.0]]


class Slow(Kernel):
    """Takes two milliseconds for a row, and says that this is long."""

    def __init__(self) -> None:
        super().__init__(lambda rows: time.sleep(0.002 * len(rows)), work_per_row=2**20)


def executions() -> float:
    return REGISTRY.get_sample_value("hocket_executions_total") or 0.0


class TestSlices:
    async def test_a_pass_that_nobody_waits_for_stops_within_a_tenth_of_a_second(self) -> None:
        async with running() as batcher:
            slow, done = Slow(), asyncio.Event()
            rows = floats(*([n] for n in range(1024)))  # two seconds of work
            future = batcher.submit(slow.expert(), rows, done.set)
            while len(slow.passes) < 3:  # noqa: ASYNC110 - the thread counts them
                await asyncio.sleep(0.001)
            future.cancel()
            async with asyncio.timeout(0.1):
                await done.wait()
            before = executions()
            await asyncio.sleep(0.05)
            assert executions() == before
            assert sum(map(len, slow.passes)) < 200

    async def test_a_pass_that_someone_waits_for_goes_on_to_its_end_in_bounded_slices(self) -> None:
        async with running() as batcher:
            slow, before = Slow(), executions()
            rows = floats(*([n] for n in range(64)))
            assert await settled(batcher.submit(slow.expert(), rows, nothing)) == (2 * rows).tolist()
            assert [row for part in slow.passes for row in part] == list(range(64))
            assert max(map(len, slow.passes)) <= 15  # thirty milliseconds
            assert executions() == before + len(slow.passes)

    async def test_rows_of_those_who_have_gone_are_left_out_and_the_others_are_answered(self) -> None:
        async with running() as batcher:
            gate, slow = Gate(), Slow()
            held = await gate.hold(batcher)
            expert = slow.expert()
            first, gone, last = (
                batcher.submit(expert, floats(*([n] for n in rows)), nothing)
                for rows in (range(6), range(6, 200), range(200, 206))
            )
            gate.leave.set()
            await held
            while not slow.passes:  # noqa: ASYNC110 - the thread counts them
                await asyncio.sleep(0)
            gone.cancel()
            assert await settled(first) == [[2.0 * n] for n in range(6)]
            assert await settled(last) == [[2.0 * n] for n in range(200, 206)]
            assert sum(map(len, slow.passes)) < 60

    async def test_a_short_pass_is_one_execution(self) -> None:
        async with running() as batcher:
            kernel, before = Kernel(), executions()
            await settled(batcher.submit(kernel.expert(), floats(*([n] for n in range(1024))), nothing))
            assert (len(kernel.passes), executions()) == (1, before + 1)

    @pytest.mark.parametrize("work", [1, 200, 2**14])
    async def test_sliced_answers_are_the_same_bits(self, monkeypatch: pytest.MonkeyPatch, work: int) -> None:
        monkeypatch.setattr("services.expert_worker.batching._SLICE_WORK", work)
        monkeypatch.setattr("services.expert_worker.batching._SLICE_SECONDS", 1e-4)
        rng = np.random.default_rng(work)
        asked = [
            (expert, rng.normal(size=(n, 33)).astype(np.float32))
            for model in random_models(rng, 33)
            for expert in on_device(model)
            for n in (1, 57)
        ]
        async with running() as batcher:
            futures = [batcher.submit(expert, rows, nothing) for expert, rows in asked]
            for (expert, rows), future in zip(asked, futures, strict=True):
                assert (await future).output.tobytes() == answer(expert, rows).tobytes()


class TestJournal:
    async def test_what_is_computed_is_marked_while_it_is(self, tmp_path: Path) -> None:
        path = tmp_path / "journal"
        journal = Journal(path)
        journal.open()
        batcher = Batcher(CPU, 1, 10, journal)
        batcher.start()
        gate, failing = Gate(), Kernel(lambda _rows: 1 / 0, package=b"f" * 32)
        gate.kernel.package = b"g" * 32
        held = await gate.hold(batcher)
        queued = batcher.submit(failing.expert(), floats([1]), nothing)
        await asyncio.sleep(0.01)
        assert _read(path.read_bytes()).busy == (b"g" * 32,)
        gate.leave.set()
        await held
        with pytest.raises(ZeroDivisionError):
            await queued
        await batcher.stop()
        assert _read(path.read_bytes()).busy == ()
        journal.close()

    async def test_suspects_share_a_pass_with_no_other_expert(self, monkeypatch: pytest.MonkeyPatch) -> None:
        rng = np.random.default_rng(2)
        members = on_device(random_models(rng, 3)[2])
        packages = (b"s" * 32, b"b" * 32, b"c" * 32)
        experts = [replace(member, package=package) for member, package in zip(members, packages, strict=True)]
        passes: list[set[bytes]] = []
        async with running() as batcher:
            begin = batcher._journal.begin_pass

            def note(marked: Any) -> None:
                passes.append(set(marked))
                begin(marked)

            monkeypatch.setattr(batcher._journal, "begin_pass", note)
            for suspects, shared in ((frozenset(), [{*packages}]), ({packages[0]}, [{packages[0]}, {*packages[1:]}])):
                batcher._journal.suspects = frozenset(suspects)
                passes.clear()
                rows = rng.normal(size=(2, 3)).astype(np.float32)
                futures = [batcher.submit(expert, rows, nothing) for expert in experts]
                for expert, future in zip(experts, futures, strict=True):
                    assert (await future).output.tobytes() == answer(expert, rows).tobytes()
                assert passes == shared

    async def test_a_pass_has_no_more_packages_than_can_be_marked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("services.expert_worker.batching.PASS_PACKAGES_MAX", 2)
        async with running() as batcher:
            kernel = Kernel()
            expert = kernel.expert()
            await asyncio.gather(*(batcher.submit(expert, floats([n]), nothing) for n in range(5)))
            assert sorted(map(len, kernel.passes)) == [1, 2, 2]


async def test_stopping_finishes_what_is_queued_and_takes_nothing_more() -> None:
    batcher = batching()
    with pytest.raises(HocketError) as refusal:
        batcher.submit(Kernel().expert(), floats([1]), nothing)
    assert refusal.value.reason is Reason.DRAINING
    batcher.start()
    future = batcher.submit(Kernel().expert(), floats([1]), nothing)
    await batcher.stop()
    assert await settled(future) == [[2.0]]
    with pytest.raises(HocketError):
        batcher.submit(Kernel().expert(), floats([1]), nothing)
    await batcher.stop()


async def test_a_loop_that_was_closed_without_stopping_does_not_kill_the_thread() -> None:
    batcher = batching()

    async def leave() -> None:
        batcher.start()
        batcher.submit(Kernel(lambda _rows: gate.wait(TIMEOUT_SECONDS)).expert(), floats([1]), nothing)
        await asyncio.sleep(0)

    gate = threading.Event()
    await asyncio.to_thread(asyncio.run, leave())
    thread = batcher._thread
    assert thread is not None
    gate.set()
    batcher._queue.put(None)
    await asyncio.to_thread(thread.join, TIMEOUT_SECONDS)
    assert not thread.is_alive()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.lists(st.tuples(st.integers(0, 99), st.integers(1, 9), st.booleans()), max_size=24))
def test_any_interleaving_answers_the_same_bits_as_alone(seed: int, requests: list[tuple[int, int, bool]]) -> None:
    rng = np.random.default_rng(seed)
    experts = [expert for model in random_models(rng, 5) for expert in on_device(model)]
    asked = [(experts[n % len(experts)], rng.normal(size=(rows, 5)).astype(np.float32), p) for n, rows, p in requests]

    async def ask() -> list[Any]:
        async with running() as batcher:
            futures = []
            for expert, rows, pause in asked:
                futures.append(batcher.submit(expert, rows, nothing))
                if pause:
                    await asyncio.sleep(0)
            return [(await future).output for future in futures]

    for (expert, rows, _), output in zip(asked, asyncio.run(ask()), strict=True):
        assert output.tobytes() == answer(expert, rows).tobytes()
