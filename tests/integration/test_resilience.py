"""What callers see when something is away, silent or full; and that nothing goes on for a caller who is gone."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from hocket.client.router import Answer, Partial, Planned, RouterClient
from hocket.errors import HocketError, Reason
from hocket.rpc.breaker import FAILURES_MAX
from hocket.v1 import plan_pb2
from services.aggregator import combine, lineup
from services.aggregator import service as aggregator_service
from services.router import service
from tests.hops import Hops, digest, hops

if TYPE_CHECKING:
    from collections.abc import Callable

ROW = [[1.0, 2.0]]
DEADLINE = 1.0
IN_TIME = 0.5
"""Seconds after its deadline, or after its caller has gone, in which all work for a call has ended."""

each_kind = pytest.mark.parametrize("kind", ["one process", "sockets"])


async def refusal(calls: Hops, *args: Any, **options: Any) -> HocketError:
    with pytest.raises(HocketError) as caught:
        await calls.client.answer(*args, **options)
    return caught.value


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - in a server
            await asyncio.sleep(0.002)


def only(answer: Answer) -> tuple[float, str, int]:
    [contribution] = answer.contributions
    return float(answer.value[0, 0]), contribution.worker, contribution.attempt_count


# Workers.


@each_kind
async def test_a_silent_worker_costs_the_patience_and_after_five_times_nothing(kind: str) -> None:
    async with hops(kind, aggregator={"patience_seconds": 0.1}) as calls:
        calls.scripts["worker-0"].hanging = {digest(1)}
        for _ in range(FAILURES_MAX):
            begin = time.monotonic()
            assert only(await calls.client.answer("one", ROW)) == (1.0, "worker-1", 2)
            assert time.monotonic() - begin >= 0.1
        assert only(await calls.client.answer("one", ROW)) == (1.0, "worker-1", 1)
        assert only(await calls.client.answer("two", ROW)) == (2.0, "worker-0", 1)  # what it answers, it is asked
        await until(lambda: not calls.running)


@each_kind
async def test_a_worker_that_drains_is_followed_by_the_next(kind: str) -> None:
    async with hops(kind) as calls:
        calls.workers["worker-0"].handlers.draining = True
        assert only(await calls.client.answer("one", ROW)) == (1.0, "worker-1", 2)


async def test_a_worker_that_is_gone_is_asked_last_as_soon_as_its_channel_knows() -> None:
    async with hops("sockets") as calls:
        assert only(await calls.client.answer("one", ROW)) == (1.0, "worker-0", 1)
        await calls.workers["worker-0"].stop()
        answers = [only(await calls.client.answer("one", ROW)) for _ in range(10)]
        assert {worker for _, worker, _ in answers} == {"worker-1"}
        assert [attempts for _, _, attempts in answers][3:] == [1] * 7


async def test_workers_that_are_away_are_told_from_an_aggregator_that_is() -> None:
    async with hops("sockets") as calls:
        for worker in calls.workers.values():
            await worker.stop()
        refused = await refusal(calls, "one", ROW)
        assert (refused.reason, refused.metadata["expert_reason"]) == (Reason.NO_REPLICA, "UNREACHABLE")
        refused = await refusal(calls, "both", ROW)
        assert (refused.reason, refused.metadata["expert_reason"]) == (Reason.COVERAGE, "UNREACHABLE")
        await calls.aggregators[0].stop()
        for model in ("one", "both"):
            assert (await refusal(calls, model, ROW)).reason is Reason.UNREACHABLE


@each_kind
async def test_partials_show_a_hedged_expert_as_pending_and_then_who_answered(kind: str) -> None:
    async with hops(kind, aggregator={"patience_seconds": 0.1}) as calls:
        calls.scripts["worker-0"].hanging = {digest(2)}
        events = [event async for event in calls.client.predict("both", ROW, partials=True)]
        assert [type(event) for event in events] == [Planned, Partial, Answer]
        partial, answer = events[1:]
        assert isinstance(partial, Partial)
        assert isinstance(answer, Answer)
        states = [contribution.state for contribution in partial.contributions]
        assert states == [plan_pb2.CONTRIBUTION_STATE_ARRIVED, plan_pb2.CONTRIBUTION_STATE_PENDING]
        assert [(c.worker, c.attempt_count) for c in answer.contributions] == [("worker-0", 1), ("worker-1", 2)]
        assert answer.value.item() == 1.5


# Aggregators.


async def test_when_an_aggregator_goes_no_call_fails() -> None:
    async with hops("sockets", aggregators=2) as calls:
        ended = 0

        async def keep_asking() -> None:
            nonlocal ended
            while ended < 120:
                assert (await calls.client.answer("both", ROW)).value.item() == 1.5
                ended += 1

        asking = [asyncio.create_task(keep_asking()) for _ in range(4)]
        await until(lambda: ended > 30)
        calls.aggregators[0].handlers.draining = True
        await until(lambda: ended > 60)
        await calls.aggregators[0].stop()
        await asyncio.gather(*asking)


@each_kind
async def test_a_router_asks_one_aggregator_only_while_it_is_there(kind: str) -> None:
    async with hops(kind, workers=1, aggregators=2) as calls:
        calls.scripts["worker-0"].refusal = HocketError(Reason.NOT_READY, "no")
        assert (await refusal(calls, "one", ROW)).reason is Reason.NO_REPLICA
        assert calls.scripts["worker-0"].executions == 1


# Compartments.


@each_kind
async def test_a_hanging_model_fills_its_compartment_and_the_others_are_answered(kind: str) -> None:
    changes: dict[str, Any] = {"router": {"in_flight_max": 8}, "aggregator": {"patience_seconds": 30}}
    async with hops(kind, **changes) as calls:
        calls.scripts["worker-0"].hanging = {digest(1)}
        hanging = [asyncio.create_task(calls.client.answer("one", ROW)) for _ in range(6)]  # three quarters
        await until(lambda: calls.scripts["worker-0"].running == 6)
        refused = await refusal(calls, "one", ROW)
        assert (refused.reason, refused.retry_after_seconds) == (Reason.QUEUE_FULL, 0.1)
        well = [asyncio.create_task(calls.client.answer("two", ROW)) for _ in range(2)]
        assert [only(await answer)[0] for answer in well] == [2.0] * 2
        for answer in hanging:
            answer.cancel()
        await asyncio.wait(hanging)
        await until(lambda: not calls.running)
        calls.scripts["worker-0"].hanging = set()
        assert only(await calls.client.answer("one", ROW))[0] == 1.0


@each_kind
async def test_a_hanging_expert_is_missing_from_further_mixtures_and_holds_nobody_else_up(kind: str) -> None:
    settings = {"in_flight_per_expert_max": 2, "patience_seconds": 30}
    async with hops(kind, aggregator=settings) as calls:
        calls.scripts["worker-0"].hanging = {digest(1)}
        hanging = [asyncio.create_task(calls.client.answer("both", ROW)) for _ in range(2)]
        await until(lambda: calls.scripts["worker-0"].running == 2)
        answer = await calls.client.answer("both", ROW, on_missing="renormalise")
        assert answer.value.item() == 2.0
        assert [c.reason for c in answer.contributions] == ["QUEUE_FULL", ""]
        assert (await refusal(calls, "one", ROW)).reason is Reason.QUEUE_FULL
        for task in hanging:
            task.cancel()
        await asyncio.wait(hanging)


@pytest.mark.parametrize(("inline", "threads"), [(2, 0), (1, 2)])
async def test_a_sum_that_takes_long_holds_nobody_else_up(
    monkeypatch: pytest.MonkeyPatch, inline: int, threads: int
) -> None:
    elsewhere = []

    def spied(*asked: Any) -> combine.Combined:
        elsewhere.append(threading.current_thread() is not threading.main_thread())
        return combine.combine(*asked)

    monkeypatch.setattr(lineup, "combine", spied)
    monkeypatch.setattr(aggregator_service, "_INLINE_WORK_MAX", inline)  # two experts, one row, one column
    async with hops("one process") as calls:
        calls.scripts["worker-0"].hanging = {digest(2)}
        events = [event async for event in calls.client.predict("both", ROW, partials=True)]
        assert isinstance(events[-1], Answer)
        assert events[-1].value.item() == 1.5
        assert (len(elsewhere), sum(elsewhere)) == (2, threads)


# Deadlines and callers who go.


@each_kind
@pytest.mark.parametrize("model", ["one", "both"])
@pytest.mark.parametrize("hedged", [False, True])
async def test_at_its_deadline_a_call_has_ended_everywhere(kind: str, model: str, hedged: bool) -> None:  # noqa: FBT001 - a parameter of the test
    async with hops(kind, workers=2 if hedged else 1, aggregator={"patience_seconds": 0.05}) as calls:
        for script in calls.scripts.values():
            script.hanging = {digest(1), digest(2)}
        calls.client = RouterClient(calls.channels.get(calls.router.address), timeout_seconds=DEADLINE)
        begin = time.monotonic()
        refused = await refusal(calls, model, ROW)
        # On a busy machine the caller's own deadline may come before what was missing can be said.
        assert refused.reason in ({Reason.DEADLINE} if model == "one" else {Reason.COVERAGE, Reason.DEADLINE})
        assert refused.metadata.get("expert_reason", "DEADLINE") == "DEADLINE"
        assert DEADLINE / 2 < time.monotonic() - begin < DEADLINE + IN_TIME
        await until(lambda: not calls.running)
        assert time.monotonic() - begin < DEADLINE + 2 * IN_TIME
        experts = 1 if model == "one" else 2
        assert sum(script.executions for script in calls.scripts.values()) == experts * (2 if hedged else 1)


async def test_a_decision_that_takes_long_is_given_up_when_its_caller_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    deciding: list[threading.Event] = []

    def decide(*asked: Any) -> None:
        deciding.append(asked[-1])
        asked[-1].wait(5)
        deciding.clear()

    monkeypatch.setattr(service, "_INLINE_WORK_MAX", 0)
    monkeypatch.setattr(service, "decide", decide)
    async with hops("one process") as calls:
        asking = asyncio.create_task(calls.client.answer("one", ROW))
        await until(lambda: bool(deciding))
        asking.cancel()
        await asyncio.wait([asking])
        await asyncio.sleep(IN_TIME)
        assert (deciding, calls.running) == ([], 0)


@each_kind
@pytest.mark.parametrize("hedged", [False, True])
async def test_when_its_caller_goes_a_call_has_ended_everywhere(kind: str, hedged: bool) -> None:  # noqa: FBT001 - a parameter of the test
    async with hops(kind, aggregator={"patience_seconds": 0.05 if hedged else 30}) as calls:
        for script in calls.scripts.values():
            script.hanging = {digest(1), digest(2)}
        asking = asyncio.create_task(calls.client.answer("both", ROW))
        wanted = 4 if hedged else 2
        await until(lambda: sum(script.running for script in calls.scripts.values()) == wanted)
        asking.cancel()
        await asyncio.wait([asking])
        await asyncio.sleep(IN_TIME)
        assert calls.running == 0
        assert sum(script.executions for script in calls.scripts.values()) == wanted
