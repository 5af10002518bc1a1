"""Which aggregator is asked, when another one is, and what a call that went wrong says about whom."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest

from hocket.errors import HocketError, Reason
from hocket.rpc.breaker import FAILURES_MAX, OPEN_SECONDS
from hocket.v1 import aggregator_pb2, plan_pb2, text_pb2
from services.router.aggregators import Aggregators
from tests.virtual_time import in_virtual_time

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

Step: TypeAlias = "float | str | HocketError"
"""What a scripted call does: sleeps so many seconds, delivers a partial, the final value or a text event, or fails."""

FINE: list[Step] = ["final"]
NEVER = 3600.0
PATIENCE = 0.5
SECONDS = 10.0
ROWS = aggregator_pb2.CombineRequest()
TEXT = aggregator_pb2.CombineRequest(text=text_pb2.TextJob())


def transport(reason: Reason) -> HocketError:
    """A failure that no service has made."""
    return HocketError(reason, "no", grpc_status="whatever")


def refusal(reason: Reason) -> HocketError:
    return HocketError(reason, "no", request_id="r")


AWAY: list[Step] = [transport(Reason.UNREACHABLE)]
DRAINING: list[Step] = [refusal(Reason.DRAINING)]


@dataclass(eq=False)
class Scripted:
    """An aggregator's client.

    Attributes:
        script: What its next calls do.
        deadlines: What it was given, in seconds.
        out_of_reach: Whether its channel knows that it cannot connect.
        running: Calls that run now.
    """

    script: list[Step] = field(default_factory=lambda: FINE)
    deadlines: list[float] = field(default_factory=list)
    out_of_reach: bool = False
    running: int = 0

    def is_away(self) -> bool:
        return self.out_of_reach

    async def combine(
        self, request: aggregator_pb2.CombineRequest, timeout_seconds: float, on_load: Any
    ) -> AsyncGenerator[aggregator_pb2.CombineResponse, None]:
        del request, on_load
        self.deadlines.append(timeout_seconds)
        self.running += 1
        try:
            for step in self.script:
                if isinstance(step, float):
                    await asyncio.sleep(step)
                elif isinstance(step, HocketError):
                    raise step
                elif step == "partial":
                    yield aggregator_pb2.CombineResponse(partial=plan_pb2.Combination())
                elif step == "text":
                    yield aggregator_pb2.CombineResponse(text=text_pb2.TextEvent())
                elif step == "finish":
                    yield aggregator_pb2.CombineResponse(text=text_pb2.TextEvent(finish=text_pb2.TextFinish()))
                else:
                    yield aggregator_pb2.CombineResponse(final=plan_pb2.Prediction())
        finally:
            self.running -= 1

    @property
    def asked(self) -> int:
        return len(self.deadlines)


class Some:
    """Aggregators, and a call to them."""

    def __init__(self, *scripts: list[Step]) -> None:
        self.clients = [Scripted(script) for script in scripts]
        self.aggregators = Aggregators(self.clients, PATIENCE)  # type: ignore[arg-type]  # scripted ones
        self.aggregators._breakers._clock = time.monotonic  # of the test

    async def call(self, seconds: float = SECONDS, request: aggregator_pb2.CombineRequest = ROWS) -> int:
        """The number of events it delivers."""
        events = self.aggregators.combine(request, time.monotonic() + seconds, lambda _: None)
        async with aclosing(events):
            return len([event async for event in events])

    async def fails(self, request: aggregator_pb2.CombineRequest = ROWS) -> HocketError:
        with pytest.raises(HocketError) as caught:
            await self.call(request=request)
        return caught.value

    @property
    def asked(self) -> list[int]:
        return [client.asked for client in self.clients]

    def exhaust(self) -> None:
        while self.aggregators._budget.spend():
            pass


@in_virtual_time
async def test_aggregators_that_are_equally_busy_take_turns() -> None:
    some = Some(FINE, FINE, FINE)
    for _ in range(6):
        assert await some.call() == 1
    assert some.asked == [2, 2, 2]


@in_virtual_time
async def test_the_one_with_the_fewest_calls_in_flight_is_asked() -> None:
    some = Some([1.0, "final"], FINE)
    slow, quick = some.clients
    running = [asyncio.create_task(some.call()) for _ in range(2)]
    await asyncio.sleep(0.1)
    for _ in range(10):
        await some.call()
    assert (slow.asked, quick.asked) == (1, 11)
    await asyncio.gather(*running)
    for _ in range(4):
        await some.call()
    assert (slow.asked, quick.asked) == (3, 13)


@in_virtual_time
async def test_one_that_hangs_holds_up_no_more_calls_than_the_others_run() -> None:
    some = Some([NEVER], [0.05, "final"])
    ended = 0

    async def keep_asking() -> None:
        nonlocal ended
        while True:
            await some.call(SECONDS)
            ended += 1

    asking = [asyncio.create_task(keep_asking()) for _ in range(8)]
    await asyncio.sleep(SECONDS / 2)
    for task in asking:
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)
    assert some.clients[0].asked == 4  # half of those there are, once
    assert ended > 4 * (SECONDS / 2 / 0.05) * 0.9
    assert set(some.aggregators._in_flight.values()) == {0}


@in_virtual_time
@pytest.mark.parametrize("delivered", [False, True])
@pytest.mark.parametrize("waited", [PATIENCE * 0.9, PATIENCE * 1.1])
async def test_a_caller_that_goes_after_the_patience_speaks_against_a_silent_one(
    waited: float,
    delivered: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    some = Some(["partial", NEVER] if delivered else [NEVER], FINE)
    for _ in range(2 * FAILURES_MAX):
        asking = asyncio.create_task(some.call())
        await asyncio.sleep(waited)
        asking.cancel()
        await asyncio.wait([asking])
    assert some.asked == [FAILURES_MAX] * 2
    for _ in range(4):
        asking = asyncio.create_task(some.call())
        await asyncio.sleep(0.01)
        asking.cancel()
        await asyncio.wait([asking])
    silent = waited > PATIENCE and not delivered
    assert some.clients[0].asked == FAILURES_MAX + (0 if silent else 2)


@in_virtual_time
async def test_a_caller_in_a_hurry_has_patience_for_half_of_its_time() -> None:
    some = Some([PATIENCE / 2, transport(Reason.DEADLINE)], FINE)
    for _ in range(2 * FAILURES_MAX):
        await asyncio.gather(some.call(PATIENCE * 0.6), return_exceptions=True)
    some.clients[0].script = FINE
    for _ in range(4):
        await some.call()
    assert some.clients[0].asked == FAILURES_MAX


@in_virtual_time
@pytest.mark.parametrize("gone", [AWAY, DRAINING], ids=["unreachable", "draining"])
async def test_a_call_that_has_delivered_nothing_goes_to_the_next_when_one_is_away(gone: list[Step]) -> None:
    some = Some(gone, FINE)
    for _ in range(4):
        assert await some.call() == 1
    assert some.asked[1] == 4


@in_virtual_time
async def test_an_answer_that_has_begun_is_not_begun_again() -> None:
    some = Some(["partial", *AWAY], ["partial", *AWAY])
    assert (await some.fails()).reason is Reason.UNREACHABLE
    assert sum(some.asked) == 1


@in_virtual_time
@pytest.mark.parametrize(
    "reason",
    [Reason.NO_REPLICA, Reason.COVERAGE, Reason.QUEUE_FULL, Reason.INTERNAL, Reason.DEADLINE, Reason.BAD_REQUEST],
)
async def test_what_an_aggregator_says_is_the_answer(reason: Reason) -> None:
    some = Some([refusal(reason)], [refusal(reason)])
    assert (await some.fails()).reason is reason
    assert sum(some.asked) == 1


@in_virtual_time
async def test_nobody_there_is_unreachable_with_a_pause_and_without_the_transports_words() -> None:
    some = Some(AWAY, DRAINING)
    refused = await some.fails()
    assert (refused.reason, refused.retry_after_seconds, refused.metadata) == (Reason.UNREACHABLE, 1.0, {})
    assert some.asked == [1, 1]


@in_virtual_time
async def test_one_that_is_out_of_reach_is_passed_over_and_that_costs_nothing() -> None:
    some = Some(FINE, FINE)
    some.clients[0].out_of_reach = True
    some.exhaust()
    for _ in range(4):
        await some.call()
    assert some.asked == [0, 4]


@in_virtual_time
async def test_the_last_one_is_always_tried() -> None:
    some = Some(FINE)
    some.clients[0].out_of_reach = True
    assert await some.call() == 1


@in_virtual_time
async def test_a_spent_budget_asks_nobody_else() -> None:
    some = Some(AWAY, AWAY)
    some.exhaust()
    assert (await some.fails()).reason is Reason.UNREACHABLE
    assert sum(some.asked) == 1


@in_virtual_time
async def test_ten_calls_pay_for_one_more() -> None:
    some = Some(AWAY, AWAY)
    some.exhaust()
    for _ in range(10):
        await some.fails()
    assert sum(some.asked) == 10 + 1


@in_virtual_time
@pytest.mark.parametrize(
    "gone",
    [AWAY, DRAINING, [transport(Reason.INTERNAL)], [PATIENCE * 1.1, transport(Reason.DEADLINE)]],
    ids=["unreachable", "draining", "broken", "silent"],
)
async def test_one_that_keeps_failing_is_asked_last_until_a_probe_succeeds(gone: list[Step]) -> None:
    some = Some(gone, FINE)
    failing, well = some.clients
    while failing.asked < FAILURES_MAX:
        await asyncio.gather(some.call(), return_exceptions=True)
    asked = well.asked
    for _ in range(6):
        await some.call()
    assert (failing.asked, well.asked) == (FAILURES_MAX, asked + 6)
    failing.script = FINE
    await asyncio.sleep(2 * OPEN_SECONDS)
    for _ in range(4):
        await some.call()
    assert failing.asked == FAILURES_MAX + 2


@in_virtual_time
@pytest.mark.parametrize(
    "said",
    [refusal(Reason.INTERNAL), refusal(Reason.NO_REPLICA), refusal(Reason.BAD_ANSWER), transport(Reason.DEADLINE)],
    ids=["its expert's bug", "no replica", "its expert's answer", "a short deadline"],
)
async def test_what_its_experts_do_or_a_short_deadline_does_not_speak_against_it(said: HocketError) -> None:
    some = Some([said], FINE)
    for _ in range(4 * FAILURES_MAX):
        await asyncio.gather(some.call(), return_exceptions=True)
    assert some.asked == [2 * FAILURES_MAX] * 2


@in_virtual_time
async def test_a_probe_whose_caller_goes_is_freed() -> None:
    some = Some(DRAINING, FINE)
    while some.clients[0].asked < FAILURES_MAX:
        await some.call()
    await asyncio.sleep(2 * OPEN_SECONDS)
    some.clients[0].script = [NEVER]
    for _ in range(2):
        asking = asyncio.create_task(some.call())
        await asyncio.sleep(PATIENCE / 2)
        asking.cancel()
        await asyncio.wait([asking])
    assert (some.clients[0].asked, some.clients[0].running) == (FAILURES_MAX + 1, 0)
    some.clients[0].script = FINE
    await some.call()
    await some.call()
    assert some.clients[0].asked > FAILURES_MAX + 1


@in_virtual_time
async def test_each_one_gets_what_is_left_of_the_deadline_less_a_margin() -> None:
    some = Some([4.0, *AWAY], [4.0, *AWAY])
    await some.fails()
    assert sorted(client.deadlines[0] for client in some.clients) == [6.0 - 0.05, 10.0 - 0.05]


@in_virtual_time
async def test_a_text_that_begins_late_and_ends_well_speaks_for_its_aggregator() -> None:
    some = Some([SECONDS / 2, "text", SECONDS / 4, "text"])
    for _ in range(2 * FAILURES_MAX):
        assert await some.call(request=TEXT) == 2
        assert some.aggregators._breakers.admits(some.clients[0])  # type: ignore[arg-type]  # scripted


@in_virtual_time
async def test_a_caller_that_does_not_wait_for_a_text_speaks_against_nobody() -> None:
    some = Some([NEVER], FINE)
    for _ in range(2 * FAILURES_MAX):
        asking = asyncio.create_task(some.call(request=TEXT))
        await asyncio.sleep(2 * PATIENCE)
        asking.cancel()
        await asyncio.wait([asking])
    for _ in range(4):
        await asyncio.gather(asyncio.wait_for(some.call(request=TEXT), 0.01), return_exceptions=True)
    assert some.clients[0].asked == FAILURES_MAX + 2


@in_virtual_time
async def test_an_aggregator_that_lets_texts_hang_until_their_deadline_is_asked_last() -> None:
    some = Some([SECONDS, transport(Reason.DEADLINE)], ["text"])
    while some.clients[0].asked < FAILURES_MAX:
        await asyncio.gather(some.call(request=TEXT), return_exceptions=True)
    for _ in range(6):
        await some.call(request=TEXT)
    assert some.clients[0].asked == FAILURES_MAX


@in_virtual_time
@pytest.mark.parametrize("gone", [AWAY, DRAINING], ids=["unreachable", "draining"])
async def test_a_text_whose_aggregator_goes_away_is_asked_of_the_next_only_before_it_began(
    gone: list[Step],
) -> None:
    some = Some(gone, ["text"])
    for _ in range(2):
        assert await some.call(request=TEXT) == 1
    begun = Some(["text", *gone], ["text", *gone])
    refused = await begun.fails(TEXT)
    assert (refused.reason, sum(begun.asked)) == (Reason.UNREACHABLE, 1)


@in_virtual_time
@pytest.mark.parametrize("ending", [AWAY, DRAINING, [2 * SECONDS, transport(Reason.DEADLINE)]])
async def test_after_the_finish_of_a_text_nothing_can_go_wrong(ending: list[Step]) -> None:
    some = Some(["text", "finish", *ending])
    assert await some.call(request=TEXT) == 2
    assert some.aggregators._breakers.admits(some.clients[0])  # type: ignore[arg-type]  # scripted


@in_virtual_time
async def test_a_text_that_breaks_at_a_worker_speaks_against_no_aggregator() -> None:
    some = Some(["text", refusal(Reason.STREAM_BROKEN)])
    for _ in range(2 * FAILURES_MAX):
        assert (await some.fails(TEXT)).reason is Reason.STREAM_BROKEN
    assert some.aggregators._breakers.admits(some.clients[0])  # type: ignore[arg-type]  # scripted
