from __future__ import annotations

import asyncio
import gc
import itertools
import weakref
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from structlog.testing import capture_logs

from hocket.errors import HocketError, Reason
from services.expert_worker.engine import engine as engine_module
from services.expert_worker.engine.detokenizer import Detokenizer
from services.expert_worker.engine.engine import Engine, EngineState
from services.expert_worker.engine.scheduler import Counts, EngineLimits
from services.expert_worker.engine.sequence import Delta, Finished, FinishReason, Started
from tests.scripted_engine import (
    CONTEXT,
    EOS,
    LIMITS,
    TIMEOUT_SECONDS,
    VOCABULARY,
    Clock,
    Gate,
    ScriptedRunner,
    alone,
    asking,
    expert,
    read,
    running_engine,
    told,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from services.expert_worker.engine.answer import Answer
    from services.expert_worker.engine.expert import AdapterExpert
    from services.expert_worker.engine.part import Part
    from services.expert_worker.engine.sequence import TextRequest

PAGES = 64


@pytest.fixture(autouse=True)
def logs() -> Iterator[list[Any]]:
    with capture_logs() as entries:
        yield entries


def nothing() -> None:
    pass


def lasting(token_ids: list[int] | range, max_tokens: int = 5, **options: Any) -> TextRequest:
    """A request whose answer has so many tokens, whatever the model says."""
    return replace(asking(token_ids, max_tokens=max_tokens, **options), eos_ids=frozenset())


def ending(length: int) -> TextRequest:
    """One whose answer the model ends after so many tokens."""
    requests = (asking([first, second], max_tokens=30) for first in range(1, 20) for second in range(1, 20))
    return next(request for request in requests if len(alone(request)[1]) == length)


class Ending:
    """Counts how often a request is said to be done."""

    def __init__(self) -> None:
        self.count = 0
        self.event = asyncio.Event()

    def __call__(self) -> None:
        self.count += 1
        self.event.set()

    async def arrival(self) -> None:
        async with asyncio.timeout(TIMEOUT_SECONDS):
            await self.event.wait()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while not condition():  # noqa: ASYNC110 - the engine's thread changes it
            await asyncio.sleep(0)


async def refused(answer: Answer) -> HocketError:
    with pytest.raises(HocketError) as refusal:
        await read(answer)
    return refusal.value


BAD = ((expert("bad"), 1.0),)


def failing(error: Exception) -> Callable[[list[Part]], None]:
    """A script that fails whenever the bad expert takes part."""

    def script(parts: list[Part]) -> None:
        if any(part.mixture is BAD for part in parts):
            raise error

    return script


class TestAnswers:
    async def test_an_answer_starts_grows_token_by_token_and_finishes(self) -> None:
        request = ending(3)
        async with running_engine(ScriptedRunner()) as engine:
            answer = engine.submit(request, nothing)
            events = await read(answer)
            assert [type(event) for event in events] == [Started, Delta, Delta, Delta, Finished]
            assert told(events) == alone(request)
            assert told(events)[2:] == (FinishReason.END, "")
            with pytest.raises(StopAsyncIteration):
                await anext(answer)

    async def test_everyone_is_answered_as_if_alone(self) -> None:
        soft, plain = expert("soft", prompt=[0.5, 0.25, 0.125]), expert("plain")
        requests = [
            asking(range(1, 12), max_tokens=20),
            asking([1], mixture=((plain, 0.5),), max_tokens=20),
            asking([1], mixture=((plain, 0.25),), max_tokens=20),
            asking([3, 4], mixture=((soft, 1.0), (plain, -1.0)), max_tokens=20, temperature=1.0, seed=5),
            asking([3, 4], mixture=((soft, 0.0), (plain, -1.0)), max_tokens=20, temperature=1.0, seed=6),
            asking(range(1, 29), max_tokens=20, temperature=2.0, seed=7, top_k=9),
        ]
        async with running_engine(ScriptedRunner()) as engine:
            answers = [engine.submit(request, nothing) for request in requests]
            results = [told(events) for events in await asyncio.gather(*map(read, answers))]
        assert results == [alone(request) for request in requests]
        assert len({tuple(token_ids) for _, token_ids, _, _ in results}) == len(requests)

    async def test_a_stop_text_ends_the_answer_before_it(self) -> None:
        text = alone(lasting([1, 2], 20))[0]
        request = lasting([1, 2], 20, stops=["nowhere!", text[6:8]])
        async with running_engine(ScriptedRunner()) as engine:
            result = told(await read(engine.submit(request, nothing)))
        assert result == alone(request)
        assert result[2:] == (FinishReason.STOP, text[6:8])
        assert result[0] == text[: text.index(text[6:8])]

    async def test_text_held_back_for_a_stop_that_does_not_come_is_told_at_the_end(self) -> None:
        text = alone(lasting([1, 2], 6))[0]
        request = lasting([1, 2], 6, stops=[text[-2:] + "!"])
        async with running_engine(ScriptedRunner()) as engine:
            *_, last, _ = events = await read(engine.submit(request, nothing))
        assert told(events) == (text, alone(request)[1], FinishReason.LENGTH, "")
        assert isinstance(last, Delta)
        assert last.text == text[-2:]

    async def test_an_answer_ends_where_the_context_does(self) -> None:
        request = lasting(range(1, 29), 1000)
        request = replace(request, token_ids=request.token_ids * 2)
        async with running_engine(ScriptedRunner()) as engine:
            result = told(await read(engine.submit(request, nothing)))
        assert (len(result[1]), result[2]) == (CONTEXT - 56, FinishReason.LENGTH)

    async def test_an_answer_goes_on_after_its_end_if_that_is_to_be_ignored(self) -> None:
        short = ending(3)
        request = replace(short, eos_ids=frozenset(), max_tokens=9)
        async with running_engine(ScriptedRunner()) as engine:
            result = told(await read(engine.submit(request, nothing)))
        assert result == alone(request)
        assert (len(result[1]), result[1][2]) == (9, EOS)

    async def test_ids_that_only_pad_the_vocabulary_are_never_chosen(self) -> None:
        class Padded(ScriptedRunner):
            def run(self, parts: list[Part]) -> torch.Tensor:
                return torch.nn.functional.pad(super().run(parts), (0, 3), value=99.0)

        async with running_engine(Padded()) as engine:
            assert told(await read(engine.submit(asking([1]), nothing))) == alone(asking([1]))

    async def test_time_is_told_from_arrival_to_the_last_token(self) -> None:
        clock, waits = Clock(), iter([3.0, 0.5, 1.0, 4.0, 2.0])

        def work(_parts: list[Part]) -> None:
            clock.now += next(waits)

        async with running_engine(ScriptedRunner(work), clock=clock) as engine:
            started, *_, finished = await read(engine.submit(lasting(range(9), 4), nothing))
        assert started == Started(0.0)
        assert finished == Finished(FinishReason.LENGTH, "", 4, 0.0, 3.5, 7.0, 5, 4.0, 0, 0)

    async def test_waiting_is_told_as_such(self) -> None:
        clock, gate = Clock(), Gate()
        limits = replace(LIMITS, sequences_max=1)
        async with running_engine(ScriptedRunner(gate), clock=clock, limits=limits) as engine:
            first = engine.submit(lasting([1], 1), nothing)
            await gate.arrival()
            second = engine.submit(lasting([1], 1), nothing)
            clock.now += 2.5
            gate.open()
            await read(first)
            started, _, finished = await read(second)
        assert started == Started(2.5)
        assert isinstance(finished, Finished)
        assert finished.wait_seconds == 2.5

    async def test_those_that_arrive_during_a_step_share_the_next_and_wake_the_loop_once(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gate = Gate()
        runner = ScriptedRunner(gate)
        async with running_engine(runner) as engine:
            first = engine.submit(lasting([1], 3), nothing)
            await gate.arrival()
            wakes: list[int] = []
            call = asyncio.get_running_loop().call_soon_threadsafe

            def count(*arguments: Any, **options: Any) -> Any:
                wakes.append(1)
                return call(*arguments, **options)

            others = [engine.submit(lasting([2], 2), nothing) for _ in range(3)]
            with monkeypatch.context() as patch:
                patch.setattr(asyncio.get_running_loop(), "call_soon_threadsafe", count)
                gate.open()
                await asyncio.gather(*map(read, [first, *others]))
        assert [len(parts) for parts in runner.passes] == [1, 4, 4]
        assert len(wakes) == 3


class TestRefusals:
    async def test_before_its_start_and_after_its_stop_nothing_is_taken(self) -> None:
        async with running_engine(ScriptedRunner()) as engine:
            await read(engine.submit(asking([1]), nothing))
            await engine.stop()
            with pytest.raises(HocketError) as refusal:
                engine.submit(asking([1]), nothing)
        assert refusal.value.reason is Reason.DRAINING

    async def test_a_full_queue_refuses_the_next(self) -> None:
        gate = Gate()
        limits = replace(LIMITS, sequences_max=1, queue_max=2)
        async with running_engine(ScriptedRunner(gate), limits=limits) as engine:
            answers = [engine.submit(lasting([1], 2), nothing)]
            await gate.arrival()
            gate.leave.release()
            await anext(answers[0])
            answers += [engine.submit(lasting([1], 2), nothing) for _ in range(2)]
            with pytest.raises(HocketError) as refusal:
                engine.submit(lasting([1], 2), nothing)
            assert refusal.value.reason is Reason.QUEUE_FULL
            assert refusal.value.retry_after_seconds
            await answers[1].aclose()  # it still takes a place: the thread has not let go of it
            with pytest.raises(HocketError):
                engine.submit(lasting([1], 2), nothing)
            gate.open()
            await read(answers[0])
            await read(answers[2])
            await read(engine.submit(lasting([1], 2), nothing))

    @pytest.mark.parametrize(
        ("request_", "twin", "reason"),
        [
            (asking([]), asking([1]), Reason.BAD_REQUEST),
            (asking(range(CONTEXT)), asking(range(CONTEXT - 1)), Reason.TOO_LARGE),
            (
                asking(range(CONTEXT - 2), mixture=((expert("p", prompt=[0.5, 0.5]), 1.0),)),
                asking(range(CONTEXT - 2), mixture=((expert("p", prompt=[0.5, 0.5]), 0.0),)),
                Reason.TOO_LARGE,
            ),
            (
                asking([1], mixture=((expert("a", size_bytes=8), 1.0),)),
                asking([1], mixture=((expert("a", size_bytes=7), 1.0),)),
                Reason.DEVICE_MEMORY,
            ),
        ],
    )
    async def test_what_could_never_run_is_refused(
        self, request_: TextRequest, twin: TextRequest, reason: Reason
    ) -> None:
        async with running_engine(
            ScriptedRunner(), page_count=16, fits=lambda experts: sum(each.size_bytes for each in experts) < 8
        ) as engine:
            ending = Ending()
            with pytest.raises(HocketError) as refusal:
                engine.submit(request_, ending)
            assert refusal.value.reason is reason
            assert refusal.value.retry_after_seconds is None
            assert told(await read(engine.submit(twin, nothing))) == alone(twin)
            assert ending.count == 0
            assert engine.state.waiting_count == 0

    async def test_the_context_is_no_longer_than_the_pages_hold(self) -> None:
        async with running_engine(ScriptedRunner(), page_count=5) as engine:
            assert engine.context_length == 20
            answer = engine.submit(lasting(range(1, 11), 2**32 - 1), nothing)
            assert answer.token_count_max == 10
            text, token_ids, reason, _ = told(await read(answer))
            assert (len(token_ids), reason) == (10, FinishReason.LENGTH)
            assert (text, token_ids) == alone(lasting(range(1, 11), 10))[:2]
            assert engine.submit(lasting(range(1, 11), 3), nothing).token_count_max == 3
            engine.submit(asking(range(19)), nothing)
            with pytest.raises(HocketError, match="20 tokens") as refusal:
                engine.submit(asking(range(20)), nothing)
            assert refusal.value.reason is Reason.TOO_LARGE


class TestMemory:
    async def test_an_answer_that_has_ended_keeps_no_experts_whether_it_is_read_or_not(self) -> None:
        async with running_engine(ScriptedRunner()) as engine:
            runner = engine._passes._runner
            assert isinstance(runner, ScriptedRunner)
            lone = expert("lone")
            known = weakref.ref(lone)
            request = asking([1, 2], mixture=((lone, 1.0),), max_tokens=3)
            del lone
            done = Ending()
            answer = engine.submit(request, done)
            del request
            await done.arrival()
            runner.passes.clear()
            await asyncio.sleep(0.02)
            gc.collect()
            assert known() is None
            assert len(await read(answer)) > 2
            assert answer._calls is None

    async def test_one_whose_next_token_fails_keeps_none_either(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Broken(Detokenizer):
            def push(self, token_id: int) -> str:
                raise LookupError(token_id)

        monkeypatch.setattr(engine_module, "Detokenizer", Broken)
        async with running_engine(ScriptedRunner()) as engine:
            lone = expert("lone")
            known = weakref.ref(lone)
            done = Ending()
            answer = engine.submit(asking([1], mixture=((lone, 1.0),)), done)
            del lone
            await done.arrival()
            runner: Any = engine._passes._runner
            runner.passes.clear()
            await asyncio.sleep(0.02)
            gc.collect()
            assert known() is None
            with pytest.raises(LookupError):
                await read(answer)


class TestCancellation:
    async def test_one_that_waits(self) -> None:
        gate = Gate()
        async with running_engine(ScriptedRunner(gate), limits=replace(LIMITS, sequences_max=1)) as engine:
            first = engine.submit(lasting([1], 2), nothing)
            await gate.arrival()
            done = Ending()
            waiting = engine.submit(lasting([2], 2), done)
            await waiting.aclose()
            assert done.count == 0
            gate.leave.release(2)
            await done.arrival()
            assert engine.state.waiting_count == 0
            gate.open()
            assert told(await read(first)) == alone(lasting([1], 2))
            assert await read(waiting) == []
            assert done.count == 1

    @pytest.mark.parametrize("steps", [1, 2, 3, 5], ids=["prompt", "end of prompt", "first token", "answer"])
    async def test_one_that_runs_within_one_step(self, steps: int) -> None:
        gate = Gate()
        runner = ScriptedRunner(gate)
        async with running_engine(runner, page_count=PAGES) as engine:
            done = Ending()
            answer = engine.submit(lasting(range(1, 17), 20), done)
            for _ in range(steps - 1):
                await gate.arrival()
                gate.leave.release()
            await gate.arrival()
            await answer.aclose()
            used = engine._scheduler.counts.used_page_count
            assert (done.count, used > 0) == (0, True)  # its step still writes there
            gate.leave.release()
            await done.arrival()
            assert engine._scheduler.counts.used_page_count == 0
            assert len(runner.passes) == steps
            await answer.aclose()
            assert await read(answer) == []
            gate.open()
            assert told(await read(engine.submit(asking([1]), nothing))) == alone(asking([1]))
            assert done.count == 1

    async def test_one_whose_reader_is_behind(self) -> None:
        async with running_engine(ScriptedRunner(), limits=replace(LIMITS, unread_max=2)) as engine:
            done = Ending()
            answer = engine.submit(lasting([1], 9), done)
            await anext(answer)
            await answer.aclose()
            await done.arrival()
            assert engine._scheduler.counts.used_page_count == 0

    async def test_one_that_is_whole_already_costs_nothing(self) -> None:
        async with running_engine(ScriptedRunner()) as engine:
            done = Ending()
            answer = engine.submit(lasting([1], 1), done)
            await done.arrival()
            await answer.aclose()
            assert await read(answer) == []
            assert engine._calls.empty()
            assert done.count == 1

    async def test_cancelling_whoever_reads(self) -> None:
        gate = Gate()
        async with running_engine(ScriptedRunner(gate)) as engine:
            done = Ending()
            reading = asyncio.create_task(read(engine.submit(lasting([1], 9), done)))
            await gate.arrival()
            gate.leave.release()
            await gate.arrival()
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
            gate.leave.release()
            await done.arrival()
            gate.open()

    async def test_closing_ends_whoever_reads(self) -> None:
        gate = Gate()
        async with running_engine(ScriptedRunner(gate)) as engine:
            async with aclosing(engine.submit(lasting([1], 9), nothing)) as answer:
                reading = asyncio.create_task(read(answer))
                await gate.arrival()
            assert await reading == []
            gate.open()


class TestExpertsOnTheirWay:
    async def test_an_answer_is_not_done_while_one_of_its_experts_is_copied(self) -> None:
        async with running_engine(ScriptedRunner()) as engine:
            engine._room.coming = frozenset({"late"})
            late, other = Ending(), Ending()
            await engine.submit(asking([1], mixture=((expert("late"), 1.0),)), late).aclose()
            await engine.submit(asking([1], mixture=((expert("other"), 1.0),)), other).aclose()
            await other.arrival()
            assert late.count == 0
            engine._room.coming = frozenset()
            engine._room.arrived()
            await late.arrival()

    async def test_nor_is_it_when_the_engine_stops(self) -> None:
        async with running_engine(ScriptedRunner()) as engine:
            engine._room.coming = frozenset({"late"})
            late = Ending()
            answer = engine.submit(lasting([1], 99, mixture=((expert("late"), 1.0),)), late)
            stopping = asyncio.create_task(engine.stop())
            await asyncio.sleep(0.02)
            assert (late.count, stopping.done()) == (0, False)
            engine._room.coming = frozenset()
            engine._room.arrived()
            await stopping
            assert (await refused(answer)).reason is Reason.DRAINING
            assert late.count == 1

    async def test_who_computes_is_said_once_a_step_and_once_more_when_answers_have_ended(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        said: list[list[str]] = []

        def note(experts: Collection[AdapterExpert], _soon: Collection[AdapterExpert] = ()) -> None:
            said.append([each.digest for each in experts])

        async with running_engine(ScriptedRunner()) as engine:
            monkeypatch.setattr(engine._room, "hold", note)
            await read(engine.submit(lasting([1], 4, mixture=((expert("a"), 1.0),)), nothing))
            await until(lambda: len(said) == 6)
        assert said[:6] == [["a"]] * 4 + [[]] * 2


class TestSlowReaders:
    @pytest.mark.parametrize("unread_max", [1, 2, 3, 8])
    async def test_a_slow_reader_pauses_its_own_answer_and_goes_on_where_it_was(self, unread_max: int) -> None:
        runner = ScriptedRunner()
        async with running_engine(runner, limits=replace(LIMITS, unread_max=unread_max)) as engine:
            slow_request, request = lasting([1, 2], 20), lasting([3], 20)
            slow = engine.submit(slow_request, nothing)
            quick = [engine.submit(request, nothing) for _ in range(5)]
            assert [told(await read(answer)) for answer in quick] == [alone(request)] * 5
            first = await anext(slow)
            computed = sum(part.mixture == () and 1 in part.token_ids for parts in runner.passes for part in parts)
            assert computed <= 1
            assert slow._items.qsize() < unread_max
            events = [first, *await read(slow)]
        assert told(events) == alone(slow_request)

    async def test_the_thread_sleeps_while_nobody_reads(self, monkeypatch: pytest.MonkeyPatch) -> None:
        runner = ScriptedRunner()
        async with running_engine(runner, limits=replace(LIMITS, unread_max=4)) as engine:
            answer = engine.submit(lasting([1], 20), nothing)
            await until(lambda: answer._items.qsize() == 4)
            count = len(runner.passes)
            other = engine.submit(lasting([2], 3), nothing)
            assert told(await read(other)) == alone(lasting([2], 3))
            assert sum(len(parts) for parts in runner.passes) == count + 3
            assert engine.state.running_count == 1
            turns: list[float] = []

            def admit(now: float) -> list[Any]:
                turns.append(now)
                return []

            monkeypatch.setattr(engine._scheduler, "admit", admit)
            await asyncio.sleep(0.02)
            assert len(turns) < 5  # of its last calls, and not of looking again and again
            monkeypatch.undo()
            assert told(await read(answer)) == alone(lasting([1], 20))

    async def test_unread_answers_take_nobody_s_turn(self) -> None:
        limits = replace(LIMITS, unread_max=2, sequences_max=2)
        async with running_engine(ScriptedRunner(), limits=limits) as engine:
            slow = [engine.submit(lasting([place, 2], 20), nothing) for place in (1, 2, 3, 4)]
            await until(lambda: all(answer._items.qsize() == 2 for answer in slow))
            assert told(await read(engine.submit(lasting([3], 20), nothing))) == alone(lasting([3], 20))
            results = await asyncio.gather(*map(read, slow))
            assert [told(events) for events in results] == [alone(lasting([place, 2], 20)) for place in (1, 2, 3, 4)]

    async def test_one_that_nobody_reads_makes_way_for_those_who_need_its_pages_and_goes_on_where_it_was(self) -> None:
        limits = replace(LIMITS, unread_max=2)
        async with running_engine(ScriptedRunner(), page_count=6, limits=limits) as engine:
            slow_request, request = lasting([1], 20), lasting(range(1, 17), 8)
            slow = engine.submit(slow_request, nothing)
            await until(lambda: slow._items.qsize() == 2)
            assert told(await read(engine.submit(request, nothing))) == alone(request)
            assert engine.state.counts.preemption_count == 1
            assert engine.state.running_count == 1  # for whoever asks: it has begun, and has not ended
            events = await read(slow)
        assert told(events) == alone(slow_request)
        finished = events[-1]
        assert isinstance(finished, Finished)
        assert finished.preemption_count == 1


class TestFailures:
    @pytest.mark.parametrize("error", [ValueError("unlucky"), RuntimeError("of the device")])
    async def test_a_part_that_fails_fails_alone(self, error: Exception) -> None:
        gate = Gate()
        fail = failing(error)

        def script(parts: list[Part]) -> None:
            gate(parts)
            fail(parts)

        runner = ScriptedRunner(script)
        async with running_engine(runner, page_count=PAGES) as engine:
            requests = [asking([1, 2, 3], max_tokens=9), asking([4], max_tokens=9), asking([6], mixture=BAD)]
            requests += [asking([7, 8], max_tokens=9)]
            endings = [Ending() for _ in requests]
            first = engine.submit(lasting([9], 1), nothing)
            await gate.arrival()
            answers = [engine.submit(request, ending) for request, ending in zip(requests, endings, strict=True)]
            gate.open()
            await read(first)
            results = await asyncio.gather(*map(read, answers), return_exceptions=True)
            assert results[2] is error
            for place in (0, 1, 3):
                events = results[place]
                assert not isinstance(events, BaseException)
                assert told(events) == alone(requests[place])
            assert [ending.count for ending in endings] == [1] * 4
            assert engine._scheduler.counts.used_page_count == 0
            assert not engine.failed.is_set()

    async def test_a_nan_fails_alone(self) -> None:
        class Poisoned(ScriptedRunner):
            def run(self, parts: list[Part]) -> torch.Tensor:
                logits = super().run(parts)
                sampled = [part for part in parts if part.sampled]
                for row, part in enumerate(sampled):
                    if part.mixture is BAD:
                        logits[row, 3] = torch.nan
                return logits

        gate = Gate()
        runner = Poisoned(gate)
        async with running_engine(runner) as engine:
            first = engine.submit(lasting([9], 1), nothing)
            await gate.arrival()
            bad, good = engine.submit(asking([1], mixture=BAD), nothing), engine.submit(lasting([4], 1), nothing)
            gate.open()
            await read(first)
            assert (await refused(bad)).reason is Reason.BAD_ANSWER
            assert told(await read(good)) == alone(lasting([4], 1))
            assert len(runner.passes) == 2  # nothing is computed again for that

    async def test_a_batch_that_is_too_large_for_the_memory_is_computed_one_by_one(self) -> None:
        def exhaust(parts: list[Part]) -> None:
            if len(parts) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")

        async with running_engine(ScriptedRunner(exhaust)) as engine:
            requests = [asking([place, 2, 3], max_tokens=9) for place in range(1, 5)]
            answers = [engine.submit(request, nothing) for request in requests]
            assert [told(events) for events in await asyncio.gather(*map(read, answers))] == list(map(alone, requests))

    async def test_a_batch_that_is_too_large_again_and_again_is_not_tried_each_step(self) -> None:
        def exhaust(parts: list[Part]) -> None:
            if len(parts) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")

        runner = ScriptedRunner(exhaust)
        async with running_engine(runner) as engine:
            answers = [engine.submit(lasting([place], 16), nothing) for place in range(1, 5)]
            await asyncio.gather(*map(read, answers))
        assert sum(len(parts) > 1 for parts in runner.passes) <= 6
        assert len(runner.passes) <= 4 * 16 + 6

    async def test_a_cpu_without_memory_is_out_of_memory(self) -> None:
        def exhaust(parts: list[Part]) -> None:
            if any(part.mixture is BAD for part in parts):
                torch.empty(2**55)

        runner = ScriptedRunner(exhaust)
        async with running_engine(runner) as engine:
            good = engine.submit(lasting([4], 9), nothing)
            refusal = await refused(engine.submit(asking([1], mixture=BAD), nothing))
            assert (refusal.reason, bool(refusal.retry_after_seconds)) == (Reason.DEVICE_MEMORY, True)
            assert told(await read(good)) == alone(lasting([4], 9))
            assert not engine.failed.is_set()

    async def test_a_pass_that_failed_holds_no_memory_when_it_is_repeated(self) -> None:
        held: list[weakref.ref[torch.Tensor]] = []

        def exhaust(parts: list[Part]) -> None:
            assert all(tensor() is None for tensor in held)
            activations = torch.zeros(9)
            held.append(weakref.ref(activations))
            if len(parts) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")

        async with running_engine(ScriptedRunner(exhaust)) as engine:
            answers = [engine.submit(lasting([place], 4), nothing) for place in (1, 2, 3)]
            await asyncio.gather(*map(read, answers))
            assert len(held) > 12

    async def test_no_memory_for_one_alone_is_a_refusal_that_can_be_retried(self) -> None:
        runner = ScriptedRunner(failing(torch.OutOfMemoryError("CUDA out of memory")))
        async with running_engine(runner) as engine:
            refusal = await refused(engine.submit(asking([1], mixture=BAD), nothing))
            assert refusal.reason is Reason.DEVICE_MEMORY
            assert refusal.retry_after_seconds
            assert len(runner.passes) == 1  # the device is not asked whether it works
            assert told(await read(engine.submit(lasting([1], 1), nothing))) == alone(lasting([1], 1))

    async def test_a_device_that_fails_at_everything_fails_everyone_and_the_engine_is_not_ready(self) -> None:
        working = True
        gate = Gate()

        def script(parts: list[Part]) -> None:
            gate(parts)
            if not working:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")

        async with running_engine(ScriptedRunner(script), limits=replace(LIMITS, sequences_max=2)) as engine:
            endings = [Ending() for _ in range(3)]
            answers = [engine.submit(lasting([1], 9), ending) for ending in endings]
            await gate.arrival()
            assert not engine.failed.is_set()
            working = False
            gate.open()
            refusals = [await refused(answer) for answer in answers]
            assert [refusal.reason for refusal in refusals] == [Reason.NOT_READY] * 3
            assert engine.failed.is_set()
            assert [ending.count for ending in endings] == [1, 1, 1]
            assert (engine.state.running_count, engine.state.waiting_count) == (0, 0)
            with pytest.raises(HocketError) as refusal:
                engine.submit(asking([1]), nothing)
            assert refusal.value.reason is Reason.NOT_READY

    async def test_a_bug_ends_those_that_run_and_not_the_thread(
        self, monkeypatch: pytest.MonkeyPatch, logs: list[Any]
    ) -> None:
        gate = Gate()
        async with running_engine(ScriptedRunner(gate), page_count=PAGES) as engine:
            done = Ending()
            answer = engine.submit(lasting([1], 9), done)
            await gate.arrival()
            with monkeypatch.context() as patch:
                patch.setattr(engine._scheduler, "plan", lambda: 1 / 0)
                gate.open()
                with pytest.raises(RuntimeError, match="a step of the engine has failed") as bug:
                    await read(answer)
                assert bug.value.__cause__ is bug.value.__context__ is None
                assert (done.count, engine._scheduler.counts.used_page_count) == (1, 0)
                await asyncio.sleep(0.02)
            assert [entry["event"] for entry in logs] == ["bug"]  # it waits for others then
            assert told(await read(engine.submit(asking([1]), nothing))) == alone(asking([1]))

    async def test_a_bug_in_making_text_ends_its_own_answer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gate = Gate()
        async with running_engine(ScriptedRunner(gate)) as engine:
            good = engine.submit(lasting([1], 4), nothing)
            await gate.arrival()

            class Broken(Detokenizer):
                def push(self, token_id: int) -> str:
                    raise LookupError(token_id)

            with monkeypatch.context() as patch:
                patch.setattr(engine_module, "Detokenizer", Broken)
                bad = engine.submit(lasting([1], 4), nothing)
            gate.open()
            with pytest.raises(LookupError):
                await read(bad)
            assert told(await read(good)) == alone(lasting([1], 4))

    async def test_a_thread_that_ends_is_a_device_that_has_failed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async with running_engine(ScriptedRunner()) as engine:
            monkeypatch.setattr(engine._scheduler, "drop", lambda _sequence: 1 / 0)
            done = Ending()
            with pytest.raises(HocketError) as refusal:
                await read(engine.submit(lasting([1], 1), done))
            assert (refusal.value.reason, done.count) == (Reason.NOT_READY, 1)
            assert engine.failed.is_set()


class TestStopping:
    async def test_those_that_run_and_wait_are_told(self) -> None:
        gate = Gate()
        runner = ScriptedRunner(gate)
        async with running_engine(runner, limits=replace(LIMITS, sequences_max=1)) as engine:
            endings = [Ending() for _ in range(2)]
            answers = [engine.submit(lasting([1], 9), ending) for ending in endings]
            await gate.arrival()
            stopping = asyncio.create_task(engine.stop())
            await asyncio.sleep(0)
            with pytest.raises(HocketError):
                engine.submit(asking([1]), nothing)
            gate.open()
            await stopping
            assert len(runner.passes) == 1
            assert [ending.count for ending in endings] == [1, 1]
            refusals = [await refused(answer) for answer in answers]
            assert [refusal.reason for refusal in refusals] == [Reason.DRAINING] * 2
            assert refusals[0] is not refusals[1]
            assert not engine.failed.is_set()
            await engine.stop()

    def test_a_loop_that_is_closed_first_is_no_trouble(self) -> None:
        gate = Gate()
        engines: list[Engine] = []

        async def leave() -> None:
            async with running_engine(ScriptedRunner(gate)) as engine:
                engines.append(engine)
                engine.submit(lasting([1], 3), nothing)
                await gate.arrival()
                thread = engine._thread
                engine._thread = None  # so that it is not stopped
                engine._thread_of_test = thread  # type: ignore[attr-defined]

        asyncio.run(leave())
        gate.open()
        engines[0]._calls.put(engines[0]._quit)
        thread = engines[0]._thread_of_test  # type: ignore[attr-defined]
        thread.join(TIMEOUT_SECONDS)
        assert not thread.is_alive()


class TestState:
    async def test_it_tells_who_runs_and_waits_and_how_many_tokens_come(self) -> None:
        clock, gate = Clock(), Gate()
        limits = EngineLimits(step_tokens=8, sequences_max=2, queue_max=9)
        async with running_engine(ScriptedRunner(gate), page_count=10, limits=limits, clock=clock) as engine:
            assert engine.state == EngineState(0, 0, 0.0, 10, Counts(), 0.0)
            answers = [engine.submit(lasting([1, 2], 6), nothing) for _ in range(3)]
            clock.now += 1.5
            assert (engine.state.waiting_count, engine.state.waiting_seconds) == (3, 1.5)
            await gate.arrival()
            gate.leave.release()
            await asyncio.gather(anext(answers[0]), gate.arrival())
            gate.leave.release()
            await gate.arrival()
            await until(lambda: engine.state.running_count == 2)
            assert engine.state == EngineState(2, 1, 1.5, 10, Counts(2, 0, 0, 4), engine.state.tokens_per_second)
            gate.open()
            await asyncio.gather(*map(read, answers))
            assert engine.state == EngineState(0, 0, 0.0, 10, Counts(0, 1, 0, 6), 1.8)
            clock.now += 9.9
            assert engine.state.tokens_per_second == 1.8
            await read(engine.submit(lasting([1], 1), nothing))
            assert engine.state.tokens_per_second == 1.9
            clock.now += 0.1
            assert engine.state.tokens_per_second == 0.1


def test_the_script_is_worth_its_salt() -> None:
    answers = [alone(asking([1], max_tokens=30, temperature=1.0, seed=seed))[1] for seed in range(20)]
    assert len(set(map(tuple, answers))) == 20
    assert len(set(itertools.chain.from_iterable(answers))) == VOCABULARY
